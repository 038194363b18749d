"""Training on several GPUs beside one, and what a pipeline waits; parts of ``benchmarks.bench_parallel``."""

from __future__ import annotations

import dataclasses
import functools
import gc
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
from dskernels.model.parallel.team_step import TeamStepper
from dskernels.model.parallel.training import spread
from dskernels.model.train_config import TrainConfig
from dskernels.model.train_step import Stepper


def texts(config: Config, n: int, tokens: int, length: int, seed: int) -> list[Packed]:
    """Random tokens in sequences of one length, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    ends = torch.arange(0, tokens + 1, length, dtype=torch.int32)
    return [Packed(torch.randint(0, config.vocab_size, (tokens,), generator=generator), ends) for _ in range(n)]


def recipe(batch_tokens: int, microbatches: int, precision: Any) -> TrainConfig:
    """With the report's warm-up: nothing is learnt in so few steps, and routers stay as they are."""
    return TrainConfig(
        steps=10_000, batch_tokens=batch_tokens, microbatches=microbatches, precision=precision, warmup_steps=2000
    )


# ---- throughput -----------------------------------------------------------------------------------------------------

# How far router biases move at each step before anything is timed, as training evens loads out in hundreds of steps.
# (At the full learning rate, without a warm-up, some steps from the start sent 60% of the choices to the experts of one
# of two ranks, which the other waited for: 304 ms a step instead of 279.)
SETTLING = (0.02,) * 4 + (0.007,) * 4 + (0.002,) * 4 + (0.0005,) * 2
WARM = 2  # steps before those that are timed


def throughput(
    config: Config, plans: dict[str, Plan], *, tokens: int, microbatches: int, length: int, **how: Any
) -> dict:
    """Tokens a second and GPU, of one GPU by itself and of each plan, with as many tokens a GPU and step.

    Steps follow each other as in training: the host prepares one while the device is at the one before. Weights are
    the same everywhere, and so are router biases, moved until experts have even loads; ``<plan>_as_drawn`` of plans
    that spread the experts is with the loads of a router that has just been drawn. The one GPU is each of them at the
    same time, by itself, before all plans and after them; the slowest rank counts.
    """
    result: dict[str, Any] = dict(tokens_per_gpu=tokens * microbatches, microbatches=microbatches, steps=how["steps"])
    sizes = (tokens, microbatches, length)
    biases: list[torch.Tensor] = []
    one = [_rate(_alone, config, None, *sizes, biases=biases, **how)]
    found = {name: _rate(_together, config, plan, *sizes, biases=biases, **how) for name, plan in plans.items()}
    for name in [name for name, plan in plans.items() if plan.overlap]:
        drawn = [torch.zeros_like(bias) for bias in biases]
        found[f"{name}_as_drawn"] = _rate(_together, config, plans[name], *sizes, biases=drawn, **how)
    one.append(_rate(_alone, config, None, *sizes, biases=biases, **how))
    result["one"] = statistics.fmean(rate["rate"] for rate in one)
    result["one_memory_gb"] = one[0]["memory_gb"]
    result["one_both"] = [rate["rate"] for rate in one]
    for name, numbers in found.items():
        result[name], result[f"{name}_of_one"] = numbers["rate"], numbers["rate"] / result["one"]
        result |= {f"{name}_{key}": value for key, value in numbers.items() if key != "rate"}
    return result


def throughput_as_graph(config: Config, *, tokens: int, microbatches: int, length: int, **how: Any) -> dict[str, float]:
    """The same of one GPU whose steps are CUDA graphs, as `train` has them by default, which several ranks have not."""
    make = functools.partial(_alone, cuda_graph=how["device"].type == "cuda")  # on a CPU there are none
    return _rate(make, config, None, tokens, microbatches, length, biases=None, **how)


