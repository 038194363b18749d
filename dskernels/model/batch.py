"""The layout of the tokens in one forward pass: their sequences, their positions, and their slots in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The layout of ``T`` tokens. Sequences follow one another, without padding except in ``decode``.

    Everything is computed on the device from device tensors, so a decode step fits in a CUDA graph.

    Attributes:
        kind: how attention sees them. "prompt": whole sequences from their first token on, each attends to itself
            (training, prompts). "extend": further tokens of sequences whose beginning is cached (the next piece of a
            prompt). "decode": the same small number of new tokens for each sequence, absorbed attention over the cache.
        positions: int64 ``[T]``, the position of each token in its sequence.
        cu_seqlens: int32 ``[B + 1]``, sequence ``b`` has the tokens ``cu_seqlens[b]`` to ``cu_seqlens[b + 1]``.
        slots: int64 ``[T]``, ``page * page_size + offset``, -1 where nothing is to be written; None without a cache.
        block_table: int32 ``[B, pages]``, None without a cache.
        lengths: int32 ``[B]``, tokens of each sequence, including the new ones; None without a cache.
        q_lengths: int32 ``[B]``, how many new tokens are real in a decode where sequences differ, else None.
    """

    kind: Literal["prompt", "extend", "decode"]
    positions: Tensor
    cu_seqlens: Tensor
    slots: Tensor | None = None
    block_table: Tensor | None = None
    lengths: Tensor | None = None
    q_lengths: Tensor | None = None

    @classmethod
    def prompt(
        cls, cu_seqlens: Tensor, tokens: int, block_table: Tensor | None = None, page_size: int | None = None
    ) -> Batch:
        """Whole sequences; with a block table and its page size they are also written to the cache."""
        sequence, positions = packed_positions(cu_seqlens, tokens)
        if block_table is None or page_size is None:
            return cls("prompt", positions, cu_seqlens)
        slots = _slots(positions, sequence, block_table, page_size)
        return cls("prompt", positions, cu_seqlens, slots, block_table, cu_seqlens.diff())

    @classmethod
    def extend(cls, cu_seqlens: Tensor, tokens: int, lengths: Tensor, block_table: Tensor, page_size: int) -> Batch:
        """Any number of further tokens of each sequence; ``lengths`` includes them."""
        sequence, within = packed_positions(cu_seqlens, tokens)
        positions = within + (lengths - cu_seqlens.diff())[sequence]
        slots = _slots(positions, sequence, block_table, page_size)
        return cls("extend", positions, cu_seqlens, slots, block_table, lengths)

    @classmethod
    def decode(
        cls, lengths: Tensor, queries: int, block_table: Tensor, page_size: int, q_lengths: Tensor | None = None
    ) -> Batch:
        """``queries`` new tokens for each sequence, of which the first ``q_lengths`` are real; ``lengths`` includes
        those.

        A row of length 0 has no sequence: it sees nothing and writes nothing.
        """
        B = lengths.shape[0]
        step = torch.arange(queries, device=lengths.device)
        new = torch.full_like(lengths, queries) if q_lengths is None else q_lengths
        positions = (lengths - new).long()[:, None] + step
        sequence = torch.arange(B, device=lengths.device).repeat_interleave(queries, output_size=B * queries)
        slots = _slots(positions.flatten(), sequence, block_table, page_size)
        slots = torch.where((step < new[:, None]).flatten(), slots, -1)
        cu_seqlens = torch.arange(B + 1, device=lengths.device, dtype=torch.int32) * queries
        return cls("decode", positions.flatten(), cu_seqlens, slots, block_table, lengths, q_lengths)


def packed_positions(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For each packed token its sequence and its position in it, both int64 ``[T]``."""
    index = torch.arange(tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], index, right=True).clamp(max=cu_seqlens.shape[0] - 2)
    return sequence, index - cu_seqlens[sequence]


def _slots(positions: Tensor, sequence: Tensor, block_table: Tensor, page_size: int) -> Tensor:
    """The cache slot of each position of each sequence; -1 if the table has no page for it, or before the first
    position."""
    place = positions // page_size
    page = block_table[sequence, place.clamp(0, block_table.shape[1] - 1)].long()
    there = (place >= 0) & (place < block_table.shape[1])
    return torch.where(there, page * page_size + positions % page_size, -1)
