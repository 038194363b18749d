"""Merging of attention over disjoint sets of keys."""

from dskernels.mla.merge.api import merge_states

__all__ = ["merge_states"]
