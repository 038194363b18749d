"""Launches through the CUDA driver: what depends on shapes is prepared once, what depends on addresses at each call.

A step of a model meets the same shapes again and again, and new addresses, for each output is a new allocation. So a
family's ``hopper.py`` writes a function that prepares a `Plan`, a kernel's handle, grid and packed arguments, and
decorates it. Called with tensors and values, it finds the plan of their metadata, or makes it; writes the addresses
into it; and launches it. That takes 15 us, or 8 where an `Operation` has found the plan already; the driver's own share
is 5.6 (on a host where ``x.add_(1)`` takes 12). This is all that a kernel needs::

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

Such a function may be what an `Operation` names, if the operation writes to its arguments and returns nothing. One that
returns tensors allocates them and calls such a function.
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
from dskernels.cuda.tensor_map import MAP_BYTES, Replace, TensorMap, encoded, replacement
from dskernels.metadata import ByMetadata

CLUSTER_DIMENSION, PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6

# Where launches are noted while a call is recorded, see dskernels.recording.
recorder: ContextVar[Any] = ContextVar("recorder of the call that is running", default=None)

_Launch = Callable[[Sequence[int], tuple], None]


class Dim(ctypes.Structure):
    """Three unsigned numbers, as of blocks and of threads."""

    _fields_ = [(axis, ctypes.c_uint) for axis in "xyz"]


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: an id, and a union of 64 bytes of which at most three integers are used here."""

    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", Dim),
        ("block", Dim),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("n_attributes", ctypes.c_uint),
    ]


class Pointer(NamedTuple):
    """A kernel argument that is the address of a tensor; null where that is absent.

    Attributes:
        name: parameter of the `Planned` function that holds the tensor.
    """

    name: str


class Word(NamedTuple):
    """A kernel argument of 64 bits that is asked for at each launch, for what neither metadata nor an address says.

    Attributes:
        ask: returns it. Unless a graph is captured, it is the same for all launches of a stream.
    """

    ask: Callable[[], int]


