"""Progress of a training run: a live table in a terminal, lines in a log, TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LOOKS = 10  # rows of earlier validations that the table keeps in sight
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "step": ("step", "{:,}".format),
    "loss": ("loss", "{:.3f}".format),
    "mtp_loss": ("MTP", "{:.3f}".format),
    "validation_loss": ("held out", "{:.3f}".format),
    "balance_loss": ("balance", "{:.2g}".format),
    "max_load": ("busiest", "{:.2f}×".format),
    "learning_rate": ("rate", "{:.2g}".format),
    "gradient_norm": ("gradient", "{:.2g}".format),
    "tokens_per_second": ("tokens/s", "{:,.0f}".format),
    "mfu": ("MFU", "{:.1%}".format),
    "memory_gb": ("GB", "{:.2f}".format),
}
# Columns that a narrow terminal leaves out, the least needed first.
SPARED = ("balance_loss", "gradient_norm", "learning_rate", "memory_gb", "mfu", "mtp_loss", "max_load")
BRIEF = {"loss": "loss", "mtp_loss": "MTP", "validation_loss": "held out"}  # of a line in a log


class TrainingProgress:
    """A progress bar and a table with a row for each validation and one for now; pass it to `train` as ``progress``.

    ::

        with TrainingProgress(config.steps) as progress:
            train(..., progress=progress)

    If the output is not a terminal, it prints a plain line at each validation instead.

    Args:
        steps: the number of steps.
        console: where to print, by default rich's own on stdout.
    """

    def __init__(self, steps: int, console: Console | None = None) -> None:
        self.console = Console() if console is None else console
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=self.console
        )
        self.task = self.bar.add_task("training", total=steps)
        self.last: dict[str, Any] = {}
        self.looks: list[dict[str, Any]] = []
        self.live = Live(console=self.console, refresh_per_second=4, get_renderable=self._shown)

    def __enter__(self) -> TrainingProgress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def __call__(self, record: dict[str, Any]) -> None:
        """Show a line of the metrics."""
        self.last |= record
        self.bar.update(self.task, completed=record["step"])
        if "validation_loss" in record:
            self.looks.append(dict(self.last))
            if not self.console.is_terminal:
                self.console.print(f"step {record['step']}: {self._said()}", highlight=False, soft_wrap=True)

    def _said(self) -> str:
        said = [f"{short} {self.last[name]:.3f}" for name, short in BRIEF.items() if name in self.last]
        for name, after in (("max_load", " busiest"), ("tokens_per_second", " tokens/s"), ("mfu", " MFU")):
            if self.last.get(name) is not None:
                said.append(COLUMNS[name][1](self.last[name]) + after)
        return "  ".join(said)

    def _shown(self) -> Group:
        rows = [(row, "dim") for row in self.looks[-LOOKS:]]
        if self.last and self.last != (self.looks[-1] if self.looks else None):
            rows.append(({name: value for name, value in self.last.items() if name != "validation_loss"}, "bold"))
        columns = {name: [head, *(_cell(name, row) for row, _ in rows)] for name, (head, _) in COLUMNS.items()}
        names = fitting({name: max(map(len, cells)) for name, cells in columns.items()}, self.console.width)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for name in names:
            table.add_column(columns[name][0], justify="right", no_wrap=True)
        for i, (_, style) in enumerate(rows, start=1):
            table.add_row(*(columns[name][i] for name in names), style=style)
        return Group(self.bar, table)


def _cell(name: str, record: dict[str, Any]) -> str:
    return "-" if record.get(name) is None else COLUMNS[name][1](record[name])


def fitting(widths: dict[str, int], width: int) -> list[str]:
    """The columns, of these widths and two apart, that fit completely into a terminal of this width."""
    names = list(widths)
    for spared in SPARED:
        if sum(widths[name] + 2 for name in names) - 2 <= width:
            break
        names.remove(spared)
    return names


def require_tensorboard() -> None:
    """Raises an ImportError that says what to install, where the package `tensorboard` is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise ImportError("--tensorboard needs the package: pip install 'dskernels[tensorboard]'") from None


class TensorBoardLog:
    """Writes the numbers of a run for TensorBoard; pass it to `train` as ``progress``, or call it in addition to
    another.

    Args:
        run: the run's folder; events are written to ``tensorboard`` in it.
        step: the step at which the run continues: what an earlier attempt wrote for later steps is dropped.

    Raises:
        ImportError: the package `tensorboard` is missing.
    """

    def __init__(self, run: str | Path, step: int = 0) -> None:
        require_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(Path(run) / "tensorboard"), purge_step=step + 1 if step else None)

    def __call__(self, record: dict[str, Any]) -> None:
        """Write a line of the metrics."""
        for name, value in record.items():
            if name == "layer_loads":
                for layer, load in enumerate(value):
                    self.writer.add_scalar(f"load/layer {layer}", load, record["step"])
            elif isinstance(value, int | float) and name != "step":
                kind = "validation" if "validation" in name else "training"
                self.writer.add_scalar(f"{kind}/{name}", value, record["step"])

    def close(self) -> None:
        """Write what is still buffered."""
        self.writer.close()
