"""The simple layers of a block: RMSNorm, a linear layer in bf16 or fp8, the gated feed-forward."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dskernels as ds
from dskernels import later
from dskernels.dispatch import Operation
from dskernels.types import Fp8Tensor

FP8_BLOCK = (128, 128)  # the blocks of quantised weights

# What a layer takes: tokens in the model's dtype, or already quantised in 1x128 tiles by the kernel that produced them.
Activation = Tensor | Fp8Tensor


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., size]``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def quantized(self, x: Tensor) -> Fp8Tensor:
        """Normalise ``[T, size]`` and quantise the result, in one launch; without a gradient."""
        return ds.rmsnorm_quantize(x, self.weight, self.eps)

    def after(self, x: Tensor, update: Tensor | None) -> tuple[Activation, Tensor]:
        """Add ``update`` to the residual stream ``x``; returns the norm of the sum, quantised, and the sum. One
        launch."""
        if update is None:
            return self.quantized(x), x
        return ds.rmsnorm_quantize(x, self.weight, self.eps, update)

    def beside(
        self, x: Tensor, update: Tensor | None, fp8: bool, scale_format: str = "fp32"
    ) -> tuple[Tensor, Fp8Tensor | None, Tensor]:
        """Add ``update`` to the residual stream; returns the norm of the sum, with ``fp8`` its 1x128 tiles too, and the
        sum.

        Differentiable. It is one launch if the norm is quantised, or if there is an update and no gradient is needed.
        """
        if not fp8:
            if update is None:
                return self(x), None, x
            if torch.is_grad_enabled():
                x = x + update
                return self(x), None, x
            normed, x = _add_norm(x, update, self.weight, self.eps)
            return normed, None, x
        quantized, x, normed = ds.rmsnorm_quantize(
            x, self.weight, self.eps, update, with_normed=True, scale_format=scale_format
        )
        return normed, quantized, x

    def again(self, x: Tensor, fp8: bool) -> Tensor:
        """Recompute what `beside` returned, from the residual stream ``x``."""
        return self.beside(x, None, fp8)[0]


def _add_norm_reference(x: Tensor, update: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    stream = x + update
    return F.rms_norm(stream, norm.shape, norm, eps), stream


_add_norm = Operation(
    "add_norm(Tensor x, Tensor update, Tensor norm, float eps) -> (Tensor, Tensor)",
    reference=_add_norm_reference,
    triton="dskernels.model.triton_few:add_norm",
    fake=lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape)),
)


class Linear(nn.Module):
    """``x @ weight.T`` in the dtype of the weight or, with ``fp8``, in e4m3 (all three products of training).

    Args:
        inputs: columns of the weight.
        outputs: rows of the weight.
        fp8: whether products run in e4m3.
        keep: what is saved of the input for the backward, see `dskernels.fp8_linear`.
        scale_format: of the scales of that input in training; where weights are kept in e4m3, scales are always fp32.

    Attributes:
        weight: ``[outputs, inputs]``. In e4m3 if the weight is kept quantised (see `keep_in_fp8`), which is for
            inference: it then has no gradient.
        weight_scale_inv: float32, the scales of its 128x128 blocks; None unless the weight is kept quantised.
    """

    weight_scale_inv: Tensor | None

    def __init__(self, inputs: int, outputs: int, fp8: bool, *, keep: str = "fp8", scale_format: str = "fp32") -> None:
        super().__init__()
        self.fp8, self.keep, self.scale_format = fp8, keep, scale_format
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.register_buffer("weight_scale_inv", None)
        self._dense: Tensor | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Linear:
        """Called by `to` and the like; a quantised weight and its scales keep their types."""
        self._dense = None
        super()._apply(fn if self.weight_scale_inv is None else keeping_dtype(fn), recurse)
        return self

    @property
    def takes_fp8(self) -> bool:
        """Whether the input may be passed quantised: the weight is kept in e4m3, and no gradient is needed."""
        return self.weight_scale_inv is not None and not torch.is_grad_enabled()

    @property
    def operand(self) -> Tensor | Fp8Tensor:
        """The weight in the form that the operations take."""
        scale = self.weight_scale_inv
        return self.weight if scale is None else Fp8Tensor(self.weight, scale, FP8_BLOCK)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight for products in ``dtype``; for a quantised weight a dequantised copy, made once and kept."""
        weight = self.operand
        if not isinstance(weight, Fp8Tensor):
            return weight
        if self._dense is None or self._dense.dtype != dtype:
            self._dense = weight.dequantize(dtype)
        return self._dense

    def forward(self, x: Activation, dtype: torch.dtype | None = None, quantized: Fp8Tensor | None = None) -> Tensor:
        """``[..., inputs]`` to ``[..., outputs]``, in ``dtype`` if the input is quantised.

        ``quantized`` is the same input in 1x128 tiles, if it has been quantised already.
        """
        operand = self.operand
        if isinstance(x, Fp8Tensor):
            if not isinstance(operand, Fp8Tensor) or dtype is None:
                raise ValueError(
                    "x: expected a tensor, as the weight is not kept quantised, or the result has no dtype"
                )
            return ds.fp8_gemm(x, operand, out_dtype=dtype)
        if not self.fp8:
            return later.linear(x, self.weight)
        form = self.scale_format if torch.is_grad_enabled() else "fp32"
        return ds.fp8_linear(x, operand, quantized=quantized, scale_format=form, keep=self.keep)


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module.to` does to a tensor, without the change of dtype."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return moved


class FeedForward(nn.Module):
    """``w2(silu(gate) * up)`` with gate and up in one matrix ``w13``: the dense blocks, and the shared experts."""

    def __init__(self, hidden: int, inner: int, fp8: bool) -> None:
        super().__init__()
        self.w13 = Linear(hidden, 2 * inner, fp8)
        self.w2 = Linear(inner, hidden, fp8)

    @property
    def trains_in_fp8(self) -> bool:
        """Whether products run in e4m3 while the weights themselves are stored in their own dtype."""
        return self.w13.fp8 and self.w13.weight_scale_inv is None

    def forward(self, x: Activation, dtype: torch.dtype | None = None, quantized: Fp8Tensor | None = None) -> Tensor:
        """``[T, hidden]`` to ``[T, hidden]``, in ``dtype`` if the input is quantised; ``quantized`` as in `Linear`."""
        if self.trains_in_fp8 and isinstance(x, Tensor):
            return ds.feed_forward(x, self.w13.weight, self.w2.weight, fp8=True, quantized=quantized, keep="fp8")
        gate_up = self.w13(x, dtype)
        if self.w2.takes_fp8:
            return self.w2(ds.swiglu_quantize(gate_up), gate_up.dtype)
        gate, up = gate_up.chunk(2, -1)
        return self.w2(F.silu(gate) * up)
