"""Random operations and generation under random load with faults, for as long as asked: ``make soak``.

Two things take turns. Operations: valid calls as `fuzz` draws them, on a GPU most of them at the models' sizes, by each
implementation that runs here, against the reference; a quarter of what only the device knows is hostile. What was right
is called three times more, twice at other addresses, for the same bits, as later calls go another way than the first,
and once with other numbers in the same places. Then something about it is spoiled. Generation: soak_load.py.

Memory is read after each round, once garbage is collected: the last quarter of the rounds may not stand above the
second. A call or a text that is wrong is kept, with what it takes to draw it again, and the run goes on; it fails in
the end. A run ends after `--minutes`, 9 at most, so that any job can hold it; several may run beside each other:

    python tests/soak.py --minutes 9 --seed 1 --out soak_1.json
    python tests/soak.py --merge soak_*.json                    into docs/soak.json, its table and its picture
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import inspect
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

import dskernels as ds  # noqa: E402
import soak_results  # noqa: E402
from fuzz.drawing import FLOATS, Call, Draw, leaves, replaced  # noqa: E402
from fuzz.judging import Memory, WrongError, attempt, flat, judge, overlapping, settled  # noqa: E402
from fuzz.spoiling import revalued, spoil  # noqa: E402
from fuzz.test_operations import CALLS  # noqa: E402
from soak_load import Load  # noqa: E402
from soak_ways import OPEN, other_ways  # noqa: E402

HOSTILE = 4  # one in so many of the offsets, ids, slots, tables and lengths holds values that lie anywhere


class Run:
    """What has been run, and what was found."""

    def __init__(self, device: torch.device, number: int) -> None:
        self.device, self.number = device, number
        self.operations: dict[str, dict[str, int]] = {}  # of an implementation, how many ended how
        self.generation: dict[str, int] = {}
        self.ways: dict[str, int] = {}  # in which calls were made again
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
        if self.ways:
            torch._C._cuda_clearCublasWorkspaces()  # 32 MB for each of the streams and threads that there were
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
            "ways": self.ways,
            "failures": self.failures,
            "rounds": self.rounds,
        }


def operations(run: Run, examples: int, names: list[str], ways: random.Random | None) -> None:
    """Some calls of some operations, spread over the implementations."""
    impls = ["reference"] * 9 + ["triton"]
    if run.device.type == "cuda":
        impls = ["triton", "hopper"] if torch.cuda.get_device_capability() == (9, 0) else ["triton"]
    for name in names:
        calls(name, run, examples, impls, ways)


def calls(name: str, run: Run, examples: int, impls: list[str], ways: random.Random | None) -> None:
    """Some calls of one operation."""

    @seed(1_000_000 * run.number + len(run.rounds))
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def drawn(data: Any) -> None:
        draw = Draw(data.draw)
        draw.models = run.device.type == "cuda" and not draw.chance(4)
        impl = draw.one(*impls)
        call = CALLS[name](draw)
        for path, x in leaves(call.arguments):
            if x.dtype in (torch.int32, torch.int64) and x.numel() and draw.chance(HOSTILE):
                call.arguments = replaced(call.arguments, path, revalued(draw, x))
        first = moved(call, run.device)
        what = f"{name}, impl={impl}: {described(first)}"
        outcome = run.guarded(what, lambda: judge(first, impl, valid=True))
        count(impl, outcome)
        if run.device.type != "cuda":
            return
        if outcome == "right" and ways is not None:
            made = run.guarded(what, lambda: other_ways(first, impl, run.device, ways, run.ways))
            return count(impl, f"{made}, in other ways")
        if outcome == "right":
            count(impl, f"{run.guarded(what, lambda: repeated(first, impl))}, again")
            turn(first)
            count(impl, f"{run.guarded(what, lambda: judge(first, impl, valid=True))}, other numbers")
        spoil(draw, call)
        spoiled = moved(call, run.device)
        if call.notes:
            what = f"{what}; {'; '.join(call.notes)}"
            count(impl, f"{run.guarded(what, lambda: judge(spoiled, impl, valid=False))}, spoiled")

    def count(impl: str, outcome: str) -> None:
        counts = run.operations.setdefault(impl, {})
        counts[outcome] = counts.get(outcome, 0) + 1

    drawn()


def moved(call: Call, device: torch.device) -> Call:
    """The call with all that it reads and writes in other memory, on the device."""
    if device.type != "cuda":
        return call
    storages: dict[int, torch.Tensor] = {}
    arguments = call.arguments
    for path, x in leaves(arguments):
        if x.layout is torch.strided and not (x.is_meta or x.is_quantized):
            arguments = replaced(arguments, path, there(x, device, storages))
    return dataclasses.replace(call, arguments=arguments, exact=None)  # the reference, on the GPU, is compared with


def repeated(call: Call, impl: str) -> str:
    """The same call again, twice in other memory: a library may go another way by then."""
    open_ = call.function in OPEN or overlapping(call)
    wants: list[torch.Tensor] = []
    for i in range(3):
        one = call if i == 0 else moved(call, torch.device("cuda"))
        memory = Memory(one.arguments)
        function = getattr(ds, one.function)
        how = {"impl": impl} if "impl" in inspect.signature(function).parameters else {}
        ds.explain(function, **one.arguments, **how)  # which runs nothing, and leaves nothing behind
        memory.check(())
        gots = [settled(one, x.detach()).clone() for x in flat(attempt(one, impl))]
        memory.check(one.writes)
        memory.restore()
        wants = wants or gots
        for j, (got, want) in enumerate(zip(gots, wants, strict=True)):
            if not open_ and not torch.equal(bits(got), bits(want)):
                raise WrongError(f"impl={impl!r}, result {j}: other bits in call {i + 2}")
    return "right"


def turn(call: Call) -> None:
    """Other numbers in the same places, which a launch that remembers what they were does not see."""
    for path, x in leaves(call.arguments):
        if x.dtype in FLOATS and x.dim() and x.shape[0] > 1 and not path.endswith("scale"):
            x.detach().copy_(x.detach().roll(1, 0))


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a result."""
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)


