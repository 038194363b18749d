"""The expert block on Hopper: the steps that `dskernels.moe.experts` puts together, with grouped products in CUDA C++.

The grouped products load whole tiles by the tensor memory accelerator, which cannot gather rows. So the rows of tokens
are copied to their experts first; if the products run in e4m3, the copies are in e4m3, half the bytes. The products of
the shared expert are plain ones, by `fp8_gemm` or, for plain weights, by `half_gemm` and torch (cuBLAS). Steps that
only move rows (sort, copy, SwiGLU, weighted sum) are the portable Triton kernels, which reach memory speed. A few
tokens in e4m3 take two kernels for the whole block (hopper_few.py).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskernels.cuda.compiler import reason_against_cuda
from dskernels.cuda.tensor_map import RAGGED_ROWS
from dskernels.device import empty
from dskernels.fp8.api import _quantize, _swiglu_quantize
from dskernels.fp8.hopper import (
    swiglu_quantize_kept_supports,
    swiglu_quantize_rows,
    swiglu_quantize_supports,
)
from dskernels.gemm.api import _fp8_gemm
from dskernels.gemm.hopper_small import half_gemm, takes_half
from dskernels.gemm.weights import weight_operand
from dskernels.grouped_gemm import hopper as grouped
from dskernels.grouped_gemm.hopper_quantize import quantize_grouped
from dskernels.moe import experts, hopper_few, hopper_swiglu, triton_few
from dskernels.moe.config_matvec import MOST_TOKENS
from dskernels.moe.experts import Batch, Kinds, Network, Operand, Rows, Steps, parts
from dskernels.moe.experts_rows import rows_operations
from dskernels.moe.experts_split import split_operations
from dskernels.moe.packed import packed_width
from dskernels.moe.triton import permute_rows, weighted_sum
from dskernels.moe.triton_packed import packed
from dskernels.moe.triton_swiglu import swiglu
from dskernels.recording import Recorded
from dskernels.types import Fp8Tensor

HALF = (torch.bfloat16, torch.float16)
# Up to this many rows a plain product is `half_gemm`'s, above it is torch's. Microseconds on an H200 of a block with a
# separate shared network whose products are `half_gemm`'s (first figure) or torch's (second), for 32, 128 and 256
# tokens. 64 experts of 2048 x 1408, with a shared network of 2816: 301 and 313, 317 and 323, 336 and 334. 16 experts of
# 1024 x 256, up to 128 tokens: 36 and 43, 40 and 46. 32 experts of 7168 x 2048: 726 and 733, 736 and 741, 794 and 777.
MOST_HALF_ROWS = 128


def _rows(tokens: Operand, batch: Batch) -> Rows:
    if batch.index is None or batch.source is None:
        return Rows(tokens)
    return Rows(permute_rows(tokens, batch.index, batch.source))


def _product(rows: Rows, weight: Operand, batch: Batch, dtype: torch.dtype) -> Tensor:
    (a, a_scale), (b, b_scale) = parts(rows.data), parts(weight)
    out = empty(a, (batch.rows, b.shape[-2]), dtype)
    if batch.offsets is not None:
        grouped.grouped_gemm_leaving(a, a_scale, b, b_scale, batch.offsets, out)
    elif a_scale is not None and b_scale is not None:
        _fp8_gemm(a, a_scale, b, b_scale, 128, None, out, False)
    elif _are_few(a, b):
        half_gemm(a, b, out)
    else:
        torch.mm(a, b.mT, out=out)
    return out


def _are_few(a: Tensor, b: Tensor) -> bool:
    """Whether a plain product has so few rows that it is `half_gemm`'s, not torch's."""
    return a.shape[0] <= MOST_HALF_ROWS and takes_half(a, b)


def _wgrad(dy: Rows, x: Rows, batch: Batch, weight: Tensor) -> Tensor:
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    (dy_rows, _), (x_rows, _) = parts(dy.data), parts(x.data)
    if batch.offsets is not None:
        grouped.grouped_wgrad(dy_rows, None, x_rows, None, batch.offsets, dw, False)
    else:
        torch.mm(dy_rows.mT, x_rows, out=dw)
    return dw


def _fp8_wgrad(dy: Rows, x: Rows, batch: Batch, weight: Tensor) -> Tensor:
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dy_t, x_t = _along_tokens(dy, batch), _along_tokens(x, batch)
    if batch.offsets is not None:
        grouped.grouped_wgrad(*dy_t, *x_t, batch.offsets, dw, False)
    else:
        _fp8_gemm(*dy_t, *x_t, 1, None, dw, False)
    return dw


def _along_tokens(rows: Rows, batch: Batch) -> tuple[Tensor, Tensor]:
    """Data and scale of rows as Wgrad takes them: transposed, in tiles of 128 tokens of one expert.

    Rows that come as an `Fp8Tensor` already are in that form, from `hopper_swiglu`.
    """
    if isinstance(rows.data, Fp8Tensor):
        return rows.data.data, rows.data.scale
    if batch.offsets is not None:
        return quantize_grouped(rows.data, batch.offsets, False, rows.source, batch.top_k, leave=True)
    return _quantize(rows.data, 128, 1, False, True)


PLAIN = Steps(
    operand=lambda x: x,
    every_token=lambda x: Batch(x.shape[0]),
    rows=_rows,
    weight=experts.plain_weight,
    product=_product,
    hidden=lambda gate_up, batch: swiglu(gate_up, batch.offsets),
    kept=lambda gate_up: gate_up,
    hidden_and_kept=lambda gate_up, batch: (swiglu(gate_up, batch.offsets), gate_up),
    gradient=experts.gradient_by(lambda x: x),
    dispatched=lambda x: x,
    wgrad=_wgrad,
    wgrad_requantizes=False,
    few=triton_few.fused_experts,
)


def _operand(x: Tensor) -> Fp8Tensor:
    return Fp8Tensor(*_quantize(x, 1, 128, False, False))


def _hidden(gate_up: Tensor, batch: Batch) -> Fp8Tensor:
    if batch.offsets is None or swiglu_quantize_supports(gate_up, False, False) is not None:
        return Fp8Tensor(*_swiglu_quantize(gate_up, False, False))
    return Fp8Tensor(*swiglu_quantize_rows(gate_up, batch.offsets))


def _hidden_and_kept(gate_up: Tensor, batch: Batch) -> tuple[Fp8Tensor, Tensor]:
    if swiglu_quantize_kept_supports(gate_up) is not None:
        return _hidden(gate_up, batch), packed(gate_up)
    kept = empty(gate_up, (gate_up.shape[0], packed_width(gate_up.shape[1])), torch.uint8)
    return Fp8Tensor(*swiglu_quantize_rows(gate_up, batch.offsets, kept)), kept


_written_out = experts.gradient_by(_operand)  # the gradient of the SwiGLU in x's dtype, quantised by separate kernels


def _gradient(
    kept: Tensor, dhidden: Tensor, batch: Batch, weights: Tensor | None
) -> tuple[Operand, Rows, Rows, Tensor | None]:
    """`Steps.gradient`, for gate and up kept in e4m3: by one kernel if it takes these rows."""
    step = hopper_swiglu.swiglu_backward if hopper_swiglu.takes(dhidden, batch) else _written_out
    return step(kept, dhidden, batch, weights)


FP8 = replace(
    PLAIN,
    operand=_operand,
    weight=functools.partial(weight_operand, impl=None),
    hidden=_hidden,
    hidden_and_kept=lambda gate_up, batch: (_hidden(gate_up, batch), gate_up),
    gradient=_written_out,
    dispatched=lambda dout: Fp8Tensor(*_quantize(dout, 1, 128, True, False)),
    wgrad=_fp8_wgrad,
    wgrad_requantizes=True,
    few=hopper_few.fused_experts,
)

PACKING = replace(FP8, kept=packed, hidden_and_kept=_hidden_and_kept, gradient=_gradient)
KINDS = Kinds(PLAIN, FP8, PACKING)


@Recorded
def _routed(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, residual: Tensor) -> Tensor:
    """`residual` plus the weighted sum of the routed experts, for plain weights; the part of `_in_two` that is ours."""
    network = Network(w13, None, w2, None)
    batch, index = experts.routed_batch(ids, network)
    y, _ = experts.network_forward(PLAIN, x, network, batch, x.dtype, False)
    return weighted_sum(y, index, weights, residual)


def fused_experts(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward of the expert block.

    A call that contains torch's products cannot be recorded (`dskernels.recording`). If the shared network of plain
    weights is computed by these, the block runs in two parts: the shared network, and the rest, which is recorded.
    """
    return _in_two(*args) if _has_products_of_torch(args) else _forward(*args)


