"""Modules built on these operations. Their state dicts have the parameter names of published checkpoints."""

from dskernels.nn.attention import LatentAttention
from dskernels.nn.linear import Fp8Linear, convert_linear_to_fp8
from dskernels.nn.moe import MoE, Router

__all__ = ["Fp8Linear", "LatentAttention", "MoE", "Router", "convert_linear_to_fp8"]
