"""Attention of new tokens over the latent cache."""

from dskernels.mla.decode.api import mla_decode

__all__ = ["mla_decode"]
