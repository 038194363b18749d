"""What may be wrong with an argument, one thing at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dskernels.types import Fp8Tensor
from fuzz.drawing import Call, Draw, leaves, placed, replaced

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e5m2,
    torch.float8_e4m3fn,
)
NO_TENSORS = (None, 3, 1.5, "text", [1.0], np.zeros((2, 2), np.float32), (), {}, torch.nn.Linear(2, 2))
SCALARS = (
    None,
    True,
    0,
    -1,
    3,
    2**70,
    -(2**70),
    10**400,
    1.5,
    math.nan,
    math.inf,
    "fp32",
    "",
    [],
    (1, 128),
    (1.0, 128.0),
    [1, 128],
    (128,),
    {},
    np.int64(2),
    np.float32(0.5),
    np.zeros(3),
    torch.tensor(2),
    torch.zeros(3),
    torch.float32,
    torch.float64,
    torch.int32,
    object(),
)


def spoil(d: Draw, call: Call) -> None:
    """Change something about one argument, in place; `call.notes` says what."""
    found = leaves(call.arguments)
    others = [name for name, value in call.arguments.items() if not isinstance(value, Tensor)]
    if others and d.chance(3):
        name, value = d.one(*others), d.one(*SCALARS)
        _put(call, name, value, f"{name} = {value!r}"[:200])
        return
    if not found:
        return
    path, x = d.one(*found)
    if x.device.type != "cpu" or x.layout is not torch.strided or x.is_quantized or x.is_inference():
        return  # spoiled before
    how = d.one("shape", "dtype", "layout", "device", "type", "values", "dimension", "gradient", "overlap", "special")
    spoiled: Any = x
    match how:
        case "shape" if x.dim():
            sizes, i = list(x.shape), d.one(*range(x.dim()))
            sizes[i] = max(sizes[i] + d.one(1, -1, 3, 128, -sizes[i]), 0)
            spoiled = _resized(x, sizes)
        case "dtype":
            spoiled = _cast(x, d.one(*DTYPES))
        case "layout" if x.dim():
            spoiled = _relaid(d, x)
        case "device":
            spoiled = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        case "type":
            spoiled = d.one(*NO_TENSORS)
        case "values" if x.numel():
            spoiled = revalued(d, x)
        case "dimension":
            spoiled = x[None] if d.chance() or not x.dim() or not x.shape[0] else x[0]
        case "gradient" if x.is_floating_point() and x.dtype != torch.float8_e4m3fn:
            spoiled = x.detach().requires_grad_()
        case "overlap" if x.dim() and x.shape[0]:
            spoiled = x[:1].expand(x.shape)
        case "special":
            spoiled = _special(d, x)
    if spoiled is not x:
        what = list(spoiled.shape) if isinstance(spoiled, Tensor) else repr(spoiled)[:60]
        _put(call, path, spoiled, f"{path}: {how}, {what} for {list(x.shape)} {x.dtype}")


def _put(call: Call, path: str, value: Any, note: str) -> None:
    if path == "x" and call.arguments.get("out") is call.arguments["x"]:
        call.arguments["out"] = value  # in place still
    call.arguments = replaced(call.arguments, path, value)
    call.notes.append(note)


def _resized(x: Tensor, sizes: list[int]) -> Tensor:
    new = torch.zeros(sizes, dtype=torch.uint8).to(x.dtype)
    if x.dim() == 2 and x.stride(0) == 1 and x.stride(1) > 1:  # scales of 1x128 tiles
        return placed(new, (1, -(-sizes[0] // 4) * 4), 64)
    return new


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype is x.dtype:
        return x
    wide = x.float() if x.dtype in (torch.float8_e4m3fn, torch.float8_e5m2) else x
    if dtype == torch.bfloat16 and x.is_floating_point():  # none that is subnormal: drawing.py says why
        wide = torch.where(wide.abs() < torch.finfo(dtype).tiny, 0.0, wide)
    return wide.to(dtype)


def _relaid(d: Draw, x: Tensor) -> Tensor:
    """The same numbers at other strides."""
    way = d.one("transposed", "gaps", "far", "row by row")
    sizes = [max(n, 1) for n in x.shape]
    if way == "transposed":
        strides = [math.prod(sizes[:i]) for i in range(x.dim())]
    else:
        strides = [math.prod(sizes[i + 1 :]) for i in range(x.dim())]
        if way == "gaps":
            strides = [2 * s for s in strides]
        elif way == "far" and x.dim() > 1:
            strides[0] += d.one(1, 5, 1000)
    return placed(x, strides, 64 + d.one(0, 1))


def revalued(d: Draw, x: Tensor) -> Tensor:
    """A few hostile values among the others."""
    if x.dtype in (torch.float8_e4m3fn, torch.bool) or x.is_complex():
        return x
    limits = torch.iinfo(x.dtype) if not x.is_floating_point() else None
    values = (limits.max, limits.min, -1, limits.max // 2 + 1, 0) if limits else (0.0, -0.0, 1e-30, math.nan, math.inf)
    # NaN and infinities are compared by kind, see judging.py.
    spoiled = placed(x, x.stride(), 64) if all(x.stride()) else x.clone()
    flat = torch.randint(x.numel(), (d.one(1, 2, 5),), generator=d.random)
    for i in flat.tolist():
        spoiled[tuple(np.unravel_index(i, x.shape))] = (
            max(d.one(*values), 0) if x.dtype == torch.uint8 else d.one(*values)
        )
    return spoiled


def _special(d: Draw, x: Tensor) -> Tensor:
    """Tensors that are not plain strided memory."""
    way = d.one("sparse", "negative", "parameter", "inference", "quantized")
    if way == "sparse" and x.dim() == 2 and x.dtype == torch.float32:
        return x.to_sparse()
    if way == "negative" and x.dtype in (torch.float32, torch.float64) and x.numel():  # torch cannot write to none
        return torch._neg_view(-x)
    if way == "parameter" and x.is_floating_point() and x.dtype != torch.float8_e4m3fn:
        return torch.nn.Parameter(x.clone(), requires_grad=False)
    if way == "inference":
        with torch.inference_mode():
            return x.clone()
    if way == "quantized" and x.dtype == torch.float32:
        return torch.quantize_per_tensor(x.detach().contiguous(), 0.1, 0, torch.qint8)
    return x


def is_fp8(value: Any) -> bool:
    """Whether this is a quantised operand."""
    return isinstance(value, Fp8Tensor)
