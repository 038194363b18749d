"""The public operation that projects attended latents to values."""

from __future__ import annotations

from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.fp8.layout import empty_quantized
from dskernels.reference import mla as reference
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_tensor


@repeated
def mla_values_quantize(latents: Tensor, w_uv: Tensor, *, impl: str | None = None) -> Fp8Tensor:
    """Multiply the result of :func:`mla_decode` by each head's W^UV, and quantise it for the output projection.

    values[t, h] = w_uv[h] @ latents[t, h], summed in fp32, and quantised in 1x128 tiles without being rounded before.

    Args:
        latents: bf16, fp16 or fp32 ``[T, H, latent]``, tokens and heads may be strided, last dimension contiguous.
        w_uv: ``[H, V, latent]`` in the dtype of `latents`, each head's up-projection of the value, V a multiple of 128;
            heads and rows may be strided, so that it may be a part of kv_b: ``kv_b.unflatten(0, (H, -1))[:, nope:]``.
        impl: ``"hopper"``, ``"triton"`` or ``"reference"``; None chooses, see :func:`dskernels.explain`.

    Returns:
        Fp8Tensor ``[T, H * V]`` in 1x128 tiles, scales as by :func:`quantize` in fp32.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, strides or devices do not fit.

    No tokens or heads give an empty result. Not differentiable.
    Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2; DeepSeek-V3 report, section 3.3.2.
    """
    check_tensor("latents", latents, dtype=HALF_OR_SINGLE, shape=("T", "H", "latent"))
    _, heads, latent = latents.shape
    check_tensor("w_uv", w_uv, dtype=latents.dtype, shape=(heads, "V", latent), like=latents)
    if latent == 0 or w_uv.shape[1] % 128:
        raise ValueError(f"w_uv: expected [H, V, latent], V a multiple of 128, got {list(w_uv.shape)}")
    return Fp8Tensor(*_mla_values_quantize(latents, w_uv, impl=impl))


# ---- registration ---------------------------------------------------------------------------------------------------


def _fake(latents: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, heads, _ = latents.shape
    return empty_quantized(latents.new_empty(tokens, heads * w_uv.shape[1]), (1, 128))


_mla_values_quantize = Operation(
    "mla_values_quantize(Tensor latents, Tensor w_uv) -> (Tensor, Tensor)",
    reference=lambda latents, w_uv: tuple(reference.mla_values_quantize(latents, w_uv)[:2]),
    triton="dskernels.mla.absorb.triton_values:mla_values_quantize",
    fake=_fake,
)
