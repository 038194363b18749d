"""Random numbers as a function of where they are used, so that a text does not depend on what runs beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # odd, 2^64 / golden ratio: consecutive counters lie far apart


def streams(
    seed: int | Sequence[int] | None, generator: torch.Generator | None, count: int, device: torch.device
) -> Tensor:
    """The stream of each prompt, int64 ``[count]``.

    Args:
        seed: one for all, or one for each prompt, which determines it wherever it stands; None draws one.
        generator: the source of that draw, on ``device``; None is torch's own.
        count: number of prompts.
        device: of the result.

    Raises:
        ValueError: seed and generator are both given, or the number of seeds differs from that of prompts.
    """
    if seed is not None and generator is not None:
        raise ValueError("seed: expected None beside a generator")
    if seed is None:
        first = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        return _mix(first + torch.arange(count, device=device) * GOLDEN)
    if isinstance(seed, int):
        return _mix(torch.full((count,), _signed(seed), device=device) + torch.arange(count, device=device) * GOLDEN)
    if len(seed) != count:
        raise ValueError(f"seed: expected one or {count}, one for each prompt, got {len(seed)}")
    return _mix(torch.tensor([_signed(value) for value in seed], dtype=torch.int64, device=device))


def uniform(stream: Tensor, position: Tensor, purpose: int) -> Tensor:
    """Uniform numbers in [0, 1), float32, in the shape of ``position``.

    Args:
        stream: int64 ``[B]``, one for each row of ``position``.
        position: integers ``[B, ...]``, the token of the text that is being decided.
        purpose: 0 to 3, what is being decided, so that decisions about one token are independent.
    """
    stream = stream.view(-1, *[1] * (position.dim() - 1))
    return (_mix(stream + (4 * position.long() + purpose) * GOLDEN) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every bit."""
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - 2**64)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros."""
    return (x >> bits) & (2 ** (64 - bits) - 1)


def _signed(value: int) -> int:
    """The int64 with the lower 64 bits of a number."""
    return (value + 2**63) % 2**64 - 2**63
