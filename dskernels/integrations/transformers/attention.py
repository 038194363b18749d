"""The forward of latent attention: expanded keys and values for prompts and training, absorbed attention for decode."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.integrations.transformers.cache import LatentLayer, latent_layer
from dskernels.integrations.transformers.latents import AttentionState, absorbed, prompt, rotated_query, write
from dskernels.integrations.transformers.paged import paged_attention, paged_cache
from dskernels.integrations.transformers.patches import STATE
from dskernels.integrations.transformers.weights import dense_weight, weight_of
from dskernels.types import Fp8Tensor

DECODE_TOKENS = 8  # up to this many new tokens of a request are absorbed; for more, keys and values are expanded


def attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Replaces the module's forward, with the same arguments; the cache has one name in newer transformers, one in
    older."""
    state: AttentionState = getattr(self, STATE)
    batch, new = hidden_states.shape[:2]
    pages = paged_cache(cache)
    kept = cache if past_key_values is None and pages is None else past_key_values
    layer = None
    if kept is not None:
        layer = latent_layer(kept, self.layer_idx, self.kv_lora_rank, self.qk_rope_head_dim, not state.complex)
    if pages is None and _is_transformers_own(self, kept, layer, attention_mask, kwargs):
        return type(self).forward(
            self,
            hidden_states,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            **{_name_of_cache(type(self).forward): kept},
            **kwargs,
        )

    cos, sin = state.shared.angles(position_embeddings, batch)
    q = self.q_proj(hidden_states) if self.q_lora_rank is None else _expanded(self, hidden_states)
    q = q.view(batch * new, self.num_heads, self.qk_head_dim)
    latent = self.kv_a_proj_with_mqa(hidden_states).view(batch * new, -1)
    kv, k_rope = latent.split((self.kv_lora_rank, self.qk_rope_head_dim), -1)
    if pages is not None:
        out = paged_attention(self, pages, kwargs, q, kv, k_rope, cos, sin)
    elif layer is None:
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=q.device)
        out = prompt(self, q, kv, k_rope, cos, sin, cu_seqlens.int())
    else:
        out = _cached(self, layer, attention_mask, batch, q, kv, k_rope, cos, sin)
    if isinstance(out, Fp8Tensor):
        weight = weight_of(self.o_proj)
        y = ds.fp8_gemm(out, weight, out_dtype=q.dtype)  # type: ignore[arg-type]
    else:
        y = self.o_proj(out.flatten(1))
    return y.view(batch, new, -1), None


def _expanded(self: Any, hidden_states: Tensor) -> Tensor:
    return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))


@functools.cache
def _name_of_cache(forward: Any) -> str:
    """The name of the cache argument in the module's own forward, which has changed once."""
    return "cache" if "cache" in inspect.signature(inspect.unwrap(forward)).parameters else "past_key_values"


def _is_transformers_own(
    self: Any, kept: Any, layer: LatentLayer | None, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Whether to leave a call to transformers, because it needs something that the operations do not compute."""
    if kept is not None:
        if layer is None:
            return True  # a static, quantised or offloaded cache
        if torch.is_grad_enabled() and layer.length:
            return True  # gradients through absorbed attention
        if layer.padded and (mask is not None or layer.real is not None):
            return True  # rows that an unchanged model wrote, with padding between them
    elif mask is not None and kwargs.get("cu_seq_lens_q") is None:
        return True  # training on padded batches
    if mask is not None and mask.dim() != 2 and kwargs.get("cu_seq_lens_q") is None:
        return True  # a custom mask
    return bool(kwargs.get("output_attentions")) or (self.training and self.attention_dropout > 0)


def _cached(
    self: Any,
    layer: LatentLayer,
    mask: Tensor | None,
    batch: int,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor | Fp8Tensor:
    state: AttentionState = getattr(self, STATE)
    new = q.shape[0] // batch
    layer.reserve(batch, new, kv)
    if mask is not None:
        mask = mask[:, -(layer.length + new) :].bool()
    places = state.shared.places(layer, batch, new, mask)
    write(self, kv, k_rope, cos, sin, layer.pages, places.slots)
    past, order = layer.length, places.order
    layer.advance(new, places)
    if past and new <= DECODE_TOKENS and order is None:
        table = layer.block_table(layer.capacity)
        return absorbed(self, q, cos, sin, layer.pages, table, places.lengths)
    if order is not None:
        q, kv, k_rope, cos, sin = (x[order] for x in (q, kv, k_rope, cos, sin))
    if past:
        q = rotated_query(self, q, cos, sin)
        kv_b = dense_weight(self.kv_b_proj, state.dense, q.dtype)
        table = layer.block_table(past + new)
        out, _ = ds.mla_prefill_cached(
            q, kv_b, layer.pages, table, places.lengths, places.cu_seqlens, scale=self.scaling
        )
    else:
        out = prompt(self, q, kv, k_rope, cos, sin, places.cu_seqlens)
    return out if order is None else torch.empty_like(out).index_copy_(0, order, out)
