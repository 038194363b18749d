"""Gradients of registered operations beyond plain autograd: in transforms of `torch.func`, and where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gradient(NamedTuple):
    """What autograd asks of an operation.

    Attributes:
        save: keeps what the backward needs, ``save(ctx, inputs, output)``, its inputs being arguments and ``impl``.
        backward: ``backward(ctx, *grads)``, a gradient, or None, for each of these inputs.
    """

    save: Callable[[Any, tuple, Any], None]
    backward: Callable[..., tuple]


def no_gradient(name: str) -> Gradient:
    """That of an operation that has none: who differentiates its results hears of it.

    Autograd would go on with None and a warning, or, where the reference runs, differentiate what that is made of.
    """

    def backward(ctx: Any, *grads: Tensor | None) -> tuple:
        raise NotImplementedError(
            f"{name} has no gradient: call it under torch.no_grad(), or on tensors that are detached, or leave its "
            "results out of the loss"
        )

    return Gradient(lambda ctx, inputs, output: None, backward)


class Differentiated(torch.autograd.Function):
    """A call of an operation for which autograd asks a `Gradient`: ``apply(*inputs, overload, gradient)``.

    What `torch.library.register_autograd` makes of an operation the transforms of `torch.func` (grad, vjp, jacrev) do
    not take, and this they do. `torch.vmap` runs the operation once for each example.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> Any:
        """The operation, below this level of differentiation."""
        *given, overload, _ = inputs
        return overload(*given)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        """What the backward needs."""
        *given, _, ctx.gradient = inputs
        ctx.gradient.save(ctx, tuple(given), output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        """The operation's gradients."""
        return *ctx.gradient.backward(ctx, *grads), None, None


class Straight(torch.autograd.Function):
    """A call of an operation by its implementation, ``apply(*inputs, run, gradient)``, where ``run()`` is that call.

    It does what `torch.library.register_autograd` makes of an operation, without torch's dispatcher on the way to the
    implementation and back. With kernels that do nothing, `balance_loss` and its gradient took the host 249 us through
    the dispatcher, and 94 so.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        """The implementation, below autograd as the dispatcher would run it; then what the backward needs."""
        *given, run, ctx.gradient = inputs
        with torch._C._AutoDispatchBelowAutograd():
            result = run()
            ctx.gradient.save(ctx, tuple(given), result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        """The operation's gradients."""
        return *ctx.gradient.backward(ctx, *grads), None, None


def refusing(name: str, result: Tensor, inputs: Sequence[Any]) -> Tensor:
    """A result that an operation without a gradient has written, which says so when it is differentiated."""
    if torch.compiler.is_compiling() or not is_asked_for(inputs):
        return result
    return Differentiated.apply(*inputs, lambda *inputs: result, no_gradient(name))


def is_transformed() -> bool:
    """Whether a transform of `torch.func` runs that may ask for gradients: any but `functionalize`."""
    interpreter = torch._C._functorch.peek_interpreter_stack()
    return interpreter is not None and interpreter.key() != torch._C._functorch.TransformType.Functionalize


def is_wrapped(x: Tensor) -> bool:
    """Whether a transform has made it, one that has ended too: then there is no memory at its address."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def is_asked_for(inputs: Sequence[Any]) -> bool:
    """Whether a result of these would require a gradient."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs)
