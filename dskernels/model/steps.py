"""What a decode step does besides running the model: where its tokens are, which drafts are accepted, what has ended.

These are dozens of operations on a few numbers for each sequence. In a CUDA graph each costs as much as a small layer,
so on a GPU each of these functions is one kernel (`triton_steps`); the PyTorch code here says what it means.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.model.batch import Batch
from dskernels.model.chance import uniform


class Placed(NamedTuple):
    """The tokens of a pass in which each of ``B`` sequences has the same number of queries.

    Attributes:
        tokens: int64 ``[B * queries]``.
        positions: int64 ``[B * queries]``, the position of each in its sequence.
        slots: int64 ``[B * queries]`` of the cache, -1 where nothing is to be written.
        lengths: int32 ``[B]``, including the new tokens.
        cu_seqlens: int32 ``[B + 1]``.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    lengths: Tensor
    cu_seqlens: Tensor

    def batch(self, block_table: Tensor, q_lengths: Tensor | None = None) -> Batch:
        """In the form that the model takes."""
        return Batch("decode", self.positions, self.cu_seqlens, self.slots, block_table, self.lengths, q_lengths)


class Advanced(NamedTuple):
    """What `advance` returns, in addition to what it writes: the MTP module's pass over the new tokens.

    Attributes:
        placed: its tokens, each one position further on than the position at which it is taken in.
        q_lengths: int32 ``[B]``, how many of each sequence's tokens are real.
        rows: int64 ``[B]``, the row of the last accepted one among them.
    """

    placed: Placed
    q_lengths: Tensor
    rows: Tensor


def place(
    last: Tensor,
    drafts: Tensor,
    lengths: Tensor,
    active: Tensor,
    block_table: Tensor,
    *,
    page_size: int,
    ahead: int = 0,
) -> Placed:
    """The last token of each sequence and the drafts behind it, ``ahead`` positions behind what is cached.

    Args:
        last: int64 ``[B]``.
        drafts: int64 ``[B, queries - 1]``.
        lengths: int32 ``[B]``, cached tokens.
        active: int32 ``[B]``, 0 where there is no sequence, whose length is 0 and which gets no slots; else 1.
        block_table: int32 ``[B, pages]``. Positions beyond it get no slots.
        page_size: tokens of a page.
        ahead: further tokens before these that are cached, too.
    """
    return Placed(*_place(last, drafts, lengths, active, block_table, page_size, ahead))


def advance(
    chosen: Tensor,
    accepted: Tensor | None,
    drafts: Tensor,
    eos: Tensor,
    block_table: Tensor,
    last: Tensor,
    lengths: Tensor,
    active: Tensor,
    left: Tensor,
    new: Tensor,
    *,
    page_size: int,
) -> Advanced:
    """Append the accepted drafts and one more token to each sequence, in place, and end sequences that are complete.

    A sequence ends at an end token, or at its limit; its length is then 0, and it is inactive.

    Args:
        chosen: int64; if greedy ``[B, k + 1]``, the most likely token after the last one and after each draft, and
            drafts that equal it are accepted; else ``[B]``, the token after the accepted drafts.
        accepted: int64 ``[B]``, how many drafts were accepted; None if greedy.
        drafts: int64 ``[B, k]``.
        eos: int64 ``[B, n]``, tokens that end a text; padded with -1.
        block_table: int32 ``[B, pages]``.
        last: int64 ``[B]``, becomes the token after the accepted drafts.
        lengths: int32 ``[B]``, grows by the tokens that are cached now: the last one and the accepted drafts.
        active: int32 ``[B]``, becomes 0 where a text ends.
        left: int32 ``[B]``, tokens that the text may still get; shrinks.
        new: int64 ``[B, k + 3]``, becomes the new tokens, their number, and the number of accepted drafts.
        page_size: tokens in a page.
    """
    written = (last, lengths, active, left, new)
    tokens, positions, slots, lengths, cu_seqlens, q_lengths, rows = _advance(
        chosen, accepted, drafts, eos, block_table, *written, page_size
    )
    return Advanced(Placed(tokens, positions, slots, lengths, cu_seqlens), q_lengths, rows)


def chances(stream: Tensor, places: Tensor, ahead: int, count: int, purposes: int, first: int) -> Tensor:
    """Uniform random numbers for the tokens at position ``places + ahead`` and after it, float32 ``[B, count,
    purposes]``.

    Args:
        stream: int64 ``[B]``.
        places: int32 ``[B]``.
        ahead: added to them.
        count: consecutive positions of each sequence.
        purposes: numbers for each position.
        first: the first purpose, see `uniform`.
    """
    return _chances(stream, places, ahead, count, purposes, first)


