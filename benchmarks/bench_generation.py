"""Texts from prompts to last tokens, by the small model that `make demo` trains: drafting, and what invariance costs.

What is timed is what a user waits for: passes over prompts, steps in CUDA graphs, the host that reads tokens. The peer
is the same without the option that a case is about.
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
from benchmarks.cases import Call, Case
from benchmarks.peers import Peer
from benchmarks.roofline import Work
from dskernels.model import Batch, Config, DeepseekV3, LatentCache, generate, load
from dskernels.model.data import Corpus, read_corpus, standard_library
from dskernels.model.train import DEMO, train

FOLDER = Path("demo")  # where `make demo` leaves the model; it is trained where there is none
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PAGE = 64
START, LENGTH = 1000, 100  # of a prompt within a held-out file; each is ten tokens longer than the one before
CHECKED_PROMPTS, CHECKED_TOKENS = 2, 16


@dataclass(frozen=True)
class Inputs:
    """A model and what it is to go on with; ``checked`` is the part that the reference does too."""

    model: DeepseekV3
    prompts: list[list[int]]
    checked: bool = False

    def texts(self, w: workloads.Generation, *, impl: str | None = None, **options: Any) -> Call:
        """What writes them, all in one cache, so that its graphs are made once."""
        rows = sum(sorted(len(prompt) for prompt in self.prompts)[-w.b :]) + w.b * (w.n + 8 + 2 * PAGE)
        weight = self.model.embed_tokens.weight
        cache = LatentCache(self.model.config, pages=rows // PAGE, dtype=weight.dtype, device=weight.device)
        options = {"max_new_tokens": w.n, "max_batch": w.b, "eos": (), "prefix_sharing": False, **options}

        def run() -> list[list[int]]:
            with ds.use_impl(impl):
                return generate(self.model, self.prompts, cache=cache, **options).finish()

        return run

    def surprise(self, texts: list[list[int]]) -> Tensor:
        """1 and by how much each token's score is below the best one's, by a pass over the text without a cache: where
        two tokens score alike either is right, and all that comes after it."""
        missed = []
        for prompt, text in zip(self.prompts, texts, strict=True):
            tokens = torch.tensor(prompt + text, device=self.model.embed_tokens.weight.device)
            with torch.no_grad(), ds.use_impl("reference"):
                logits = self.model(tokens[:-1]).logits[len(prompt) - 1 :].float()
            missed.append(1 + logits.amax(1) - logits.gather(1, tokens[len(prompt) :, None])[:, 0])
        return torch.cat(missed)


@dataclass(frozen=True)
class Generate(Case):
    """Greedy texts with drafts, or in batches in which a text does not depend on the others."""

    workload: workloads.Generation
    tolerance = 1e-3  # one token of 32 that is missed by 0.25, four steps of bf16 at a score of 10
    peer_tolerance = 1e-3

    @property
    def op(self) -> str:
        return "generate"

    def work(self) -> Work:
        """Each token reads the weights that it is multiplied by; at this size nothing is bound by that."""
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
        return self.part(x).surprise([text[:CHECKED_TOKENS] for text in out[:CHECKED_PROMPTS]])

    def ours(self, x: Inputs, impl: str | None) -> Call:
        w = self.workload
        if x.checked:
            few = x.texts(replace(w, n=min(w.n, CHECKED_TOKENS)), impl=impl, drafts=w.drafts, graphs=False)
            return lambda: x.surprise(few())
        return x.texts(w, impl=impl, drafts=w.drafts, batch_invariant=w.invariant)

    def forward(self, x: Inputs, impl: str | None) -> Call:
        weight = x.model.embed_tokens.weight
        cache = LatentCache(x.model.config, pages=1, dtype=weight.dtype, device=weight.device)
        one = torch.ones(1, dtype=torch.int32, device=weight.device)
        batch = Batch.decode(one, 1, torch.zeros_like(one)[None], PAGE)

        def step() -> Any:
            with torch.no_grad(), ds.use_impl(impl):
                return x.model.trunk(one.long(), batch, cache.data)

        return step

    def peers(self, x: Inputs) -> dict[str, Any]:
        return {"plain": lambda: Peer(x.texts(self.workload))}


@functools.cache
def corpus() -> Corpus:
    """What the demo learns from, and what it is kept from."""
    return read_corpus(standard_library(), seed=DEMO.seed)


def passages(count: int) -> list[list[int]]:
    """Beginnings from the middle of held-out files."""
    long = [document for document in corpus().validation if len(document) > 2 * START]
    starts = [long[i % len(long)][START + 100 * (i // len(long)) :] for i in range(count)]
    return [text[: LENGTH + 10 * (i % 8)].tolist() for i, text in enumerate(starts)]


@functools.cache
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


CASES: list[Case] = [Generate(w) for w in workloads.GENERATIONS]
