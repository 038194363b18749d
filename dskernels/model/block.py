"""One transformer block."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dskernels.model import few
from dskernels.model.attention import Attention
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import FeedForward, RMSNorm
from dskernels.model.moe import MoE, RouterOutput
from dskernels.model.recompute import recomputed


class Block(nn.Module):
    """Attention and a feed-forward, each behind a norm, each added to the residual stream.

    What the block adds last is passed on next to the residual stream: the following norm adds it, in the same launch.
    """

    def __init__(self, config: Config, *, moe: bool, fp8: bool, recompute: bool = False) -> None:
        super().__init__()
        self.fp8, self.recompute = fp8, recompute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, fp8, recompute)
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
        """Run the block.

        Args:
            x: ``[T, hidden]``, the residual stream.
            update: ``[T, hidden]``, what is still to be added to it; None at the first block.
            batch: the layout of the tokens.
            cos: see `Attention`.
            sin: see `Attention`.
            cache: see `Attention`.

        Returns:
            The residual stream, what is still to be added to it, and how the experts were chosen, if there are any.
        """
        attention, mlp, norm = self.self_attn, self.mlp, self.post_attention_layernorm
        if attention.takes_fp8:
            h, x = self.input_layernorm.after(x, update)
            update = attention(h, batch, cos, sin, cache)
        elif attention.takes_unnormed(x.shape[0]):
            unnormed = few.Unnormed(x, update, self.input_layernorm)
            update = attention(unnormed, batch, cos, sin, cache)
            x = unnormed.stream
        else:
            h, quantized, x = self.input_layernorm.beside(x, update, self.fp8)
            with self._keeping(x, self.input_layernorm, h):
                update = attention(h, batch, cos, sin, cache, quantized)
        if isinstance(mlp, MoE):
            # In training, what is sent to other ranks has scales that are powers of two. The router multiplies the
            # unquantised values.
            form = "ue8m0" if torch.is_grad_enabled() else "fp32"
            h, quantized, x = norm.beside(x, update, self.fp8, form)
            with self._keeping(x, norm, h):
                update, router = mlp(h, quantized)
            return x, update, router
        if mlp.w13.takes_fp8:
            h, x = norm.after(x, update)
            return x, mlp(h, x.dtype), None
        if few.fit(x.shape[0], mlp):
            gate_up, x, _ = few.products(x, (mlp.w13,), update=update, norm=norm)
            return x, few.products(gate_up, (mlp.w2,), gated=True)[0], None
        h, quantized, x = norm.beside(x, update, self.fp8)
        with self._keeping(x, norm, h):
            return x, mlp(h, quantized=quantized), None

    def _keeping(self, x: Tensor, norm: RMSNorm, h: Tensor) -> AbstractContextManager[object]:
        """Inside, nothing is saved of ``h``, the norm of ``x``, where it is to be recomputed."""
        return recomputed(h, lambda: norm.again(x, self.fp8)) if self.recompute else nullcontext()
