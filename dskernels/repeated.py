"""Public operations whose calls are recorded whole: from the third call of a kind on, nothing is validated or decided.

Two calls are of the same kind if their tensors have the same metadata (see `ByMetadata`) and their other arguments have
equal types and values. A function decorated with `repeated` does this:

1. The first call of a kind runs normally: it validates its arguments, chooses an implementation and launches kernels.
2. The second call is recorded, see `dskernels.recording`. Its arguments are validated once more.
3. Further calls launch again what was recorded. Since the first arguments of the kind were valid, these are too.

Every call runs normally if torch is involved in it (a gradient is needed, a transform, `torch.compile`, a mode, the
profiler), or if its tensors are not on a GPU.
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
    """The calls of a function that may be repeated, by their kind."""

    def __init__(self) -> None:
        self.kinds = ByMetadata()


def repeated(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator of a public function: it repeats the launches that it made for arguments of the same kind.

    The function may have no effects but those of its operations, and may depend on nothing but its arguments,
    `use_impl`, and what is given to `Recorder.keep`. The attribute `known` of the result has the calls known so far.
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
    """What runs calls of this kind from now on; it takes the tensors' addresses, the tensors, args and kwargs."""
    if recording.may_be_recorded(tensors):
        return Kind(function, PublicRecorder, tensors[0].get_device())
    return lambda addresses, tensors, args, kwargs: function(*args, **kwargs)


def _taken_apart(given: Iterable[Any], tensors: list[Tensor], values: list[Any]) -> bool:
    """Collect the tensors among the arguments in `tensors`, and the rest in `values`: types, values, and where tensors
    are.

    Returns False if an argument has another type, for which equality might not mean that calls do the same.
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
    """Whether it consists of two plain tensors and a pair of integers, so that equal parts mean equal arguments."""
    data, scale, block = x
    if type(data) not in PLAIN or type(scale) not in PLAIN or type(block) is not tuple or len(block) != 2:
        return False
    return type(block[0]) is type(block[1]) is int


class PublicRecorder(Recorder):
    """A recorder that also notes which of its tensors the function writes to, and lets it return them, at any depth."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__(tensors)
        self._writes: set[int] = set()

    def wrote(self, x: Tensor) -> None:
        """Called when one of our operations has written to its argument `x`."""
        number = self.number_of(x)
        if number is not None:
            self._writes.add(number)
        elif not any(x.untyped_storage().data_ptr() == made.untyped_storage().data_ptr() for made in self._made):
            self.refuse("a part of an argument is written to")

    def written(self) -> list[int]:
        """The numbers of the call's tensors that were written to."""
        return sorted(self._writes)

    def returned(self, result: Any, number_of: Callable[[Tensor], int]) -> Returned:
        """A function that makes what the call returns out of the new results and the call's own tensors."""
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
        # New tensors first, then constants, as in an `Fp8Tensor`: this takes a third of the time of the general case.
        if len(results) > 1 and _is_constant(rest):
            take = operator.itemgetter(*map(number_of, results))
            return lambda new, tensors: make((*take(new), *rest))
        if _is_constant(result):
            return lambda new, tensors: result
        parts = [self.returned(x, number_of) for x in result]
        return lambda new, tensors: make([part(new, tensors) for part in parts])


def _is_constant(x: Any) -> bool:
    """Whether it contains no tensor, at any depth."""
    return all(map(_is_constant, x)) if type(x) is tuple else type(x) in _ATOMS
