"""What the Triton kernels share: steps that mean the same on a GPU and in Triton's CPU interpreter, and their launch.

The interpreter stores bf16 as integers, truncates where a GPU rounds to nearest even, and multiplies bf16 matrices as
if they were integers. `cast` and `dot` hide that; on a GPU they compile to the plain conversion and the plain product.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from dskernels.cuda.driver import Plan, Pointer, recorder
from dskernels.device import capability
from dskernels.triton_cache import name_what_is_cut_off

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
name_what_is_cut_off()

# A compiled kernel of these versions runs when it is called with grid, stream, function, metadata, two hooks and every
# argument of the source; and they specialise on dtypes, integers and the alignment of addresses alone. With others,
# `launch` goes through Triton each time.
CHECKED_TRITON = ("3.6", "3.7", "3.8", "3.9")
_MOST_COMPILED = 4096
_C_TYPES = {
    "i1": ctypes.c_int8,
    "u1": ctypes.c_uint8,
    "i32": ctypes.c_int32,
    "i64": ctypes.c_int64,
    "fp32": ctypes.c_float,
}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Do what ``kernel[grid](*arguments, **constants)`` does, at half its cost on the host.

    A family's launcher says ``launch(kernel, (n,), x, out, rows, stride, BLOCK=64, num_warps=4)``: every run-time
    parameter by position, then constexprs and launch options by name. Triton works out at each launch what a kernel is
    specialised on, 34 us for the 15 arguments of the GEMM; this takes 18. (Each `triton.cdiv` of a grid takes 2.3 us;
    `validate.ceil_div` does not.)

    The first launch goes through Triton, and the compiled kernel that it answers with is kept under all that this can
    have depended on: the device, each tensor's dtype and whether its address is divisible by 16, each integer (of
    `do_not_specialize` only its width), each constant. Where Triton would take another binary this key is another one
    too, so that the same binary runs.

    It goes through Triton each time in the interpreter, for an argument that is not a tensor, number, bool or None (a
    tensor descriptor, say), while a profiler hooks into Triton's launches, on GPUs that are not NVIDIA's, and with a
    Triton that is not one of `CHECKED_TRITON`.

    Raises:
        TypeError: a tensor is given by name.
    """
    recording = recorder.get()
    if not _launches_directly() or not isinstance(kernel, triton.JITFunction) or _is_hooked():
        if recording is not None:
            recording.refuse("a kernel is launched through Triton")
        kernel[grid](*arguments, **constants)
        return
    known = _known.get(id(kernel))
    if known is None:
        known = _known[id(kernel)] = _Known(kernel, [p.do_not_specialize for p in kernel.params], {}, {})
    types = tuple([type(argument) for argument in arguments])
    kinds = known.kinds.get(types)
    if kinds is None:
        kinds = known.kinds[types] = _kinds(types, known.by_width)
    values = list(arguments)
    aligned = True
    for i in kinds.tensors:
        values[i] = address = arguments[i].data_ptr()
        if address & 15:
            aligned = False
    device = torch._C._cuda_getDevice()
    key = (
        *(types, device, aligned or tuple([values[i] & 15 == 0 for i in kinds.tensors])),
        *[arguments[i].dtype for i in kinds.tensors],
        *[arguments[i] for i in kinds.exact],
        *[(arguments[i] + 0x80000000) >> 32 for i in kinds.by_width],
        *constants,
        *constants.values(),
    )
    found = known.compiled.get(key)
    if found is None:
        if recording is not None:  # which the next launch of this kernel is for
            recording.refuse("a kernel is launched for the first time", later=kinds.all_known)
        token = recorder.set(None)
        try:
            found = _launch_first(known, grid, arguments, constants)
        finally:
            recorder.reset(token)
        if kinds.all_known:
            known.compiled[key] = found
        return
    if recording is not None and (plan := _plan(found[3], (*grid, 1, 1)[:3], arguments, device)) is not None:
        recording.add(plan, {known.kernel.params[i].name: values[i] for i in kinds.tensors})
        return
    if recording is not None:
        recording.refuse("a kernel is launched through Triton")
    run, before, after, _ = found
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, torch._C._cuda_getCurrentRawStream(device), *before, *values, *after)


class _Kinds(NamedTuple):
    """Which arguments are tensors, which integers count by value, and which by width alone; and whether the others are
    but None, floats and bools, which count by their type."""

    tensors: list[int]
    exact: list[int]
    by_width: list[int]
    all_known: bool


class _Known(NamedTuple):
    """What `launch` knows of a kernel: itself (so that no other takes its id), which parameters count by their width
    alone, what it was given by type, and its binaries: what to call, with what before the arguments and after them, and
    the binary itself."""

    kernel: Any
    by_width: list[bool]
    kinds: dict[tuple[type, ...], _Kinds]
    compiled: dict[tuple, tuple[Callable, tuple, tuple, Any]]


_known: dict[int, _Known] = {}


def _kinds(types: tuple[type, ...], by_width: list[bool]) -> _Kinds:
    tensors = [i for i, kind in enumerate(types) if issubclass(kind, torch.Tensor)]
    integers = [i for i, kind in enumerate(types) if kind is int]
    others = {types[i] for i in range(len(types)) if i not in tensors and i not in integers}
    return _Kinds(
        tensors,
        exact=[i for i in integers if not by_width[i]],
        by_width=[i for i in integers if by_width[i]],
        all_known=others <= {type(None), float, bool},
    )


def _launch_first(known: _Known, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any]) -> tuple:
    """Launch through Triton; return what the same launch needs from then on."""
    for name, value in constants.items():
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected tensors by position, got one by name")
    compiled = known.kernel[grid](*arguments, **constants)
    if len(known.compiled) >= _MOST_COMPILED:
        known.compiled.clear()
    after = tuple(constants.get(p.name, p.default) for p in known.kernel.params[len(arguments) :])
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), after, compiled


