"""Multi-head latent attention: the paged latent cache, decode over it, prefill, and merging of partial results."""

from dskernels.mla.absorb import mla_decode_queries, mla_values_quantize
from dskernels.mla.cache import write_latent_cache
from dskernels.mla.decode import mla_decode
from dskernels.mla.merge import merge_states
from dskernels.mla.prefill import mla_prefill, mla_prefill_cached
from dskernels.mla.rope import apply_rope

__all__ = [
    "apply_rope",
    "merge_states",
    "mla_decode",
    "mla_decode_queries",
    "mla_prefill",
    "mla_prefill_cached",
    "mla_values_quantize",
    "write_latent_cache",
]
