"""The running sequences, in tensors at fixed addresses, and the CUDA graphs of a step over them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from dskernels.model.capture import aside, capturing, mode, stream_of
from dskernels.model.model import DeepseekV3
from dskernels.model.passes import Passes, Sequences


class Slots:
    """The running sequences: they occupy the first rows, without gaps.

    Args:
        passes: the passes of the generation.
        slots: the maximum number of sequences at a time.
        pages: the maximum number of pages of one sequence.
        graphs: capture a CUDA graph of the step for each number of rows, and replay it.
        all_rows: always run all rows in a step.

    Attributes:
        running: the number of sequences.
    """

    def __init__(self, passes: Passes, *, slots: int, pages: int, graphs: bool, all_rows: bool) -> None:
        self.passes, self.slots, self.graphs, self.all_rows = passes, slots, graphs, all_rows
        self.running = 0
        # Tensors that are made in inference mode cannot be written outside of it.
        self._kind = (slots, pages, len(passes.eos), passes.drafts, passes.sampling, torch.is_inference_mode_enabled())
        kept = passes.cache.kept.pop(self._kind, None) if graphs else None
        if isinstance(kept, StepGraphs) and kept.are_of(passes.model):
            self._graphs: StepGraphs | None = kept
            self.sequences = kept.sequences
        else:
            self.sequences = Sequences.empty(passes, slots, pages)
            self._graphs = StepGraphs(self.sequences) if graphs else None

    def append(self, sequences: Sequences) -> None:
        """Add sequences behind those that are running."""
        end = self.running + sequences.last.shape[0]
        self.sequences.rows(self.running, end).copy_(sequences)
        self.running = end

    def keep(self, rows: Sequence[int]) -> None:
        """Keep only the sequences in ``rows``, which move together in this order."""
        index = to_device(rows, torch.int64, self.sequences.last.device)
        for tensor in self.sequences.tensors():
            if rows:
                tensor[: len(rows)] = tensor[index]
            tensor[len(rows) : self.running] = 0
        self.running = len(rows)

    def step(self) -> Coming:
        """Begin a step; the host does not wait for it."""
        rows = self._rows()
        if self._graphs is None:
            self.passes.step(self.sequences.rows(0, rows))
        else:
            self._graphs.replay(self.passes, rows)
        return Coming(self.sequences.new[: self.running])

    def close(self) -> None:
        """Leave the graphs to the next generation on this cache that is of the same kind."""
        graphs, self._graphs = self._graphs, None
        if graphs is not None and graphs.graphs:
            self.keep([])
            self.passes.cache.kept.clear()  # graphs occupy memory, so only those of one kind are kept
            self.passes.cache.kept[self._kind] = graphs

    def drop_graphs(self) -> None:
        """Drop the graphs."""
        self._graphs = None

    def _rows(self) -> int:
        """The number of rows that a step runs: with graphs a power of two, so that there are few different ones."""
        if self.all_rows:
            return self.slots
        return min(self.slots, 1 << (self.running - 1).bit_length()) if self.graphs else self.running


class Coming:
    """The tokens of a step that may still be running on the device."""

    def __init__(self, new: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if new.is_cuda:
            self._new = torch.empty(new.shape, dtype=new.dtype, pin_memory=True)
            self._new.copy_(new, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(new.device))
        else:
            self._new = new.clone()

    def tokens(self) -> tuple[list[list[int]], int]:
        """The new tokens of each sequence, and how many drafts were accepted. The host waits here if it has to."""
        if self._event is not None:
            self._event.synchronize()
        rows = self._new.tolist()
        return [row[: row[-2]] for row in rows], sum(row[-1] for row in rows)


@dataclass
class StepGraphs:
    """A CUDA graph of the step for each number of rows, captured when it is first needed.

    Graphs read the weights at their addresses, so a model may be trained between two steps. Some weights have copies
    though (dequantised or quantised): if one of them has changed since, by torch's version counter, or if another
    implementation is asked for, the graphs are captured again.

    Attributes:
        sequences: the tensors that the graphs work on.
        graphs: by number of rows. They share their memory: only one runs at a time, and nothing stays in it.
    """

    sequences: Sequences
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)
    _model: Callable[[], DeepseekV3 | None] = lambda: None  # weak references, this and the next
    _weights: list[Callable[[], Tensor | None]] = field(default_factory=list)
    _state: list[tuple[int, int]] = field(default_factory=list)
    _versions: list[int] = field(default_factory=list)
    _mode: tuple[str | None, bool] | None = None
    _pool: Any = None

    def are_of(self, model: DeepseekV3) -> bool:
        """Whether the graphs belong to this model with its present weights."""
        same = self._model() is model and self._mode == mode()
        return same and self._state == [place_and_version(t) for t in tensors_of(model)]

    def replay(self, passes: Passes, rows: int) -> None:
        """Run a step over the first rows."""
        if self.graphs and (self._mode != mode() or self._versions != [version(t()) for t in self._weights]):
            torch.cuda.current_stream(self.sequences.last.device).synchronize()  # a graph may still be running
            self.graphs.clear()
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(passes, rows)
        self.graphs[rows].replay()

    def _capture(self, passes: Passes, rows: int) -> torch.cuda.CUDAGraph:
        """Capture the graph of a step over this many rows.

        Raises:
            RuntimeError: the step does what cannot be in a graph.
        """
        device = self.sequences.last.device
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()  # torch releases a pool together with the last graph in it
        graph = torch.cuda.CUDAGraph()
        with aside(stream_of(device), f"graphs: a step of {rows} rows", "graphs=False runs without them"):
            # First a step over rows without sequences, which changes nothing: compiling, loading and caching are not
            # possible during a capture.
            passes.step(Sequences.empty(passes, rows, self.sequences.block_table.shape[1]))
            with capturing(graph, self._pool):
                passes.step(self.sequences.rows(0, rows))
        weights = tensors_of(passes.model)
        self._model, self._weights = ref(passes.model), [ref(t) for t in weights]
        self._state = [place_and_version(t) for t in weights]
        self._versions = [version(t) for t in weights]
        self._mode = mode()
        return graph


def tensors_of(model: DeepseekV3) -> list[Tensor]:
    """Everything that a pass reads: parameters, buffers, and copies that modules keep."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *kept]


def version(tensor: Tensor | None) -> int:
    """torch's version counter; an inference tensor has none, and a tensor that is gone counts as changed."""
    return -1 if tensor is None else 0 if tensor.is_inference() else tensor._version


def place_and_version(tensor: Tensor) -> tuple[int, int]:
    """The address of a tensor and its version counter."""
    return tensor.data_ptr(), version(tensor)


def to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers from the host as a tensor; the host does not wait for the device."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
