"""Parity: every kernel against its reference, on small ragged shapes, on this machine.

A family lists its cases in a module of its own here; `CASES` collects them. `check` runs one. `dskernels parity` prints
them as a table, and the tests run the same list, so that what is shown is what is tested.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import dskernels
from dskernels.types import Fp8Tensor

# Tensor cores keep 13 to 14 bits while they add up 128 e4m3 products: a relative error below 2^-12, and `difference` is
# half its square. Measured on an H100: up to 9e-9.
E4M3_SUMS = 3e-8

FAMILIES = ("fp8", "gemm", "grouped_gemm", "routing", "moe", "mla_decode", "mla_prefill")


@dataclass(frozen=True)
class Case:
    """One call to compare.

    Attributes:
        op: name of the public function, the same in `dskernels` and in `dskernels.reference`.
        label: what is special about the case, such as its sizes.
        inputs: makes (args, kwargs) on a device. It is called anew for each implementation and seeds itself, so that an
            operation may write to its arguments.
        tolerance: largest allowed `difference` of a floating-point output; integer outputs must be equal.
        gradient: also compare the gradients of all floating-point tensors among the arguments.
    """

    op: str
    label: str
    inputs: Callable[[torch.device], tuple[tuple, dict[str, Any]]]
    tolerance: float
    gradient: bool = False


class Outcome(NamedTuple):
    """The result of a comparison: the largest difference over all outputs, and whether it is within the tolerance."""

    difference: float
    passed: bool


def all_cases(families: Iterable[str] = FAMILIES) -> list[Case]:
    """The cases of these families."""
    return [case for family in families for case in importlib.import_module(f"dskernels.parity.{family}").CASES]


def check(case: Case, device: torch.device, impl: str, reference_on: torch.device | None = None) -> Outcome:
    """Run `case` with `impl` and with the reference, on the same device unless another is given, and compare."""
    reference = importlib.import_module("dskernels.reference")
    got = [x.to(reference_on or device) for x in _results(getattr(dskernels, case.op), case, device, impl=impl)]
    want = _results(getattr(reference, case.op), case, reference_on or device)
    if len(got) != len(want):
        raise RuntimeError(f"{case.op}: {len(got)} results against {len(want)} of the reference")
    worst = max((_difference(g, w) for g, w in zip(got, want, strict=True)), default=0.0)
    return Outcome(worst, worst <= case.tolerance)


def difference(got: Tensor, want: Tensor) -> float:
    """1 - 2 sum(xy) / sum(x^2 + y^2) in fp64: 0 for equal tensors, half the squared relative error. NaN for any NaN."""
    x, y = got.double().flatten(), want.double().flatten()
    x, y = (t.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0) for t in (x, y))
    size = (x * x + y * y).sum().item()
    return 1 - 2 * (x * y).sum().item() / size if size else 0.0


def _difference(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape or got.dtype != want.dtype:
        return float("inf")
    if not got.dtype.is_floating_point:
        return 0.0 if torch.equal(got, want) else float("inf")
    infinite = want.isinf()
    if not torch.equal(got.isinf(), infinite) or not torch.equal(got[infinite], want[infinite]):
        return float("inf")
    value = difference(got, want)
    return float("inf") if value != value else abs(value)


def _results(function: Callable, case: Case, device: torch.device, **impl: str) -> list[Tensor]:
    args, kwargs = case.inputs(device)
    inputs = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dtype.is_floating_point]
    if case.gradient:
        for tensor in inputs:
            tensor.requires_grad_()
    outputs = _flatten(function(*args, **kwargs, **impl))
    if not case.gradient:
        return outputs
    differentiable = [o for o in outputs if o.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in differentiable]
    gradients = torch.autograd.grad(differentiable, inputs, weights, allow_unused=True)
    return [o.detach() for o in outputs] + [g for g in gradients if g is not None]


def _flatten(output: Any) -> list[Tensor]:
    """The tensors of a result; an `Fp8Tensor` as the numbers that it stands for."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Fp8Tensor):
        return [output.dequantize()]
    return [tensor for part in output for tensor in _flatten(part)]
