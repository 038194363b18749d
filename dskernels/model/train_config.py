"""How to train: the recipe of the DeepSeek-V3 report (arXiv 2412.19437, section 4.2) and its schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults that do not depend on a model's size are those of the report (section 4.2).

    Attributes:
        steps: optimiser steps.
        batch_tokens: tokens in a step.
        microbatches: the parts that a step is split into, to save memory; a divisor of ``batch_tokens``.
        sequence_length: the longest sequence; longer documents are cut.
        learning_rate: the peak, after the warm-up.
        final_learning_rate: at the end.
        warmup_steps: steps during which the learning rate rises.
        decay_from: fraction of the steps after which the learning rate decays along a cosine and ``final_mtp_lambda``
            applies.
        settle_from: fraction of the steps after which the learning rate and the router biases stay constant.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices (not on norms).
        clip: largest norm of the gradient.
        bias_update_rate: gamma, by how much `update_bias` moves the router biases at each step.
        balance_alpha: weight of the sequence-wise balance loss.
        mtp_lambda: weight of the MTP loss.
        final_mtp_lambda: its weight after ``decay_from``.
        precision: "bf16"; "fp8" for linear layers and experts in e4m3 and the rest in bf16; "fp32". With the first two,
            the optimiser keeps fp32 copies of the parameters, and its moments in bf16.
        recompute: save less for the backward and compute it again (norms, up-projections, SwiGLU).
        ema: decay of an average of the masters, which is kept in fp32 on the CPU and exported with the model; 0 for
            none. It is updated every `EMA_EVERY` steps, by the decay of that many steps.
        seed: of the initial weights and of the order of the text.
        validate_every: steps between two validations; there is also one before the first step and one after the last.
        validation_batches: batches in a validation, of ``batch_tokens / microbatches`` tokens each.

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
    recompute: bool = True
    ema: float = 0.0
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
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate: expected a finite number above 0, got {self.learning_rate}")
        if not self.clip > 0:  # infinity clips nothing
            raise ValueError(f"clip: expected more than 0, got {self.clip}")
        factors = ("weight_decay", "bias_update_rate", "balance_alpha", "mtp_lambda", "final_mtp_lambda")
        for name in ("final_learning_rate", *factors):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a finite number, 0 or more, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: expected a decay in [0, 1), got {self.ema}")
        if self.precision not in DTYPES:
            raise ValueError(f"precision: expected {', '.join(DTYPES)}, got {self.precision!r}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return DTYPES[self.precision]

    @property
    def moments(self) -> torch.dtype:
        """Dtype of the moments: bf16, as in the report, unless the whole model is fp32."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, constant, cosine, constant."""
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
