"""Pictures of a training run, from its metrics: the loss curve, and what each expert had to do before and after."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dskernels.model.disk import writing

History = Sequence[dict[str, Any]]

LOSS_FILE, EXPERTS_FILE, PICTURE_FILE = "loss.png", "experts.png", "training.png"

INK, FAINT = "#1f2937", "#9ca3af"
TRAIN, HELD_OUT, MTP = "#2563eb", "#111827", "#d97706"
# A white card with a hairline around it reads the same on a light and on a dark page.
STYLE: dict[Any, Any] = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "legend.frameon": False,
}


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, or a line is not JSON.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text, expected a run's metrics.jsonl") from None
    history = []
    for number, line in enumerate(lines, 1):
        try:
            history.append(json.loads(line))
        except ValueError:
            raise ValueError(f"{path}: line {number} is not JSON") from None
    return history


def require_matplotlib() -> None:
    """Raises an ImportError of one line where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'dskernels[plot]'") from None


def plot_loss(history: History, path: str | Path) -> None:
    """Draws the losses over the steps: training, MTP, held-out text.

    Args:
        history: what `train` returned, or `read_history`.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has no training step.
    """
    with drawing(path, 7.2, 4.2) as figure:
        _draw_loss(figure.subplots(), history)


def plot_experts(history: History, path: str | Path) -> None:
    """Draws the load of each expert of each layer on held-out text, before and after training.

    Args:
        history: what `train` returned, or `read_history`.
        path: the PNG to write.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the history has fewer than two looks at held-out text, or the model no experts.
    """
    with drawing(path, 7.2, 4.2) as figure:
        _draw_experts(figure, history)


def plot_training(history: History, path: str | Path, *, title: str, text: str = "") -> None:
    """Draws losses and expert loads side by side, under a title, with a piece of generated text where there is one.

    Args:
        history: what `train` returned, or `read_history`.
        path: the PNG to write.
        title: a line above.
        text: shown in a fixed-width font below.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: as `plot_loss` and `plot_experts`.
    """
    lines = text.splitlines()
    height = 4.4 + (0.4 + 0.17 * len(lines) if lines else 0.0)
    with drawing(path, 11.0, height) as figure:
        figure.suptitle(title, x=0.012, ha="left", fontsize=13, fontweight="bold", parse_math=False)
        rows = figure.subfigures(2, 1, height_ratios=[4.4, height - 4.4]) if lines else [figure]
        left, right = rows[0].subfigures(1, 2, width_ratios=[1.1, 1.0])
        _draw_loss(left.subplots(), history)
        _draw_experts(right, history)
        if lines:
            shown = "\n".join("".join(c if c.isprintable() else "·" for c in line) for line in lines)
            rows[1].text(0.03, 0.98, shown, family="DejaVu Sans Mono", fontsize=9, va="top", parse_math=False)


def plot_run(history: History, folder: str | Path) -> list[str]:
    """Draw the pictures that this history allows into the run's folder; returns their names."""
    folder = Path(folder)
    plot_loss(history, folder / LOSS_FILE)
    if not any(record.get("load") for record in history):
        return [LOSS_FILE]
    plot_experts(history, folder / EXPERTS_FILE)
    return [LOSS_FILE, EXPERTS_FILE]


def _draw_loss(axes: Any, history: History) -> None:
    steps = [record for record in history if "loss" in record]
    if not steps:
        raise ValueError("history: no training step in it")
    x = [record["step"] for record in steps]
    for name, label, color in (("loss", "training", TRAIN), ("mtp_loss", "MTP, the token after the next", MTP)):
        y = [record[name] for record in steps]
        if any(y):
            axes.plot(x, y, color=color, linewidth=0.6, alpha=0.25)
            axes.plot(x, smoothed(y), color=color, linewidth=1.8, label=label)
    looks = [record for record in history if "validation_loss" in record]
    y = [record["validation_loss"] for record in looks]
    x = [record["step"] for record in looks]
    axes.plot(x, y, color=HELD_OUT, linewidth=1.0, marker="o", markersize=4, label="held-out text")
    if y:
        axes.annotate(f"{y[-1]:.2f}", (x[-1], y[-1]), (5, 4), textcoords="offset points", fontweight="bold")
    axes.set_title("Loss")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_xlim(0, steps[-1]["step"] * 1.06)
    axes.legend(loc="upper right")


def _draw_experts(figure: Any, history: History) -> None:
    looks = [record for record in history if "load" in record]
    if len(looks) < 2:
        raise ValueError("history: needs a look at held-out text before and after training, as train() takes them")
    if not looks[0]["load"]:
        raise ValueError("history: the model has no experts")
    panels = figure.subplots(2, 1, sharex=True, sharey=True)
    for axes, record, label in zip(panels, (looks[0], looks[-1]), ("before", "after"), strict=True):
        even = [[load / (sum(layer) / len(layer) or 1.0) for load in layer] for layer in record["load"]]
        image = axes.imshow(even, cmap="RdBu_r", vmin=0.0, vmax=2.0, aspect="auto")
        busiest = max(map(max, even))
        axes.set_title(f"Expert load {label} training (busiest {busiest:.1f}× even)")
        axes.set_yticks(range(len(even)))
        axes.set_ylabel("MoE layer")
        axes.set_xticks(range(0, len(even[0]), max(1, len(even[0]) // 16)))
        axes.grid(False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    panels[-1].set_xlabel("expert")
    bar = figure.colorbar(image, ax=panels, extend="max", shrink=0.9)
    bar.outline.set_visible(False)
    bar.set_label("load, 1 = even")


def smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average over about a thirtieth of the run, corrected for the bias at its beginning."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    mean, weight, result = 0.0, 0.0, []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        result.append(mean / weight)
    return result


@contextmanager
def drawing(path: str | Path, width: float, height: float) -> Iterator[Any]:
    """A figure that is written to ``path`` at the end of the block; opens no window and changes no global state of
    pyplot."""
    require_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", edgecolor="#d1d5db", linewidth=1.5)
        FigureCanvasAgg(figure)
        yield figure
        with writing(path):
            figure.savefig(path, dpi=160, edgecolor=figure.get_edgecolor())
