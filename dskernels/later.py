"""Gradients of weights after gradients of inputs: the split of the backward on which ZeroBubble and DualPipe rely.

Other ranks only wait for the gradient of a stage's input. Inside `WeightGradients.collecting`, the operations of this
library that multiply by a weight record, in their forward, where the gradient of that weight may wait. Their backward
then computes only the gradient of the input, and puts the other product into the queue. What the queue computes, added
to ``weight.grad``, is what the backward would have computed, by the same kernels on the same operands.

(Asking autograd for only some gradients would not help: inside an operation, ``ctx.needs_input_grad`` says that all are
needed, whatever was asked for, and both halves would compute both products.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_collecting: ContextVar[WeightGradients | None] = ContextVar("gradients of weights that wait", default=None)


class WeightGradients:
    """A queue of gradients that wait to be computed."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[Tensor], Callable[[], Sequence[Tensor]]]] = []

    def __len__(self) -> int:
        """How many products, or groups of them, are waiting."""
        return len(self._waiting)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Operations that run forward inside will put the gradients of their weights into this queue when they run
        backward."""
        token = _collecting.set(self)
        try:
            yield
        finally:
            _collecting.reset(token)

    def take(self) -> Callable[[], None]:
        """Take what was queued since the last call, as a function that computes it all and adds it to each
        ``.grad``."""
        taken, self._waiting = self._waiting, []

        @torch.no_grad()
        def run() -> None:
            while taken:
                weights, gradients = taken.pop(0)
                for weight, gradient in zip(weights, gradients(), strict=True):
                    if weight.grad is None:
                        weight.grad = gradient
                    else:
                        weight.grad += gradient

        return run


class Waiting(NamedTuple):
    """The queue in which gradients of some weights are to wait; an operation's forward keeps it for its backward."""

    queue: WeightGradients
    weights: Sequence[Tensor]

    def compute(self, gradients: Callable[[], Sequence[Tensor]]) -> None:
        """Queue a computation: ``gradients()``, called when the queue is run, returns one gradient for each weight."""
        self.queue._waiting.append((self.weights, gradients))


def waiting_for(*weights: Tensor) -> Waiting | None:
    """Where the gradients of these weights may wait; None if they may not. Only gradients of leaf tensors can."""
    queue = _collecting.get()
    if queue is None or not weights or not all(weight.is_leaf and weight.requires_grad for weight in weights):
        return None
    return Waiting(queue, weights)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`torch.nn.functional.linear`, but inside `WeightGradients.collecting` the weight's gradient is queued."""
    if torch.compiler.is_dynamo_compiling() or not torch.is_grad_enabled() or waiting_for(weight) is None:
        return F.linear(x, weight)
    return _Linear.apply(x, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.waiting = waiting_for(weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None]:
        x, weight = ctx.saved_tensors
        ctx.waiting.compute(lambda: (dy.flatten(0, -2).T @ x.flatten(0, -2),))
        return dy @ weight if ctx.needs_input_grad[0] else None, None
