"""The passes of a generation: prompts through the model, then step after step for all running sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from dskernels.model import few
from dskernels.model.batch import Batch
from dskernels.model.cache import LatentCache
from dskernels.model.model import DeepseekV3
from dskernels.model.mtp import MTP
from dskernels.model.sampling import Sampling
from dskernels.model.steps import advance, chances, place
from dskernels.validate import ceil_div

STANDS, DRAWN, DRAFTED = 0, 1, 2  # the purposes of random numbers: accept a draft, draw a token, draw a draft


@dataclass(frozen=True)
class Passes:
    """What all passes of a generation share.

    Attributes:
        model: the model.
        cache: the cache of its latents.
        sampling: how tokens are chosen.
        drafts: tokens that the MTP module proposes in a step.
        eos: tokens that end a text.
    """

    model: DeepseekV3
    cache: LatentCache
    sampling: Sampling
    drafts: int
    eos: tuple[int, ...] = ()

    @torch.no_grad()
    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        cached: Sequence[int],
        block_table: Tensor,
        stream: Tensor,
        *,
        piece: int,
        left: int,
    ) -> Sequences:
        """Run prompts, and choose the first token after each.

        Args:
            prompts: their tokens.
            cached: how many tokens of each are in the cache already; never all.
            block_table: int32 ``[B, pages]``.
            stream: int64 ``[B]``, see `uniform`.
            piece: a single prompt goes through the model this many tokens at a time; several prompts go at once.
            left: how many tokens each may get after its first.
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
                in_use = block_table[:, : ceil_div(max(seen), page_size)]  # all pages of a table are projected
                batch = Batch.extend(cu_seqlens, part.shape[0], lengths, in_use, page_size)
            hidden, _ = model.trunk(part, batch, self.cache.data)
            last_rows = cu_seqlens[1:].long() - 1
            if start + piece < total:
                after = tokens[start + piece : start + piece + 1]
            else:
                lengths = torch.tensor([len(prompt) for prompt in prompts], dtype=torch.int32, device=device)
                after, _ = self._choose(hidden[last_rows], stream, lengths, 0, DRAWN)
            if self.drafts:
                following = part.roll(-1).index_copy(0, last_rows, after)
                hidden, _ = model.predict(following, hidden, batch, self.cache.data)
        sequences = Sequences.empty(self, len(prompts), block_table.shape[1])
        sequences.last.copy_(after)
        sequences.lengths.copy_(lengths)
        sequences.active.fill_(1)
        sequences.left.fill_(left)
        sequences.stream.copy_(stream)
        for i, token in enumerate(self.eos):
            sequences.eos[:, i] = token
        sequences.block_table.copy_(block_table)
        if sequences.hidden is not None:
            sequences.hidden.copy_(hidden[last_rows])
        return sequences

    @torch.no_grad()
    def step(self, sequences: Sequences) -> None:
        """One step: make drafts, verify them, and append a token to those accepted. It only writes to existing tensors.

        Everything happens on the device and nothing depends on which sequences run, so it can be captured as a CUDA
        graph. The device also ends texts, so the next step can begin before the host has seen this one.
        """
        s, model, k, page_size = sequences, self.model, self.drafts, self.cache.page_size
        B = s.last.shape[0]
        drafts, draft_p = self._draft(s)
        placed = place(s.last, drafts, s.lengths, s.active, s.block_table, page_size=page_size)
        hidden, logits = model.score(placed.tokens, placed.batch(s.block_table), self.cache.data)
        logits = logits.unflatten(0, (B, k + 1))
        accepted: Tensor | None = None
        if self.sampling.greedy:
            chosen = logits.argmax(-1)
        else:
            u = chances(s.stream, s.lengths, 1, k + 1, 2, STANDS)
            accepted, chosen = self.sampling.verify(logits, drafts, draft_p, u)
        state = (s.last, s.lengths, s.active, s.left, s.new)
        advanced = advance(chosen, accepted, drafts, s.eos, s.block_table, *state, page_size=page_size)
        # Rejected drafts need no cleaning up: what was cached of them lies beyond the length and is overwritten.
        if s.hidden is not None:
            batch = advanced.placed.batch(s.block_table, advanced.q_lengths)
            hidden, _ = model.predict(advanced.placed.tokens, hidden, batch, self.cache.data)
            torch.index_select(hidden, 0, advanced.rows, out=s.hidden)

    def _draft(self, s: Sequences) -> tuple[Tensor, Tensor | None]:
        """Guesses of the tokens after the last one, int64 ``[B, k]``, and the probabilities they were drawn from,
        float32 ``[B, k, vocab]``; None if greedy."""
        rows, k = s.last.shape[0], self.drafts
        drafts = s.last.new_empty(rows, k)
        draft_p: Tensor | None = None
        if not self.sampling.greedy:
            draft_p = torch.empty(rows, k, self.model.config.vocab_size, device=drafts.device)
        if s.hidden is None:
            return drafts, draft_p
        hidden, token = s.hidden, s.last
        if self._drafts_by_few(rows):
            return self._draft_by_few(s, hidden, drafts), None
        for j in range(k):
            if j:
                before = token, drafts[:, :0], s.lengths, s.active, s.block_table
                placed = place(*before, page_size=self.cache.page_size, ahead=j - 1)
                hidden, _ = self.model.predict(token, hidden, placed.batch(s.block_table), self.cache.data)
            token, p = self._choose(hidden, s.stream, s.lengths, 1 + j, DRAFTED)
            drafts[:, j] = token
            if draft_p is not None and p is not None:
                draft_p[:, j] = p
        return drafts, draft_p

    def _drafts_by_few(self, rows: int) -> bool:
        """Whether `_draft_by_few` supports this."""
        model = self.model
        likely = self.sampling.greedy and model.config.vocab_size <= few.MOST_VOCABULARY
        return likely and few.fit(rows, cast(MTP, model.mtp[0]).eh_proj, model.lm_head)

    def _draft_by_few(self, s: Sequences, hidden: Tensor, drafts: Tensor) -> Tensor:
        """The same for greedy drafts of few sequences, with one launch for everything between two products."""
        model, state = self.model, (s.lengths, s.active, s.block_table)
        module = cast(MTP, model.mtp[0])
        logits = few.linear(hidden, model.lm_head)
        for j in range(drafts.shape[1]):
            placed, both, cos, sin = few.look_ahead(
                logits,
                drafts,
                j,
                *state,
                model.embed_tokens.weight,
                model.rope,
                hidden,
                module.enorm,
                module.hnorm,
                page_size=self.cache.page_size,
            )
            if j + 1 < drafts.shape[1]:
                batch = placed.batch(s.block_table)
                hidden, logits = model.predict_and_score(both, batch, cos, sin, self.cache.data)
        return drafts

    def _choose(
        self, hidden: Tensor, stream: Tensor, places: Tensor, ahead: int, purpose: int
    ) -> tuple[Tensor, Tensor | None]:
        """A token after each hidden state, at position ``places + ahead`` of its text, and what it was drawn from."""
        u = None if self.sampling.greedy else chances(stream, places, ahead, 1, 1, purpose).flatten()
        return self.sampling.choose(few.linear(hidden, self.model.lm_head), u)


