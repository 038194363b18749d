"""Continuous batching of transformers over latents: its paged cache, with one row of latent and key for each token.

transformers allocates blocks for the keys and values of as many heads and columns as the configuration says, and
latents do not have that shape. The cache is therefore made from a configuration with one head of half a row: what
transformers takes for the key and the value of a token are the two halves of a row, so that whatever it does with
blocks (sharing, forking, copying) stays correct.
"""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dskernels as ds
from dskernels.integrations.transformers.latents import absorbed, expanded_keys, prompt, rotated_query, write

API = "transformers.generation.continuous_batching.continuous_api"
NAME = "dskernels"  # the name of our implementation of attention
LATENTS = "_dskernels_latents"


class Pages(NamedTuple):
    """The latents of a layer, and where the rows that transformers numbers are among them.

    Attributes:
        rows: ``[pages, tokens of a page, latent + rope]``.
        stride: rows from one block to the next, as transformers counts them.
        apart: pages from one block to the next.
        first: the layer's page within a block.
    """

    rows: Tensor
    stride: int
    apart: int
    first: int

    def row(self, index: Tensor) -> Tensor:
        """The cache slots of these rows."""
        size = self.rows.shape[1]
        if self.apart == 1 and self.stride == size:
            return index
        block = torch.div(index, self.stride, rounding_mode="floor")
        return (block * self.apart + self.first) * size + index - block * self.stride


def paged_cache(cache: Any) -> Any:
    """`cache`, if it is that of continuous batching; else None."""
    return cache if cache is not None and type(cache).__name__ in ("PagedAttentionCache", "LatentPagedCache") else None


def paged_attention(
    self: Any,
    cache: Any,
    kwargs: dict[str, Any],
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Any:
    """Attention of the new tokens of many requests, packed; whole prompts, parts of prompts and single steps may be
    mixed."""
    pages, group = _pages_of(cache, self.layer_idx, self.kv_lora_rank + self.qk_rope_head_dim)
    cu_q, cu_k = kwargs["cu_seq_lens_q"].int(), kwargs["cu_seq_lens_k"]
    if isinstance(cu_k, dict):
        cu_k = cu_k["full_attention"]
    cu_k = cu_k.int()
    longest_q = kwargs.get("max_seqlen_q", kwargs.get("max_length_q"))
    longest: Any = kwargs.get("max_seqlen_k", kwargs.get("max_length_k"))
    longest = longest["full_attention"] if isinstance(longest, dict) else longest
    size = pages.rows.shape[1]
    index = kwargs["read_index"][group]
    slots = pages.row(kwargs["write_index"][group])
    write(self, kv, k_rope, cos, sin, pages.rows, slots)
    if index.numel() == 0:
        return prompt(self, q, kv, k_rope, cos, sin, cu_q)
    if longest_q == 1 and cu_q.shape[0] - 1 == q.shape[0]:
        # The rows of a request fill one block after the other, so the first row of each block tells its page.
        steps = torch.arange(0, longest, size, device=q.device)
        begin = torch.minimum(cu_k[:-1, None] + steps, cu_k[1:, None] - 1).clamp(0, index.shape[0] - 1)
        table = torch.div(pages.row(index[begin]), size, rounding_mode="floor").int()
        return absorbed(self, q, cos, sin, pages.rows, table, cu_k.diff())
    rows = pages.rows.flatten(0, 1)[pages.row(index)]
    latents, key = rows.split((self.kv_lora_rank, self.qk_rope_head_dim), -1)
    q = rotated_query(self, q, cos, sin)
    k, v = expanded_keys(self, latents.contiguous())
    return ds.mla_prefill(q, k, v, cu_q, cu_k, scale=self.scaling, k_rope=key.contiguous())[0]


def _pages_of(cache: Any, layer: int, width: int) -> tuple[Pages, int]:
    """The latents of a layer, and the group of layers that share its index."""
    known = cache.__dict__.setdefault(LATENTS, {})
    if layer not in known:
        known[layer] = _joined(cache, layer, width) if hasattr(cache, "key_cache") else _in_blocks(cache, layer, width)
    return known[layer]


def _joined(cache: Any, layer: int, width: int) -> tuple[Pages, int]:
    """For transformers 5.17: two tensors for each layer of a group, which `latent_paged_cache` made halves of one."""
    group, at = cache.layer_index_to_group_indices[layer]
    half = cache.key_cache[at]
    shape = (half.shape[0] // cache.block_size, cache.block_size, width)
    rows = half.as_strided(shape, (cache.block_size * width, width, 1), half.storage_offset())
    return Pages(rows, cache.block_size, 1, 0), group


def _in_blocks(cache: Any, layer: int, width: int) -> tuple[Pages, int]:
    """For newer versions: one tensor whose blocks hold, for each layer, keys and values, together as large as its
    latents."""
    allocator = cache.layer_to_allocator[layer]
    size = allocator.tokens_per_page
    rows = allocator.cache_tensor.reshape(-1, size, width)
    stride = allocator.block_physical_stride
    return Pages(rows, stride, stride // (2 * size), allocator.layer_indices.index(layer)), allocator.index


def latent_paged_cache(original: type, *args: Any, **kwargs: Any) -> Any:
    """Make a paged cache: of latents, if the model uses our attention."""
    config = kwargs["config"] if "config" in kwargs else args[0]
    if not str(config._attn_implementation).endswith(NAME):
        return original(*args, **kwargs)
    width = config.kv_lora_rank + config.qk_rope_head_dim
    told = copy.copy(config)
    told.num_key_value_heads, told.head_dim = 1, width // 2
    args, kwargs = (args, kwargs | {"config": told}) if "config" in kwargs else ((told, *args[1:]), kwargs)
    cache = original(*args, **kwargs)
    cache.config = config
    if hasattr(cache, "key_cache"):
        for i, half in enumerate(cache.key_cache):
            both = half.new_zeros(half.shape[0], 1, width)
            torch._dynamo.mark_static_address(both)
            cache.key_cache[i], cache.value_cache[i] = both.split(width // 2, -1)
    return cache


def keep_attention(self: Any, original: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """Continuous batching replaces a model's attention by a paged one; this keeps it if it is ours."""
    if model.config._attn_implementation != NAME:
        return original(self, model, *args, **kwargs)
    if _has_prefix():
        model.set_attn_implementation(f"paged|{NAME}")
        self._original_attn_impl = NAME
    return None


@functools.cache
def _has_prefix() -> bool:
    """Whether paged implementations of attention have names of their own, as in transformers 5.17."""
    functions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    return "paged|sdpa" in functions.valid_keys()
