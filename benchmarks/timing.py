"""Device time of a call, with a cold L2, compared with its rivals in both orders.

Only the device is timed: before each call the L2 is flushed, and the device is kept busy for as long as the host needs
to enqueue the call, so that a short kernel is not charged for gaps between launches (a decode step runs in a CUDA
graph, which has none). Host time is measured separately, by `host_cost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Call = Callable[[], object]

# An upper bound of the multiprocessors' clock (1.98 GHz on an H100), so that the device is busy for at least that long.
SPIN_CYCLES_PER_US = 2000
# With only 1.5 times the host's time, calls from Python took 1 to 5 us longer than their launches alone.
SPIN_US = 20
SLOW_US = 20_000  # from here on, neither the host's share nor many runs are worth their time


@dataclass(frozen=True)
class Prepared:
    """A call for which something is made ready anew before every run, which is not timed.

    Attributes:
        before: makes it ready.
        call: what is timed.
        runs: how often at least, where a few runs would not do.
    """

    before: Callable[[], object]
    call: Call
    runs: int = 0

    def __call__(self) -> object:
        """Both, for who does not time it."""
        self.before()
        return self.call()


@dataclass(frozen=True)
class Times:
    """Microseconds of one call: the median, and what 20% and 80% of the runs stayed below.

    `drift` is the median of the second half of the runs over that of the first: where it is far from 1 the machine
    changed its clock, or was not warm, while it was looked at. `samples` are the runs, in order.
    """

    us: float
    p20: float
    p80: float
    drift: float = 1.0
    samples: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @classmethod
    def of(cls, samples: list[float]) -> Times:
        """Summarise measured microseconds, in the order in which they were taken."""
        ordered, half = sorted(samples), len(samples) // 2
        first, second = sorted(samples[:half]), sorted(samples[len(samples) - half :])
        drift = quantile(second, 0.5) / quantile(first, 0.5) if half else 1.0
        us, p20, p80 = (quantile(ordered, q) for q in (0.5, 0.2, 0.8))
        return cls(us, p20, p80, drift, tuple(samples))


def quantile(ordered: list[float], q: float) -> float:
    """The q-quantile of sorted numbers, interpolated."""
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def ratios(first: Times, second: Times) -> tuple[float, float, float]:
    """How many times as long the second took in each round: the median, what 20% and what 80% of them stayed below."""
    each = sorted(there / here for here, there in zip(first.samples, second.samples, strict=True))
    median, p20, p80 = (quantile(each, q) for q in (0.5, 0.2, 0.8))
    return median, p20, p80


def schedule(runs: Mapping[str, int]) -> list[list[str]]:
    """Who runs in each round: every rival as often as asked, spread evenly, every second round in reverse order."""
    n_rounds = max(runs.values(), default=0)
    rounds = []
    for i in range(n_rounds):
        names = [name for name, n in runs.items() if (i + 1) * n // n_rounds > i * n // n_rounds]
        rounds.append(names if i % 2 == 0 else names[::-1])
    return rounds


def host_cost(call: Call, runs: int = 30) -> float:
    """Microseconds until the call returns to Python, its work enqueued on an idle device (median)."""
    samples = []
    for _ in range(runs):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    torch.cuda.synchronize()
    return Times.of(samples).us


class Stopwatch:
    """Times rivals against each other on the current CUDA device.

    Args:
        seconds: about how long to measure each rival for, at most.
        most: bound on the number of runs of each.
    """

    def __init__(self, seconds: float = 0.3, most: int = 100) -> None:
        self.seconds, self.most = seconds, most
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flushed = torch.empty(max(4 * l2, 64 << 20), dtype=torch.uint8, device="cuda")

    def time(self, rivals: Mapping[str, Call]) -> dict[str, Times]:
        """Time the calls in turns: forwards in one round, backwards in the next, the slow ones in fewer rounds."""
        spins, runs = {}, {}
        for name, call in rivals.items():
            call()  # compiles and allocates
            once_us = self.once(call, spin_us=0.0)
            spins[name] = spin_before(call, once_us)
            runs[name] = max(self._runs(once_us), call.runs if isinstance(call, Prepared) else 0)
        events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in rivals}
        for names in schedule(runs):
            for name in names:
                events[name].append(self._enqueue(rivals[name], spins[name]))
        torch.cuda.synchronize()
        return {name: Times.of([elapsed_us(*pair) for pair in pairs]) for name, pairs in events.items()}

    def _runs(self, us: float) -> int:
        fewest = 5 if us > SLOW_US else 10
        return max(fewest, min(self.most, int(self.seconds * 1e6 / us)))

    def once(self, call: Call, spin_us: float) -> float:
        """Microseconds of one run, which is waited for."""
        pair = self._enqueue(call, spin_us)
        torch.cuda.synchronize()
        return elapsed_us(*pair)

    def _enqueue(self, call: Call, spin_us: float) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if isinstance(call, Prepared):
            call.before()
            call = call.call
        self._flushed.zero_()
        torch.cuda._sleep(int(spin_us * SPIN_CYCLES_PER_US))
        start.record()
        call()
        end.record()
        return start, end


def spin_before(call: Call, once_us: float) -> float:
    """Microseconds to keep the device busy before a call that takes about `once_us`."""
    return 0.0 if once_us > SLOW_US else SPIN_US + 2 * host_cost(call, runs=3)


def elapsed_us(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    """Microseconds between two recorded events."""
    return start.elapsed_time(end) * 1e3
