"""Which implementation was asked for, which ones a device rules out, and :func:`explain`, which says what would run.

`dskernels.dispatch` decides by these at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dskernels.device import capability, default_device, has_triton, interpreting

if TYPE_CHECKING:
    from dskernels.dispatch import Operation

IMPLEMENTATIONS = ("hopper", "triton", "reference")
OPERATIONS: dict[str, Operation] = {}

forced: ContextVar[str | None] = ContextVar("forced implementation", default=None)
choices: ContextVar[list[Choice] | None] = ContextVar("choices of explain()", default=None)


class Choice(NamedTuple):
    """The implementation that runs for one operation, and why each implementation before it does not."""

    operation: str
    impl: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        rejected = "; ".join(f"not {impl}: {reason}" for impl, reason in self.rejected.items())
        return f"{self.operation}: {self.impl}" + (f" ({rejected})" if rejected else "")

    def __repr__(self) -> str:
        return str(self)  # `print(explain(...))` shows a list, which prints its members by repr


class use_impl:  # noqa: N801 - a context manager, spelt like torch.no_grad
    """Run every operation inside ``with use_impl("reference"):`` by that implementation, or raise if it cannot.

    A call's own ``impl=`` takes precedence. A backward runs the implementation that its forward was asked for. It
    applies to the current thread.

    Args:
        impl: ``"reference"``, ``"triton"`` or ``"hopper"``; None leaves the choice to each call, also inside another
            such block.

    Raises:
        ValueError: there is no such implementation. A call that it cannot run raises ValueError itself.
    """

    def __init__(self, impl: str | None) -> None:
        if impl is not None and impl not in IMPLEMENTATIONS:
            raise ValueError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {impl!r}")
        self.impl = impl

    def __enter__(self) -> None:
        self._token = forced.set(self.impl)

    def __exit__(self, *exc_info: object) -> None:
        forced.reset(self._token)


def forced_impl() -> str | None:
    """The implementation that :class:`use_impl` asks for here; None outside of it."""
    return forced.get()


def explain(function: Callable | None = None, *args: Any, **kwargs: Any) -> list[Choice]:
    """Say which implementation would run, and why the others would not, without running any kernel.

    ``explain(dskernels.fp8_gemm, a, b)`` answers for these arguments (which are validated as usual), ``explain()`` for
    every operation on this machine's default device.

    Args:
        function: a public operation, or any function that calls some; None for all operations.
        args: positional arguments of the call.
        kwargs: its keyword arguments.

    Returns:
        One :class:`Choice` for each registered operation that the call runs, in their order.

    Raises:
        TypeError, ValueError: as the function does, also for an explicit `impl` that cannot run; ValueError also if the
            function is not one of ours and calls no operation.
    """
    if function is None:
        probe = torch.empty(0, device=default_device())
        return [
            Choice(op.name, "composite", {}) if op.composite else _by_device(op, probe.device)
            for op in OPERATIONS.values()
        ]
    told: list[Choice] = []
    token = choices.set(told)
    try:
        function(*args, **kwargs)
    finally:
        choices.reset(token)
    if not told and not (getattr(function, "__module__", None) or "").startswith("dskernels"):
        name = getattr(function, "__qualname__", type(function).__name__)
        raise ValueError(f"function: expected one that calls operations of dskernels, {name} called none")
    return told


def _by_device(op: Operation, device: torch.device) -> Choice:
    rejected = {}
    for impl in IMPLEMENTATIONS[:-1]:
        if op.targets[impl] is None:
            rejected[impl] = "there is no such kernel for this operation"
        elif reason := reason_of_device(impl, device, asked_for=False):
            rejected[impl] = reason
        else:
            return Choice(op.name, impl, rejected)
    return Choice(op.name, "reference", rejected)


def check_impl(impl: Any) -> None:
    """Check that `impl` is a string; whether it names an implementation, `Operation.choose` checks."""
    if not isinstance(impl, str):
        raise TypeError(f"impl: expected one of {', '.join(IMPLEMENTATIONS)} or None, got {type(impl).__name__}")


def reason_of_device(impl: str, device: torch.device, asked_for: bool) -> str | None:
    """Why `impl` does not run on `device`, whatever the arguments are, or None.

    `asked_for` says whether the caller named it: on the CPU, Triton's interpreter runs only then.
    """
    if impl == "hopper":
        if device.type != "cuda" or capability(device) != (9, 0):
            return "it needs an sm_90 GPU"
    elif impl == "triton":
        if not has_triton():
            return "Triton is not installed"
        if device.type == "cuda" and (0, 0) < capability(device) < (8, 0):
            return "Triton's kernels need sm_80 or newer, this GPU is sm_{}{}".format(*capability(device))
        if device.type == "cpu":
            if not interpreting():
                return "the tensors are on the CPU, and TRITON_INTERPRET=1 is not set"
            if not asked_for:
                return "the tensors are on the CPU, and the interpreter runs only when asked for by impl='triton'"
    return None
