"""Timing on several GPUs at once, for ``benchmarks.bench_parallel``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

# Cycles, about 10 and 150 ms, in which the host fills the queue: sixteen layers take it 72 ms, and more where other
# processes want its cores; what it has not queued by then would count as the GPU's time.
WAIT, WAIT_FOR_LAYERS = int(2e7), int(3e8)


class Bench:
    """Timing on all ranks together."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        self.meeting = torch.zeros(1, device=device)

    def time(self, function: Callable[[], Any], calls: int = 1, wait: int = WAIT, behind: bool = False) -> float:
        """Seconds of a call, the median of the slowest rank; `behind` another that is not timed.

        After 30 ms without any the first message over NVLink takes 250 us, and not 60.
        """
        for _ in range(3):
            function()
        times = []
        for _ in range(self.repeats):
            dist.barrier()
            once = self._once(function, calls, wait, behind)
            spent = torch.tensor([once], dtype=torch.float64, device=self.device)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            times.append(float(spent))
        return statistics.median(times)

    def graph(self, function: Callable[[], Any], calls: int = 20) -> float:
        """Seconds of a call inside a CUDA graph of several; on the CPU of one call."""
        if self.device.type != "cuda":
            return self.time(function)
        return self.time(captured(function, calls).replay) / calls

    def _once(self, function: Callable[[], Any], calls: int, wait: int, behind: bool) -> float:
        if self.device.type != "cuda":
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        dist.all_reduce(self.meeting)  # the ranks begin together, else one would wait for the other's messages
        if behind:
            function()
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls


def captured(function: Callable[[], Any], calls: int = 1) -> torch.cuda.CUDAGraph:
    """A CUDA graph of so many calls, after some that are not in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # micro-batches have threads of their own
        for _ in range(calls):
            function()
    return graph
