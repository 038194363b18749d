"""Other ways to make a call that was right, for soak.py: what comes out has to have the same bits.

The first calls of a kind run as they are written, later ones launch what was recorded (dskernels.repeated). So a call
is made again and again, each time with something else about it: other memory, offsets into it, streams, gradients,
inference mode, threads, another current GPU, faults in the middle, a CUDA graph. It is compared with the call as it is
written, with nothing recorded.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import dskernels as ds
from dskernels import recording
from dskernels.choice import OPERATIONS
from dskernels.metadata import ByMetadata
from fuzz.drawing import FLOATS, Call, leaves, replaced
from fuzz.judging import Memory, WrongError, attempt, flat, overlapping, settled
from soak_load import out_of_memory

Ways = dict[str, Callable[["Again"], None]]
THREADS, TURNS = 4, 8
OPEN = ("grouped_gemm_masked",)  # rows beyond the counts are left as they are


class Again:
    """A call to be made in other ways.

    Args:
        call: it was right.
        impl: by which implementation.
        device: where it is made.
        chance: decides.
    """

    def __init__(self, call: Call, impl: str, device: torch.device, chance: random.Random) -> None:
        self.call, self.impl, self.device, self.chance = call, impl, device, chance
        self.open = call.function in OPEN or overlapping(call)
        self.wants = self.as_written(call)

    def as_written(self, call: Call) -> list[Tensor] | str:
        """The results with nothing recorded, or the type of the error."""
        with unrecorded(getattr(ds, call.function)):
            return self.results(self.moved(call))

    def results(self, call: Call) -> list[Tensor] | str:
        """Copies of the results; all that was written to is as before then."""
        memory = Memory(call.arguments)
        result = attempt(call, self.impl)
        if isinstance(result, Exception):
            return type(result).__name__
        got = [settled(call, x.detach()).clone() for x in flat(result)]
        memory.check(call.writes)
        memory.restore()
        return got

    def moved(self, call: Call, device: torch.device | None = None) -> Call:
        """The call with all that it reads and writes in other memory."""
        return placed_at(call, device or self.device, self.chance.choice((None, None, 0, 16, 80, 512)))

    def check(self, got: list[Tensor] | str, wants: list[Tensor] | str, how: str) -> None:
        """Raise, if these are not the same."""
        if isinstance(got, str) or isinstance(wants, str):
            if got != wants:
                raise WrongError(f"impl={self.impl!r}, {how}: {got}, as it is written {wants}")
            return
        for i, (a, b) in enumerate(zip(got, wants, strict=True)):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise WrongError(f"impl={self.impl!r}, {how}: result {i} is {a.dtype} {list(a.shape)}")
            if not self.open and not torch.equal(bits(a).cpu(), bits(b).cpu()):
                differ = unequal(a, b)
                raise WrongError(
                    f"impl={self.impl!r}, {how}: result {i} has other bits, {differ}; {integers(self.call)}"
                )


def other_ways(call: Call, impl: str, device: torch.device, chance: random.Random, counts: dict[str, int]) -> str:
    """Random ways, one after the other, and after each the plain call, for which nothing of it may be left."""
    again = Again(call, impl, device, chance)
    for way in chance.choices(list(WAYS if torch.cuda.device_count() > 1 else ONE_GPU), k=TURNS):
        WAYS[way](again)
        again.check(again.results(again.moved(call)), again.wants, f"after {way}")
        counts[way] = counts.get(way, 0) + 1
    return "right"


def plain(again: Again) -> None:
    """The same memory, three times: the third launches what the second recorded."""
    one = again.moved(again.call)
    for _ in range(3):
        again.check(again.results(one), again.wants, "again")


def explained(again: Again) -> None:
    """`explain` computes nothing and leaves nothing behind."""
    one, function = again.moved(again.call), getattr(ds, again.call.function)
    how = {"impl": again.impl} if "impl" in inspect.signature(function).parameters else {}
    memory = Memory(one.arguments)
    ds.explain(function, **one.arguments, **how)
    memory.check(())
    again.check(again.results(one), again.wants, "after explain")


def freed(again: Again) -> None:
    """What was recorded has addresses of memory that is gone, and full of NaN."""
    again.results(again.moved(again.call))
    gc.collect()
    with torch.cuda.device(again.device):
        rubbish = [torch.full((1 << k,), float("nan"), device=again.device) for k in range(8, 22, 2)]
        del rubbish
        if again.chance.random() < 0.1:
            torch.cuda.empty_cache()
    again.check(again.results(again.moved(again.call)), again.wants, "in memory that was full of NaN")


def inference(again: Again) -> None:
    """In inference mode, with tensors that were made there and with others."""
    one = again.moved(again.call)
    if requires(one):
        return
    with torch.inference_mode():
        again.check(again.results(again.moved(again.call)), again.wants, "inference mode")
        if not one.writes:
            again.check(again.results(one), again.wants, "inference mode, tensors from outside")


def without_gradient(again: Again) -> None:
    """No gradient for a while, and then again."""
    one = again.moved(again.call)
    with torch.no_grad():
        for _ in range(3):
            again.check(again.results(one), again.wants, "no_grad")
    again.check(again.results(one), again.wants, "after no_grad")


def toggled(again: Again) -> None:
    """A gradient asked for of all that may have one, then not: the same numbers, whatever it is that runs."""
    one = again.moved(again.call)
    floats = [x for path, x in leaves(one.arguments) if x.dtype in FLOATS and path not in one.writes and x.is_leaf]
    before = [x.requires_grad for x in floats]
    wants = None
    for asked in (True, False, True):
        for x, was in zip(floats, before, strict=True):
            x.requires_grad_(asked or was)
        got = again.results(one)
        if not asked:
            again.check(got, again.wants, "after a gradient")
        elif wants is None:
            wants = got
        else:
            again.check(got, wants, "with a gradient")


def streams(again: Again) -> None:
    """On streams that are made for it, of which handles come again."""
    for _ in range(3):
        one = again.moved(again.call)
        side = torch.cuda.Stream(again.device)
        side.wait_stream(torch.cuda.current_stream(again.device))
        with torch.cuda.stream(side):
            got = again.results(one)
        torch.cuda.current_stream(again.device).wait_stream(side)
        again.check(got, again.wants, "another stream")


def changed(again: Again) -> None:
    """Other numbers in the same places, as of a weight that is trained; then those before."""
    one = again.moved(again.call)
    for _ in range(2):
        again.results(one)
    memory = Memory(one.arguments)
    for path, x in leaves(one.arguments):
        if x.dtype in FLOATS and x.dim() and x.shape[0] > 1 and not path.endswith("scale"):
            with torch.no_grad():
                x.copy_(x.roll(1, 0))
    got = again.results(one)
    again.check(got, again.as_written(one), "other numbers in the same places")
    memory.restore()
    torch.autograd.graph.increment_version([x for _, x in leaves(one.arguments)])  # which writing bytes does not
    again.check(again.results(one), again.wants, "the numbers before")


def other_dtype(again: Again) -> None:
    """Equal shapes in other dtypes between calls."""
    halves = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}
    arguments = again.call.arguments
    for path, x in leaves(arguments):
        if x.dtype in halves:
            y = torch.empty_strided(x.shape, x.stride(), dtype=halves[x.dtype], device=x.device)
            arguments = replaced(arguments, path, y.copy_(x.detach()).requires_grad_(x.requires_grad))
    one = dataclasses.replace(again.call, arguments=arguments)
    wants = again.as_written(one)
    for _ in range(3):
        again.check(again.results(again.moved(one)), wants, "another dtype")


def copied(again: Again) -> None:
    """What `copy.deepcopy` makes of the arguments."""
    if all(x.is_leaf for _, x in leaves(again.call.arguments)):
        one = dataclasses.replace(again.call, arguments=copy.deepcopy(again.call.arguments))
        again.check(again.results(one), again.wants, "deep copies")


def failing(again: Again) -> None:
    """No memory in the middle of it, as it is written, as it is recorded, and as it is launched."""
    for after in (0, again.chance.randrange(1, 5)):
        with out_of_memory(after=after), suppress(torch.OutOfMemoryError):
            again.results(again.moved(again.call))
    with mock.patch.object(recording.Recording, "launch", refused), suppress(torch.OutOfMemoryError):
        again.results(again.moved(again.call))


def refused(*_: Any) -> None:
    raise torch.OutOfMemoryError("injected")


def threads(again: Again) -> None:
    """By several threads at once, each on a stream of its own and in its own memory."""
    calls = [again.moved(again.call) for _ in range(THREADS)]
    torch.cuda.synchronize(again.device)

    def run(one: Call) -> list[list[Tensor] | str]:
        with torch.cuda.device(again.device), torch.cuda.stream(torch.cuda.Stream(again.device)):
            got = [again.results(one) for _ in range(3)]
            torch.cuda.current_stream().synchronize()
        return got

    with ThreadPoolExecutor(THREADS) as pool:
        for gots in pool.map(run, calls):
            for got in gots:
                again.check(got, again.wants, "threads")


def captured(again: Again) -> None:
    """In a CUDA graph: replayed with eager calls between, and with other numbers in the same places."""
    one = again.moved(again.call)
    if requires(one) or isinstance(again.wants, str):
        return
    for _ in range(again.chance.randrange(1, 4)):  # which compiles; recorded or not by the time
        again.results(one)
    memory, graph = Memory(one.arguments), torch.cuda.CUDAGraph()
    torch.cuda.synchronize(again.device)
    with torch.cuda.device(again.device), torch.cuda.graph(graph):
        result = attempt(one, again.impl)
    if isinstance(result, Exception):
        raise WrongError(f"impl={again.impl!r}: refused in a capture: {result}")
    wants = again.wants
    for turn in range(2):
        again.results(again.moved(again.call))
        for x in flat(result):
            if not any(x.untyped_storage().data_ptr() == y.untyped_storage().data_ptr() for y in memory_of(one)):
                bits_of(x).fill_(0xFF)
        graph.replay()
        got = [settled(one, x.detach()).clone() for x in flat(result)]
        memory.restore()
        again.check(got, wants, f"replay {turn + 1} of a graph")
        if any(path.split(".")[0] in ("weight", "w13", "w2", "shared") for path, _ in leaves(one.arguments)):
            break  # what a graph multiplies by was quantised when it was captured
        for path, x in leaves(one.arguments):
            if x.dtype in FLOATS and x.dim() and x.shape[0] > 1 and not path.endswith("scale"):
                x.copy_(x.roll(1, 0))
        memory, wants = Memory(one.arguments), again.as_written(one)


def elsewhere(again: Again) -> None:
    """On every GPU, whichever is the current one, which it stays."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        for current in range(torch.cuda.device_count()):
            with torch.cuda.device(current):
                for _ in range(3):
                    got = again.results(again.moved(again.call, device))
                    again.check(got, again.wants, f"cuda:{index} while cuda:{current} is the current one")
                    if isinstance(got, list) and any(x.device != device for x in got):
                        raise WrongError(f"impl={again.impl!r}: a result on another GPU")
                if torch.cuda.current_device() != current:
                    raise WrongError(
                        f"impl={again.impl!r}: cuda:{torch.cuda.current_device()} is the current one after it"
                    )


