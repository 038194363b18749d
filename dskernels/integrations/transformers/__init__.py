"""Run models of Hugging Face transformers on these operations: one line, which can be undone.

    acceleration = accelerate(model)    # prints what it replaced, what it left alone, and why
    model.generate(...)                 # as before; training, continuous batching and the server work too
    acceleration.undo()

Replaced, wherever they are found, are the router, the experts (routed and shared), multi-head latent attention
(absorbed during decode, over a cache of latents that grows in place), RMSNorm, and linear layers: those whose weights
are stored in e4m3, and with ``fp8=True`` the others as well. A part is recognised by the source text of its
``forward``, not by the model's name, so model families that copied DeepSeek-V3's or Qwen3-MoE's parts are covered too.
"""

from dskernels.integrations.transformers.acceleration import Acceleration, accelerate, accelerated
from dskernels.integrations.transformers.cache import LatentLayer
from dskernels.integrations.transformers.patches import Report

__all__ = ["Acceleration", "LatentLayer", "Report", "accelerate", "accelerated"]
