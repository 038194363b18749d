"""Training on several GPUs beside one, and what a pipeline waits; parts of ``benchmarks.bench_parallel``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pipeline_timeline import Slot, bubble, formula
from dskernels.model import Config, DeepseekV3
from dskernels.model.data import Packed
from dskernels.model.optimizer import MasterAdamW
from dskernels.model.parallel.pipeline import Pipeline
from dskernels.model.parallel.plan import Plan, Team
from dskernels.model.parallel.training import TeamStepper, spread
from dskernels.model.train_config import TrainConfig
from dskernels.model.train_step import Stepper


def texts(config: Config, n: int, tokens: int, length: int, seed: int) -> list[Packed]:
    """Random tokens in sequences of one length, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    return [Packed(torch.randint(0, config.vocab_size, (tokens,), generator=generator), ends) for _ in range(n)]


def recipe(batch_tokens: int, microbatches: int, precision: Any) -> TrainConfig:
    return TrainConfig(
        steps=1000, batch_tokens=batch_tokens, microbatches=microbatches, precision=precision, warmup_steps=0
    )


# ---- throughput -----------------------------------------------------------------------------------------------------


def throughput(
    config: Config, plans: dict[str, Plan], *, tokens: int, microbatches: int, length: int, **how: Any
) -> dict:
    """Tokens a second and GPU, of one GPU by itself and of each plan, with as many tokens a GPU and step.

    The one GPU is each of them at the same time, by itself; the slowest counts, as it does in a plan.
    """
    result: dict[str, Any] = dict(tokens_per_gpu=tokens * microbatches, microbatches=microbatches, steps=how["steps"])
    result["one"] = _rate(_alone, config, None, tokens, microbatches, length, **how)
    for name, plan in plans.items():
        result[name] = _rate(_together, config, plan, tokens, microbatches, length, **how)
        result[f"{name}_of_one"] = result[name] / result["one"]
    return result


