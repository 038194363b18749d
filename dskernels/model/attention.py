"""Multi-head latent attention (report section 2.1.1): keys written out for prompts and training, absorbed in decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import FP8_BLOCK, Activation, Linear, RMSNorm
from dskernels.model.rope import rotate, softmax_scale


class Attention(nn.Module):
    """Attention whose keys and values are projections of one narrow latent, which is all that is cached of a token.

    Attributes:
        q_proj: the query; with ``q_lora_rank`` it is `q_a_proj`, `q_a_layernorm` and `q_b_proj` instead.
        kv_a_proj_with_mqa: the latent, and the key's rotated part.
        qkv_a_proj: the rows of both, of what multiplies the hidden state, where they are kept as one matrix (see
            `keep_in_fp8`): then neither of them is there.
    """

    qkv_a_proj: Linear | None
    q_proj: Linear | None
    q_a_proj: Linear | None
    kv_a_proj_with_mqa: Linear | None

    def __init__(self, config: Config, fp8: bool) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        hidden, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
        self.qkv_a_proj = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, fp8)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, fp8)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, fp8)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, fp8)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim), fp8)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, fp8)

    @property
    def takes_fp8(self) -> bool:
        """Whether its input may come quantised, see `Linear.takes_fp8`."""
        return self.o_proj.takes_fp8

    def forward(self, x: Activation, batch: Batch, cos: Tensor, sin: Tensor, cache: Tensor | None = None) -> Tensor:
        """Attends within the sequences of ``batch``.

        Args:
            x: ``[T, hidden]``, normed.
            batch: where the tokens stand.
            cos: float32 ``[T, rope / 2]`` of their positions.
            sin: likewise.
            cache: this layer's pages ``[pages, page_size, latent]``; the new tokens are written to it first.

        Returns:
            ``[T, hidden]``.
        """
        config = self.config
        q, latent = self._down(x)
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

    def _down(self, x: Activation) -> tuple[Tensor, Tensor]:
        """Of the hidden state the query, compressed if it is so, and the latent beside the rotated part of the key."""
        dtype = self.kv_a_layernorm.weight.dtype
        if self.qkv_a_proj is not None:
            both = self.qkv_a_proj(x, dtype)
            width = both.shape[1] - self.config.latent_dim
            return both[:, :width], both[:, width:]
        q_proj = self.q_proj if self.config.q_lora_rank is None else self.q_a_proj
        if q_proj is None or self.kv_a_proj_with_mqa is None:
            raise RuntimeError("qkv_a_proj: expected it, as the matrices that it is made of are not there")
        return q_proj(x, dtype), self.kv_a_proj_with_mqa(x, dtype)

    def _queries(self, q: Tensor) -> Tensor:
        """``[T, heads, nope + rope]`` of what `_down` gives."""
        if self.config.q_lora_rank is not None:
            q = self._expanded(q, self.q_a_layernorm, self.q_b_proj)
        return q.unflatten(-1, (self.config.num_attention_heads, -1))

    @staticmethod
    def _expanded(x: Tensor, norm: RMSNorm, projection: Linear) -> Tensor:
        """The projection of a normed latent, which is quantised with the norm where that may be."""
        return projection(norm.quantized(x), x.dtype) if projection.takes_fp8 else projection(norm(x))

    def _rotated(self, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``q`` ``[T, heads, nope + rope]`` with its last part rotated: in place where nothing is differentiated."""
        q_nope, q_rope = q.split((self.config.qk_nope_head_dim, self.config.qk_rope_head_dim), -1)
        if torch.is_grad_enabled():
            return torch.cat((q_nope, self._turned(q_rope, cos, sin)), -1)
        ds.apply_rope(q_rope, cos, sin, out=q_rope)
        return q

    @staticmethod
    def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``x`` ``[T, heads, rope]`` rotated."""
        if torch.is_grad_enabled():
            return rotate(x, cos[:, None], sin[:, None])
        return ds.apply_rope(x, cos, sin)

    def _prompt(self, q: Tensor, kv: Tensor, k_rope: Tensor, batch: Batch) -> Tensor:
        """Keys and values of every head are written out: fewer operations while each is used by many queries."""
        config = self.config
        kv = self._expanded(kv, self.kv_a_layernorm, self.kv_b_proj)
        kv = kv.unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), -1)
        cu = batch.cu_seqlens
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
        """The key's up-projection moves to the query, the value's to the output: the cache is read as it lies. With the
        output projection."""
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
        return self.o_proj(torch.einsum("thl,hvl->thv", out, w_uv).flatten(1))