@dataclass(frozen=True)
class Sequences:
    """The state of the running sequences: one row of every tensor for each.

    ``last`` is known but not cached yet; ``lengths`` tokens are cached. A row of zeros has no sequence; running it
    changes nothing.
    """

    last: Tensor  # int64 [B]
    lengths: Tensor  # int32 [B]
    active: Tensor  # int32 [B], 0 in rows without a sequence or with one that has ended, else 1
    left: Tensor  # int32 [B], tokens that the text may still get
    stream: Tensor  # int64 [B], the stream of random numbers
    eos: Tensor  # int64 [B, n], tokens that end the text
    block_table: Tensor  # int32 [B, pages]
    hidden: Tensor | None  # [B, hidden], the MTP module's at the last cached position; None without drafts
    new: Tensor  # int64 [B, k + 3], the tokens of the last step, their number, and the number of accepted drafts

    @classmethod
    def empty(cls, passes: Passes, rows: int, pages: int) -> Sequences:
        """This many rows without a sequence, with room for this many pages."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(rows, *shape, dtype=dtype, device=passes.cache.data.device)

        width, dtype = passes.model.config.hidden_size, passes.model.embed_tokens.weight.dtype
        return cls(
            last=zeros(),
            lengths=zeros(dtype=torch.int32),
            active=zeros(dtype=torch.int32),
            left=zeros(dtype=torch.int32),
            stream=zeros(),
            eos=zeros(len(passes.eos)),
            block_table=zeros(pages, dtype=torch.int32),
            hidden=zeros(width, dtype=dtype) if passes.drafts else None,
            new=zeros(passes.drafts + 3),
        )

    def tensors(self) -> list[Tensor]:
        """All tensors, without the None."""
        return [tensor for tensor in vars(self).values() if tensor is not None]

    def rows(self, start: int, stop: int) -> Sequences:
        """A view of some rows."""
        views = {name: None if t is None else t[start:stop] for name, t in vars(self).items()}
        return Sequences(**views)  # type: ignore[arg-type]

    def copy_(self, other: Sequences) -> None:
        """Copy the contents of ``other``."""
        for tensor, source in zip(self.tensors(), other.tensors(), strict=True):
            tensor.copy_(source)
