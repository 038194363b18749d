"""An operation's launches, recorded once and launched again for what the driver takes and little more.

Between its launches an operation decides, allocates and looks things up, in Python: 20 us for a launch where the
driver takes 3. For arguments of the same metadata (see `ByMetadata`) and the same values all of it comes out the same,
but for addresses. So a function that is decorated with `Recorded` runs as it is written for the first two calls of its
kind; while the second runs, its launches are noted, and where each address in them came from: an argument, a result,
or memory that only this call wants. From the third call on the results are allocated, and that memory in one piece;
addresses that changed are written into the launches; and they are launched, as one CUDA graph where they are several.

What makes it safe to decorate a function:

- It is recorded only if all it did was to allocate without filling, to view, and to launch by `driver.Planned` or by
  `portable.launch`: a dispatch mode sees every operation of torch. Anything else (a copy, a fill, a kernel of torch's)
  and any address from elsewhere (a weight's kept copy, a table) means that it runs as it is written each time.
- Streams, CUDA graphs and several threads: memory comes from torch's allocator and launches go to the current stream,
  as ever, where that is captured one by one; a recording is of one stream and with one thread at a time, and a thread
  that finds none runs the function.
- It must do nothing else that matters, and depend on nothing but metadata and values: as a `Planned` function.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dskernels.cuda import driver
from dskernels.cuda.driver import Plan
from dskernels.cuda.graph import LaunchGraph, reason_against_graphs
from dskernels.device import PLAIN, dispatch_modes, like_this, several_gpus
from dskernels.metadata import ByMetadata

MOST_TRIES = 6  # recordings of one kind: each stream and each thread wants its own, and one may fail at first
# From so many launches on they are a graph; a number that no call has turns graphs off. On an H200 the 7 of the expert
# block take the host 15 us so and 41 one by one (17.5 and 42 where results are kept); a single one takes the device 2.5
# us either way, but a programmatic one, which loses what it overlaps with, 3.0 and 2.0.
FEWEST_IN_GRAPH = 2
MOST_MEMORY = 32  # a part of the GPU's that a recorded call may allocate: what is larger takes longer than the host
ALIGNMENT = 512  # of what lies in the memory of a call, as of torch's allocator

_aten = torch.ops.aten
_ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}


class Recorded:
    """A function of an operation's arguments whose launches are recorded, see above.

    Args:
        function: returns a tensor, a tuple of tensors and None, or nothing.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._known = ByMetadata()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        if not _plain(tensors):
            return self.function(*args)
        values = tuple([None if isinstance(x, Tensor) else (x,) for x in args])
        modes = torch._C._cuda_getDevice() if several_gpus() else 0, torch.is_grad_enabled()
        found = self._known.find(tensors, (values, modes))
        if found is None:
            result = self.function(*args)
            self._known.keep(tensors, (values, modes), self.bound(args))
            return result
        launch, addresses = found
        return launch(addresses, args)

    def bound(self, args: tuple) -> Callable[[Sequence[int], tuple], Any]:
        """What runs arguments of this metadata, given the addresses of the tensors among them, and them."""
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        if not _plain(tensors):
            return lambda addresses, args: self.function(*args)
        return _Kind(self.function, tensors[0].get_device())


class _Kind:
    """Calls of one kind: of each stream the recordings that no thread is using now.

    Each stream has its own, as launches of a graph wait for those before them.
    """

    def __init__(self, function: Callable, device: int) -> None:
        self.function = function
        self._device = device
        self._idle: dict[int, list[_Recording]] = {}
        self._tries = 0

    def __call__(self, addresses: Sequence[int], args: tuple) -> Any:
        """Launch what was recorded on the current stream; record it, while there is nothing."""
        idle = self._idle.get(torch._C._cuda_getCurrentRawStream(self._device))
        if not idle:
            return self._record(args)
        try:
            recording = idle.pop()
        except IndexError:  # another thread was faster
            return self._record(args)
        if not recording.fits(addresses):
            idle.insert(0, recording)
            return self._record(args)
        result = recording.launch(addresses)
        idle.append(recording)  # not after an error
        return result

    def _record(self, args: tuple) -> Any:
        """Run the function, and record it if that was not tried too often."""
        if self._tries >= MOST_TRIES:
            return self.function(*args)
        self._tries += 1
        recorder = Recorder([x for x in args if isinstance(x, Tensor)])
        result = recorder.run(self.function, args)
        recording = recorder.recording(result)
        if recording is not None:
            self._idle.setdefault(recorder._stream, []).append(recording)
        return result


class _Place(NamedTuple):
    """Where an address came from: the number of an argument, or of a piece of memory, and bytes from its start."""

    piece: int
    offset: int


