"""Models of Hugging Face transformers on these operations, in one line, and back.

    acceleration = accelerate(model)    # prints what it replaced, and what not and why
    model.generate(...)                 # as before: so do training, continuous batching and the server
    acceleration.undo()

What is replaced, wherever it is found: the router, the experts with the shared ones, multi-head latent attention
(absorbed in decode, over a cache of latents that grows in place), RMSNorm, and linear layers whose weights are in e4m3
or, with ``fp8=True``, are multiplied in it. Parts are recognised by what they compute (the text of their ``forward``),
not by the model's name, so that families that copied DeepSeek-V3's or Qwen3-MoE's parts are served as well.
"""

from dskernels.integrations.transformers.acceleration import Acceleration, accelerate, accelerated
from dskernels.integrations.transformers.cache import LatentLayer
from dskernels.integrations.transformers.patches import Report

__all__ = ["Acceleration", "LatentLayer", "Report", "accelerate", "accelerated"]
