"""Expert parallelism for training: each rank holds some of the experts, and tokens travel to them.

`ExpertParallel` stands in the place of `dskernels.fused_experts` and means the same as that in one process. Dispatch
carries bf16, or e4m3 with power-of-two scales; combine, and gradients both ways, carry the dtype of the tokens
(DeepSeek-V3 report, section 3.3.2). A sum belongs to whoever reads it: rows of other ranks' tokens are added up before
they leave, a rank's own with what has come (dskernels.moe.rows); all in fp32 in a fixed order: two runs give the same
bits.
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

    Messages must begin in the same order on every rank, in the backward too. Each takes the token that the one before
    left: an empty tensor, through which autograd sees one as the cause of the next, and so runs them in the reverse
    order whatever else it might choose.
    """

    def __init__(self) -> None:
        self.token: Tensor | None = None

    @property
    def is_last(self) -> bool:
        """Whether the next message that is waited for is this one's, or one from before."""
        return True

    def switch(self) -> None:
        """Called where a message has begun and something else may run, see `overlap`."""


class ExpertParallel:
    """The expert block over the ranks of a group, each of which has tokens and experts of its own.

    Args:
        group: the ranks; rank r holds the experts from ``r * E / R`` on, and calls this with these alone.
        n_experts: E, a multiple of the ranks R.
        wire: what a dispatched token travels as: "same", its own dtype, or "fp8", e4m3 in 1x128 tiles with
            power-of-two scales, half the bytes.
        most_ranks: the most ranks that one token's experts are on, where the routing limits them.
        mail: sends every token to every rank in messages of a fixed size, which nothing waits for on the host; by
            default tokens are counted first, and go to the ranks of their experts alone.
        tokens: with `mail`, the most that a rank brings, the same number on every rank. Memory and the messages are for
            so many, so that all should bring them.

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
        """As `dskernels.fused_experts`, with ``w13`` and ``w2`` of this rank's experts and ids of all.

        Every rank of the group has to call it, with any number of tokens. Without `mail` it waits for the device once,
        for the sizes of the messages. The shared expert runs under the dispatch. Without a gradient, tokens that
        products in e4m3 take are quantised where they are, once, and travel so: half the bytes, and the same bits.
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
        # A gradient keeps the tokens that came, unless they are made of what came.
        differentiable = torch.is_grad_enabled()
        lend = form != "same" or not differentiable
        chosen = routing.weights, routing.experts
        ticket, x = _through(_Leave, chain.token, x, *chosen, trip, form, lend, quantized)
        chain.token = ticket
        # Under the shared expert travel this message and what the other micro-batch has sent before it.
        residual = None if shared is None else ds.feed_forward(x, *shared, quantized=quantized, fp8=fp8, keep=keep)
        chain.switch()
        shape, first = (x.shape[1], x.dtype, routing.weights.shape[1]), self.group.rank() * self.per_rank
        chain.token, arrived, scale, gates, ids = _through(
            _Arrive, ticket, chain.token, trip, shape, form, differentiable
        )
        came = None
        if scale is not None:  # the products read these and no others
            came, arrived = Fp8Tensor(arrived, scale), arrived.new_empty(arrived.shape, dtype=x.dtype)
        chosen = _fewest(gates, ids, first, self.per_rank, trip.choices)
        block = arrived, *flat(w13), *flat(w2), *chosen
        options = needs_gradient(block), came, fp8, keep
        y, made = _through(_Experts, *block, first, *options, trip)
        # What was lent is given back when the others' rows are added up, before this rank's own are.
        own = None if differentiable else routing.weights
        # Behind the last of several micro-batches runs what they do before another message: a shared expert, if any.
        urgent = chain.is_last and (shared is None or self.chain is None)
        chain.token = ticket = _through(_LeaveBack, chain.token, y, trip, made, own, urgent)
        del made
        chain.switch()
        # A gradient that comes back is read where it came, unless the weights' share of it is for later.
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
    """At most so many choices of each row, those of the n experts from `first` on in their order; None leaves all."""
    if most is None or most >= experts.shape[1]:
        return weights, experts
    order = ((experts < first) | (experts >= first + n)).int().argsort(dim=1, stable=True)[:, :most]
    return weights.gather(1, order), experts.gather(1, order)


def _waiting(*weights: Tensor | Fp8Tensor) -> Waiting | None:
    """Where the gradients of these weights wait, if they do, see `dskernels.later`."""
    return waiting_for(*(w for w in weights if isinstance(w, Tensor) and w.requires_grad))


class _Nothing:
    """In place of what autograd gives a node, where there is no gradient: nothing is kept."""

    def nothing(self, *_: object) -> None:
        """Is kept."""

    save_for_backward = mark_non_differentiable = set_materialize_grads = nothing


def _through(node: type[torch.autograd.Function], *arguments: Any) -> Any:
    """What a node makes. Without a gradient its forward alone: `apply` takes the host 10 us more, ten times a layer."""
    return node.apply(*arguments) if torch.is_grad_enabled() else node.forward(_Nothing(), *arguments)


# ---- what experts make of rows --------------------------------------------------------------------------------------


class _Experts(torch.autograd.Function):
    """The rows of this rank's experts, which nobody adds up yet.

    To autograd the result is ``[rows, H]``, the sums of each row's choices, whose gradient is that of what is added up;
    nothing is stored there, nor in the gradient of `x`: the rows themselves pass by the trip.
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
    """As operations take them."""
    blocks = (128, 128)
    up = w13 if w13_scale is None else Fp8Tensor(w13, w13_scale, blocks)
    return up, w2 if w2_scale is None else Fp8Tensor(w2, w2_scale, blocks)


def _standing_for(x: Tensor) -> Tensor:
    """Of its shape, and nothing else: a value that is not there."""
    return x.new_empty(()).expand(x.shape)


# ---- the four ends of two messages, each other's gradients ----------------------------------------------------------
#
# A message begins in one node of the graph and is waited for in another, forward and backward: what autograd runs in
# between runs under it. `ticket` says that both belong together; what travels lies in the trip.


class _Leave(torch.autograd.Function):
    """Dispatch begins; backward, the gradients of tokens and weights have come back.

    What it gives of the tokens is for the shared expert, whose gradient of them is added where the ranks' are summed.
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
        if ctx.trip.pending:  # else nothing downstream had a gradient
            dx, dweights = ctx.trip.returned(ctx.widths, dx)
            ctx.trip.settle()
        return None, dx, dweights, None, None, None, None, None


class _Arrive(torch.autograd.Function):
    """Dispatched tokens and their choices are there; backward, the sums of their gradients leave."""

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
        if form == "fp8" and differentiable:  # the tokens are no longer where they came
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
    """Combine begins; backward, the gradients of what is added up have come."""

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
    """What the experts made is back, and summed up token by token; backward, its gradient leaves for every rank."""

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
