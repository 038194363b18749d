"""What stands around absorbed decode: queries that the latent cache is attended to by, and values out of latents."""

from dskernels.mla.absorb.api import mla_decode_queries

__all__ = ["mla_decode_queries"]
