"""One training step: forward, backward, update of the parameters and of the router biases, without waiting for the
device."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.model.data import Packed, on_device
from dskernels.model.finite import first_nonfinite
from dskernels.model.loss import Losses, losses
from dskernels.model.model import DeepseekV3, Output
from dskernels.model.optimizer import MasterAdamW, clipping
from dskernels.model.throughput import peak_flops, peak_memory, step_flops
from dskernels.model.train_config import TrainConfig
from dskernels.model.train_graph import Inputs, StepGraphs

Mark = float | torch.cuda.Event  # a moment: by the host's clock, or when the GPU gets there
# The fields of a line that differ on another machine or another day.
MEASURED = ("tokens_per_second", "mfu", "memory_gb")


class Stepper:
    """Runs the steps of one model.

    A step that meets a loss or a gradient that is not finite changes nothing, and neither does any step after it: the
    device itself decides this, since the host learns of it one step later.

    Args:
        model: the model to train.
        optimizer: of its parameters.
        config: how to train.
        cuda_graph: replay each step as a CUDA graph, see `StepGraphs`. Its numbers have the same bits.
    """

    def __init__(
        self, model: DeepseekV3, optimizer: MasterAdamW, config: TrainConfig, *, cuda_graph: bool = False
    ) -> None:
        self.model, self.optimizer, self.config = model, optimizer, config
        self.device = model.embed_tokens.weight.device
        self.failed = torch.zeros((), device=self.device)  # 1 from the first step on that is not finite
        self.peak = peak_flops(self.device)
        self.last: Mark | None = None
        self.graphs = StepGraphs(self._whole, optimizer.parameters) if cuda_graph else None

    def _whole(self, inputs: Inputs, mtp: bool) -> Tensor:
        return self.update(*self._backward(inputs, mtp), inputs.learning_rate, inputs.moving)

    def rest(self) -> None:
        """Something other than a step comes next, and its time is not to count as that of a step."""
        self.last = None

    def start(self, text: Sequence[Packed], step: int) -> Pending:
        """Launch step ``step`` (counted from 0) over these micro-batches."""
        begin = self._mark() if self.last is None else self.last
        with_mtp = self.config.mtp_lambda_at(step) > 0
        numbers = self._numbers(text, step)
        if self.graphs is None:
            numbers = on_device(numbers, self.device)
            rate, _, moving, *_ = numbers.unbind()
            values = self.update(*self.backward(text, step, numbers), rate, moving)
        else:
            values = self.graphs.run(text, numbers, with_mtp)
        if values.is_cuda:
            values = values.to("cpu", non_blocking=True)
        self.last = self._mark()
        flops = sum(step_flops(self.model.config, batch.cu_seqlens, mtp=with_mtp) for batch in text)
        return Pending(step, text, values, begin, self.last, flops)

    def _numbers(self, text: Sequence[Packed], step: int) -> Tensor:
        """The numbers that `Inputs.of` takes."""
        config = self.config
        moving = float(config.bias_update_rate_at(step) > 0)
        numbers = config.learning_rate_at(step), config.mtp_lambda_at(step), moving, *shares(text)
        return torch.tensor(numbers, dtype=torch.float32)

    def backward(self, text: Sequence[Packed], step: int, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the step, and the load of each layer's experts; leaves the gradients in the optimiser."""
        inputs = Inputs.of([batch.to(self.device) for batch in text], numbers)
        return self._backward(inputs, self.config.mtp_lambda_at(step) > 0)

    def _backward(self, inputs: Inputs, mtp: bool) -> tuple[Tensor, Tensor]:
        model, config = self.model, self.config
        sums, load = torch.zeros(3, device=self.device), no_load(model)
        for batch, share in zip(inputs.text, inputs.shares, strict=True):
            output = model(*batch, mtp=mtp)
            parts = losses(output, batch, model.config, balance_alpha=config.balance_alpha)
            # Micro-batches contain different numbers of predictions; the loss is the mean over all of them.
            parts = Losses(parts.main * share, parts.mtp * share, parts.balance / len(inputs.text))
            (parts.main + inputs.mtp_lambda * parts.mtp + parts.balance).backward()
            self.optimizer.collect()
            sums += torch.stack(parts).detach()
            count(load, output)
        return sums, load

    def update(self, sums: Tensor, load: Tensor, learning_rate: Tensor, moving: Tensor) -> Tensor:
        """Update parameters and biases; returns the numbers of the step. It only reads and writes on the device."""
        config, optimizer = self.config, self.optimizer
        norm = optimizer.norm()
        numbers = torch.stack([*sums, norm])
        # Not their sum, which may overflow: 0 times a number that is not finite is NaN.
        self.failed.copy_(torch.maximum(self.failed, (numbers * 0).sum().ne(0).float()))
        optimizer.step(learning_rate, clipping(norm, config.clip), self.failed)
        moved = load * (moving * (1 - self.failed)).to(load.dtype)  # if all loads are equal, no bias moves
        for moe, moe_load in zip(self.model.moe_layers, moved, strict=True):
            if moe.gate.e_score_correction_bias is not None:
                ds.update_bias(moe.gate.e_score_correction_bias, moe_load, config.bias_update_rate)
        busiest = load.amax(-1) / load.float().mean(-1).clamp(min=1) if len(load) else load.new_zeros(0).float()
        return torch.cat([numbers, self.failed[None], busiest])

    def finish(self, pending: Pending) -> dict[str, Any]:
        """The line of the metrics of a step, once the device has finished it.

        Raises:
            FloatingPointError: it met a number that is not finite; the message names the first such tensor.
        """
        if isinstance(pending.end, torch.cuda.Event):
            pending.end.synchronize()
        main, ahead, balance, norm, failed, *busiest = pending.values.tolist()
        if failed:
            raise FloatingPointError(
                f"step {pending.step + 1}: loss {main:.4g}, gradient norm {norm:.4g}; " + self._culprit(pending)
            )
        seconds = pending.seconds
        return dict(
            step=pending.step + 1,
            loss=main,
            mtp_loss=ahead,
            balance_loss=balance,
            max_load=max(busiest, default=0.0),
            layer_loads=[round(each, 4) for each in busiest],
            learning_rate=self.config.learning_rate_at(pending.step),
            gradient_norm=norm,
            tokens_per_second=round(self.config.batch_tokens / seconds, 1),
            mfu=None if self.peak is None else round(pending.flops / seconds / self.peak, 4),
            memory_gb=round(peak_memory(self.device) / 1e9, 3),
        )

    def _mark(self) -> Mark:
        """Mark this moment by the clock of the device."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _culprit(self, pending: Pending) -> str:
        """The first tensor that is not finite. The parameters are those before the step, so it fails again in the
        same way."""

        def gradients() -> dict[str, Tensor]:
            numbers = on_device(self._numbers(pending.text, pending.step), self.device)
            self.backward(pending.text, pending.step, numbers)
            return self.optimizer.gradients()

        return first_nonfinite(self.model, pending.text, gradients)


@dataclass(frozen=True)
class Pending:
    """A step that the device may still be running.

    Attributes:
        step: counted from 0.
        text: its micro-batches, on the CPU.
        values: its numbers, on their way to the CPU.
        begin: when the preceding step ended, or when this one began if there was none just before it.
        end: when the numbers are there.
        flops: operations of forward and backward.
    """

    step: int
    text: Sequence[Packed]
    values: Tensor
    begin: Mark
    end: Mark
    flops: float

    @property
    def seconds(self) -> float:
        """The time from begin to end."""
        if isinstance(self.begin, float) or isinstance(self.end, float):
            return max(float(self.end) - float(self.begin), 1e-9)  # type: ignore[arg-type]
        return self.begin.elapsed_time(self.end) / 1000


def shares(text: Sequence[Packed]) -> list[float]:
    """The share of each micro-batch in all predictions."""
    predictions = [int(batch.predictions) for batch in text]
    return [here / max(sum(predictions), 1) for here in predictions]


@torch.no_grad()
def evaluate(model: DeepseekV3, held_out: Sequence[Packed]) -> dict[str, Any]:
    """Losses on held-out text, and the load of the experts; see `train` for the names."""
    device = model.embed_tokens.weight.device
    total, load, predictions = torch.zeros(2, device=device), no_load(model), 0
    for batch in held_out:
        here = int(batch.predictions)
        batch = batch.to(device)
        output = model(*batch, mtp=True)
        total += torch.stack(losses(output, batch, model.config, balance_alpha=0.0)[:2]) * here
        predictions += here
        count(load, output)
    main, ahead = (total / max(predictions, 1)).tolist()
    return dict(validation_loss=main, validation_mtp_loss=ahead, load=load.tolist())


def no_load(model: DeepseekV3) -> Tensor:
    """Zeros for each expert of each layer with experts, int64."""
    shape = len(model.moe_layers), model.config.n_routed_experts
    return torch.zeros(shape, dtype=torch.int64, device=model.embed_tokens.weight.device)


def count(load: Tensor, output: Output) -> None:
    """Add a pass to the load of each layer; MTP modules that did not run add none."""
    if output.routers:
        load[: len(output.routers)] += torch.stack([router.routing.load for router in output.routers])
