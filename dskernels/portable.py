"""What the Triton kernels share: steps that mean the same on a GPU and in Triton's CPU interpreter, and `launch`.

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

# Versions of Triton for which two things were checked: a compiled kernel can be called with grid, stream, function,
# metadata, two hooks and every argument of the source; and kernels are specialised only on dtypes, integers and the
# alignment of addresses. With other versions, `launch` goes through Triton each time.
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

    A launcher calls ``launch(kernel, (n,), x, out, rows, stride, BLOCK=64, num_warps=4)``: every run-time parameter by
    position, then constexprs and launch options by name. Triton determines at each launch what the kernel has to be
    specialised on, which takes 34 us for the 15 arguments of the GEMM; this function takes 18. (Each `triton.cdiv` in a
    grid takes 2.3 us; use `validate.ceil_div`.)

    The first launch goes through Triton. The compiled kernel that Triton returns is kept under a key of everything on
    which it can depend: the device, each tensor's dtype and whether its address is divisible by 16, each integer (for
    those in `do_not_specialize` only whether it needs 64 bits), and each constant. If Triton would take another binary,
    this key is different too; so the binary that runs is always the one that Triton would run.

    Every launch goes through Triton in the interpreter, for an argument that is not a tensor, number, bool or None
    (such as a tensor descriptor), while a profiler hooks into Triton's launches, on GPUs that are not NVIDIA's, and
    with a version of Triton that is not in `CHECKED_TRITON`.

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
        if recording is not None:  # a later call, for which the kernel is known, may be recorded
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
    """How arguments of given types enter the key of `launch`.

    Attributes:
        tensors: positions of the tensors.
        exact: positions of integers that enter by value.
        by_width: positions of integers of `do_not_specialize`, which enter only by whether they need 64 bits.
        all_known: whether all others are None, floats and bools, of which only the type matters.
    """

    tensors: list[int]
    exact: list[int]
    by_width: list[int]
    all_known: bool


class _Known(NamedTuple):
    """What `launch` knows of a kernel.

    Attributes:
        kernel: the kernel, kept alive so that no other object gets its id.
        by_width: for each parameter whether it is in `do_not_specialize`.
        kinds: `_Kinds` by the types of the arguments.
        compiled: binaries by the key of `launch`: the function to call, what it takes before and after the arguments,
            and the binary itself.
    """

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
    """Launch through Triton; return the entry of `_Known.compiled` for further launches like this one."""
    for name, value in constants.items():
        if isinstance(value, torch.Tensor):
            raise TypeError(f"{name}: expected tensors by position, got one by name")
    compiled = known.kernel[grid](*arguments, **constants)
    if len(known.compiled) >= _MOST_COMPILED:
        known.compiled.clear()
    after = tuple(constants.get(p.name, p.default) for p in known.kernel.params[len(arguments) :])
    return compiled.run, (compiled.function, compiled.packed_metadata, None, None, None), after, compiled


def _plan(compiled: Any, grid: tuple[int, ...], arguments: tuple, device: int) -> Plan | None:
    """The launch of a binary as a `Plan`, whose pointers have the names of the kernel's parameters.

    The arguments are those of Triton's own launcher (`_launch` in backends/nvidia/driver.py of 3.6, driver.c of 3.7 to
    3.9): all parameters that are not constexprs, then two addresses of scratch memory. None for a binary that needs
    scratch memory, clusters, a cooperative grid or instrumentation, and for arguments that are not of the types above.
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
    scratch = Pointer("scratch")  # stays null
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
    """Whether `launch` may call compiled kernels itself here: a checked version of Triton, on CUDA."""
    checked = any(triton.__version__.startswith(f"{version}.") for version in CHECKED_TRITON)
    return checked and torch.version.cuda is not None and not INTERPRETED


def _watch(metadata: Any) -> None:
    """Hook of launches by Triton itself, as of ``kernel[grid]()``: a recording would not contain this launch."""
    recording = recorder.get()
    if recording is not None:
        recording.refuse("a kernel is launched through Triton")


