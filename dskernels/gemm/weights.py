"""Quantised copies of weights, kept until the weight changes."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from dskernels.choice import choices
from dskernels.cuda.driver import recorder
from dskernels.cuda.libcuda import capture_id
from dskernels.fp8 import quantize, quantize_both
from dskernels.types import Fp8Tensor


@dataclass(frozen=True, eq=False)
class _Kept:
    """Of a weight its copies, and what it was when they were made.

    Attributes:
        state: its data pointer and version, and the implementation that was asked for; `CHANGED` if it may be another.
        rows: its blocks.
        transposed: those of its transpose, once they were asked for.
    """

    state: tuple[int, int, str | None]
    rows: Fp8Tensor
    transposed: Fp8Tensor | None


CHANGED = (-1, -1, None)  # the state of no weight
_COUNTED = "_dskernels_counts_changes"
_kept = WeakTensorKeyDictionary()
# The same by the id of the weight, found in 1 us and not in 6; it keeps nothing alive.
_quick: dict[int, tuple[TensorWeakRef, weakref.ref[_Kept]]] = {}
MOST_QUICK = 1 << 14  # entries, of which some may be of weights that are gone
# Which weight lies where: autograd, under hooks for saved tensors, hands another object for it to a backward.
_owners: dict[tuple, TensorWeakRef] = {}


def weight_operand(weight: Tensor, scale: Tensor | None, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [E?, N, K] in 128x128 blocks, or its transpose; one without a scale is quantised first."""
    if scale is None:
        recording = recorder.get()
        if recording is None or weight.is_inference():
            return quantized_weight(weight, transpose=transpose, impl=impl)
        data, scale = recording.keep(weight, _parts_of(transpose, impl))
        return Fp8Tensor(data, scale, (128, 128))
    quantized = Fp8Tensor(weight, scale, (128, 128))
    return transposed(quantized) if transpose else quantized


@functools.cache
def _parts_of(transpose: bool, impl: str | None) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """What gives data and scale of a weight's copy, always the same function for the same copy."""
    return lambda weight: quantized_weight(weight, transpose=transpose, impl=impl)[:2]


