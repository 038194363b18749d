"""Expert parallelism for training: each rank holds some of the experts, and tokens travel to them.

`ExpertParallel` takes the place of `dskernels.fused_experts`, and gives the same as that in one process. A call has the
following steps. A message begins in one step and is waited for in a later one; what lies between runs while it travels.

    dispatch begins    tokens, routing weights and expert ids leave for the ranks of their experts (`_Leave`)
                       the shared expert runs
    dispatch ends      the rows of other ranks' tokens are there (`_Arrive`)
                       this rank's experts run (`_Experts`)
    combine begins     the experts' rows are added up for the tokens of other ranks, and the sums leave (`_LeaveBack`)
                       only another micro-batch can run here (`overlap`)
    combine ends       the rows for this rank's own tokens are added up with the sums that arrived (`_ArriveBack`)

Dispatch carries bf16, or e4m3 with power-of-two scales; combine, and gradients both ways, carry the dtype of the tokens
(DeepSeek-V3 report, section 3.3.2). All sums are in fp32 and in a fixed order, so two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from dskernels.later import Waiting, waiting_for
from dskernels.model.parallel.exchange import Form, Trip, Wire, loaded, unloaded, widths
from dskernels.model.parallel.fixed import FixedTrip
from dskernels.model.parallel.mail import Mail
from dskernels.moe.network import flat, needs_gradient
from dskernels.moe.rows import ExpertRows, Weights, expert_rows, expert_rows_backward
from dskernels.types import Fp8Tensor, Routing


class Chain:
    """The order of the messages of all micro-batches that run at once.

    Messages must begin in the same order on every rank, in the backward too. Each beginning and each end of a message
    takes the `token` that the one before it left, an empty tensor. So to autograd each depends on the one before, and
    the backward runs them in exactly the reverse order.
    """

    def __init__(self) -> None:
        self.token: Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether the next message to be waited for is the one that this micro-batch sends now, or an earlier one."""
        return True

    def switch(self) -> None:
        """Called when a message has begun, where another micro-batch may run; see `overlap`."""


