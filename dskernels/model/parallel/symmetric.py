"""Expert-parallel decoding inside a host: every rank writes its tokens into the memory of the ranks that need them.

While `DecodeExperts` sends all tokens to all ranks by NCCL, here a token's row goes only to the ranks of its experts,
and its choices to all. This takes one barrier per direction, no sizes on the host, and no copy of what has arrived. One
set of buffers is enough: a rank writes to one again only after the other direction's barrier, which the others enter
when they have read it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from dskernels.model.parallel.decode import DecodeExperts
from dskernels.model.parallel.exchange import (
    Wire,
    choices_here,
    destinations,
    loaded,
    pack,
    unloaded,
    unpack,
    widths,
)
from dskernels.model.parallel.symmetric_triton import put
from dskernels.types import Fp8Tensor, Permuted, Routing


class Slots(NamedTuple):
    """Rows of memory on each rank that all ranks may write to.

    Attributes:
        slots: int32 ``[rows, W]``, this rank's rows.
        addresses: int64 ``[R]`` on the device, the address at which each rank's rows are mapped here.
        handle: torch's handle of the symmetric memory, for its barrier.
    """

    slots: Tensor
    addresses: Tensor
    handle: Any

    @classmethod
    def shared(cls, rows: int, width: int, group: dist.ProcessGroup) -> Slots:
        """Allocates the rows; all ranks of the group call this at the same time.

        Args:
            rows: number of rows of each rank.
            width: W, 4-byte words of a row.
            group: the ranks.
        """
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        slots = symmetric.empty((rows, width), dtype=torch.int32, device=device)
        handle = symmetric.rendezvous(slots, group)
        return cls(slots, torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device), handle)


class SymmetricDecodeExperts(DecodeExperts):
    """`DecodeExperts` over torch's symmetric memory, for ranks on GPUs of one host that reach each other's memory.

    Args:
        group: the ranks.
        n_experts: E, a multiple of the ranks.
        tokens: the largest number of tokens of a rank in a call, in which all ranks have to bring the same number.
        hidden: width of a token.
        top_k: choices of a token.
        dtype: dtype of the tokens.
        wire: see `ExpertParallel`; results come back in the dtype of the tokens.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        n_experts: int,
        *,
        tokens: int,
        hidden: int,
        top_k: int,
        dtype: torch.dtype = torch.bfloat16,
        wire: Wire = "same",
    ) -> None:
        super().__init__(group, n_experts, wire=wire)
        self.per_rank, self.tokens = n_experts // group.size(), tokens
        self.tail = [(top_k, torch.float32), (top_k, torch.int32)]
        self.payload = widths(hidden, dtype, wire)
        sizes = [-(-width * kind.itemsize // 16) * 4 for width, kind in (*self.tail, *self.payload)]
        self.head = sum(sizes[:2])  # words of a row that hold the choices, which come first
        rows = group.size() * tokens
        self.arriving = Slots.shared(rows, sum(sizes), group)
        self.returning = Slots.shared(rows, -(-hidden * dtype.itemsize // 16) * 4, group)

    @torch.no_grad()
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
        """As `DecodeExperts`, for at most `tokens` tokens (a ValueError otherwise)."""
        if n_shared:
            raise ValueError("n_shared: shared experts in the stack of the routed ones are for one process")
        ranks, (tokens, hidden) = self.group.size(), x.shape
        if tokens > self.tokens:
            raise ValueError(f"x: expected at most {self.tokens} tokens, got {tokens}")
        needed = self.needed(routing.experts)
        self.dispatch(x, routing, needed)
        residual = None if shared is None else ds.feed_forward(x, *shared, fp8=fp8)
        arrived = self.arriving.slots[: ranks * tokens].view(torch.float32)
        weights, experts, *parts = unpack(arrived, self.tail + self.payload)
        here = choices_here(weights, experts, self.first, self.per_rank)
        y = ds.fused_experts(unloaded(parts, x.dtype), w13, w2, here, fp8=fp8)
        self.send_back(y, (here.experts >= 0).any(1).view(ranks, tokens).T)
        index = torch.arange(tokens, device=x.device)[:, None] + tokens * torch.arange(ranks, device=x.device)
        index = torch.where(needed, index, -1).int()
        back = unpack(self.returning.slots[: ranks * tokens].view(torch.float32), [(hidden, x.dtype)])[0]
        out = ds.combine(back, Permuted(back, index[0, :0], index), torch.ones(index.shape, device=x.device))
        return out if residual is None else out + residual

    def needed(self, experts: Tensor) -> Tensor:
        """Which ranks have experts of each token: bool ``[T, R]``."""
        ranks = destinations(experts, self.group.size(), self.per_rank).ranks
        return (ranks[:, :, None] == torch.arange(self.group.size(), device=ranks.device)).any(1)

    def dispatch(self, x: Tensor, routing: Routing, needed: Tensor) -> None:
        """Writes tokens to the ranks that need them, and choices to all; behind the barrier all have arrived here."""
        rows = pack(routing.weights, routing.experts.int(), *loaded(x, self.wire)).view(torch.int32)
        slot = self.group.rank() * x.shape[0]
        put(rows, needed, self.arriving.addresses, slot=slot, head=self.head, rows_of_rank=0)
        self.arriving.handle.barrier(channel=0)

    def send_back(self, y: Tensor, needed: Tensor) -> None:
        """Writes what the experts made of the tokens of all ranks, ``[R * T, H]``, back to the tokens' ranks.

        Args:
            y: this rank's experts' output.
            needed: bool ``[T, R]``: the tokens of each rank of which this rank's experts made anything.
        """
        rows, tokens = pack(y).view(torch.int32), needed.shape[0]
        slot = self.group.rank() * tokens
        put(rows, needed, self.returning.addresses, slot=slot, head=0, rows_of_rank=tokens)
        self.returning.handle.barrier(channel=0)
