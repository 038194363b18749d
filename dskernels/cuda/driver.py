"""Launches through the CUDA driver: what depends on shapes is prepared once, what depends on addresses at each call.

A model runs through the same shapes in every step, but the addresses change, since each result is a new allocation. So
a family's ``hopper.py`` has functions that prepare a `Plan`: the kernel's handle, its grid and its packed arguments.
They are decorated with `Planned`. A call with tensors and values then finds the plan for their metadata, or makes it;
writes the addresses into it; and launches it. That takes 15 us of host time, or 8 if an `Operation` has already found
the plan; the driver's own share is 5.6 (on a host where ``x.add_(1)`` takes 12). This is all that a kernel needs::

    @Planned
    def scale(x: Tensor, factor: float, bias: Tensor | None, out: Tensor) -> Plan:
        return Plan(
            kernel(SOURCE, "scale", options, shared, x.device.index),
            arguments=(
                TensorMap("x", x, (64, 128), swizzle=True),
                Pointer("bias"),
                Pointer("out"),
                ctypes.c_int(x.shape[0]),
                ctypes.c_float(factor),
            ),
            grid=..., threads=..., shared=..., device=x.device,
        )

An `Operation` that writes to its arguments and returns nothing can name such a function as its implementation. The
implementation of one that returns tensors allocates them, and calls such a function.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.cuda import libcuda
from dskernels.cuda.tensor_map import MAP_ALIGNMENT, MAP_BYTES, TensorMap, encode
from dskernels.metadata import ByMetadata
from dskernels.validate import ceil_div

CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6

# The `Recorder` of the call that is being recorded, which notes its launches (see dskernels.recording); None otherwise.
recorder: ContextVar[Any] = ContextVar("recorder of the call that is running", default=None)

_Launch = Callable[[Sequence[int], tuple], None]


class Dim(ctypes.Structure):
    """Three unsigned numbers: a grid in blocks, or a block in threads."""

    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


class _Attribute(ctypes.Structure):
    """The driver's CUlaunchAttribute: an id, and a union of 64 bytes, of which at most three integers are used here."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """The driver's CUlaunchConfig: grid, block, shared memory, stream and attributes of a launch."""

    _fields_ = [
        ("grid", Dim),
        ("block", Dim),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    ]


_CONFIG_WORDS, _ATTRIBUTE_WORDS = ctypes.sizeof(_Config) // 8, ctypes.sizeof(_Attribute) // 8
_NOTHING = ctypes.c_void_p()


class Pointer(NamedTuple):
    """A kernel argument that is the address of a tensor; null if the tensor is None.

    Attributes:
        name: the parameter of the `Planned` function whose argument is the tensor.
    """

    name: str


class Word(NamedTuple):
    """A kernel argument of 64 bits that is obtained anew at each launch, as metadata and addresses do not determine it.

    Attributes:
        ask: returns it. Unless a CUDA graph is being captured, it returns the same for all launches on a stream.
    """

    ask: Callable[[], int]


class Plan:
    """A launch prepared for given shapes, strides and dtypes; `Planned` gives it the addresses.

    Only one thread at a time may launch it, and after a launch has raised an error nobody may launch it again;
    `Planned` ensures both. The driver copies the arguments, so a plan may be launched again at once, and its launch may
    be captured in a CUDA graph.

    Everything that the driver reads is in one array of 64-bit words. With a ctypes object for each argument, a launch
    took 13 KB.

    Attributes:
        memory: that array.
        addresses: for each `Pointer` and `TensorMap` its name, and where its address is assigned: ``(name, memory, i)``
            means ``memory[i] = address``.
        asked: the words that are obtained at each launch, ``memory[i] = ask()``.

    Args:
        function: handle of the kernel (see :func:`dskernels.cuda.compiler.kernel`).
        arguments: the kernel's arguments, in order: `Pointer`, `TensorMap`, `Word`, or a ctypes value that never
            changes.
        grid: number of blocks, in x or in (x, y, z).
        threads: number of threads of a block.
        shared: bytes of dynamic shared memory of a block.
        device: the GPU, which must be the current one at each launch.
        cluster: number of blocks of a cluster, along x; None for a kernel that declares ``__cluster_dims__``.
        programmatic: let the kernel begin before the preceding one has ended (programmatic dependent launch); the
            kernel has to execute ``griddepcontrol.wait`` before it touches that one's results.
        in_graph: whether a recording that contains this plan may launch its plans as a graph (dskernels.relaunching).
    """

    def __init__(
        self,
        function: int,
        *,
        arguments: Sequence[Any],
        grid: int | tuple[int, int, int],
        threads: int,
        shared: int,
        device: torch.device,
        cluster: int | None = None,
        programmatic: bool = False,
        in_graph: bool = True,
    ) -> None:
        self.addresses: list[tuple[str, Any, int]] = []
        self.asked: list[tuple[int, Callable[[], int]]] = []
        attributes = []
        if cluster is not None:
            attributes.append(_Attribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1)))
        if programmatic:
            attributes.append(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
        once = {id(argument): argument for argument in arguments}  # an argument given twice is packed and written once
        # Tensor maps come first, since they need to be aligned to 64 bytes.
        ordered = sorted(once.values(), key=lambda argument: not isinstance(argument, TensorMap))
        sizes = list(map(_words_of, ordered))
        rest = len(arguments), len(attributes) * _ATTRIBUTE_WORDS, _CONFIG_WORDS
        self.memory = (ctypes.c_uint64 * (MAP_ALIGNMENT // 8 + sum(sizes) + sum(rest)))()
        i = -self._at(0) % MAP_ALIGNMENT // 8
        place = {}
        for argument, size in zip(ordered, sizes, strict=True):
            self._pack(argument, i)
            place[id(argument)] = self._at(i)
            i += size
        self.arguments = self._at(i)
        for argument in arguments:
            self.memory[i] = place[id(argument)]
            i += 1
        at_attributes = self._at(i)
        for attribute in attributes:
            self._copy(attribute, i)
            i += _ATTRIBUTE_WORDS
        config = _Config(
            grid=Dim(*grid) if isinstance(grid, tuple) else Dim(grid, 1, 1),
            block=Dim(threads, 1, 1),
            shared=shared,
            attributes=at_attributes,
            n_attributes=len(attributes),
        )
        self._copy(config, i)
        self.config = _Config.from_address(self._at(i))
        self.function, self.cluster, self.programmatic, self.in_graph = function, cluster, programmatic, in_graph
        self._device: int = device.index
        self._bound: list[tuple[int, Any, int]] = []
        self._last: Sequence[int] = []
        self.enqueue = functools.partial(
            libcuda.library().cuLaunchKernelEx,
            *(ctypes.c_void_p(x) for x in (self._at(i), function, self.arguments)),
            _NOTHING,
        )
        self.owner: Any = None  # an object to be kept alive with the plan, as it owns the kernel's handle

    def bind(self, parameters: Sequence[str], tensors: Sequence[str]) -> None:
        """Set the order of the addresses given to `launch`: those of the parameters `tensors`.

        Raises ValueError if an argument names something that is not among the `parameters` of the function.
        """
        for name, *_ in self.addresses:
            if name not in parameters:
                raise ValueError(f"{name}: expected one of the parameters {', '.join(parameters)}")
        self._bound = [(tensors.index(name), memory, i) for name, memory, i in self.addresses if name in tensors]

    def launch(self, addresses: Sequence[int]) -> None:
        """Launch on torch's current stream of the device, with these addresses, in the order given to `bind`."""
        if addresses != self._last:
            for n, memory, i in self._bound:
                memory[i] = addresses[n]
            self._last = addresses
        self._launch()

    def launch_at(self, addresses: Mapping[str, int]) -> None:
        """Launch with these addresses, given by name; all other addresses are null."""
        for name, memory, i in self.addresses:
            memory[i] = addresses.get(name, 0)
        self._launch()

    def _launch(self) -> None:
        if self.asked:
            self.ask()
        self.stream = torch._C._cuda_getCurrentRawStream(self._device)
        if status := self.enqueue():
            self.again(status)

    def ask(self) -> None:
        """Obtain and write the words (`Word`) for the next launch."""
        for i, ask in self.asked:
            self.memory[i] = ask()

    @property
    def stream(self) -> int | None:
        """The stream (a raw handle) on which `enqueue` launches."""
        return self.config.stream

    @stream.setter
    def stream(self, stream: int) -> None:
        self.config.stream = stream

    def again(self, status: int) -> None:
        """Handle a failed `enqueue`: launch again if this thread had no CUDA context yet, else raise RuntimeError."""
        if status == libcuda.INVALID_CONTEXT:
            libcuda.give_context(self._device)
            status = self.enqueue()
        libcuda.check(status, "cuLaunchKernelEx")

    def _pack(self, argument: Any, i: int) -> None:
        """Write the argument from word i on, and remember where its address or word is to be written at a launch."""
        if isinstance(argument, TensorMap):
            self.addresses.append((argument.name, encode(argument, self.memory, i), i))
        elif isinstance(argument, Pointer):
            self.addresses.append((argument.name, self.memory, i))
        elif isinstance(argument, Word):
            self.asked.append((i, argument.ask))
        else:
            self._copy(argument, i)

    def _copy(self, x: Any, i: int) -> None:
        """Copy a ctypes value to word i."""
        ctypes.memmove(self._at(i), ctypes.byref(x), ctypes.sizeof(x))

    def _at(self, i: int) -> int:
        """The address of word i."""
        return ctypes.addressof(self.memory) + 8 * i


