"""Random operations and generation under random load with faults, for as long as asked: ``make soak``.

Two things take turns. Operations: valid calls as `fuzz` draws them, on a GPU half of them at the models' sizes, by each
implementation that runs here, against the reference; a quarter of what only the device knows is hostile. Generation: a
small model with a cache that is too small, prompts of random lengths that share beginnings,
texts that are aborted or closed in the middle, allocations that fail; every text that comes whole has to be the one
that the prompt gives alone, and every page has to come back.

Memory is read after each round, once garbage is collected: the last quarter of the rounds may not stand above the first
after warming up. Figures go to a JSON file. A run ends after `--minutes`, 9 at most, so that any job can hold it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402

if "cpu" in sys.argv or not torch.cuda.is_available():  # read when a kernel's module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from dskernels.model import LatentCache, generate  # noqa: E402
from dskernels.model.passes import Passes  # noqa: E402
from fuzz.drawing import Draw, leaves, replaced  # noqa: E402
from fuzz.judging import judge  # noqa: E402
from fuzz.spoiling import revalued  # noqa: E402
from fuzz.test_operations import CALLS  # noqa: E402
from model.tiny import SMALL, tiny_model  # noqa: E402

HOSTILE = 0.25  # of the offsets, ids, slots, tables and lengths hold values that lie anywhere
CHANCE = random.Random()  # of its own: inside of an example hypothesis seeds `random` to the same each time
SLACK = 1 << 20  # bytes that allocators may keep
SLACK_RSS = 64 << 20  # of a process on the CPU, whose allocator gives little back


def used(device: torch.device) -> int:
    """Bytes in use: allocated on a GPU, resident on the CPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def operations(number: int, device: torch.device, examples: int, counts: dict[str, int]) -> None:
    """Some calls of each operation, spread over the implementations."""
    impls = ["reference"] * 9 + ["triton"]
    if device.type == "cuda":
        impls = ["triton", "hopper"] if torch.cuda.get_device_capability() == (9, 0) else ["triton"]
    for name in random.sample(list(CALLS), 6):
        calls(name, number, device, examples, impls, counts)


def calls(
    name: str, number: int, device: torch.device, examples: int, impls: list[str], counts: dict[str, int]
) -> None:
    """Some calls of one operation."""

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        draw = Draw(data.draw, models=device.type == "cuda" and bool(CHANCE.getrandbits(1)))
        call = CALLS[name](draw)
        impl = CHANCE.choice(impls)
        for path, x in leaves(call.arguments):
            if x.dtype in (torch.int32, torch.int64) and CHANCE.random() < HOSTILE:
                call.arguments = replaced(call.arguments, path, revalued(draw, x))
        if device.type == "cuda":
            moved: dict[int, torch.Tensor] = {}
            for path, x in leaves(call.arguments):
                call.arguments = replaced(call.arguments, path, there(x, device, moved))
            call.exact = None  # the reference, on the GPU, is compared with
        outcome = f"{impl}: {judge(call, impl, valid=True)}"
        counts[outcome] = counts.get(outcome, 0) + 1

    run()


