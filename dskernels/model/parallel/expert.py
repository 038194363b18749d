"""Expert parallelism for training: each rank holds some of the experts, and tokens travel to them.

`ExpertParallel` stands in the place of `dskernels.fused_experts` and means the same as that in one process. Dispatch
carries bf16, or e4m3 with power-of-two scales; combine, and gradients both ways, carry the dtype of the tokens
(DeepSeek-V3 report, section 3.3.2). All sums are in fp32 in a fixed order: two runs give the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from dskernels.model.parallel.exchange import Trip, Wire, loaded, pack, unloaded, unpack, widths
from dskernels.types import Fp8Tensor, Routing


class Chain:
    """The order of the messages of all micro-batches that run at once.

    Messages must begin in the same order on every rank, in the backward too. Each takes the token that the one before
    left: an empty tensor, through which autograd sees one as the cause of the next, and so runs them in the reverse
    order whatever else it might choose.
    """

    def __init__(self) -> None:
        self.token: Tensor | None = None

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

    Raises:
        ValueError: the ranks do not divide the experts, or an unknown wire.
    """

    def __init__(
        self, group: dist.ProcessGroup, n_experts: int, *, wire: Wire = "same", most_ranks: int | None = None
    ) -> None:
        if n_experts % group.size():
            raise ValueError(f"n_experts: {group.size()} ranks do not divide {n_experts} experts")
        if wire not in ("same", "fp8"):
            raise ValueError(f'wire: expected "same" or "fp8", got {wire!r}')
        self.group, self.wire, self.most_ranks = group, wire, most_ranks
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

        Every rank of the group has to call it, with any number of tokens. It waits for the device once, for the sizes
        of the messages. The shared expert runs under the dispatch.
        """
        if n_shared:
            raise ValueError("n_shared: shared experts in the stack of the routed ones are for one process")
        if w13.shape[0] != self.per_rank:
            raise ValueError(f"w13: expected the {self.per_rank} experts of this rank, got {w13.shape[0]}")
        trip = Trip.plan(routing.experts, self.group, self.per_rank, self.most_ranks)
        chain = self.chain or Chain()
        chain.token = ticket = _Leave.apply(chain.token, x, routing.weights, routing.experts, trip, self.wire)
        chain.switch()
        residual = None if shared is None else ds.feed_forward(x, *shared, fp8=fp8, keep=keep)
        shape = (x.shape[1], x.dtype, routing.weights.shape[1])
        chain.token, arrived, weights, experts = _Arrive.apply(ticket, chain.token, trip, shape, self.wire)
        y = ds.fused_experts(arrived, w13, w2, self._local(weights, experts, trip), fp8=fp8, keep=keep)
        chain.token = ticket = _LeaveBack.apply(chain.token, y, trip)
        chain.switch()
        chain.token, out = _ArriveBack.apply(ticket, chain.token, trip, y.shape[1], y.dtype)
        return out if residual is None else out + residual

    def _local(self, weights: Tensor, experts: Tensor, trip: Trip) -> Routing:
        """The choices of the received rows that are this rank's, first in each row and in their order."""
        ids = experts - self.group.rank() * self.per_rank
        ids = torch.where((ids >= 0) & (ids < self.per_rank), ids, -1)
        if trip.choices < ids.shape[1]:
            order = (ids < 0).int().argsort(dim=1, stable=True)[:, : trip.choices]
            ids, weights = ids.gather(1, order), weights.gather(1, order)
        none = ids.new_empty(0)
        return Routing(weights.contiguous(), ids.contiguous(), none, none)


# ---- the four ends of two messages, each other's gradients ----------------------------------------------------------
#
# A message begins in one node of the graph and is waited for in another, forward and backward: what autograd runs in
# between runs under it. `ticket` says that both belong together; what travels lies in the trip.


class _Leave(torch.autograd.Function):
    """Dispatch begins; backward, the gradients of tokens and weights have come back."""

    @staticmethod
    def forward(
        ctx: Any, token: Tensor | None, x: Tensor, weights: Tensor, experts: Tensor, trip: Trip, wire: Wire
    ) -> Tensor:
        ctx.trip, ctx.widths = trip, ((x.shape[1], x.dtype), (weights.shape[1], torch.float32))
        ctx.set_materialize_grads(False)
        trip.send(trip.spread(pack(*loaded(x, wire), weights, experts.int())))
        return x.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if not ctx.trip.pending:  # nothing downstream had a gradient
            return (None,) * 6
        rows = ctx.trip.arrived()
        dx, dweights = (ctx.trip.gathered(part) for part in unpack(rows, ctx.widths))
        return None, dx, dweights, None, None, None


class _Arrive(torch.autograd.Function):
    """Dispatched tokens are there; backward, their gradients leave."""

    @staticmethod
    def forward(
        ctx: Any, ticket: Tensor, token: Tensor, trip: Trip, shape: tuple[int, torch.dtype, int], wire: Wire
    ) -> tuple[Tensor, ...]:
        ctx.trip, ctx.shape = trip, shape
        ctx.set_materialize_grads(False)
        hidden, dtype, k = shape
        tail = [(k, torch.float32), (k, torch.int32)]
        *parts, weights, experts = unpack(trip.arrived(), widths(hidden, dtype, wire) + tail)
        ctx.mark_non_differentiable(experts)
        return ticket.new_zeros(0), unloaded(parts, dtype), weights, experts

    @staticmethod
    def backward(
        ctx: Any, _: Tensor | None, dx: Tensor | None, dweights: Tensor | None, __: None
    ) -> tuple[Tensor | None, ...]:
        (hidden, dtype, k), rows = ctx.shape, sum(ctx.trip.received)
        device = ctx.trip.to.index.device
        dx = torch.zeros(rows, hidden, dtype=dtype, device=device) if dx is None else dx
        dweights = torch.zeros(rows, k, device=device) if dweights is None else dweights
        ctx.trip.send_back(pack(dx, dweights))
        return (dx.new_zeros(0),) * 2 + (None,) * 3


class _LeaveBack(torch.autograd.Function):
    """Combine begins; backward, the gradients of the experts' outputs have come."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, y: Tensor, trip: Trip) -> Tensor:
        ctx.trip, ctx.width = trip, (y.shape[1], y.dtype)
        ctx.set_materialize_grads(False)
        trip.send_back(pack(y))
        return y.new_zeros(0)

    @staticmethod
    def backward(ctx: Any, _: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, unpack(ctx.trip.arrived(), [ctx.width])[0], None


class _ArriveBack(torch.autograd.Function):
    """What the experts made is back, and summed up token by token; backward, its gradient leaves for every rank."""

    @staticmethod
    def forward(
        ctx: Any, ticket: Tensor, token: Tensor, trip: Trip, hidden: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.trip, ctx.shape = trip, (trip.to.index.shape[0], hidden, dtype)
        ctx.set_materialize_grads(False)
        out = trip.gathered(unpack(trip.arrived(), [(hidden, dtype)])[0])
        return ticket.new_zeros(0), out

    @staticmethod
    def backward(ctx: Any, _: Tensor | None, dout: Tensor | None) -> tuple[Tensor | None, ...]:
        trip, (tokens, hidden, dtype) = ctx.trip, ctx.shape
        if dout is None:
            dout = torch.zeros(tokens, hidden, dtype=dtype, device=trip.to.index.device)
        trip.send(trip.spread(pack(dout)))
        return (dout.new_zeros(0),) * 2 + (None,) * 3
