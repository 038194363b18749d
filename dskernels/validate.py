"""Checks of arguments, shared by all operations: each error names the argument, what was expected, and what came.

Only metadata is looked at (type, dtype, shape, strides, device), never values, so no check waits for a device, and
`torch.compile` traces through all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dskernels.device import PLAIN
from dskernels.types import Block, Fp8Tensor

HALF_OR_SINGLE = (torch.bfloat16, torch.float16, torch.float32)


def check_tensor(
    name: str,
    x: Any,
    *,
    dtype: torch.dtype | Sequence[torch.dtype] | None = None,
    shape: Sequence[int | str] | None = None,
    like: Tensor | None = None,
) -> None:
    """Check that `x` is a strided tensor of a dtype and shape, its last dimension contiguous, on the device of `like`.

    An entry of `shape` is a size, or a letter that stands for any size in the message.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout is not torch.strided or x.is_nested:
        kind = "a nested one" if x.is_nested else f"one of layout {_dtype(x.layout)}"
        raise TypeError(f"{name}: expected a strided tensor, got {kind}")
    if dtype is not None and x.dtype is not dtype:
        allowed = (dtype,) if isinstance(dtype, torch.dtype) else dtype
        if x.dtype not in allowed:
            raise TypeError(f"{name}: expected dtype {_or(allowed)}, got {_dtype(x.dtype)}")
    sizes = x.shape
    if shape is not None:
        fits = len(sizes) == len(shape)
        if fits:
            for size, expected in zip(sizes, shape, strict=True):
                if not isinstance(expected, str) and size != expected:
                    fits = False
        if not fits:
            raise ValueError(f"{name}: expected shape [{', '.join(str(s) for s in shape)}], got {list(sizes)}")
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device} like the others, got one on {x.device}")
    if sizes and sizes[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got strides {list(x.stride())}")
    if _has_lost_memory(x):
        raise ValueError(f"{name}: expected a tensor with memory, its storage was resized to 0 bytes (as FSDP does)")


def _has_lost_memory(x: Tensor) -> bool:
    """Whether a tensor with elements has a storage of 0 bytes, so that a kernel would read at address 0."""
    if torch.compiler.is_compiling() or type(x) not in PLAIN or x.is_meta:
        return False
    try:
        return x.untyped_storage().nbytes() == 0 and x.numel() > 0
    except NotImplementedError:  # inside a transform, where a tensor has no storage
        return False


def check_written(name: str, x: Tensor) -> None:
    """Check that a kernel may write to the tensor `x`: autograd allows it, its memory holds its values as they are, and
    no two of its elements share memory."""
    if not may_be_written(x):
        raise ValueError(f"{name}: expected a tensor that requires no gradient, as it is written to in place")
    if torch.compiler.is_dynamo_compiling():
        return  # dynamo cannot trace the checks below, and notices such writes itself
    if x.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: expected a tensor that was not made in inference mode, to be written to outside of it"
        )
    if x.is_neg():
        raise ValueError(f"{name}: expected a tensor that is no negative view, as it is written to (torch.resolve_neg)")
    if not x.is_contiguous() and _overlaps(x):
        raise ValueError(
            f"{name}: expected elements that do not share memory, as it is written to, got strides {list(x.stride())} "
            f"for shape {list(x.shape)}"
        )


def may_be_written(x: Tensor) -> bool:
    """Whether autograd allows to write to it: it is not a leaf that requires a gradient, nor a view of one."""
    leaf = x if x._base is None else x._base
    return not (leaf.requires_grad and leaf.is_leaf and torch.is_grad_enabled())


def _overlaps(x: Tensor) -> bool:
    """Whether elements may share memory: a dimension's stride is not larger than what the dimensions of smaller strides
    span. (For some very odd layouts this is true although no elements overlap.)"""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1):
        if stride <= reach:
            return x.numel() > 0
        reach += stride * (size - 1)
    return False


