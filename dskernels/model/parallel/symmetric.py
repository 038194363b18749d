"""Decode's exchange inside a host: every rank writes its tokens into the memory of those that need them.

Where NCCL sends all tokens to all, this sends a token's row only to the ranks of its experts, and its choices to all;
one barrier, no sizes on the host, no copy of what has arrived. The buffers need no second set: a rank writes again only
after a barrier that the others entered when they had read.
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
    """Rows that all ranks may write to.

    Attributes:
        slots: int32 ``[rows, W]``, this rank's.
        addresses: int64 ``[R]`` on the device, where each rank's are mapped here.
        handle: of the symmetric memory, for its barrier.
    """

    slots: Tensor
    addresses: Tensor
    handle: Any

    @classmethod
    def shared(cls, rows: int, width: int, group: dist.ProcessGroup) -> Slots:
        """All ranks of the group make theirs at once."""
        from torch.distributed import _symmetric_memory as symmetric

        device = torch.device("cuda", torch.cuda.current_device())
        slots = symmetric.empty((rows, width), dtype=torch.int32, device=device)
        handle = symmetric.rendezvous(slots, group)
        return cls(slots, torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64, device=device), handle)


class SymmetricDecodeExperts(DecodeExperts):
    """`DecodeExperts` over torch's symmetric memory, for ranks on GPUs of one host that reach each other's memory.

    Args:
        group: the ranks.
        n_experts: E.
        tokens: the most tokens that a rank brings; all ranks bring as many at a call.
        hidden: their width.
        top_k: choices of a token.
        dtype: of the tokens.
        wire: see `ExpertParallel`; what comes back is in the dtype of the tokens.
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
        self.head = sum(sizes[:2])  # the choices, which come first
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
        """As `DecodeExperts`, for at most ``tokens`` tokens."""
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
        """bool ``[T, R]``: the ranks of each token's experts."""
        ranks = destinations(experts, self.group.size(), self.per_rank).ranks
        return (ranks[:, :, None] == torch.arange(self.group.size(), device=ranks.device)).any(1)

    def dispatch(self, x: Tensor, routing: Routing, needed: Tensor) -> None:
        """Tokens to their ranks; when it returns, the stream has those of all."""
        rows = pack(routing.weights, routing.experts.int(), *loaded(x, self.wire)).view(torch.int32)
        slot = self.group.rank() * x.shape[0]
        put(rows, needed, self.arriving.addresses, slot=slot, head=self.head, rows_of_rank=0)
        self.arriving.handle.barrier(channel=0)

    def send_back(self, y: Tensor, needed: Tensor) -> None:
        """What the experts made of the tokens ``[R * T, H]`` of all ranks, to these."""
        rows, tokens = pack(y).view(torch.int32), needed.shape[0]
        slot = self.group.rank() * tokens
        put(rows, needed, self.returning.addresses, slot=slot, head=0, rows_of_rank=tokens)
        self.returning.handle.barrier(channel=0)
