"""The error of each operation against fp64, beside torch's own: ``python -m benchmarks.numerics``.

Every operation on seeded data of several sizes and kinds, by each implementation that runs on the device, against the
loops of `exact.py`. Two numbers for each: the largest error over the largest magnitude, and the root of the mean square
of the error over that of the result; the worst of all seeds and sizes is kept. For data with NaN and infinities it is
counted where a result is finite although the exact one is not ("lost"), or the reverse ("stray").

Results are kept in docs/numerics.json, a column of implementations for each device, from which docs/numerics.md (below
its marker) and docs/images/numerics.svg are made. ``--table`` makes these only.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from benchmarks import exact
from benchmarks.numerics_composed import COMPOSED
from benchmarks.numerics_probes import PROBES as SINGLE
from benchmarks.numerics_probes import Probe

ROOT = Path(__file__).parent.parent
RESULTS, PAGE, PICTURE = (ROOT / "docs" / name for name in ("numerics.json", "numerics.md", "images/numerics.svg"))
PROBES = SINGLE + COMPOSED
MARKER = "<!-- made by python -m benchmarks.numerics; do not edit below -->"
KINDS = {
    "normal": "normal numbers",
    "range": "magnitudes over eight decades, column by column",
    "subnormal": "numbers around the least normal one of their type",
    "equal": "one number everywhere",
    "outlier": "normal numbers, and one of 1,000 in each 128",
    "nan": "normal numbers, and a NaN",
    "inf": "normal numbers, and an infinity",
}


@dataclass(frozen=True)
class Errors:
    """What one implementation loses on one kind of data."""

    largest: float
    rms: float
    lost: int
    stray: int

    @classmethod
    def of(cls, got: Tensor, want: Tensor) -> Errors:
        """Of one result."""
        got, want = exact.exact(got), want.double()
        finite = want.isfinite()
        right = torch.where(finite, got.isfinite(), ~got.isfinite())
        lost, stray = int((~right & ~finite).sum()), int((~right & finite).sum())
        both = finite & got.isfinite()
        error, size = (got - want)[both].abs(), want[both].abs()
        if not error.numel() or float(size.max()) == 0.0:
            return cls(0.0 if not error.numel() or float(error.max()) == 0.0 else math.inf, 0.0, lost, stray)
        return cls(
            float(error.max() / size.max()),
            float(error.square().mean().sqrt() / size.square().mean().sqrt().clamp(min=1e-300)),
            lost,
            stray,
        )

    def worse(self, other: Errors) -> Errors:
        """The worse of each."""
        return Errors(
            max(self.largest, other.largest),
            max(self.rms, other.rms),
            max(self.lost, other.lost),
            max(self.stray, other.stray),
        )


def implementations(device: torch.device) -> list[str]:
    """Those that run here."""
    if device.type == "cpu":
        return ["reference"]
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    return ["reference", "triton", *(["hopper"] if hopper else [])]


def data(kind: str, seed: int) -> Callable[..., Tensor]:
    """A maker of tensors of a kind: ``make(*shape, dtype=..., scale=...)``; the first is of the kind, others normal."""
    generator = torch.Generator().manual_seed(seed)
    first = [True]

    def make(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0, plain: bool = False) -> Tensor:
        x = torch.randn(shape, generator=generator)
        if first[0] and not plain:
            first[0] = False
            x = _of_kind(kind, x, generator, dtype)
        return (x * scale).to(dtype)

    return make


def _of_kind(kind: str, x: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    flat = x.view(-1)
    place = int(torch.randint(flat.numel(), (1,), generator=generator))
    if kind == "range":
        return x * 10.0 ** (torch.rand(x.shape[-1:], generator=generator) * 8 - 4)
    if kind == "subnormal":
        return x * torch.finfo(dtype).tiny
    if kind == "equal":
        return torch.full_like(x, 0.37)
    if kind == "outlier":
        flat[::128] = 1000.0
    elif kind in ("nan", "inf"):
        flat[place] = float(kind)
    return x


def measure(probe: Probe, kind: str, seeds: int, device: torch.device) -> Iterator[tuple[str, Errors]]:
    """The errors of each implementation and peer, the worst of all seeds and sizes."""
    worst: dict[str, Errors] = {}
    for seed in range(seeds):
        for size in probe.sizes:
            inputs = probe.inputs(data(kind, seed), *size)
            wants = probe.exact(**inputs)
            there = _to(inputs, device)
            runs = {impl: functools.partial(probe.run, impl=impl) for impl in implementations(device)}
            if probe.peer is not None:
                runs["torch"] = functools.partial(probe.peer)
            for name, run in runs.items():
                try:
                    results = run(**there)
                except ValueError as error:
                    if "cannot run this" not in str(error):
                        raise
                    continue
                results = (
                    results
                    if isinstance(results, (tuple, list)) and not isinstance(results, ds.Fp8Tensor)
                    else [results]
                )
                for got, want in zip(results, wants, strict=True):
                    errors = Errors.of(got, want)
                    worst[name] = errors if name not in worst else worst[name].worse(errors)
    yield from worst.items()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Tensor, ds.Fp8Tensor)):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    return type(value)(*(_to(part, device) for part in value)) if hasattr(value, "_fields") else value


def run(device: torch.device, seeds: int, only: str) -> dict[str, Any]:
    """All probes on all kinds of data."""
    rows = []
    for probe in PROBES:
        for kind in KINDS:
            if only not in probe.name or kind in probe.without:
                continue
            for name, errors in measure(probe, kind, seeds, device):
                rows.append({"op": probe.name, "data": kind, "impl": name, **vars(errors)})
                print(f"{probe.name:28} {kind:10} {name:10} {errors.largest:9.2e} {errors.rms:9.2e} "
                      f"{errors.lost or '':>5} {errors.stray or '':>5}", flush=True)  # fmt: skip
    name = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return {"device": name, "torch": torch.__version__, "seeds": seeds, "rows": rows}


def write(results: dict[str, Any]) -> None:
    """The page's table and the picture, of all devices that were measured."""
    columns = [(device, impl) for device, one in results.items() for impl in _implementations(one["rows"])]
    lines = [MARKER, ""]
    for device, one in results.items():
        lines.append(f"{device}: torch {one['torch']}, {one['seeds']} seeds.")
    lines += ["", "| operation | data | " + " | ".join(f"{impl}, {device}" for device, impl in columns) + " |"]
    lines.append("|---|---|" + "---|" * len(columns))
    found = {(d, r["op"], r["data"], r["impl"]): r for d, one in results.items() for r in one["rows"]}
    for probe in PROBES:
        for kind in KINDS:
            cells = [_cell(found.get((device, probe.name, kind, impl))) for device, impl in columns]
            if any(cells):
                lines.append(f"| `{probe.name}` | {kind} | " + " | ".join(cells) + " |")
    head = PAGE.read_text().partition(MARKER)[0] if PAGE.exists() else "# Numbers\n\n"
    PAGE.write_text(head + "\n".join(lines) + "\n")
    draw(results)


