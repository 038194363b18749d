"""Tokens to the ranks that hold their experts, and back, with counted messages: who sends how many rows to whom.

A token goes once to each rank that holds any of its experts, however many. The rows that a rank sends are
`dskernels.permute` of its tokens, with ranks in the place of experts. What comes back is added up with the rows of the
rank's own experts, in fp32 and in a fixed order. There is one message in each direction: dispatch and combine.

`dskernels.model.parallel.fixed` has the same methods with messages of a fixed size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from dskernels.model.parallel.triton_wire import choices, unload, unload_supports
from dskernels.moe.rows import ExpertRows
from dskernels.types import Fp8Tensor, Permuted, Routing

Wire = Literal["same", "fp8"]
# What tokens travel as: a `Wire`, or "operand", e4m3 with fp32 scales as products in e4m3 take it.
Form = Literal["same", "fp8", "operand"]

ALIGNMENT = 16  # bytes: each part of a row begins at a multiple of this, as TMA and views of wider dtypes require


class Destinations(NamedTuple):
    """The ranks that tokens go to.

    Attributes:
        ranks: int32 ``[T, n]``, the ranks of each token, each once, in ascending order; -1 where there are fewer than
            n (anywhere in a row).
        rows: int64 ``[R]``, the number of rows for each rank.
        choices: int64 ``[R]``, the largest number of a rank's experts that any one token chose.
    """

    ranks: Tensor
    rows: Tensor
    choices: Tensor


def destinations(experts: Tensor, n_ranks: int, per_rank: int, most: int | None = None) -> Destinations:
    """The ranks that hold the experts of each token, rank r those from ``r * per_rank`` on.

    Args:
        experts: int32 or int64 ``[T, k]``; ids outside ``[0, n_ranks * per_rank)`` are dropped.
        n_ranks: R.
        per_rank: experts of a rank.
        most: the most ranks that a token may go to, where routing limits them (to groups that are nodes); `ranks` has
            no more columns than this. A token with more ranks would lose experts, which the caller has to rule out.
    """
    tokens, k = experts.shape
    valid = (experts >= 0) & (experts < n_ranks * per_rank)
    rank = torch.where(valid, experts // per_rank, -1).int()
    every = torch.arange(n_ranks, device=experts.device, dtype=torch.int32)
    choices = (rank[:, :, None] == every).sum(1)
    if n_ranks <= k:
        ranks = torch.where(choices > 0, every, -1)
    else:
        before = torch.ones(k, k, dtype=torch.bool, device=experts.device).tril(-1)
        again = ((rank[:, :, None] == rank[:, None, :]) & before).any(-1)
        ranks = torch.where(again | (rank < 0), n_ranks, rank).sort(1).values
        ranks = torch.where(ranks < n_ranks, ranks, -1)
    if most is not None and most < ranks.shape[1]:
        order = (ranks < 0).int().argsort(dim=1, stable=True)[:, :most]
        ranks = ranks.gather(1, order)
    most_choices = torch.cat((choices.new_zeros(1, n_ranks), choices)).amax(0)
    return Destinations(ranks, (choices > 0).sum(0), most_choices)


def choices_here(weights: Tensor, experts: Tensor, first: int, n: int) -> Routing:
    """The choices of the n experts from ``first`` on, numbered from 0; others are dropped. It has no gradient."""
    return routing_of(*choices(weights.detach(), experts.int(), first, n))


def routing_of(weights: Tensor, experts: Tensor) -> Routing:
    """A `Routing` of choices alone: its other fields are empty."""
    none = experts.new_empty(0)
    return Routing(weights, experts, none, none)


@dataclass
class Trip:
    """The way of one batch of tokens through one layer's experts: who sends how many rows to whom.

    A rank's rows for itself travel in the dispatch as the others do; in the combine they stay where they are.

    Attributes:
        group: the ranks.
        to: offsets and index of the rows that leave, see `dskernels.Permuted`; its ``x`` is not used.
        sent: number of rows to each rank.
        received: number of rows from each rank.
        choices: the most experts of this rank that a received row has.
        pending: the message that is under way, if any.
        own: what this rank's experts made of its own tokens, while the message back is under way.
        gradients: the backward's gradients of the rows that arrived, not added up.
    """

    group: dist.ProcessGroup
    to: Permuted
    sent: list[int]
    received: list[int]
    choices: int
    pending: list[tuple[dist.Work | None, Tensor]] = field(default_factory=list)
    own: tuple[ExpertRows, list[Tensor]] | None = None
    gradients: ExpertRows | None = None

    @classmethod
    def plan(cls, experts: Tensor, group: dist.ProcessGroup, per_rank: int, most: int | None = None) -> Trip:
        """Exchanges the counts of rows and reads them on the host, as the collectives of NCCL and gloo require.

        This is the only wait of the host for the device.

        Args:
            experts: ids ``[T, k]`` of this rank's tokens, among the experts of all ranks.
            group: the ranks.
            per_rank: experts of a rank.
            most: see `destinations`.
        """
        n_ranks = group.size()
        there = destinations(experts, n_ranks, per_rank, most)
        leaving = torch.stack((there.rows, there.choices), 1).contiguous()
        coming = torch.empty_like(leaving)
        dist.all_to_all_single(coming, leaving, group=group)
        counts = torch.cat((leaving, coming), 1).tolist()
        # `permute` is called for its index, by which `send` gathers what travels; one column stands for the tokens.
        column = torch.empty(experts.shape[0], 1, device=experts.device)
        to = ds.permute(column, there.ranks.contiguous(), n_ranks)
        sent, received, choices = ([row[i] for row in counts] for i in (0, 2, 3))
        return cls(group, to, sent, received, max(1, *choices))

    @property
    def tokens(self) -> int:
        """Number of tokens of this rank."""
        return self.to.index.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows that arrive, from all ranks."""
        return sum(self.received)

    @property
    def device(self) -> torch.device:
        """The device of this rank's tokens."""
        return self.to.index.device

    def send(self, parts: Sequence[Tensor], *, lend: bool = False, columns: Sequence[int] = ()) -> None:
        """Begins to send each token's row of each part, ``[tokens, .]``, to the ranks of its experts.

        Nothing is lent. All parts of a row travel side by side, so `columns` changes nothing. See `FixedTrip.send`.
        """
        rows = pack(*parts).index_select(0, self._source())
        self._begin(rows, rows.new_empty(self.rows, rows.shape[1]), self.sent, self.received)

    def arrived(self, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """Waits for the rows and returns them part by part, ``[rows, width]``, given the width and dtype of each."""
        return unpack(self._take(), columns)

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    def release(self) -> None:
        """Does nothing, since nothing is lent; see `FixedTrip.release`."""

    def send_back(
        self,
        made: ExpertRows,
        more: Sequence[Tensor] = (),
        *,
        weights: Tensor | None = None,
        urgent: bool = False,
    ) -> None:
        """Adds up the experts' rows for other ranks' tokens and begins to send them; see `FixedTrip.send_back`."""
        begin, end = self._own(self.received)
        token = torch.arange(self.rows, device=self.device)
        others = torch.cat((token[:begin], token[end:]))
        index = token[:, None].int() if made.index is None else made.index
        made = made._replace(index=index)
        of_others = made._replace(index=index[others], weights=None if made.weights is None else made.weights[others])
        rows = pack(of_others.sums(), *(part[others] for part in more))
        self.own = made.of(slice(begin, end)), [part[begin:end] for part in more]
        leaving, coming = ([0 if r == self.rank else n for r, n in enumerate(x)] for x in (self.received, self.sent))
        self._begin(rows, rows.new_empty(sum(coming), rows.shape[1]), leaving, coming)

    def returned(self, columns: Sequence[tuple[int, torch.dtype]], residual: Tensor | None = None) -> list[Tensor]:
        """Waits for the other ranks' sums, and adds up each token's, ``[tokens, width]``; see `FixedTrip.returned`."""
        if self.own is None:
            raise RuntimeError("nothing has been sent back on this trip")
        (rows, more), self.own = self.own, None
        first, *others = unpack(self._take(), columns)
        begin, end = self._own(self.sent)
        index = self.to.index
        # `places`: each token's rows among those that arrived from other ranks. `here`: its row among those that this
        # rank sent to itself. -1 where there is none.
        places = torch.where(index < begin, index, torch.where(index < end, -1, index - (end - begin)))
        here = torch.where((index >= begin) & (index < end), index - begin, -1)
        here = here.amax(1) if index.shape[1] else here.new_full((self.tokens,), -1)

        def of_token(part: Tensor, nothing: int) -> Tensor:
            """The part's row for each token, from this rank's own rows; `nothing` for tokens that have none here."""
            filled = torch.cat((part, part.new_full((1, part.shape[1]), nothing)))
            return filled[torch.where(here < 0, part.shape[0], here).long()]

        if rows.index is not None:
            rows = rows._replace(index=of_token(rows.index, -1))
        if rows.weights is not None:
            rows = rows._replace(weights=of_token(rows.weights, 0))
        sums = [rows.sums(came=first.contiguous(), places=places.int().contiguous(), residual=residual)]
        # Gradients of weights: each choice has one on one rank, and zero on the others.
        for part, came in zip(more, others, strict=True):
            filled = torch.cat((came, came.new_zeros(1, came.shape[1])))
            row = torch.where(places < 0, came.shape[0], places).long()
            sums.append(of_token(part, 0) + filled[row].sum(1))
        return sums

    def settle(self) -> None:
        """Does nothing: no rank waits to hear what has been read; see `FixedTrip.settle`."""

    def _own(self, counts: Sequence[int]) -> tuple[int, int]:
        """Where the rows from this rank to itself begin and end, given the number of rows for each rank."""
        begin = sum(counts[: self.rank])
        return begin, begin + counts[self.rank]

    def _take(self) -> Tensor:
        """Waits for the message and returns its rows. On a GPU it is the stream that waits, not the host."""
        work, buffer = self.pending.pop()
        if work is not None:
            work.wait()
        return buffer

    def _source(self) -> Tensor:
        """The token of each row that leaves."""
        index = self.to.index
        token = torch.arange(index.shape[0], device=index.device)[:, None].expand(index.shape)
        row = torch.where(index >= 0, index, index.numel()).long()
        source = token.new_empty(index.numel() + 1)
        source[row.flatten()] = token.flatten()
        return source[: sum(self.sent)]

    def _begin(self, rows: Tensor, buffer: Tensor, leaving: list[int], coming: list[int]) -> None:
        if self.pending:
            raise RuntimeError("a message of this trip is still under way")
        filled = buffer[: sum(coming)]
        work = dist.all_to_all_single(filled, rows.contiguous(), coming, leaving, group=self.group, async_op=True)
        self.pending.append((work, buffer))


# ---- what a row holds -----------------------------------------------------------------------------------------------


def pack(*parts: Tensor) -> Tensor:
    """Puts matrices of several dtypes side by side in rows of bytes, each part aligned; viewed as fp32 ``[T, W]``."""
    raw = []
    for part in parts:
        # A matrix without rows counts as contiguous even if its columns are.
        rows = part.contiguous() if part.stride(-1) == 1 else part.clone(memory_format=torch.contiguous_format)
        data = rows.view(torch.uint8)
        raw.append(data)
        if missing := -data.shape[1] % ALIGNMENT:
            raw.append(data.new_zeros(data.shape[0], missing))
    return torch.cat(raw, 1).view(torch.float32)


def unpack(rows: Tensor, parts: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Views of the parts in rows made by `pack`, given the width and the dtype of each."""
    data = rows.view(torch.uint8)
    views, start = [], 0
    for width, dtype in parts:
        size = width * dtype.itemsize
        views.append(data[:, start : start + size].view(dtype))
        start += size + -size % ALIGNMENT
    return views


def exponents(quantized: Fp8Tensor) -> Tensor:
    """The power-of-two scales of ``[T, K]`` in 1x128 tiles, one byte each: biased exponents uint8 ``[T, K / 128]``."""
    return (quantized.scale.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def from_exponents(data: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantises e4m3 ``[T, K]``, given the exponents of its scales as bytes (see `exponents`). Exact in bf16."""
    if unload_supports(data) is None:
        return unload(data, exponents, dtype)
    scale = (exponents.int() << 23).view(torch.float32)
    return Fp8Tensor(data, scale).dequantize(dtype)


def loaded(x: Tensor, form: Form, quantized: Fp8Tensor | None = None) -> list[Tensor]:
    """The parts that tokens ``[T, H]`` travel as in a form.

    Args:
        x: the tokens.
        form: "same": `x` as it is. "fp8": e4m3 and the exponents of power-of-two scales. "operand": e4m3 and fp32
            scales, as products in e4m3 take them.
        quantized: `x` in 1x128 tiles for "operand", if it has been quantised already.
    """
    if form == "same":
        return [x]
    if form == "fp8":
        quantized = ds.quantize(x, scale_format="ue8m0")
        return [quantized.data.view(torch.uint8), exponents(quantized)]
    quantized = ds.quantize(x) if quantized is None else quantized
    return [quantized.data.view(torch.uint8), quantized.scale]


def widths(hidden: int, dtype: torch.dtype, form: Form) -> list[tuple[int, torch.dtype]]:
    """Width and dtype of each part that `loaded` makes of tokens of a width and dtype, for `unpack`."""
    if form == "same":
        return [(hidden, dtype)]
    return [(hidden, torch.float8_e4m3fn), (-(-hidden // 128), torch.uint8 if form == "fp8" else torch.float32)]


def unloaded(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The tokens, made of the parts that they travelled as on a `Wire`."""
    return parts[0] if len(parts) == 1 else from_exponents(parts[0], parts[1], dtype)
