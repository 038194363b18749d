"""A training step as a CUDA graph: launching the step of a small model takes the host longer than the device
computes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dskernels.model.capture import aside, capturing, mode, stream_of
from dskernels.model.data import Packed

FEWEST = 16  # graphs are made for at least this many sequences


class Inputs(NamedTuple):
    """Everything about a step that changes from one to the next, on its device.

    Attributes:
        text: the micro-batches.
        shares: for each its share of the predictions, fp32 ``[]``.
        learning_rate: fp32 ``[]``.
        mtp_lambda: fp32 ``[]``, weight of the MTP loss.
        moving: fp32 ``[]``, 1 while router biases move, else 0.
    """

    text: Sequence[Packed]
    shares: Sequence[Tensor]
    learning_rate: Tensor
    mtp_lambda: Tensor
    moving: Tensor

    @classmethod
    def of(cls, text: Sequence[Packed], numbers: Tensor) -> Inputs:
        """From ``numbers``, fp32 ``[3 + microbatches]``: the last three fields, then the shares."""
        learning_rate, mtp_lambda, moving, *shares = numbers.unbind()
        return cls(text, shares, learning_rate, mtp_lambda, moving)


class StepGraphs:
    """Runs steps as CUDA graphs, one for each kind.

    A kind is what the host decides: whether MTP modules run, which implementations, and the number of sequences of each
    micro-batch, rounded up to a power of two with empty sequences. The first step of a kind runs normally (compiling,
    loading and caching are not possible during a capture), on the stream on which the second one is captured: gradient
    accumulators belong to the stream of the step that made them, and if anything kept one alive, it would bring another
    stream into the capture. The second step and all later ones are replays. The graphs share their memory: only one
    runs at a time, and only its numbers remain.

    Args:
        step: a whole step: it only reads and writes tensors at fixed addresses, and returns its numbers in a new
            tensor.
        parameters: what it writes. Caches of things made from them compare versions, which a replay has to increment.
    """

    def __init__(self, step: Callable[[Inputs, bool], Tensor], parameters: Sequence[Tensor]) -> None:
        self.step, self.parameters = step, parameters
        self.device = parameters[0].device
        self._kinds: dict[Hashable, Kind] = {}
        self._pool: Any = None

    def run(self, text: Sequence[Packed], numbers: Tensor, mtp: bool) -> Tensor:
        """The numbers of a step.

        Args:
            text: micro-batches, on the CPU.
            numbers: see `Inputs.of`, on the CPU.
            mtp: whether MTP modules run.

        Raises:
            RuntimeError: the step contains something that cannot be captured.
        """
        text = [padded(batch) for batch in text]
        key = (mtp, mode(), *(tuple(x.shape for x in batch) for batch in text))
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = Kind(text, numbers, self.device)
            return self._first(kind.inputs, mtp)
        kind.fill(text, numbers)
        if kind.graph is None:
            kind.values, kind.graph = self._capture(kind.inputs, mtp)
        kind.graph.replay()
        torch.autograd.graph.increment_version(self.parameters)
        return kind.values.clone()  # the next replay overwrites them

    def _first(self, inputs: Inputs, mtp: bool) -> Tensor:
        """The numbers of a step that runs normally."""
        if self.device.type != "cuda":
            return self.step(inputs, mtp)
        current, stream = torch.cuda.current_stream(self.device), stream_of(self.device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            values = self.step(inputs, mtp)
        # Memory that it allocated and freed is only used again on its own stream, which waits for this one each time.
        current.wait_stream(stream)
        return values

    def _capture(self, inputs: Inputs, mtp: bool) -> tuple[Tensor, torch.cuda.CUDAGraph]:
        """Capture the graph of a step, which does not run it; returns the graph and the tensor of its numbers."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        torch.cuda.current_stream(self.device).synchronize()
        gc.collect()  # leftovers of a step's backward hold memory that the capture needs
        torch.cuda.empty_cache()  # the graph has memory of its own for what the step before used
        graph = torch.cuda.CUDAGraph()
        stream = stream_of(self.device)
        with aside(stream, "cuda_graph: a step", "cuda_graph=False runs without"), capturing(graph, self._pool):
            values = self.step(inputs, mtp)
        return values, graph


class Kind:
    """Steps of one kind: the addresses of their inputs, and their graph once there is one.

    Attributes:
        inputs: of the step that runs, on the device.
        graph: None before the second step.
        values: the numbers that it produces.
    """

    graph: torch.cuda.CUDAGraph | None = None
    values: Tensor

    def __init__(self, text: Sequence[Packed], numbers: Tensor, device: torch.device) -> None:
        self._numbers = torch.empty_like(numbers, device=device)
        self.inputs = Inputs.of([Packed(*(torch.empty_like(x, device=device) for x in b)) for b in text], self._numbers)
        self.fill(text, numbers)

    def fill(self, text: Sequence[Packed], numbers: Tensor) -> None:
        """Copy in the inputs of the next step; the host does not wait for the one that runs."""
        inputs = [self._numbers, *(tensor for batch in self.inputs.text for tensor in batch)]
        for here, there in zip(inputs, [numbers, *(tensor for batch in text for tensor in batch)], strict=True):
            here.copy_(there.pin_memory() if here.is_cuda else there, non_blocking=True)


def padded(batch: Packed) -> Packed:
    """The batch with empty sequences appended, up to a power of two of them; no loss changes by a bit."""
    sequences = batch.cu_seqlens.shape[0] - 1
    more = max(FEWEST, 1 << (sequences - 1).bit_length()) - sequences
    return Packed(batch.tokens, torch.cat((batch.cu_seqlens, batch.cu_seqlens[-1:].expand(more))))
