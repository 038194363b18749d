"""What hypothesis draws: tensors of many layouts and contents, and calls made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from dskernels.reference.fp8 import quantize
from dskernels.types import Fp8Tensor

HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
KINDS = ("normal", "normal", "normal", "spread", "zeros", "equal", "outlier", "subnormal")
GUARD = 64  # elements before and after every tensor
POISON = 0x7F  # as bytes: NaN in e4m3, 3e38 in bf16 and fp32, NaN in fp16, beyond any size in int32 and int64


@dataclass
class Call:
    """A call of a public function, valid until it is spoiled.

    exact        from the arguments, what should come out in fp64: one tensor, or None for what is not compared, for
                 each tensor of the result (of an Fp8Tensor, one).
    loose        how many roundings of a result's dtype may be lost, over its largest magnitude.
    size         from the arguments, a magnitude that is as good: of terms that cancel out.
    apart        from the arguments and what sums may lose, how far implementations may be apart besides, element by
                 element, see allowing.py.
    bits         whether kernels return the reference's bytes.
    writes       arguments that are written to.
    """

    function: str
    arguments: dict[str, Any]
    exact: Callable[..., list[Tensor | None]] | None = None
    loose: float = 1.0
    bits: bool = False
    writes: tuple[str, ...] = ()
    size: Callable[..., float] = lambda **_: 0.0
    apart: Callable[..., Tensor] | None = None
    notes: list[str] = field(default_factory=list)


class Draw:
    """Draws of one example; `models` says whether to draw sizes of the models, which kernels for one GPU ask for."""

    def __init__(self, draw: Callable, models: bool = False) -> None:
        self.draw, self.models = draw, models
        self.random = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def one(self, *choices: Any) -> Any:
        """One of these; the first is the simplest."""
        return self.draw(st.sampled_from(choices))

    def models_or(self, size: Any, else_: Any) -> Any:
        """A size of the models where they are drawn, three times in four."""
        return size if self.models and not self.chance(4) else else_

    def chance(self, one_in: int = 2) -> bool:
        """Whether something happens that does once in so many times."""
        return self.draw(st.integers(0, one_in - 1)) == one_in - 1

    def floats(self, *shape: int, dtype: torch.dtype = torch.float32, kind: str | None = None, scale: float = 1.0):
        """Numbers of a kind, in a layout."""
        kind = kind or self.one(*KINDS)
        x = torch.randn(shape, generator=self.random) * scale
        if kind == "spread" and x.dim():
            x = x * 10.0 ** (torch.rand(shape[-1:], generator=self.random) * 4 - 2)
        elif kind == "zeros":
            x = torch.zeros(shape)
        elif kind == "equal":
            x = torch.full(shape, 0.37 * scale)
        elif kind == "outlier" and x.numel():
            x.view(-1)[int(torch.randint(x.numel(), (1,), generator=self.random))] = 300.0 * scale
        elif kind == "subnormal":  # but for bf16, whose subnormals Triton's interpreter (3.7) reads as other numbers
            x = x * (2.0**-100 if dtype == torch.bfloat16 else torch.finfo(dtype).tiny / 8)
        return self.laid_out(x.to(dtype))

    def integers(self, *shape: int, low: int, high: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Integers from `low` up to `high`, not included, in a layout."""
        high = max(high, low + 1)
        return self.laid_out(torch.randint(low, high, shape, generator=self.random, dtype=dtype))

    def laid_out(self, x: Tensor, *, pad: bool = True) -> Tensor:
        """The same numbers between guards, perhaps at an odd place, perhaps with gaps between rows."""
        gaps, offsets = ((0, 0, 8, 3), (0, 0, 8, 1)) if not self.models else ((0, 0, 0, 128), (0, 0, 0, 128))
        gap = self.one(*gaps) if pad and x.dim() > 1 else 0
        offset = GUARD + self.one(*offsets)  # kernels for one GPU want what is aligned
        strides = [1] * x.dim()
        for i in reversed(range(x.dim() - 1)):
            strides[i] = max(x.shape[i + 1], 1) * strides[i + 1] + (gap if i == x.dim() - 2 else 0)
        return placed(x, strides, offset)

    def fp8(self, x: Tensor, block: tuple[int, int]) -> Fp8Tensor:
        """An operand quantised by the reference, its parts between guards."""
        q = quantize(x.float(), block)
        return Fp8Tensor(self.laid_out(q.data), placed(q.scale, q.scale.stride(), GUARD), block)

    def bounds(self, n: int, total: int) -> list[int]:
        """n + 1 ascending numbers from 0 to `total` at most."""
        inner = sorted(self.draw(st.lists(st.integers(0, total), min_size=n, max_size=n)))
        return [0, *inner]

    def vector(self, values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
        """These numbers."""
        return self.laid_out(torch.tensor(values, dtype=dtype))


def placed(x: Tensor, strides: tuple[int, ...] | list[int], offset: int) -> Tensor:
    """The same numbers with these strides, in the middle of memory full of poison."""
    span = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True) if n) + 1
    memory = torch.full(((offset + span + GUARD) * x.element_size(),), POISON, dtype=torch.uint8)
    # bool has two values only
    flat = memory.zero_().view(torch.bool) if x.dtype == torch.bool else memory.view(x.dtype)
    return flat.as_strided(x.shape, list(strides), offset).copy_(x)


def leaves(value: Any, path: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor in an argument, with where it stands."""
    if isinstance(value, Tensor):
        return [(path, value)]
    if isinstance(value, dict):
        return [leaf for key, part in value.items() for leaf in leaves(part, key)]
    if isinstance(value, tuple):
        names = getattr(value, "_fields", range(len(value)))
        return [leaf for name, part in zip(names, value, strict=True) for leaf in leaves(part, f"{path}.{name}")]
    return []


def replaced(value: Any, path: str, new: Any) -> Any:
    """The same, with something else at this place."""
    head, _, rest = path.partition(".")
    if isinstance(value, dict):
        return {**value, head: replaced(value[head], rest, new) if rest else new}
    names = [str(name) for name in getattr(value, "_fields", range(len(value)))]
    parts = [
        (replaced(part, rest, new) if rest else new) if name == head else part
        for name, part in zip(names, value, strict=True)
    ]
    return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
