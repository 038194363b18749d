"""Recomputation: what is cheap to compute again is not saved for the backward (report section 3.2.3)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

import dskernels as ds
from dskernels.choice import forced_impl


def recomputed(tensor: Tensor, again: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
    """Inside, autograd does not save ``tensor`` or views of it; its backward calls ``again()`` to get it.

    Nothing else runs twice, unlike a checkpoint around a part of the model: no router counts a token twice. Inside
    `torch.compile`, whose partitioner decides what to save, this does nothing.

    Args:
        tensor: a result that operations inside save for their backward.
        again: computes the same bits in the same layout; called without gradients, once for everything that was not
            saved, by the implementation that is then asked for.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.requires_grad or not tensor.numel():
        return contextlib.nullcontext()
    again_there = _Again(again)
    place = tensor.untyped_storage()._cdata  # identifies the memory, also for empty tensors

    def pack(kept: Tensor) -> Tensor | _Part:
        if kept.device != tensor.device or kept.untyped_storage()._cdata != place:
            return kept
        again_there.parts += 1
        return _Part(again_there, kept.shape, kept.stride(), int(kept.storage_offset() - tensor.storage_offset()))

    return saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Part) else kept)


class _Again:
    """A tensor to be computed again, and released when every part of it has been taken."""

    def __init__(self, again: Callable[[], Tensor]) -> None:
        self.compute, self.impl = again, forced_impl()
        self.parts = self.taken = 0
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            with torch.no_grad(), ds.use_impl(self.impl):
                self.value = self.compute()
        value = self.value
        self.taken += 1
        if self.taken == self.parts:
            self.taken, self.value = 0, None
        return value


class _Part(NamedTuple):
    """What autograd saves instead of a tensor: its place within a tensor that is computed again."""

    whole: _Again
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def take(self) -> Tensor:
        whole = self.whole.take()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)
