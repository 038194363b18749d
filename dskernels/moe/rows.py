"""The expert block in two halves: the rows that experts make of tokens (`expert_rows`), and sums of each token's rows.

`fused_experts` does both at once. If a token's experts are on several GPUs, messages travel in between: each GPU adds
up the rows of the others' tokens and sends these sums, and it adds up the rows of its own tokens together with the sums
that arrive, in one kernel and without rounding in between (`ExpertRows.sums`). Both halves mean the same as in
`fused_experts`, and run the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dskernels.dispatch import Operation
from dskernels.gemm.weights import done_with
from dskernels.later import Waiting
from dskernels.moe.network import NETWORK, check_network, check_options, flat, flat_options
from dskernels.moe.packed import KEPT, PACKED, empty_kept
from dskernels.reference import rows as reference
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor
from dskernels.validate import HALF_OR_SINGLE, check_int, check_tensor

Weights = tuple[Tensor | Fp8Tensor, Tensor | Fp8Tensor]  # w13 and w2
Chosen = tuple[Tensor, Tensor, int]  # weights and ids of the choices, and the id of the first expert


class ExpertRows(NamedTuple):
    """The rows that experts made of tokens, not added up yet.

    Attributes:
        rows: ``[T * k, H]``, sorted by expert; rows after those of the last expert are undefined.
        index: int32 ``[T, k]``, the row of each choice, -1 if it was dropped; None if token t has only row t.
        weights: fp32 ``[T, k]``, by which the row of each choice is multiplied; None if all are 1.
    """

    rows: Tensor
    index: Tensor | None  # type: ignore[assignment]  # which is the name of a method of tuples
    weights: Tensor | None

    def of(self, tokens: slice) -> ExpertRows:
        """The same for some of the tokens."""
        if self.index is None:
            return self._replace(rows=self.rows[tokens])
        return self._replace(index=self.index[tokens], weights=None if self.weights is None else self.weights[tokens])

    def sums(
        self,
        *,
        came: Tensor | None = None,
        places: Tensor | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Adds up the rows of each token, what arrived for it from other ranks, and `residual`.

        For token t this is ``sum over j of weights[t, j] * rows[index[t, j]] + sum over i of came[places[t, i]] +
        residual[t]``, in fp32, in this order, and rounded once: every call gives the same bits.

        Args:
            came: ``[N, H]`` in the dtype of `rows`, what arrived from other ranks.
            places: int32 ``[T, n]``, contiguous: the rows of `came` for each token; one outside of it adds nothing.
            residual: ``[T, H]`` in the dtype of `rows`.
            out: ``[T, H]`` in the dtype of `rows`, to write to.

        Returns:
            The sums ``[T, H]``: `out` if it was given; `rows` itself if there is nothing to add up.

        Raises:
            TypeError: an argument is of another dtype.
            ValueError: shapes or devices do not fit, or only one of `came` and `places` is given.
        """
        return _sums(self.rows, self.index, self.weights, came, places, residual, out)


