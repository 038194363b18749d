"""What this machine has, and memory on it."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)  # types that torch's own dispatch alone has a say in; a subclass may have another
dispatch_modes = torch._C._len_torch_dispatch_stack


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU, (major, minor); (0, 0) of others, whose numbers mean other things."""
    return torch.cuda.get_device_capability(device) if torch.version.hip is None else (0, 0)


@functools.cache
def multiprocessors(device: torch.device, interpreted: int = 1) -> int:
    """Number of multiprocessors of a GPU; `interpreted` on the CPU, whose interpreter is to split work too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else interpreted


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated there, None where nothing says so."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo") as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None


@functools.cache
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter on the CPU (it must be set before a kernel is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def several_gpus() -> bool:
    """Whether a call has to look which GPU is the current one."""
    return torch.cuda.device_count() > 1


def like_this(x: Tensor) -> Callable[[], Tensor]:
    """What allocates a tensor like this one on the current GPU, given that no mode of torch has a say in it."""
    make = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    return functools.partial(make, tuple(x.shape), x.stride(), x.dtype)


def empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
    """An uninitialised tensor beside `like`, contiguous unless `strides` are given.

    The same as `Tensor.new_empty` and `new_empty_strided`; on a GPU at half their cost, by the call that the code of
    `torch.compile` makes.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or type(like) not in PLAIN
        or not like.is_cuda
        or dispatch_modes()
        or (several_gpus() and like.get_device() != torch._C._cuda_getDevice())
    ):
        if strides is None:
            return like.new_empty(shape, dtype=dtype)
        return like.new_empty_strided(shape, strides, dtype=dtype)
    if strides is None:
        strides = (shape[1] or 1, 1) if len(shape) == 2 else torch.empty(shape, device="meta").stride()
    make = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    return make(tuple(shape), tuple(strides), dtype)  # it takes no torch.Size