def described(call: Call) -> str:
    """Shapes, types and values that are few."""
    tensors = ((path, list(x.shape), str(x.dtype).removeprefix("torch.")) for path, x in leaves(call.arguments))
    values = {key: value for key, value in call.arguments.items() if isinstance(value, (int, float, str, bool, tuple))}
    plain = {key: value for key, value in values.items() if not isinstance(value, tuple) or not leaves(value)}
    return f"{'; '.join(f'{path} {shape} {dtype}' for path, shape, dtype in tensors)}; {plain}"


def there(x: torch.Tensor, device: torch.device, storages: dict[int, torch.Tensor]) -> torch.Tensor:
    """The same on the device: all memory that it stands in, guards and all, which is moved once."""
    storage = x.untyped_storage()
    if storage.data_ptr() not in storages:
        whole = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
        storages[storage.data_ptr()] = whole.to(device, copy=True)
    memory = storages[storage.data_ptr()].untyped_storage()
    y = torch.empty(0, dtype=x.dtype, device=device).set_(memory, x.storage_offset(), x.shape, x.stride())
    return y.requires_grad_(x.requires_grad)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="9 at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--only", default="", help="operations whose name contains it, and no generation")
    parser.add_argument("--ways", action="store_true", help="calls in other ways (soak_ways.py), and no generation")
    parser.add_argument("--merge", type=Path, nargs="+", help="what runs have written: into docs/, with what is there")
    asked = parser.parse_args()
    if asked.merge:
        return soak_results.merge(asked.merge)
    run, end = Run(torch.device(asked.device), asked.seed), time.monotonic() + 60 * min(asked.minutes, 9.0)
    random.seed(asked.seed)
    names = [name for name in CALLS if asked.only in name]
    ways = random.Random(asked.seed) if asked.ways else None
    load = None if asked.only or ways else Load(run.device, random.Random(asked.seed), run.generation)
    print(f"seed {asked.seed}", flush=True)
    try:
        while time.monotonic() < end:
            operations(run, 4 if run.device.type == "cpu" else 6, random.sample(names, min(5, len(names))), ways)
            for _ in range(5 if load else 0):
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