class ExpertParallel:
    """The expert block over the ranks of a group, each of which has tokens and experts of its own.

    Args:
        group: the ranks; rank r holds the experts from ``r * E / R`` on, and calls this with these alone.
        n_experts: E, a multiple of the ranks R.
        wire: what dispatched tokens travel as: "same", their own dtype, or "fp8", e4m3 in 1x128 tiles with
            power-of-two scales, half the bytes.
        most_ranks: the most ranks that the experts of one token are on, where the routing limits them.
        mail: carries messages of a fixed size, in which every token goes to every rank and for which the host never
            waits. By default (None) tokens are counted first, and go only to the ranks of their experts.
        tokens: only with `mail`: the largest number of tokens of a rank, the same number on every rank. Memory and
            messages have this size, so all ranks should bring as many.

    Raises:
        ValueError: the ranks do not divide the experts, an unknown wire, or one of `mail` and `tokens` alone.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n_experts: int,
        *,
        wire: Wire = "same",
        most_ranks: int | None = None,
        mail: Mail | None = None,
        tokens: int | None = None,
    ) -> None:
        if n_experts % group.size():
            raise ValueError(f"n_experts: {group.size()} ranks do not divide {n_experts} experts")
        if wire not in ("same", "fp8"):
            raise ValueError(f'wire: expected "same" or "fp8", got {wire!r}')
        if (mail is None) != (tokens is None):
            raise ValueError("tokens: expected with mail, and not without")
        self.group, self.wire, self.most_ranks = group, wire, most_ranks
        self.mail, self.tokens = mail, tokens
        self.per_rank = n_experts // group.size()
        self.chain: Chain | None = None

    def __call__(
        self,
        x: Tensor,
        w13: Tensor | Fp8Tensor,
        w2: Tensor | Fp8Tensor,
        routing: Routing,
        *,
        shared: tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor] | None = None,
        n_shared: int = 0,
        quantized: Fp8Tensor | None = None,
        fp8: bool = False,
        keep: str = "input",
    ) -> Tensor:
        """As `dskernels.fused_experts`, with ``w13`` and ``w2`` of this rank's experts and ids among all experts.

        Every rank of the group has to call it, with any number of tokens (at most `tokens`, if that is given). Without
        `mail` the host waits for the device once, for the sizes of the messages. The shared expert runs while the
        dispatch travels. Without a gradient, tokens for products in e4m3 are quantised once, by their own rank, and
        travel in e4m3: half the bytes, and the same bits of the result.

        Raises:
            ValueError: `n_shared` is not 0, ``w13`` is not of this rank's number of experts, or there are more tokens
                than `tokens`.
        """
        if n_shared:
            raise ValueError("n_shared: shared experts in the stack of the routed ones are for one process")
        if w13.shape[0] != self.per_rank:
            raise ValueError(f"w13: expected the {self.per_rank} experts of this rank, got {w13.shape[0]}")
        trip = self._trip(x, routing)
        chain = self.chain or Chain()
        form: Form = self.wire
        if form == "same" and not torch.is_grad_enabled() and (fp8 or Fp8Tensor in (type(w13), type(w2))):
            form, quantized = "operand", ds.quantize(x) if quantized is None else quantized
        # The backward keeps the tokens that arrive. So they may not stay in the memory of the messages, unless they are
        # converted from what arrived anyway.
        differentiable = torch.is_grad_enabled()
        lend = form != "same" or not differentiable
        chosen = routing.weights, routing.experts
        ticket, x = _through(_Leave, chain.token, x, *chosen, trip, form, lend, quantized)
        chain.token = ticket
        # While the shared expert runs, this message travels, and the one that the other micro-batch sent before it.
        residual = None if shared is None else ds.feed_forward(x, *shared, quantized=quantized, fp8=fp8, keep=keep)
        chain.switch()
        shape, first = (x.shape[1], x.dtype, routing.weights.shape[1]), self.group.rank() * self.per_rank
        chain.token, arrived, scale, gates, ids = _through(
            _Arrive, ticket, chain.token, trip, shape, form, differentiable
        )
        came = None
        if scale is not None:  # the products read `came`; of `arrived` only the shape and dtype matter
            came, arrived = Fp8Tensor(arrived, scale), arrived.new_empty(arrived.shape, dtype=x.dtype)
        chosen = _fewest(gates, ids, first, self.per_rank, trip.choices)
        block = arrived, *flat(w13), *flat(w2), *chosen
        options = needs_gradient(block), came, fp8, keep
        y, made = _through(_Experts, *block, first, *options, trip)
        # The routing weights in `made` may be lent, and are given back once the rows of other ranks' tokens are added
        # up. The rows of this rank's tokens are added up later, with the weights that it has itself.
        own = None if differentiable else routing.weights
        # What can run while the last of several micro-batches' messages travels is what they compute before their next
        # message: a shared expert, if there is one. With a single micro-batch nothing can.
        urgent = chain.is_last and (shared is None or self.chain is None)
        chain.token = ticket = _through(_LeaveBack, chain.token, y, trip, made, own, urgent)
        del made
        chain.switch()
        # In the backward, the gradient that arrives is read where it arrived, unless gradients of weights are computed
        # later (`dskernels.later`), which read it again.
        lend_back = y.requires_grad and arrived.requires_grad and _waiting(w13, w2) is None
        chain.token, out = _through(_ArriveBack, ticket, chain.token, trip, y.shape[1], y.dtype, residual, lend_back)
        if self.chain is None:
            trip.settle()
        return out

    def _trip(self, x: Tensor, routing: Routing) -> Trip | FixedTrip:
        if self.mail is None or self.tokens is None:
            return Trip.plan(routing.experts, self.group, self.per_rank, self.most_ranks)
        return FixedTrip(self.mail, x.shape[0], self.tokens, x.device)


def _fewest(weights: Tensor, experts: Tensor, first: int, n: int, most: int | None) -> tuple[Tensor, Tensor]:
    """The choices of each row among the n experts from `first` on, in their order, in at most `most` columns.

    A row must not have more of them; dropped choices fill the other columns. With None, everything stays as it is.
    """
    if most is None or most >= experts.shape[1]:
        return weights, experts
    order = ((experts < first) | (experts >= first + n)).int().argsort(dim=1, stable=True)[:, :most]
    return weights.gather(1, order), experts.gather(1, order)


def _waiting(*weights: Tensor | Fp8Tensor) -> Waiting | None:
    """Where gradients of these weights are queued, or None if they are computed at once; see `dskernels.later`."""
    return waiting_for(*(w for w in weights if isinstance(w, Tensor) and w.requires_grad))


class _Nothing:
    """Stands in for the context of an autograd function where there is no gradient: it keeps nothing."""

    def nothing(self, *_: object) -> None:
        """Ignores what should be kept."""

    save_for_backward = mark_non_differentiable = set_materialize_grads = nothing


def _through(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """The result of an autograd function; without a gradient, by a plain call of its forward.

    `apply` takes the host 10 us more, ten times a layer.
    """
    return node.apply(*arguments) if torch.is_grad_enabled() else node.forward(_Nothing(), *arguments)


# ---- what experts make of rows --------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    """This rank's experts: the rows that they make of the tokens, not added up yet.

    To autograd, the result is a tensor ``[rows, H]``, the sum of the choices of each row that arrived, and the gradient
    that comes to it is that of these sums. But the tensor holds no values, since nothing is added up here: it only has
    the shape (`_standing_for`). The rows themselves are the second result, an `ExpertRows`. In the same way, the
    gradient of `x` is only a shape; its rows are passed on as `trip.gradients`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w13: Tensor,
        w13_scale: Tensor | None,
        w2: Tensor,
        w2_scale: Tensor | None,
        weights: Tensor,
        experts: Tensor,
        first: int,
        differentiable: bool,
        quantized: Fp8Tensor | None,
        fp8: bool,
        keep: str,
        trip: Trip | FixedTrip,
    ) -> tuple[Tensor, ExpertRows]:
        both = _weights(w13, w13_scale, w2, w2_scale)
        rows, index, kept = expert_rows(
            x, both, experts, first=first, quantized=quantized, fp8=fp8, differentiable=differentiable, keep=keep
        )
        if differentiable:
            ctx.trip, ctx.first, ctx.fp8, ctx.waiting = trip, first, fp8, _waiting(*both)
            ctx.save_for_backward(x, w13, w13_scale, w2, w2_scale, weights, experts, index, kept)
            ctx.set_materialize_grads(False)
        return _standing_for(x), ExpertRows(rows, index, weights)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        x, *network, weights, experts, index, kept = ctx.saved_tensors
        result: list[Tensor | None] = [None] * 13
        if dout is None:
            return tuple(result)
        needs = [ctx.needs_input_grad[place] for place in (0, 1, 3, 5)]
        chosen = weights, experts, ctx.first
        dx, result[1], result[3], result[5] = expert_rows_backward(
            dout, x, _weights(*network), chosen, kept, fp8=ctx.fp8, needs=needs, waiting=ctx.waiting
        )
        if dx is not None:
            ctx.trip.gradients, result[0] = ExpertRows(dx, index, None), _standing_for(x)
        return tuple(result)