# `_is_hooked` tells our hook by this attribute, also that of a second copy of this library under another name.
_watch.of_recordings = True  # type: ignore[attr-defined]
# The hook is never removed: Triton iterates over the list, and would skip a hook if another thread removed its own.
triton.knobs.runtime.launch_enter_hook.add(_watch)


def _is_hooked() -> bool:
    """Whether anyone else has hooked into Triton's launches."""
    runtime = triton.knobs.runtime
    before = runtime.launch_enter_hook.calls
    return bool(runtime.launch_exit_hook.calls or any(not hasattr(call, "of_recordings") for call in before))


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Cast fp32 `x` to `dtype`, rounding to nearest even; for e4m3, |x| must be at most 448 (or NaN)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            x = _keep_mantissa(x, 7)
        elif dtype == tl.float8e4nv:
            # Below 2^-6 e4m3 is a fixed-point format of step 2^-9; adding 1.5 * 2^14 rounds fp32 to just that step.
            fixed = ((tl.abs(x) + 24576.0) - 24576.0).to(tl.int32, bitcast=True)
            fixed |= x.to(tl.int32, bitcast=True) & -0x80000000
            x = tl.where(tl.abs(x) < 0.015625, fixed.to(tl.float32, bitcast=True), _keep_mantissa(x, 3))
            x = tl.where(x == x, x, 480.0)  # the value whose e4m3 bits are those of NaN
    return x.to(dtype)


@triton.jit
def _keep_mantissa(x, bits: tl.constexpr):
    """Round fp32 `x` to `bits` bits of mantissa, ties to even, by integer arithmetic on its bits."""
    drop: tl.constexpr = 23 - bits
    i = x.to(tl.int32, bitcast=True)
    i = (i + ((1 << (drop - 1)) - 1) + ((i >> drop) & 1)) & ~((1 << drop) - 1)
    return tl.where(x == x, i.to(tl.float32, bitcast=True), x)


@triton.jit
def dot(a, b):
    """Product of two tiles of the same dtype, summed in fp32; fp32 operands are not rounded to tf32."""
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def fused_multiply_add(a, b, c):
    """a * b + c in fp32, rounded once. The interpreter computes with numpy, which would round the product as well."""
    if INTERPRETED:
        return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)
    return tl.fma(a, b, c)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) of fp32 `x`, with the same bits as torch's on a GPU, but never below 2^-126.

    `tl.sigmoid` is faster and less exact: its exponential is off by about |x| / 2 ulp, its quotient by 2.
    """
    if INTERPRETED:
        return 1.0 / (1.0 + tl.exp(-x.to(tl.float64)).to(tl.float32))  # numpy's exp in fp32 is 2 ulp off
    y = tl.minimum(1.0 + libdevice.exp(-x), 8.507059173023462e37)
    guess = 1.0 / y
    # A Newton step gives the nearest float.
    return tl.fma(tl.fma(-y, guess, 1.0), guess, guess)


@triton.jit
def begin_dependent(PROGRAMMATIC: tl.constexpr):
    """The first step of a kernel whose launch is `programmatic`: wait for the preceding kernel, let the next begin."""
    if PROGRAMMATIC:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def programmatic(x: torch.Tensor) -> dict[str, bool]:
    """Constants for a launch that may begin before the preceding kernel has ended, on the GPU of `x` (from sm_90 on).

    The kernel waits for the results of the preceding one by `begin_dependent`, and then lets the next one begin.
    """
    may = x.is_cuda and capability(x.device) >= (9, 0)
    return {"PROGRAMMATIC": True, "launch_pdl": True} if may else {"PROGRAMMATIC": False}


def reason_against_e4m3(device: torch.device) -> str | None:
    """Why kernels that make or multiply e4m3 do not run on `device`, or None: NVIDIA GPUs have it from sm_89 on."""
    if device.type == "cuda" and torch.version.hip is None and capability(device) < (8, 9):
        return "e4m3 needs sm_89 or newer, this GPU is sm_{}{}".format(*capability(device))
    return None
