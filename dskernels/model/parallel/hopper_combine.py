"""Launcher of hopper_combine.cu: the way back of sums between the GPUs of one host in one kernel, for sm_90a.

It takes all SMs: for where nothing else runs while the sums travel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dskernels.cuda.compiler import kernel, reason_against_cuda
from dskernels.cuda.driver import Plan, Pointer
from dskernels.device import capability, multiprocessors
from dskernels.model.parallel.engines import PeerMemory
from dskernels.moe.rows import ExpertRows
from dskernels.validate import ceil_div

SOURCE = Path(__file__).with_name("hopper_combine.cu")
OUT = {torch.bfloat16: 0, torch.float16: 1}
PIECE, STAGES = 2**16, 3  # bytes of a piece; pieces in shared memory
MOST_PIECES = 8192  # of a message: each has a number of its own
MOST_OTHERS = 3
THREADS = 512 + 64


class PushAndSum:
    """Sums pushed into the memory of other GPUs, and those of this one with what they push.

    Args:
        memory: where that is on all ranks.
        rank: this one.
    """

    def __init__(self, memory: PeerMemory, rank: int) -> None:
        self.here, self.rank, self.others = memory.addresses[rank], rank, len(memory.addresses) - 1
        others = [address for other, address in enumerate(memory.addresses) if other != rank]
        self.peers = torch.tensor(others, dtype=torch.int64, device=memory.own.device)
        self.plans: dict[tuple, Plan] = {}

    def supports(self, rows: Tensor, capacity: int) -> str | None:
        """Why it does not take rows of experts, of so many tokens of a rank, or None."""
        if not 1 <= self.others <= MOST_OTHERS:
            return f"it is for 2 to {MOST_OTHERS + 1} ranks, there are {self.others + 1}"
        if rows.dtype not in OUT:
            return f"it takes bf16 and fp16, the rows are {str(rows.dtype).removeprefix('torch.')}"
        if rows.device.type != "cuda" or capability(rows.device) != (9, 0):
            return "it is for sm_90"
        if not rows.is_contiguous() or rows.data_ptr() % 16 or rows.shape[1] * rows.element_size() % 16:
            return "rows must be contiguous, and whole 16 bytes"
        if not 0 < pieces_of(rows, capacity) <= MOST_PIECES:
            return f"it takes up to {MOST_PIECES * PIECE // 2**20} MB for a rank, and something"
        return reason_against_cuda()

    def __call__(
        self,
        leaving: Sequence[Tensor],
        own: ExpertRows,
        residual: Tensor | None,
        out: Tensor,
        *,
        slot: int,
        flags: int,
        number: int,
    ) -> None:
        """Fills `out` ``[T, H]``; every rank of the group has to launch it.

        Args:
            leaving: for each other rank, in their order, the sums of its tokens, ``[capacity, H]``, contiguous.
            own: the rows of this rank's T tokens, see `supports`.
            residual: ``[T, H]``, contiguous.
            out: contiguous.
            slot: the byte of each rank's memory from which on what comes lies, ``[ranks, capacity, H]``.
            flags: likewise the numbers of its pieces, int32 ``[ranks, MOST_PIECES]``.
            number: that is written there, larger than any before it.
        """
        rows, index, weights = own
        index = None if index is None else index.contiguous()
        stride = 0 if weights is None else weights.stride(0)
        capacity = leaving[0].shape[0]
        key = rows.shape, rows.dtype, None if index is None else index.shape, stride, out.shape[0], capacity
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._plan(rows, index, stride, out.shape[0], capacity)
        tensors = dict(rows=rows, index=index, weights=weights, residual=residual, out=out, peers=self.peers)
        tensors |= {f"leaving_{other}": sums for other, sums in enumerate(leaving)}
        addresses = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
        plan.launch_at(addresses | dict(here=self.here, slot=slot, flags=flags, number=number))

    def _plan(self, rows: Tensor, index: Tensor | None, stride: int, tokens: int, capacity: int) -> Plan:
        pieces, most = pieces_of(rows, capacity), multiprocessors(rows.device)
        units = rows.shape[1] * rows.element_size() // 16
        choices = 1 if index is None else index.shape[1]
        return Plan(
            kernel(SOURCE, "push_and_sum", options(self.others, rows.dtype), STAGES * PIECE, rows.device.index),
            arguments=(
                *map(Pointer, ("leaving_0", "leaving_1", "leaving_2")),
                *map(Pointer, ("rows", "index", "weights", "residual", "out", "peers")),
                *map(Pointer, ("here", "slot", "flags", "number")),  # addresses, and what differs from call to call
                *map(ctypes.c_int, (rows.shape[0], choices, stride, tokens, capacity, units, self.rank)),
            ),
            # As many pieces for each CTA: 3,584 take 128 of them 28 rounds, and 132 as many.
            grid=ceil_div(pieces, ceil_div(pieces, most)),
            threads=THREADS,
            shared=STAGES * PIECE,
            device=rows.device,
        )


def pieces_of(rows: Tensor, capacity: int) -> int:
    """How many pieces so many rows like these are."""
    return ceil_div(capacity * rows.shape[1] * rows.element_size(), PIECE)


def options(others: int, dtype: torch.dtype) -> dict[str, int]:
    """What hopper_combine.cu is specialised by."""
    return {"OTHERS": others, "OUT": OUT[dtype], "PIECE": PIECE, "STAGES": STAGES, "PIECES": MOST_PIECES}
