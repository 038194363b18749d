"""Weights of transformers modules in the form that the operations take."""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

import dskernels as ds
from dskernels.choice import choices
from dskernels.types import Fp8Tensor

Weight = Tensor | Fp8Tensor
BLOCK = (128, 128)


class Copy:
    """Something derived from weights (quantised, stacked), kept until one of them is written to or replaced.

    Where torch does not count writes (inference tensors), and while tracing, it is made anew at each use.
    """

    def __init__(self) -> None:
        self._parts: list[TensorWeakRef] = []
        self._state: tuple | None = None
        self._made: Any = None

    def __reduce__(self) -> tuple:
        """A copy of a model derives its own."""
        return Copy, ()

    def of(self, parts: tuple[Tensor, ...], make: Callable[[], Any], kind: object = None) -> Any:
        """What `make` derives from `parts`, without a gradient; `kind` tells apart what is made of the same parts."""
        if torch.compiler.is_compiling() or any(part.is_inference() for part in parts):
            return make()
        state = kind, [(part.data_ptr(), part._version) for part in parts]
        before = [reference() for reference in self._parts]
        # Another tensor may now have the same address and the same number of writes, so identity is compared too.
        same = len(before) == len(parts) and all(map(is_, before, parts))
        if not same or self._state != state:
            with torch.no_grad():
                made = make()
            if choices.get() is not None:
                return made  # called by `explain`, which computes nothing
            if parts[0].is_cuda and torch.cuda.is_current_stream_capturing():
                return made  # it lives in the graph's memory, and is only filled by a replay
            self._parts, self._state, self._made = [TensorWeakRef(part) for part in parts], state, made
        return self._made


def is_fp8_linear(module: nn.Module) -> bool:
    """Whether a module is transformers' linear layer with fine-grained fp8 weights."""
    return type(module).__name__ == "FP8Linear" and hasattr(module, "weight_scale_inv")


def is_linear(module: Any) -> bool:
    """Whether calling a module does nothing but a product (and adding a bias), so that the product may be computed
    directly."""
    plain = type(module) is nn.Linear or (isinstance(module, nn.Module) and is_fp8_linear(module))
    return plain and not module._forward_hooks and not module._forward_pre_hooks and not hasattr(module, "_hf_hook")


def reason_against_fp8(module: Any) -> str | None:
    """Why the e4m3 weights of a linear layer or of stacked experts do not have the form that the operations take, or
    None."""
    if module.block_size is None or tuple(module.block_size) != BLOCK:
        return f"its blocks are {module.block_size}, not {BLOCK}"
    if module.activation_scheme != "dynamic":
        return f"its activations are scaled {module.activation_scheme}"
    weight = module.weight if hasattr(module, "weight") else module.down_proj
    if weight.dtype != torch.float8_e4m3fn:
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}"
    return None


def fp8_weight(data: Tensor, scale: Tensor) -> Fp8Tensor:
    """A stored e4m3 weight as an `Fp8Tensor`; scales stored as exponents (ue8m0) become fp32."""
    return Fp8Tensor(data.detach(), scale.detach().float(), BLOCK)


def weight_of(linear: Any) -> Weight:
    """The weight of a linear layer, plain or in e4m3."""
    if is_fp8_linear(linear) and linear.weight.dtype == torch.float8_e4m3fn:
        return fp8_weight(linear.weight, linear.weight_scale_inv)
    return linear.weight


def parts_of(linear: Any) -> tuple[Tensor, ...]:
    """The tensors that `weight_of` is made of: the key of a `Copy`."""
    return (linear.weight, linear.weight_scale_inv) if is_fp8_linear(linear) else (linear.weight,)


def dense_weight(linear: Any, copy: Copy, dtype: torch.dtype) -> Tensor:
    """The weight for products in `dtype`; a dequantised copy, made once, if it is stored in e4m3."""
    weight = weight_of(linear)
    if not isinstance(weight, Fp8Tensor):
        return weight if weight.dtype == dtype else weight.to(dtype)
    return copy.of(parts_of(linear), lambda: weight.dequantize(dtype), dtype)


def one_below_the_other(gate: Any, up: Any, copy: Copy, fp8: bool) -> Weight | None:
    """The weights of two linear layers stacked, gate first; None if their 128-row blocks do not allow it.

    The copy is kept (for shared experts, it is a few per cent of the routed ones), unless both need gradients. With
    `fp8`, plain weights are quantised.
    """
    top, bottom = weight_of(gate), weight_of(up)
    if isinstance(top, Fp8Tensor) != isinstance(bottom, Fp8Tensor):
        return None
    if (fp8 or isinstance(top, Fp8Tensor)) and top.shape[0] % BLOCK[0]:
        return None

    def join() -> Weight:
        if isinstance(top, Fp8Tensor) and isinstance(bottom, Fp8Tensor):
            return Fp8Tensor(torch.cat((top.data, bottom.data)), torch.cat((top.scale, bottom.scale)), BLOCK)
        both = torch.cat((gate.weight, up.weight))
        return ds.quantize(both, BLOCK) if fp8 else both

    if (
        not isinstance(top, Fp8Tensor)
        and torch.is_grad_enabled()
        and (gate.weight.requires_grad or up.weight.requires_grad)
    ):
        return torch.cat((gate.weight, up.weight))
    return copy.of((*parts_of(gate), *parts_of(up)), join, fp8)
