"""Quantised copies of weights, kept until the weight changes.

`fp8_linear` and the expert block multiply by bf16, fp16 or fp32 weights that are quantised on the way. The copy of a
weight in 128x128 blocks, and that of its transpose for the gradient, are kept here, so that a weight that does not
change is quantised once. A change is recognised by the weight's data pointer and version counter. Not every change
raises that counter, so copies are also given up once the weight's gradient has been computed, see `done_with`. In a
CUDA graph, trainable weights have copies that belong to the capture, see `quantized_weight`.
"""

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


@dataclass(eq=False)
class _Kept:
    """The copies of a weight, and the state of the weight for which they were made.

    New copies of a weight take the place of the old ones in the same object, `state` last: another thread that finds
    the new state finds the new copies.

    Attributes:
        state: data pointer and version of the weight, and the implementation that was asked for; `CHANGED` if the
            weight may have changed since.
        rows: the weight in 128x128 blocks.
        transposed: its transpose in 128x128 blocks; None until it is asked for.
    """

    state: tuple[int, int, str | None]
    rows: Fp8Tensor
    transposed: Fp8Tensor | None


CHANGED = (-1, -1, None)  # a state that no weight has
_COUNTED = "_dskernels_counts_changes"  # attribute of weights for which `counts_changes` was called
_kept = WeakTensorKeyDictionary()  # weight -> _Kept
# The same by the id of the weight: a lookup takes 1 us instead of 6. It holds weak references only.
_quick: dict[int, tuple[TensorWeakRef, weakref.ref[_Kept]]] = {}
MOST_QUICK = 1 << 14  # entries; some may belong to weights that no longer exist
# The weight at each address: with hooks for saved tensors, autograd passes another tensor object for it to a backward.
_owners: dict[tuple, TensorWeakRef] = {}


