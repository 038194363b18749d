"""Parity cases of quantising. Plain results must be equal to the byte, fused ones within a step of e4m3."""

from __future__ import annotations

import torch

from dskernels.parity import Case
from dskernels.parity.inputs import normal, spread
from dskernels.types import Block

EXACT = 0.0
# A step of e4m3 in a few elements: a relative error of 2^-4 in 1% of them is 4e-5.
ONE_STEP = 4e-5
# Two roundings to bf16, each of 2^-9: half of the square of that.
SUMS = 4e-6


def _plain(rows: int, cols: int, block: Block, scale_format: str, transpose: bool) -> Case:
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        x = spread(0, rows, cols, torch.bfloat16).to(device)
        return (x, block), {"scale_format": scale_format, "transpose": transpose}

    label = f"{rows}x{cols}, {scale_format}, tiles {block[0]}x{block[1]}{', transposed' if transpose else ''}"
    return Case("quantize", label, inputs, EXACT)


def _norm_gradient(
    rows: int, cols: int, dtype: torch.dtype, device: torch.device, residual: bool = False
) -> tuple[tuple, dict]:
    dy, x, dresidual = (normal(seed, rows, cols, dtype=dtype).to(device) for seed in (8, 9, 10))
    arguments = (dy, x, normal(11, cols, dtype=dtype).to(device), 1e-6)
    return ((*arguments, dresidual) if residual else arguments), {}


CASES = [
    _plain(83, 576, (1, 128), "fp32", False),
    _plain(1, 128, (1, 128), "ue8m0", False),
    _plain(130, 300, (128, 128), "fp32", False),
    _plain(130, 300, (128, 128), "ue8m0", True),
    _plain(200, 65, (128, 1), "fp32", False),
    _plain(200, 65, (128, 1), "fp32", True),
    Case("quantize_both", "130x200", lambda device: ((spread(1, 130, 200).to(device),), {}), EXACT),
    Case(
        "quantize_both", "144x264, bf16", lambda device: ((spread(1, 144, 264, torch.bfloat16).to(device),), {}), EXACT
    ),
    Case("swiglu_quantize", "37x2x192", lambda device: ((normal(2, 37, 384, scale=3.0).to(device),), {}), ONE_STEP),
    Case(
        "swiglu_quantize",
        "144x2x264, transposed",
        lambda device: ((normal(2, 144, 528, dtype=torch.bfloat16, scale=3.0).to(device),), {"transpose": True}),
        ONE_STEP,
    ),
    Case(
        "swiglu_quantize_backward",
        "37x2x200",
        lambda device: ((normal(6, 37, 200).to(device), normal(7, 37, 400, scale=3.0).to(device)), {}),
        ONE_STEP,
    ),
    Case(
        "swiglu_quantize_backward",
        "144x2x256, bf16",
        lambda device: (
            (
                normal(6, 144, 256, dtype=torch.bfloat16).to(device),
                normal(7, 144, 512, dtype=torch.bfloat16, scale=3.0).to(device),
            ),
            {},
        ),
        ONE_STEP,
    ),
    Case(
        "rmsnorm_quantize",
        "5x576",
        lambda device: ((normal(3, 5, 576).to(device), normal(4, 576).to(device), 1e-6), {}),
        ONE_STEP,
    ),
    Case(
        "rmsnorm_quantize",
        "5x2304, residual",
        lambda device: (
            (
                normal(3, 5, 2304, dtype=torch.bfloat16).to(device),
                normal(4, 2304, dtype=torch.bfloat16).to(device),
                1e-6,
                normal(5, 5, 2304, dtype=torch.bfloat16).to(device),
            ),
            {},
        ),
        ONE_STEP,
    ),
    *(
        Case("rmsnorm_backward", label, inputs, SUMS)
        for label, inputs in (
            ("5x576", lambda device: _norm_gradient(5, 576, torch.float32, device)),
            ("37x2304, bf16, residual", lambda device: _norm_gradient(37, 2304, torch.bfloat16, device, residual=True)),
        )
    ),
]
