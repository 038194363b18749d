"""Every case under pytest-benchmark: ``pytest benchmarks -k fp8_gemm --benchmark-json gemm.json``.

On a GPU these are the cases and the clock of ``python -m benchmarks``: device time with a cold L2, so that
pytest-benchmark's history and ``pytest-benchmark compare`` work on them. Peers are only timed by ``python -m
benchmarks``. Without a GPU, the reference runs at sizes that a CPU can compute: this shows whether a case still works,
and little about speed.
"""

from __future__ import annotations

import functools

import pytest
import torch

from benchmarks import roofline, timing
from benchmarks.__main__ import FAMILIES, select
from benchmarks.cases import Call, Case
from benchmarks.runner import check, chosen_impl
from benchmarks.small import shrunk

GPU = torch.cuda.is_available()
ROUNDS = 30 if GPU else 3


class DeviceClock:
    """The device time spent in calls, which pytest-benchmark reads before and after each."""

    __name__ = "device time, cold L2"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds

    def timed(self, call: Call) -> Call:
        """The call, which then advances this clock by its device time."""
        stopwatch = _stopwatch()
        call()
        spin_us = timing.spin_before(call, stopwatch.once(call, 0.0))

        def run() -> None:
            self.seconds += stopwatch.once(call, spin_us) / 1e6

        return run


CLOCK = DeviceClock()


@functools.cache
def _stopwatch() -> timing.Stopwatch:
    return timing.Stopwatch()


@functools.cache
def _roofs() -> roofline.Roofs:
    return roofline.measure(_stopwatch().time)


def _cases() -> list:
    """Each case once: without a GPU many are the same after their sizes are reduced."""
    found: dict[tuple[type, str], tuple[str, Case]] = {}
    for family, cases in select(FAMILIES, []).items():
        for case in cases:
            one = case if GPU else shrunk(case)
            found.setdefault((type(one), one.title), (family, one))
    return [pytest.param(case, id=f"{family}-{case.title.replace(' ', '-')}") for family, case in found.values()]


@pytest.mark.benchmark(**({"timer": CLOCK} if GPU else {}))
@pytest.mark.parametrize("case", _cases())
def test_speed(case: Case, benchmark) -> None:
    torch.manual_seed(0)
    x = case.inputs(torch.device("cuda" if GPU else "cpu"))
    impl = chosen_impl(case, x, None)
    call = case.ours(x, None)
    check(case, case.part_of_output(call(), x), case.ours(case.part(x), "reference")())
    benchmark.group = case.op
    benchmark.extra_info["impl"] = impl
    benchmark.pedantic(CLOCK.timed(call) if GPU else call, rounds=ROUNDS)
    if GPU and benchmark.stats is not None:
        us, work = benchmark.stats.stats.median * 1e6, case.work()
        rates = {"roof_pct": 100 * _roofs().floor_us(work) / us, "gbs": work.gbs(us), "tflops": work.tflops(us)}
        benchmark.extra_info.update(rates)
