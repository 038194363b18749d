"""Exchanges between the GPUs of one host, and an expert-parallel layer with and without overlap.

    torchrun --nproc-per-node 2 -m benchmarks.bench_parallel [--out parallel.json] [--quick]

Each number is the median over the repetitions of the slowest rank. Rates are bytes that leave a rank, by time. The peer
is a plain NCCL `all_to_all_single` of the same bytes. On gloo ranks without GPUs it runs too, to be tried; its times
mean nothing there.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from dskernels.model.parallel.decode import DecodeExperts
from dskernels.model.parallel.exchange import Trip, pack
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.plan import Plan, Team
from dskernels.types import Routing


class Bench:
    """Timing on all ranks together."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds, the median of the slowest rank."""
        for _ in range(3):
            function()
        times = []
        for _ in range(self.repeats):
            dist.barrier()
            self._wait()
            start = time.perf_counter()
            function()
            self._wait()
            spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64, device=self.device)
            dist.all_reduce(spent, op=dist.ReduceOp.MAX)
            times.append(float(spent))
        return statistics.median(times)

    def graph(self, function: Callable[[], Any], calls: int = 20) -> float:
        """Seconds of a call inside a CUDA graph of several; on the CPU of one call."""
        if self.device.type != "cuda":
            return self.time(function)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(calls):
                function()
        return self.time(graph.replay) / calls

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def routing_of(tokens: int, experts: int, top_k: int, device: torch.device) -> Routing:
    return ds.route(torch.randn(tokens, experts, device=device), top_k=top_k)