def _rate(
    make: Callable[..., Any],
    config: Config,
    plan: Plan | None,
    tokens: int,
    microbatches: int,
    length: int,
    *,
    steps: int,
    precision: str,
    device: torch.device,
) -> float:
    ranks = 1 if plan is None else plan.batches
    cfg = recipe(ranks * tokens * microbatches, ranks * microbatches, precision)
    stepper = make(config, cfg, plan, device)
    seconds = []
    for step in range(steps + 2):
        text = texts(config, ranks * microbatches, tokens, length, step)
        dist.barrier()
        stepper.rest()
        pending = stepper.start(text, step)
        stepper.finish(pending)
        spent = torch.tensor([pending.seconds], dtype=torch.float64, device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        seconds.append(float(spent))
    del stepper
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return tokens * microbatches / statistics.median(seconds[2:])


def _alone(config: Config, cfg: TrainConfig, plan: None, device: torch.device) -> Stepper:
    model = DeepseekV3(config, fp8=cfg.precision == "fp8", recompute=cfg.recompute, device=device, dtype=cfg.dtype)
    optimizer = MasterAdamW(model, betas=cfg.betas, weight_decay=cfg.weight_decay, moments=cfg.moments)
    return Stepper(model, optimizer, cfg)


def _together(config: Config, cfg: TrainConfig, plan: Plan, device: torch.device) -> TeamStepper:
    team = Team.start(plan, device)
    torch.manual_seed(1)  # the same weights on every rank
    model = DeepseekV3(config, fp8=cfg.precision == "fp8", recompute=cfg.recompute, device=device, dtype=torch.float32)
    return TeamStepper(model, spread(model, team, cfg), cfg, team, None)


# ---- pipeline -------------------------------------------------------------------------------------------------------


class Recorder:
    """Notes when the parts of a pipeline's stages begin and end on their device."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self.device, self.rank = device, dist.get_rank()
        self.parts: list[tuple[str, int, int, Any, Any]] = []
        self.begin: Any = None
        self.part_begins: Any = None
        for stage in pipeline.schedule._stages:
            for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, self._noted(getattr(stage, name), name, stage.stage_index))
            for name in ("forward_maybe_with_nosync", "backward_maybe_with_nosync"):
                setattr(stage, name, self._begun(getattr(stage, name)))

    def start(self) -> None:
        """A step begins, on all ranks at once."""
        dist.barrier()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.parts, self.begin = [], self._mark()

    def slots(self) -> list[Slot]:
        """Of the step, in milliseconds from its begin, of all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        mine = [
            Slot(self.rank, kind, stage, i, self._since(begin), self._since(end))
            for kind, stage, i, begin, end in self.parts
        ]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        return [Slot(*slot) for slots in every for slot in slots]

    def _noted(self, function: Callable[..., Any], name: str, stage: int) -> Callable[..., Any]:
        def call(chunk: int, *args: Any, **kwargs: Any) -> Any:
            full = kwargs.get("full_backward", True)
            kind = {"forward_one_chunk": "F", "backward_weight_one_chunk": "W"}.get(name, "B" if full else "I")
            self.part_begins = self._mark()
            result = function(chunk, *args, **kwargs)
            self.parts.append((kind, stage, chunk, self.part_begins, self._mark()))
            return result

        return call

    def _begun(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """What a part waits for has come when it computes."""

        def call(*args: Any, **kwargs: Any) -> Any:
            self.part_begins = self._mark()
            return function(*args, **kwargs)

        return call

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _since(self, mark: Any) -> float:
        if isinstance(mark, float):
            return (mark - self.begin) * 1e3
        return self.begin.elapsed_time(mark)


def pipeline_bubble(
    config: Config, *, tokens: int, length: int, microbatches: int, steps: int, precision: str, device: torch.device
) -> dict:
    """What the ranks of DualPipeV wait, beside the formula with the measured F, B and W of a stage."""
    ranks = dist.get_world_size()
    team = Team.start(Plan(pipeline=ranks), device)
    torch.manual_seed(1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = DeepseekV3(config, fp8=precision == "fp8", recompute=False, device=device, dtype=dtype)
    pipeline = Pipeline(model, team, tokens=tokens, microbatches=microbatches)
    del model
    recorder = Recorder(pipeline, device)
    text = [text.to(device) for text in texts(config, microbatches, tokens, length, 7)]
    found: list[tuple[float, list[Slot]]] = []
    for _ in range(steps + 2):
        for parameter in pipeline.named_parameters().values():
            parameter.grad = None
        recorder.start()
        pipeline.step(text, [(1 / microbatches,) * 2] * microbatches, mtp_lambda=0.0, balance_alpha=1e-4)
        slots = recorder.slots()
        found.append((max(slot.end for slot in slots), slots))
    total, slots = sorted(found[2:], key=lambda pair: pair[0])[(len(found) - 2) // 2]
    costs = mean_costs(slots)
    waits, published = bubble(slots), formula(ranks, costs)
    return dict(
        stages=2 * ranks, microbatches=microbatches, tokens=tokens, total_ms=total, bubble_ms=waits,
        formula_ms=published, of_formula=waits / published, **{f"{kind}_ms": ms for kind, ms in costs.items()},
        slots=[[*slot[:4], round(slot.start, 4), round(slot.end, 4)] for slot in slots],
    )  # fmt: skip


def mean_costs(slots: Sequence[Slot]) -> dict[str, float]:
    """F, I and W of a stage, the mean over all; where the halves of some backwards were measured apart, from these."""
    of = {kind: [slot.end - slot.start for slot in slots if slot.kind == kind] for kind in "FIWB"}
    forward, weight = statistics.fmean(of["F"]), statistics.fmean(of["W"])
    apart = len(of["I"])
    whole = statistics.fmean(of["B"]) if of["B"] else 0.0
    inputs = (sum(of["I"]) + (whole - weight) * len(of["B"])) / (apart + len(of["B"]))
    return {"F": forward, "I": inputs, "W": weight}
