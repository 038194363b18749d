"""Parity cases of quantising. The plain ones must match to the byte, the fused ones to a step of e4m3."""

from __future__ import annotations

import torch

from dskernels.parity import Case
from dskernels.parity.inputs import normal, spread
from dskernels.types import Block

EXACT = 0.0
# A step of e4m3 in a few elements: 2^-4 of relative error in 1% of them is 4e-5.
ONE_STEP = 4e-5


def _plain(rows: int, cols: int, block: Block, scale_format: str, transpose: bool) -> Case:
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        x = spread(0, rows, cols, torch.bfloat16).to(device)
        return (x, block), {"scale_format": scale_format, "transpose": transpose}

    label = f"{rows}x{cols}, {scale_format}, tiles {block[0]}x{block[1]}{', transposed' if transpose else ''}"
    return Case("quantize", label, inputs, EXACT)


CASES = [
    _plain(83, 576, (1, 128), "fp32", False),
    _plain(1, 128, (1, 128), "ue8m0", False),
    _plain(130, 300, (128, 128), "fp32", False),
    _plain(130, 300, (128, 128), "ue8m0", True),
    _plain(200, 65, (128, 1), "fp32", False),
    _plain(200, 65, (128, 1), "fp32", True),
    Case("quantize_both", "130x200", lambda device: ((spread(1, 130, 200).to(device),), {}), EXACT),
    Case("swiglu_quantize", "37x2x192", lambda device: ((normal(2, 37, 384, scale=3.0).to(device),), {}), ONE_STEP),
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
]
