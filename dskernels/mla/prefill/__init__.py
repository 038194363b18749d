"""Attention of packed sequences, over keys and values that are written out or over the latent cache."""

from dskernels.mla.prefill.api import mla_prefill
from dskernels.mla.prefill.cached import mla_prefill_cached

__all__ = ["mla_prefill", "mla_prefill_cached"]
