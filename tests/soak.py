"""Random operations and generation under random load with faults, for as long as asked: ``make soak``.

Two things take turns. Operations: valid calls as `fuzz` draws them, on a GPU half of them at the models' sizes, by each
implementation that runs here, against the reference; a quarter of what only the device knows is hostile. Generation:
soak_load.py.

Memory is read after each round, once garbage is collected: the last quarter of the rounds may not stand above the
second. A call or a text that is wrong is kept, with what it takes to draw it again, and the run goes on; it fails in
the end. A run ends after `--minutes`, 9 at most, so that any job can hold it; several may run beside each other:

    python tests/soak.py --minutes 9 --seed 1 --out soak_1.json
    python tests/soak.py --merge soak_*.json                    into docs/soak.json, its table and its picture
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402

if "cpu" in sys.argv or not torch.cuda.is_available():  # read when a kernel's module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import soak_results  # noqa: E402
from fuzz.drawing import Call, Draw, leaves, replaced  # noqa: E402
from fuzz.judging import judge  # noqa: E402
from fuzz.spoiling import revalued  # noqa: E402
from fuzz.test_operations import CALLS  # noqa: E402
from soak_load import Load  # noqa: E402

HOSTILE = 0.25  # of the offsets, ids, slots, tables and lengths hold values that lie anywhere
CHANCE = random.Random()  # of its own: inside of an example hypothesis seeds `random` to the same each time


class Run:
    """What has been run, and what was found."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.device, self.number = device, number
        self.operations: dict[str, dict[str, int]] = {}  # of an implementation, how many ended how
        self.generation: dict[str, int] = {}
        self.failures: list[dict[str, str]] = []
        self.rounds: list[dict[str, float]] = []
        self.began = time.monotonic()

    def guarded(self, what: str, run: Callable[[], str]) -> str:
        """How a call or a load came out; what it raises is kept."""
        try:
            return run()
        except Exception as error:
            where = f"seed {self.number}, round {len(self.rounds)}"
            self.failures.append({"what": what, "where": where, "error": f"{type(error).__name__}: {error}"[:1500]})
            print(f"WRONG {what}: {self.failures[-1]}", flush=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # raises where no kernel runs any more
            return "wrong"

    def measure(self) -> None:
        """Memory after a round."""
        gc.collect()
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        row = {"seconds": round(time.monotonic() - self.began, 1), "host": resident}
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            row |= {"allocated": torch.cuda.memory_allocated(), "reserved": torch.cuda.memory_reserved()}
        self.rounds.append(row)

    def figures(self) -> dict[str, Any]:
        """For the JSON file."""
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        return {
            "device": name,
            "torch": torch.__version__,
            "commit": os.environ.get("COMMIT", ""),
            "seed": self.number,
            "minutes": round((time.monotonic() - self.began) / 60, 2),
            "operations": self.operations,
            "generation": self.generation,
            "failures": self.failures,
            "rounds": self.rounds,
        }


def operations(run: Run, examples: int, names: list[str]) -> None:
    """Some calls of some operations, spread over the implementations."""
    impls = ["reference"] * 9 + ["triton"]
    if run.device.type == "cuda":
        impls = ["triton", "hopper"] if torch.cuda.get_device_capability() == (9, 0) else ["triton"]
    for name in names:
        calls(name, run, examples, impls)


def calls(name: str, run: Run, examples: int, impls: list[str]) -> None:
    """Some calls of one operation."""

    @seed(run.number + len(run.rounds))
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def drawn(data: Any) -> None:
        draw = Draw(data.draw, models=run.device.type == "cuda" and bool(CHANCE.getrandbits(1)))
        impl = CHANCE.choice(impls)
        call = prepared(CALLS[name](draw), draw, run.device)
        outcome = run.guarded(f"{name}, impl={impl}: {described(call)}", lambda: judge(call, impl, valid=True))
        counts = run.operations.setdefault(impl, {})
        counts[outcome] = counts.get(outcome, 0) + 1

    drawn()


def prepared(call: Call, draw: Draw, device: torch.device) -> Call:
    """The call with some hostile integers, on the device."""
    for path, x in leaves(call.arguments):
        if x.dtype in (torch.int32, torch.int64) and x.numel() and CHANCE.random() < HOSTILE:
            call.arguments = replaced(call.arguments, path, revalued(draw, x))
    if device.type == "cuda":
        moved: dict[int, torch.Tensor] = {}
        for path, x in leaves(call.arguments):
            call.arguments = replaced(call.arguments, path, there(x, device, moved))
        call.exact = None  # the reference, on the GPU, is compared with
    return call


def described(call: Call) -> str:
    """Shapes, types and values that are few."""
    tensors = ((path, list(x.shape), str(x.dtype).removeprefix("torch.")) for path, x in leaves(call.arguments))
    values = {key: value for key, value in call.arguments.items() if isinstance(value, (int, float, str, bool, tuple))}
    plain = {key: value for key, value in values.items() if not isinstance(value, tuple) or not leaves(value)}
    return f"{'; '.join(f'{path} {shape} {dtype}' for path, shape, dtype in tensors)}; {plain}"


def there(x: torch.Tensor, device: torch.device, moved: dict[int, torch.Tensor]) -> torch.Tensor:
    """The same on the device: all memory that it stands in, guards and all, which is moved once."""
    storage = x.untyped_storage()
    if storage.data_ptr() not in moved:
        moved[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage).to(device)
    there = moved[storage.data_ptr()].untyped_storage()
    return torch.empty(0, dtype=x.dtype, device=device).set_(there, x.storage_offset(), x.shape, x.stride())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="9 at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--only", default="", help="operations whose name contains it, and no generation")
    parser.add_argument("--merge", type=Path, nargs="+", help="what runs have written: into docs/, with what is there")
    asked = parser.parse_args()
    if asked.merge:
        return soak_results.merge(asked.merge)
    run, end = Run(torch.device(asked.device), asked.seed), time.monotonic() + 60 * min(asked.minutes, 9.0)
    random.seed(asked.seed)
    CHANCE.seed(asked.seed)
    names = [name for name in CALLS if asked.only in name]
    load = None if asked.only else Load(run.device, random.Random(asked.seed), run.generation)
    print(f"seed {asked.seed}", flush=True)
    try:
        while time.monotonic() < end:
            operations(run, 4 if run.device.type == "cpu" else 20, random.sample(names, min(6, len(names))))
            for _ in range(6 if load else 0):
                run.guarded("generation", load.round)  # type: ignore[union-attr]
            if load:
                load.forget()
            run.measure()
            print(f"round {len(run.rounds)}: {run.rounds[-1]}, {run.operations}, {run.generation}", flush=True)
    finally:
        if asked.out:
            asked.out.write_text(json.dumps(run.figures()) + "\n")
    grown = soak_results.grown(run.figures())
    print(f"{len(run.rounds)} rounds, {len(run.failures)} failures; memory grew by {grown / 2**20:.1f} MiB from the "
          "second quarter to the last")  # fmt: skip
    if run.failures or soak_results.leaks(run.figures()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
