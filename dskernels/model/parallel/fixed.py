"""Tokens to the ranks of their experts in messages of a fixed size: every token goes to every rank.

Nobody counts, so nothing waits for the device. The rows of rank s stand at ``s * capacity`` on every rank, and a choice
that is another rank's is dropped there. Of 2 ranks with 32 experts and 8 a token each wants 999 of 1,000 tokens
anyway, of R about ``1 - (1 - 1 / R) ** 8`` of them: 90% where there are 4, 66% where there are 8.
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
    """The way of one batch of tokens through one layer's experts, as `Trip`, whose bits its sums have.

    Args:
        mail: takes the messages.
        tokens: of this rank.
        capacity: rows of a message, the same on every rank; at least `tokens`.
        device: of the tokens.

    Raises:
        ValueError: more tokens than that.
    """

    choices: int | None = None  # the most experts that a row has here: nobody knows

    def __init__(self, mail: Mail, tokens: int, capacity: int, device: torch.device) -> None:
        if tokens > capacity:
            raise ValueError(f"x: expected at most {capacity} tokens, got {tokens}")
        self.mail, self.tokens, self.capacity, self.device = mail, tokens, capacity, device
        self.pending: list[Any] = []
        self.lent: Any = None  # the message whose rows `arrived` has given where they came
        self.own: ExpertRows | None = None  # what this rank's experts made of its own tokens
        self.gradients: ExpertRows | None = None  # of the rows that arrived, what the backward made

    @property
    def rows(self) -> int:
        """How many arrive."""
        return self.mail.ranks * self.capacity

    def send(self, parts: Sequence[Tensor], *, lend: bool = False, columns: Sequence[int] = ()) -> None:
        """Begins to send a row of each part for every token; integers of rows that there are no tokens for are -1.

        Args:
            parts: of as many rows as there are tokens.
            lend: let `arrived` give the rows where they came, until the next `send_back` or `release`, not copies.
            columns: the places of parts whose columns may be contiguous, and not their rows, on both ways.
        """
        missing = self.capacity - self.tokens
        if missing:
            parts = [pad(part, (0, 0, 0, missing), value=-1 if part.dtype == torch.int32 else 0) for part in parts]
        parts = [_by_columns(part) if i in columns else part.contiguous() for i, part in enumerate(parts)]
        into = None if lend else [part.new_empty(self.mail.ranks, *part.shape) for part in parts]
        self._begin([parts] * self.mail.ranks, lend=lend, columns=columns, into=into)

    def arrived(self, columns: Sequence[tuple[int, torch.dtype]]) -> list[Tensor]:
        """The rows of all ranks, part by part, ``[rows, width]``."""
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
        """What was lent has been read, by what is on the stream so far."""
        if self.lent is not None:
            self.mail.finished(self.lent)
            self.lent = None

    def settle(self) -> None:
        """Nobody needs another message to know what has been read here."""
        self.mail.settle()

    def __del__(self) -> None:
        """Where a backward ended before what was lent was sent back."""
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
        """Begins to send the sums of all rows that experts have made here to the ranks whose tokens they are.

        Those of this rank's own tokens are left to `returned`, which adds them up with what has come.

        Args:
            made: of all rows that arrived.
            more: other parts, ``[rows, width]``.
            weights: of this rank's tokens, for `returned`, where those of `made` are lent.
            urgent: nothing else runs before it is waited for: let the first sums leave while others are added up.
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
        # This rank's own sums do not travel: anything of their shape stands for them.
        nobody = next(iter(others.values())) if others else made.rows.new_empty(shape)
        leaving = [others.get(rank, nobody) for rank in range(mail.ranks)]
        split = [part.contiguous().chunk(mail.ranks) for part in more]
        self._begin([[leaving[rank], *(chunks[rank] for chunks in split)] for rank in range(mail.ranks)], fill=fill)
        self.release()

    def returned(self, columns: Sequence[tuple[int, torch.dtype]], residual: Tensor | None = None) -> list[Tensor]:
        """The sum over the ranks of each token's rows, ``[tokens, width]``, part by part.

        It is in fp32: the rows of this rank's experts one by one, then the sums of the other ranks in their order, then
        `residual`.

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
        for place in range(1, len(columns)):  # weights: each choice is one rank's, and zero on the others
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
    """The same matrix, with contiguous columns."""
    return part if part.stride(0) == 1 else part.mT.contiguous().mT


@functools.lru_cache(maxsize=64)
def _places(tokens: int, capacity: int, ranks: int, own: int, device: torch.device) -> Tensor:
    """Where the sums of the other ranks for each token stand among those of all, int32 ``[tokens, R - 1]``."""
    others = [rank * capacity for rank in range(ranks) if rank != own]
    token = torch.arange(tokens, device=device, dtype=torch.int32)
    return torch.stack([token + first for first in others], 1) if others else token.new_empty(tokens, 0)


def largest_message(tokens: int, hidden: int, top_k: int, dtype: torch.dtype) -> int:
    """Bytes of the largest message of so many tokens, out and back, forward and backward, whatever they travel as."""
    # Beside the tokens weights and ids; scales, of half a byte for each of 16, lie where smaller tokens leave room.
    return message_bytes([(tokens, hidden * dtype.itemsize), (tokens, 4 * top_k), (tokens, 4 * top_k), (tokens, 4)])