def large(bench: Bench, group: dist.ProcessGroup, tokens: int, hidden: int, experts: int, top_k: int) -> dict:
    """Dispatch and combine in bf16, and in e4m3 there, beside an all-to-all of as many bytes."""
    device = bench.device
    routing = routing_of(tokens, experts, top_k, device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    trip = Trip.plan(routing.experts, group, experts // group.size())
    packed = pack(x, routing.weights, routing.experts)

    def dispatch() -> None:
        trip.send(trip.spread(packed))
        trip.arrived()

    back = torch.randn(sum(trip.received), hidden, device=device).bfloat16()

    def combine() -> None:
        trip.send_back(pack(back))
        trip.gathered(trip.arrived().view(torch.bfloat16))

    rows = torch.tensor(sum(trip.sent), device=device)
    dist.all_reduce(rows, op=dist.ReduceOp.MAX)  # an all-to-all in equal parts wants one number for all ranks
    each = int(rows) * packed.shape[1] * 4
    source = torch.empty(each // group.size() * group.size() // 4, device=device)
    target = torch.empty_like(source)
    plain = bench.time(lambda: dist.all_to_all_single(target, source, group=group))
    whole = bench.time(lambda: Trip.plan(routing.experts, group, experts // group.size()))
    result: dict[str, Any] = dict(tokens=tokens, hidden=hidden, bytes=each, plan_us=whole * 1e6)
    for name, seconds in (("nccl", plain), ("dispatch", bench.time(dispatch)), ("combine", bench.time(combine))):
        result[f"{name}_us"], result[f"{name}_gb_per_s"] = seconds * 1e6, each / seconds / 1e9
    return result


def small(bench: Bench, group: dist.ProcessGroup, tokens: int, hidden: int, experts: int, top_k: int) -> dict:
    """Decode's exchange: NCCL's all-to-all, and both halves through symmetric memory, in a CUDA graph."""
    device = bench.device
    routing = routing_of(tokens, experts, top_k, device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    rows = x.repeat(group.size(), 1)
    target = torch.empty_like(rows)
    result: dict[str, Any] = dict(tokens=tokens, hidden=hidden)
    result["nccl_us"] = bench.graph(lambda: dist.all_to_all_single(target, rows, group=group)) * 1e6
    if device.type == "cuda":
        from dskernels.model.parallel.symmetric import SymmetricDecodeExperts

        for wire in ("same", "fp8"):
            exchange = SymmetricDecodeExperts(
                group,
                experts,
                tokens=tokens,
                hidden=hidden,
                top_k=top_k,
                wire=wire,
            )
            needed = exchange.needed(routing.experts)
            y = torch.randn(tokens * group.size(), hidden, device=device).bfloat16()
            every = torch.ones(tokens, group.size(), dtype=torch.bool, device=device)
            dispatch = bench.graph(functools.partial(exchange.dispatch, x, routing, needed))
            back = bench.graph(functools.partial(exchange.send_back, y, every))
            result[f"symmetric_dispatch_{wire}_us"], result[f"symmetric_combine_{wire}_us"] = dispatch * 1e6, back * 1e6
    return result


def layer(
    bench: Bench, group: dist.ProcessGroup, tokens: int, hidden: int, inner: int, experts: int, top_k: int
) -> dict:
    """An expert-parallel layer of two micro-batches, forward: one by one, overlapped, and without its messages."""
    device, per_rank = bench.device, experts // group.size()
    w13 = (torch.randn(per_rank, 2 * inner, hidden, device=device) / hidden**0.5).bfloat16()
    w2 = (torch.randn(per_rank, hidden, inner, device=device) / inner**0.5).bfloat16()
    halves = [torch.randn(tokens // 2, hidden, device=device).bfloat16() for _ in range(2)]
    routings = [routing_of(tokens // 2, experts, top_k, device) for _ in range(2)]
    spread = ExpertParallel(group, experts)
    holder = _Layer(spread, w13, w2)

    @torch.no_grad()
    def one_by_one() -> None:
        for x, routing in zip(halves, routings, strict=True):
            holder(x, routing)

    @torch.no_grad()
    def together() -> None:
        overlapped(holder, [functools.partial(holder, x, r) for x, r in zip(halves, routings, strict=True)])

    # As many rows as arrive on average, all for experts that are here.
    local = [routing_of(tokens // 2, per_rank, min(top_k, per_rank), device) for _ in range(2)]

    @torch.no_grad()
    def alone() -> None:
        for x, routing in zip(halves, local, strict=True):
            ds.fused_experts(x, w13, w2, routing)

    names = ("compute_only_ms", "unoverlapped_ms", "overlapped_ms")
    return dict(tokens=tokens) | {
        name: bench.time(function) * 1e3 for name, function in zip(names, (alone, one_by_one, together), strict=True)
    }


class _Layer(torch.nn.Module):
    """Experts as `overlapped` finds them."""

    def __init__(self, spread: ExpertParallel, w13: Tensor, w2: Tensor) -> None:
        super().__init__()
        from dskernels.model.config import Config
        from dskernels.model.moe import MoE

        with torch.device("meta"):
            self.moe = MoE(Config.from_name("tiny"), False)
        self.moe.experts.compute = spread
        self.spread, self.weights = spread, (w13, w2)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        return self.spread(x, *self.weights, routing)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    team = Team.start(Plan(expert=int(os.environ.get("WORLD_SIZE", "1"))))
    group, quick = team.group("expert"), arguments.quick
    bench = Bench(team.device, 3 if quick else 20)
    torch.manual_seed(dist.get_rank())
    hidden, inner, experts, top_k = (128, 64, 8, 2) if quick else (7168, 2048, 32, 8)
    results: dict[str, Any] = {"ranks": group.size(), "device": _name(team.device), "large": [], "small": []}
    for tokens in (64,) if quick else (1024, 4096, 16384):
        results["large"].append(large(bench, group, tokens, hidden, experts, top_k))
    for tokens in (8,) if quick else (32, 128):
        results["small"].append(small(bench, group, tokens, hidden, experts, top_k))
    results["layer"] = layer(bench, group, 64 if quick else 4096, hidden, inner, experts, top_k)
    decode = DecodeExperts(group, experts)
    x, routing = torch.randn(8, hidden, device=team.device).bfloat16(), routing_of(8, experts, top_k, team.device)
    w13 = torch.randn(experts // group.size(), 2 * inner, hidden, device=team.device).bfloat16()
    w2 = torch.randn(experts // group.size(), hidden, inner, device=team.device).bfloat16()
    results["decode_layer_us"] = bench.graph(lambda: decode(x, w13, w2, routing)) * 1e6
    if dist.get_rank() == 0:
        text = json.dumps(results, indent=2)
        print(text)
        if arguments.out:
            arguments.out.write_text(text + "\n")
    team.close()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
