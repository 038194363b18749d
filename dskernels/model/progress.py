"""A live line for training in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress:
    """A bar with loss, held-out loss and speed; hand it to `train` as ``progress``.

    ::

        with TrainingProgress(config.steps) as progress:
            train(..., progress=progress)

    Where the output is not a terminal it prints a plain line at each look at the held-out text instead.

    Args:
        steps: how many there will be.
        console: where to, by default rich's own on stdout.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = Console() if console is None else console
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=steps, said="")
        self.last: dict[str, Any] = {}

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.bar.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Shows a line of the metrics."""
        self.last |= record
        self.bar.update(self.task, completed=record["step"], said=self._said())
        if "validation_loss" in record and not self.console.is_terminal:
            self.console.print(f"step {record['step']}: {self._said()}", highlight=False)

    def _said(self) -> str:
        names = {"loss": "loss", "mtp_loss": "MTP", "validation_loss": "held out"}
        said = [f"{short} {self.last[name]:.3f}" for name, short in names.items() if name in self.last]
        if "tokens_per_second" in self.last:
            said.append(f"{self.last['tokens_per_second']:,.0f} tokens/s")
        return "  ".join(said)
