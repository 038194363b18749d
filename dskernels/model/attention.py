"""Multi-head latent attention (report section 2.1.1): keys written out for prompts and training, absorbed in decode."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dskernels as ds
from dskernels.model.batch import Batch
from dskernels.model.config import Config
from dskernels.model.layers import Linear, RMSNorm
from dskernels.model.rope import rotate, softmax_scale


class Attention(nn.Module):
    """Attention whose keys and values are projections of one narrow latent, which is all that is cached of a token."""

    def __init__(self, config: Config, fp8: bool) -> None:
        super().__init__()
        self.config = config
        self.scale = softmax_scale(config)
        hidden, heads, eps = config.hidden_size, config.num_attention_heads, config.rms_norm_eps
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

    def forward(self, x: Tensor, batch: Batch, cos: Tensor, sin: Tensor, cache: Tensor | None = None) -> Tensor:
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
        q_nope, q_rope = self._queries(x).split((config.qk_nope_head_dim, config.qk_rope_head_dim), -1)
        q_rope = rotate(q_rope, cos[:, None], sin[:, None])
        kv, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        if cache is not None:
            if batch.slots is None:
                raise ValueError("batch: expected one made with a block table, since there is a cache to write to")
            norm = self.kv_a_layernorm
            ds.write_latent_cache(kv, k_rope, norm.weight, cos, sin, cache, batch.slots, eps=norm.eps)

        if batch.kind == "prompt":
            out = self._prompt(torch.cat((q_nope, q_rope), -1), kv, rotate(k_rope, cos, sin), batch)
        elif cache is None or batch.block_table is None or batch.lengths is None:
            raise ValueError(f'cache: a batch of kind "{batch.kind}" attends to cached tokens, got None')
        elif batch.kind == "extend":
            q = torch.cat((q_nope, q_rope), -1)
            out, _ = ds.mla_prefill_cached(
                q,
                self.kv_b_proj.dense(q.dtype),
                cache,
                batch.block_table,
                batch.lengths,
                batch.cu_seqlens,
                scale=self.scale,
            )
        else:
            out = self._decode(q_nope, q_rope, cache, batch.block_table, batch.lengths, batch.q_lengths)
        return self.o_proj(out.flatten(1))

    def _queries(self, x: Tensor) -> Tensor:
        """``[T, heads, nope + rope]``."""
        compressed = self.config.q_lora_rank is not None
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if compressed else self.q_proj(x)
        return q.unflatten(-1, (self.config.num_attention_heads, -1))

    def _prompt(self, q: Tensor, kv: Tensor, k_rope: Tensor, batch: Batch) -> Tensor:
        """Keys and values of every head are written out: fewer operations while each is used by many queries."""
        config = self.config
        kv = self.kv_b_proj(self.kv_a_layernorm(kv)).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), -1)
        cu = batch.cu_seqlens
        out, _ = ds.mla_prefill(q, k_nope, v, cu, cu, scale=self.scale, k_rope=k_rope)
        return out

    def _decode(
        self,
        q_nope: Tensor,
        q_rope: Tensor,
        cache: Tensor,
        block_table: Tensor,
        lengths: Tensor,
        q_lengths: Tensor | None,
    ) -> Tensor:
        """The key's up-projection moves to the query, the value's to the output: the cache is read as it lies."""
        config = self.config
        kv_b = self.kv_b_proj.dense(q_nope.dtype).unflatten(0, (config.num_attention_heads, -1))
        w_uk, w_uv = kv_b.split((config.qk_nope_head_dim, config.v_head_dim), 1)  # [H, nope, L], [H, V, L]
        q_latent = torch.einsum("thn,hnl->thl", q_nope, w_uk)
        q = torch.cat((q_latent, q_rope), -1).unflatten(0, (lengths.shape[0], -1))
        value_dim = config.kv_lora_rank
        out, _ = ds.mla_decode(
            q, cache, block_table, lengths, scale=self.scale, value_dim=value_dim, q_lengths=q_lengths
        )
        return torch.einsum("thl,hvl->thv", out.flatten(0, 1), w_uv)
