"""A plugin for SGLang: block-scaled fp8 linear layers on these operations.

SGLang finds it through the entry point ``sglang.srt.plugins``. It only acts if the environment variable
``SGLANG_PLUGINS``, the list of plugins that SGLang loads, contains ``dskernels``. Written against SGLang 0.5.23.
The router and the experts remain SGLang's own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.device import capability
from dskernels.types import Fp8Tensor

HOOKS = "sglang.srt.plugins.hook_registry"
DISPATCH = "sglang.srt.layers.quantization.fp8_utils.dispatch_w8a8_block_fp8_linear"
BLOCK = (128, 128)


def register_if_named() -> None:
    """Called by SGLang in each of its processes: `register`, if ``SGLANG_PLUGINS`` contains dskernels."""
    if "dskernels" in os.environ.get("SGLANG_PLUGINS", "").split(","):
        register()


def register() -> None:
    """Wrap SGLang's choice of a block-scaled fp8 linear layer with `linear_of`."""
    hooks: Any = importlib.import_module(HOOKS)
    hooks.HookRegistry.register(DISPATCH, linear_of, hooks.HookType.AROUND)


def linear_of(
    original: Callable[..., Any], weight_block_size: Any = None, act_scale_ue8m0: bool = False, **more: Any
) -> Callable[..., Tensor]:
    """The function that SGLang multiplies with: on sm_90 `dskernels.fp8_linear` if it supports the call, else its own
    choice.

    Args:
        original: SGLang's own choice.
        weight_block_size: its argument; `linear` looks at the blocks of each call.
        act_scale_ue8m0: whether activations get scales that are powers of two.
        **more: further arguments that a release of SGLang passes.
    """
    theirs = original(weight_block_size, act_scale_ue8m0, **more)
    if not _on_hopper():  # elsewhere, SGLang may have transformed the scales for its own choice
        return theirs
    scale_format = "ue8m0" if act_scale_ue8m0 else "fp32"

    def linear(
        input: Tensor,
        weight: Tensor,
        block_size: list[int],
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        plain = input_scale is None and not more
        if not plain or tuple(block_size) != BLOCK or weight_scale.dtype != torch.float32:
            return theirs(input, weight, block_size, weight_scale, input_scale=input_scale, bias=bias, **more)
        return ds.fp8_linear(input, Fp8Tensor(weight, weight_scale, BLOCK), bias, scale_format=scale_format)

    return linear


def _on_hopper() -> bool:
    """Whether the current GPU is an sm_90 of NVIDIA's; an AMD GPU, a gfx90a say, may report (9, 0) too."""
    return torch.cuda.is_available() and capability(torch.device("cuda", torch.cuda.current_device())) == (9, 0)
