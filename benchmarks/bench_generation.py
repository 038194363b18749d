"""Token by token from the small model that `make demo` trains: drafts, and what batch invariance costs.

The timings are what a user waits for, including the host that reads the tokens, but not the prompts unless a case says
so. The peer, "plain", is the same generation without the feature.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import workloads
from benchmarks.cases import Call, Case, kept_within_a_family
from benchmarks.peers import Peer
from benchmarks.roofline import Work
from benchmarks.timing import Prepared
from dskernels.model import Batch, Config, DeepseekV3, Generation, LatentCache, generate, load
from dskernels.model.data import Corpus, read_corpus, standard_library
from dskernels.model.train import DEMO, train

FOLDER = Path("demo")  # where `make demo` leaves the model; it is trained if it does not exist
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE = 64
START, LENGTH = 1000, 100  # of a prompt within a held-out file; each is ten tokens longer than the preceding one
CHECKED_PROMPTS, CHECKED_TOKENS = 2, 8
RUNS = 9  # runs with drafts and without; if the host is not idle, one run differs from the next by 20%


@dataclass(frozen=True)
class Inputs:
    """A model and its prompts; ``checked`` are those that the reference runs too."""

    model: DeepseekV3
    prompts: list[list[int]]
    checked: bool = False

    def begin(self, prompts: list[list[int]], cache: LatentCache, **options: Any) -> Generation:
        """Begin a greedy generation that nothing ends early."""
        return generate(self.model, prompts, cache=cache, eos=(), prefix_sharing=False, **options)

    def cache(self, sequences: int, tokens: int) -> LatentCache:
        """A cache with room for this many sequences of this many tokens."""
        weight = self.model.embed_tokens.weight
        pages = sequences * -(-tokens // PAGE)
        return LatentCache(self.model.config, pages=pages, page_size=PAGE, dtype=weight.dtype, device=weight.device)

    def few(self, w: workloads.Generation, impl: str | None) -> Call:
        """The first tokens of each prompt, and how far their scores are from the best; for the reference."""

        def run() -> Tensor:
            cache = self.cache(len(self.prompts), 2 * START)
            with ds.use_impl(impl):
                options = {"max_new_tokens": min(w.n, CHECKED_TOKENS), "drafts": w.drafts, "graphs": False}
                return self.missed(self.begin(self.prompts, cache, **options).finish())

        return run

    def going_on(self, n: int, *, impl: str | None = None, **options: Any) -> Prepared:
        """Generate ``n`` tokens after the first of each text, one text at a time.

        Every run does the same texts: before each, the prompts go through the model again, which is not timed.
        """
        caches = [self.cache(1, len(prompt) + n + PAGE) for prompt in self.prompts]
        texts: list[Generation] = []

        def first() -> None:
            with ds.use_impl(impl):
                for text in texts:
                    text.close()  # its cache keeps the graphs
                pairs = zip(self.prompts, caches, strict=True)
                texts[:] = (self.begin([prompt], cache, max_new_tokens=n + 1, **options) for prompt, cache in pairs)
                for text in texts:
                    next(text)

        def rest() -> list[list[int]]:
            with ds.use_impl(impl):
                return [text.finish()[0] for text in texts]

        return Prepared(first, rest, RUNS)

    def whole(self, w: workloads.Generation, *, impl: str | None = None, **options: Any) -> Call:
        """Generate all texts completely, including prompts, in one cache, so that its graphs are captured once."""
        cache = self.cache(w.b, START + w.n)

        def run() -> list[list[int]]:
            with ds.use_impl(impl):
                return self.begin(self.prompts, cache, max_new_tokens=w.n, max_batch=w.b, **options).finish()

        return run

    def missed(self, texts: list[list[int]]) -> Tensor:
        """1 for each token, plus by how much its score is below the best one, according to a pass over the text without
        a cache.

        If two tokens have the same score, either is right, and so is everything that follows from it.
        """
        missed = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            tokens = torch.tensor(prompt + text, device=self.model.embed_tokens.weight.device)
            with torch.no_grad(), ds.use_impl("reference"):
                logits = self.model(tokens[:-1]).logits[len(prompt) - 1 :].float()
            missed.append(1 + logits.amax(1) - logits.gather(1, tokens[len(prompt) :, None])[:, 0])
        return torch.cat(missed)


@dataclass(frozen=True)
class OfTexts(Case):
    """What both kinds of cases share."""

    workload: workloads.Generation
    tolerance = 1e-3  # one token of 16 that is off by 0.18, three steps of bf16 at a score of 10
    peer_tolerance = 1e-3
    waits = True

    def work(self) -> Work:
        """Each token reads the weights that it is multiplied by; at this size nothing is bound by this."""
        w = self.workload
        active = Config.from_name(w.model).parameter_count().active
        return Work(None, w.prompts * w.n * active * DTYPES[w.dtype].itemsize)

    def inputs(self, device: torch.device) -> Inputs:
        w = self.workload
        model = model_of(w.model, DTYPES[w.dtype], device)
        if w.model == workloads.MODEL_DEMO:
            return Inputs(model, passages(w.prompts))
        return Inputs(model, torch.randint(0, model.config.vocab_size, (w.prompts, LENGTH)).tolist())

    def part(self, x: Inputs) -> Inputs:
        return Inputs(x.model, x.prompts[:CHECKED_PROMPTS], checked=True)

    def part_of_output(self, out: list[list[int]], x: Inputs) -> Tensor:
        tokens = min(self.workload.n, CHECKED_TOKENS)
        return self.part(x).missed([text[:tokens] for text in out[:CHECKED_PROMPTS]])

    def forward(self, x: Inputs, impl: str | None) -> Call:
        cache = x.cache(1, 1)
        one = torch.ones(1, dtype=torch.int32, device=cache.data.device)
        batch = Batch.decode(one, 1, torch.zeros_like(one)[None], PAGE)

        def step() -> Any:
            with torch.no_grad(), ds.use_impl(impl):
                return x.model.trunk(one.long(), batch, cache.data)

        return step


@dataclass(frozen=True)
class Drafted(OfTexts):
    """Texts one at a time with drafts, after the first token of each; "plain" is the same without drafts."""

    @property
    def op(self) -> str:
        return "generate_drafted"

    def ours(self, x: Inputs, impl: str | None) -> Call:
        w = self.workload
        return x.few(w, impl) if x.checked else x.going_on(w.n, impl=impl, drafts=w.drafts)

    def peers(self, x: Inputs) -> dict[str, Any]:
        return {"plain": lambda: Peer(x.going_on(self.workload.n))}


@dataclass(frozen=True)
class InAnyCompany(OfTexts):
    """Whole texts with batch invariance; "plain" is the same without."""

    @property
    def op(self) -> str:
        return "generate_invariant"

    def ours(self, x: Inputs, impl: str | None) -> Call:
        w = self.workload
        return x.few(w, impl) if x.checked else x.whole(w, impl=impl, batch_invariant=True)

    def peers(self, x: Inputs) -> dict[str, Any]:
        return {"plain": lambda: Peer(x.whole(self.workload))}


@functools.cache
def corpus() -> Corpus:
    """The text that the demo trains on, and the text that it holds out."""
    return read_corpus(standard_library(), seed=DEMO.seed)


def passages(count: int) -> list[list[int]]:
    """Prompts from the middle of held-out files."""
    long = [document for document in corpus().validation if len(document) > 2 * START]
    starts = [long[i % len(long)][START + 100 * (i // len(long)) :] for i in range(count)]
    return [text[: LENGTH + 10 * (i % 8)].tolist() for i, text in enumerate(starts)]


@kept_within_a_family(most=None)
def model_of(name: str, dtype: torch.dtype, device: torch.device) -> DeepseekV3:
    """The trained model of the demo, or a random one of another preset."""
    if name != workloads.MODEL_DEMO:
        torch.manual_seed(0)
        return DeepseekV3(Config.from_name(name), device=device, dtype=dtype)
    if (FOLDER / "config.json").is_file():
        return load(FOLDER, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        train(Config.from_name(name), corpus(), replace(DEMO, validate_every=DEMO.steps), out=Path(folder))
        return load(folder, device=device, dtype=dtype)


CASES: list[Case] = [
    *(Drafted(w) for w in workloads.DRAFTED),
    *(InAnyCompany(w) for w in workloads.IN_ANY_COMPANY),
]