def _implementations(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name in ("reference", "triton", "hopper", "torch") if any(r["impl"] == name for r in rows)]


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    text = f"{row['largest']:.1e}, {row['rms']:.1e}"
    if row["lost"]:
        text += f", {row['lost']} lost"
    return text + (f", {row['stray']} stray" if row["stray"] else "")


def draw(results: dict[str, Any]) -> None:
    """The rms error of each operation on finite data, one dot for each implementation and kind."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    style = importlib.import_module("dskernels.model.plot").STYLE
    colours = {"reference": "#111827", "triton": "#2563eb", "hopper": "#059669", "torch": "#d97706"}
    names = [probe.name for probe in PROBES]
    with pyplot.rc_context({**style, "svg.hashsalt": "numerics"}):
        figure, axes = pyplot.subplots(figsize=(8, 0.28 * len(names) + 1.2))
        for device, one in results.items():
            for impl in _implementations(one["rows"]):
                rows = [
                    r for r in one["rows"] if r["impl"] == impl and r["data"] not in ("nan", "inf") and r["rms"] > 0
                ]
                axes.scatter(
                    [r["rms"] for r in rows],
                    [names.index(r["op"]) for r in rows],
                    s=18,
                    alpha=0.7,
                    color=colours[impl],
                    marker="o" if device == "CPU" else "^",
                    label=f"{impl}, {device}",
                )
        axes.set_xscale("log")
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("root mean square of the error over that of the result, each kind of data a dot")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(colours), fontsize=8, frameon=False)
        PICTURE.parent.mkdir(exist_ok=True)
        figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="?", default="", help="operations whose name contains it; nothing is saved then")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="make page and picture of what was saved")
    asked = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not asked.table:
        one = run(torch.device(asked.device), asked.seeds, asked.only)
        results[one.pop("device")] = one
    if not asked.only:
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        write(results)


if __name__ == "__main__":
    main()
