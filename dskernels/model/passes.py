"""The passes that generate: prompts through the model, then a step at a time for all sequences that run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dskernels.model.batch import Batch
from dskernels.model.cache import LatentCache
from dskernels.model.chance import uniform
from dskernels.model.model import DeepseekV3
from dskernels.model.sampling import Sampling

STANDS, DRAWN, DRAFTED = 0, 1, 2  # the purposes of random numbers


@dataclass(frozen=True)
class Passes:
    """What all passes of a generation share.

    Attributes:
        model: the model.
        cache: where its latents lie.
        sampling: how tokens are chosen.
        drafts: tokens that the MTP module proposes a step.
    """

    model: DeepseekV3
    cache: LatentCache
    sampling: Sampling
    drafts: int

    @torch.no_grad()
    def prefill(
        self, prompts: Sequence[Sequence[int]], cached: Sequence[int], block_table: Tensor, stream: Tensor, piece: int
    ) -> Sequences:
        """Runs prompts, chooses the first token after each, and drafts.

        Args:
            prompts: tokens.
            cached: how many of each are in the cache already, not all.
            block_table: int32 ``[B, pages]``.
            stream: int64 ``[B]``, see `uniform`.
            piece: a single prompt goes through the model so many tokens at a time; several go at once.
        """
        model, page_size, device = self.model, self.cache.page_size, block_table.device
        rests = [len(prompt) - n for prompt, n in zip(prompts, cached, strict=True)]
        flat = [token for prompt, n in zip(prompts, cached, strict=True) for token in prompt[n:]]
        tokens = torch.tensor(flat, dtype=torch.int64, device=device)
        total = len(flat)
        piece = piece if len(prompts) == 1 else total
        for start in range(0, total, piece):
            part = tokens[start : start + piece]
            counts = rests if len(prompts) > 1 else [part.shape[0]]
            cu_seqlens = torch.tensor([0, *counts]).cumsum(0).to(device, torch.int32)
            if start == 0 and not any(cached):
                batch = Batch.prompt(cu_seqlens, part.shape[0], block_table, page_size)
            else:
                seen = [n + start + count for n, count in zip(cached, counts, strict=True)]
                lengths = torch.tensor(seen, dtype=torch.int32, device=device)
                batch = Batch.extend(cu_seqlens, part.shape[0], lengths, block_table, page_size)
            hidden, _ = model.trunk(part, batch, self.cache.data)
            last_rows = cu_seqlens[1:].long() - 1
            if start + piece < total:
                after = tokens[start + piece : start + piece + 1]
            else:
                lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
                after, _ = self._choose(hidden[last_rows], stream, lengths, DRAWN)
            if self.drafts:
                following = part.roll(-1).index_copy(0, last_rows, after)
                hidden, _ = model.predict(following, hidden, batch, self.cache.data)
        sequences = Sequences.empty(self, len(prompts), block_table.shape[1])
        sequences.last.copy_(after)
        sequences.lengths.copy_(lengths)
        sequences.active.fill_(1)
        sequences.stream.copy_(stream)
        sequences.block_table.copy_(block_table)
        self._draft(sequences, hidden[last_rows])
        return sequences

    @torch.no_grad()
    def step(self, sequences: Sequences) -> None:
        """One pass: checks the drafts, adds a token to those that stood, drafts again. Writes in place alone.

        All is done on the device and nothing depends on what runs, so that a CUDA graph can be made of it.
        """
        s, model, k = sequences, self.model, self.drafts
        B = s.last.shape[0]
        tokens = torch.cat((s.last[:, None], s.drafts), 1)
        batch = Batch.decode(s.lengths + (k + 1) * s.active, k + 1, s.block_table, self.cache.page_size)
        hidden, _ = model.trunk(tokens.flatten(), batch, self.cache.data)
        logits = model.lm_head(hidden).unflatten(0, (B, k + 1))
        u = None
        if not self.sampling.greedy:
            places = s.lengths[:, None] + 1 + torch.arange(k + 1, device=s.last.device)
            u = torch.stack((uniform(s.stream, places, STANDS), uniform(s.stream, places, DRAWN)), 2)
        accepted, last = self.sampling.verify(logits, s.drafts, s.draft_p, u)
        new = torch.cat((s.drafts, last[:, None]), 1).scatter(1, accepted[:, None], last[:, None])
        count = (accepted + 1) * s.active
        # Crop: what was cached of rejected drafts lies behind the length and is overwritten.
        s.lengths.add_(count)
        s.last.copy_(last)
        s.new.copy_(torch.cat((new, count[:, None]), 1))
        if k:
            batch = Batch.decode(s.lengths, k + 1, s.block_table, self.cache.page_size, count.int())
            hidden, _ = model.predict(new.flatten(), hidden, batch, self.cache.data)
            self._draft(s, hidden.unflatten(0, (B, k + 1))[torch.arange(B, device=hidden.device), accepted])

    def _draft(self, s: Sequences, hidden: Tensor) -> None:
        """Further tokens from the MTP module's hidden state ``[B, hidden]`` at the last cached position."""
        for j in range(self.drafts):
            token, p = self._choose(hidden, s.stream, s.lengths + 1 + j, DRAFTED)
            s.drafts[:, j] = token
            if s.draft_p is not None and p is not None:
                s.draft_p[:, j] = p
            if j + 1 < self.drafts:
                batch = Batch.decode(s.lengths + (j + 1) * s.active, 1, s.block_table, self.cache.page_size)
                hidden, _ = self.model.predict(token, hidden, batch, self.cache.data)

    def _choose(self, hidden: Tensor, stream: Tensor, place: Tensor, purpose: int) -> tuple[Tensor, Tensor | None]:
        """A token after each hidden state, to stand at ``place`` in its text, and what it was drawn from."""
        u = None if self.sampling.greedy else uniform(stream, place, purpose)
        return self.sampling.choose(self.model.lm_head(hidden), u)


