"""Allocations between guard zones, full of NaN: what is written past a result, or read before it is written, shows.

    with guarded() as memory:
        out = ds.fp8_gemm(a, b)
    memory.check()

Inside, all that Python allocates uninitialised stands in the middle of its own memory, every byte of which is 0xFF (NaN
in each floating-point type, -1 in each integer one). `check` raises if a guard was written to. `between` moves an input
there, so that what is read past it is NaN.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

GUARD = 4096  # bytes on each side, more than one box of a tensor map's rows is wide


class Guards:
    """The memory around each guarded tensor."""

    def __init__(self) -> None:
        self.zones: list[tuple[str, Tensor, int]] = []

    def tensor(self, name: str, sizes: tuple[int, ...], strides: tuple[int, ...], dtype, device) -> Tensor:
        """An uninitialised tensor between guards."""
        width = dtype.itemsize
        extent = width * (sum((n - 1) * s for n, s in zip(sizes, strides, strict=True)) + 1 if math.prod(sizes) else 0)
        padded = -(-extent // 16) * 16
        memory = torch.full((2 * GUARD + padded,), 0xFF, dtype=torch.uint8, device=device)
        self.zones.append((f"{name} {list(sizes)} {dtype}", memory, extent))
        return memory.view(dtype).as_strided(sizes, strides, GUARD // width)

    def between(self, x: Tensor) -> Tensor:
        """A copy of `x`, strides and all, between guards."""
        return self.tensor("input", tuple(x.shape), x.stride(), x.dtype, x.device).copy_(x)

    def check(self) -> None:
        """Raise if a guard was written to."""
        for name, memory, extent in self.zones:
            around = torch.cat([memory[:GUARD], memory[GUARD + extent :]])
            if bool((around != 0xFF).any()):
                raise AssertionError(f"{name}: memory around it was written to")


@contextlib.contextmanager
def guarded() -> Iterator[Guards]:
    """Put guards around all that is allocated uninitialised."""
    guards = Guards()
    empty, new_empty, matmul, mm = torch.empty, Tensor.new_empty, Tensor.__matmul__, torch.mm
    dynamo = torch._C._dynamo.guards

    def guard(name: str, like: Tensor) -> Tensor:
        where = like.device
        return (
            guards.tensor(name, tuple(like.shape), like.stride(), like.dtype, where) if where.type != "meta" else like
        )

    def of_empty(*args, **kwargs):
        return guard("empty", empty(*args, **kwargs))

    def of_new_empty(self, *args, **kwargs):
        return guard("new_empty", new_empty(self, *args, **kwargs))

    def of_matmul(a, b):
        if a.dim() != 2 or b.dim() != 2 or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return matmul(a, b)
        return mm(a, b, out=guard("product", new_empty(a, (a.shape[0], b.shape[1]))))

    def of_mm(a, b, *, out_dtype=None, **given):
        if given or not a.is_cuda or (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
            return mm(a, b, **given) if out_dtype is None else mm(a, b, out_dtype=out_dtype, **given)
        out = guard("product", new_empty(a, (a.shape[0], b.shape[1]), dtype=out_dtype or a.dtype))
        return mm(a, b, out=out) if out_dtype is None else mm(a, b, out_dtype=out_dtype, out=out)

    patches = [mock.patch.object(torch, "empty", of_empty), mock.patch.object(Tensor, "new_empty", of_new_empty)]
    # What torch allocates by itself.
    patches += [mock.patch.object(Tensor, "__matmul__", of_matmul), mock.patch.object(torch, "mm", of_mm)]
    for owner, name in ((torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty_strided")):
        patches.append(mock.patch.object(owner, name, _after(getattr(owner, name), name, guard)))
    if hasattr(dynamo, "_empty_strided_cuda"):
        function = dynamo._empty_strided_cuda
        patches.append(mock.patch.object(dynamo, "_empty_strided_cuda", _after(function, "empty", guard)))
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield guards


def _after(function, name, guard):
    def patched(*args, **kwargs):
        return guard(name, function(*args, **kwargs))

    return patched