def _rate(
    make: Callable[..., Any],
    config: Config,
    plan: Plan | None,
    tokens: int,
    microbatches: int,
    length: int,
    *,
    biases: list[torch.Tensor] | None,
    steps: int,
    precision: str,
    device: torch.device,
) -> dict[str, float]:
    """Tokens a second; the memory that the device has in use; the largest part of a layer's choices that one rank's
    experts have, times the ranks. Biases are found where the list is empty, and as drawn where there is none."""
    ranks = 1 if plan is None else plan.batches
    cfg = recipe(ranks * tokens * microbatches, ranks * microbatches, precision)
    free = _free(device)
    stepper = make(config, cfg, plan, device)
    gates = [moe.gate for moe in stepper.model.moe_layers]
    made = [texts(config, ranks * microbatches, tokens, length, step) for step in range(2)]
    if biases is not None and not biases:
        for rate in SETTLING:
            stepper.config = dataclasses.replace(cfg, bias_update_rate=rate)
            stepper.finish(stepper.start(made[0], 0))
        stepper.config = cfg
        biases += [gate.e_score_correction_bias.clone() for gate in gates]
    for gate, bias in zip(gates if biases else (), biases or (), strict=True):
        gate.e_score_correction_bias.copy_(bias)
    dist.barrier()
    stepper.rest()
    pending, seconds = stepper.start(made[0], 0), []
    for step in range(1, WARM + steps + 1):  # the last is begun behind those that are timed, and not looked at
        before, pending = pending, stepper.start(made[step % 2], step)
        stepper.finish(before)
        seconds.append(before.seconds)
    stepper.finish(pending)
    result = dict(memory_gb=(free - _free(device)) / 1e9)
    if plan is not None and plan.expert > 1:
        load = torch.tensor(stepper.evaluate(made[0])["load"], dtype=torch.float64)
        shares = load.unflatten(1, (plan.expert, -1)).sum(-1) / load.sum(1, keepdim=True)
        result["busiest_rank"] = float(shares.max()) * plan.expert
    spent = torch.tensor([statistics.median(seconds[WARM:])], dtype=torch.float64, device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    del stepper, gates, pending, before
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return dict(rate=tokens * microbatches / float(spent), **result)


def _free(device: torch.device) -> int:
    """Bytes of the device's memory that nobody has."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def _alone(config: Config, cfg: TrainConfig, plan: None, device: torch.device, *, cuda_graph: bool = False) -> Stepper:
    model = _drawn(config, cfg, device).to(cfg.dtype)
    optimizer = MasterAdamW(model, betas=cfg.betas, weight_decay=cfg.weight_decay, moments=cfg.moments)
    return Stepper(model, optimizer, cfg, cuda_graph=cuda_graph)


def _together(config: Config, cfg: TrainConfig, plan: Plan, device: torch.device) -> TeamStepper:
    team, model = Team.start(plan, device), _drawn(config, cfg, device)
    return TeamStepper(model, spread(model, team, cfg), cfg, team, None)


def _drawn(config: Config, cfg: TrainConfig, device: torch.device) -> DeepseekV3:
    torch.manual_seed(1)  # the same weights on every rank
    fp8 = cfg.precision == "fp8"
    return DeepseekV3(config, fp8=fp8, recompute=cfg.recompute, device=device, dtype=torch.float32)


# ---- pipeline -------------------------------------------------------------------------------------------------------


class Recorder:
    """Notes when the parts of a pipeline's stages begin and end on their device."""

    def __init__(self, pipeline: Pipeline, device: torch.device) -> None:
        self.device, self.rank = device, dist.get_rank()
        self.parts: list[tuple[str, int, int, Any, Any]] = []
        self.steps: list[tuple[Any, list]] = []
        self.begin: Any = None
        self.part_begins: Any = None
        for stage in pipeline.schedule._stages:
            for name in ("forward_one_chunk", "backward_one_chunk", "backward_weight_one_chunk"):
                setattr(stage, name, self._noted(getattr(stage, name), name, stage.stage_index))
            for name in ("forward_maybe_with_nosync", "backward_maybe_with_nosync"):
                setattr(stage, name, self._begun(getattr(stage, name)))

    def start(self) -> None:
        """A step begins, behind what is on the device's stream so far."""
        self.parts = []
        self.begin = self._mark()
        self.steps.append((self.begin, self.parts))

    def slots(self) -> list[list[Slot]]:
        """Of each step, in milliseconds from its begin, of all ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        mine = [
            [Slot(self.rank, kind, stage, i, _between(begin, a), _between(begin, b)) for kind, stage, i, a, b in parts]
            for begin, parts in self.steps
        ]
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        return [[Slot(*slot) for slots in of_ranks for slot in slots] for of_ranks in zip(*every, strict=True)]

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


def _between(begin: Any, end: Any) -> float:
    """Milliseconds."""
    return (end - begin) * 1e3 if isinstance(end, float) else begin.elapsed_time(end)


def pipeline_bubble(
    config: Config, *, tokens: int, length: int, microbatches: int, steps: int, precision: str, device: torch.device
) -> dict:
    """What the ranks of DualPipeV wait, beside the formula with the measured F, B and W of a stage.

    Steps follow each other, as in training. In the first one the device waits for the host, which is not ahead yet:
    that one is told apart (``first_of_formula``).
    """
    ranks = dist.get_world_size()
    team = Team.start(Plan(pipeline=ranks), device)
    torch.manual_seed(1)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = DeepseekV3(config, fp8=precision == "fp8", recompute=False, device=device, dtype=dtype)
    pipeline = Pipeline(model, team, tokens=tokens, microbatches=microbatches)
    del model
    recorder = Recorder(pipeline, device)
    text = [text.to(device) for text in texts(config, microbatches, tokens, length, 7)]

    def run(times: int) -> None:
        dist.barrier()
        if device.type == "cuda":
            torch.cuda.synchronize()
        recorder.steps.clear()
        for _ in range(times):
            for parameter in pipeline.named_parameters().values():
                parameter.grad = None
            recorder.start()
            pipeline.step(text, [(1 / microbatches,) * 2] * microbatches, mtp_lambda=0.0, balance_alpha=1e-4)

    run(2)
    run(1 + steps)
    found = [_waited(slots, ranks) for slots in recorder.slots()]
    first, *others = found
    middle = sorted(others, key=lambda each: each["of_formula"])[(len(others) - 1) // 2]
    return dict(
        stages=2 * ranks, microbatches=microbatches, tokens=tokens, **middle,
        all_of_formula=[each["of_formula"] for each in others], first_of_formula=first["of_formula"],
    )  # fmt: skip


def _waited(slots: Sequence[Slot], ranks: int) -> dict[str, Any]:
    """Of one step."""
    costs = mean_costs(slots)
    waits, published = bubble(slots), formula(ranks, costs)
    return dict(
        total_ms=max(slot.end for slot in slots), bubble_ms=waits, formula_ms=published, of_formula=waits / published,
        **{f"{kind}_ms": ms for kind, ms in costs.items()},
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
