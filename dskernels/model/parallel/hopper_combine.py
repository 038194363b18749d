"""Launcher of hopper_combine.cu: a whole combine between the GPUs of one host in one kernel, for sm_90a.

It takes all SMs: for where nothing else runs while the sums travel.
"""

from __future__ import annotations

import ctypes
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
MOST_PIECES = 4096  # of a message: each has a number of its own
FEWEST_ROWS = 4  # of a piece
MOST_OTHERS = 3
THREADS, BLOCKS = 256, 2  # of a CTA; of an SM


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

    def supports(self, made: ExpertRows) -> str | None:
        """Why it does not take these rows, or None."""
        rows, device = made.rows, made.rows.device
        if not 1 <= self.others <= MOST_OTHERS:
            return f"it is for 2 to {MOST_OTHERS + 1} ranks, there are {self.others + 1}"
        if rows.dtype not in OUT:
            return f"it takes bf16 and fp16, the rows are {str(rows.dtype).removeprefix('torch.')}"
        if device.type != "cuda" or capability(device) != (9, 0):
            return "it is for sm_90"
        if not rows.is_contiguous() or rows.data_ptr() % 16 or rows.shape[1] * rows.element_size() % 16:
            return "rows must be contiguous, and whole 16 bytes"
        return reason_against_cuda()

    def __call__(
        self,
        made: ExpertRows,
        residual: Tensor | None,
        out: Tensor,
        capacity: int,
        *,
        slot: int,
        flags: int,
        number: int,
    ) -> None:
        """Fills `out` ``[T, H]``; every rank of the group has to launch it.

        Args:
            made: rows of ``ranks * capacity`` tokens, see `supports`.
            residual: ``[T, H]``, contiguous.
            out: contiguous.
            capacity: tokens of each rank.
            slot: the byte of each rank's memory at which the sums that come lie.
            flags: likewise the numbers of their pieces, int32 ``[ranks, MOST_PIECES]``.
            number: that is written there, larger than any before it.
        """
        rows, index, weights = made
        index = None if index is None else index.contiguous()
        stride = 0 if weights is None else weights.stride(0)
        key = rows.shape, rows.dtype, None if index is None else index.shape, stride, out.shape[0], capacity
        plan = self.plans.get(key)
        if plan is None:
            plan = self.plans[key] = self._plan(rows, index, stride, out, capacity)
        tensors = dict(rows=rows, index=index, weights=weights, residual=residual, out=out, peers=self.peers)
        addresses = {name: x.data_ptr() for name, x in tensors.items() if x is not None}
        plan.launch_at(addresses | dict(here=self.here, slot=slot, flags=flags, number=number))

    def _plan(self, rows: Tensor, index: Tensor | None, stride: int, out: Tensor, capacity: int) -> Plan:
        of_piece = rows_of_piece(capacity)
        units = rows.shape[1] * rows.element_size() // 16
        choices = 1 if index is None else index.shape[1]
        return Plan(
            kernel(SOURCE, "push_and_sum", options(self.others, rows.dtype, of_piece), 0, rows.device.index),
            arguments=(
                *map(Pointer, ("rows", "index", "weights", "residual", "out", "peers")),
                *map(Pointer, ("here", "slot", "flags", "number")),  # addresses, and what differs from call to call
                *map(ctypes.c_int, (rows.shape[0], choices, stride, out.shape[0], capacity, units, self.rank)),
            ),
            grid=min(ceil_div(capacity, of_piece), BLOCKS * multiprocessors(rows.device)),
            threads=THREADS,
            shared=0,
            device=rows.device,
        )


def rows_of_piece(capacity: int) -> int:
    """Tokens of a piece: four, or twice as many until there are no more pieces than numbers."""
    rows = FEWEST_ROWS
    while ceil_div(capacity, rows) > MOST_PIECES:
        rows *= 2
    return rows


def options(others: int, dtype: torch.dtype, rows: int) -> dict[str, int]:
    """What hopper_combine.cu is specialised by."""
    return {"OTHERS": others, "OUT": OUT[dtype], "ROWS": rows, "PIECES": MOST_PIECES}
