"""What runs of soak.py have written, put together: docs/soak.json, a table in docs/trust.md, docs/images/soak.svg."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS, PAGE, PICTURE = DOCS / "soak.json", DOCS / "trust.md", DOCS / "images" / "soak.svg"
BEGIN, END = "<!-- made by tests/soak.py -->", "<!-- /soak -->"
WAYS = {  # as soak_ways.py calls them
    "plain": "as they are",
    "explained": "after `explain`",
    "freed": "in memory that was freed and full of NaN",
    "inference": "in inference mode",
    "without_gradient": "without gradients, and with them again",
    "toggled": "gradients asked for and not",
    "streams": "on other streams",
    "changed": "other numbers in the same places",
    "other_dtype": "another dtype between",
    "copied": "with deep copies",
    "failing": "no memory in the middle",
    "threads": "by threads at once",
    "captured": "in CUDA graphs",
    "elsewhere": "on each GPU while each is the current one",
    "everywhere_at_once": "by threads on all GPUs",
}
# What a process did, with the colour of its line in the picture.
KINDS = {"operations, and generation with a model": "#2563eb", "operations alone (--ways, --only)": "#d97706"}
SLACK = {"allocated": 1 << 20, "host": 64 << 20}  # bytes that allocators may keep; of the host's little goes back


def memory(run: dict[str, Any]) -> tuple[str, list[int]]:
    """What is looked at: allocated on a GPU, resident on the CPU."""
    kind = "host" if run["device"] == "CPU" else "allocated"
    return kind, [row[kind] for row in run["rounds"]]


def grown(run: dict[str, Any]) -> int:
    """By how many bytes the last quarter of the rounds stands above the second, at least."""
    _, sizes = memory(run)
    if not sizes:
        return 0
    quarter = max(len(sizes) // 4, 1)
    return min(sizes[-quarter:]) - max(sizes[quarter : 2 * quarter] or sizes[:1])


def leaks(run: dict[str, Any]) -> bool:
    """Whether that is more than allocators may keep; of a few rounds nothing can be said."""
    return len(run["rounds"]) >= 8 and grown(run) > SLACK[memory(run)[0]]


def merge(files: list[Path]) -> None:
    """Put these runs beside those that were saved, each seed of a commit once, and make table and picture."""
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    runs = {(run["commit"], run["seed"]): run for run in [*saved, *(json.loads(file.read_text()) for file in files)]}
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(run) for run in runs.values()) + "\n]\n")
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table([*runs.values()])}\n\n{END}{rest.partition(END)[2]}")
    draw([*runs.values()])


def table(runs: list[dict[str, Any]]) -> str:
    """All runs together."""
    devices = ", ".join(sorted({run["device"] for run in runs}))
    commits = ", ".join(dict.fromkeys(run["commit"] for run in runs if run["commit"]))
    calls: Counter[tuple[str, str]] = Counter()
    loads: Counter[str] = Counter()
    ways: Counter[str] = Counter()
    for run in runs:
        ways.update(run.get("ways", {}))
        loads.update(run["generation"])
        calls.update({(impl, how): n for impl, ways in run["operations"].items() for how, n in ways.items()})
    minutes = sum(run["minutes"] for run in runs)
    lines = [f"{devices}; {len(runs)} processes, {minutes:.1f} minutes of them together; {commits}.", ""]
    lines += ["| what | how many |", "|---|---|"]
    for (impl, how), n in sorted(calls.items()):
        how = "not for this implementation" if how == "refused" else how
        lines.append(f"| operations by `{impl}`: {how} | {n:,} |")
    lines += [f"| calls made again: {WAYS[way]} | {n:,} |" for way, n in sorted(ways.items())]
    lines += [f"| generation: {what} | {n:,} |" for what, n in sorted(loads.items())]
    lines.append(f"| failures | {sum(len(run['failures']) for run in runs)} |")
    leaking = sum(map(leaks, runs))
    most = max((grown(run) for run in runs), default=0)
    lines.append(f"| processes whose memory grew by more than 1 MiB | {leaking} (the most: {most / 2**20:.2f} MiB) |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]]) -> None:
    """Memory in use after each round, a line for each process; a model stays in memory between rounds."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    style = importlib.import_module("dskernels.model.plot").STYLE
    with pyplot.rc_context({**style, "svg.hashsalt": "soak"}):
        figure, axes = pyplot.subplots(figsize=(7, 2.6))
        for (kind, color), with_model in zip(KINDS.items(), (True, False), strict=True):
            chosen = [run for run in runs if bool(run["generation"]) == with_model]
            for i, run in enumerate(chosen):
                seconds, sizes = [row["seconds"] for row in run["rounds"]], [x / 2**20 for x in memory(run)[1]]
                label = f"{kind}: {len(chosen)} processes" if i == 0 else None
                axes.plot(seconds, sizes, "o-", color=color, lw=1, ms=2.5, alpha=0.6, label=label)
        axes.set_xlabel("seconds since a process began, a dot after each round")
        axes.set_ylabel("MiB allocated")
        top = 1.3 * axes.get_ylim()[1]
        axes.set_ylim(-0.05 * top, top)  # so that lines at 0 are seen
        axes.set_xlim(left=0)
        axes.legend(loc="center")
        figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
