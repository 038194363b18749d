"""Several GPUs of one host: exchanges, an expert-parallel layer with and without overlap, training, a pipeline.

    torchrun --nproc-per-node 2 -m benchmarks.bench_parallel [--out parallel.json] [--save] [--only layer] [--quick]

Each number is the median over the repetitions of the slowest rank, by the events of its GPU, where all launches wait in
its queue before it begins: what the host takes is in none. Rates are the bytes that a rank has for all ranks, its own
included, by time, so that those of one size compare as times do. The peer is a plain NCCL `all_to_all_single` of as
many bytes. On gloo ranks without GPUs it runs too, to be tried; its times mean nothing there.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import dskernels as ds
from benchmarks import models, parallel_runs
from benchmarks.parallel_timing import WAIT, WAIT_FOR_LAYERS, Bench, captured
from benchmarks.results import FOLDER, Machine, Row, document
from benchmarks.workloads import MODEL_TRAINED_SLICE
from dskernels.gemm.weights import counts_changes
from dskernels.model import Config
from dskernels.model.moe import MoE
from dskernels.model.parallel.copies import PIECE, CopyEngines
from dskernels.model.parallel.decode import DecodeExperts
from dskernels.model.parallel.engines import reach_each_other
from dskernels.model.parallel.exchange import Form, Trip, loaded, unloaded, widths
from dskernels.model.parallel.expert import ExpertParallel
from dskernels.model.parallel.fixed import FixedTrip, largest_message
from dskernels.model.parallel.mail import Collective, Mail
from dskernels.model.parallel.overlap import overlapped
from dskernels.model.parallel.plan import Plan, Team
from dskernels.moe.rows import ExpertRows
from dskernels.types import Routing

LINK = 450.0  # GB/s each way, of NVLink on an H100 and an H200
ROOF = f"% of roof is of NVLink's {LINK:.0f} GB/s each way by its data sheet; times are kept without their spread"


def routing_of(tokens: int, experts: int, top_k: int, device: torch.device) -> Routing:
    return ds.route(torch.randn(tokens, experts, device=device), top_k=top_k)


def mail_of(group: dist.ProcessGroup, tokens: int, hidden: int, top_k: int, pieces: bool = True) -> Mail:
    """What a training run would use for as many tokens; without `pieces` messages come in one."""
    if not reach_each_other(group):
        return Collective(group)
    size = largest_message(tokens, hidden, top_k, torch.bfloat16)
    return CopyEngines(group, size, piece=PIECE if pieces else 2**62)


def large(bench: Bench, group: dist.ProcessGroup, tokens: int, hidden: int, experts: int, top_k: int) -> dict:
    """Dispatch and combine, fixed and counted, beside an all-to-all of as many bytes.

    A dispatch ends when the rows may be read where they came; "kept", when they are copied from there for a gradient;
    "fp8", when they are tokens again; "operand", when products in e4m3 can read them. A combine ends when the rows are
    added up, of each rank one row a token; "arrived", when they may be read where they came, which is all that a layer
    waits for, as who reads them adds up; "nccl_and_sum" is NCCL's message and the same sum behind it.
    """
    device = bench.device
    routing = routing_of(tokens, experts, top_k, device)
    x = torch.randn(tokens, hidden, device=device).bfloat16()
    mail = mail_of(group, tokens, hidden, top_k)
    columns = [(top_k, torch.float32), (top_k, torch.int32)]

    def dispatch(trip: Trip | FixedTrip, form: Form = "same", lend: bool = True) -> None:
        scales = (1,) if form == "operand" else ()
        trip.send([*loaded(x, form), routing.weights, routing.experts], lend=lend, columns=scales)
        *parts, _, _ = trip.arrived(widths(hidden, x.dtype, form) + columns)
        if form != "operand":
            unloaded(parts, x.dtype)
        trip.release()

    def combine(trip: Trip | FixedTrip, y: Tensor) -> None:
        trip.send_back(ExpertRows(y, None, None))
        trip.returned([(hidden, y.dtype)])

    whole = mail_of(group, tokens, hidden, top_k, pieces=False)

    def arrive() -> None:
        sent = whole.send([[part] for part in every.chunk(group.size())])
        for _ in whole.arriving(sent):
            pass
        whole.finished(sent)

    def add_up() -> None:
        dist.all_to_all_single(target, source, group=group)
        came = target[: every.numel() * every.element_size() // target.element_size()].view(every.dtype)
        own = ExpertRows(every, None, None).of(slice(0, tokens))
        own.sums(came=came.view(every.shape), places=places)

    places = torch.stack([torch.arange(tokens, device=device, dtype=torch.int32)] * (group.size() - 1), 1)
    counted = Trip.plan(routing.experts, group, experts // group.size())
    fixed = functools.partial(FixedTrip, mail, tokens, tokens, device)
    y = torch.randn(counted.rows, hidden, device=device).bfloat16()
    every = torch.randn(group.size() * tokens, hidden, device=device).bfloat16()
    nbytes = group.size() * tokens * (hidden * 2 + top_k * 8)
    source = torch.empty(nbytes // 4 // group.size() * group.size(), device=device)
    target = torch.empty_like(source)
    calls = 5 if device.type == "cuda" else 1
    timed: dict[str, Callable[[], Any]] = {
        "nccl": lambda: dist.all_to_all_single(target, source, group=group),
        "dispatch": lambda: dispatch(fixed()),
        "dispatch_kept": lambda: dispatch(fixed(), lend=False),
        "combine": lambda: combine(fixed(), every),
        "combine_arrived": arrive,
        "nccl_and_sum": add_up,
        "dispatch_fp8": lambda: dispatch(fixed(), "fp8"),
        "dispatch_operand": lambda: dispatch(fixed(), "operand"),
        "counted_dispatch": lambda: dispatch(counted),
        "counted_combine": lambda: combine(counted, y),
    }
    plan = bench.time(lambda: Trip.plan(routing.experts, group, experts // group.size()))
    found = {name: [bench.time(function, calls)] for name, function in timed.items()}
    for name in reversed(timed):  # and in the other order
        found[name].append(bench.time(timed[name], calls))
    result: dict[str, Any] = dict(tokens=tokens, hidden=hidden, bytes=nbytes, counting_us=plan * 1e6)
    for name, seconds in found.items():
        best = statistics.fmean(seconds)
        result[f"{name}_us"], result[f"{name}_gb_per_s"] = best * 1e6, nbytes / best / 1e9
    for name in ("dispatch", "combine", "combine_arrived"):
        result[f"{name}_of_nccl"] = result["nccl_us"] / result[f"{name}_us"]
    result["combine_of_nccl_and_sum"] = result["nccl_and_sum_us"] / result["combine_us"]
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
                group, experts, tokens=tokens, hidden=hidden, top_k=top_k, wire="fp8" if wire == "fp8" else "same"
            )
            needed = exchange.needed(routing.experts)
            y = torch.randn(tokens * group.size(), hidden, device=device).bfloat16()
            every = torch.ones(tokens, group.size(), dtype=torch.bool, device=device)
            dispatch = bench.graph(functools.partial(exchange.dispatch, x, routing, needed))
            back = bench.graph(functools.partial(exchange.send_back, y, every))
            result[f"symmetric_dispatch_{wire}_us"], result[f"symmetric_combine_{wire}_us"] = dispatch * 1e6, back * 1e6
    return result


class Layers(torch.nn.Module):
    """Expert blocks one behind the other, with the same weights, as `overlapped` finds them."""

    def __init__(
        self,
        compute: Callable[..., Tensor],
        weights: tuple[Tensor, Tensor],
        shared: tuple[Tensor, Tensor] | None,
        fp8: bool,
    ) -> None:
        super().__init__()
        with torch.device("meta"):
            self.moe = MoE(Config.from_name("tiny"), False)
        self.moe.experts.compute = compute
        self.weights, self.shared, self.fp8 = weights, shared, fp8

    def forward(self, x: Tensor, routings: Sequence[Routing]) -> Tensor:
        for routing in routings:
            x = self.moe.experts.compute(x, *self.weights, routing, shared=self.shared, fp8=self.fp8, keep="fp8")
        return x


def layer(
    bench: Bench, group: dist.ProcessGroup, tokens: int, hidden: int, inner: int, experts: int, top_k: int,
    *, depth: int, fp8: bool, backward: bool, shared: bool,
) -> dict:  # fmt: skip
    """An expert-parallel layer of two micro-batches, the mean of several in a row: overlapped, and one by one.

    They run behind as many that are not timed. Nothing can run under the last message, which so weighs as much as there
    are layers.
    "Compute only" is `fused_experts` with as many experts a rank and choices a token, all of them here; "graph" is all
    of either as one CUDA graph. A layer of DeepSeek-V3 has one shared expert too; without it there is nothing under
    which one of two messages could travel.
    """
    device, per_rank = bench.device, experts // group.size()

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, device=device) / shape[-1] ** 0.5).bfloat16().requires_grad_(backward)

    routed = weight(per_rank, 2 * inner, hidden), weight(per_rank, hidden, inner)
    of_all = (weight(2 * inner, hidden), weight(hidden, inner)) if shared else None
    leaves = [*routed, *(of_all or ())]
    counts_changes(leaves)  # as of weights that this library's optimisers update
    half = tokens // 2
    xs = [torch.randn(half, hidden, device=device).bfloat16().requires_grad_(backward) for _ in range(2)]
    there = [[routing_of(half, experts, top_k, device) for _ in range(depth)] for _ in range(2)]
    here = [[routing_of(half, per_rank, min(top_k, per_rank), device) for _ in range(depth)] for _ in range(2)]
    mail = mail_of(group, half, hidden, top_k)
    fixed = Layers(ExpertParallel(group, experts, mail=mail, tokens=half), routed, of_all, fp8)
    counted = Layers(ExpertParallel(group, experts), routed, of_all, fp8)
    alone = Layers(ds.fused_experts, routed, of_all, fp8)

    def step(model: Layers, routings: list[list[Routing]], together: bool) -> None:
        for leaf in (*leaves, *xs):
            leaf.grad = None
        runs = [functools.partial(model, x, r) for x, r in zip(xs, routings, strict=True)]
        with torch.set_grad_enabled(backward):
            outs = overlapped(model, runs) if together else [run() for run in runs]
            if backward:
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])

    timed: dict[str, Callable[[], Any]] = {
        "compute_only": lambda: step(alone, here, False),
        "overlapped": lambda: step(fixed, there, True),
        "unoverlapped": lambda: step(fixed, there, False),
        "counted_overlapped": lambda: step(counted, there, True),
        "counted_unoverlapped": lambda: step(counted, there, False),
    }
    if isinstance(mail, CopyEngines):
        timed |= {f"{name}_graph": captured(timed[name]).replay for name in ("compute_only", "overlapped")}

    def seconds(name: str) -> float:
        waits_itself = name.startswith("counted")
        wait = WAIT if waits_itself else WAIT_FOR_LAYERS
        return bench.time(timed[name], wait=wait, behind=not waits_itself)

    found = {name: [seconds(name)] for name in timed}
    for name in reversed(timed):
        found[name].append(seconds(name))
    result: dict[str, Any] = dict(tokens=tokens, layers=depth, precision="fp8" if fp8 else "bf16", backward=backward)
    result["shared"] = shared
    result |= {f"{name}_ms": statistics.fmean(seconds) * 1e3 / depth for name, seconds in found.items()}
    for graph in ("", "_graph") if isinstance(mail, CopyEngines) else ("",):
        result[f"of_compute_only{graph}"] = result[f"compute_only{graph}_ms"] / result[f"overlapped{graph}_ms"]
    return result


def decode_layer(bench: Bench, group: dist.ProcessGroup, hidden: int, inner: int, experts: int, top_k: int) -> float:
    """Microseconds of a layer of `DecodeExperts` for 8 tokens a rank, in a CUDA graph."""
    device, per_rank = bench.device, experts // group.size()
    decode = DecodeExperts(group, experts)
    x, routing = torch.randn(8, hidden, device=device).bfloat16(), routing_of(8, experts, top_k, device)
    w13 = torch.randn(per_rank, 2 * inner, hidden, device=device).bfloat16()
    w2 = torch.randn(per_rank, hidden, inner, device=device).bfloat16()
    return bench.graph(lambda: decode(x, w13, w2, routing)) * 1e6


def training(device: torch.device, quick: bool) -> dict:
    """Throughput of one GPU and of all."""
    ranks = dist.get_world_size()
    plans = {
        "data": Plan(data=ranks),
        "data_gathered": Plan(data=ranks, reshard=False),
        "expert": Plan(expert=ranks),
        "expert_overlap": Plan(expert=ranks, reshard=False, overlap=True),
        "expert_counted": Plan(expert=ranks, exchange="counted"),
    }
    config, sizes = trained(quick)
    return parallel_runs.throughput(config, plans, device=device, **sizes)


def training_graph(device: torch.device, quick: bool) -> dict:
    """Of one GPU with CUDA graphs, which several have not."""
    config, sizes = trained(quick)
    return parallel_runs.throughput_as_graph(config, device=device, **sizes)


def trained(quick: bool) -> tuple[Config, dict[str, Any]]:
    """The model, and how it is trained."""
    if quick:
        return Config.from_name("tiny"), dict(tokens=32, microbatches=2, length=16, steps=1, precision="fp32")
    sizes = dict(tokens=32768, microbatches=2, length=4096, steps=5, precision="fp8")
    return models.config_of(MODEL_TRAINED_SLICE), sizes


def pipeline(device: torch.device, quick: bool) -> dict:
    """DualPipeV with two stages a rank, all alike: blocks of experts, a small vocabulary."""
    ranks = dist.get_world_size()
    options: dict[str, Any] = dict(num_hidden_layers=2 * ranks, first_k_dense_replace=0, num_nextn_predict_layers=0)
    if quick:
        sizes: dict[str, Any] = dict(tokens=32, length=16, microbatches=4 * ranks, steps=1, precision="fp32")
        config = Config.from_name("tiny", **options)
    else:
        sizes = dict(tokens=32768, length=4096, microbatches=4 * ranks, steps=3, precision="fp8")
        options |= dict(vocab_size=1024, bos_token_id=None, eos_token_id=())
        config = Config.from_name("moonlight", **options)
    return parallel_runs.pipeline_bubble(config, device=device, **sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where the JSON goes, after each part")
    parser.add_argument("--only", nargs="*", help="large, small, layer, training, training_graph, pipeline; else all")
    parser.add_argument("--save", action="store_true", help="likewise results/<gpu>/parallel.json for the report")
    parser.add_argument("--commit", default=None, help="that is measured, to be noted")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    team = Team.start(Plan(expert=int(os.environ.get("WORLD_SIZE", "1"))))
    group, quick, device = team.group("expert"), arguments.quick, team.device
    bench = Bench(device, 2 if quick else 6)
    torch.manual_seed(dist.get_rank())
    hidden, inner, experts, top_k = (128, 64, 8, 2) if quick else (7168, 2048, 32, 8)
    tokens = 64 if quick else 4096
    rounds = Bench(device, 2 if quick else 4)
    layers = functools.partial(layer, rounds, group, tokens, hidden, inner, experts, top_k, depth=2 if quick else 8)
    parts: dict[str, Callable[[], Any]] = {
        "large": lambda: [
            large(bench, group, n, hidden, experts, top_k) for n in ((64,) if quick else (1024, 4096, 16384))
        ],
        "layer": lambda: [
            layers(fp8=fp8, backward=backward, shared=shared)
            for fp8, backward, shared in (
                (False, False, True),
                (True, False, True),
                (True, True, True),
                (False, False, False),
                (True, False, False),
            )
        ],
        "pipeline": lambda: pipeline(device, quick),
        "small": lambda: [small(bench, group, n, hidden, experts, top_k) for n in ((8,) if quick else (32, 128))],
        "decode_layer_us": lambda: decode_layer(bench, group, hidden, inner, experts, top_k),
        "training": lambda: training(device, quick),
        "training_graph": lambda: training_graph(device, quick),
    }
    results: dict[str, Any] = dict(ranks=group.size(), device=_name(device))
    for name, part in parts.items():
        if arguments.only and name not in arguments.only:
            continue
        started = time.perf_counter()
        results[name] = part()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            print(f"{name}: {time.perf_counter() - started:.1f} s")
            print(json.dumps(_short(results[name]), indent=2), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(results, indent=1) + "\n")
            if arguments.save:
                print(save(results, arguments.commit), flush=True)
    team.close()


def save(found: dict[str, Any], commit: str | None = None) -> Path:
    """Writes the results as the report reads them, with all that was found beside its rows."""
    machine = Machine.current()
    if commit:
        machine = dataclasses.replace(machine, commit=commit)
    document_ = document(machine, None, rows(found)) | {"note": ROOF}
    path = FOLDER / machine.folder / "parallel.json"
    text = json.dumps(document_ | {"found": found}, indent=1)
    path.write_text(re.sub(r"\[\s+([^\[\]{}]+?)\s+\]", _in_one_line, text) + "\n", encoding="utf-8")
    return path


def rows(found: dict[str, Any]) -> list[Row]:
    """The exchanges beside NCCL's all-to-all of as many bytes; the roof is the link's 450 GB/s each way."""
    ranks, made = found["ranks"], []

    def row(op: str, x: dict[str, Any], us: float, impl: str, nbytes: float) -> Row:
        crossing = nbytes * (ranks - 1) / ranks
        return Row(
            op, f"t{x['tokens']}_h{x['hidden']}_r{ranks}", impl, us, us, us, None, nbytes / us / 1e3,
            100 * crossing / LINK / 1e3 / us, peers={"nccl": x["nccl_us"]},
        )  # fmt: skip

    for x in found.get("large", []):
        for name in ("dispatch", "combine"):
            made.append(row(f"experts_{name}", x, x[f"{name}_us"], "copy engines", x["bytes"]))
    for x in found.get("small", []):
        for name in ("dispatch", "combine"):
            nbytes = ranks * x["tokens"] * x["hidden"] * 2
            made.append(row(f"decode_{name}", x, x[f"symmetric_{name}_same_us"], "triton", nbytes))
    return made


def _in_one_line(found: re.Match[str]) -> str:
    return "[" + " ".join(found[1].split()) + "]"


def _short(found: Any) -> Any:
    """Without what is drawn and not read."""
    return {key: value for key, value in found.items() if key != "slots"} if isinstance(found, dict) else found


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    main()
