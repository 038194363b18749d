"""The sequences that run, in tensors that stay where they are, and the CUDA graphs of a step over them."""

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
    """The sequences that run: those of the first rows, with no holes.

    Args:
        passes: of the generation.
        slots: most sequences at a time.
        pages: most pages of one.
        graphs: make a CUDA graph of the step for each number of rows, and replay it.
        all_rows: a step runs all rows, always.

    Attributes:
        running: how many sequences there are.
    """

    def __init__(self, passes: Passes, *, slots: int, pages: int, graphs: bool, all_rows: bool) -> None:
        self.passes, self.slots, self.graphs, self.all_rows = passes, slots, graphs, all_rows
        self.running = 0
        # Tensors made in inference mode are not to be written outside of it.
        self._kind = (slots, pages, len(passes.eos), passes.drafts, passes.sampling, torch.is_inference_mode_enabled())
        kept = passes.cache.kept.pop(self._kind, None) if graphs else None
        if isinstance(kept, StepGraphs) and kept.are_of(passes.model):
            self._graphs: StepGraphs | None = kept
            self.sequences = kept.sequences
        else:
            self.sequences = Sequences.empty(passes, slots, pages)
            self._graphs = StepGraphs(self.sequences) if graphs else None

    def append(self, sequences: Sequences) -> None:
        """Adds sequences behind those that run."""
        end = self.running + sequences.last.shape[0]
        self.sequences.rows(self.running, end).copy_(sequences)
        self.running = end

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all sequences but those of ``rows``, which move together in this order."""
        index = to_device(rows, torch.int64, self.sequences.last.device)
        for tensor in self.sequences.tensors():
            if rows:
                tensor[: len(rows)] = tensor[index]
            tensor[len(rows) : self.running] = 0
        self.running = len(rows)

    def step(self) -> Coming:
        """Begins a step; the host does not wait for it."""
        rows = self._rows()
        if self._graphs is None:
            self.passes.step(self.sequences.rows(0, rows))
        else:
            self._graphs.replay(self.passes, rows)
        return Coming(self.sequences.new[: self.running])

    def close(self) -> None:
        """Leaves the graphs to the next generation on the cache that is like this one."""
        graphs, self._graphs = self._graphs, None
        if graphs is not None and graphs.graphs:
            self.keep([])
            self.passes.cache.kept.clear()  # a graph has memory of its own: those of one kind are enough
            self.passes.cache.kept[self._kind] = graphs

    def drop_graphs(self) -> None:
        """Leaves nothing."""
        self._graphs = None

    def _rows(self) -> int:
        """How many rows a step runs: with graphs a power of two, so that there are few."""
        if self.all_rows:
            return self.slots
        return min(self.slots, 1 << (self.running - 1).bit_length()) if self.graphs else self.running


class Coming:
    """The tokens of a step that the device may still be working on."""

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
        """The new tokens of each sequence, and how many drafts stood. Here the host waits, if it must."""
        if self._event is not None:
            self._event.synchronize()
        rows = self._new.tolist()
        return [row[: row[-2]] for row in rows], sum(row[-1] for row in rows)


@dataclass
class StepGraphs:
    """A CUDA graph of the step for each number of rows, made when it is first asked for.

    They read the weights where these lie, so that a model may be trained on between two steps. But copies are made of
    some weights (dense ones of quantised ones, and the other way round): where a weight has changed since, by torch's
    count of changes, the graphs are made anew; and where another implementation is to run than did.

    Attributes:
        sequences: what they work on.
        graphs: by the number of rows. They share their memory: one at a time runs, and nothing stays in it.
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
        """Whether they are of this model with the weights that it has now."""
        same = self._model() is model and self._mode == mode()
        return same and self._state == [place_and_version(t) for t in tensors_of(model)]

    def replay(self, passes: Passes, rows: int) -> None:
        """Runs a step over the first rows."""
        if self.graphs and (self._mode != mode() or self._versions != [version(t()) for t in self._weights]):
            torch.cuda.current_stream(self.sequences.last.device).synchronize()  # one of them may be under way
            self.graphs.clear()
        if rows not in self.graphs:
            self.graphs[rows] = self._capture(passes, rows)
        self.graphs[rows].replay()

    def _capture(self, passes: Passes, rows: int) -> torch.cuda.CUDAGraph:
        """The graph of a step over so many rows.

        Raises:
            RuntimeError: the step does what cannot be in a graph.
        """
        device = self.sequences.last.device
        if not self.graphs:
            self._pool = torch.cuda.graph_pool_handle()  # torch gives a pool up with the last graph in it
        graph = torch.cuda.CUDAGraph()
        with aside(stream_of(device), f"graphs: a step of {rows} rows", "graphs=False runs without them"):
            # A step of rows without sequences, which changes nothing: what is compiled, loaded or kept cannot be within
            # a capture.
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
    """Whatever a pass reads: parameters, buffers, and copies that modules keep."""
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    return [*model.parameters(), *model.buffers(), *kept]


def version(tensor: Tensor | None) -> int:
    """Torch's count of changes; those of inference mode are not counted, and one that is gone has changed."""
    return -1 if tensor is None else 0 if tensor.is_inference() else tensor._version


def place_and_version(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor lies and how often it has changed."""
    return tensor.data_ptr(), version(tensor)


def to_device(numbers: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor; the host does not wait for what the device is doing."""
    tensor = torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)