def _weights(w13: Tensor, w13_scale: Tensor | None, w2: Tensor, w2_scale: Tensor | None) -> Weights:
    """The weights as `expert_rows` takes them, given data and scales."""
    blocks = (128, 128)
    up = w13 if w13_scale is None else Fp8Tensor(w13, w13_scale, blocks)
    return up, w2 if w2_scale is None else Fp8Tensor(w2, w2_scale, blocks)


def _standing_for(x: Tensor) -> Tensor:
    """A tensor of the shape and dtype of `x` whose values mean nothing; it takes the memory of one element."""
    return x.new_empty(()).expand(x.shape)


# ---- the four ends of two messages, each other's gradients ----------------------------------------------------------
#
# A message begins in one node of autograd's graph and is waited for in another, in the forward and in the backward.
# What autograd runs in between runs while the message travels. The empty tensor `ticket` leads from the beginning of a
# message to its end, so that they stay in this order; what travels is held by the trip.


class _Leave(torch.autograd.Function):
    """Forward: dispatch begins. Backward: waits for the gradients of tokens and routing weights, and adds them up.

    The second result is `x` again, for the shared expert: so its gradient of the tokens arrives here, and is added in
    the same sum as those from the ranks.
    """

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor | None,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        trip: Trip | FixedTrip,
        form: Form,
        lend: bool,
        quantized: Fp8Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.widths = trip, ((x.shape[1], x.dtype), (weights.shape[1], torch.float32))
        ctx.set_materialize_grads(False)
        scales = (1,) if form == "operand" else ()
        trip.send([*loaded(x, form, quantized), weights, experts.int()], lend=lend, columns=scales)
        return x.new_zeros(0), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, dx: Tensor | None) -> tuple[Tensor | None, ...]:
        dweights = None
        if ctx.trip.pending:  # otherwise no gradient came from what follows the dispatch, and nothing was sent
            dx, dweights = ctx.trip.returned(ctx.widths, dx)
            ctx.trip.settle()
        return None, dx, dweights, None, None, None, None, None


