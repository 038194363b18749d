"""Weights kept in e4m3: half the memory of bf16 and nothing quantised while the model runs. For inference."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.attention import Attention
from dskernels.model.layers import FP8_BLOCK, FeedForward, Linear
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import Experts
from dskernels.types import Fp8Tensor

SCALE_SUFFIX = "_scale_inv"


@torch.no_grad()
def keep_in_fp8(model: DeepseekV3, *, scale_format: str = "fp32") -> DeepseekV3:
    """Quantises the linear layers and experts of a model in place, one after the other, and drops what they were.

    The model computes what it computed before, up to where blocks begin: gate and up have blocks of their own, as in a
    checkpoint. Their rows, and the columns of the matrix that follows, are filled up with zeros to whole blocks (of the
    published models only DeepSeek-V2-Lite's dense layer, 10,944 wide, needs it), which adds nothing to any product.

    Args:
        model: made with ``fp8=True``. On the meta device it gets the shapes, to be filled.
        scale_format: of the scales, "fp32" or "ue8m0" (powers of two).

    Returns:
        The same model, whose quantised weights have no gradient.

    Raises:
        ValueError: the model was not made with ``fp8=True``, or a scale format that is not known.
    """
    if not model.fp8:
        raise ValueError("model: expected one made with fp8=True, whose products run in e4m3")
    if scale_format not in ("fp32", "ue8m0"):
        raise ValueError(f'scale_format: expected "fp32" or "ue8m0", got {scale_format!r}')
    model.scale_format = scale_format
    paired = {part for module in model.modules() if isinstance(module, FeedForward) for part in (module.w13, module.w2)}
    for module in model.modules():
        if isinstance(module, Experts) and module.w13_scale_inv is None:
            _keep(module, "w13", _whole_halves(module.w13), scale_format)
            _keep(module, "w2", _whole_columns(module.w2), scale_format)
        elif isinstance(module, FeedForward) and module.w13.fp8 and module.w13.weight_scale_inv is None:
            _keep(module.w13, "weight", _whole_halves(module.w13.weight), scale_format)
            _keep(module.w2, "weight", _whole_columns(module.w2.weight), scale_format)
        elif isinstance(module, Linear) and module not in paired and module.fp8 and module.weight_scale_inv is None:
            _keep(module, "weight", module.weight, scale_format)
    write_out_for_decode(model)
    return model


def write_out_for_decode(model: DeepseekV3) -> None:
    """Makes the copies that absorbed attention multiplies by now, rather than in a step that may be under capture."""
    dtype = model.embed_tokens.weight.dtype
    for module in model.modules():
        if isinstance(module, Attention) and module.kv_b_proj.weight.device.type != "meta":
            module.kv_b_proj.dense(dtype)


def whole_blocks(size: int) -> int:
    """A size filled up to whole blocks."""
    return -(-size // FP8_BLOCK[0]) * FP8_BLOCK[0]


def quantize_weight(weight: Tensor, scale_format: str = "fp32") -> Fp8Tensor:
    """A weight ``[N, K]`` or a stack of them ``[E, N, K]`` in 128x128 blocks."""
    if weight.dim() == 2:
        return ds.quantize(weight, FP8_BLOCK, scale_format=scale_format)
    data = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    grid = [whole_blocks(size) // step for size, step in zip(weight.shape[1:], FP8_BLOCK, strict=True)]
    scale = weight.new_empty((weight.shape[0], *grid), dtype=torch.float32)
    for i, part in enumerate(weight):
        quantized = ds.quantize(part, FP8_BLOCK, scale_format=scale_format)
        data[i], scale[i] = quantized.data, quantized.scale
    return Fp8Tensor(data, scale, FP8_BLOCK)


def _keep(module: nn.Module, name: str, weight: Tensor, scale_format: str) -> None:
    """Puts a quantised weight where a plain one was."""
    if weight.device.type == "meta":
        *stack, rows, columns = weight.shape
        grid = [*stack, whole_blocks(rows) // FP8_BLOCK[0], whole_blocks(columns) // FP8_BLOCK[1]]
        data = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        scale = torch.empty(grid, dtype=torch.float32, device="meta")
    else:
        data, scale, _ = quantize_weight(weight, scale_format)
    setattr(module, name, nn.Parameter(data, requires_grad=False))
    module.register_buffer(name + SCALE_SUFFIX, scale.contiguous())


def _whole_halves(w13: Tensor) -> Tensor:
    """``[..., 2I, H]`` with the rows of gate and of up each filled up to whole blocks."""
    gate, up = w13.detach().chunk(2, -2)
    more = whole_blocks(gate.shape[-2]) - gate.shape[-2]
    if not more:
        return w13.detach()
    return torch.cat([nn.functional.pad(part, (0, 0, 0, more)) for part in (gate, up)], -2)


def _whole_columns(w2: Tensor) -> Tensor:
    """``[..., H, I]`` with its columns filled up to whole blocks."""
    return nn.functional.pad(w2.detach(), (0, whole_blocks(w2.shape[-1]) - w2.shape[-1]))
