"""Recomputation: what is cheap to compute again is not kept between forward and backward (report section 3.2.3)."""

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
    """While this holds, autograd keeps nothing of ``tensor`` and its views; its backward calls ``again()`` for it.

    Nothing else runs twice, as it would if a checkpoint ran a part of the model again: no router counts a token twice.
    Inside `torch.compile`, whose partitioner decides for itself what to keep, this does nothing.

    Args:
        tensor: a result that operations inside keep for their backward.
        again: computes the same bits, in the same layout; called without gradients, once for all that was kept, by the
            implementation that is asked for now.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not tensor.requires_grad or not tensor.numel():
        return contextlib.nullcontext()
    again_there = _Again(again)
    place = tensor.untyped_storage()._cdata  # which memory it is, also of tensors that have none

    def pack(kept: Tensor) -> Tensor | _Part:
        if kept.device != tensor.device or kept.untyped_storage()._cdata != place:
            return kept
        again_there.parts += 1
        return _Part(again_there, kept.shape, kept.stride(), int(kept.storage_offset() - tensor.storage_offset()))

    return saved_tensors_hooks(pack, lambda kept: kept.take() if isinstance(kept, _Part) else kept)


class _Again:
    """A tensor to be computed again, and let go when every part of it was taken."""

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
    """What autograd keeps in place of a tensor: where it lies in one that is computed again."""

    whole: _Again
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def take(self) -> Tensor:
        whole = self.whole.take()
        return whole.as_strided(self.shape, self.stride, whole.storage_offset() + self.offset)