class Plan:
    """A launch prepared for given shapes, strides and dtypes; `Planned` gives it the addresses.

    One thread at a time may launch it, and nobody again after a launch has raised: `Planned` sees to both. The driver
    copies the arguments, so that a plan may be launched again at once, and its launch be captured in a CUDA graph.

    Args:
        function: handle of the kernel (see :func:`dskernels.cuda.compiler.kernel`).
        arguments: of the kernel, in its order: `Pointer`, `TensorMap`, `Word`, or a ctypes value that stays.
        grid: blocks, in x or in (x, y, z).
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        device: the GPU, which must be the current one at each launch.
        cluster: blocks of a cluster, along x; a kernel that says ``__cluster_dims__`` leaves it out.
        programmatic: let the kernel begin before the one in front of it has ended (programmatic dependent launch): it
            has to wait by ``griddepcontrol.wait`` before it touches that one's results.
        in_graph: whether a recording that has it may launch all it has as a graph (dskernels.relaunching).
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
        self._addresses: Sequence[int] = []
        self._cells: list[tuple[int, Any]] = []
        self._maps: list[tuple[int, Replace]] = []
        self._cells_of: list[tuple[str, Any]] = []
        self._maps_of: list[tuple[str, Replace]] = []
        self.words: list[tuple[Any, Callable[[], int]]] = []
        once = {id(argument): argument for argument in arguments}  # what is given twice is packed and written once
        packed = {key: self._packed(argument) for key, argument in once.items()}
        cells = [packed[id(argument)] for argument in arguments]
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        attributes = []
        if cluster is not None:
            attributes.append(_Attribute(CLUSTER_DIMENSION, 0, (cluster, 1, 1)))
        if programmatic:
            attributes.append(_Attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 0, (1,)))
        attribute_array = (_Attribute * len(attributes))(*attributes)
        config = _Config(
            grid=Dim(*grid) if isinstance(grid, tuple) else Dim(grid, 1, 1),
            block=Dim(threads, 1, 1),
            shared=shared,
            attributes=ctypes.addressof(attribute_array),
            n_attributes=len(attributes),
        )
        self.config, self.function, self.cluster, self.programmatic = config, function, cluster, programmatic
        self.in_graph = in_graph
        self.arguments: int = ctypes.addressof(pointers)
        self._device: int = device.index
        self.enqueue = functools.partial(
            libcuda.library().cuLaunchKernelEx,
            *(ctypes.c_void_p(x) for x in (ctypes.addressof(config), function, ctypes.addressof(pointers), None)),
        )
        self._kept = cells, pointers, attribute_array
        self.owner: Any = None  # what has to live as long as the kernel's handle

    def bind(self, parameters: Sequence[str], tensors: Sequence[str]) -> None:
        """Say what the addresses of `launch` belong to: names of `tensors`, out of all `parameters`."""
        for name, _ in (*self._cells_of, *self._maps_of):
            if name not in parameters:
                raise ValueError(f"{name}: expected one of the parameters {', '.join(parameters)}")
        self._cells = [(tensors.index(name), cell) for name, cell in self._cells_of if name in tensors]
        self._maps = [(tensors.index(name), replace) for name, replace in self._maps_of if name in tensors]

    def launch(self, addresses: Sequence[int]) -> None:
        """Launch on torch's current stream of the device, with these addresses in the order that `bind` said."""
        if addresses != self._addresses:
            for i, cell in self._cells:
                cell[0] = addresses[i]
            for i, replace in self._maps:
                replace(addresses[i])
            self._addresses = addresses
        if self.words:
            self.ask()
        self.stream = torch._C._cuda_getCurrentRawStream(self._device)
        if status := self.enqueue():
            self.again(status)

    def launch_at(self, addresses: Mapping[str, int]) -> None:
        """Launch with the addresses of these names, all others being null."""
        for name, cell in self._cells_of:
            cell[0] = addresses.get(name, 0)
        for name, replace in self._maps_of:
            replace(addresses[name])
        self.ask()
        self.stream = torch._C._cuda_getCurrentRawStream(self._device)
        if status := self.enqueue():
            self.again(status)

    def ask(self) -> None:
        """Write the words of the next launch."""
        for cell, ask in self.words:
            cell[0] = ask()

    @property
    def stream(self) -> int | None:
        """Where `enqueue` launches."""
        return self.config.stream

    @stream.setter
    def stream(self, stream: int) -> None:
        self.config.stream = stream

    def again(self, status: int) -> None:
        """Launch after `enqueue` has returned this status: it is no error where the thread had not called CUDA."""
        if status == libcuda.INVALID_CONTEXT:
            libcuda.give_context(self._device)
            status = self.enqueue()
        libcuda.check(status, "cuLaunchKernelEx")

    def rewired(self, cell_of: Callable[[str], Any]) -> list[tuple[str, Replace]]:
        """Let pointers be read from `cell_of` a name, which may be the same for several launches; return what writes
        the address of each map, which has its own memory."""
        cells, pointers, _ = self._kept
        writers = list(self._maps_of)
        for name, cell in self._cells_of:
            if ctypes.sizeof(cell) == MAP_BYTES:
                writers.append((name, functools.partial(cell.__setitem__, 0)))
                continue
            for i, given in enumerate(cells):
                if given is cell:
                    cells[i] = cell_of(name)
                    pointers[i] = ctypes.addressof(cells[i])
        return writers

    def _packed(self, argument: Any) -> Any:
        """The argument as memory that the driver reads; one of a tensor leaves behind how its address is written."""
        if isinstance(argument, TensorMap):
            cell = encoded(argument)
            replace = replacement(cell, argument.x.data_ptr())
            if replace is not None:
                self._maps_of.append((argument.name, replace))
                return cell
        elif isinstance(argument, Pointer):
            cell = (ctypes.c_uint64 * 1)()
        elif isinstance(argument, Word):
            cell = (ctypes.c_uint64 * 1)()
            self.words.append((cell, argument.ask))
            return cell
        else:
            return argument
        self._cells_of.append((argument.name, cell))
        return cell


class Planned:
    """A function of tensors and values that launches the `Plan` which it returns when it is called for the first time.

    A plan is kept by the tensors' metadata (see `ByMetadata`) and by the values, which must be hashable: it may depend
    on nothing else. Threads do not get in each other's way: a launch takes a plan out of the keeping while it writes
    addresses into it, and another thread that wants the same one meanwhile makes a second.

    Args:
        prepare: the function.
    """

    def __init__(self, prepare: Callable[..., Plan]) -> None:
        self.prepare = prepare
        self._parameters = list(inspect.signature(prepare).parameters)
        self._kept = ByMetadata()
        functools.update_wrapper(self, prepare)

    def __call__(self, *args: Any) -> None:
        """Launch."""
        if (recording := recorder.get()) is not None:
            named = zip(self._parameters, args, strict=True)
            recording.add(self.prepare(*args), {name: x.data_ptr() for name, x in named if isinstance(x, Tensor)})
            return
        launch, addresses = self._found(args)
        launch(addresses, args)

    def bound(self, args: tuple) -> _Launch:
        """What launches for arguments of this metadata, given the addresses of the tensors among them, and them."""
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