def there(x: torch.Tensor, device: torch.device, moved: dict[int, torch.Tensor]) -> torch.Tensor:
    """The same on the device: all memory that it stands in, guards and all, which is moved once."""
    storage = x.untyped_storage()
    if storage.data_ptr() not in moved:
        moved[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
    there = moved[storage.data_ptr()].untyped_storage()
    return torch.empty(0, dtype=x.dtype, device=device).set_(there, x.storage_offset(), x.shape, x.stride())


class Load:
    """One model, one cache that lives on, and what each prompt gives alone."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = tiny_model(**SMALL).to(device)
        self.cache = LatentCache(self.model.config, pages=12, page_size=4, dtype=torch.float32, device=device)
        self.alone: dict[tuple[tuple[int, ...], int], list[int]] = {}

    def text(self, prompt: list[int], tokens: int) -> list[int]:
        """What the prompt gives alone, by a cache of its own."""
        key = tuple(prompt), tokens
        if key not in self.alone:
            alone = generate(self.model, [prompt], max_new_tokens=tokens, page_size=4, eos=(), graphs=False)
            self.alone[key] = alone.finish()[0]
        return self.alone[key]

    def round(self, chance: random.Random, counts: dict[str, int]) -> None:
        """One load: some prompts at once, with one fault or none."""
        stems = [[chance.randrange(60) for _ in range(8)] for _ in range(2)]
        prompts = [
            [*chance.choice(stems)[: chance.randint(1, 8)], chance.randrange(60)] for _ in range(chance.randint(1, 9))
        ]
        tokens = chance.randint(1, 10)
        fault = chance.choice(["none", "none", "abort", "close", "memory"])
        counts[fault] = counts.get(fault, 0) + 1
        generation = generate(self.model, prompts, max_new_tokens=tokens, cache=self.cache, max_batch=4, eos=())
        texts: list[list[int]] = [[] for _ in prompts]
        aborted: set[int] = set()
        try:
            for step, new in enumerate(generation):
                for text, more in zip(texts, new, strict=True):
                    text += more
                if fault == "abort" and chance.random() < 0.4:
                    index = chance.randrange(len(prompts))
                    aborted.add(index)
                    generation.abort(index)
                elif fault == "close" and step == 1:
                    generation.close()
                    break
                elif fault == "memory" and step == 1:
                    full = {"side_effect": torch.OutOfMemoryError("injected")}
                    with mock.patch.object(Passes, "step", **full), mock.patch.object(Passes, "prefill", **full):
                        next(generation)  # a graph that is there already runs all the same
                    break
        except (torch.OutOfMemoryError, StopIteration):
            pass
        generation.close()
        whole = fault in ("none", "abort")
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            alone = self.text(prompt, tokens)
            if text != alone[: len(text)] or (whole and i not in aborted and text != alone):
                raise SystemExit(f"{fault}: prompt {prompt} gave {text}, alone {alone}")
        if self.cache.free_pages != self.cache.pages:
            raise SystemExit(f"{fault}: {self.cache.pages - self.cache.free_pages} pages did not come back")
        counts["tokens"] = counts.get("tokens", 0) + sum(map(len, texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="9 at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="JSON file")
    asked = parser.parse_args()
    device, end = torch.device(asked.device), time.monotonic() + 60 * min(asked.minutes, 9.0)
    random.seed(asked.seed)
    CHANCE.seed(asked.seed)
    chance, load = random.Random(asked.seed), Load(device)
    counts: dict[str, dict[str, int]] = {"operations": {}, "generation": {}}
    memory: list[int] = []
    print(f"seed {asked.seed}", flush=True)
    while time.monotonic() < end:
        operations(asked.seed + len(memory), device, 4 if device.type == "cpu" else 20, counts["operations"])
        for _ in range(5):
            load.round(chance, counts["generation"])
        load.alone.clear()
        load.cache.forget()
        memory.append(used(device))
        print(f"round {len(memory)}: {memory[-1] / 2**20:.1f} MiB, {counts}", flush=True)
    figures = {"seed": asked.seed, "device": str(device), "rounds": len(memory), **counts, "memory": memory}
    if asked.out:
        asked.out.write_text(json.dumps(figures) + "\n")
    quarter = max(len(memory) // 4, 1)
    first, last = memory[quarter : 2 * quarter] or memory[:1], memory[-quarter:]
    grown, slack = min(last) - max(first), SLACK if device.type == "cuda" else SLACK_RSS
    print(f"{len(memory)} rounds; memory grew by {grown / 2**20:.1f} MiB from the second quarter to the last")
    if len(memory) >= 8 and grown > slack:
        raise SystemExit("memory leaks")


if __name__ == "__main__":
    main()
