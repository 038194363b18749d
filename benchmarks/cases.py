"""What a benchmark case is: an operation on a workload, with its inputs, its oracle and its peers.

A family lists its cases in ``bench_<family>.py``; `runner` checks and times them. The oracle of every case is the
operation's reference implementation, run on the inputs or on a part of them that does not depend on the rest (some
heads, some requests).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.roofline import Chain, Work
from benchmarks.workloads import Workload
from dskernels import Fp8Tensor, use_impl

Call = Callable[[], Any]
_forgetting: list[Callable[[], None]] = []
CHUNK = 1 << 25  # elements compared at once: gradients of 32 experts have 0.9 G, which would be 40 GB in fp64


def kept_within_a_family(function: Callable | None = None, *, most: int | None = 1) -> Callable:
    """Keep what was made last (such as a model) for other cases of the same family; `forget` drops it.

    `most` is how many are kept, None for all.
    """
    if function is None:
        return functools.partial(kept_within_a_family, most=most)
    kept = functools.lru_cache(maxsize=most)(function)
    _forgetting.append(kept.cache_clear)
    return kept


def forget() -> None:
    """Drop everything that is kept within a family: the models of three families do not fit into 140 GB together."""
    for clear in _forgetting:
        clear()


@dataclass(frozen=True)
class Case:
    """One operation on one workload; each operation has a subclass.

    Attributes:
        tolerance: the largest `calc_diff` from the reference that counts as right; results that are not floats must be
            equal. Rounding a result to bf16 costs 5e-6, with a margin of ten.
        peer_tolerance: the same for peers, which may not quantise, or do it differently.
        waits: whether the call waits for the device, so that its host time means nothing.
        rounds: the least number of rounds in which ours and the peers run in turns, 0 if a few are enough. Otherwise
            the ratio is the median over rounds, each of which has its own.
    """

    workload: Any
    tolerance: ClassVar[float] = 5e-6
    peer_tolerance: ClassVar[float] = 2e-3
    waits: ClassVar[bool] = False
    rounds: ClassVar[int] = 0

    @property
    def op(self) -> str:
        """Name of the operation in tables and files."""
        raise NotImplementedError

    @property
    def title(self) -> str:
        """The operation and its workload, which ``--filter`` matches."""
        workload: Workload = self.workload
        return f"{self.op} {workload.name}"

    def work(self) -> Work | Chain:
        """Operations and bytes."""
        raise NotImplementedError

    def inputs(self, device: torch.device) -> Any:
        """Make the inputs on `device`."""
        raise NotImplementedError

    def ours(self, x: Any, impl: str | None) -> Call:
        """The call that is timed. What it prepares before returning the call is not."""
        raise NotImplementedError

    def forward(self, x: Any, impl: str | None) -> Call:
        """The part of the call that decides which implementation runs: without the backward."""
        return self.ours(x, impl)

    def part(self, x: Any) -> Any:
        """The inputs of the part that the reference computes: everything, unless that is too much."""
        return x

    def part_of_output(self, out: Any, x: Any) -> Any:
        """The corresponding part of the whole output."""
        return out

    def comparable(self, out: Any) -> Any:
        """The output in a form in which right means close."""
        return out

    def comparable_peer(self, out: Any) -> Any:
        """The same for comparing with peers, if they return less or quantise differently."""
        return self.comparable(out)

    def peers(self, x: Any) -> dict[str, Callable[[], Peer]]:
        """For each peer that can do this job, a function that prepares it."""
        return {}


def under(impl: str | None, call: Call) -> Call:
    """A call that takes no `impl` itself, run under the implementation that is asked for, if any."""

    def run() -> Any:
        with use_impl(impl):
            return call()

    return call if impl is None else run


def difference(got: Any, expected: Any) -> float:
    """The largest `calc_diff` between the tensors of two outputs; infinite if tensors that must be equal are not."""
    pairs = list(zip(leaves(got), leaves(expected), strict=True))
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def leaves(out: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(out, Tensor):
        return [out]
    if isinstance(out, Fp8Tensor):
        return [out.data, out.scale]
    if isinstance(out, (tuple, list)):
        return [leaf for item in out for leaf in leaves(item)]
    return []


def calc_diff(x: Tensor, y: Tensor) -> float:
    """``1 - 2 x.y / (x.x + y.y)`` in fp64, half the squared relative error.

    0 for two tensors of zeros, inf if either has a NaN.
    """
    error, total = torch.zeros(2, dtype=torch.float64, device=x.device)
    for a, b in zip(x.flatten().split(CHUNK), y.flatten().split(CHUNK), strict=True):
        same = (a == b) & a.isinf()  # -inf is a right answer for a log-sum-exp, and would give NaN here
        a, b = a.double().masked_fill(same, 0), b.double().masked_fill(same, 0)
        error += (a - b).square().sum()
        total += a.square().sum() + b.square().sum()
    diff = (error / total).item() if total != 0 else 0.0  # the same formula, without its cancellation
    return diff if math.isfinite(diff) else math.inf


def _difference(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return math.inf
    if got.dtype == expected.dtype and (got.dtype == torch.float8_e4m3fn or not got.dtype.is_floating_point):
        same = torch.equal(got.view(torch.uint8), expected.view(torch.uint8)) if got.numel() else True
        return 0.0 if same else math.inf
    return calc_diff(got, expected)
