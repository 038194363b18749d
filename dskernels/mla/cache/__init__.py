"""The paged latent cache."""

from dskernels.mla.cache.api import write_latent_cache

__all__ = ["write_latent_cache"]
