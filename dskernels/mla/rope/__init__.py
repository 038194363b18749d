"""Rotary positions of queries and keys."""

from dskernels.mla.rope.api import apply_rope

__all__ = ["apply_rope"]
