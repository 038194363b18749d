"""An average of the weights over the steps, kept on the CPU (report section 3.2.3)."""

from __future__ import annotations

import torch

from dskernels.model.optimizer import MasterAdamW

EMA_EVERY = 10  # steps between two updates: a copy of all masters from the GPU takes longer than a small model's step


class Ema:
    """``average = d average + (1 - d) masters`` every `EMA_EVERY` steps, in fp32, with ``d = decay ** EMA_EVERY``.

    At first ``d`` is smaller, ``(n + 1) / (n + 10)`` at update n, so that the initial weights fade quickly. The copy is
    made while the next step runs, and contains the masters as they were when it was requested.

    Args:
        optimizer: whose masters are averaged; the average starts as a copy of them.
        decay: of one step.

    Attributes:
        average: fp32 on the CPU, flat like ``optimizer.flat``.
    """

    def __init__(self, optimizer: MasterAdamW, decay: float) -> None:
        self.optimizer, self.decay = optimizer, decay
        self.average = optimizer.flat.detach().cpu().clone()
        self._copy = torch.empty_like(self.average, pin_memory=optimizer.flat.is_cuda)
        self._done: torch.cuda.Event | None = None
        self._weight = 0.0

    @torch.no_grad()
    def start(self, step: int) -> None:
        """After step ``step`` (counted from 0): request a copy of the masters if an update is due."""
        if (step + 1) % EMA_EVERY:
            return
        self.finish()
        n = (step + 1) // EMA_EVERY - 1
        self._weight = 1 - min(self.decay**EMA_EVERY, (n + 1) / (n + 10))
        self._copy.copy_(self.optimizer.flat, non_blocking=True)
        if self.optimizer.flat.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    @torch.no_grad()
    def finish(self) -> None:
        """Complete the update that was requested."""
        if self._done is not None:
            self._done.synchronize()
        if self._weight:
            self.average.lerp_(self._copy, self._weight)
        self._done, self._weight = None, 0.0
