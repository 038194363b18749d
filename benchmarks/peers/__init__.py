"""Other people's kernels on our inputs: found if they can be imported, said to be missing otherwise.

Each function of this package makes one peer ready (layouts converted, schedules planned: none of that is timed) and
returns the call to time. A peer that does not take a job raises `NotApplicable` with the reason. The keys under which
results are kept:

``cublaslt`` `torch.nn.functional.scaled_mm` with block scales, ``cudnn`` SDPA by cuDNN, ``grouped_mm`` torch's grouped
matrix product, ``torch`` the same job written in eager PyTorch (bf16 where it is a matrix product), ``torch_compile``
that compiled, ``torch_compile_graph`` that as a CUDA graph, ``uncached`` our attention to keys and values that need no
making, ``unshared`` our decode that does not know of a common prefix, ``plain`` our generation without drafts or
without invariance, and the libraries ``deepgemm``, ``flashmla``, ``flashinfer``, ``vllm``, ``transformers``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.saved import OURS_WITHOUT
from dskernels import Fp8Tensor

MODULES = {
    "deepgemm": "deep_gemm",
    "flashmla": "flash_mla",
    "flashinfer": "flashinfer",
    "vllm": "vllm",
    "transformers": "transformers",
}
OF_TORCH = ("cublaslt", "cudnn", "grouped_mm", "torch", "torch_compile", "torch_compile_graph")
NAMES = (*OF_TORCH, *OURS_WITHOUT, *MODULES)


class Peer(NamedTuple):
    """A call to time, and how its return value becomes ours, for comparing."""

    run: Callable[[], Any]
    result: Callable[[Any], Any] = lambda out: out


class NotApplicable(Exception):  # noqa: N818 - a reason, not an error
    """The peer does not do this job; the message says why."""


@functools.cache
def missing() -> dict[str, str]:
    """Peers that cannot run here at all, and why."""
    reasons = {name: f"{module} is not installed" for name, module in MODULES.items() if not _installed(module)}
    if not hasattr(F, "scaled_mm"):
        reasons["cublaslt"] = "this torch has no torch.nn.functional.scaled_mm"
    if not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        reasons["grouped_mm"] = "this torch has no grouped_mm"
    if not torch.backends.cudnn.is_available():
        reasons["cudnn"] = "cuDNN is not available"
    return reasons


def eager(function: Callable[[], Any]) -> Callable[[], Peer]:
    """A peer that is a plain call."""
    return lambda: Peer(function)


def compiled(function: Callable, *args: Any, **kwargs: Any) -> Callable[[], Peer]:
    """The same function through `torch.compile`, for just these shapes."""

    def prepare() -> Peer:
        compiled_function = torch.compile(function, dynamic=False)
        return Peer(lambda: compiled_function(*args, **kwargs))

    return prepare


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def attribute(module: str, name: str) -> Any:
    """An attribute of a peer's module."""
    return first_attribute(name, module)


def first_attribute(name: str, *modules: str) -> Any:
    """The attribute of the first of these modules that has it: libraries move things about."""
    for module in modules:
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise NotApplicable(f"this version has no {modules[0]}.{name}")


def torch_grouped_mm() -> Callable:
    """torch's grouped product, public or not yet."""
    return F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm


def in_bf16(x: Tensor | Fp8Tensor) -> Tensor:
    """The same numbers in bf16; a stack matrix by matrix, since one of 256 experts takes 45 GB in fp32."""
    if isinstance(x, Tensor):
        return x
    if x.data.dim() == 2:
        return x.dequantize(torch.bfloat16)
    out = torch.empty(x.data.shape, device=x.data.device, dtype=torch.bfloat16)
    for e in range(len(out)):
        out[e] = Fp8Tensor(x.data[e], x.scale[e], x.block).dequantize(torch.bfloat16)
    return out
