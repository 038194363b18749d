"""One transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from dskernels.model.attention import Attention
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import FeedForward, RMSNorm
from dskernels.model.moe import MoE, RouterOutput


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: Config, *, moe: bool, fp8: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, fp8)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, fp8) if moe else FeedForward(config.hidden_size, config.intermediate_size, fp8)

    def forward(
        self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor, cache: Tensor | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        """``[T, hidden]`` to ``[T, hidden]``, and how the experts were chosen if there are any."""
        x = x + self.self_attn(self.input_layernorm(x), batch, cos, sin, cache)
        y = self.mlp(self.post_attention_layernorm(x))
        y, router = y if isinstance(self.mlp, MoE) else (y, None)
        return x + y, router
