"""What stands around absorbed decode: queries that the latent cache is attended to by, and values out of latents."""

from dskernels.mla.absorb.api import mla_decode_queries
from dskernels.mla.absorb.values import mla_values_quantize

__all__ = ["mla_decode_queries", "mla_values_quantize"]
