"""Training by the recipe of the DeepSeek-V3 report (arXiv 2412.19437): schedules, steps, metrics, checkpoint."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import dskernels as ds
from dskernels.device import default_device
from dskernels.model.config import Config
from dskernels.model.data import Corpus, Packed, batches
from dskernels.model.finite import first_nonfinite
from dskernels.model.loss import Losses, losses
from dskernels.model.model import DeepseekV3, Output
from dskernels.model.optimizer import MasterAdamW
from dskernels.model.writing import save

METRICS_FILE = "metrics.jsonl"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}

History = list[dict[str, Any]]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults that do not depend on a model's size are those of the report (section 4.2).

    Attributes:
        steps: optimiser steps.
        batch_tokens: tokens of a step.
        microbatches: parts that a step is run in, to save memory; a divisor of ``batch_tokens``.
        sequence_length: longest sequence; documents are cut to it.
        learning_rate: after the warm-up.
        final_learning_rate: at the end.
        warmup_steps: steps over which the learning rate rises.
        decay_from: part of the steps after which the learning rate falls along a cosine and ``final_mtp_lambda``
            counts.
        settle_from: part of the steps after which the learning rate and the router biases stay as they are.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices (not on norms).
        clip: largest norm of the gradient.
        bias_update_rate: gamma, how far `update_bias` moves the router biases at each step.
        balance_alpha: factor of the sequence-wise balance loss.
        mtp_lambda: weight of the MTP loss.
        final_mtp_lambda: its weight after ``decay_from``.
        precision: "bf16"; "fp8" for linear layers and experts in e4m3 and the rest in bf16; "fp32". With the first two
            the optimiser keeps fp32 copies of the parameters.
        seed: of the initial weights and of the order of the text.
        validate_every: steps between two looks at the held-out text; there is one before the first step and one after
            the last too.
        validation_batches: batches of it, of ``batch_tokens / microbatches`` tokens each.

    Raises:
        ValueError: a field is out of range; the message names it.
    """

    steps: int = 1000
    batch_tokens: int = 8192
    microbatches: int = 1
    sequence_length: int = 1024
    learning_rate: float = 2.2e-4
    final_learning_rate: float = 2.2e-5
    warmup_steps: int = 100
    decay_from: float = 10 / 14.8
    settle_from: float = 14.3 / 14.8
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_update_rate: float = 0.001
    balance_alpha: float = 1e-4
    mtp_lambda: float = 0.3
    final_mtp_lambda: float = 0.1
    precision: Literal["bf16", "fp8", "fp32"] = "bf16"
    seed: int = 0
    validate_every: int = 100
    validation_batches: int = 4

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_tokens": 2, "microbatches": 1, "sequence_length": 2, "warmup_steps": 0}
        least |= {"validate_every": 1, "validation_batches": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name}: expected at least {low}, got {getattr(self, name)}")
        if self.batch_tokens % self.microbatches or self.batch_tokens // self.microbatches < 2:
            raise ValueError(f"microbatches: {self.microbatches} do not divide batch_tokens = {self.batch_tokens}")
        if not 0 <= self.decay_from <= self.settle_from <= 1:
            raise ValueError(
                f"decay_from, settle_from: expected 0 <= decay_from <= settle_from <= 1, "
                f"got {self.decay_from} and {self.settle_from}"
            )
        for name in ("learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected more than 0, got {getattr(self, name)}")
        factors = ("weight_decay", "bias_update_rate", "balance_alpha", "mtp_lambda", "final_mtp_lambda")
        for name in ("final_learning_rate", *factors):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision: expected {', '.join(DTYPES)}, got {self.precision!r}")

    def learning_rate_at(self, step: int) -> float:
        """Of a step, counted from 0: linear warm-up, constant, cosine, constant."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        decay, settle = self.decay_from * self.steps, self.settle_from * self.steps
        if step < decay:
            return self.learning_rate
        done = min((step - decay) / (settle - decay), 1.0) if settle > decay else 1.0
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * (
            0.5 + 0.5 * math.cos(math.pi * done)
        )

    def mtp_lambda_at(self, step: int) -> float:
        """Weight of the MTP loss at a step."""
        return self.mtp_lambda if step < self.decay_from * self.steps else self.final_mtp_lambda

    def bias_update_rate_at(self, step: int) -> float:
        """Gamma at a step."""
        return self.bias_update_rate if step < self.settle_from * self.steps else 0.0


# The preset "demo" on two CPU cores, in a little over a minute. Biases move faster than in the report because there are
# hundreds of steps and not a hundred thousand.
DEMO = TrainConfig(
    steps=450,
    batch_tokens=512,
    sequence_length=256,
    learning_rate=2e-3,
    final_learning_rate=2e-4,
    warmup_steps=20,
    bias_update_rate=0.01,
    precision="fp32",
    validate_every=50,
    validation_batches=16,
)


def train(
    model_config: Config,
    data: Corpus,
    train_config: TrainConfig,
    *,
    out: str | Path,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> History:
    """Trains a model from its initial weights and writes a checkpoint in the Hugging Face layout.

    ``out`` gets ``metrics.jsonl``, a line a step as it happens, and at the end what `save` writes. A line has

    - of a step: ``step`` (from 1), ``loss`` (main, nats a token), ``mtp_loss``, ``balance_loss``, ``max_load`` (of the
      busiest expert of all layers, relative to an even load), ``learning_rate``, ``gradient_norm`` (before clipping),
      ``tokens_per_second``;
    - of a look at the held-out text: ``step`` (0 is before the first), ``validation_loss``, ``validation_mtp_loss``,
      ``load``, for each layer with experts the number of choices that fell on each.

    Args:
        model_config: shape of the model.
        data: see `read_corpus`.
        train_config: how to train.
        out: folder, made if it does not exist.
        device: by default the GPU if there is one, else the CPU.
        progress: called with each line, see `TrainingProgress`.

    Returns:
        The lines. The same arguments on the same machine give the same numbers, apart from ``tokens_per_second``.

    Raises:
        ValueError: ``out`` is a file, a token of the text is not in the vocabulary, or sequences are longer than the
            model's context.
        FloatingPointError: a loss or a gradient is not finite. The message names the first tensor that is not. The
            parameters are those before this step.
    """
    _check(model_config, data, train_config)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    out.mkdir(parents=True, exist_ok=True)
    device = default_device() if device is None else torch.device(device)

    precision = train_config.precision
    model = DeepseekV3(model_config, fp8=precision == "fp8", device="meta", dtype=DTYPES[precision])
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(train_config.seed))
    sizes = dict(
        batch_tokens=train_config.batch_tokens // train_config.microbatches,
        sequence_length=train_config.sequence_length,
        seed=train_config.seed,
    )
    held_out = list(itertools.islice(batches(data.validation, **sizes), train_config.validation_batches))
    history: History = []
    with (out / METRICS_FILE).open("w", encoding="utf-8", buffering=1) as file:
        for record in _run(model, batches(data.train, **sizes), held_out, train_config):
            history.append(record)
            file.write(json.dumps(record) + "\n")
            if progress is not None:
                progress(record)
    save(model, out)
    return history


@torch.no_grad()
def evaluate(model: DeepseekV3, held_out: Sequence[Packed]) -> dict[str, Any]:
    """Losses on held-out text, and which experts it went to; see `train` for the names."""
    device = model.embed_tokens.weight.device
    total, load = torch.zeros(2, device=device), _no_load(model)
    for batch in held_out:
        batch = batch.to(device)
        output = model(*batch, mtp=True)
        total += torch.stack(losses(output, batch, model.config, balance_alpha=0.0)[:2])
        _count(load, output)
    main, ahead = (total / len(held_out)).tolist()
    return dict(validation_loss=main, validation_mtp_loss=ahead, load=load.tolist())


def _run(
    model: DeepseekV3, text: Iterator[Packed], held_out: Sequence[Packed], config: TrainConfig
) -> Iterator[dict[str, Any]]:
    """Trains the model; gives the lines of the metrics as they come."""
    optimizer = MasterAdamW(model, betas=config.betas, weight_decay=config.weight_decay)
    yield dict(step=0, **evaluate(model, held_out))
    for step in range(config.steps):
        start = time.perf_counter()
        record = _step(model, optimizer, list(itertools.islice(text, config.microbatches)), config, step)
        record["tokens_per_second"] = round(config.batch_tokens / (time.perf_counter() - start), 1)
        yield dict(step=step + 1, **record)
        if (step + 1) % config.validate_every == 0 or step + 1 == config.steps:
            yield dict(step=step + 1, **evaluate(model, held_out))


def _step(
    model: DeepseekV3, optimizer: MasterAdamW, text: Sequence[Packed], config: TrainConfig, step: int
) -> dict[str, Any]:
    """Forward, backward, update of the parameters and then of the router biases."""
    mtp_lambda, rate = config.mtp_lambda_at(step), config.bias_update_rate_at(step)
    device = model.embed_tokens.weight.device
    sums, load = torch.zeros(3, device=device), _no_load(model)
    predictions = sum(int(batch.predictions) for batch in text)
    for batch in text:
        share = int(batch.predictions) / predictions
        batch = batch.to(device)
        output = model(*batch, mtp=mtp_lambda > 0)
        parts = losses(output, batch, model.config, balance_alpha=config.balance_alpha)
        # Microbatches hold different numbers of predictions; the loss is the mean over all of them.
        parts = Losses(parts.main * share, parts.mtp * share, parts.balance / len(text))
        (parts.main + mtp_lambda * parts.mtp + parts.balance).backward()
        optimizer.collect()
        sums += torch.stack(parts).detach()
        _count(load, output)

    norm = optimizer.clip(config.clip)
    busiest = load.amax(-1) / load.float().mean(-1).clamp(min=1)
    main, ahead, balance, gradient_norm, max_load = torch.stack(
        [*sums, norm, busiest.max() if len(busiest) else norm * 0]
    ).tolist()
    if not math.isfinite(main + ahead + balance + gradient_norm):
        raise FloatingPointError(
            f"step {step + 1}: loss {main:.4g}, gradient norm {gradient_norm:.4g}; "
            + first_nonfinite(model, text, optimizer.gradients())
        )
    learning_rate = config.learning_rate_at(step)
    optimizer.step(learning_rate)
    for moe, moe_load in zip(model.moe_layers, load, strict=False):
        if moe.gate.e_score_correction_bias is not None:
            ds.update_bias(moe.gate.e_score_correction_bias, moe_load, rate)
    return dict(
        loss=main,
        mtp_loss=ahead,
        balance_loss=balance,
        max_load=max_load,
        learning_rate=learning_rate,
        gradient_norm=gradient_norm,
    )


def _no_load(model: DeepseekV3) -> Tensor:
    shape = len(model.moe_layers), model.config.n_routed_experts
    return torch.zeros(shape, dtype=torch.int64, device=model.embed_tokens.weight.device)


def _count(load: Tensor, output: Output) -> None:
    """Adds a pass to the load of each layer; MTP modules that did not run add none."""
    for row, router in zip(load, output.routers, strict=False):
        row += router.routing.load


def _check(model_config: Config, data: Corpus, config: TrainConfig) -> None:
    if not any(map(len, data.train)):
        raise ValueError("data: nothing to learn from, train is empty")
    if not any(map(len, data.validation)):
        raise ValueError("data: nothing held out, validation is empty")
    largest = max(int(document.max()) for document in (*data.train, *data.validation) if len(document))
    if largest >= model_config.vocab_size:
        raise ValueError(f"data: token {largest} is not in the vocabulary of vocab_size = {model_config.vocab_size}")
    if config.sequence_length > model_config.max_position_embeddings:
        raise ValueError(
            f"sequence_length: {config.sequence_length} is more than the model's context, "
            f"max_position_embeddings = {model_config.max_position_embeddings}"
        )