def _words_of(argument: Any) -> int:
    """How many words of 8 bytes an argument takes."""
    if isinstance(argument, TensorMap):
        return MAP_BYTES // 8
    return 1 if isinstance(argument, (Pointer, Word)) else ceil_div(ctypes.sizeof(argument), 8)


class Planned:
    """Decorator of a function that returns a `Plan` for its arguments: a call of the result launches that plan.

    Plans are kept by the metadata of the tensors (see `ByMetadata`) and by the values of the other arguments, which
    must be hashable; a plan may depend on nothing else. Threads do not interfere: a launch takes a plan out of the list
    of idle ones while it writes addresses into it, and a thread that needs the same plan at that time makes another.

    Args:
        prepare: the function.
    """

    def __init__(self, prepare: Callable[..., Plan]) -> None:
        self.prepare = prepare
        self._parameters = list(inspect.signature(prepare).parameters)
        self._kept = ByMetadata()
        functools.update_wrapper(self, prepare)

    def __call__(self, *args: Any) -> None:
        """Launch the plan for these arguments; while a call is recorded, a new plan, which the recorder keeps."""
        if (recording := recorder.get()) is not None:
            named = zip(self._parameters, args, strict=True)
            recording.add(self.prepare(*args), {name: x.data_ptr() for name, x in named if isinstance(x, Tensor)})
            return
        launch, addresses = self._found(args)
        launch(addresses, args)

    def bound(self, args: tuple) -> _Launch:
        """A function that launches for arguments of this metadata, given the tensors' addresses and the arguments."""
        return self._found(args)[0]

    def _found(self, args: tuple) -> tuple[_Launch, list[int]]:
        tensors = tuple([x for x in args if isinstance(x, Tensor)])
        values = tuple([x for x in args if not isinstance(x, Tensor)])
        found = self._kept.find(tensors, values)
        if found is None:
            found = self._launch_of(args), [x.data_ptr() for x in tensors]
            self._kept.keep(tensors, values, found[0])
        return found

    def _launch_of(self, args: tuple) -> _Launch:
        tensors = [name for name, x in zip(self._parameters, args, strict=True) if isinstance(x, Tensor)]
        idle: list[Plan] = []

        def launch(addresses: Sequence[int], args: tuple) -> None:
            if (recording := recorder.get()) is not None:
                recording.refuse("a plan is launched by its addresses")
            try:
                plan = idle.pop()
            except IndexError:
                plan = self.prepare(*args)
                plan.bind(self._parameters, tensors)
            plan.launch(addresses)
            idle.append(plan)

        return launch
