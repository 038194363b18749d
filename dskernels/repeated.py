"""Public operations whose calls are recorded whole: from the third of a kind on nothing is validated or decided anew.

A function that is decorated with `repeated` runs as it is written where torch has a say in the call (a gradient, a
transform, `torch.compile`, a mode, the profiler), for what is not on a GPU, and the first time for arguments of a kind:
such tensors (see `ByMetadata`) and equal other arguments. As they were valid, so are all of their kind, and what was
launched for them is launched again, see `dskernels.recording`.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad, profiler

from dskernels import recording
from dskernels.choice import choices, forced
from dskernels.device import PLAIN, dispatch_modes, several_gpus
from dskernels.dispatch import meets_nothing_else
from dskernels.metadata import ByMetadata
from dskernels.recording import Kind, Recorder, Returned
from dskernels.types import Fp8Tensor, Permuted, Routing

P = ParamSpec("P")
R = TypeVar("R")

_ATOMS = frozenset({int, float, bool, str, type(None), torch.dtype})
_TUPLES = frozenset({tuple, Fp8Tensor, Permuted, Routing})


class Known:
    """What is known of a function's calls."""

    def __init__(self) -> None:
        self.kinds = ByMetadata()


def repeated(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which launches again what it has launched for arguments of the same kind.

    It may do nothing but what its operations do, and depend on nothing but its arguments, `use_impl`, and what
    `Recorder.keep` is told of. What is known of its calls is its attribute `known`.
    """
    known = Known()

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if (
            torch.compiler.is_dynamo_compiling()
            or dispatch_modes()
            or profiler._is_profiler_enabled
            or choices.get() is not None
            or forward_ad._current_level >= 0
        ):
            return function(*args, **kwargs)
        tensors: list[Tensor] = []
        values: list[Any] = list(kwargs)
        if not _taken_apart((*args, *kwargs.values()), tensors, values) or not tensors:
            return function(*args, **kwargs)
        device = torch._C._cuda_getDevice() if several_gpus() else 0
        modes = forced.get(), device, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        also = tuple(values), modes
        given = tuple(tensors)
        try:
            found = known.kinds.find(given, also)
        except RuntimeError:  # a nested tensor has no shape
            return function(*args, **kwargs)
        if found is not None:
            kind, addresses = found
            return kind(addresses, given, args, kwargs)
        result = function(*args, **kwargs)
        if meets_nothing_else(given):
            known.kinds.keep(given, also, _kind(function, given))
        return result

    call.known = known  # type: ignore[attr-defined]
    return call


def _kind(function: Callable, tensors: tuple[Tensor, ...]) -> Callable[..., Any]:
    """What runs calls of such tensors from now on, given their addresses, them, and all arguments."""
    if recording.may_be_recorded(tensors):
        return Kind(function, PublicRecorder, tensors[0].get_device())
    return lambda addresses, tensors, args, kwargs: function(*args, **kwargs)


def _taken_apart(given: Iterable[Any], tensors: list[Tensor], values: list[Any]) -> bool:
    """Add the tensors among arguments to `tensors`, and to `values` what the others are and where the tensors stand.

    False, if there is something of another type, of which equal ones may mean different things.
    """
    for x in given:
        kind = type(x)
        if kind in PLAIN:
            tensors.append(x)
            values.append(Tensor)
        elif kind in _ATOMS:
            values += kind, x
        elif kind is Fp8Tensor and _is_usual(x):
            tensors += x[:2]
            values += kind, x[2]
        elif kind in _TUPLES:
            values += kind, len(x)
            if not _taken_apart(x, tensors, values):
                return False
        else:
            return False
    return True


def _is_usual(x: Fp8Tensor) -> bool:
    """Whether it is of tensors and a pair of integers: nothing else equals what it is taken apart into."""
    data, scale, block = x
    if type(data) not in PLAIN or type(scale) not in PLAIN or type(block) is not tuple or len(block) != 2:
        return False
    return type(block[0]) is type(block[1]) is int


class PublicRecorder(Recorder):
    """Also notes which of its tensors the function writes to; and they may be among what it returns, at any depth."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._writes: set[int] = set()

    def wrote(self, x: Tensor) -> None:
        """One of our operations has written to this argument of it."""
        number = self.number_of(x)
        if number is not None:
            self._writes.add(number)
        elif not any(x.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for made in self._made):
            self.refuse("a part of an argument is written to")

    def written(self) -> list[int]:
        """Arguments that were written to."""
        return sorted(self._writes)

    def returned(self, result: Any, number_of: Callable[[Tensor], int]) -> Returned:
        """How new results, and tensors of the call, become what the function returned."""
        if isinstance(result, Tensor):
            given = self.number_of(result)
            if given is not None:
                return lambda new, tensors: tensors[given]
            return super().returned(result, number_of)
        if type(result) in _ATOMS:
            return lambda new, tensors: result
        if type(result) not in _TUPLES:
            self.refuse("something else than tensors is returned")
            return lambda new, tensors: result
        make = tuple if type(result) is tuple else functools.partial(tuple.__new__, type(result))
        results = list(itertools.takewhile(lambda x: isinstance(x, Tensor) and self.number_of(x) is None, result))
        rest = tuple(result[len(results) :])
        if len(results) > 1 and _is_constant(rest):  # as of an `Fp8Tensor`: a third of what the general case takes
            take = operator.itemgetter(*map(number_of, results))
            return lambda new, tensors: make((*take(new), *rest))
        if _is_constant(result):
            return lambda new, tensors: result
        parts = [self.returned(x, number_of) for x in result]
        return lambda new, tensors: make([part(new, tensors) for part in parts])


def _is_constant(x: Any) -> bool:
    """Whether there is no tensor in it, at any depth."""
    return all(map(_is_constant, x)) if type(x) is tuple else type(x) in _ATOMS
