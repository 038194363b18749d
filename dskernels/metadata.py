"""A cache whose keys are the metadata of tensors; a look-up takes about 1 us.

Reading the sizes or the strides of a tensor in Python takes 0.3 us, and reading all that a kernel's launch depends on
takes longer than torch takes to allocate a result. `torch.compile` compares metadata in one call of C++, its tensor
guards; this cache uses the same function.
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
    """Values kept by the metadata of some tensors, together with any other hashable value.

    The metadata of a tensor is its type, dtype, device, sizes, strides, whether it requires a gradient, its address
    modulo 16, and how torch would dispatch on it now (so a value that was kept outside of a transform, of autocast or
    of inference mode is not found inside of it).

    Args:
        most: how many values are kept. They are in two generations, each of at most half as many. Values that are kept
            or found move to the new generation. When that is full, it replaces the old one, and what the old one still
            has is dropped, a few values at a time, since dropping one may take 50 us (if it has a CUDA graph).
    """

    def __init__(self, most: int = 2048) -> None:
        self._most = most
        self._n = 0  # number of values in `_kept`, the new generation
        self._kept: dict[tuple, list[_Entry]] = {}
        self._before: dict[tuple, list[_Entry]] = {}
        self._going: list[_Entry] = []

    def find(self, tensors: tuple[Tensor, ...], also: Hashable) -> tuple[Any, list[int]] | None:
        """The value that was kept for these tensors and `also`, and the tensors' addresses; None if there is none.

        Raises RuntimeError for a nested tensor, which has no shape.
        """
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
        """The same if a tensor occurs more than once: found by the different tensors, and who is where."""
        places = _places(tensors)
        if places is None:
            return None
        found = self.find(tuple({id(x): x for x in tensors}.values()), (also, places))
        return None if found is None else (found[0], [found[1][i] for i in places])

    def keep(self, tensors: tuple[Tensor, ...], also: Hashable, value: Any) -> None:
        """Keep a value for tensors of this metadata together with `also`."""
        places = _places(tensors)
        if places is not None:
            tensors, also = tuple({id(x): x for x in tensors}.values()), (also, places)
        sizes: list[Any] = [list(x.shape) for x in tensors]
        strides: list[Any] = [list(x.stride()) for x in tensors]
        guards = torch._C._dynamo.guards.TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
        odd = _odd([x.data_ptr() for x in tensors])
        self._put((len(tensors), tensors[0].shape, also), (guards.check, odd, value))

    def _put(self, key: tuple, entry: _Entry) -> None:
        """Put an entry into the new generation, in front of earlier ones with the same key."""
        if self._n >= self._most // 2:
            self._going += itertools.chain.from_iterable(self._before.values())
            self._n, self._before, self._kept = 0, self._kept, {}
        del self._going[-2:]
        self._n += 1
        self._kept.setdefault(key, []).insert(0, entry)


def _odd(addresses: list[int]) -> list[int] | None:
    """The addresses modulo 16, with -1 for a tensor without memory (a storage that was emptied); None if all are 0."""
    odd = [address & 15 if address else -1 for address in addresses]
    return odd if any(odd) else None


def _places(tensors: tuple[Tensor, ...]) -> tuple[int, ...] | None:
    """The index of each tensor among the different ones; None if all are different.

    Torch's guards are never fulfilled if the same tensor is given twice.
    """
    first = {id(x): i for i, x in enumerate({id(x): x for x in tensors}.values())}
    return None if len(first) == len(tensors) else tuple([first[id(x)] for x in tensors])
