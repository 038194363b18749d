"""Recording of a call's launches: they are noted once, and launched again for little more host time than the driver's.

Between its launches an operation decides, allocates and looks things up, in Python: that takes 20 us for a launch for
which the driver takes 3. For arguments of the same metadata (see `ByMetadata`) and the same values, everything except
addresses comes out the same. So:

1. The first call of a kind runs normally.
2. The second call runs normally too, under a `Recorder`: it notes the launches, and where each address in them came
   from: an argument, a result, temporary memory of this call, or something that is kept for an argument.
3. From the third call on, a `Recording` (dskernels.relaunching) allocates the results, and all temporary memory in one
   piece; writes those addresses that have changed into the launches; and launches them: two or more as one CUDA graph,
   or one by one if products of torch are among them.

Public operations are recorded whole, see `dskernels.repeated`. If a gradient is needed they are not, but parts of their
implementation may be: functions that are decorated with `Recorded`.

What makes this safe:

- A call is recorded only if it did nothing but the following: allocate without filling, make views, launch by
  `driver.Planned` or `portable.launch`, and multiply by `torch.mm` or `torch.bmm` with ``out=`` into its own memory
  (which is repeated as it was). A dispatch mode sees every operation of torch, and a hook sees launches by Triton
  itself. After anything else (a copy, a fill, another kernel of torch), or if an address came from elsewhere (a table),
  calls of this kind run normally each time.
- Something that is cached for an argument, such as a weight's e4m3 copy, is not noted by its address: it is asked for
  anew at each launch (`Recorder.keep`), so a changed weight is noticed.
- Streams, CUDA graphs and threads: memory comes from torch's allocator, and launches go to the current stream; while
  that is captured, they are made one by one. A recording belongs to one stream, and one thread uses it at a time; a
  thread that finds no idle recording runs the function.
- Like a `Planned` function, a recorded function may have no other effect that matters, and may depend on nothing but
  metadata and values. One thing that these do not determine is checked at each call (`Recording.fits`): arguments that
  were adjacent in memory, or overlapped, have to be so again, since the function may have decided by that, as the
  expert block does for a shared expert that follows the routed ones.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dskernels.choice import OPERATIONS, choices
from dskernels.cuda import driver
from dskernels.cuda.driver import Plan
from dskernels.device import PLAIN, dispatch_modes, has_triton, several_gpus
from dskernels.metadata import ByMetadata
from dskernels.relaunching import OPERANDS, Kept, Noted, Place, Product, Recording
from dskernels.validate import may_be_written

MOST_TRIES = 6  # recordings that are made for one kind of call; each stream, and each thread at a time, needs its own
MOST_MEMORY = 32  # a recorded call may allocate 1/32 of the GPU's memory: larger ones take longer than the host anyway

Returned = Callable[[Sequence[Tensor], Sequence[Tensor]], Any]

_aten = torch.ops.aten
_ALLOCATING = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
# Products of torch that a recorded call may contain: they write to memory of the call, and have no other effects.
_PRODUCTS = {_aten.mm.out: torch.mm, _aten.bmm.out: torch.bmm}


class Recorded:
    """Decorator of an implementation, whose launches are recorded as described at the top of this file.

    Args:
        function: takes an operation's arguments; returns a new tensor, a tuple of new tensors and None, or nothing.
    """

    def __init__(self, function: Callable) -> None:
        self.function = function
        self._known = ByMetadata()
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Run the function, or launch again what was recorded for arguments of this kind."""
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        if choices.get() is not None or not may_be_recorded(tensors):  # `explain` hears of the operations inside
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
        """A function that runs arguments of this metadata, given the addresses of the tensors, and the arguments."""
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        if not may_be_recorded(tensors):
            return lambda addresses, args: self.function(*args)
        kind = Kind(self.function, Recorder, tensors[0].get_device())

        def launch(addresses: Sequence[int], args: tuple) -> Any:
            return kind(addresses, [x for x in args if isinstance(x, Tensor)], args)

        return launch


