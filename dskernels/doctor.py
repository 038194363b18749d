"""What this machine has, and which implementation would run on it for each operation."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from dskernels.choice import Choice, explain
from dskernels.cuda.compiler import reason_against_compiling
from dskernels.device import capability, default_device, has_triton

PACKAGES = ("dskernels", "torch", "triton", "cupy", "safetensors", "transformers", "tokenizers", "matplotlib")
DISTRIBUTIONS = {"cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy")}


def machine() -> dict[str, Any]:
    """Facts about this machine: Python, packages (None where missing), the GPU (None where there is none)."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
        "gpu": gpu(),
    }


def gpu() -> dict[str, Any] | None:
    """The first GPU: name, architecture, memory in GiB, multiprocessors, CUDA or ROCm of torch."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "architecture": getattr(properties, "gcnArchName", "?").partition(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "runtime": f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}",
        "count": torch.cuda.device_count(),
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, None if it is not installed."""
    for distribution in DISTRIBUTIONS.get(package, (package,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def choices() -> list[Choice]:
    """What would run for each registered operation on the default device, backward passes included."""
    return sorted(explain(), key=lambda choice: choice.operation)


def summary() -> str:
    """One sentence: what the kernels will do here."""
    if gpu() is None:
        said = "No GPU: operations run their PyTorch references"
        return f"{said}; `dskernels parity` runs the Triton kernels in the interpreter." if has_triton() else f"{said}."
    said = f"Operations run on {default_device()} by the implementations below."
    if capability(default_device()) == (9, 0) and (reason := reason_against_compiling()):
        said += f" But kernels in CUDA C++, most of those called hopper, do not: {reason}."
    return said