def quantized_weight(weight: Tensor, *, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [E?, N, K] in 128x128 blocks, or its transpose, quantised anew only after the weight was written to.

    A change is seen by data pointer and version counter, and is expected once the weight's gradient is there, see
    `done_with`. The copies are those of `impl`, which refuses what it does not take whether another implementation has
    made some before or not. Weights made in inference mode have no version, and are quantised at each call. A trainable
    weight changes between the replays of a CUDA graph without its version moving: of such a one a capture has copies of
    its own, made once (a step of 1.8 G parameters in e4m3 took 0.9 of 59 ms more with one pass for each product).
    """
    quick = _quick.get(id(weight))
    if quick is not None and quick[0]() is weight and not (weight.requires_grad and _is_capturing(weight)):
        kept = quick[1]()
        if kept is not None and kept.state == (weight.data_ptr(), weight._version, impl):
            found = kept.transposed if transpose else kept.rows
            if found is not None:
                return found
    capturing = _is_capturing(weight)
    own = capturing and weight.requires_grad
    capture = capture_id(weight.device) if own else None
    if weight.is_inference() or (own and capture is None) or choices.get() is not None:  # `explain` computes nothing
        return quantize(weight, (128, 128), transpose=transpose, impl=impl)
    owner = _owner_of(weight)
    state = (owner.data_ptr(), owner._version, impl)
    copies = _captured.of(capture) if own else _kept
    kept = copies.get(owner)
    if kept is None or kept.state != state:
        before = kept or _kept.get(owner)
        if before is not None and before.transposed is not None and (own or before.state[:2] != state[:2]):
            # It is trained: what both products of the next step want, in one pass over it.
            kept = _Kept(state, *quantize_both(weight, block=(128, 128), impl=impl))
        else:
            kept = _Kept(state, quantize(weight, (128, 128), impl=impl), None)
        if before is not None and before.state[2] == impl and not (weight.requires_grad or capturing):
            kept = _in_place_of(before, kept)
    if transpose and kept.transposed is None:
        # Read again, not turned: torch turns bytes at a quarter of the speed of memory.
        kept = replace(kept, transposed=quantize(weight, (128, 128), transpose=True, impl=impl))
    if own:
        copies[owner] = kept
    elif not capturing:  # what is made during capture lives in the graph's memory and is filled only by a replay
        _captured.of(None)
        copies[owner] = kept
        if owner is weight:
            if len(_quick) >= MOST_QUICK:
                _quick.clear()
            _quick[id(weight)] = TensorWeakRef(weight), weakref.ref(kept)
    return kept.transposed if transpose else kept.rows  # type: ignore[return-value]


def _in_place_of(before: _Kept, kept: _Kept) -> _Kept:
    """The new copies of a frozen weight in the memory of those before, which a CUDA graph that was captured reads.

    Else it would read memory that is somebody else's by now. A graph has the new numbers from the next eager call on.
    """
    if before.rows.data.shape != kept.rows.data.shape or before.rows.data.device != kept.rows.data.device:
        return kept
    for old, new in ((before.rows, kept.rows), (before.transposed, kept.transposed)):
        if old is not None and new is not None:  # what one of them has, the other has
            old.data.view(torch.uint8).copy_(new.data.view(torch.uint8))
            old.scale.copy_(new.scale)
    return replace(before, state=kept.state)


def done_with(*weights: Tensor) -> None:
    """Say that the gradients of these weights are there: the next forward quantises them anew.

    What changes a weight then need not raise its version. FSDP2 gathers new values into the same tensor, often at the
    same address, and puts the counter back; others write to ``weight.data``, or by a collective. With the copies of the
    step before such a model trains, only wrongly. So they serve from a forward to its backward, but for weights of
    which it is known that every change is counted.
    """
    for weight in weights:
        if _is_capturing(weight):
            continue  # what is kept is the capture's
        owner = _owner_of(weight)
        kept = None if getattr(owner, _COUNTED, False) else _kept.get(owner)
        if kept is not None:
            _kept[owner] = replace(kept, state=CHANGED)


def counts_changes(weights: Iterable[Tensor]) -> None:
    """Say that whatever writes to these weights raises their version, as this library's optimisers do: their copies
    serve all micro-batches of a step."""
    for weight in weights:
        setattr(weight, _COUNTED, True)


class _Captured:
    """The copies of trainable weights that belong to the capture that runs, let go when another one asks, or none."""

    def __init__(self) -> None:
        self._capture: int | None = None
        self._copies = WeakTensorKeyDictionary()

    def of(self, capture: int | None) -> WeakTensorKeyDictionary:
        """Those of a capture, by its id."""
        if capture != self._capture:
            self._capture, self._copies = capture, WeakTensorKeyDictionary()
        return self._copies


_captured = _Captured()


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _owner_of(weight: Tensor) -> Tensor:
    """The tensor whose copies are those of `weight`: itself, or in a backward one that is the same memory.

    Only there: another tensor of that memory may have a version counter of its own (`weight.data` has), which does not
    move with this one's.
    """
    if weight in _kept:
        return weight
    place = (weight.data_ptr(), weight.is_neg(), weight.device, weight.dtype, weight.shape, weight.stride())
    if torch._C._current_graph_task_id() != -1:  # -1 outside of backward passes
        found = _owners.get(place)
        owner = None if found is None else found()
        if owner is not None and owner in _kept and owner.data_ptr() == place[0] and owner._version == weight._version:
            return owner
    if len(_owners) >= MOST_QUICK:  # of weights that were made for one call
        _owners.clear()
    _owners[place] = TensorWeakRef(weight)
    return weight


def transposed(weight: Fp8Tensor) -> Fp8Tensor:
    """The transpose of a weight, or of each of a stack, in 128x128 blocks; exact, since its blocks are the same."""
    return Fp8Tensor(weight.data.mT.contiguous(), weight.scale.mT.contiguous(), weight.block)
