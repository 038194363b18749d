"""The arithmetic of latent attention, independent of the cache: with expanded keys and values, or absorbed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.integrations.transformers.cache import LatentLayer, Places
from dskernels.integrations.transformers.patches import STATE
from dskernels.integrations.transformers.weights import Copy, dense_weight, is_fp8_linear, is_linear, weight_of
from dskernels.mla.rope.gradient import rotated_from
from dskernels.types import Fp8Tensor


class Pass:
    """What all layers of a forward pass share; the first layer that needs it makes it."""

    def __init__(self) -> None:
        self._angles: tuple[Tensor, tuple[Tensor, Tensor]] | None = None  # made of which tensor, and they
        self._places: tuple[tuple, Places] | None = None  # made for which key, and they
        self._standing: Places | None = None

    def __deepcopy__(self, memo: dict) -> Pass:
        """A copy of a model makes its own `Pass`, which all of its layers share."""
        memo[id(self)] = copied = Pass()
        return copied

    def angles(self, embeddings: Any, batch: int) -> tuple[Tensor, Tensor]:
        """cos and sin of each token, float32 ``[B * S, rope / 2]``, from the position embeddings that transformers
        passes."""
        source = embeddings if isinstance(embeddings, Tensor) else embeddings[0]
        if self._angles is not None and self._angles[0] is source and not torch.compiler.is_compiling():
            return self._angles[1]
        if isinstance(embeddings, Tensor):  # e^(i angle), as in DeepSeek-V2
            cos, sin = embeddings.real, embeddings.imag
        else:  # cos and sin of each angle twice, one half behind the other
            cos, sin = (x[..., : x.shape[-1] // 2] for x in embeddings)
        cos, sin = (x.float().expand(batch, -1, -1).reshape(-1, x.shape[-1]).contiguous() for x in (cos, sin))
        self._angles, self._places = (source, (cos, sin)), None
        return cos, sin

    def places(self, layer: LatentLayer, batch: int, new: int, mask: Tensor | None) -> Places:
        """`LatentLayer.places`, made once for all layers that hold equally many tokens, as all have the same mask."""
        if self._standing is not None:
            return self._standing
        state = layer.length, layer.capacity, batch, new, layer.real
        if self._places is not None and not torch.compiler.is_compiling():
            (*sizes, real), found = self._places
            if tuple(sizes) == state[:4] and real is layer.real:
                return found
        found = layer.places(batch, new, mask)
        self._places = state, found
        return found

    @contextlib.contextmanager
    def standing(self, places: Places) -> Iterator[None]:
        """Inside the block, tokens go to these places; afterwards, nothing of this remains."""
        self._standing = places
        try:
            yield
        finally:
            self._standing = self._angles = self._places = None


@dataclass
class AttentionState:
    """State of an attention module: what it shares with the other layers, and copies of its weights.

    Attributes:
        complex: whether the angles come as complex numbers (V2); rotated pairs then stay adjacent.
        fp8: whether plain weights are multiplied in e4m3.
    """

    shared: Pass
    complex: bool
    fp8: bool
    dense: Copy = field(default_factory=Copy)


def prompt(
    self: Any,
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
) -> Tensor:
    """Attention of tokens among themselves, ``[T, heads, value]``; differentiable."""
    k, v = expanded_keys(self, self.kv_a_layernorm(kv))
    q, k_rope = rotated_query(self, q, cos, sin), rotated(k_rope[:, None], cos, sin)[:, 0]
    return ds.mla_prefill(q, k, v, cu_seqlens, cu_seqlens, scale=self.scaling, k_rope=k_rope)[0]


def absorbed(
    self: Any, q: Tensor, cos: Tensor, sin: Tensor, pages: Tensor, table: Tensor, lengths: Tensor
) -> Tensor | Fp8Tensor:
    """Attention of new tokens ``[B * Q, heads, nope + rope]`` to cached latents; quantised if `o_proj` multiplies in
    e4m3."""
    w_uk, w_uv = up_projections(self, q.dtype)
    q = ds.mla_decode_queries(q, w_uk, cos, sin).unflatten(0, (lengths.shape[0], -1))
    out, _ = ds.mla_decode(q, pages, table, lengths, scale=self.scaling, value_dim=self.kv_lora_rank)
    out = out.flatten(0, 1)
    simple = is_linear(self.o_proj) and self.o_proj.bias is None and self.v_head_dim % 128 == 0
    if simple and is_fp8_linear(self.o_proj) and isinstance(weight_of(self.o_proj), Fp8Tensor):
        return ds.mla_values_quantize(out, w_uv)
    return torch.einsum("thl,hvl->thv", out, w_uv)


def rotated_query(self: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[T, heads, nope + rope]`` with the last part rotated: in place if no gradient is needed."""
    if torch.is_grad_enabled():
        return rotated_from(q, cos, sin, self.qk_nope_head_dim)
    rope = q[..., self.qk_nope_head_dim :]
    ds.apply_rope(rope, cos, sin, out=rope)
    return q


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``[T, heads, rope]`` with adjacent pairs rotated and left adjacent; the same for queries and keys."""
    return rotated_from(x, cos, sin, 0) if torch.is_grad_enabled() else ds.apply_rope(x, cos, sin)


def expanded_keys(self: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Keys (without their rotated part) and values, expanded from normed latents ``[T, latent]``."""
    kv = self.kv_b_proj(latents).unflatten(-1, (self.num_heads, -1))
    return kv.split((self.qk_nope_head_dim, self.v_head_dim), -1)


def write(self: Any, kv: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor, pages: Tensor, slots: Tensor) -> None:
    """Write the normed latents and the rotated keys of new tokens to the cache."""
    norm = self.kv_a_layernorm
    with torch.no_grad():
        ds.write_latent_cache(
            kv.detach(), k_rope.detach(), norm.weight, cos, sin, pages, slots, eps=norm.variance_epsilon
        )


def up_projections(self: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """W^UK ``[H, nope, latent]`` and W^UV ``[H, value, latent]``."""
    state: AttentionState = getattr(self, STATE)
    kv_b = dense_weight(self.kv_b_proj, state.dense, dtype).unflatten(0, (self.num_heads, -1))
    w_uk, w_uv = kv_b.split((self.qk_nope_head_dim, self.v_head_dim), 1)
    return w_uk, w_uv