@repeated
def _sums(
    rows: Tensor,
    index: Tensor | None,
    weights: Tensor | None,
    came: Tensor | None,
    places: Tensor | None,
    residual: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`ExpertRows.sums` as a function of its fields, so that calls are recorded (see `repeated`)."""
    tokens, hidden = (rows if index is None else index).shape[0], rows.shape[1]
    if (came is None) != (places is None):
        raise ValueError("places: expected with came, and not without")
    if places is not None:
        check_tensor("places", places, dtype=torch.int32, shape=(tokens, "n"), like=rows)
    for name, x, n in (("came", came, "N"), ("residual", residual, tokens), ("out", out, tokens)):
        if x is not None:
            check_tensor(name, x, dtype=rows.dtype, shape=(n, hidden), like=rows)
    if out is None and index is None and came is None and residual is None:
        return rows  # nothing is to be added up
    if out is None:
        out = rows.new_empty(tokens, hidden)
    _sum_rows(rows, index, weights, came, places, residual, out)
    return out


@repeated
def expert_rows(
    x: Tensor,
    weights: Weights,
    experts: Tensor,
    *,
    first: int = 0,
    quantized: Fp8Tensor | None = None,
    fp8: bool = False,
    differentiable: bool = False,
    keep: str = "input",
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of all choices, ``expert[experts[t, j]](x[t])``, sorted by expert; the first half of `fused_experts`.

    Args:
        x: ``[T, H]``, see `fused_experts`. If `quantized` is given and used, its values are not read.
        weights: ``w13 [E, 2 * I, H]`` and ``w2 [E, H, I]``, see `fused_experts`.
        experts: int32 or int64 ``[T, k]``, ids; those outside ``[first, first + E)`` are dropped.
        first: id of the first expert.
        quantized: `x` in 1x128 tiles, if it has been quantised already; its scales may lie row by row.
        fp8: whether to compute in e4m3, and quantise inside what is not quantised yet.
        differentiable: whether a backward follows. Gate and up, which enter the SwiGLU, are then kept for it (on a CPU
            nothing is kept).
        keep: the format in which they are kept, see `fused_experts`.

    Returns:
        Rows ``[T * k, H]`` and index ``[T, k]``, see `ExpertRows`, and what is kept for `expert_rows_backward`.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: shapes, tiles, strides or devices do not fit.
    """
    check_tensor("x", x, dtype=HALF_OR_SINGLE, shape=("T", "H"))
    check_tensor("experts", experts, dtype=(torch.int32, torch.int64), shape=(x.shape[0], "k"), like=x)
    check_int("first", first, low=0)
    fp8 = fp8 or any(isinstance(weight, Fp8Tensor) for weight in weights)
    check_network(("w13", weights[0]), ("w2", weights[1]), x, fp8, stacked=True)
    check_options(x, None, None, keep)
    options = flat_options(x, quantized, fp8, None, keep, differentiable)
    return _expert_rows(x, *_flat(weights), experts, first, fp8, *options)


def expert_rows_backward(
    dout: Tensor,
    x: Tensor,
    weights: Weights,
    chosen: Chosen,
    kept: Tensor,
    *,
    fp8: bool,
    needs: Sequence[bool],
    waiting: Waiting | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the rows of x, of w13, of w2 and of the routing weights, given that of each token's sum.

    Args:
        dout: ``[T, H]``, the gradient of ``sum over j of weights[t, j] * rows[index[t, j]]``.
        x, weights: as in the forward.
        chosen: routing weights fp32 and ids ``[T, k]`` of the choices, and the id of the first expert.
        kept: what the forward kept.
        fp8: as in the forward.
        needs: which of the four gradients are needed.
        waiting: the queue that computes the gradients of w13 and w2 later, see `dskernels.later`; they are then
            returned as None.

    Returns:
        The gradient of x as rows ``[T * k, H]``, which the caller adds up with the index of the forward and without
        weights, and the other three; None for those that are not needed.
    """
    fp8 = fp8 or any(isinstance(weight, Fp8Tensor) for weight in weights)
    given, among = (dout.contiguous(), x, weights, chosen, kept), tuple(needs[1:3])
    # `done_with` is also called inside the operations below. It is repeated out here, because nothing but kernels runs
    # there when the recording of an earlier call is launched again.
    trained = [w for w, needed in zip(weights, among, strict=True) if fp8 and needed and isinstance(w, Tensor)]
    if waiting is None:
        gradients = _gradients(*given, fp8, tuple(needs))
        done_with(*trained)
        return gradients
    dx, dgates, dgate_up, hidden = _gradients_of_inputs(*given, fp8)

    def rest() -> list[Tensor]:
        gradients = _gradients_of_weights(*given, dgate_up, hidden, fp8, among)
        done_with(*trained)
        return [dw for dw in gradients if dw is not None]

    waiting.compute(rest)
    return dx, None, None, dgates


@repeated
def _gradients(
    dout: Tensor, x: Tensor, weights: Weights, chosen: Chosen, kept: Tensor, fp8: bool, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    return _or_none(_backward(dout, x, *_flat(weights), *chosen, kept, fp8, list(needs)), needs)


@repeated
def _gradients_of_inputs(
    dout: Tensor, x: Tensor, weights: Weights, chosen: Chosen, kept: Tensor, fp8: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(_backward_inputs(dout, x, *_flat(weights), *chosen, kept, fp8))


@repeated
def _gradients_of_weights(
    dout: Tensor,
    x: Tensor,
    weights: Weights,
    chosen: Chosen,
    kept: Tensor,
    dgate_up: Tensor,
    hidden: Tensor,
    fp8: bool,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    return _or_none(
        _backward_weights(dout, x, *_flat(weights), *chosen, kept, dgate_up, hidden, fp8, list(needs)), needs
    )


def _or_none(gradients: Sequence[Tensor], needs: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def _flat(weights: Weights) -> list[Tensor | None]:
    return [part for weight in weights for part in flat(weight)]


# ---- registration: flat arguments in, flat tensors out --------------------------------------------------------------


def _rows_fake(x, w13, w13_scale, w2, w2_scale, experts, first, fp8, keep, *_):
    rows = experts.numel()
    kept = empty_kept(x, rows if keep & KEPT else 0, w13.shape[1], fp8 and bool(keep & PACKED))
    return x.new_empty(rows, x.shape[1]), experts.new_empty(experts.shape, dtype=torch.int32), kept


def _backward_fake(dout, x, w13, w13_scale, w2, w2_scale, weights, experts, first, gate_up, fp8, needs):
    shapes = (experts.numel(), x.shape[1]), w13.shape, w2.shape, weights.shape
    like = x, w13, w2, weights
    given = zip(like, shapes, needs, strict=True)
    return tuple(x.new_empty(shape) if needed else dout.new_empty(0) for x, shape, needed in given)


def _inputs_fake(dout, x, w13, w13_scale, w2, w2_scale, weights, experts, *_):
    rows, width = experts.numel(), w13.shape[1]
    dx, dgate_up, hidden = (x.new_empty(rows, n) for n in (x.shape[1], width, width // 2))
    return dx, weights.new_empty(weights.shape), dgate_up, hidden


def _weights_fake(dout, x, w13, w13_scale, w2, *args):
    given = zip((w13, w2), args[-1], strict=True)
    return tuple(w.new_empty(w.shape) if needed else dout.new_empty(0) for w, needed in given)


def _operation(schema: str, fake: Callable) -> Operation:
    name = schema.partition("(")[0]
    return Operation(
        schema,
        reference=getattr(reference, name),
        triton=f"dskernels.moe.triton_experts:{name}",
        hopper=f"dskernels.moe.hopper:{name}",
        fake=fake,
    )


CHOSEN = f"{NETWORK}, Tensor weights, Tensor experts, int first, Tensor gate_up"

_expert_rows = _operation(
    f"expert_rows({NETWORK}, Tensor experts, int first, bool fp8, int keep, Tensor? quantized, Tensor? quantized_scale)"
    " -> (Tensor, Tensor, Tensor)",
    _rows_fake,
)
_backward = _operation(
    f"expert_rows_backward(Tensor dout, {CHOSEN}, bool fp8, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
)
_backward_inputs = _operation(
    f"expert_rows_backward_inputs(Tensor dout, {CHOSEN}, bool fp8) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_inputs_fake,
)
_backward_weights = _operation(
    f"expert_rows_backward_weights(Tensor dout, {CHOSEN}, Tensor dgate_up, Tensor hidden, bool fp8, bool[] needs)"
    " -> (Tensor, Tensor)",
    _weights_fake,
)
_sum_rows = Operation(
    "sum_rows(Tensor rows, Tensor? index, Tensor? weights, Tensor? came, Tensor? places, Tensor? residual, "
    "Tensor(a!) out) -> ()",
    reference=reference.sum_rows,
    triton="dskernels.moe.triton:weighted_sum_into",
)