def check_fp8(name: str, x: Any, *, blocks: Sequence[Block], ndim: int = 2, like: Tensor | None = None) -> None:
    """Check that `x` is an `Fp8Tensor` with one of these tile shapes, and that its scale has the right shape and
    layout."""
    if _is_plain_fp8(x, blocks, ndim, like):
        return
    if not isinstance(x, Fp8Tensor):
        raise TypeError(f"{name}: expected an Fp8Tensor (see dskernels.quantize), got {type(x).__name__}")
    if not _among(x.block, blocks):
        raise ValueError(f"{name}: expected block {' or '.join(str(b) for b in blocks)}, got {x.block}")
    check_tensor(f"{name}.data", x.data, dtype=torch.float8_e4m3fn, shape="ERC"[-ndim:], like=like)
    if isinstance(x.scale, Tensor) and x.scale.layout is torch.strided and _has_lost_memory(x.scale):
        raise ValueError(f"{name}.scale: expected a tensor with memory, its storage was resized to 0 bytes")
    if not isinstance(x.scale, Tensor):
        raise TypeError(f"{name}.scale: expected a torch.Tensor, got {type(x.scale).__name__}")
    if x.scale.layout is not torch.strided:
        raise TypeError(f"{name}.scale: expected a strided tensor, got one of layout {_dtype(x.scale.layout)}")
    if x.scale.dtype != torch.float32:
        raise TypeError(f"{name}.scale: expected dtype float32, got {_dtype(x.scale.dtype)}")
    rows, cols = x.data.shape[-2:]
    expected = [*x.data.shape[:-2], ceil_div(rows, x.block[0]), ceil_div(cols, x.block[1])]
    if list(x.scale.shape) != expected:
        raise ValueError(
            f"{name}.scale: expected shape {expected} for data of {list(x.data.shape)} in tiles of {x.block}, "
            f"got {list(x.scale.shape)}"
        )
    if x.scale.device != x.data.device:
        raise ValueError(
            f"{name}.scale: expected a tensor on {x.data.device} like the data, got one on {x.scale.device}"
        )
    if x.scale.numel() == 0:
        return  # the strides of an empty tensor do not matter
    if x.block == (1, 128):
        rows, cols = x.scale.shape[-2:]
        if (rows > 1 and x.scale.stride(-2) != 1) or (cols > 1 and x.scale.stride(-1) % 4 != 0):
            raise ValueError(
                f"{name}.scale: expected the row index contiguous and a column stride divisible by 4, as quantize() "
                f"and Fp8Tensor.of() make it, got strides {list(x.scale.stride())}"
            )
    elif x.scale.shape[-1] > 1 and x.scale.stride(-1) != 1:
        raise ValueError(f"{name}.scale: expected a contiguous last dimension, got strides {list(x.scale.stride())}")


def _is_plain_fp8(x: Any, blocks: Sequence[Block], ndim: int, like: Tensor | None) -> bool:
    """Whether `x` is a valid matrix of the usual kind, found out at a fifth of the cost of the checks in `check_fp8`.

    False does not mean that it is invalid: a stack of matrices, or strides that only a single row or column may have,
    are left to those checks.
    """
    if ndim != 2 or type(x) is not Fp8Tensor or type(x.block) is not tuple or x.block not in blocks:
        return False
    data, scale, (tile_rows, tile_cols) = x
    if type(tile_rows) is not int or type(tile_cols) is not int:
        return False
    if not (isinstance(data, Tensor) and isinstance(scale, Tensor)):
        return False
    if not (data.layout is scale.layout is torch.strided):
        return False
    if data.dtype is not torch.float8_e4m3fn or scale.dtype is not torch.float32:
        return False
    sizes, scale_sizes = data.shape, scale.shape
    if len(sizes) != 2 or len(scale_sizes) != 2 or data.stride()[1] != 1:
        return False
    if scale_sizes[0] != -(-sizes[0] // tile_rows) or scale_sizes[1] != -(-sizes[1] // tile_cols):
        return False
    if _has_lost_memory(data) or _has_lost_memory(scale):
        return False
    device = data.device
    if scale.device != device or (like is not None and like.device != device):
        return False
    stride_row, stride_col = scale.stride()
    return (stride_row == 1 and stride_col % 4 == 0) if (tile_rows, tile_cols) == (1, 128) else stride_col == 1


def check_int(name: str, value: Any, *, low: int, high: int | None = None) -> None:
    """Check that `value` is an int from `low` to `high` inclusive."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an int {limits}, got {value}")


def check_float(name: str, value: Any) -> None:
    """Check that `value` is a Python number, and finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    if type(value) is int and abs(value) > sys.float_info.max:
        raise ValueError(f"{name}: expected a float, got an int that is beyond all of them")
    # No formula here has a meaning for NaN or infinity; the result would depend on the order of evaluation.
    if isinstance(value, float) and not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite number, got {value}")


def check_bool(name: str, value: Any) -> None:
    """Check that `value` is True or False."""
    if not isinstance(value, (bool, torch.SymBool)):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Check that `value` is one of `choices`."""
    for choice in choices:  # usually it is the very same object
        if value is choice:
            return
    if not _among(value, choices):
        raise ValueError(f"{name}: expected {' or '.join(_spell(c) for c in choices)}, got {_spell(value)}")


def _among(value: Any, choices: Sequence[Any]) -> bool:
    """Whether `value` equals a choice and has its type: 1.0 and True are not 1. (An array is never compared.)"""
    return any(_same(value, choice) for choice in choices)


def _same(value: Any, choice: Any) -> bool:
    if isinstance(choice, tuple):
        return isinstance(value, tuple) and len(value) == len(choice) and all(map(_same, value, choice))
    return isinstance(value, type(choice)) and (type(value) is not bool or type(choice) is bool) and value == choice


def ceil_div(a: int, b: int) -> int:
    """Smallest integer that is at least a / b."""
    return -(-a // b)


def _or(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(_dtype(d) for d in dtypes)


def _dtype(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def _spell(value: Any) -> str:
    return _dtype(value) if isinstance(value, torch.dtype) else repr(value)