class _Arrive(torch.autograd.Function):
    """Forward: waits for the dispatched tokens and their choices. Backward: their gradients leave, added up."""

    @staticmethod
    def forward(
        ctx: Any,
        ticket: Tensor,
        token: Tensor,
        trip: Trip | FixedTrip,
        shape: tuple[int, torch.dtype, int],
        form: Form,
        differentiable: bool,
    ) -> tuple[Tensor | None, ...]:
        ctx.trip, ctx.shape = trip, shape
        ctx.set_materialize_grads(False)
        hidden, dtype, k = shape
        tail = [(k, torch.float32), (k, torch.int32)]
        *parts, weights, experts = trip.arrived(widths(hidden, dtype, form) + tail)
        scale = parts[1] if form == "operand" else None
        x = parts[0] if form == "operand" else unloaded(parts, dtype)
        if form == "fp8" and differentiable:  # the tokens are converted; what else the backward keeps is copied
            weights, experts = weights.clone(), experts.clone()
            trip.release()
        ctx.mark_non_differentiable(experts)
        return ticket.new_zeros(0), x, scale, weights, experts

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, dx: Tensor | None, __: None, dweights: Tensor | None, ___: None
    ) -> tuple[Tensor | None, ...]:
        (hidden, dtype, k), trip = ctx.shape, ctx.trip
        made, trip.gradients = trip.gradients, None
        if made is None:
            made = ExpertRows(torch.zeros(trip.rows, hidden, dtype=dtype, device=trip.device), None, None)
        dweights = torch.zeros(trip.rows, k, device=trip.device) if dweights is None else dweights
        trip.send_back(made, [dweights])
        return (made.rows.new_zeros(0),) * 2 + (None,) * 4


class _LeaveBack(torch.autograd.Function):
    """Forward: combine begins. Backward: waits for the gradients of the rows that arrived in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        token: Tensor,
        y: Tensor,
        trip: Trip | FixedTrip,
        made: ExpertRows,
        weights: Tensor | None,
        urgent: bool,
    ) -> Tensor:
        ctx.trip, ctx.width = trip, (y.shape[1], y.dtype)
        ctx.set_materialize_grads(False)
        trip.send_back(made, weights=weights, urgent=urgent)
        return y.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, ctx.trip.arrived([ctx.width])[0], None, None, None, None


class _ArriveBack(torch.autograd.Function):
    """Forward: waits for the experts' sums, and adds up each token's. Backward: the output's gradient is dispatched."""

    @staticmethod
    def forward(
        ctx: Any,
        ticket: Tensor,
        token: Tensor,
        trip: Trip | FixedTrip,
        hidden: int,
        dtype: torch.dtype,
        residual: Tensor | None,
        lend_back: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.shape, ctx.residual = trip, (trip.tokens, hidden, dtype), residual is not None
        ctx.lend_back = lend_back
        ctx.set_materialize_grads(False)
        return ticket.new_zeros(0), trip.returned([(hidden, dtype)], residual)[0]

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        trip, (tokens, hidden, dtype) = ctx.trip, ctx.shape
        if dout is None:
            dout = torch.zeros(tokens, hidden, dtype=dtype, device=trip.device)
        trip.send([dout], lend=ctx.lend_back)
        return *(dout.new_zeros(0),) * 2, None, None, None, dout if ctx.residual else None, None
