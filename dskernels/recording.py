"""A call's launches, recorded once and launched again for what the driver takes and little more.

Between its launches an operation decides, allocates and looks things up, in Python: 20 us for a launch where the
driver takes 3. For arguments of the same metadata (see `ByMetadata`) and the same values all of it comes out the same,
but for addresses. So what is recorded runs as it is written for the first two calls of its kind; while the second runs,
its launches are noted, and where each address in them came from: an argument, a result, or memory that only this call
wants. From the third call on the results are allocated, and that memory in one piece; addresses that changed are
written into the launches; and they are launched, as one CUDA graph where they are several (dskernels.relaunching).

Public operations are recorded whole, see `dskernels.repeated`. Where a gradient is needed they are not, and the
implementation of a part may be: a function that is decorated with `Recorded`.

What makes it safe:

- A call is recorded only if all it did was to allocate without filling, to view, to launch by `driver.Planned` or by
  `portable.launch`, and to multiply by `torch.mm` or `torch.bmm` with ``out=`` into memory of its own, which is done
  again as it was: a dispatch mode sees every operation of torch, a hook what Triton launches by itself. Anything else
  (a copy, a fill, another kernel of torch's) and any address from elsewhere (a table) means that it runs as it is
  written each time. What is kept of an argument is asked for at each launch (`keep`).
- Streams, CUDA graphs and several threads: memory comes from torch's allocator and launches go to the current stream,
  as ever, where that is captured one by one; a recording is of one stream and with one thread at a time, and a thread
  that finds none runs the function.
- It must do nothing else that matters, and depend on nothing but metadata and values: as a `Planned` function.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dskernels.choice import OPERATIONS
from dskernels.cuda import driver
from dskernels.cuda.driver import Plan
from dskernels.device import PLAIN, dispatch_modes, has_triton, several_gpus
from dskernels.metadata import ByMetadata
from dskernels.relaunching import OPERANDS, Kept, Noted, Place, Product, Recording
from dskernels.validate import may_be_written

MOST_TRIES = 6  # recordings of one kind: each stream and each thread wants its own
MOST_MEMORY = 32  # a part of the GPU's that a recorded call may allocate: what is larger takes longer than the host

Returned = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]

_aten = torch.ops.aten
_ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
# Products of torch's that may stand between launches: they write to what was allocated, and read nothing else.
_PRODUCTS = {_aten.mm.out: torch.mm, _aten.bmm.out: torch.bmm}


class Recorded:
    """A function of an operation's arguments whose launches are recorded, see above.

    Args:
        function: returns a new tensor, a tuple of new tensors and None, or nothing.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._known = ByMetadata()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Run it."""
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        if not may_be_recorded(tensors):
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
        if not may_be_recorded(tensors):
            return lambda addresses, args: self.function(*args)
        kind = Kind(self.function, Recorder, tensors[0].get_device())

        def launch(addresses: Sequence[int], args: tuple) -> Any:
            return kind(addresses, [x for x in args if isinstance(x, Tensor)], args)

        return launch


class Kind:
    """Calls of one kind: of each stream the recordings that no thread is using now.

    Each stream has its own, as launches of a graph wait for those before them.

    Args:
        function: what is called.
        recorder: makes a `Recorder` for a call's tensors.
        device: ordinal of the GPU.
    """

    def __init__(self, function: Callable, recorder: Callable[[Sequence[Tensor]], Recorder], device: int) -> None:
        self.function, self._recorder, self._device = function, recorder, device
        self.idle: dict[int, list[Recording]] = {}
        self._tries = 0

    def __call__(
        self, addresses: Sequence[int], tensors: Sequence[Tensor], args: tuple, kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Launch what was recorded on the current stream; record it, while there is nothing."""
        idle = self.idle.get(torch._C._cuda_getCurrentRawStream(self._device))
        if not idle:
            return self._record(tensors, args, kwargs or {})
        try:
            recording = idle.pop()
        except IndexError:  # another thread was faster
            return self._record(tensors, args, kwargs or {})
        if not recording.fits(addresses):
            idle.insert(0, recording)
            return self._record(tensors, args, kwargs or {})
        for i in recording.written:
            if not (tensors[i]._base is None or may_be_written(tensors[i])):
                idle.append(recording)
                return self.function(*args, **kwargs or {})  # which says so
        result = recording.launch(addresses, tensors)
        idle.append(recording)  # not after an error
        for i in recording.written:
            if not tensors[i].is_inference():
                torch.autograd.graph.increment_version(tensors[i])
        return result

    def _record(self, tensors: Sequence[Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run the function, and record it if that was not tried too often."""
        if self._tries >= MOST_TRIES:
            return self.function(*args, **kwargs)
        recorder = self._recorder(tensors)
        result = recorder.run(self.function, args, kwargs)
        noted = recorder.noted(result)
        if noted is not None:
            self.idle.setdefault(noted.stream, []).append(Recording(noted))
        if recorder.reason is None:
            self._tries += 1
        elif not recorder.later:
            self._tries = MOST_TRIES
        return result


class Recorder(TorchDispatchMode):
    """Notes what a function allocates and launches.

    Attributes:
        reason: why it cannot be recorded, None so far.
        later: whether that is of this call alone.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self.later = False
        self.tensors = tensors
        self._device = tensors[0].get_device()
        self._stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        self._made: list[Tensor] = []  # kept until the end, so that no two have the same address
        self._bytes = 0
        self._launches: list[tuple[Plan | Product, dict[str, int]]] = []
        self._casts: bool = torch._C._is_any_autocast_enabled()  # other operands of a product than a mode sees
        self._kept: list[tuple[int, Kept, Sequence[Tensor]]] = []

    def run(self, function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What the function returns."""
        _watch_triton()
        token = driver.recorder.set(self)
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            driver.recorder.reset(token)

    def refuse(self, reason: str, *, later: bool = False) -> None:
        """The function cannot be recorded; with `later`, another call of its kind may be."""
        if self.reason is None:
            self.reason, self.later = reason, later
            self._made.clear()

    def keep(self, x: Tensor, again: Kept) -> Sequence[Tensor]:
        """What ``again(x)`` keeps of a tensor, two tensors of which metadata depend on that of x; asked for anew at
        each launch."""
        token = driver.recorder.set(None)  # what it takes to make it, if it is not there yet, is no part of the call
        try:
            with torch._C._DisableTorchDispatch():
                given = again(x)
        finally:
            driver.recorder.reset(token)
        number = self.number_of(x)
        if number is None:
            self.refuse("something is kept of a tensor that is no argument")
        elif all(i != number or other != again for i, other, _ in self._kept):
            self._kept.append((number, again, given))
        return given

    def number_of(self, x: Tensor) -> int | None:
        """Which tensor of the call this is."""
        return next((i for i, y in enumerate(self.tensors) if x is y), None)

    def add(self, plan: Plan, addresses: Mapping[str, int]) -> None:
        """Launch a plan that nobody else has, its pointers being of these names, and note it."""
        self._launches.append((plan, {name: address for name, address in addresses.items() if address}))
        plan.launch_at(addresses)
        if plan.asked and torch._C._cuda_isCurrentStreamCapturing():
            self.refuse("words of a captured launch are its own", later=True)

    def wrote(self, x: Tensor) -> None:
        """One of our operations has written to this argument of it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Our own operations run inside; of torch's, those that write memory are not recorded."""
        operation = OPERATIONS.get(func._opname)
        if operation is not None and func is operation.overload:
            with self:
                result = operation._run(*args)
            for i in operation.writes:
                if isinstance(args[i], Tensor):
                    self.wrote(args[i])
            return result
        result = func(*args, **(kwargs or {}))
        if self.reason is not None:
            return result
        if func.overloadpacket in _ALLOCATING:
            self._made.append(result)
            self._bytes += result.untyped_storage().nbytes()
            if self._bytes * MOST_MEMORY > _memory(self._device):
                self.refuse("it takes more memory than is to be kept at once")
        elif func in _PRODUCTS:
            self._multiply(func, args, kwargs or {})
        elif not (func.is_view and _is_view_of(result, args[0])):  # `contiguous` and `reshape` may be one, or copy
            self.refuse(f"{func} is no launch of ours")
        return result

    def _multiply(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Note a product of torch's that was made."""
        operands = *args, kwargs.pop("out")
        out, dtype = operands[-1], args[0].dtype
        made = {x.untyped_storage().data_ptr() for x in self._made}
        if self._casts or kwargs or any(x.dtype != dtype or not x.numel() or x.is_neg() for x in operands):
            self.refuse(f"{func} of such operands is not made again")
        elif out.untyped_storage().data_ptr() not in made:
            self.refuse(f"{func} writes to what is not of this call")
        shapes = tuple([(tuple(x.shape), x.stride()) for x in operands])
        addresses = {name: x.data_ptr() for name, x in zip(OPERANDS, operands, strict=True)}
        self._launches.append((Product(_PRODUCTS[func], shapes, dtype), addresses))

    def noted(self, result: Any) -> Noted | None:
        """What was done, ready to be launched again; None if it cannot be."""
        if self.reason is None and not self._launches:
            self.refuse("there is no launch")
        if self.reason is not None:
            return None
        given = [(x.data_ptr(), _extent(x)) for x in self.tensors]
        given += [(x.data_ptr(), _extent(x)) for _, _, parts in self._kept for x in parts]
        pieces = [*given, *[(x.data_ptr(), x.untyped_storage().nbytes()) for x in self._made]]
        results: list[tuple[Tensor, int | None]] = []

        def number_of_result(x: Tensor) -> int:
            """Of a result that is a piece and nothing more, or has no elements."""
            whole = x.data_ptr(), _extent(x)  # a beginning of one would be allocated without the rest
            piece = next((i for i in range(len(given), len(pieces)) if pieces[i] == whole), None)
            if x.numel() and (piece is None or any(piece == other for _, other in results)):
                self.refuse("a result is not new, or not whole")
            results.append((x, piece if x.numel() else None))
            return len(results) - 1

        returned = self.returned(result, number_of_result)
        launches = [(plan, self._places(addresses, pieces)) for plan, addresses in self._launches]
        # Operands are made as parts of tensors of their own dtype.
        known = [x.dtype for x in self.tensors] + [x.dtype for _, _, parts in self._kept for x in parts]
        dtypes = dict(enumerate(known)) | {piece: x.dtype for x, piece in results if piece is not None}
        products = [(launch.dtype, places) for launch, places in launches if isinstance(launch, Product)]
        if any(dtypes.get(place.piece, dtype) != dtype for dtype, places in products for place in places.values()):
            self.refuse("an operand of a product is a part of something of another dtype")
        if len({dtype for dtype, _ in products}) > 1:
            self.refuse("there are products of more than one dtype")
        if self.reason is not None:
            return None
        return Noted(
            self._device,
            self._stream,
            launches,
            pieces,
            len(self.tensors),
            [(i, again) for i, again, _ in self._kept],
            results,
            returned,
            self.written(),
        )

    def _places(self, addresses: Mapping[str, int], pieces: Sequence[tuple[int, int]]) -> dict[str, Place]:
        places = {name: _found(address, pieces) for name, address in addresses.items()}
        for name, place in places.items():
            if place is None:
                self.refuse(f"nobody knows what {name} points to")
        return {name: place for name, place in places.items() if place is not None}

    def returned(self, result: Any, number_of: Callable[[Tensor], int]) -> Returned:
        """How new results, of which `number_of` says the numbers, become what the function returned."""
        if result is None:
            return lambda new, tensors: None
        if isinstance(result, Tensor):
            i = number_of(result)
            return lambda new, tensors: new[i]
        if all(isinstance(x, Tensor) for x in result):
            for x in result:
                number_of(x)
            return lambda new, tensors: tuple(new)
        numbers = [None if x is None else number_of(x) for x in result]
        return lambda new, tensors: tuple([None if i is None else new[i] for i in numbers])

    def written(self) -> list[int]:
        """Arguments that were written to, whose versions the caller raises."""
        return []


@functools.cache
def _watch_triton() -> None:
    """Have kernels seen that Triton launches by itself."""
    if has_triton():
        importlib.import_module("dskernels.portable")


# ---- memory ----------------------------------------------------------------------------------------------------------


@functools.cache
def _memory(device: int) -> int:
    """Bytes that a GPU has."""
    return torch.cuda.get_device_properties(device).total_memory


def may_be_recorded(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call of these may be: real ones of the current GPU, and nobody watches."""
    return bool(
        tensors
        and not dispatch_modes()
        and not torch.compiler.is_dynamo_compiling()
        and all(type(x) in PLAIN and x.is_cuda for x in tensors)
    )


def _is_view_of(result: Any, x: Any) -> bool:
    """Whether all of a result lies in the memory of `x`."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    place = x.untyped_storage().data_ptr()
    return all(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == place for part in parts)


def _extent(x: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    if x.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _found(address: int, pieces: Sequence[tuple[int, int]]) -> Place | None:
    """Where an address came from; what begins there goes before what it lies inside of."""
    within = None
    for i, (start, size) in enumerate(pieces):
        if start == address and size:
            return Place(i, 0)
        if start < address < start + size:
            within = within or Place(i, address - start)
    return within