@dataclass(frozen=True)
class Sequences:
    """What a step needs of each sequence, and what it gives: a row of every tensor belongs to one.

    ``last`` is known but not cached yet, ``drafts`` are guesses of what follows it; ``lengths`` tokens are cached.
    A row of zeros has no sequence; it is run and changes nothing.
    """

    last: Tensor  # int64 [B]
    lengths: Tensor  # int32 [B]
    active: Tensor  # int32 [B], 0 in rows without a sequence, else 1
    stream: Tensor  # int64 [B], of random numbers
    block_table: Tensor  # int32 [B, pages]
    drafts: Tensor  # int64 [B, k]
    draft_p: Tensor | None  # fp32 [B, k, vocab], what they were drawn from; None if greedy
    new: Tensor  # int64 [B, k + 2], the tokens of the last step and how many there are

    @classmethod
    def empty(cls, passes: Passes, rows: int, pages: int) -> Sequences:
        """So many rows without a sequence, with room for so many pages."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=passes.cache.data.device)

        k, vocab = passes.drafts, passes.model.config.vocab_size
        return cls(
            last=zeros(),
            lengths=zeros(dtype=torch.int32),
            active=zeros(dtype=torch.int32),
            stream=zeros(),
            block_table=zeros(pages, dtype=torch.int32),
            drafts=zeros(k),
            draft_p=None if passes.sampling.greedy else zeros(k, vocab, dtype=torch.float32),
            new=zeros(k + 2),
        )

    def tensors(self) -> list[Tensor]:
        """All that there are."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def rows(self, start: int, stop: int) -> Sequences:
        """A view of some rows."""
        views = {name: None if t is None else t[start:stop] for name, t in vars(self).items()}
        return Sequences(**views)  # type: ignore[arg-type]

    def copy_(self, other: Sequences) -> None:
        """Takes the contents of ``other``."""
        for tensor, source in zip(self.tensors(), other.tensors(), strict=True):
            tensor.copy_(source)


class Slots:
    """The sequences that run, in tensors that stay where they are: those of the first rows, with no holes.

    Args:
        passes: of the generation.
        slots: most sequences at a time.
        pages: most pages of one.
        graphs: make a CUDA graph of the step for each number of rows, and replay it.
        all_rows: a step runs all rows, always.

    Attributes:
        running: how many sequences there are.
    """

    def __init__(self, passes: Passes, *, slots: int, pages: int, graphs: bool, all_rows: bool) -> None:
        self.passes, self.slots, self.graphs, self.all_rows = passes, slots, graphs, all_rows
        self.sequences = Sequences.empty(passes, slots, pages)
        self.running = 0
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def append(self, sequences: Sequences) -> None:
        """Adds sequences behind those that run."""
        end = self.running + sequences.last.shape[0]
        self.sequences.rows(self.running, end).copy_(sequences)
        self.running = end

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but those of ``rows``, which move together in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.sequences.last.device)
        for tensor in self.sequences.tensors():
            tensor[: len(rows)] = tensor[index]
            tensor[len(rows) : self.running] = 0
        self.running = len(rows)

    def step(self) -> list[list[int]]:
        """The new tokens of each sequence. Here the host waits for the device, once a step."""
        rows = self._rows()
        if self.graphs:
            if rows not in self._graphs:
                self._graphs[rows] = self._capture(rows)
            self._graphs[rows].replay()
        else:
            self.passes.step(self.sequences.rows(0, rows))
        return [row[: row[-1]] for row in self.sequences.new[: self.running].tolist()]

    def _rows(self) -> int:
        """How many rows a step runs: with graphs a power of two, so that there are few."""
        if self.all_rows:
            return self.slots
        return min(self.slots, 1 << (self.running - 1).bit_length()) if self.graphs else self.running

    def _capture(self, rows: int) -> torch.cuda.CUDAGraph:
        """The graph of a step."""
        sequences = self.sequences.rows(0, rows)
        before = [tensor.clone() for tensor in sequences.tensors()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.passes.step(sequences)  # what is to be compiled or allocated cannot be within a capture
        torch.cuda.current_stream().wait_stream(stream)
        for tensor, value in zip(sequences.tensors(), before, strict=True):
            tensor.copy_(value)  # what this step cached, the next one writes again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.passes.step(sequences)
        return graph
