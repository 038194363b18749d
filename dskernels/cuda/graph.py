"""Plans that are launched together, as a CUDA graph built from them node by node.

On an H200 machine (where ``x.add_(1)`` takes 7 us), a launch takes 4.4 us of host time. A graph of seven launches takes
2 to 3, and 1.5 more for each launch whose addresses have changed since the last time. On the device the seven take 24.5
us as a graph, and 28.8 one by one.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Sequence
from typing import Any

from dskernels.cuda import libcuda
from dskernels.cuda.driver import CLUSTER_DIMENSION, Dim, Plan

# CUgraphEdgeData of a programmatic edge: from the first kernel's trigger (launch_dependents) to the second's start.
_PROGRAMMATIC_EDGE = (ctypes.c_ubyte * 8)(1, 0, 1)
_ADD_EDGE, _SET_NODE = "cuGraphAddDependencies_v2", "cuGraphExecKernelNodeSetParams_v2"  # of CUDA 12.3 and 12.0


class _Node(ctypes.Structure):
    """The driver's CUDA_KERNEL_NODE_PARAMS: function, grid, block, shared memory and arguments of a kernel node."""

    _fields_ = [
        ("function", ctypes.c_void_p),
        ("grid", Dim),
        ("block", Dim),
        ("shared", ctypes.c_uint),
        ("arguments", ctypes.c_void_p),
        ("extra", ctypes.c_void_p),
        ("kernel", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
    ]


class LaunchGraph:
    """A graph of plans that run one after another; a `programmatic` one overlaps with the one before it.

    Only one thread at a time may launch it, and always on the same stream, because launches of one graph wait for each
    other.

    Args:
        plans: the plans; they have to live as long as the graph, which reads their arguments.
        device: ordinal of the GPU.
    """

    def __init__(self, plans: Sequence[Plan], device: int) -> None:
        library, self._device = libcuda.library(), device
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        libcuda.call("cuGraphCreate", device, ctypes.byref(graph), ctypes.c_uint(0))
        try:
            nodes = [self._added(graph, plan) for plan in plans]
            for plan, before, node in zip(plans[1:], nodes, nodes[1:], strict=False):
                edge = ctypes.byref(_PROGRAMMATIC_EDGE) if plan.programmatic else None
                ends = ctypes.byref(before[0]), ctypes.byref(node[0])
                libcuda.call(_ADD_EDGE, device, graph, *ends, edge, ctypes.c_size_t(1))
            flags = ctypes.c_ulonglong(0)
            libcuda.call("cuGraphInstantiateWithFlags", device, ctypes.byref(executable), graph, flags)
        finally:  # the graph lives as long as the executable, because `update` refers to the graph's nodes
            weakref.finalize(self, library.cuGraphDestroy, graph).atexit = False
        weakref.finalize(self, library.cuGraphExecDestroy, executable).atexit = False
        set_node = getattr(library, _SET_NODE)
        self._setters = [functools.partial(set_node, executable, node, ctypes.byref(given)) for node, given in nodes]
        self._launch = functools.partial(library.cuGraphLaunch, executable)
        self._kept = nodes

    def _added(self, graph: ctypes.c_void_p, plan: Plan) -> tuple[ctypes.c_void_p, _Node]:
        config, node = plan.config, ctypes.c_void_p()
        given = _Node(plan.function, config.grid, config.block, config.shared, plan.arguments)
        no_edges = None, ctypes.c_size_t(0)
        libcuda.call("cuGraphAddKernelNode_v2", self._device, ctypes.byref(node), graph, *no_edges, ctypes.byref(given))
        if plan.cluster is not None:
            value = (ctypes.c_uint * 16)(plan.cluster, 1, 1)
            kind = ctypes.c_int(CLUSTER_DIMENSION)
            libcuda.call("cuGraphKernelNodeSetAttribute", self._device, node, kind, ctypes.byref(value))
        return node, given

    def update(self, i: int) -> None:
        """From now on launch plan i with the addresses that are now in it; launches already enqueued keep theirs."""
        if status := self._setters[i]():
            self._again(status, _SET_NODE, *self._setters[i].args)

    def launch(self, stream: ctypes.c_void_p) -> None:
        """Launch all plans on this stream."""
        if status := self._launch(stream):
            self._again(status, "cuGraphLaunch", *self._launch.args, stream)

    def _again(self, status: int, name: str, *arguments: Any) -> None:
        """Repeat the call that returned this status, if the thread had no CUDA context yet; else raise RuntimeError."""
        if status != libcuda.INVALID_CONTEXT:
            libcuda.check(status, name)
        libcuda.call(name, self._device, *arguments)


@functools.cache
def reason_against_graphs() -> str | None:
    """Why launches cannot be put into a graph, or None: a driver older than these functions."""
    missing = [name for name in (_ADD_EDGE, _SET_NODE) if not hasattr(libcuda.library(), name)]
    return f"the driver has no {missing[0]}" if missing else None