class Recorder(TorchDispatchMode):
    """Notes what a function allocates and launches.

    Attributes:
        reason: why it cannot be recorded, None so far.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self._device = tensors[0].get_device()
        self._stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        self._given = [(x.data_ptr(), _extent(x)) for x in tensors]
        self._made: list[Tensor] = []  # kept until the end, so that no two have the same address
        self._bytes = 0
        self._launches: list[tuple[Plan, dict[str, int]]] = []

    def run(self, function: Callable, args: tuple) -> Any:
        """What the function returns."""
        token = driver.recorder.set(self)
        try:
            with self:
                return function(*args)
        finally:
            driver.recorder.reset(token)

    def refuse(self, reason: str) -> None:
        """The function cannot be recorded."""
        self.reason = self.reason or reason

    def add(self, plan: Plan, addresses: Mapping[str, int]) -> None:
        """Launch a plan that nobody else has, its pointers being of these names, and note it."""
        self._launches.append((plan, {name: address for name, address in addresses.items() if address}))
        plan.launch_at(addresses)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Our own operations run inside; of torch's, those that write memory are not recorded."""
        if func.namespace == "dskernels":
            from dskernels.dispatch import OPERATIONS

            with self:
                return OPERATIONS[func._opname]._run(*args)
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in _ALLOCATING:
            self._made.append(result)
            self._bytes += result.untyped_storage().nbytes()
            if self._bytes * MOST_MEMORY > _memory(self._device):
                self.refuse("it takes more memory than is to be kept at once")
                self._made.clear()
        elif not func.is_view:
            self.refuse(f"{func} is no launch of ours")
        return result

    def recording(self, result: Any) -> _Recording | None:
        """What was noted, ready to be launched again; None if it cannot be."""
        if self.reason is not None:
            return None
        results = result if isinstance(result, tuple) else (result,)
        pieces = [*self._given, *[(x.data_ptr(), x.untyped_storage().nbytes()) for x in self._made]]
        own = range(len(self._given), len(pieces))
        returned = [self._piece_of(x, pieces, own) for x in results if x is not None]
        if not self._launches or -1 in returned:
            self.refuse("there is no launch, or a result that is not new")
        used: dict[int, list[int]] = {}  # of each piece, its first and its last launch
        places: list[dict[str, _Place]] = []
        for i, (_, addresses) in enumerate(self._launches):
            places.append({})
            for name, address in addresses.items():
                place = _found(address, pieces)
                if place is None:
                    self.refuse(f"nobody knows what {name} points to")
                    return None
                places[-1][name] = place
                used.setdefault(place.piece, [i, i])[1] = i
        if self.reason is not None:
            return None
        inside = [i for i in own if i in used and i not in returned]
        offsets, size = _packed([(pieces[i][1], used[i][0], used[i][1]) for i in inside])
        return _Recording(self, places, pieces, dict(zip(inside, offsets, strict=True)), size, result, returned)

    def _piece_of(self, x: Tensor, pieces: list[tuple[int, int]], own: range) -> int | None:
        """The piece that is this result and nothing more; None for one without elements, -1 if there is none."""
        if x.numel() == 0:
            return None
        whole = (x.data_ptr(), x.untyped_storage().nbytes())
        return next((i for i in own if pieces[i] == whole), -1)