def weight_operand(weight: Tensor, scale: Tensor | None, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [N, K] or [E, N, K], or its transpose, in 128x128 blocks. Without a `scale`, it is quantised.

    If the operation is being recorded, the recording asks for the copy again at each of its launches.
    """
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
    """A function that returns data and scale of a weight's copy; always the same object for the same arguments."""
    return lambda weight: quantized_weight(weight, transpose=transpose, impl=impl)[:2]


def quantized_weight(weight: Tensor, *, transpose: bool, impl: str | None) -> Fp8Tensor:
    """`weight` [N, K] or [E, N, K], or its transpose, in 128x128 blocks; quantised again only if it may have changed.

    A change is recognised by data pointer and version counter, and is assumed once the weight's gradient has been
    computed, see `done_with`. Copies belong to `impl`: an implementation that does not support the weight raises, even
    if another one has already made a copy. Weights made in inference mode have no version counter, and are quantised in
    every call.

    Between the replays of a CUDA graph, a trainable weight changes without its version changing. So every capture has
    its own copies of trainable weights, and quantises each weight once per capture. (With one pass for each product, a
    step of 1.8 G parameters in e4m3 took 0.9 ms more, of 59.)
    """
    quick = _found_quickly(weight)
    if (
        quick is not None
        and not (weight.requires_grad and _is_capturing(weight))
        and quick.state == (weight.data_ptr(), weight._version, impl)
    ):
        found = quick.transposed if transpose else quick.rows
        if found is not None:
            return found
    capturing = _is_capturing(weight)
    own = capturing and weight.requires_grad
    capture = capture_id(weight.device) if own else None
    if weight.is_inference() or (own and capture is None) or choices.get() is not None:  # `explain` computes nothing
        return quantize(weight, (128, 128), transpose=transpose, impl=impl)
    owner = weight if quick is not None else _owner_of(weight)
    state = (owner.data_ptr(), owner._version, impl)
    copies = _captured.of(capture) if own else _kept
    kept = quick if quick is not None and not own else copies.get(owner)
    if kept is None or kept.state != state:
        before = kept or _kept.get(owner)
        if before is not None and before.transposed is not None and (own or before.state[:2] != state[:2]):
            # The weight is being trained: make both copies that the next step needs in one pass.
            kept = _Kept(state, *quantize_both(weight, block=(128, 128), impl=impl))
        else:
            kept = _Kept(state, quantize(weight, (128, 128), impl=impl), None)
        if before is not None and before.state[2] == impl and not (weight.requires_grad or capturing):
            kept = _in_place_of(before, kept)
    if transpose and kept.transposed is None:
        # Quantise the weight again instead of transposing the copy: torch transposes bytes at a quarter of the speed of
        # memory.
        kept = replace(kept, transposed=quantize(weight, (128, 128), transpose=True, impl=impl))
    if own:
        copies[owner] = kept
    elif not capturing and quick is not None:  # looking the weight up again, in both places, would take 15 us
        _captured.of(None)
        quick.rows, quick.transposed, quick.state = kept.rows, kept.transposed, kept.state
    elif not capturing:  # copies made during a capture are in the graph's memory, and filled only by a replay
        _captured.of(None)
        copies[owner] = kept
        if owner is weight:
            if len(_quick) >= MOST_QUICK:
                _quick.clear()
            _quick[id(weight)] = TensorWeakRef(weight), weakref.ref(kept)
    return kept.transposed if transpose else kept.rows  # type: ignore[return-value]


def _found_quickly(weight: Tensor) -> _Kept | None:
    """What is kept of a weight, whatever its state; None if it takes the slower lookup to find out."""
    quick = _quick.get(id(weight))
    return quick[1]() if quick is not None and quick[0]() is weight else None


def _in_place_of(before: _Kept, kept: _Kept) -> _Kept:
    """Write the new copies of a frozen weight to the memory of the previous ones, and return these.

    A CUDA graph captured before reads that memory, which would otherwise be freed and used for something else. The
    graph sees the new values after the next eager call.
    """
    if before.rows.data.shape != kept.rows.data.shape or before.rows.data.device != kept.rows.data.device:
        return kept
    for old, new in ((before.rows, kept.rows), (before.transposed, kept.transposed)):
        if old is not None and new is not None:  # either both have a transpose or neither
            old.data.view(torch.uint8).copy_(new.data.view(torch.uint8))
            old.scale.copy_(new.scale)
    return replace(before, state=kept.state)


def done_with(*weights: Tensor) -> None:
    """Announce that the gradients of these weights have been computed: the next forward quantises the weights again.

    What changes a weight after that need not raise its version counter. FSDP2 gathers new values into the same tensor,
    often at the same address, and restores the counter; others write to ``weight.data``, or use a collective. With the
    copies of the preceding step such a model would train, but wrongly. So copies are used from a forward to its
    backward only, except for weights whose every change is known to be counted, see `counts_changes`.
    """
    for weight in weights:
        if _is_capturing(weight):
            continue  # the copies belong to the capture
        kept, owner = _found_quickly(weight), weight
        if kept is None:
            owner = _owner_of(weight)
            kept = _kept.get(owner)
        if kept is not None and not getattr(owner, _COUNTED, False):
            kept.state = CHANGED


def counts_changes(weights: Iterable[Tensor]) -> None:
    """Announce that whatever writes to these weights raises their version counter, as this library's optimisers do.

    Their copies are then used for all micro-batches of a step.
    """
    for weight in weights:
        setattr(weight, _COUNTED, True)


class _Captured:
    """The copies of trainable weights for the running capture; they are dropped once another capture, or eager code,
    quantises a weight."""

    def __init__(self) -> None:
        self._capture: int | None = None
        self._copies = WeakTensorKeyDictionary()

    def of(self, capture: int | None) -> WeakTensorKeyDictionary:
        """The copies of the capture with this id; None stands for eager code."""
        if capture != self._capture:
            self._capture, self._copies = capture, WeakTensorKeyDictionary()
        return self._copies


_captured = _Captured()


def _is_capturing(weight: Tensor) -> bool:
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _owner_of(weight: Tensor) -> Tensor:
    """The tensor under which the copies of `weight` are kept: itself or, in a backward, another tensor of that memory.

    This holds in a backward only. Elsewhere, another tensor of the same memory may have a version counter of its own,
    as `weight.data` has, which does not change with this one's.
    """
    if weight in _kept:
        return weight
    place = (weight.data_ptr(), weight.is_neg(), weight.device, weight.dtype, weight.shape, weight.stride())
    if torch._C._current_graph_task_id() != -1:  # -1 outside of backward passes
        found = _owners.get(place)
        owner = None if found is None else found()
        if owner is not None and owner in _kept and owner.data_ptr() == place[0] and owner._version == weight._version:
            return owner
    if len(_owners) >= MOST_QUICK:  # most entries are then of weights that existed for one call
        _owners.clear()
    _owners[place] = TensorWeakRef(weight)
    return weight


def transposed(weight: Fp8Tensor) -> Fp8Tensor:
    """The transpose of a weight, or of each weight of a stack, in 128x128 blocks; exact, since the blocks are the
    same."""
    return Fp8Tensor(weight.data.mT.contiguous(), weight.scale.mT.contiguous(), weight.block)
