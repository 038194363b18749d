"""Quantised copies of weights, kept until the weight changes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dskernels.fp8 import quantize
from dskernels.types import Fp8Tensor


class _Kept(NamedTuple):
    state: tuple[int, int]
    rows: Fp8Tensor
    transposed: Fp8Tensor | None


_kept = WeakTensorKeyDictionary()


def weight_operand(weight: Tensor, scale: Tensor | None, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [E?, N, K] in 128x128 blocks, or its transpose; one without a scale is quantised first."""
    if scale is None:
        return quantized_weight(weight, transpose=transpose, impl=impl)
    quantized = Fp8Tensor(weight, scale, (128, 128))
    return transposed(quantized) if transpose else quantized


def quantized_weight(weight: Tensor, *, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [E?, N, K] in 128x128 blocks, or its transpose, quantised anew only after the weight was written to.

    A change is seen by data pointer and version counter. Weights made in inference mode have no version, and a
    trainable weight inside a CUDA graph changes between replays without its version moving: both are quantised at each
    call.
    """
    frozen = not weight.requires_grad
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    if weight.is_inference() or (capturing and not frozen):
        return quantize(weight, (128, 128), transpose=transpose, impl=impl)
    state = (weight.data_ptr(), weight._version)
    kept: _Kept | None = _kept.get(weight)
    if kept is None or kept.state != state:
        kept = _Kept(state, quantize(weight, (128, 128), impl=impl), None)
    if transpose and kept.transposed is None:
        kept = kept._replace(transposed=transposed(kept.rows))
    if not capturing:  # what is made during capture lives in the graph's memory and is filled only by a replay
        _kept[weight] = kept
    return kept.transposed if transpose else kept.rows  # type: ignore[return-value]


def transposed(weight: Fp8Tensor) -> Fp8Tensor:
    """The transpose of a weight, or of each of a stack, in 128x128 blocks; exact, since its blocks are the same."""
    return Fp8Tensor(weight.data.mT.contiguous(), weight.scale.mT.contiguous(), weight.block)
