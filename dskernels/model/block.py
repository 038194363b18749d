"""One transformer block."""

from __future__ import annotations

from torch import Tensor, nn

import dskernels as ds
from dskernels.model.attention import Attention
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import FeedForward, RMSNorm
from dskernels.model.moe import MoE, RouterOutput
from dskernels.types import Fp8Tensor


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm and added to the residual stream.

    What a block adds last is handed on beside the stream: the next norm adds it, in the same launch.
    """

    def __init__(self, config: Config, *, moe: bool, fp8: bool) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, fp8)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config, fp8) if moe else FeedForward(config.hidden_size, config.intermediate_size, fp8)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, RouterOutput | None]:
        """Runs the block.

        Args:
            x: ``[T, hidden]``, the residual stream.
            update: likewise, what is still to be added to it; None at the first block.
            batch: where the tokens stand.
            cos: see `Attention`.
            sin: see `Attention`.
            cache: see `Attention`.

        Returns:
            Both again, and how the experts were chosen if there are any.
        """
        attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        h, x = self.input_layernorm.after(x, update, attention.takes_fp8)
        update = attention(h, batch, cos, sin, cache)
        if isinstance(mlp, FeedForward):
            h, x = norm.after(x, update, mlp.w13.takes_fp8)
            return x, mlp(h, x.dtype), None
        quantized: Fp8Tensor | None = None
        if mlp.takes_fp8:  # the router multiplies what is not
            quantized, x, h = ds.rmsnorm_quantize(x, norm.weight, norm.eps, update, with_normed=True)
        else:
            h, x = norm.after(x, update, False)
        update, router = mlp(h, quantized)
        return x, update, router