def _plan(compiled: Any, grid: tuple[int, ...], arguments: tuple, device: int) -> Plan | None:
    """The launch of a binary as the driver takes it, its pointers by the names of their parameters.

    As Triton's own launcher does it (`_launch` in backends/nvidia/driver.py of 3.6, driver.c of 3.7 to 3.9): all that
    is no constexpr, then two addresses of scratch memory. None for a binary that wants such memory, clusters, a
    cooperative grid or instruments, and for arguments that are not of the types above.
    """
    metadata = compiled.metadata
    wanted = metadata.global_scratch_size, metadata.profile_scratch_size, metadata.launch_cooperative_grid
    if any(wanted) or metadata.num_ctas != 1 or 0 in grid or getattr(metadata, "instrumentation_mode", ""):
        return None
    packed: list[Any] = []
    for (name, kind), argument in zip(compiled.src.signature.items(), arguments, strict=False):
        if kind == "constexpr":
            continue
        if isinstance(argument, torch.Tensor) and kind.startswith("*"):
            packed.append(Pointer(name))
        elif kind in _C_TYPES:
            packed.append(_C_TYPES[kind](argument))
        else:
            return None
    scratch = Pointer("scratch")  # which nothing is at
    plan = Plan(
        compiled.function,
        arguments=(*packed, scratch, scratch),
        grid=(grid[0], grid[1], grid[2]),
        threads=32 * metadata.num_warps,
        shared=metadata.shared,
        device=torch.device("cuda", device),
        programmatic=bool(metadata.launch_pdl),
    )
    plan.owner = compiled
    return plan


@functools.cache
def _launches_directly() -> bool:
    checked = any(triton.__version__.startswith(f"{version}.") for version in CHECKED_TRITON)
    return checked and torch.version.cuda is not None and not INTERPRETED


def _watch(metadata: Any) -> None:
    """A launch by Triton itself, as of ``kernel[grid]()``: what is recorded around it would be launched without it."""
    recording = recorder.get()
    if recording is not None:
        recording.refuse("a kernel is launched through Triton")


_watch.of_recordings = True  # type: ignore[attr-defined]  # as is that of another copy of this library, under another name
# It stays: Triton walks through the list, and would skip the hook of one thread as another takes its own out.
triton.knobs.runtime.launch_enter_hook.add(_watch)


def _is_hooked() -> bool:
    """Whether somebody else watches Triton's launches."""
    runtime = triton.knobs.runtime
    before = runtime.launch_enter_hook.calls
    return bool(runtime.launch_exit_hook.calls or any(not hasattr(call, "of_recordings") for call in before))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Cast fp32 `x` to `dtype`, rounding to nearest even; e4m3 wants |x| <= 448 (or NaN)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            x = _keep_mantissa(x, 7)
        elif dtype == tl.float8e4nv:
            # Below 2^-6 e4m3 is a fixed-point format of step 2^-9: adding 1.5 * 2^14 leaves fp32 with just that step.
            fixed = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)
            fixed |= x.to(tl.int32, bitcast=True) & -0x80000000
            x = tl.where(tl.abs(x) < 0.015625, fixed.to(tl.float32, bitcast=True), _keep_mantissa(x, 3))
            x = tl.where(x == x, x, 480.0)  # the value that NaN's bits would have
    return x.to(dtype)


@triton.jit
def _keep_mantissa(x, bits: tl.constexpr):
    """Round fp32 `x` to `bits` bits of mantissa, ties to even, by integer arithmetic on its representation."""
    drop: tl.constexpr = 23 - bits
    i = x.to(tl.int32, bitcast=True)
    i = (i + ((1 << (drop - 1)) - 1) + ((i >> drop) & 1)) & ~((1 << drop) - 1)
    return tl.where(x == x, i.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b):
    """fp32 product of two tiles of one dtype, from zero; fp32 operands are multiplied exactly, not as tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def fused_multiply_add(a, b, c):
    """a * b + c in fp32, rounded once; numpy, which the interpreter computes with, would round the product too."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 `x`, to the bit of torch's on a GPU, but not below 2^-126.

    `tl.sigmoid` is faster and less exact: the exponential is off by some |x| / 2 ulp, the quotient by 2.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x.to(tl.float64)).to(tl.float32))  # numpy's in fp32 is 2 ulp off
    y = tl.minimum(1.0 + libdevice.exp(-x), 8.507059173023462e37)
    guess = 1.0 / y
    # A step of Newton's leaves the nearest float.
    return tl.fma(tl.fma(-y, guess, 1.0), guess, guess)


@triton.jit
def begin_dependent(PROGRAMMATIC: tl.constexpr):
    """The first thing that a kernel does whose launch is `programmatic`, see there."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def programmatic(x: torch.Tensor) -> dict[str, bool]:
    """Constants of a launch beside `x`, from sm_90 on: the kernel begins before the one in front has ended.

    It waits for that one's results by `begin_dependent`, and lets the one behind it begin in turn.
    """
    may = x.is_cuda and capability(x.device) >= (9, 0)
    return {"PROGRAMMATIC": True, "launch_pdl": True} if may else {"PROGRAMMATIC": False}


def reason_against_e4m3(device: torch.device) -> str | None:
    """Why kernels that make or multiply e4m3 do not run on `device`, or None: NVIDIA GPUs have it from sm_89 on."""
    if device.type == "cuda" and torch.version.hip is None and capability(device) < (8, 9):
        return "e4m3 needs sm_89 or newer, this GPU is sm_{}{}".format(*capability(device))
    return None
