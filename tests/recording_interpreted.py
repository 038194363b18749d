"""Calls recorded and launched again on the CPU: a driver that runs each portable kernel in Triton's interpreter.

So that results can be compared, which the driver of test_cuda_driver, that only notes launches, has none of.
"""

import ctypes
import itertools
import math

import pytest
import torch

import dskernels as ds
from dskernels import device as devices
from dskernels import dispatch, recording, relaunching
from dskernels.choice import OPERATIONS
from dskernels.cuda import libcuda
from dskernels.cuda.driver import Plan, Pointer, recorder
from dskernels.cuda.graph import _Node
from dskernels.metadata import ByMetadata
from dskernels.routing import triton_balance
from test_cuda_driver import CPU, FakeDriver

LAUNCHERS = (
    "dskernels.mla.decode.triton",
    "dskernels.mla.prefill.triton",
    "dskernels.mla.prefill.triton_gather",
    "dskernels.mla.prefill.triton_groups",
    "dskernels.routing.triton_balance",
)


PARTS = triton_balance.balance_loss, triton_balance.balance_loss_backward  # that are recorded by themselves


class InterpretingDriver(FakeDriver):
    """What is launched runs. A kernel's handle is the number of what was planned: it, its grid and arguments."""

    def __init__(self):
        super().__init__()
        self._planned, self._numbers = {}, itertools.count(1)

    def plan(self, kernel, grid, arguments, constants):
        """A plan of a launch, and the addresses of its pointers."""
        tensors = {f"p{i}": x for i, x in enumerate(arguments) if isinstance(x, torch.Tensor)}
        number = next(self._numbers)
        self._planned[number] = kernel, grid, arguments, constants, list(tensors)
        x, y, z = (*grid, 1, 1)[:3]
        pointers = tuple(map(Pointer, tensors))
        plan = Plan(number, arguments=pointers, grid=(x, y, z), threads=32, shared=0, device=CPU)
        return plan, {name: x.data_ptr() for name, x in tensors.items()}

    def launch(self, config, function, arguments, extra):
        self.kinds = "p" * len(self._planned[function][4])
        status = super().launch(config, function, arguments, extra)
        self.run(self.launches[-1])
        return status

    def node_of(self, given):
        self.kinds = "p" * len(self._planned[_Node.from_address(given).function][4])
        return super().node_of(given)

    def graph_launch(self, executable, stream):
        status = super().graph_launch(executable, stream)
        for node in self.graphs[executable - 1]:
            self.run(node)
        return status

    def run(self, launch):
        """Run a kernel on what lies at its addresses now."""
        kernel, grid, arguments, constants, names = self._planned[launch["function"]]
        address = dict(zip(names, launch["arguments"], strict=True))
        with torch._C._DisableTorchDispatch():  # what the interpreter does is no part of a call
            given = [_at(address[f"p{i}"], x) if f"p{i}" in address else x for i, x in enumerate(arguments)]
            kernel[grid](*given, **constants)


def _at(address, like):
    """What lies at an address, as a tensor like this one."""
    if not address or not like.numel():
        return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_ubyte * (extent * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


@pytest.fixture(params=[1, 100], ids=["graph", "one by one"])
def interpreting_driver(monkeypatch, request):
    """Calls of portable kernels on tensors of the CPU are recorded as those on a GPU are."""
    driver = InterpretingDriver()
    libraries = {kind: driver.library(kind) for kind in (ctypes.CDLL, ctypes.PyDLL)}
    monkeypatch.setattr(libcuda, "library", lambda kind=ctypes.CDLL: libraries[kind])
    make = torch._C._dynamo.guards._empty_strided_cpu

    def like_this(x):
        """Memory that holds nothing of use, so that what is not written shows."""

        def allocate():
            new = make(tuple(x.shape), x.stride(), x.dtype)
            return new.fill_(math.nan) if x.is_floating_point() else new.fill_(113)

        return allocate

    def launch(kernel, grid, *arguments, **constants):
        if (recording := recorder.get()) is None:
            kernel[grid](*arguments, **constants)
        else:
            recording.add(*driver.plan(kernel, grid, arguments, constants))

    for module in LAUNCHERS:
        monkeypatch.setattr(f"{module}.launch", launch)
    monkeypatch.setattr(relaunching, "like_this", like_this)
    monkeypatch.setattr(relaunching, "FEWEST_IN_GRAPH", request.param)
    monkeypatch.setattr(relaunching, "reason_against_graphs", lambda: None)
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: not devices.dispatch_modes())
    monkeypatch.setattr(recording, "_memory", lambda device: 2**36)
    monkeypatch.setattr(recording, "_watch_triton", lambda: None)  # the interpreter is how it launches here
    monkeypatch.setattr(dispatch, "_STRAIGHT_DEVICES", ("cpu",))
    for name, value in (
        ("_cuda_getDevice", lambda: 0),
        ("_cuda_getCurrentRawStream", lambda device: 77),
        ("_cuda_isCurrentStreamCapturing", lambda: False),
    ):
        monkeypatch.setattr(torch._C, name, value, raising=False)
    libcuda._primary_context.cache_clear()
    forget(monkeypatch)
    yield driver
    libcuda._primary_context.cache_clear()


def forget(monkeypatch):
    """Nothing is known of any call."""
    for name in ds.__all__:
        if hasattr(getattr(ds, name), "known"):
            monkeypatch.setattr(getattr(ds, name).known, "kinds", ByMetadata())
    for operation in OPERATIONS.values():
        if operation._straight is not None:
            monkeypatch.setattr(operation, "_straight", ByMetadata())
    for part in PARTS:
        monkeypatch.setattr(part, "_known", ByMetadata())


def is_recorded(function):
    """Whether the latest kind of calls has been recorded."""
    kind = [entries[0][2] for entries in function.known.kinds._kept.values()][-1]
    return bool(kind.idle)
