"""Recording what a stream is given as a CUDA graph: of a step of generation, of a step of training."""

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
    """Records what the current stream is given, without the collection of garbage and of memory that `torch.cuda.graph`
    begins with (0.1 s and more in a large program)."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        self._graph, self._pool = graph, pool

    def __enter__(self) -> None:
        # A graph that is collected meanwhile (they may lie in cycles) is taken apart, which ends the capture.
        self._collecting = gc.isenabled()
        gc.disable()
        # Other threads may do what they like (load a file into pinned memory), it is not recorded.
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
        """After a capture that failed torch believes that it goes on: memory would still be taken from its pool, and
        random numbers be refused outside of it. A capture of nothing ends that."""
        with suppress(RuntimeError):  # not all versions of torch need it
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
        with suppress(RuntimeError):  # why the first one failed is the better thing to say
            nothing = torch.cuda.CUDAGraph()
            nothing.capture_begin(capture_error_mode="thread_local")
            torch.cuda._sleep(1)
            nothing.capture_end()


@functools.cache
def _stream_of(thread: int, device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def stream_of(device: torch.device) -> torch.cuda.Stream:
    """What this thread captures on: always the same, as torch keeps 32 MB for cuBLAS of each stream that had a product.

    With a stream for each cache, of up to 32, that was 1 GB.
    """
    return _stream_of(threading.get_ident(), device)


@contextmanager
def aside(stream: torch.cuda.Stream, what: str, instead: str) -> Iterator[None]:
    """Within it the current stream is ``stream``, which a step is captured on, behind what the current one was given.

    Raises:
        RuntimeError: the step does what cannot be in a graph: ``what`` it is, why, and what to do ``instead``.
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
    """What decides from outside which kernels run."""
    return forced_impl(), torch.is_autocast_enabled("cuda")
