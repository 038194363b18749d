"""The expert block of a mixture of experts, the copies of rows around it, and a single feed-forward network."""

from dskernels.moe.api import combine, fused_experts, permute
from dskernels.moe.dense import feed_forward

__all__ = ["combine", "feed_forward", "fused_experts", "permute"]
