"""What was found out for tensors of given metadata, found again in about 1 us.

Reading sizes or strides in Python takes 0.3 us for each tensor, all that a kernel's launch depends on more than torch
takes to allocate. `torch.compile` compares it in one call of C++, its tensor guards, and so does this.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_data_ptr = Tensor.data_ptr
_Entry = tuple[Callable[..., bool], "list[int] | None", Any]


class ByMetadata:
    """Values kept by the metadata of some tensors, and anything hashable besides.

    Metadata is each tensor's type, dtype, device, sizes, strides, whether it requires a gradient, its address modulo
    16, and how torch would dispatch on it now (so that what was kept outside of a transform, of autocast or of
    inference mode is not found inside).

    Args:
        most: how many values are kept. Half of them are those kept or asked for of late; once these are as many, they
            take the place of the other half, of which each that is asked for comes back. What goes goes bit by bit, as
            it may take 50 us (a graph).
    """

    def __init__(self, most: int = 2048) -> None:
        self._most = most
        self._n = 0  # of those in `_kept`
        self._kept: dict[tuple, list[_Entry]] = {}
        self._before: dict[tuple, list[_Entry]] = {}
        self._going: list[_Entry] = []

    def find(self, tensors: tuple[Tensor, ...], also: Hashable) -> tuple[Any, list[int]] | None:
        """The value that was kept for these, and the addresses of the tensors; None if there is none."""
        key = len(tensors), tensors[0].shape, also
        for kept in (self._kept, self._before):
            for entry in kept.get(key, ()):
                check, odd, value = entry
                if check(*tensors):
                    addresses = list(map(_data_ptr, tensors))
                    plain = all(addresses) and not functools.reduce(operator.or_, addresses) & 15
                    if odd is None if plain else odd == _odd(addresses):
                        if kept is not self._kept:
                            self._put(key, entry)
                        return value, addresses
        return self._find_once(tensors, also)

    def _find_once(self, tensors: tuple[Tensor, ...], also: Hashable) -> tuple[Any, list[int]] | None:
        """The same where a tensor is given more than once."""
        places = _places(tensors)
        if places is None:
            return None
        found = self.find(tuple({id(x): x for x in tensors}.values()), (also, places))
        return None if found is None else (found[0], [found[1][i] for i in places])

    def keep(self, tensors: tuple[Tensor, ...], also: Hashable, value: Any) -> None:
        """Keep a value for these."""
        places = _places(tensors)
        if places is not None:
            tensors, also = tuple({id(x): x for x in tensors}.values()), (also, places)
        sizes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        odd = _odd([x.data_ptr() for x in tensors])
        self._put((len(tensors), tensors[0].shape, also), (guards.check, odd, value))

    def _put(self, key: tuple, entry: _Entry) -> None:
        """Among those that are kept now, the latest first."""
        if self._n >= self._most // 2:
            self._going += itertools.chain.from_iterable(self._before.values())
            self._n, self._before, self._kept = 0, self._kept, {}
        del self._going[-2:]
        self._n += 1
        self._kept.setdefault(key, []).insert(0, entry)


def _odd(addresses: list[int]) -> list[int] | None:
    """Addresses modulo 16, -1 where there is no memory, as of what has lost it since; None if all are plain."""
    odd = [address & 15 if address else -1 for address in addresses]
    return odd if any(odd) else None


def _places(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """Where each stands among the different ones; None if all are: guards are never met by one that is given twice."""
    first = {id(x): i for i, x in enumerate({id(x): x for x in tensors}.values())}
    return None if len(first) == len(tensors) else tuple([first[id(x)] for x in tensors])
