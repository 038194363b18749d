"""The expert block out of portable Triton kernels: products that gather their rows, SwiGLU, and the weighted sum.

Tokens are never copied to their experts: the products read token ``source[r] // k`` for row r of the batch.
The backward keeps no expert outputs. With dA' = dout @ W2, not yet weighted, the gradient of a routing weight is
<dA', A> (SonicMoE, arXiv 2512.14080), and dW2 = dout.T @ (weight * A).

Names: `p_` pointer, `i_` index of a program or tile, `o_` offsets, `m_` mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dskernels.fp8.triton import quantize
from dskernels.fp8.triton_swiglu import swiglu_quantize
from dskernels.gemm.weights import quantized_weight, transposed
from dskernels.grouped_gemm.triton import product
from dskernels.grouped_gemm.triton_wgrad import grouped_wgrad, quantize_grouped
from dskernels.moe.config import choose_width
from dskernels.moe.triton import sort, weighted_sum
from dskernels.portable import cast, reason_against_e4m3
from dskernels.types import Fp8Tensor

# ---- kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def swiglu_kernel(p_x, p_out, width, stride_x, stride_out, WIDTH: tl.constexpr):
    """WIDTH columns of silu(gate) * up of one row, gate and up being the halves of a row of 2 * width."""
    columns = tl.cdiv(width, WIDTH)
    i_r = (tl.program_id(0) // columns).to(tl.int64)
    o_c = tl.program_id(0) % columns * WIDTH + tl.arange(0, WIDTH)
    m_c = o_c < width
    gate = tl.load(p_x + i_r * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    up = tl.load(p_x + i_r * stride_x + width + o_c, mask=m_c, other=0.0).to(tl.float32)
    tl.store(p_out + i_r * stride_out + o_c, cast(gate * tl.sigmoid(gate) * up, p_out.dtype.element_ty), mask=m_c)


@triton.jit
def swiglu_backward_kernel(
    p_x,
    p_dhidden,
    p_source,
    p_weights,
    p_dx,
    p_hidden,
    p_dweights,
    width,
    stride_x,
    stride_dhidden,
    stride_dx,
    stride_hidden,
    HAS_WEIGHTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Of one row: dx [2 * width], weight * hidden [width], and dweight = <dhidden, hidden>; dhidden is unweighted."""
    i_r = tl.program_id(0).to(tl.int64)
    weight = 1.0
    if HAS_WEIGHTS:
        choice = tl.load(p_source + i_r)
        if choice < 0:  # a row after the last expert's: nobody reads it
            return
        weight = tl.load(p_weights + choice)
    products = tl.zeros([WIDTH], tl.float32)
    for first in range(0, width, WIDTH):
        o_c = first + tl.arange(0, WIDTH)
        m_c = o_c < width
        gate = tl.load(p_x + i_r * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)
        up = tl.load(p_x + i_r * stride_x + width + o_c, mask=m_c, other=0.0).to(tl.float32)
        dhidden = tl.load(p_dhidden + i_r * stride_dhidden + o_c, mask=m_c, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        products += dhidden * silu * up
        # silu' = sigmoid * (1 + gate * (1 - sigmoid))
        dgate = dhidden * weight * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        dup = dhidden * weight * silu
        dtype = p_dx.dtype.element_ty
        tl.store(p_dx + i_r * stride_dx + o_c, cast(dgate, dtype), mask=m_c)
        tl.store(p_dx + i_r * stride_dx + width + o_c, cast(dup, dtype), mask=m_c)
        tl.store(p_hidden + i_r * stride_hidden + o_c, cast(silu * up * weight, dtype), mask=m_c)
    if HAS_WEIGHTS:
        tl.store(p_dweights + choice, tl.sum(products, 0))


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up [R, I] of `gate_up` [R, 2I]."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    hidden = gate_up.new_empty(rows, width)
    if hidden.numel():
        block = choose_width(width)
        swiglu_kernel[(rows * triton.cdiv(width, block),)](
            gate_up, hidden, width, gate_up.stride(0), hidden.stride(0), WIDTH=block, num_warps=4
        )
    return hidden


def swiglu_backward(
    gate_up: Tensor, dhidden: Tensor, source: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradient of `gate_up`, the weighted activation, and the gradient of the weights (0 for dropped choices).

    Rows that have no choice (source -1) are left as they are, as no product reads them.
    """
    rows, width = dhidden.shape
    dgate_up, hidden = torch.empty_like(gate_up), torch.empty_like(dhidden)
    dweights = None if weights is None else torch.zeros_like(weights)
    if rows:
        swiglu_backward_kernel[(rows,)](
            gate_up,
            dhidden,
            source,
            weights,
            dgate_up,
            hidden,
            dweights,
            width,
            gate_up.stride(0),
            dhidden.stride(0),
            dgate_up.stride(0),
            hidden.stride(0),
            HAS_WEIGHTS=weights is not None,
            WIDTH=choose_width(width),
            num_warps=4,
        )
    return dgate_up, hidden, dweights


# ---- launchers: a network is the routed experts, or the shared one as a single expert that takes every token ---------


Operand = Tensor | Fp8Tensor


class Batch(NamedTuple):
    """The rows of a network: row r is token ``source[r] // top_k``; without a source, token r."""

    offsets: Tensor
    source: Tensor | None
    top_k: int
    rows: int


def fused_experts(
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    shared_w13: Tensor | None,
    shared_w13_scale: Tensor | None,
    shared_w2: Tensor | None,
    shared_w2_scale: Tensor | None,
    fp8: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [T, H], and, if asked to keep them for the backward, what enters the SwiGLU of both networks."""
    offsets, index, source = sort(experts, w13.shape[0])
    a = _activation(x, fp8)
    routed = Batch(offsets, source, experts.shape[1], source.shape[0])
    gate_up = _linear(a, _weight(w13, w13_scale, fp8), routed, x.dtype, gather=True)
    y = _linear(_hidden(gate_up, fp8), _weight(w2, w2_scale, fp8), routed, x.dtype)
    shared_gate_up, residual = x.new_empty(0, 0), None
    if shared_w13 is not None and shared_w2 is not None:
        every = _every_token(x)
        shared_gate_up = _linear(a, _weight(shared_w13, shared_w13_scale, fp8), every, x.dtype)
        residual = _linear(_hidden(shared_gate_up, fp8), _weight(shared_w2, shared_w2_scale, fp8), every, x.dtype)
    out = weighted_sum(y, index, weights, residual)
    if not keep:
        gate_up, shared_gate_up = (t.new_empty(0, t.shape[1]) for t in (gate_up, shared_gate_up))
    return out, gate_up, shared_gate_up


def fused_experts_backward(
    dout: Tensor,
    x: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w2: Tensor,
    w2_scale: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    shared_w13: Tensor | None,
    shared_w13_scale: Tensor | None,
    shared_w2: Tensor | None,
    shared_w2_scale: Tensor | None,
    gate_up: Tensor,
    shared_gate_up: Tensor,
    fp8: bool,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of x, w13, w2, the weights, and both shared weights; empty where one is not needed."""
    needs_dx, needs_dw13, needs_dw2, needs_dweights, needs_shared_dw13, needs_shared_dw2 = needs
    offsets, index, source = sort(experts, w13.shape[0])
    da = _activation(dout, fp8)
    kept = gate_up.shape[0] > 0
    a = x if kept else _activation(x, fp8)
    routed = Batch(offsets, source, experts.shape[1], source.shape[0])

    def backward(network, w13, w13_scale, w2, w2_scale, gate_up, weights, needs_dw13, needs_dw2):
        if not kept:
            gate_up = _linear(a, _weight(w13, w13_scale, fp8), network, x.dtype, gather=True)
        dhidden = _linear(da, _weight(w2, w2_scale, fp8, transpose=True), network, x.dtype, gather=True)
        dgate_up, hidden, dweights = swiglu_backward(gate_up, dhidden, network.source, weights)
        dx = dw13 = dw2 = None
        if needs_dx:
            w13_t = _weight(w13, w13_scale, fp8, transpose=True)
            dx = _linear(_activation(dgate_up, fp8), w13_t, network, x.dtype)
        if needs_dw13:
            dw13 = _wgrad(dgate_up, x, network, w13, fp8, gather="x")
        if needs_dw2:
            dw2 = _wgrad(dout, hidden, network, w2, fp8, gather="dy")
        return dx, dw13, dw2, dweights

    dx, dw13, dw2, dweights = backward(
        routed, w13, w13_scale, w2, w2_scale, gate_up, weights.contiguous(), needs_dw13, needs_dw2
    )
    shared_dx = shared_dw13 = shared_dw2 = None
    if shared_w13 is not None and shared_w2 is not None and (needs_dx or needs_shared_dw13 or needs_shared_dw2):
        shared_dx, shared_dw13, shared_dw2, _ = backward(
            _every_token(x),
            shared_w13,
            shared_w13_scale,
            shared_w2,
            shared_w2_scale,
            shared_gate_up,
            None,
            needs_shared_dw13,
            needs_shared_dw2,
        )
    if needs_dx:
        dx = weighted_sum(dx, index, None, shared_dx)
    gradients = (dx, dw13, dw2, dweights if needs_dweights else None, shared_dw13, shared_dw2)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _every_token(x: Tensor) -> Batch:
    # Made on the device: a tensor of the host's numbers could not be captured in a CUDA graph.
    return Batch(torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0], None, 1, x.shape[0])


def _activation(x: Tensor, fp8: bool) -> Operand:
    return Fp8Tensor(*quantize(x, 1, 128, False, False)) if fp8 else x


def _hidden(gate_up: Tensor, fp8: bool) -> Operand:
    return Fp8Tensor(*swiglu_quantize(gate_up, False)) if fp8 else swiglu(gate_up)


def _weight(weight: Tensor, scale: Tensor | None, fp8: bool, transpose: bool = False) -> Operand:
    """A stack of weights, or one weight as a stack of one, as the operand of a product."""
    stack = (lambda matrices: matrices) if weight.dim() == 3 else (lambda matrix: matrix[None])
    if not fp8:
        return stack(weight.mT if transpose else weight)
    if scale is None:
        quantized = quantized_weight(weight, transpose=transpose, impl="triton")
    else:
        quantized = Fp8Tensor(weight, scale, (128, 128))
        quantized = transposed(quantized) if transpose else quantized
    return Fp8Tensor(stack(quantized.data), stack(quantized.scale), quantized.block)


def _linear(a: Operand, b: Operand, batch: Batch, dtype: torch.dtype, gather: bool = False) -> Tensor:
    """Product of each row of the batch and its expert's matrix; with `gather`, `a` holds the tokens, else the rows."""
    a_data, a_scale = (a.data, a.scale) if isinstance(a, Fp8Tensor) else (a, None)
    b_data, b_scale = (b.data, b.scale) if isinstance(b, Fp8Tensor) else (b, None)
    out = a_data.new_empty((batch.rows, b_data.shape[1]), dtype=dtype)
    source = batch.source if gather else None
    product(a_data, a_scale, b_data, b_scale, batch.offsets, out, source, batch.top_k)
    return out


def _wgrad(dy: Tensor, x: Tensor, batch: Batch, weight: Tensor, fp8: bool, gather: str) -> Tensor:
    """Gradient of `weight`; the operand named by `gather` holds the tokens, the other the rows of the batch."""
    dw = torch.empty_like(weight, memory_format=torch.contiguous_format)
    out = dw if weight.dim() == 3 else dw[None]
    if fp8:
        tokens = (batch.offsets, False, batch.source, batch.top_k)
        rows = (batch.offsets, False)
        dy, dy_scale = quantize_grouped(dy, *(tokens if gather == "dy" else rows))
        x, x_scale = quantize_grouped(x, *(tokens if gather == "x" else rows))
        grouped_wgrad(dy, dy_scale, x, x_scale, batch.offsets, out, False)
    elif batch.source is None:
        grouped_wgrad(dy, None, x, None, batch.offsets, out, False)
    else:
        grouped_wgrad(dy, None, x, None, batch.offsets, out, False, batch.source, batch.top_k, gather)
    return dw


def fused_experts_supports(x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` cannot run the block, or None."""
    return reason_against_e4m3(x.device) if args[10] else None


def fused_experts_backward_supports(dout: Tensor, x: Tensor, *args: object) -> str | None:
    """Why the GPU of `x` cannot run its backward, or None."""
    return reason_against_e4m3(x.device) if args[12] else None
