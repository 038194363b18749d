"""The expert block of a mixture of experts, and the permutations around it."""

from dskernels.moe.api import combine, fused_experts, permute

__all__ = ["combine", "fused_experts", "permute"]
