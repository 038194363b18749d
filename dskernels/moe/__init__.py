"""The expert block of a mixture of experts, and the permutations around it."""

from dskernels.moe.api import combine, fused_experts, permute
from dskernels.moe.dense import feed_forward

__all__ = ["combine", "feed_forward", "fused_experts", "permute"]