def _has_products_of_torch(args: tuple) -> bool:
    """Whether this call computes a shared network of plain weights by products of torch, and keeps nothing."""
    x, w13, shared_w13, shared_w2, fp8, keep, n_shared = (args[i] for i in (0, 1, 7, 9, 11, 12, 15))
    if fp8 or keep or n_shared or shared_w13 is None or x.shape[0] <= MOST_TOKENS:
        return False
    if _are_few(x, shared_w13) and takes_half(shared_w2, shared_w2):
        return False
    # One that follows the routed experts in memory is one more of them, see `experts._one_stack`.
    return shared_w13.data_ptr() != w13.data_ptr() + w13.numel() * w13.element_size()


def _in_two(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward in two parts: the separate shared network, then the routed experts (`_routed`)."""
    x, w13, _, w2, _, weights, ids, *shared = args[:11]
    network = Network(*shared)
    residual, _ = experts.network_forward(PLAIN, x, network, Batch(x.shape[0]), x.dtype, False)
    out = _routed(x, w13, w2, weights, ids, residual)
    return out, *(empty(x, (0, w.shape[-2]), x.dtype) for w in (w13, network.w13))


_forward, fused_experts_backward = experts.operations(KINDS)
feed_forward, feed_forward_backward = experts.dense_operations(KINDS)
fused_experts_backward_inputs, fused_experts_backward_weights = split_operations(KINDS)
expert_rows, expert_rows_backward, expert_rows_backward_inputs, expert_rows_backward_weights = rows_operations(KINDS)


def fused_experts_supports(x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the block, or None."""
    *block, fp8, _, _, _, _ = args
    return _reason_against(x, block, bool(fp8))


def fused_experts_backward_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the backward of the block, or None."""
    *block, _, _, fp8, _ = args
    return _reason_against(x, block, bool(fp8)) or (_reason_against_rows("dout", dout) if fp8 else None)


def feed_forward_supports(x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take a single network, or None."""
    *network, fp8, _, _, _ = args
    return _reason_against_network(x, network, bool(fp8), x.shape[0])


def feed_forward_backward_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the backward of a single network, or None."""
    *network, _, fp8, _ = args
    reason = _reason_against_network(x, network, bool(fp8), x.shape[0])
    return reason or (_reason_against_rows("dout", dout) if fp8 else None)


def fused_experts_backward_inputs_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the first half of the block's backward, or None."""
    *block, _, _, fp8 = args
    return fused_experts_backward_supports(dout, x, *block, None, None, fp8, None)


def fused_experts_backward_weights_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the second half of the block's backward, or None."""
    *block, _, _, _, _, _, _, fp8, _ = args
    return fused_experts_backward_supports(dout, x, *block, None, None, fp8, None)


def expert_rows_supports(x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the block without its final sum (`dskernels.moe.rows`), or None."""
    *network, ids, _, fp8, _, _, _ = args
    return _reason_against(x, [*network, None, ids], bool(fp8))


def expert_rows_backward_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the backward of that, or its first half, or None."""
    return fused_experts_backward_supports(dout, x, *args[:6], None, None, args[8], None)


def expert_rows_backward_weights_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why these kernels do not take the second half of that backward, or None."""
    return fused_experts_backward_supports(dout, x, *args[:6], None, None, args[10], None)


expert_rows_backward_inputs_supports = expert_rows_backward_supports


def _reason_against(x: Tensor, block: Sequence[object], fp8: bool) -> str | None:
    """Why the block is not taken, or None; `block` has the operation's tensors from w13 on."""
    *network, _, ids = block[:6]
    if not isinstance(ids, Tensor):
        raise TypeError("experts: expected a tensor")
    return _reason_against_network(x, network, fp8, ids.numel())


def _reason_against_network(x: Tensor, network: Sequence[object], fp8: bool, rows: int) -> str | None:
    """Why a network is not taken, or None; `network` is w13 and its scale, w2 and its scale, and so many rows go
    through it."""
    w13, w13_scale, w2, w2_scale = network
    if not (isinstance(w13, Tensor) and isinstance(w2, Tensor)):
        raise TypeError("w13, w2: expected tensors")
    hidden, inner = x.shape[1], w2.shape[-1]
    if rows == 0 or hidden == 0 or inner == 0:
        return "there is nothing to multiply"
    if rows >= RAGGED_ROWS:
        return f"it takes fewer than 2^30 rows, and there are {rows}"
    if not fp8 and x.dtype not in HALF:
        return f"the products take e4m3, bf16 and fp16, x is {str(x.dtype).removeprefix('torch.')}"
    whole = 16 if fp8 else 8
    if hidden % whole or inner % whole:
        return f"rows must be of whole 16 bytes, there are H = {hidden} and I = {inner} columns"
    for name, weight, scale in (("w13", w13, w13_scale), ("w2", w2, w2_scale)):
        # A weight that is quantised inside gets the layout that the products need.
        if fp8 and scale is None:
            continue
        if weight.data_ptr() % 16 or not weight.is_contiguous():
            return f"{name} must be contiguous and aligned to 16 bytes, its strides are {list(weight.stride())}"
    return (_reason_against_rows("x", x) if fp8 else None) or reason_against_cuda()


def _reason_against_rows(name: str, tokens: Tensor) -> str | None:
    """Why these tokens cannot be quantised along the rows of an expert, or None; plain tokens are copied first."""
    if tokens.data_ptr() % 16 or tokens.stride(0) * tokens.element_size() % 16:
        return f"rows of {name} must be aligned to 16 bytes, its strides are {list(tokens.stride())}"
    return None
