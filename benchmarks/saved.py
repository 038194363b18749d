"""Saved results: found by a path, by the name of a GPU, or as a commit had them.

Nothing here needs torch: reports and comparisons can be made on any machine.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"

# Eager PyTorch counts as a rival if it calls one tuned product, not if it is a chain of elementwise kernels.
PRODUCTS = ("fp8_gemm", "fp8_linear", "grouped_gemm")
SWEEPS = "scaling"  # a family that exists for its curves; some of its jobs also belong to other families
OURS_WITHOUT = ("plain", "uncached", "unshared")  # dskernels itself, without the feature that the row is about
LABELS = {
    "torch": "eager torch",
    "torch_compile": "torch.compile",
    "torch_compile_graph": "torch.compile, as a graph",
    "cublaslt": "cuBLASLt",
    "cudnn": "cuDNN",
    "grouped_mm": "grouped_mm bf16",  # torch's
    "deepgemm": "DeepGEMM",
    "flashmla": "FlashMLA",
    "flashinfer": "FlashInfer",
    "vllm": "vLLM",
    "nccl": "NCCL",
    **{name: f"ours, {name}" for name in OURS_WITHOUT},
}


@dataclass(frozen=True)
class SavedRow:
    """One line of a saved file; fields that an older file lacks are None.

    `rounds`, if ours and the peers ran in turns, says how many times as fast as the fastest peer ours was: the median
    over the rounds, and the values below which 20% and 80% of the rounds were.
    """

    op: str
    workload: str
    impl: str
    us: float
    p20: float
    p80: float
    tflops: float | None
    gbs: float
    roof_pct: float
    peers: Mapping[str, float] = field(default_factory=dict)
    host_us: float | None = None
    drift: float | None = None
    rounds: tuple[float, float, float] | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the same job in another file, whichever implementation did it."""
        return self.op, self.workload

    @property
    def title(self) -> str:
        """The job in words."""
        return f"{self.op} {self.workload}"

    @property
    def roof_us(self) -> float:
        """The time of the job at the roof that limits it."""
        return self.roof_pct / 100 * self.us

    @property
    def best_peer(self) -> str | None:
        """The fastest peer."""
        return min(self.peers, key=self.peers.__getitem__, default=None)

    def times_as_fast(self, peer: str) -> float:
        """How many times as fast as a peer: the median of the rounds, if the two ran in turns."""
        if self.rounds is not None and peer == self.best_peer:
            return self.rounds[0]
        return self.peers[peer] / self.us

    @property
    def vs_best_peer(self) -> float | None:
        """How many times as fast as the fastest peer."""
        return None if self.best_peer is None else self.times_as_fast(self.best_peer)

    @property
    def rival(self) -> str | None:
        """The fastest peer that is somebody else's tuned kernel."""
        names = [n for n in self.peers if n not in OURS_WITHOUT and (n != "torch" or self.op.startswith(PRODUCTS))]
        return min(names, key=self.peers.__getitem__, default=None)

    @property
    def vs_rival(self) -> float | None:
        """How many times as fast as the rival."""
        return None if self.rival is None else self.times_as_fast(self.rival)

    def label(self, peer: str) -> str:
        """The name of a peer in words: eager PyTorch's matrix products are cuBLAS in bf16."""
        return "torch bf16" if peer == "torch" and self.op.startswith(PRODUCTS) else LABELS.get(peer, peer)


@dataclass(frozen=True)
class Saved:
    """The results of one family on one machine, and the conditions they were taken under."""

    family: str
    stamp: Mapping[str, Any]
    roofs: Mapping[str, float | None]
    rows: tuple[SavedRow, ...]

    @classmethod
    def of(cls, family: str, document: Mapping[str, Any]) -> Saved:
        """From the content of a file."""
        stamp = {name: value for name, value in document.items() if name not in ("rows", "roofs")}
        known = SavedRow.__dataclass_fields__
        rows = ({name: value for name, value in row.items() if name in known} for row in document["rows"])
        return cls(family, stamp, document["roofs"], tuple(SavedRow(**row) for row in rows))


class NotThere(Exception):  # noqa: N818 - said to whoever asked, not an error of the program
    """There are no such results; the message says where they were looked for."""


def read(where: str, folder: Path = FOLDER) -> dict[str, Saved]:
    """Read the saved families of a place.

    Args:
        where: a file, a folder of files, the short name of a GPU (``h100``: that folder of the saved results), or
            any of these as a commit had it, after the commit and a colon: ``HEAD~3:h100``.
        folder: where the folders of the GPUs are.
    """
    if ":" in where:
        commit, _, place = where.partition(":")
        return _of_commit(commit, place, folder)
    path = _place(where, folder)
    files = [path] if path.is_file() else sorted(path.glob("*.json"))
    found = {file.stem: _parse(file.stem, file.read_text(encoding="utf-8"), str(file)) for file in files}
    if not found:
        raise NotThere(f"no results at {where}; saved are those of {', '.join(gpus(folder)) or 'no GPU'}")
    return found


def gpus(folder: Path = FOLDER) -> list[str]:
    """The GPUs that have results."""
    return sorted({file.parent.name for file in folder.glob("*/*.json")})


def everything(folder: Path = FOLDER) -> dict[str, dict[str, Saved]]:
    """All families of each GPU, the one measured last first."""
    found = {gpu: read(gpu, folder) for gpu in gpus(folder)}
    last = {gpu: max(family.stamp["date"] for family in families.values()) for gpu, families in found.items()}
    return {gpu: found[gpu] for gpu in sorted(found, key=last.__getitem__, reverse=True)}


def _place(where: str, folder: Path) -> Path:
    return folder / where if (folder / where).is_dir() else Path(where)


def _of_commit(commit: str, where: str, folder: Path) -> dict[str, Saved]:
    path = _place(where, folder).resolve()
    directory = next(parent for parent in (path, *path.parents) if parent.is_dir())
    listed = _git(directory, "ls-tree", "--name-only", "--full-name", "-r", commit, "--", str(path))
    files = [line for line in listed.splitlines() if line.endswith(".json")]
    if not files:
        raise NotThere(f"no results at {where} in {commit}")
    return {
        Path(name).stem: _parse(Path(name).stem, _git(directory, "show", f"{commit}:{name}"), name) for name in files
    }


def _git(directory: Path, *arguments: str) -> str:
    command = ("git", "-C", str(directory), *arguments)
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise NotThere((answer.stderr.strip().splitlines() or ["git failed"])[-1])
    return answer.stdout


def _parse(family: str, text: str, where: str) -> Saved:
    try:
        return Saved.of(family, json.loads(text))
    except (ValueError, KeyError, TypeError) as error:
        raise NotThere(f"{where} is not a file of results: {error}") from error


def jobs(families: Mapping[str, Saved]) -> list[SavedRow]:
    """One row for each job, the fastest if several implementations did it; without the jobs of sweeps."""
    found: dict[tuple[str, str], SavedRow] = {}
    for family in families.values():
        for row in family.rows if family.family != SWEEPS else ():
            if row.key not in found or row.us < found[row.key].us:
                found[row.key] = row
    return list(found.values())


def by_key(saved: Iterable[Saved]) -> dict[tuple[str, str], list[SavedRow]]:
    """The rows of each job: several if several implementations did it."""
    found: dict[tuple[str, str], list[SavedRow]] = {}
    for family in saved:
        for row in family.rows:
            found.setdefault(row.key, []).append(row)
    return found
