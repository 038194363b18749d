"""Runs a case: makes inputs, checks ours and the peers against the reference, times those that are right, cleans up."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

import dskernels as ds
from benchmarks import peers
from benchmarks.cases import Call, Case, difference
from benchmarks.results import Failure, Row
from benchmarks.roofline import Roofs
from benchmarks.timing import Prepared, Times, ratios

LEFT_BEHIND = 1 << 30  # bytes; if a case leaves fewer behind, there is no need to collect garbage

Timer = Callable[[Mapping[str, Call]], dict[str, Times]]


class WrongResult(Exception):  # noqa: N818 - an outcome, not an error of the program
    """A result that is too far from the reference to be worth timing."""


@dataclass
class Outcome:
    """The outcome of one case: a row or a failure for each implementation asked for, and notes about its peers.

    `spent` is the host's time in seconds, including waiting for comparisons: it tells where the time of a run goes.
    """

    results: list[Row | Failure] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    spent: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Count the seconds inside as spent on `what`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[what] = self.spent.get(what, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Runner:
    """Runs cases on one device.

    Args:
        device: where to run.
        time: times named calls against each other.
        roofs: the ceilings of the device.
        impls: implementations to run, None for the one that dskernels chooses.
        host_cost: measures the host time of a call, if that is wanted.
    """

    device: torch.device
    time: Timer
    roofs: Roofs
    impls: Sequence[str | None] = (None,)
    host_cost: Callable[[Call], float] | None = None

    def run(self, case: Case) -> Outcome:
        """Check and time one case; any exception becomes a failure, so that the other cases still run."""
        outcome = Outcome()

        def failed(reason: str) -> None:
            outcome.results = [failure(case, impl, reason) for impl in self.impls]

        try:
            with surviving(failed):
                self._run(case, outcome)
        finally:
            if self.device.type == "cuda":
                # After an illegal access every call raises; the next case will report it.
                with outcome.spending("clearing up"), contextlib.suppress(RuntimeError):
                    if torch.cuda.memory_allocated() > LEFT_BEHIND:
                        gc.collect()  # takes 0.1 to 0.3 s: in a run of all kernel families 29 of 140 s
                    torch.cuda.empty_cache()
        return outcome

    def _run(self, case: Case, outcome: Outcome) -> None:
        torch.manual_seed(0)
        with outcome.spending("inputs"):
            x = case.inputs(self.device)
            part = case.part(x)
        with outcome.spending("the reference"):
            expected = case.ours(part, "reference")()
            self._wait()
        ours: dict[str, Call] = {}

        def failed(impl: str | None, reason: str) -> None:
            outcome.results.append(failure(case, impl, reason))

        for impl in self.impls:
            with surviving(partial(failed, impl)), outcome.spending("compiling and checking ours"):
                name = chosen_impl(case, x, impl)
                call = case.ours(x, impl)
                check(case, case.part_of_output(call(), x), expected)
                ours[name] = call
        if not ours:
            return
        with outcome.spending("peers"):
            rivals = self._peers(case, x, expected, outcome.notes)
        with outcome.spending("timing"):
            calls = {**ours, **{f"peer {name}": call for name, call in rivals.items()}}
            if case.rounds:
                calls = {name: Prepared(lambda: None, call, case.rounds) for name, call in calls.items()}
            times = self.time(calls)
            if case.rounds:  # a result that was right before the peers ran may read what they wrote
                for call in ours.values():
                    check(case, case.part_of_output(call(), x), expected)
            against = {name: times[f"peer {name}"].us for name in rivals}
            best = min(against, key=against.__getitem__, default=None) if case.rounds else None
            for name, call in ours.items():
                timed = times[name].samples and best
                apart = ratios(times[name], times[f"peer {best}"]) if timed else None
                host = None if self.host_cost is None or case.waits else self.host_cost(call)
                what = case.op, case.workload.name, name, times[name]
                row = Row.of(*what, case.work(), self.roofs, against, host, apart)
                outcome.results.append(row)

    def _wait(self) -> None:
        """Wait for the device, so that its remaining work does not count as that of the next step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _peers(self, case: Case, x: Any, expected: Any, notes: list[str]) -> dict[str, Call]:
        """The calls of the peers that are installed, support the job, and agree with the reference."""
        rivals: dict[str, Call] = {}

        def left_out(name: str, reason: str) -> None:
            notes.append(f"{case.title}: {name} left out, {reason}")

        for name, prepare in case.peers(x).items():
            if name in peers.missing():
                continue
            with surviving(partial(left_out, name)):
                peer = prepare()
                check(case, case.part_of_output(peer.result(peer.run()), x), expected, peer=True)
                rivals[name] = peer.run
        return rivals


@contextlib.contextmanager
def surviving(report: Callable[[str], None]) -> Iterator[None]:
    """An exception inside is reported in one line and does not end the run."""
    try:
        yield
    except Exception as error:
        report(one_line(error))


def failure(case: Case, impl: str | None, reason: str) -> Failure:
    """A failure of an implementation that was asked for makes the run fail; a peer that is left out is only noted."""
    return Failure(case.op, case.workload.name, impl or "auto", reason)


def chosen_impl(case: Case, x: Any, impl: str | None) -> str:
    """The implementation that runs, such as ``triton``; if a call has several operations, theirs joined by ``+``."""
    chosen = dict.fromkeys(choice.impl for choice in ds.explain(case.forward(x, impl)))
    return "+".join(chosen)


def check(case: Case, got: Any, expected: Any, *, peer: bool = False) -> float:
    """Raise if `got` differs too much from the reference; returns the difference."""
    form = case.comparable_peer if peer else case.comparable
    limit = case.peer_tolerance if peer else case.tolerance
    diff = difference(form(got), form(expected))
    if not diff <= limit:
        raise WrongResult(f"wrong result: calc_diff {diff:.2g} from the reference, at most {limit:.2g} is right")
    return diff


def one_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    text = str(error).strip().splitlines()
    kind = "" if isinstance(error, (WrongResult, peers.NotApplicable)) else f"{type(error).__name__}: "
    return (kind + (text[0] if text else "")).rstrip(": ")[:300]
