"""Generation for a batch of prompts over the paged latent cache, with MTP drafting."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dskernels.model.batch import Batch
from dskernels.model.cache import LatentCache
from dskernels.model.model import DeepseekV3
from dskernels.model.sampling import Sampling


def generate(
    model: DeepseekV3,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    drafts: int = 0,
    eos: Sequence[int] | None = None,
    cache: LatentCache | None = None,
    page_size: int = 64,
    max_batch: int = 64,
    prefill_tokens: int = 8192,
) -> Generation:
    """Continues each prompt; iterate over the result to get the tokens as they come.

    ::

        generation = generate(model, [prompt], drafts=1)
        for new in generation:
            print(decode(new[0]), end="", flush=True)
        print(generation.acceptance_rate)

    Prompts of any lengths run side by side. When one ends its place and its pages go to the next that waits.

    With ``drafts`` the MTP module proposes so many tokens a step and the model checks them all in one pass. The text
    is the same as without (greedy), or has the same distribution (sampled). The first module does all drafting; for
    a second token ahead it is applied to its own output. In low precision "the same" holds up to ties: a pass over
    several tokens may round otherwise than one over a single token.

    Args:
        model: the model.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: at most so many tokens are added to each.
        temperature: 0 is greedy.
        top_k: sample from the so many most likely tokens; 0 sets no limit.
        top_p: sample from the most likely tokens that together have this probability.
        generator: source of randomness, on the model's device.
        drafts: tokens proposed a step, 0 for none.
        eos: tokens that end a text (they are the last token given); by default those of the config.
        cache: pages to work in; by default one is made that suffices for ``max_batch`` prompts, in the model's dtype.
        page_size: of that cache.
        max_batch: prompts that run at a time.
        prefill_tokens: prompt tokens that are run through the model at a time; a longer prompt is taken in pieces.

    Raises:
        ValueError: no prompt or an empty one, an unknown token, more tokens than the model's context or the cache hold,
            drafting without an MTP module, or a number out of range.
    """
    return Generation(
        model,
        [[int(token) for token in prompt] for prompt in prompts],
        Sampling(temperature, top_k, top_p, generator),
        max_new_tokens=max_new_tokens,
        drafts=drafts,
        eos=frozenset(model.config.eos_token_id if eos is None else eos),
        cache=cache,
        page_size=page_size,
        max_batch=max_batch,
        prefill_tokens=prefill_tokens,
    )


@dataclass
class _State:
    """The running sequences (indices of prompts) and what the next step needs of them.

    ``last`` is known but not cached yet, ``drafts`` are guesses of what follows it; ``lengths`` tokens are cached.
    """

    sequences: list[int]
    last: Tensor  # int64 [B]
    lengths: Tensor  # int32 [B]
    drafts: Tensor  # int64 [B, k]
    draft_p: Tensor | None  # fp32 [B, k, vocab], None if greedy
    block_table: Tensor  # int32 [B, pages]


class Generation:
    """A generation under way: an iterator of steps, and what has come of it.

    Each step gives one list for each prompt with its new tokens: none, one, or several where drafts were accepted.

    Attributes:
        tokens: for each prompt all new tokens so far.
        steps: passes of the model over the running sequences, prompts not counted.
        drafted: tokens proposed so far.
        accepted: those that stood.
    """

    def __init__(
        self,
        model: DeepseekV3,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        drafts: int,
        eos: frozenset[int],
        cache: LatentCache | None,
        page_size: int,
        max_batch: int,
        prefill_tokens: int,
    ) -> None:
        _check(model, prompts, drafts, max_new_tokens)
        for name, value in (("page_size", page_size), ("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.max_new_tokens, self.k, self.eos = max_new_tokens, drafts, eos
        self.max_batch, self.prefill_tokens = max_batch, prefill_tokens
        # The token given last is never cached, the drafts after the one before it are.
        reserved = [len(prompt) + max_new_tokens + drafts for prompt in prompts]
        if cache is None:
            pages = sum(sorted((-(-tokens // page_size) for tokens in reserved), reverse=True)[:max_batch])
            weight = model.embed_tokens.weight
            cache = LatentCache(
                model.config, pages=pages, page_size=page_size, dtype=weight.dtype, device=weight.device
            )
        layers = len(model.layers) + len(model.mtp)
        if cache.data.shape[0] != layers:
            raise ValueError(f"cache: has {cache.data.shape[0]} layers, the model needs {layers}")
        for i, tokens in enumerate(reserved):
            if cache.pages_for(tokens) > cache.pages:
                raise ValueError(f"cache: prompt {i} needs {cache.pages_for(tokens)} pages, there are {cache.pages}")
        self.cache, self.reserved = cache, reserved
        self.device = cache.data.device
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.steps = self.drafted = self.accepted = 0
        self._waiting = deque(range(len(prompts)))
        self._pages: dict[int, list[int]] = {}  # of the prompts that run
        self._iterator: Generator[list[list[int]], None, None] = self._run()

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        return next(self._iterator)

    def close(self) -> None:
        """Ends the generation early and gives its pages back."""
        self._iterator.close()

    def abort(self, index: int) -> None:
        """Ends one prompt with the tokens it has; its pages and its place go to the next that waits."""
        if index in self._waiting:
            self._waiting.remove(index)
        elif index in self._pages:
            self.cache.free(self._pages.pop(index))

    def ended(self, index: int) -> bool:
        """Whether a prompt gets no more tokens."""
        return index not in self._pages and index not in self._waiting

    def finish(self) -> list[list[int]]:
        """Runs to the end and returns all new tokens of each prompt."""
        for _ in self:
            pass
        return self.tokens

    @property
    def acceptance_rate(self) -> float:
        """The part of the drafted tokens that stood, 0 if none was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def _run(self) -> Generator[list[list[int]], None, None]:
        state: _State | None = None
        try:
            while self._waiting or state is not None:
                new: list[list[int]] = [[] for _ in self.prompts]
                if admitted := self._admit():
                    begun = self._prefill(admitted)
                    self._take(new, admitted, [[token] for token in begun.last.tolist()])
                    state = self._join([begun] if state is None else [state, begun])
                elif state is not None:
                    self._take(new, state.sequences, self._step(state))
                    state = self._join([state])
                else:
                    raise RuntimeError(f"cache: prompt {self._waiting[0]} waits for pages that somebody else holds")
                yield new
                state = self._join([state]) if state is not None else None  # without what was aborted
        finally:
            for pages in self._pages.values():
                self.cache.free(pages)
            self._pages.clear()

    def _admit(self) -> list[int]:
        """The next prompts that have a place and pages, together at most `prefill_tokens` (a longer one goes alone)."""
        admitted: list[int] = []
        tokens = 0
        while self._waiting and len(self._pages) < self.max_batch:
            index = self._waiting[0]
            tokens += len(self.prompts[index])
            if admitted and tokens > self.prefill_tokens:
                break
            pages = self.cache.admit(self.reserved[index])
            if pages is None:
                break
            self._pages[index] = pages
            admitted.append(self._waiting.popleft())
        return admitted

    @torch.no_grad()
    def _prefill(self, sequences: list[int]) -> _State:
        """Runs the prompts, gives each its first token, and drafts."""
        model, page_size = self.model, self.cache.page_size
        prompts = [self.prompts[index] for index in sequences]
        tokens = self._tensor([token for prompt in prompts for token in prompt], torch.int64)
        ends = torch.tensor([0, *(len(prompt) for prompt in prompts)]).cumsum(0).to(self.device, torch.int32)
        block_table = self.cache.block_table([self._pages[index] for index in sequences])

        # Several prompts fit in one pass; one that does not is alone and goes through in pieces.
        total = tokens.shape[0]
        piece = total if len(prompts) > 1 else self.prefill_tokens
        for start in range(0, total, piece):
            part = tokens[start : start + piece]
            if start == 0:
                cu_seqlens = ends.clamp(max=piece)
                batch = Batch.prompt(cu_seqlens, part.shape[0], block_table, page_size)
            else:
                cu_seqlens = self._tensor([0, part.shape[0]], torch.int32)
                lengths = self._tensor([start + part.shape[0]], torch.int32)
                batch = Batch.extend(cu_seqlens, part.shape[0], lengths, block_table, page_size)
            hidden, _ = model.trunk(part, batch, self.cache.data)
            last_rows = cu_seqlens[1:].long() - 1
            if start + piece >= total:
                last, _ = self.sampling.choose(model.lm_head(hidden[last_rows]))
                after = last
            else:
                after = tokens[start + piece : start + piece + 1]
            if self.k:
                following = part.roll(-1).index_copy(0, last_rows, after)
                hidden, _ = model.predict(following, hidden, batch, self.cache.data)
        lengths = ends.diff()
        drafts, draft_p = self._draft(hidden[last_rows], lengths, block_table)
        return _State(sequences, last, lengths, drafts, draft_p, block_table)

    @torch.no_grad()
    def _step(self, state: _State) -> list[list[int]]:
        """One pass: checks the drafts, adds a token to those that stood, drafts again; gives the new tokens of each."""
        model, k, B = self.model, self.k, len(state.sequences)
        tokens = torch.cat((state.last[:, None], state.drafts), 1)
        batch = Batch.decode(state.lengths + k + 1, k + 1, state.block_table, self.cache.page_size)
        hidden, _ = model.trunk(tokens.flatten(), batch, self.cache.data)
        logits = model.lm_head(hidden).unflatten(0, (B, k + 1))
        accepted, state.last = self.sampling.verify(logits, state.drafts, state.draft_p)
        new = torch.cat((state.drafts, state.last[:, None]), 1).scatter(1, accepted[:, None], state.last[:, None])
        count = accepted + 1
        # Crop: what was cached of rejected drafts lies behind the length and is overwritten.
        state.lengths = state.lengths + count.int()
        if k:
            batch = Batch.decode(state.lengths, k + 1, state.block_table, self.cache.page_size, count.int())
            hidden, _ = model.predict(new.flatten(), hidden, batch, self.cache.data)
            at_last = hidden.unflatten(0, (B, k + 1))[torch.arange(B, device=self.device), accepted]
            state.drafts, state.draft_p = self._draft(at_last, state.lengths, state.block_table)
        self.steps += 1
        self.drafted += k * B
        counts = count.tolist()
        self.accepted += sum(counts) - B
        return [row[:n] for row, n in zip(new.tolist(), counts, strict=True)]

    def _draft(self, hidden: Tensor, lengths: Tensor, block_table: Tensor) -> tuple[Tensor, Tensor | None]:
        """``k`` further tokens from the MTP module's hidden state ``[B, hidden]`` at the last cached position."""
        tokens: list[Tensor] = []
        probabilities: list[Tensor] = []
        for j in range(self.k):
            token, p = self.sampling.choose(self.model.lm_head(hidden))
            tokens.append(token)
            if p is not None:
                probabilities.append(p)
            if j + 1 < self.k:
                batch = Batch.decode(lengths + j + 1, 1, block_table, self.cache.page_size)
                hidden, _ = self.model.predict(token, hidden, batch, self.cache.data)
        B, vocab = hidden.shape[0], self.model.config.vocab_size
        drafts = torch.stack(tokens, 1) if tokens else hidden.new_empty((B, 0), dtype=torch.int64)
        if self.sampling.greedy:
            return drafts, None
        return drafts, torch.stack(probabilities, 1) if tokens else hidden.new_empty((B, 0, vocab), dtype=torch.float32)

    def _take(self, new: list[list[int]], sequences: list[int], tokens: list[list[int]]) -> None:
        """Gives each sequence its tokens, up to the end of the text or the limit; frees the pages of those that end."""
        for index, given in zip(sequences, tokens, strict=True):
            for token in given:
                new[index].append(token)
                if token in self.eos or len(self.tokens[index]) + len(new[index]) == self.max_new_tokens:
                    self.cache.free(self._pages.pop(index))
                    break
            self.tokens[index] += new[index]

    def _join(self, states: list[_State]) -> _State | None:
        """One state of all sequences that still run, None if there are none."""
        going = [[i for i, index in enumerate(state.sequences) if index in self._pages] for state in states]
        sequences = [state.sequences[i] for state, rows in zip(states, going, strict=True) for i in rows]
        if not sequences:
            return None
        if len(states) == 1 and len(sequences) == len(states[0].sequences):
            return states[0]

        def gather(name: str) -> Tensor:
            parts = zip(states, going, strict=True)
            return torch.cat([getattr(state, name)[self._tensor(rows, torch.int64)] for state, rows in parts])

        return _State(
            sequences,
            gather("last"),
            gather("lengths"),
            gather("drafts"),
            None if self.sampling.greedy else gather("draft_p"),
            self.cache.block_table([self._pages[index] for index in sequences]),
        )

    def _tensor(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _check(model: DeepseekV3, prompts: list[list[int]], drafts: int, max_new_tokens: int) -> None:
    config = model.config
    if not prompts:
        raise ValueError("prompts: expected at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected at least 1, got {max_new_tokens}")
    if drafts < 0:
        raise ValueError(f"drafts: expected 0 or more, got {drafts}")
    if drafts and not model.mtp:
        raise ValueError(f"drafts: {drafts} asked for, but the model has no MTP module")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts: prompt {i} is empty")
        if min(prompt) < 0 or max(prompt) >= config.vocab_size:
            raise ValueError(f"prompts: prompt {i} has a token outside [0, vocab_size = {config.vocab_size})")
        if len(prompt) + max_new_tokens > config.max_position_embeddings:
            raise ValueError(
                f"prompts: prompt {i} has {len(prompt)} tokens and may get {max_new_tokens} more, "
                f"the context is {config.max_position_embeddings}"
            )
