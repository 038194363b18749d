"""The results of a run: rows, the table on the screen, and the JSON file of a GPU and family."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.roofline import Chain, Roofs, Work
from benchmarks.saved import FOLDER, SavedRow
from benchmarks.timing import Times

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Row(SavedRow):
    """One implementation on one workload, and its peers there, in microseconds, as it was just timed."""

    @classmethod
    def of(
        cls,
        op: str,
        workload: str,
        impl: str,
        times: Times,
        work: Work | Chain,
        roofs: Roofs,
        peers: dict[str, float],
        host_us: float | None = None,
        rounds: tuple[float, float, float] | None = None,
    ) -> Row:
        """Rates and shares from measured times."""
        return cls(
            op=op,
            workload=workload,
            impl=impl,
            us=times.us,
            p20=times.p20,
            p80=times.p80,
            tflops=work.tflops(times.us),
            gbs=work.gbs(times.us),
            roof_pct=100 * roofs.floor_us(work) / times.us,
            peers=peers,
            host_us=host_us,
            drift=times.drift,
            rounds=rounds,
        )

    def to_json(self) -> dict[str, Any]:
        """The row as the file has it; `rounds` and `host_us` only if they were measured."""
        row: dict[str, Any] = {
            "op": self.op,
            "workload": self.workload,
            "impl": self.impl,
            "us": rounded(self.us),
            "p20": rounded(self.p20),
            "p80": rounded(self.p80),
            "tflops": rounded(self.tflops),
            "gbs": rounded(self.gbs),
            "roof_pct": rounded(self.roof_pct),
            "peers": {name: rounded(us) for name, us in self.peers.items()},
            "vs_best_peer": rounded(self.vs_best_peer),
            "drift": rounded(self.drift),
        }
        if self.rounds is not None:
            row["rounds"] = [rounded(ratio) for ratio in self.rounds]
        if self.host_us is not None:
            row["host_us"] = rounded(self.host_us)
        return row


@dataclass(frozen=True)
class Failure:
    """A case that raised, or whose result was wrong, and so was not timed."""

    op: str
    workload: str
    impl: str
    reason: str


@dataclass(frozen=True)
class Machine:
    """Where the numbers were taken."""

    gpu: str
    driver: str
    torch: str
    triton: str
    cuda: str
    commit: str
    python: str = "unknown"
    cupy: str = "unknown"
    host: str = "unknown"
    power_limit_w: float | None = None

    @classmethod
    def current(cls) -> Machine:
        """The current CUDA device and the installed versions."""
        import torch
        import triton

        return cls(
            gpu=torch.cuda.get_device_name(),
            driver=_ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            torch=torch.__version__,
            triton=triton.__version__,
            cuda=torch.version.cuda or "unknown",
            commit=_ask("git", "-C", str(ROOT), "describe", "--always", "--dirty"),
            python=platform.python_version(),
            cupy=_version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
            host=_processor(),
            power_limit_w=_number(_ask("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits")),
        )

    @property
    def folder(self) -> str:
        """Short name of the GPU: ``NVIDIA H100 80GB HBM3`` is ``h100``, ``NVIDIA GeForce RTX 4090`` is ``rtx4090``."""
        return gpu_folder(self.gpu)


def gpu_folder(gpu: str) -> str:
    """Short name of a GPU: its name without maker, family, memory and form factor; a slice of one is marked as such."""
    words = re.split(r"[\s\-_/]+", gpu.lower())
    dull = {"nvidia", "amd", "tesla", "geforce", "quadro", "instinct", "radeon", "graphics", "generation"}
    kept = []
    for word in words:
        if re.fullmatch(r"\d+(gb|mb)|sxm\d*|pcie|nvl|hbm\d*e?|mig", word):
            break
        if word not in dull:
            kept.append(word)
    return ("".join(kept) or "gpu") + ("_mig" if "mig" in words else "")


def document(
    machine: Machine,
    roofs: Roofs | None,
    rows: list[Row],
    date: str | None = None,
    *,
    clocks: Mapping[str, float | None] | None = None,
) -> dict[str, Any]:
    """What the JSON file of one family holds.

    Args:
        machine: that it was measured on.
        roofs: of that machine in that run, None where the rows have another.
        rows: what was measured.
        date: when, now by default.
        clocks: how steady the machine was, where that was looked at.
    """
    steadiness = {} if clocks is None else {"clocks": {name: rounded(value) for name, value in clocks.items()}}
    return {
        **asdict(machine),
        "date": date or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "roofs": {} if roofs is None else {name: rounded(value) for name, value in asdict(roofs).items()},
        **steadiness,
        "rows": [row.to_json() for row in rows],
    }


def save(
    family: str,
    machine: Machine,
    roofs: Roofs,
    rows: list[Row],
    *,
    folder: Path | None = None,
    clocks: Mapping[str, float | None] | None = None,
) -> Path:
    """Write ``<gpu>/<family>.json`` into `folder`, that of the saved results if None, and return its path."""
    path = (folder or FOLDER) / machine.folder / f"{family}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(machine, roofs, rows, clocks=clocks), indent=1) + "\n", encoding="utf-8")
    return path


def draw(family: str, outcomes: list[Row | Failure], *, host: bool = False) -> Table:
    """One line for each row or failure."""
    table = Table(title=family, title_justify="left", title_style="bold")
    for heading in ("op", "workload", "impl"):
        table.add_column(heading, no_wrap=True)
    for heading in ("µs", "p20–p80", "TFLOP/s", "GB/s", "% roof"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("× best peer", no_wrap=True)
    if host:
        table.add_column("host µs", justify="right", no_wrap=True)
    for outcome in outcomes:
        if isinstance(outcome, Failure):
            table.add_row(
                outcome.op, outcome.workload, outcome.impl, "[red]failed[/red]", "", "", "", "", "", style="dim"
            )
            continue
        cells = [
            outcome.op,
            outcome.workload,
            outcome.impl,
            _cell(outcome.us, 1),
            f"{_cell(outcome.p20, 1)}–{_cell(outcome.p80, 1)}",
            _cell(outcome.tflops, 0),
            _cell(outcome.gbs, 0),
            _cell(outcome.roof_pct, 0),
            "–" if outcome.vs_best_peer is None else f"{outcome.vs_best_peer:.2f} {outcome.best_peer}",
        ]
        if host:
            cells.append(_cell(outcome.host_us, 1))
        table.add_row(*cells)
    return table


def rounded(value: float | None) -> float | None:
    """To four significant digits, which is more than a clock that drifts by percents can tell."""
    return None if value is None else float(f"{value:.4g}")


def _cell(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _ask(*command: str) -> str:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return (answer.stdout.splitlines() or ["unknown"])[0].strip()


def _version(*distributions: str) -> str:
    """The version of the first of these that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "not installed"


def _processor() -> str:
    """What the host calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "unknown"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
