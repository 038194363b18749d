"""The expert block made of portable Triton kernels: the steps that `dskernels.moe.experts` puts together.

Tokens are never copied to their experts: the grouped products gather them, reading token ``source[r] // k`` for row r.
The shared expert is a grouped product with one group.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dskernels.fp8.layout import empty_scale
from dskernels.fp8.triton import quantize
from dskernels.fp8.triton_swiglu import swiglu_quantize
from dskernels.gemm.weights import weight_operand
from dskernels.grouped_gemm.triton import product
from dskernels.grouped_gemm.triton_wgrad import grouped_wgrad, quantize_grouped
from dskernels.moe import experts, triton_few
from dskernels.moe.experts import Batch, Kinds, Operand, Rows, Steps, parts, stack, stacked
from dskernels.moe.experts_rows import rows_operations
from dskernels.moe.experts_split import split_operations
from dskernels.moe.triton_packed import packed
from dskernels.moe.triton_swiglu import swiglu
from dskernels.portable import reason_against_e4m3
from dskernels.types import Fp8Tensor


def _every_token(x: Tensor) -> Batch:
    # Computed on the device, as a copy from the host could not be captured in a CUDA graph.
    return Batch(x.shape[0], offsets=torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0])


def _offsets(batch: Batch) -> Tensor:
    if batch.offsets is None:
        raise ValueError("batch.offsets: expected a tensor, as `_every_token` and the sort make it, got None")
    return batch.offsets


def _rows(tokens: Operand, batch: Batch) -> Rows:
    # The product wants scales in the layout of `Fp8Tensor`, with a contiguous row index. Those that came from another
    # GPU have the scales of each token side by side.
    if isinstance(tokens, Fp8Tensor) and tokens.scale.stride(0) != 1:
        scale = empty_scale(tokens.scale, tuple(tokens.scale.shape), tokens.block)
        tokens = Fp8Tensor(tokens.data, scale.copy_(tokens.scale), tokens.block)
    return Rows(tokens, batch.source)


def _product(rows: Rows, weight: Operand, batch: Batch, dtype: torch.dtype) -> Tensor:
    (a, a_scale), (b, b_scale) = parts(rows.data), parts(stacked(weight))
    out = a.new_empty((batch.rows, b.shape[1]), dtype=dtype)
    product(a, a_scale, b, b_scale, _offsets(batch), out, rows.source, batch.top_k)
    return out


def _wgrad(dy: Rows, x: Rows, batch: Batch, weight: Tensor) -> Tensor:
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    gather = "dy" if dy.source is not None else "x" if x.source is not None else None
    operands = parts(dy.data)[0], None, parts(x.data)[0], None
    grouped_wgrad(*operands, _offsets(batch), stack(dw), False, batch.source, batch.top_k, gather)
    return dw


def _fp8_wgrad(dy: Rows, x: Rows, batch: Batch, weight: Tensor) -> Tensor:
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dy_t, x_t = (quantize_grouped(parts(r.data)[0], _offsets(batch), False, r.source, batch.top_k) for r in (dy, x))
    grouped_wgrad(*dy_t, *x_t, _offsets(batch), stack(dw), False)
    return dw


PLAIN = Steps(
    operand=lambda x: x,
    every_token=_every_token,
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
    return Fp8Tensor(*quantize(x, 1, 128, False, False))


def _hidden(gate_up: Tensor, _: Batch) -> Fp8Tensor:
    return Fp8Tensor(*swiglu_quantize(gate_up, False))


FP8 = replace(
    PLAIN,
    operand=_operand,
    weight=functools.partial(weight_operand, impl="triton"),
    hidden=_hidden,
    hidden_and_kept=lambda gate_up, batch: (_hidden(gate_up, batch), gate_up),
    gradient=experts.gradient_by(_operand),
    dispatched=lambda dout: Fp8Tensor(*quantize(dout, 1, 128, True, False)),
    wgrad=_fp8_wgrad,
    wgrad_requantizes=True,
    few=None,
)


PACKING = replace(FP8, kept=packed, hidden_and_kept=lambda gate_up, batch: (_hidden(gate_up, batch), packed(gate_up)))
KINDS = Kinds(PLAIN, FP8, PACKING)

fused_experts, fused_experts_backward = experts.operations(KINDS)
feed_forward, feed_forward_backward = experts.dense_operations(KINDS)
fused_experts_backward_inputs, fused_experts_backward_weights = split_operations(KINDS)
expert_rows, expert_rows_backward, expert_rows_backward_inputs, expert_rows_backward_weights = rows_operations(KINDS)


def _e4m3_at(place: int) -> Callable[..., str | None]:
    """The `supports` function of an operation whose argument at this position says whether it multiplies in e4m3."""

    def supports(*args: Any) -> str | None:
        return reason_against_e4m3(args[0].device) if args[place] else None

    return supports


fused_experts_supports = _e4m3_at(11)
fused_experts_backward_supports = fused_experts_backward_inputs_supports = _e4m3_at(14)
fused_experts_backward_weights_supports = _e4m3_at(18)
feed_forward_supports, feed_forward_backward_supports = _e4m3_at(5), _e4m3_at(7)
expert_rows_supports = _e4m3_at(7)
expert_rows_backward_supports = expert_rows_backward_inputs_supports = _e4m3_at(10)
expert_rows_backward_weights_supports = _e4m3_at(12)