class Kind:
    """All calls of one kind, with their recordings.

    Each stream has recordings of its own, because a launch of a CUDA graph waits for the preceding launch of the same
    graph. `idle` has, for each stream, those that no thread is using now.

    Args:
        function: the function that is called.
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
        """Launch an idle recording of the current stream; if there is none that fits, run the function and record."""
        idle = self.idle.get(torch._C._cuda_getCurrentRawStream(self._device))
        if not idle:
            return self._record(tensors, args, kwargs or {})
        for _ in range(len(idle)):
            try:
                recording = idle.pop()
            except IndexError:  # another thread has just taken the last one
                return self._record(tensors, args, kwargs or {})
            if recording.fits(addresses):
                break
            idle.insert(0, recording)
        else:
            return self._record(tensors, args, kwargs or {})
        for i in recording.written:
            if not (tensors[i]._base is None or may_be_written(tensors[i])):
                idle.append(recording)
                return self.function(*args, **kwargs or {})  # raises, as autograd does not allow to write to this view
        result = recording.launch(addresses, tensors)
        idle.append(recording)  # after an error it is not used again
        for i in recording.written:
            if not tensors[i].is_inference():
                torch.autograd.graph.increment_version(tensors[i])
        return result

    def _record(self, tensors: Sequence[Tensor], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run the function; record it, unless recording was tried `MOST_TRIES` times or can never work."""
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
    """Notes what a function allocates and launches while it runs.

    Attributes:
        reason: why the call cannot be recorded; None as long as it can.
        later: whether the reason concerns only this call, so that another call of its kind may be recorded.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self.reason: str | None = None
        self.later = False
        self.tensors = tensors
        self._device = tensors[0].get_device()
        self._stream: int = torch._C._cuda_getCurrentRawStream(self._device)
        self._made: list[Tensor] = []  # all that the call allocated, kept until its end so that addresses are different
        self._bytes = 0
        self._launches: list[tuple[Plan | Product, dict[str, int]]] = []
        self._casts: bool = torch._C._is_any_autocast_enabled()  # other operands of a product than a mode sees
        self._kept: list[tuple[int, Kept, Sequence[Tensor]]] = []

    def run(self, function: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run the function under this recorder, and return its result."""
        _watch_triton()
        token = driver.recorder.set(self)
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            driver.recorder.reset(token)

    def refuse(self, reason: str, *, later: bool = False) -> None:
        """Give up recording this call, for the given reason; with `later`, another call of its kind may be recorded."""
        if self.reason is None:
            self.reason, self.later = reason, later
            self._made.clear()

    def keep(self, x: Tensor, again: Kept) -> Sequence[Tensor]:
        """Return ``again(x)``, which is called at each launch to obtain what is cached for the tensor `x`.

        It returns two tensors, whose metadata may depend on nothing but that of `x`.
        """
        token = driver.recorder.set(None)  # launches that fill the cache for the first time are not part of the call
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
        """The number of this tensor among those of the call; None if it is not one of them."""
        return next((i for i, y in enumerate(self.tensors) if x is y), None)

    def add(self, plan: Plan, addresses: Mapping[str, int]) -> None:
        """Launch a plan with these addresses, and note it; nobody else may use the plan from now on."""
        self._launches.append((plan, {name: address for name, address in addresses.items() if address}))
        plan.launch_at(addresses)
        if plan.asked and torch._C._cuda_isCurrentStreamCapturing():
            self.refuse("words of a captured launch are its own", later=True)

    def wrote(self, x: Tensor) -> None:
        """Called when one of our operations has written to its argument `x`; here, nothing needs to be noted."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """See each operation of torch: run our own with this mode still on, note allocations and products, and refuse
        to record the call for any other that is not a view."""
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
        elif not (func.is_view and _is_view_of(result, args[0])):  # `contiguous` and `reshape` view or copy
            self.refuse(f"{func} is no launch of ours")
        return result

    def _multiply(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Note a product that torch has computed, or refuse if it could not be repeated exactly."""
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
        """What the call did, in the form from which a `Recording` is made; None if it cannot be recorded."""
        if self.reason is None and not self._launches:
            self.refuse("there is no launch")
        if self.reason is not None:
            return None
        given = [(x.data_ptr(), _extent(x)) for x in self.tensors]
        given += [(x.data_ptr(), _extent(x)) for _, _, parts in self._kept for x in parts]
        pieces = [*given, *[(x.data_ptr(), x.untyped_storage().nbytes()) for x in self._made]]
        results: list[tuple[Tensor, int | None]] = []

        def number_of_result(x: Tensor) -> int:
            """The number of a result. It has to be a whole piece of memory of its own, or have no elements."""
            whole = x.data_ptr(), _extent(x)  # if it were only the beginning of a piece, the rest would be missing
            piece = next((i for i in range(len(given), len(pieces)) if pieces[i] == whole), None)
            if x.numel() and (piece is None or any(piece == other for _, other in results)):
                self.refuse("a result is not new, or not whole")
            results.append((x, piece if x.numel() else None))
            return len(results) - 1

        returned = self.returned(result, number_of_result)
        launches = [(plan, self._places(addresses, pieces)) for plan, addresses in self._launches]
        # When products are repeated, their operands are views of tensors of the same dtype.
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
        """A function that makes what the call returns out of the new results; `number_of` gives a result's number."""
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
        """The numbers of the call's tensors that were written to, whose versions have to be incremented."""
        return []


@functools.cache
def _watch_triton() -> None:
    """Make sure that launches by Triton itself are noticed: importing dskernels.portable installs the hook."""
    if has_triton():
        importlib.import_module("dskernels.portable")


# ---- memory ----------------------------------------------------------------------------------------------------------


@functools.cache
def _memory(device: int) -> int:
    """Total memory of a GPU in bytes."""
    return torch.cuda.get_device_properties(device).total_memory


def may_be_recorded(tensors: tuple[Tensor, ...]) -> bool:
    """Whether a call of these tensors may be recorded: plain CUDA tensors, no dispatch mode, no `torch.compile`."""
    return bool(
        tensors
        and not dispatch_modes()
        and not torch.compiler.is_dynamo_compiling()
        and all(type(x) in PLAIN and x.is_cuda for x in tensors)
    )


def _is_view_of(result: Any, x: Any) -> bool:
    """Whether all tensors of a result share the storage of `x`."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    place = x.untyped_storage().data_ptr()
    return all(isinstance(part, Tensor) and part.untyped_storage().data_ptr() == place for part in parts)


def _extent(x: Tensor) -> int:
    """Number of bytes from the beginning of the first element to the end of the last."""
    if x.numel() == 0:
        return 0
    return (1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))) * x.element_size()


def _found(address: int, pieces: Sequence[tuple[int, int]]) -> Place | None:
    """The piece of memory that contains an address; preferably one that begins there. None if there is none."""
    within = None
    for i, (start, size) in enumerate(pieces):
        if start == address and size:
            return Place(i, 0)
        if start < address < start + size:
            within = within or Place(i, address - start)
    return within
