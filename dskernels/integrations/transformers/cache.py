"""A layer of transformers' `DynamicCache` that stores latents in the rows that absorbed decode reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

PAGE = 64  # rows in a page; the memory of a request is rounded up to whole pages
SPARE = 4  # a full layer grows by a quarter, so that a long generation is seldom copied


class Places(NamedTuple):
    """Where the new tokens of a forward pass go; layers that hold equally many tokens share it.

    Attributes:
        slots: int64 ``[B * S]``, the row of each new token, -1 for padding.
        lengths: int32 ``[B]``, rows in use, including the new tokens.
        real: bool ``[B, length + S]``, false for tokens so far that are padding; None if there is no padding.
        order: int64 ``[B * S]``, a permutation of the new tokens that moves padding to the end; None if there is none.
        cu_seqlens: int32 ``[B + 1]``, where the real new tokens of each request begin in that order.
    """

    slots: Tensor
    lengths: Tensor
    real: Tensor | None
    order: Tensor | None
    cu_seqlens: Tensor


class LatentLayer(DynamicLayer):
    """Stores the latent and the rotated key of each token next to each other, in memory that grows in place.

    transformers' own layer stores the two separately, copies them at every step, and expands them to the keys and
    values of all heads. Here padding takes no room: the rows of a request are its real tokens, one after the other.
    From outside it looks like transformers' own layer: `keys` are the latents ``[B, 1, length, latent]`` and `values`
    the rotated keys ``[B, 1, length, rope]``, with padding where it was, and `update` does what the unchanged model's
    layer does. So a cache stays valid when its model is accelerated or restored.

    Attributes:
        halves: whether the transformers model stores rotated pairs as two halves (V3) or adjacent, as our rows do (V2).
        rows: ``[B, capacity, latent + rope]``.
        real: bool ``[B, length]``, false for tokens that are padding; None if there is no padding.
        padded: whether the rows themselves contain padding, after an `update` by a model that is not accelerated.
    """

    is_croppable = True

    def __init__(self, latent_dim: int, rope_dim: int, halves: bool) -> None:
        self.latent_dim, self.rope_dim, self.halves = latent_dim, rope_dim, halves
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self.rows: Tensor | None = None
        self.real: Tensor | None = None
        self.length = 0
        self.padded = False
        self._table: Tensor | None = None

    # ---- used by our attention
    # -----------------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Rows that a request has room for."""
        return 0 if self.rows is None else self.rows.shape[1]

    @property
    def pages(self) -> Tensor:
        """The rows in the form that the operations take, ``[pages, PAGE, latent + rope]``."""
        if self.rows is None:
            raise RuntimeError("pages: expected room to be made first, see `reserve`")
        return self.rows.view(-1, PAGE, self.rows.shape[2])

    def block_table(self, length: int) -> Tensor:
        """The pages of each request, int32 ``[B, pages]``: as many as `length` tokens need."""
        if self._table is None:
            batch, pages = self.pages.shape[0] * PAGE // self.capacity, self.capacity // PAGE
            every = torch.arange(batch * pages, dtype=torch.int32, device=self.pages.device)
            self._table = every.view(batch, pages)
        return self._table[:, : -(-length // PAGE)]

    def reserve(self, batch: int, more: int, like: Tensor) -> None:
        """Make room for this many more tokens of each request."""
        needed = self.length + more
        if self.rows is None or (self.length == 0 and (self.rows.shape[0] != batch or self.rows.dtype != like.dtype)):
            self.is_initialized, self.rows, self.device, self.dtype = True, None, like.device, like.dtype
        elif self.rows.shape[0] != batch:
            raise ValueError(f"hidden_states: expected the {self.rows.shape[0]} requests of the cache, got {batch}")
        if needed <= self.capacity:
            return
        capacity = -(-max(needed + needed // SPARE, PAGE) // PAGE) * PAGE
        grown = like.new_empty(batch, capacity, self.latent_dim + self.rope_dim)
        if self.rows is not None and self.length:
            grown[:, : self.length] = self.rows[:, : self.length]
        self.rows, self._table = grown, None

    def places(self, batch: int, new: int, mask: Tensor | None) -> Places:
        """Where the new tokens of each request go. `mask`, bool ``[B, length + new]``, includes the earlier tokens."""
        if self.rows is None:
            raise RuntimeError("places: expected room to be made first, see `reserve`")
        device, past = self.rows.device, self.length
        first = torch.arange(batch, device=device)[:, None] * self.capacity
        if mask is None and self.real is not None:
            mask = torch.cat((self.real, self.real.new_ones(batch, new)), 1)
        if mask is None:
            slots = first + torch.arange(past, past + new, device=device)
            lengths = torch.full((batch,), past + new, dtype=torch.int32, device=device)
            cu_seqlens = torch.arange(0, batch * new + 1, new, dtype=torch.int32, device=device)
            return Places(slots.flatten(), lengths, None, None, cu_seqlens)
        counted = mask.cumsum(1)
        is_new = mask[:, past:]
        slots = torch.where(is_new, first + counted[:, past:] - 1, -1)
        order = torch.argsort(~is_new.flatten(), stable=True) if new > 1 else None
        cu_seqlens = torch.nn.functional.pad(is_new.sum(1).cumsum(0), (1, 0)).int()
        return Places(slots.flatten(), counted[:, -1].int(), mask, order, cu_seqlens)

    def advance(self, new: int, places: Places) -> None:
        """Record that the new tokens have been written."""
        self.length += new
        self.real = places.real

    # ---- used by transformers
    # ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The latents, ``[B, 1, length, latent]``."""
        rows = self._as_given()
        return None if rows is None else rows[:, None, :, : self.latent_dim]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """The rotated keys, ``[B, 1, length, rope]``, in transformers' order."""
        rows = self._as_given()
        if rows is None:
            return None
        rope = rows[:, None, :, self.latent_dim :]
        return torch.cat((rope[..., 0::2], rope[..., 1::2]), -1) if self.halves else rope

    def _as_given(self) -> Tensor | None:
        """The rows in use, with padding put back where it was (a padding row holds a copy of the next real token's)."""
        if self.rows is None:
            return None
        if self.real is None or self.padded:
            return self.rows[:, : self.length]
        row = (self.real.cumsum(1) - 1).clamp(min=0)[..., None]
        return torch.gather(self.rows, 1, row.expand(-1, -1, self.rows.shape[2]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append what transformers' own attention passes in; returns all `keys` and `values`."""
        batch, _, new, _ = key_states.shape
        given = self._as_given()
        if self.real is not None and not self.padded and given is not None and self.rows is not None:
            self.rows[:, : self.length] = given.clone()
        self.padded = self.padded or self.real is not None
        self.reserve(batch, new, key_states)
        rope = value_states
        if self.halves:
            rope = rope.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
        row = torch.cat((key_states, rope), -1)[:, 0]
        self.rows[:, self.length : self.length + new] = row.detach()  # type: ignore[index]
        self.length += new
        if self.real is not None:
            self.real = torch.cat((self.real, self.real.new_ones(batch, new)), 1)
        keys, values = self.keys, self.values
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            past = self.length - new
            keys = torch.cat((keys[:, :, :past], key_states), 2)  # type: ignore[index]
            values = torch.cat((values[:, :, :past], value_states), 2)  # type: ignore[index]
        return keys, values  # type: ignore[return-value]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: memory is allocated when there is something to write."""

    def get_seq_length(self) -> int:
        """Number of tokens, padding included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask."""
        return self.length + query_length, 0

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last tokens: as many as a negative number says, or all beyond a positive number (the older
        convention)."""
        tokens_to_remove = int(tokens_to_remove)  # assisted generation passes a tensor
        length = min(tokens_to_remove, self.length) if tokens_to_remove > 0 else self.length + tokens_to_remove
        self.length = max(length, 0)
        if self.real is not None:
            self.real = self.real[:, : self.length]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the requests (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these requests."""
        if self.rows is not None:
            indices = indices.to(self.rows.device)
            self._replace(self.rows[indices], None if self.real is None else self.real[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each request this many times."""
        if self.rows is not None:
            real = None if self.real is None else self.real.repeat_interleave(repeats, 0)
            self._replace(self.rows.repeat_interleave(repeats, 0), real)

    def _replace(self, rows: Tensor, real: Tensor | None) -> None:
        self.rows, self.real, self._table = rows, real, None

    def offload(self) -> None:
        """Move the rows to the CPU."""
        if self.rows is not None:
            self._replace(self.rows.to("cpu", non_blocking=True), self.real)

    def prefetch(self) -> None:
        """Move the rows back to their device."""
        if self.rows is not None and self.rows.device != self.device:
            self._replace(self.rows.to(self.device, non_blocking=True), self.real)


def latent_layer(cache: Any, index: int, latent_dim: int, rope_dim: int, halves: bool) -> LatentLayer | None:
    """The layer of a cache, converted to a `LatentLayer` if it is transformers' plain one; None for other caches."""
    if not isinstance(cache, Cache) or cache.offloading:
        return None
    if cache.layer_class_to_replicate is not None:
        if cache.layer_class_to_replicate is not DynamicLayer:
            return None
        while len(cache.layers) <= index:
            cache.layers.append(LatentLayer(latent_dim, rope_dim, halves))
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is DynamicLayer:
        made = LatentLayer(latent_dim, rope_dim, halves)
        if layer.keys is not None and layer.values is not None and layer.keys.numel():
            with torch.no_grad():
                made.update(layer.keys, layer.values)
            made.padded = True  # a mask may reveal padding in it
        cache.layers[index] = made
        return made
    return layer if type(layer) is LatentLayer else None
