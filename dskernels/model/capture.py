"""Capture what is launched on a stream as a CUDA graph: a step of generation, a step of training."""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from dskernels.choice import forced_impl


class capturing:  # noqa: N801 - a context manager, spelt like torch.cuda.graph
    """Capture what is launched on the current stream.

    Unlike `torch.cuda.graph` it does not begin by collecting garbage and emptying caches (0.1 s and more in a large
    program).
    """

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        self._graph, self._pool = graph, pool

    def __enter__(self) -> None:
        # If a graph is garbage-collected meanwhile (graphs may be part of cycles), destroying it ends the capture.
        self._collecting = gc.isenabled()
        gc.disable()
        # Other threads may do what they like (such as loading a file into pinned memory); it is not captured.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            self._graph.capture_end()
        except RuntimeError:
            self._repair()
            if error is None:
                raise
        finally:
            if self._collecting:
                gc.enable()

    def _repair(self) -> None:
        """Tell torch that a failed capture is over; an empty capture does this.

        torch otherwise believes that it continues: memory would still come from its pool, and random numbers be
        refused.
        """
        with suppress(RuntimeError):  # not needed in all versions of torch
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        with suppress(RuntimeError):  # the reason for the first failure matters more
            nothing = torch.cuda.CUDAGraph()
            nothing.capture_begin(capture_error_mode="thread_local")
            torch.cuda._sleep(1)
            nothing.capture_end()


@functools.cache
def _stream_of(thread: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """The stream that this thread captures on, always the same: torch keeps 32 MB for cuBLAS for each stream that ran a
    product.

    With one stream for each cache, of up to 32, this was 1 GB.
    """
    return _stream_of(threading.get_ident(), device)


@contextmanager
def aside(stream: torch.cuda.Stream, what: str, instead: str) -> Iterator[None]:
    """Inside, the current stream is ``stream``, on which a step is captured, ordered after the stream that was current.

    Raises:
        RuntimeError: the step contains something that cannot be captured; the message says ``what`` the step is, why,
            and what to do ``instead``.
    """
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise RuntimeError(f"{what} cannot be captured ({reason}); {instead}") from error
    current.wait_stream(stream)


def mode() -> tuple[str | None, bool]:
    """The settings outside of the model that decide which kernels run."""
    return forced_impl(), torch.is_autocast_enabled("cuda")