def everywhere_at_once(again: Again) -> None:
    """Threads on all GPUs, each of which is the current one of some."""
    count = torch.cuda.device_count()
    calls = [(again.moved(again.call, torch.device("cuda", i % count)), i // count % count) for i in range(2 * count)]
    for index in range(count):
        torch.cuda.synchronize(index)

    def run(given: tuple[Call, int]) -> list[list[Tensor] | str]:
        one, current = given
        with torch.cuda.device(current):
            return [again.results(one) for _ in range(3)]

    with ThreadPoolExecutor(2 * count) as pool:
        for gots in pool.map(run, calls):
            for got in gots:
                again.check(got, again.wants, "threads on all GPUs")


ONE_GPU: Ways = {
    way.__name__: way  # type: ignore[misc]
    for way in (
        *(
            plain,
            explained,
            freed,
            inference,
            without_gradient,
            toggled,
            streams,
            changed,
            other_dtype,
            copied,
            failing,
        ),
        *(threads, captured),
    )
}
SEVERAL: Ways = {way.__name__: way for way in (elsewhere, everywhere_at_once)}  # type: ignore[misc]
WAYS = ONE_GPU | SEVERAL


@contextmanager
def unrecorded(function: Callable) -> Iterator[None]:
    """A public function, and what it calls, as it is written; what is known of its calls is as before afterwards."""
    known = getattr(function, "known", None)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(recording, "may_be_recorded", return_value=False))
        if known is not None:
            stack.enter_context(mock.patch.object(known, "kinds", ByMetadata()))
        for operation in OPERATIONS.values():
            if operation._straight is not None:
                stack.enter_context(mock.patch.object(operation, "_straight", ByMetadata()))
        yield


def placed_at(call: Call, device: torch.device, gap: int | None) -> Call:
    """The call in other memory: each storage for itself, or one behind the other in one, so many bytes apart."""
    given = [(path, x) for path, x in leaves(call.arguments) if x.layout is torch.strided and not x.is_meta]
    given = [(path, x) for path, x in given if not x.is_quantized]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for _, x in given if x.untyped_storage().nbytes()}
    starts: dict[int, tuple[Tensor, int]] = {}
    if gap is None:
        for place, storage in storages.items():
            starts[place] = raw(storage).to(device, copy=True), 0
    else:
        total, at = 0, {}
        for place, storage in storages.items():
            at[place] = total
            total += -(-(storage.nbytes() + gap) // 16) * 16
        whole = torch.empty(max(total, 1), dtype=torch.uint8, device=device).fill_(0xFF)
        for place, storage in storages.items():
            whole[at[place] : at[place] + storage.nbytes()] = raw(storage).to(device)
            starts[place] = whole, at[place]
    arguments = call.arguments
    for path, x in given:
        memory, start = starts.get(x.untyped_storage().data_ptr(), (torch.empty(0, device=device), 0))
        offset = start // x.element_size() + x.storage_offset()
        y = torch.empty(0, dtype=x.dtype, device=device).set_(memory.untyped_storage(), offset, x.shape, x.stride())
        arguments = replaced(arguments, path, y.requires_grad_(x.requires_grad))
    return dataclasses.replace(call, arguments=arguments, exact=None)


def raw(storage: torch.UntypedStorage) -> Tensor:
    """The bytes of a storage."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def requires(call: Call) -> bool:
    """Whether a gradient is asked for."""
    return any(x.requires_grad for _, x in leaves(call.arguments))


def memory_of(call: Call) -> list[Tensor]:
    """The tensors of the call."""
    return [x for _, x in leaves(call.arguments) if not x.is_meta]


def bits_of(x: Tensor) -> Tensor:
    """All memory that a tensor stands in."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.detach().untyped_storage())  # type: ignore[call-overload]


def unequal(got: Tensor, want: Tensor) -> str:
    """How two results of one shape differ, for who reads of it later."""
    got, want = (x.detach().cpu() for x in (got, want))
    apart = (bits(got).view(got.numel(), -1) != bits(want).view(got.numel(), -1)).any(1)
    a, b = (x.contiguous().flatten()[apart].double() for x in (got, want))
    none = f"NaN {int(a.isnan().sum())} and {int(b.isnan().sum())}"
    return f"{len(a)} of {len(apart)}, {none}, first {a[:4].tolist()} and {b[:4].tolist()}"


def integers(call: Call) -> str:
    """The first of what stands in the call's vectors of integers, on which it depends what the contract leaves open."""
    found = [(path, x) for path, x in leaves(call.arguments) if x.dtype in (torch.int32, torch.int64)]
    return ", ".join(f"{path} {x.detach().cpu().flatten()[:16].tolist()}" for path, x in found)


def bits(x: Tensor) -> Tensor:
    """The bytes of a result."""
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)
