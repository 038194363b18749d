"""Parity cases of routing: ids, loads and biases must be equal, weights and losses are fp32 sums."""

from __future__ import annotations

import torch

from dskernels.parity import Case
from dskernels.parity.inputs import normal

FP32 = 1e-10
EXACT = 0.0


def _logits(tokens: int, experts: int, bias: float | None, **options):
    """Random logits, one row with equal values and one with a NaN, and if asked for a bias of that magnitude."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        logits = normal(0, tokens, experts)
        logits[-1] = 0.5
        logits[-2, 1] = float("nan")
        return (logits.to(device), None if bias is None else normal(1, experts, scale=bias).to(device)), options

    return inputs


def _load(experts: int, rate: float):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        load = torch.randint(0, 9, (experts,), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
        return (normal(3, experts).to(device), load.to(device), rate), {}

    return inputs


def _packed(tokens: int, experts: int, lengths: list[int], **options):
    def inputs(device: torch.device) -> tuple[tuple, dict]:
        logits = normal(4, tokens, experts)
        logits[1, 0] = float("nan")
        return (logits.to(device),), {
            "sequence_lengths": torch.tensor(lengths, dtype=torch.int32).to(device),
            **options,
        }

    return inputs


def _hidden(tokens: int, hidden: int, experts: int, dtype: torch.dtype, **options):
    """Hidden states and expert vectors in `dtype`, and a bias."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        x, weight = normal(5, tokens, hidden, dtype=dtype), normal(6, experts, hidden, dtype=dtype, scale=0.2)
        return (x.to(device), weight.to(device), normal(7, experts).to(device)), options

    return inputs


def _places(tokens: int, experts: int, replicas: int, **options):
    """Random logits, and a map of places: rows with all entries, some, or none."""

    def inputs(device: torch.device) -> tuple[tuple, dict]:
        physical = torch.arange(experts * replicas, dtype=torch.int32).view(experts, replicas)
        physical[::2, 1:] = -1
        physical[5] = -1
        return (normal(8, tokens, experts).to(device),), {"physical": physical.to(device), **options}

    return inputs


CASES = [
    Case(
        "route",
        "11x256, top 8, 4 of 8 groups, sigmoid",
        _logits(11, 256, 0.3, top_k=8, n_groups=8, top_groups=4, scale=2.5),
        FP32,
        gradient=True,
    ),
    Case(
        "route",
        "7x160, top 6, 3 of 8 groups, softmax",
        _logits(7, 160, None, top_k=6, n_groups=8, top_groups=3, score="softmax", normalize=False, scale=16.0),
        FP32,
        gradient=True,
    ),
    Case("route", "5x384, top 8, bias of 12", _logits(5, 384, 12.0, top_k=8, scale=2.827), FP32, gradient=True),
    Case("route", "9x48, top 4, three places an expert", _places(9, 48, 3, top_k=4), FP32, gradient=True),
    Case(
        "route_hidden",
        "11x96, 32 experts, fp32",
        _hidden(11, 96, 32, torch.float32, top_k=4, n_groups=4, top_groups=2),
        FP32,
    ),
    Case("route_hidden", "3x200, 24 experts, bf16", _hidden(3, 200, 24, torch.bfloat16, top_k=3), FP32),
    Case("update_bias", "384", _load(384, 0.001), EXACT),
    Case(
        "balance_loss",
        "9x64, top 6, 4 sequences, sigmoid",
        _packed(9, 64, [2, 0, 5, 1], top_k=6, alpha=0.1),
        FP32,
        gradient=True,
    ),
    Case(
        "balance_loss",
        "9x48, top 4, 2 sequences, softmax",
        _packed(9, 48, [4, 9], top_k=4, alpha=0.1, score="softmax"),
        FP32,
        gradient=True,
    ),
]
