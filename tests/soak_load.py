"""Generation under random load with faults, for soak.py: every text is the one that its prompt gives alone.

A small model with a cache that is too small, a new one each round, so that memory is to be what it was; prompts of
random lengths that share beginnings. The faults take turns: texts are aborted or the whole is closed in the middle,
allocations fail in the middle of a pass, somebody else holds the pages. Every text that comes whole has to be the one
that the prompt gives alone, one that was cut its beginning, and every page has to come back.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch

import dskernels as ds
from dskernels.dispatch import Operation
from dskernels.model import LatentCache, generate
from model.tiny import SMALL, tiny_model

FAULTS = ("none", "abort", "close", "memory", "pages")
TIE = 1e-4  # of the range of the logits: implementations and batches add up in other orders


class WrongTextError(Exception):
    """A text that is not its prompt's, or pages that did not come back."""


class Load:
    """One model, one cache that lives on, and what each prompt gives alone."""

    def __init__(self, device: torch.device, chance: random.Random, counts: dict[str, int]) -> None:
        torch.manual_seed(0)
        self.device, self.chance, self.counts = device, chance, counts
        self.model = tiny_model(**SMALL).to(device)
        self.cache = self._empty()
        self.alone: dict[tuple[tuple[int, ...], int], list[int]] = {}
        self.loads = 0

    def round(self) -> str:
        """One load with the next fault."""
        chance, fault = self.chance, FAULTS[self.loads % len(FAULTS)]
        self.loads += 1
        self._count(f"{fault}, loads" if fault != "none" else "without a fault, loads")
        stems = [[chance.randrange(60) for _ in range(8)] for _ in range(2)]
        prompts = [
            [*chance.choice(stems)[: chance.randint(1, 8)], chance.randrange(60)] for _ in range(chance.randint(1, 9))
        ]
        tokens = chance.randint(2, 10)
        drafts = chance.choice([0, 0, 1]) if len(self.model.mtp) else 0
        options = {"max_new_tokens": tokens, "cache": self.cache, "max_batch": 4, "eos": (), "drafts": drafts}
        try:
            texts, cut = self._texts(fault, prompts, options)
        finally:
            if self.cache.free_pages != self.cache.pages:
                missing = self.cache.pages - self.cache.free_pages
                self.cache = self._empty()
                raise WrongTextError(f"{fault}: {missing} pages did not come back")
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            self._compare(fault, prompt, text, tokens, whole=i not in cut)
        self._count("texts", len(prompts))
        self._count("tokens", sum(map(len, texts)))
        return "right"

    def forget(self) -> None:
        """What is known of texts, and the cache with the graphs that were made for it."""
        self.alone.clear()
        self.cache = self._empty()

    def _empty(self) -> LatentCache:
        return LatentCache(self.model.config, pages=12, page_size=4, dtype=torch.float32, device=self.device)

    def _texts(self, fault: str, prompts: list[list[int]], options: dict) -> tuple[list[list[int]], set[int]]:
        """The texts, and which of them were cut."""
        held = self.cache.admit(self.cache.page_size * (self.cache.pages - 1)) if fault == "pages" else None
        generation = generate(self.model, prompts, **options)
        everyone, cut = set(range(len(prompts))), set()
        texts: list[list[int]] = [[] for _ in prompts]
        steps = 0
        try:
            while True:
                try:
                    new = self._next(fault, generation, steps)
                except StopIteration:
                    break
                except RuntimeError as error:
                    if held is None or "pages that somebody else holds" not in str(error):
                        raise
                    self.cache.free(held)  # and on it goes
                    held = None
                    self._count("pages, waited for in vain and then given")
                    continue
                steps += 1
                for text, more in zip(texts, new, strict=True):
                    text += more
                if generation._waiting and len(generation._running) < options["max_batch"]:
                    self._count("steps with a prompt that waits for pages")
                if fault == "abort" and self.chance.random() < 0.4:
                    index = self.chance.randrange(len(prompts))
                    if not generation.ended(index):
                        cut.add(index)
                        self._count("abort, texts")
                    generation.abort(index)
                elif fault == "close" and steps == 2:
                    return texts, everyone
        except torch.OutOfMemoryError:
            self._count("memory, allocations that failed")
            return texts, everyone
        finally:
            generation.close()
            if held is not None:
                self.cache.free(held)
        return texts, cut

    def _next(self, fault: str, generation: Iterator[list[list[int]]], steps: int) -> list[list[int]]:
        if fault != "memory" or steps < 1:
            return next(generation)
        with out_of_memory(after=self.chance.randrange(20)):  # a graph that is there already runs all the same
            return next(generation)

    def _compare(self, fault: str, prompt: list[int], text: list[int], tokens: int, *, whole: bool) -> None:
        alone = self._alone(prompt, tokens)
        if text == (alone if whole else alone[: len(text)]):
            return
        places = [i for i, (a, b) in enumerate(zip(text, alone, strict=False)) if a != b]
        if places and self._tied([*prompt, *alone[: places[0]]], text[places[0]], alone[places[0]]):
            self._count("texts that part where two tokens are equally likely")
            return
        raise WrongTextError(f"{fault}: prompt {prompt} gave {text}, alone {alone}")

    def _alone(self, prompt: list[int], tokens: int) -> list[int]:
        """What the prompt gives alone, by a cache of its own."""
        key = tuple(prompt), tokens
        if key not in self.alone:
            alone = generate(self.model, [prompt], max_new_tokens=tokens, page_size=4, eos=(), graphs=False)
            self.alone[key] = alone.finish()[0]
        return self.alone[key]

    def _tied(self, before: list[int], one: int, other: int) -> bool:
        """Whether these two are equally likely to come next."""
        with torch.no_grad(), ds.use_impl("reference"):
            logits = self.model(torch.tensor(before, device=self.device)).logits[-1].double()
        return float((logits[one] - logits[other]).abs()) <= TIE * float(logits.max() - logits.min())

    def _count(self, what: str, n: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + n


@contextmanager
def out_of_memory(after: int) -> Iterator[None]:
    """Every operation raises, once so many have been called."""
    call, left = Operation.__call__, [after]

    def failing(self: Operation, *args: object, **options: object) -> object:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("injected")
        return call(self, *args, **options)

    with mock.patch.object(Operation, "__call__", failing):
        yield
