"""The public operation for attention within packed sequences, with expanded keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dskernels.dispatch import Operation, differentiating
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.validate import HALF_OR_SINGLE, check_bool, check_float, check_tensor

FLOATS = (*HALF_OR_SINGLE, torch.float64)


@repeated
def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    k_rope: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend within each of several packed sequences.

    out[i, h] = sum over s of softmax_s(scale * q[i, h] . k[s, g]) * v[s, g], over the keys s of the sequence of query
    i, where g is the key head of query head h. Causal as if the last query of a sequence stood at its last key: query i
    of n sees the keys j < m - n + 1 + i of m.

    Args:
        q: bf16, fp16 or fp32 ``[T, H, D]`` (192 in DeepSeek-V3: 128 without and 64 with rotary embedding). Like `k`,
            `v` and `k_rope` it may be strided, with a contiguous last dimension. (fp64 runs on the reference.)
        k: ``[Tk, Hk, D]`` in q's dtype, Hk a divisor of H; where `k_rope` is given, ``[Tk, Hk, D - rope]``, the part of
            the key that is each head's own.
        v: ``[Tk, Hk, V]`` in q's dtype. The Triton kernels take D and V up to 256; the Hopper kernel takes D 192 (and a
            `k_rope` of 64 or none) and V 128, in bf16 and fp16.
        cu_seqlens_q: int32 ``[S + 1]``, ascending from 0: the queries of sequence s are the rows from
            ``cu_seqlens_q[s]`` to ``cu_seqlens_q[s + 1]``.
        cu_seqlens_k: int32 ``[S + 1]``, likewise for its keys and values, of which there may be more or fewer.
        scale: factor of the scores; the Hopper kernel wants it above 0.
        causal: whether a query is kept from the keys after its own.
        k_rope: ``[Tk, rope]`` in q's dtype, the last part of the key, which all heads share.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        out ``[T, H, V]`` in q's dtype, and the natural-log log-sum-exp of the scaled scores, fp32 ``[H, T]`` (fp64 with
        q). Queries that see nothing, and rows of no sequence, have out 0 and lse -inf; queries with a score of +inf
        have NaN for both. Repeated calls return the same bits.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit, or `scale` is not finite.

    If cu_seqlens does not ascend, or exceeds the number of rows, the results of the rows concerned are unspecified, but
    nothing is read or written out of bounds. Nothing waits for the device. A NaN does not leave its sequence.
    Differentiable in q, k, v and k_rope, through both results; repeated calls give gradients with the same bits. The
    backward of the Hopper kernels needs temporary memory: 776 bytes for each query and head, and with a shared rope
    part 256 for each key and head.
    Source: DeepSeek-V3 report (arXiv 2412.19437), eqs. 4 and 10; FlashAttention-2 (arXiv 2307.08691), section 3.
    """
    check_tensor("q", q, dtype=FLOATS, shape=("T", "H", "D"))
    _, heads, head_dim = q.shape
    rope_dim = 0
    if k_rope is not None:
        check_tensor("k_rope", k_rope, dtype=q.dtype, shape=("Tk", "rope"), like=q)
        rope_dim = k_rope.shape[1]
        if not 0 < rope_dim < head_dim:
            raise ValueError(f"k_rope: expected fewer columns than q's {head_dim}, and at least 1, got {rope_dim}")
    check_tensor("k", k, dtype=q.dtype, shape=("Tk", "Hk", head_dim - rope_dim), like=q)
    tokens_k, heads_k, _ = k.shape
    if heads_k == 0 or heads % heads_k:
        raise ValueError(f"k: expected a number of heads that divides q's {heads}, got {heads_k}")
    check_tensor("v", v, dtype=q.dtype, shape=(tokens_k, heads_k, "V"), like=q)
    if k_rope is not None and k_rope.shape[0] != tokens_k:
        raise ValueError(f"k_rope: expected {tokens_k} rows like k, got {k_rope.shape[0]}")
    check_tensor("cu_seqlens_q", cu_seqlens_q, dtype=torch.int32, shape=("S + 1",), like=q)
    if cu_seqlens_q.shape[0] == 0:
        raise ValueError("cu_seqlens_q: expected shape [S + 1], at least one value, got [0]")
    check_tensor("cu_seqlens_k", cu_seqlens_k, dtype=torch.int32, shape=tuple(cu_seqlens_q.shape), like=q)
    check_float("scale", scale)
    check_bool("causal", causal)
    return mla_prefill_op(q, k, k_rope, v, cu_seqlens_q, cu_seqlens_k, scale, causal, q.dtype, impl=impl)


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _reference(
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    # The reference computes in fp32 whatever q is, and rounds to q's dtype only at the end.
    return reference.mla_prefill(q.to(out_dtype), k, v, cu_q, cu_k, scale=scale, causal=causal, k_rope=k_rope)


def _backward_reference(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    k_rope: Tensor | None,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with differentiating():
        leaves = [None if x is None else x.detach().requires_grad_() for x in (q, k, k_rope, v)]
        outputs = _reference(*leaves, cu_q, cu_k, scale, causal, out.dtype)  # type: ignore[call-arg, arg-type]
        given = [x for x in leaves if x is not None]
        if cu_q.shape[0] > 1:
            gradients = [x.contiguous() for x in torch.autograd.grad(outputs, given, (dout, dlse))]
        else:  # without a sequence the results are constants
            gradients = [x.new_zeros(x.shape) for x in given]
    if k_rope is None:
        gradients.insert(2, k.new_empty(0))
    return tuple(gradients)  # type: ignore[return-value]


def _fake(q, k, k_rope, v, cu_q, cu_k, scale, causal, out_dtype):
    tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_empty((tokens, heads, v.shape[2]), dtype=out_dtype)
    return out, q.new_empty((heads, tokens), dtype=lse_dtype)


def _backward_fake(dout, dlse, q, k, k_rope, v, *rest):
    return tuple(k.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, k_rope, v))


mla_prefill_op = Operation(
    "mla_prefill(Tensor q, Tensor k, Tensor? k_rope, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, "
    "bool causal, ScalarType out_dtype) -> (Tensor, Tensor)",
    reference=_reference,
    triton="dskernels.mla.prefill.triton:mla_prefill",
    hopper="dskernels.mla.prefill.hopper:mla_prefill",
    fake=_fake,
)
_backward_op = Operation(
    "mla_prefill_backward(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor? k_rope, Tensor v, Tensor out, "
    "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, bool causal) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    reference=_backward_reference,
    triton="dskernels.mla.prefill.triton_backward:mla_prefill_backward",
    hopper="dskernels.mla.prefill.hopper_backward:mla_prefill_backward",
    fake=_backward_fake,
)


def _save(ctx: Any, args: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, ctx.causal, _ = args
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, k_rope, v, cu_q, cu_k, out, lse = ctx.saved_tensors
    dq, dk, dk_rope, dv = _backward_op(
        dout, dlse, q, k, k_rope, v, out, lse, cu_q, cu_k, ctx.scale, ctx.causal, impl=ctx.impl
    )
    return dq, dk, None if k_rope is None else dk_rope, dv, None, None, None, None, None


mla_prefill_op.register_autograd(_backward, _save)