class _Recording:
    """Launches of our own, whose addresses are those of arguments, of new results, and of the call's own memory."""

    def __init__(
        self,
        recorder: Recorder,
        places: list[dict[str, _Place]],
        pieces: list[tuple[int, int]],
        inside: dict[int, int],
        size: int,
        result: Any,
        returned: list[int | None],
    ) -> None:
        given = recorder._given
        self._plans = [plan for plan, _ in recorder._launches]
        self._device, self._stream = recorder._device, recorder._stream
        self._raw_stream = ctypes.c_void_p(self._stream)
        self._graph: LaunchGraph | None = None
        self._alone = len(self._plans) < FEWEST_IN_GRAPH or reason_against_graphs() is not None
        self._related = _related(given)
        results = result if isinstance(result, tuple) else (result,)
        self._make = [like_this(x) for x in results if x is not None]
        own = torch.empty(size, dtype=torch.uint8, device="meta")
        self._make_own = like_this(own) if size else None
        self._returns = _returning(result)

        # What is at each launch: the arguments, the memory of this call if it wants some, the results.
        number = {i: i for i in range(len(given))}
        if size:
            number |= dict.fromkeys(inside, len(given))
        number |= {piece: len(given) + bool(size) + i for i, piece in enumerate(returned) if piece is not None}
        self._now = [0] * (len(given) + bool(size) + len(returned))
        self._moved: list[list[tuple[Callable[[int], None], int]]] = [[] for _ in self._now]
        self._readers: list[set[int]] = [set() for _ in self._now]  # of each, the launches that read its address
        self._stale: set[int] = set()  # launches that the graph has with other addresses
        cells: dict[tuple[int, int] | None, Any] = {}

        def at(place: _Place) -> tuple[int, int]:
            return number[place.piece], inside.get(place.piece, 0) + place.offset

        for n, (plan, of) in enumerate(zip(self._plans, places, strict=True)):
            for place in of.values():
                self._readers[number[place.piece]].add(n)

            def cell_of(name: str, of: dict[str, _Place] = of) -> Any:
                key = at(of[name]) if name in of else None
                cell = cells.get(key)
                if cell is None:
                    cell = cells[key] = (ctypes.c_uint64 * 1)()
                    if key is not None:
                        self._moved[key[0]].append((functools.partial(cell.__setitem__, 0), key[1]))
                return cell

            for name, write in plan.rewired(cell_of):
                i, offset = at(of[name])
                self._moved[i].append((write, offset))

    def fits(self, addresses: Sequence[int]) -> bool:
        """Whether arguments that were one behind the other, or the same, are so again."""
        return all(addresses[j] - addresses[i] == distance for i, j, distance in self._related)

    def launch(self, addresses: Sequence[int]) -> Any:
        """Allocate, write the addresses that changed, launch on the current stream; the results."""
        results = [make() for make in self._make]
        if self._make_own is None:
            now = [*addresses, *[x.data_ptr() for x in results]]
        else:
            own = self._make_own()  # freed at the end, like every intermediate result: the stream keeps the order
            now = [*addresses, own.data_ptr(), *[x.data_ptr() for x in results]]
        before = self._now
        if now != before:
            stale = self._stale
            for i, address in enumerate(now):
                if address != before[i]:
                    for write, offset in self._moved[i]:
                        write(address + offset)
                    stale |= self._readers[i]
            self._now = now
        if self._alone or torch._C._cuda_isCurrentStreamCapturing():
            for plan in self._plans:
                plan.stream = self._stream
                if status := plan.enqueue():
                    plan.again(status)
        else:
            self._launch_graph()
        return self._returns(results)

    def _launch_graph(self) -> None:
        graph, stale = self._graph, self._stale
        if graph is None:
            graph = self._graph = LaunchGraph(self._plans, self._device)
        else:
            for i in stale:
                graph.update(i)
        stale.clear()
        graph.launch(self._raw_stream)


# ---- memory ----------------------------------------------------------------------------------------------------------


@functools.cache
def _memory(device: int) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


def _plain(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call of these may be recorded: real ones of the current GPU, and nobody watches."""
    return bool(
        tensors
        and not dispatch_modes()
        and not torch.compiler.is_dynamo_compiling()
        and all(type(x) in PLAIN and x.is_cuda for x in tensors)
    )


def _extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if x.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _found(address: int, pieces: Sequence[tuple[int, int]]) -> _Place | None:
    """Where an address came from; what begins there goes before what it lies inside of."""
    within = None
    for i, (start, size) in enumerate(pieces):
        if start == address and size:
            return _Place(i, 0)
        if start < address < start + size:
            within = within or _Place(i, address - start)
    return within


def _related(given: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Arguments that overlap or follow each other in memory, which decisions may have gone by, and how far apart."""
    pairs = [(i, j) for i in range(len(given)) for j in range(i + 1, len(given)) if given[i][1] and given[j][1]]

    def touch(i: int, j: int) -> bool:
        (a, size_a), (b, size_b) = given[i], given[j]
        return a <= b + size_b and b <= a + size_a

    return [(i, j, given[j][0] - given[i][0]) for i, j in pairs if touch(i, j)]


def _packed(pieces: Sequence[tuple[int, int, int]]) -> tuple[list[int], int]:
    """Offsets for (bytes, first launch, last launch) in one piece of memory, and its size.

    Two share bytes only where one is done with before the other begins. The largest go first, each as low as it fits.
    """
    offsets = [0] * len(pieces)
    placed: list[int] = []
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i][0]):
        size, first, last = pieces[i]
        taken = [
            (offsets[j], offsets[j] + pieces[j][0]) for j in placed if first <= pieces[j][2] and pieces[j][1] <= last
        ]
        start = 0
        for low, high in sorted(taken):
            if start + size <= low:
                break
            start = max(start, -(-high // ALIGNMENT) * ALIGNMENT)
        offsets[i] = start
        placed.append(i)
    return offsets, max((offset + piece[0] for offset, piece in zip(offsets, pieces, strict=True)), default=0)


def _returning(result: Any) -> Callable[[list[Tensor]], Any]:
    """How new results become what the function returned."""
    if result is None:
        return lambda new: None
    if isinstance(result, Tensor):
        return operator.itemgetter(0)
    if all(x is not None for x in result):
        return tuple
    given = [x is not None for x in result]

    def mixed(new: list[Tensor]) -> tuple:
        left = iter(new)
        return tuple([next(left) if is_given else None for is_given in given])

    return mixed
