"""Multi-head latent attention (report section 2.1.1): expanded for prompts and training, absorbed in decode."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.mla.rope.gradient import rotated_from
from dskernels.model import few
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import FP8_BLOCK, Activation, Linear, RMSNorm
from dskernels.model.recompute import recomputed
from dskernels.model.rope import softmax_scale
from dskernels.types import Fp8Tensor


class Attention(nn.Module):
    """Attention whose keys and values are projections of one narrow latent, the only thing cached for a token.

    Attributes:
        q_proj: the query; with ``q_lora_rank`` it is `q_a_proj`, `q_a_layernorm` and `q_b_proj` instead.
        kv_a_proj_with_mqa: the latent, and the rotated part of the key.
        qkv_a_proj: both matrices that multiply the hidden state, stacked, where they are kept as one (see
            `keep_in_fp8`); the separate ones do not exist then.
    """

    qkv_a_proj: Linear | None
    q_proj: Linear | None
    q_a_proj: Linear | None
    kv_a_proj_with_mqa: Linear | None

    def __init__(self, config: Config, fp8: bool, recompute: bool = False) -> None:
        super().__init__()
        self.config, self.fp8, self.recompute = config, fp8, recompute
        self.scale = softmax_scale(config)
        hidden, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        self.qkv_a_proj = None
        # The inputs of all but the last are outputs of a norm, which can be recomputed instead of saved.
        keep = "input" if recompute else "fp8"
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, fp8, keep=keep)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, fp8, keep=keep)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, fp8, keep=keep)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, fp8, keep=keep)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, up, fp8, keep=keep)
        # Attention's backward saves its output in bf16 anyway, with more mantissa than the report's E5M6.
        self.o_proj = Linear(heads * config.v_head_dim, hidden, fp8, keep="input", scale_format="ue8m0")

    @property
    def takes_fp8(self) -> bool:
        """Whether the input may be passed quantised, see `Linear.takes_fp8`."""
        return self.o_proj.takes_fp8

    def takes_unnormed(self, tokens: int) -> bool:
        """Whether the input may be passed before its norm, see `few.Unnormed`."""
        layers = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj, self.kv_a_proj_with_mqa
        return self.qkv_a_proj is None and few.fit(tokens, *layers)

    def forward(
        self,
        x: Activation | few.Unnormed,
        batch: Batch,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor | None = None,
        quantized: Fp8Tensor | None = None,
    ) -> Tensor:
        """Attention within the sequences of ``batch``.

        Args:
            x: ``[T, hidden]``, normed; or, of a few tokens, what is still to be.
            batch: where the tokens stand.
            cos: float32 ``[T, rope / 2]`` of their positions.
            sin: likewise.
            cache: this layer's pages ``[pages, page_size, latent]``; the new tokens are written to it first.
            quantized: ``x`` in 1x128 tiles, where ``x`` itself is not quantised.

        Returns:
            ``[T, hidden]``.
        """
        config = self.config
        q, latent = self._down(x, quantized)
        q = self._queries(q)
        kv, k_rope = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        if cache is not None:
            if batch.slots is None:
                raise ValueError("batch: expected one made with a block table, since there is a cache to write to")
            norm = self.kv_a_layernorm
            ds.write_latent_cache(kv, k_rope, norm.weight, cos, sin, cache, batch.slots, eps=norm.eps)

        if batch.kind == "prompt":
            out = self._prompt(self._rotated(q, cos, sin), kv, self._turned(k_rope[:, None], cos, sin)[:, 0], batch)
        elif cache is None or batch.block_table is None or batch.lengths is None:
            raise ValueError(f'cache: a batch of kind "{batch.kind}" attends to cached tokens, got None')
        elif batch.kind == "extend":
            kv_b = self.kv_b_proj.dense(q.dtype)
            table, cu_seqlens = batch.block_table, batch.cu_seqlens
            q = self._rotated(q, cos, sin)
            out, _ = ds.mla_prefill_cached(q, kv_b, cache, table, batch.lengths, cu_seqlens, scale=self.scale)
        else:
            return self._decode(q, cos, sin, cache, batch.block_table, batch.lengths, batch.q_lengths)
        return self.o_proj(out.flatten(1))

    def _down(self, x: Activation | few.Unnormed, quantized: Fp8Tensor | None) -> tuple[Tensor, Tensor]:
        """From the hidden state: the query (compressed, if the model compresses it), and the latent with the key's
        rotated part."""
        dtype = self.kv_a_layernorm.weight.dtype
        if self.qkv_a_proj is not None and not isinstance(x, few.Unnormed):
            return self._cut(self.qkv_a_proj(x, dtype))
        q_proj = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        if q_proj is None or self.kv_a_proj_with_mqa is None:
            raise RuntimeError("qkv_a_proj: expected it, as the matrices that it is made of are not there")
        if isinstance(x, few.Unnormed):
            return self._cut(x.products(q_proj, self.kv_a_proj_with_mqa))
        return q_proj(x, dtype, quantized), self.kv_a_proj_with_mqa(x, dtype, quantized)

    def _cut(self, both: Tensor) -> tuple[Tensor, Tensor]:
        width = both.shape[1] - self.config.latent_dim
        return both[:, :width], both[:, width:]

    def _queries(self, q: Tensor) -> Tensor:
        """``[T, heads, nope + rope]`` from the first result of `_down`."""
        if self.config.q_lora_rank is not None:
            q = self._expanded(q, self.q_a_layernorm, self.q_b_proj)
        return q.unflatten(-1, (self.config.num_attention_heads, -1))

    def _expanded(self, x: Tensor, norm: RMSNorm, projection: Linear) -> Tensor:
        """The projection of a normed latent; norm and quantisation are one launch where possible."""
        if projection.takes_fp8:
            return projection(norm.quantized(x), x.dtype)
        if few.fit(x.shape[0], projection):
            return few.products(x, (projection,), norm=norm)[0]
        normed, quantized, _ = norm.beside(x, None, self.fp8)
        with recomputed(normed, lambda: norm.again(x, self.fp8)) if self.recompute else nullcontext():
            return projection(normed, quantized=quantized)

    def _rotated(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``q`` ``[T, heads, nope + rope]`` with the last part rotated: in place if no gradient is needed."""
        nope, rope = self.config.qk_nope_head_dim, self.config.qk_rope_head_dim
        if torch.is_grad_enabled():
            return rotated_from(q, cos, sin, nope)
        q_rope = q.narrow(-1, nope, rope)
        ds.apply_rope(q_rope, cos, sin, out=q_rope)
        return q

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[T, heads, rope]``, rotated."""
        return rotated_from(x, cos, sin, 0) if torch.is_grad_enabled() else ds.apply_rope(x, cos, sin)

    def _prompt(self, q: Tensor, kv: Tensor, k_rope: Tensor, batch: Batch) -> Tensor:
        """Attention with the keys and values of every head expanded: fewer operations if many queries use each of
        them."""
        config = self.config
        latent, norm, up = kv, self.kv_a_layernorm, self.kv_b_proj
        kv = self._expanded(latent, norm, up)
        k_nope, v = kv.unflatten(-1, (config.num_attention_heads, -1)).split(
            (config.qk_nope_head_dim, config.v_head_dim), -1
        )
        cu = batch.cu_seqlens
        with recomputed(kv, lambda: self._expanded(latent, norm, up)) if self.recompute else nullcontext():
            out, _ = ds.mla_prefill(q, k_nope, v, cu, cu, scale=self.scale, k_rope=k_rope)
        return out

    def _decode(
        self,
        q: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        q_lengths: Tensor | None,
    ) -> Tensor:
        """Absorbed attention, with the output projection: W^UK is applied to the query and W^UV to the result, so
        the cache is read as it is."""
        config = self.config
        kv_b = self.kv_b_proj.dense(q.dtype).unflatten(0, (config.num_attention_heads, -1))
        w_uk, w_uv = kv_b.split((config.qk_nope_head_dim, config.v_head_dim), 1)  # [H, nope, L], [H, V, L]
        q = ds.mla_decode_queries(q, w_uk, cos, sin).unflatten(0, (lengths.shape[0], -1))
        value_dim = config.kv_lora_rank
        out, _ = ds.mla_decode(
            q, cache, block_table, lengths, scale=self.scale, value_dim=value_dim, q_lengths=q_lengths
        )
        out = out.flatten(0, 1)
        if self.o_proj.takes_fp8 and config.v_head_dim % FP8_BLOCK[1] == 0:
            return self.o_proj(ds.mla_values_quantize(out, w_uv), out.dtype)
        return few.linear(values_of(out, w_uv), self.o_proj)


def values_of(latents: Tensor, w_uv: Tensor) -> Tensor:
    """``[T, H * V]`` from the attended latents ``[T, H, L]`` and W^UV ``[H, V, L]``."""
    if latents.dtype != w_uv.dtype:  # under autocast, which does not change a product that is given out=
        return torch.einsum("thl,hvl->thv", latents, w_uv).flatten(1)
    values = latents.new_empty(*latents.shape[:2], w_uv.shape[1])
    torch.bmm(latents.transpose(0, 1), w_uv.mT, out=values.transpose(0, 1))
    return values.flatten(1)