# ---- what they mean, in PyTorch -------------------------------------------------------------------------------------


def _place_reference(
    last: Tensor, drafts: Tensor, lengths: Tensor, active: Tensor, block_table: Tensor, page_size: int, ahead: int
) -> tuple[Tensor, ...]:
    queries = drafts.shape[1] + 1
    seen = lengths + (ahead + queries) * active
    batch = Batch.decode(seen, queries, block_table, page_size)
    return torch.cat((last[:, None], drafts), 1).flatten(), batch.positions, batch.slots, seen, batch.cu_seqlens  # type: ignore[return-value]


def _advance_reference(
    chosen: Tensor,
    accepted: Tensor | None,
    drafts: Tensor,
    eos: Tensor,
    block_table: Tensor,
    last: Tensor,
    lengths: Tensor,
    active: Tensor,
    left: Tensor,
    new: Tensor,
    page_size: int,
) -> tuple[Tensor, ...]:
    queries = drafts.shape[1] + 1
    step = torch.arange(queries, device=drafts.device)
    if accepted is None:
        accepted = (drafts == chosen[:, :-1]).long().cumprod(1).sum(1)
        chosen = chosen.gather(1, accepted[:, None]).squeeze(1)
    stood = step < accepted[:, None]
    tokens = torch.where(stood, torch.nn.functional.pad(drafts, (0, 1)), chosen[:, None])
    given = step <= accepted[:, None]
    ends = given & (tokens[:, :, None] == eos[:, None]).any(2)
    before_end = (ends.long().cumsum(1) - ends.long() == 0) & given  # the tokens up to the first end token, inclusive
    count = torch.minimum(before_end.sum(1).int(), left) * active
    ended = (ends & (step < count[:, None])).any(1) | (count >= left)
    seen = lengths + count
    batch = Batch.decode(seen, queries, block_table, page_size, count)
    new.copy_(torch.cat((tokens, count[:, None], (accepted * active)[:, None]), 1))
    last.copy_(chosen)
    left.sub_(count)
    active.mul_(~ended)
    lengths.copy_(seen * active)
    rows = torch.arange(drafts.shape[0], device=drafts.device) * queries + accepted
    return tokens.flatten(), batch.positions, batch.slots, seen, batch.cu_seqlens, count, rows  # type: ignore[return-value]


def _chances_reference(stream: Tensor, places: Tensor, ahead: int, count: int, purposes: int, first: int) -> Tensor:
    at = places[:, None] + ahead + torch.arange(count, device=places.device)
    return torch.stack([uniform(stream, at, first + i) for i in range(purposes)], 2)


# ---- registration --------------------------------------------------------------------------------------------------


def place_fake(last: Tensor, drafts: Tensor, lengths: Tensor, *_) -> tuple[Tensor, ...]:
    """Empty tensors with the shapes of a pass."""
    rows, queries = last.shape[0], drafts.shape[1] + 1
    tokens = [last.new_empty(rows * queries) for _ in range(3)]
    return (*tokens, torch.empty_like(lengths), lengths.new_empty(rows + 1))


def _advance_fake(chosen, accepted, drafts, eos, block_table, last, lengths, *_) -> tuple[Tensor, ...]:
    return (*place_fake(last, drafts, lengths), torch.empty_like(lengths), torch.empty_like(last))


PLACED = "Tensor, Tensor, Tensor, Tensor, Tensor"
_place = Operation(
    "place_tokens(Tensor last, Tensor drafts, Tensor lengths, Tensor active, Tensor block_table, int page_size, "
    f"int ahead) -> ({PLACED})",
    reference=_place_reference,
    triton="dskernels.model.triton_steps:place",
    fake=place_fake,
)
_advance = Operation(
    "advance_sequences(Tensor chosen, Tensor? accepted, Tensor drafts, Tensor eos, Tensor block_table, "
    "Tensor(a!) last, Tensor(b!) lengths, Tensor(c!) active, Tensor(d!) left, Tensor(e!) new, int page_size) -> "
    f"({PLACED}, Tensor, Tensor)",
    reference=_advance_reference,
    triton="dskernels.model.triton_steps:advance",
    fake=_advance_fake,
)
_chances = Operation(
    "chances(Tensor stream, Tensor places, int ahead, int count, int purposes, int first) -> Tensor",
    reference=_chances_reference,
    triton="dskernels.model.triton_steps:chances",
    fake=lambda stream, places, ahead, count, purposes, first: torch.empty(
        stream.shape[0], count, purposes, device=stream.device
    ),
)
