"""Rotary positions: YaRN's frequencies, and the softmax scale that goes with them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dskernels.model.config import Config, Yarn


def frequencies(config: Config) -> Tensor:
    """Radians per position for each rotated pair, float32 ``[qk_rope_head_dim / 2]``.

    ``theta^(-2i/d)``; with YaRN the slow dimensions are divided by ``factor`` and a linear ramp joins the two (arXiv
    2309.00071, section 3.2).
    """
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    with torch.device("cpu"):  # 32 numbers, and never on the meta device: see Rope
        frequency = 1.0 / base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
        if yarn is None:
            return frequency
        low = math.floor(_pair_turning(yarn.beta_fast, dim, base, yarn.original_max_position_embeddings))
        high = math.ceil(_pair_turning(yarn.beta_slow, dim, base, yarn.original_max_position_embeddings))
        low, high = max(low, 0), min(high, dim - 1)
        # Kimi-K2 has two equal betas; a ramp of width zero would divide zero by zero.
        width = max(high - low, 0.001)
        interpolated = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
        return frequency / yarn.factor * interpolated + frequency * (1 - interpolated)


def _pair_turning(turns: float, dim: int, base: float, context: int) -> float:
    """The index of the pair that makes this many turns within the context."""
    return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))


def _temperature(yarn: Yarn, mscale: float) -> float:
    return 0.1 * mscale * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0


def softmax_scale(config: Config) -> float:
    """The factor on the scores: ``qk_head_dim^-0.5``, with YaRN times ``m(mscale_all_dim)^2``."""
    scale = config.qk_head_dim**-0.5
    if config.rope_scaling is None:
        return scale
    return scale * _temperature(config.rope_scaling, config.rope_scaling.mscale_all_dim) ** 2


class Rope(nn.Module):
    """cos and sin of the positions in a pass, computed once for all layers.

    The frequencies stay fp32 and correct whatever happens to the module: `to(bfloat16)` would round them, and
    `to_empty` (after building on the meta device) would leave them undefined, so after each of these they are computed
    again.
    """

    frequencies: Tensor

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        yarn = config.rope_scaling
        self.scale = _temperature(yarn, yarn.mscale) / _temperature(yarn, yarn.mscale_all_dim) if yarn else 1.0
        self.register_buffer("frequencies", frequencies(config), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)
        self.frequencies = frequencies(self.config).to(self.frequencies.device)
        return self

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 ``[T, qk_rope_head_dim / 2]``, for int64 ``positions`` ``[T]``."""
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        return (cos, sin) if self.scale == 1.0 else (cos * self.scale, sin * self.scale)
