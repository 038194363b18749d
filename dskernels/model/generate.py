"""Generation for any number of prompts over the paged latent cache, with MTP drafts."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from dskernels.choice import forced_impl
from dskernels.model.cache import LatentCache, page_keys
from dskernels.model.chance import streams
from dskernels.model.model import DeepseekV3
from dskernels.model.passes import Passes
from dskernels.model.sampling import Sampling
from dskernels.model.slots import Coming, Slots


def generate(
    model: DeepseekV3,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    drafts: int = 0,
    eos: Sequence[int] | None = None,
    cache: LatentCache | None = None,
    page_size: int = 64,
    max_batch: int = 64,
    prefill_tokens: int = 8192,
    prefix_sharing: bool = True,
    batch_invariant: bool = False,
    graphs: bool | None = None,
) -> Generation:
    """Continue each prompt; iterate over the result to get the tokens as they come.

    ::

        generation = generate(model, [prompt], drafts=1)
        for new in generation:
            print(decode(new[0]), end="", flush=True)
        print(generation.acceptance_rate)

    Prompts of any lengths run side by side. When one ends, the next one that waits takes its place and its pages.

    With ``drafts``, the MTP module proposes this many tokens in each step, and the model verifies them in one pass. The
    text is the same as without (greedy), or has the same distribution (sampled). The first MTP module makes all drafts;
    for a second token ahead it is applied to its own output. In low precision "the same" holds except for ties: a pass
    over several tokens may round differently from a pass over one.

    Args:
        model: the model.
        prompts: token ids of each prompt, at least one.
        max_new_tokens: the maximum number of tokens added to each.
        temperature: 0 is greedy.
        top_k: sample from this many most likely tokens; 0 sets no limit.
        top_p: sample from the most likely tokens that together have this probability.
        min_p: sample from tokens with at least this fraction of the most likely one's probability.
        seed: of the sampling, one for all prompts or one for each. A prompt with its own seed gets the same random
            numbers wherever it stands in the list.
        generator: instead of a seed; one is drawn from it. It is on the model's device; None is torch's own.
        drafts: tokens proposed in a step, 0 for none.
        eos: tokens that end a text (and are the last one returned); by default those of the config.
        cache: pages to work in; by default a cache with room for ``max_batch`` prompts is made, in the model's dtype.
            What one generation leaves in it, the next one shares.
        page_size: of the cache that is made.
        max_batch: the maximum number of prompts that run at a time.
        prefill_tokens: the maximum number of prompt tokens in one pass; a longer prompt is divided into pieces.
        prefix_sharing: do not compute full pages of a prompt again that are in the cache, because another prompt with
            the same beginning is running or ran lately. The rest of the prompt attends to the cached latents, rounded
            to the cache's dtype, as the tokens after the prompt do.
        batch_invariant: make a text independent, to the last bit, of what runs beside it and of what was cached. Each
            prompt goes through the model alone, in pieces of whole pages; only whole pieces are shared; a step always
            has ``max_batch`` rows. Texts are then the same for the same ``max_batch``, ``prefill_tokens`` and
            ``page_size``, provided that the operations give a row the same bits in every row of a batch. Sampling needs
            a seed for each prompt.
        graphs: replay the step as a CUDA graph, one for each power of two of running prompts, captured when first
            needed; by default on a GPU, but not under ``use_impl("reference")``. Graphs stay with the cache: pass the
            same cache to every call to capture them only once. Hooks of modules run during the capture, not in a
            replay.

    On a GPU, a step begins before the host has read the tokens of the one before, so that the device never waits: a
    weight that changes between two tokens takes effect one step later, and a text that is ended by the host (`abort`)
    runs one more step, whose result is discarded.

    Returns:
        The generation, of which nothing has been computed yet: iterate over it, or call `Generation.finish`.

    Raises:
        TypeError: prompts are not tokens.
        ValueError: no prompt or an empty one, an unknown token, more tokens than the model's context or the cache can
            hold, drafts without an MTP module, graphs without a GPU, or a number out of range.
        RuntimeError: during the iteration: a step cannot be captured as a graph, and why.
    """
    return Generation(
        model,
        _listed(prompts),
        Sampling(temperature, top_k, top_p, min_p),
        seed=seed,
        generator=generator,
        max_new_tokens=max_new_tokens,
        drafts=drafts,
        eos=frozenset(model.config.eos_token_id if eos is None else eos),
        cache=cache,
        page_size=page_size,
        max_batch=max_batch,
        prefill_tokens=prefill_tokens,
        prefix_sharing=prefix_sharing,
        batch_invariant=batch_invariant,
        graphs=graphs,
    )


class Generation:
    """A running generation: an iterator of steps, and the results so far.

    Each step yields one list for each prompt with its new tokens: none, one, or several if drafts were accepted. Pages
    are given back when their prompt ends, and all of them when the generation is closed or no longer referenced.

    Attributes:
        prompts: the tokens of each prompt.
        tokens: for each prompt, all new tokens so far.
        steps: passes of the model over the running sequences, not counting prompts.
        drafted: number of tokens proposed so far.
        accepted: how many of them were accepted.
        shared_tokens: prompt tokens that were not computed because their pages were in the cache.
    """

    def __init__(
        self,
        model: DeepseekV3,
        prompts: list[list[int]],
        sampling: Sampling,
        *,
        seed: int | Sequence[int] | None,
        generator: torch.Generator | None,
        max_new_tokens: int,
        drafts: int,
        eos: frozenset[int],
        cache: LatentCache | None,
        page_size: int,
        max_batch: int,
        prefill_tokens: int,
        prefix_sharing: bool,
        batch_invariant: bool,
        graphs: bool | None,
    ) -> None:
        self._waiting: deque[int] = deque()
        self._running: list[int] = []  # in the order of their rows
        self._pages: dict[int, list[int]] = {}  # of the running prompts
        _check(model, prompts, drafts, max_new_tokens)
        for name, value in (("page_size", page_size), ("max_batch", max_batch), ("prefill_tokens", prefill_tokens)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        # the last token of a text is never cached, but drafts after the one before it are
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
        device = cache.data.device
        if graphs is None:  # the reference waits for the device
            graphs = device.type == "cuda" and forced_impl() != "reference"
        if graphs and device.type != "cuda":
            raise ValueError(f"graphs: expected a cache on a GPU, got one on {device}")
        if batch_invariant and not sampling.greedy and (seed is None or isinstance(seed, int)):
            raise ValueError("seed: expected one for each prompt, so that samples do not depend on the batch")

        self.prompts, self.cache, self.max_new_tokens, self.eos = prompts, cache, max_new_tokens, eos
        self.max_batch, self.prefix_sharing, self.batch_invariant = max_batch, prefix_sharing, batch_invariant
        self.prefill_tokens = prefill_tokens
        if batch_invariant:
            self.prefill_tokens = max(cache.page_size, prefill_tokens // cache.page_size * cache.page_size)
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.steps = self.drafted = self.accepted = self.shared_tokens = 0
        self._reserved = reserved
        self._stream = streams(seed, generator, len(prompts), device)
        self._passes = Passes(model, cache, sampling, drafts, tuple(sorted(eos)))
        self._ahead = device.type == "cuda"  # begin a step before the tokens of the last one are read
        self._coming: tuple[list[int], Coming] | None = None
        self._slots = Slots(
            self._passes,
            slots=max_batch if batch_invariant else min(max_batch, len(prompts)),
            # Kernels divide a sequence by what its row of the table could hold, which must not depend on the other
            # sequences.
            pages=cache.pages_for(model.config.max_position_embeddings + drafts)
            if batch_invariant
            else rounded(cache.pages_for(max(reserved)), cache.pages),
            graphs=graphs,
            all_rows=batch_invariant,
        )
        # Pages differ by what computed them; batch-invariant ones also by the pieces in which it happened.
        pieces = self.prefill_tokens if batch_invariant else 0
        self._root = cache.root(model) + repr(pieces).encode()
        self._prompt_keys = [self._keys(prompt) for prompt in prompts]
        self._waiting.extend(range(len(prompts)))

    def __iter__(self) -> Iterator[list[list[int]]]:
        return self

    def __next__(self) -> list[list[int]]:
        admitted = self._admit()
        if not admitted and not self._running:
            if self._waiting:
                raise RuntimeError(f"cache: prompt {self._waiting[0]} waits for pages that somebody else holds")
            self.close()
            raise StopIteration
        try:
            if admitted:
                return self._take(list(admitted), self._prefill(admitted))
            return self._take(*self._step())
        except BaseException:
            self._slots.drop_graphs()  # after a failure they cannot be trusted
            self.close()
            raise

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """End the generation early and give its pages back."""
        for pages in self._pages.values():
            self.cache.free(pages)
        self._pages.clear()
        self._waiting.clear()
        self._running.clear()
        self._coming = None
        slots: Slots | None = getattr(self, "_slots", None)  # does not exist if the constructor raised
        if slots is not None and not sys.is_finalizing():
            slots.close()

    def abort(self, index: int) -> None:
        """End one prompt with the tokens it has; its pages and its place go to the next one that waits."""
        if index in self._waiting:
            self._waiting.remove(index)
        elif index in self._pages:
            self._end(index)
            self._close_ranks()

    def ended(self, index: int) -> bool:
        """Whether a prompt gets no more tokens."""
        return index not in self._pages and index not in self._waiting

    def finish(self) -> list[list[int]]:
        """Run to the end and return all new tokens of each prompt."""
        for _ in self:
            pass
        return self.tokens

    @property
    def acceptance_rate(self) -> float:
        """The fraction of drafted tokens that were accepted, 0 if there were none."""
        return self.accepted / self.drafted if self.drafted else 0.0

    def _admit(self) -> dict[int, int]:
        """The next prompts for which there is a place and enough pages, and how many tokens of each are cached.

        Together they have at most `prefill_tokens` to compute; a longer one runs alone.
        """
        admitted: dict[int, int] = {}
        coming: set[bytes] = set()  # pages that the prompts admitted here will fill
        tokens = 0
        while self._waiting and len(self._running) + len(admitted) < self.max_batch:
            index = self._waiting[0]
            prompt = self.prompts[index]
            keys = self._prompt_keys[index]
            # At least one token has to run, or nothing would tell which one comes next.
            shared = self.cache.match(keys[: (len(prompt) - 1) // self.cache.page_size])
            shared = shared[: self._whole(len(shared))]
            cached = len(shared) * self.cache.page_size
            tokens += len(prompt) - cached
            if admitted and (tokens > self.prefill_tokens or self.batch_invariant or coming.intersection(keys)):
                break
            pages = self.cache.admit(self._reserved[index], shared)
            if pages is None:
                break
            self._pages[index] = pages
            admitted[index] = cached
            coming.update(keys[len(shared) :])
            self.shared_tokens += cached
            self._waiting.popleft()
        return admitted

    def _prefill(self, cached: dict[int, int]) -> list[list[int]]:
        """The first token of each prompt."""
        prompts = [self.prompts[index] for index in cached]
        pages = [self._pages[index] for index in cached]
        table = self.cache.block_table(pages, self._slots.sequences.block_table.shape[1])
        stream = self._stream[torch.tensor(list(cached), device=self._stream.device)]
        begun = self._passes.prefill(
            prompts, list(cached.values()), table, stream, piece=self.prefill_tokens, left=self.max_new_tokens - 1
        )
        for index in cached:
            keys = self._prompt_keys[index]
            self.cache.remember(self._pages[index], keys[: self._whole(len(keys))])
        self._running.extend(cached)
        self._slots.append(begun)
        return [[token] for token in begun.last.tolist()]

    def _step(self) -> tuple[list[int], list[list[int]]]:
        """The sequences of a step, and the new tokens of each."""
        sequences, coming = self._coming or self._begin()
        # The host sees an end token only when the step is done; on the device, the text has ended by then.
        goes_on = any(len(self.tokens[index]) + 1 < self.max_new_tokens for index in self._running)
        self._coming = self._begin() if self._ahead and goes_on else None
        tokens, accepted = coming.tokens()
        self.steps += 1
        self.drafted += self._passes.drafts * sum(map(bool, tokens))
        self.accepted += accepted
        return sequences, tokens

    def _begin(self) -> tuple[list[int], Coming]:
        return list(self._running), self._slots.step()

    def _take(self, sequences: Sequence[int], tokens: list[list[int]]) -> list[list[int]]:
        """Give each sequence its tokens, up to the end of the text or the limit, and end those that are complete."""
        new: list[list[int]] = [[] for _ in self.prompts]
        for index, given in zip(sequences, tokens, strict=True):
            if index not in self._pages:  # ended after this step began
                continue
            for token in given:
                new[index].append(token)
                self.tokens[index].append(token)
                if token in self.eos or len(self.tokens[index]) == self.max_new_tokens:
                    self._end(index)
                    break
        self._close_ranks()
        return new

    def _end(self, index: int) -> None:
        """Release the pages of a sequence, and remember its text in them for prompts that begin with it."""
        pages = self._pages.pop(index)
        if not self.batch_invariant:  # a step may round differently from a pass over the prompt
            text = self.prompts[index] + self.tokens[index]
            # All tokens but the last are cached, and the MTP module knows that one.
            self.cache.remember(pages, self._keys(text if self._passes.drafts else text[:-1]))
        self.cache.free(pages)

    def _close_ranks(self) -> None:
        """Drop the rows of sequences that have ended."""
        rows = [row for row, index in enumerate(self._running) if index in self._pages]
        if len(rows) < len(self._running):
            self._slots.keep(rows)
            self._running = [self._running[row] for row in rows]

    def _keys(self, tokens: list[int]) -> list[bytes]:
        """The keys of the pages that these tokens fill; none if nothing is shared."""
        if not self.prefix_sharing:
            return []
        return page_keys(tokens, self.cache.page_size, root=self._root, ahead=int(self._passes.drafts > 0))

    def _whole(self, pages: int) -> int:
        """How many of the first pages of a prompt may be shared; with batch invariance, only those of whole pieces."""
        piece = self.prefill_tokens // self.cache.page_size
        return pages // piece * piece if self.batch_invariant else pages


def _listed(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts as lists of ints, whatever kind of sequence they are."""
    listed = []
    for i, prompt in enumerate(prompts):
        try:
            if isinstance(prompt, str | bytes):
                raise TypeError
            listed.append([int(token) for token in prompt])
        except (TypeError, ValueError):
            got = type(prompt).__name__
            raise TypeError(
                f"prompts: expected a list of tokens for each, prompt {i} is {got} (of text: generate_text)"
            ) from None
    return listed


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


def rounded(pages: int, most: int) -> int:
    """A number of pages rounded up, by at most a quarter, so that what was made for one number often fits another."""
    step = max(1, (1 << (pages - 1).bit_length()) // 8)
    return min(-(-pages // step) * step, max(pages, most))
