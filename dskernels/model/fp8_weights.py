"""Weights kept in e4m3, for inference: half the memory of bf16, and no quantisation of weights while the model runs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.attention import Attention
from dskernels.model.config import Config
from dskernels.model.hf_names import stacks_down, stacks_shared
from dskernels.model.layers import FP8_BLOCK, FeedForward, Linear
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE
from dskernels.types import Fp8Tensor

SCALE_SUFFIX = "_scale_inv"


@torch.no_grad()
def keep_in_fp8(model: DeepseekV3, *, scale_format: str = "fp32") -> DeepseekV3:
    """Quantise the linear layers and experts of a model in place, one after the other, and drop the original weights.

    The model computes the same as with weights that are quantised at each use, except for where blocks begin: gate and
    up have separate blocks, as in a checkpoint. Their rows, and the columns of the matrix that follows, are padded with
    zeros to whole blocks, which adds nothing to any product. (Of the published models, only DeepSeek-V2-Lite's dense
    layer, 10,944 wide, needs this.)

    Args:
        model: made with ``fp8=True``. On the meta device it only gets the shapes, to be filled later.
        scale_format: of the scales, "fp32" or "ue8m0" (powers of two).

    Returns:
        The same model, whose quantised weights have no gradient.

    Raises:
        ValueError: the model was not made with ``fp8=True``, or the scale format is unknown.
    """
    if not model.fp8:
        raise ValueError("model: expected one made with fp8=True, whose products run in e4m3")
    if scale_format not in ("fp32", "ue8m0"):
        raise ValueError(f'scale_format: expected "fp32" or "ue8m0", got {scale_format!r}')
    model.scale_format = scale_format
    paired = {part for module in model.modules() if isinstance(module, FeedForward) for part in (module.w13, module.w2)}
    for module in list(model.modules()):
        if isinstance(module, MoE) and module.experts.w13_scale_inv is None:
            _keep_experts(module, model.config, scale_format)
        elif isinstance(module, Attention) and stacks_down(model.config) and module.qkv_a_proj is None:
            _keep_down(module, scale_format)
    for module in model.modules():
        if isinstance(module, FeedForward) and module.w13.fp8 and module.w13.weight_scale_inv is None:
            _keep(module.w13, "weight", [_whole_halves(module.w13.weight)], scale_format)
            _keep(module.w2, "weight", [_whole_columns(module.w2.weight)], scale_format)
        elif isinstance(module, Linear) and module not in paired and module.fp8 and module.weight_scale_inv is None:
            _keep(module, "weight", [module.weight], scale_format)
    write_out_for_decode(model)
    return model


def write_out_for_decode(model: DeepseekV3) -> None:
    """Make the dequantised copies that absorbed attention multiplies by, before a step that may be captured needs
    them."""
    dtype = model.embed_tokens.weight.dtype
    for module in model.modules():
        if isinstance(module, Attention) and module.kv_b_proj.weight.device.type != "meta":
            module.kv_b_proj.dense(dtype)


def set_shared_apart(moe: MoE) -> None:
    """Make a network of its own of shared experts that `keep_in_fp8` has stacked behind the routed ones; the same
    values."""
    experts, n_shared = moe.experts, moe.experts.n_shared
    if not n_shared:
        return
    _, hidden, inner = experts.w2.shape
    with torch.device("meta"):
        network = FeedForward(hidden, n_shared * inner, moe.fp8)
    # Gates of all shared experts, then what they gate; columns of all side by side. Torch concatenates bytes in every
    # version, e4m3 in some.
    for linear, name, dim in ((network.w13, "w13", 0), (network.w2, "w2", 1)):
        stack, scale = getattr(experts, name).detach(), getattr(experts, name + SCALE_SUFFIX)
        halves = 2 if dim == 0 else 1
        data, linear.weight_scale_inv = (
            torch.cat([expert for half in part[-n_shared:].chunk(halves, 1) for expert in half], dim)
            for part in (stack.view(torch.uint8), scale)
        )
        linear.weight = nn.Parameter(data.view(stack.dtype), requires_grad=False)
        setattr(experts, name, nn.Parameter(stack[:-n_shared].clone(), requires_grad=False))
        setattr(experts, name + SCALE_SUFFIX, scale[:-n_shared].clone())
    moe.shared_experts, experts.n_shared = network, 0


def whole_blocks(size: int) -> int:
    """A size rounded up to whole blocks."""
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


def _keep_experts(moe: MoE, config: Config, scale_format: str) -> None:
    """Quantise the routed experts, with the shared ones as further experts of the stack, which then share their
    launches."""
    shared, n_shared = moe.shared_experts, config.n_shared_experts
    w13, w2 = [moe.experts.w13.detach()], [moe.experts.w2.detach()]
    if shared is not None and stacks_shared(config):
        gate, up = (half.unflatten(0, (n_shared, -1)) for half in shared.w13.weight.detach().chunk(2))
        w13.append(torch.cat((gate, up), 1))
        w2.append(shared.w2.weight.detach().unflatten(1, (n_shared, -1)).movedim(1, 0))
        moe.shared_experts, moe.experts.n_shared = None, n_shared
    _keep(moe.experts, "w13", [_whole_halves(part) for part in w13], scale_format)
    _keep(moe.experts, "w2", [_whole_columns(part) for part in w2], scale_format)


def _keep_down(attention: Attention, scale_format: str) -> None:
    """Quantise the matrices that multiply the hidden state as one matrix: the rows of the query, then of latent and
    key."""
    config = attention.config
    query = attention.q_proj if config.q_lora_rank is None else attention.q_a_proj
    parts = [
        projection.weight.detach() for projection in (query, attention.kv_a_proj_with_mqa) if projection is not None
    ]
    with torch.device("meta"):
        attention.qkv_a_proj = Linear(config.hidden_size, sum(map(len, parts)), fp8=True)
    _keep(attention.qkv_a_proj, "weight", parts, scale_format)
    if config.q_lora_rank is None:
        attention.q_proj = None
    else:
        attention.q_a_proj = None
    attention.kv_a_proj_with_mqa = None


def _keep(module: nn.Module, name: str, weights: list[Tensor], scale_format: str) -> None:
    """Replace a plain weight by quantised ones, stacked."""
    quantized = [_quantized_or_meta(weight, scale_format) for weight in weights]
    data, scale = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*quantized, strict=True))
    setattr(module, name, nn.Parameter(data, requires_grad=False))
    module.register_buffer(name + SCALE_SUFFIX, scale.contiguous())


def _quantized_or_meta(weight: Tensor, scale_format: str) -> tuple[Tensor, Tensor]:
    """Data and scales of a weight; on the meta device only their shapes."""
    if weight.device.type != "meta":
        return quantize_weight(weight, scale_format)[:2]
    *stack, rows, columns = weight.shape
    grid = [*stack, whole_blocks(rows) // FP8_BLOCK[0], whole_blocks(columns) // FP8_BLOCK[1]]
    data = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
    return data, torch.empty(grid, dtype=torch.float32, device="meta")


def _whole_halves(w13: Tensor) -> Tensor:
    """``[..., 2I, H]`` with the rows of gate and of up each padded to whole blocks."""
    gate, up = w13.detach().chunk(2, -2)
    more = whole_blocks(gate.shape[-2]) - gate.shape[-2]
    if not more:
        return w13.detach()
    return torch.cat([nn.functional.pad(part, (0, 0, 0, more)) for part in (gate, up)], -2)


def _whole_columns(w2: Tensor) -> Tensor:
    """``[..., H, I]`` with its columns padded to whole blocks."""
    return nn.functional.pad(w2.detach(), (0, whole_blocks(w2.shape[-1]) - w2.shape[-1]))
