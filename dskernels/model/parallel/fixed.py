"""Tokens to the ranks of their experts in messages of a fixed size: every token goes to every rank.

Nothing is counted, so nothing waits for the device. On every rank, the rows from rank s begin at ``s * capacity``, and
choices of other ranks' experts are dropped. With 8 choices per token, each of 2 ranks that share 32 experts needs 999
of 1,000 tokens anyway; each of R ranks needs about ``1 - (1 - 1 / R) ** 8`` of them, 90% with 4 ranks, 66% with 8.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from dskernels.model.parallel.mail import Fill, Mail, message_bytes
from dskernels.moe.rows import ExpertRows


class FixedTrip:
    """The way of one batch of tokens through one layer's experts: dispatch, combine, and their gradients.

    It has the methods of `Trip`, and its sums have the same bits. In the forward, `send` and `arrived` are the dispatch
    and `send_back` and `returned` the combine; in the backward the same calls, in the same order, carry the gradient of
    the output to the experts and the gradients of the tokens back.

    Args:
        mail: carries the messages.
        tokens: number of tokens of this rank.
        capacity: rows of a message, the same on every rank; at least `tokens`.
        device: the tokens' device.

    Raises:
        ValueError: `tokens` is larger than `capacity`.
    """

    choices: int | None = None  # the most experts of this rank that a row has: unknown, as nothing is counted

    def __init__(self, mail: Mail, tokens: int, capacity: int, device: torch.device) -> None:
        if tokens > capacity:
            raise ValueError(f"x: expected at most {capacity} tokens, got {tokens}")
        self.mail, self.tokens, self.capacity, self.device = mail, tokens, capacity, device
        self.pending: list[Any] = []
        self.lent: Any = None  # the message of which `arrived` returned views, not copies
        self.own: ExpertRows | None = None  # what this rank's experts made of its own tokens, see `send_back`
        self.gradients: ExpertRows | None = None  # the backward's gradients of the rows that arrived, not added up

    @property
    def rows(self) -> int:
        """Number of rows that arrive, from all ranks."""
        return self.mail.ranks * self.capacity

    def send(self, parts: Sequence[Tensor], *, lend: bool = False, columns: Sequence[int] = ()) -> None:
        """Begins to send every token's row of each part to all ranks.

        A message has `capacity` rows. Those without a token are -1 in int32 parts, where they mean dropped choices, and
        zero in others.

        Args:
            parts: one row per token each.
            lend: whether `arrived` returns the rows where they arrived, valid until the next `send_back` or `release`;
                otherwise it returns copies.
            columns: the positions of parts whose columns may be contiguous, not their rows, here and where they arrive.
        """
        missing = self.capacity - self.tokens
        if missing:
            parts = [pad(part, (0, 0, 0, missing), value=-1 if part.dtype == torch.int32 else 0) for part in parts]
        parts = [_by_columns(part) if i in columns else part.contiguous() for i, part in enumerate(parts)]
        into = None if lend else [part.new_empty(self.mail.ranks, *part.shape) for part in parts]
        self._begin([parts] * self.mail.ranks, lend=lend, columns=columns, into=into)

    def arrived(self, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """Waits for the rows of all ranks and returns them part by part, ``[rows, width]``.

        Args:
            columns: width and dtype of each part.
        """
        (sent, into), mail = self.pending.pop(), self.mail
        for _ in mail.arriving(sent):
            pass
        if into is None:
            parts, self.lent = mail.whole(sent), sent
        else:
            parts = [part.flatten(0, 1) for part in into]
            mail.finished(sent)
        return [part.view(dtype) for part, (_, dtype) in zip(parts, columns, strict=True)]

    def release(self) -> None:
        """Gives back what was lent: what is on the stream so far reads it, and nothing after that."""
        if self.lent is not None:
            self.mail.finished(self.lent)
            self.lent = None

    def settle(self) -> None:
        """Tells the other ranks what has been read here, where no further message does; see `Mail.settle`."""
        self.mail.settle()

    def __del__(self) -> None:
        """Gives back what is still lent, as where a backward ends before it sends anything back."""
        if getattr(self, "lent", None) is not None:
            self.release()

    def send_back(
        self,
        made: ExpertRows,
        more: Sequence[Tensor] = (),
        *,
        weights: Tensor | None = None,
        urgent: bool = False,
    ) -> None:
        """Adds up the experts' rows for the tokens of the other ranks, and begins to send each rank its sums.

        The rows of this rank's own tokens are left to `returned`, which adds them up together with what arrives. What
        was lent is given back.

        Args:
            made: the experts' rows for all rows that arrived.
            more: further parts to send, ``[rows, width]`` for all rows that arrived.
            weights: the routing weights of this rank's own tokens, for `returned`; needed if those of `made` are lent.
            urgent: whether nothing else runs until the message is waited for. The first sums then leave while the
                others are still being added up.
        """
        mail, capacity = self.mail, self.capacity
        of_ranks = [made.of(slice(rank * capacity, (rank + 1) * capacity)) for rank in range(mail.ranks)]
        own = of_ranks[mail.rank].of(slice(0, self.tokens))
        self.own = own if weights is None else own._replace(weights=weights)
        shape = capacity, made.rows.shape[1]
        later = urgent and made.index is not None
        others = {
            rank: made.rows.new_empty(shape) if later else rows.sums()
            for rank, rows in enumerate(of_ranks)
            if rank != mail.rank
        }

        def add_up(rank: int, rows: slice) -> None:
            of_ranks[rank].of(rows).sums(out=others[rank][rows])

        fill: Fill | None = add_up if later else None
        # Nothing is sent to this rank itself: any tensor of the right shape takes that place.
        nobody = next(iter(others.values())) if others else made.rows.new_empty(shape)
        leaving = [others.get(rank, nobody) for rank in range(mail.ranks)]
        split = [part.contiguous().chunk(mail.ranks) for part in more]
        self._begin([[leaving[rank], *(chunks[rank] for chunks in split)] for rank in range(mail.ranks)], fill=fill)
        self.release()

    def returned(self, columns: Sequence[tuple[int, torch.dtype]], residual: Tensor | None = None) -> list[Tensor]:
        """Waits for the other ranks' sums and returns, for each part, the sum for each token, ``[tokens, width]``.

        It is added up in fp32: the rows of this rank's experts one by one, then the sums of the other ranks in their
        order, then `residual`.

        Args:
            columns: width and dtype of each part.
            residual: ``[tokens, width]``, added to the first part.
        """
        residual = None if residual is None else residual.contiguous()
        (sent, _), mail, rows = self.pending.pop(), self.mail, self.own
        if rows is None:
            raise RuntimeError("nothing has been sent back on this trip")
        self.own = None
        places = _places(self.tokens, self.capacity, mail.ranks, mail.rank, self.device)
        out = rows.rows.new_empty(self.tokens, columns[0][0])
        for piece in mail.arriving(sent):
            start, stop, _ = piece.indices(self.tokens)
            if start < stop:
                part = slice(start, stop)
                came = mail.of_all(sent).flatten(0, 1)
                of_piece = None if residual is None else residual[part]
                rows.of(part).sums(came=came, places=places[part], residual=of_piece, out=out[part])
        sums = [out]
        by_rank = [mail.from_rank(sent, rank) for rank in range(mail.ranks)]
        for place in range(1, len(columns)):  # gradients of weights: each choice has one on one rank, zero elsewhere
            sums.append(torch.stack([parts[place][: self.tokens] for parts in by_rank]).sum(0))
        mail.finished(sent)
        return sums

    def _begin(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        *,
        lend: bool = False,
        fill: Fill | None = None,
        columns: Sequence[int] = (),
        into: list[Tensor] | None = None,
    ) -> None:
        if self.pending:
            raise RuntimeError("a message of this trip is still under way")
        sent = self.mail.send(outgoing, together=lend, fill=fill, columns=columns, into=into)
        self.pending.append((sent, into))


def _by_columns(part: Tensor) -> Tensor:
    """The same matrix, laid out with contiguous columns."""
    return part if part.stride(0) == 1 else part.mT.contiguous().mT


@functools.lru_cache(maxsize=64)
def _places(tokens: int, capacity: int, ranks: int, own: int, device: torch.device) -> Tensor:
    """The rows of each token's sums from the other ranks, among those of all ranks, int32 ``[tokens, R - 1]``."""
    others = [rank * capacity for rank in range(ranks) if rank != own]
    token = torch.arange(tokens, device=device, dtype=torch.int32)
    return torch.stack([token + first for first in others], 1) if others else token.new_empty(tokens, 0)


def largest_message(tokens: int, hidden: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes of the largest message for so many tokens: dispatch or combine, forward or backward, on any wire.

    Args:
        tokens: the capacity of a message.
        hidden: width of a token.
        top_k: choices of a token.
        dtype: dtype of the tokens.
    """
    # A message carries tokens, routing weights and ids. Tokens in e4m3 are at most half as large, which leaves room for
    # their scales, at most 4 bytes for each 128 columns; narrow ones may not, and the last part is for the first scale.
    return message_bytes([(tokens, hidden * dtype.itemsize), (tokens, 4 * top_k), (tokens, 4 * top_k), (tokens, 4)])
