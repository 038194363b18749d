"""compute-sanitizer's four tools over every kernel of tests/sanitize.py: ``make sanitize``.

Kernels are first run without a tool, so that they are compiled once and what is wrong by itself shows. Then each tool
gets them in batches, several processes at a time. One that reports anything is split, so that each report is of one
kernel; one that has not ended a kernel in time is killed, and goes on behind that kernel. Outcomes go to
docs/sanitize.json, from which ``--table`` makes the table of docs/trust.md; whole outputs to ``--logs``.

    python tests/sanitizers.py --jobs 12 --seconds 180          all of it, ending by then
    python tests/sanitizers.py mla_decode --tools memcheck      what has the text in its name; nothing is saved
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, PAGE = ROOT / "docs" / "sanitize.json", ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- made by tests/sanitizers.py -->", "<!-- /made -->"
TOOLS = {
    "none": (),
    "memcheck": (),
    "racecheck": ("--racecheck-report", "analysis"),
    "synccheck": (),
    "initcheck": (),
}
REPORT = re.compile(r"=+ +(Error|Invalid|Uninitialized|Barrier|Misaligned|Program hit|Warning|Race)\b.*")
RIGHT, WRONG, REPORTED, LATE, NOT_RUN = "right", "wrong", "reported", "not in time", "not run"


class Run:
    """All batches of all tools, worked off by several processes at a time until a deadline."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.end = time.monotonic() + asked.seconds
        self.outcomes: dict[tuple[str, str], dict] = {}  # of (tool, kernel)
        self.waiting: list[tuple[str, list[str]]] = []
        self.lock, self.running = threading.Condition(), 0
        asked.logs.mkdir(parents=True, exist_ok=True)
        self.logs = 0

    def work(self, tools: list[str], names: dict[str, list[str]], batch: int) -> None:
        """Run these tools over these kernels, the first batches of all tools before the second."""
        batches = {tool: [names[tool][i::batch] for i in range(batch)] for tool in tools}
        self.waiting = [(tool, batches[tool][i]) for i in range(batch) for tool in tools if batches[tool][i]]
        workers = [threading.Thread(target=self._worker) for _ in range(self.asked.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _worker(self) -> None:
        while True:
            with self.lock:
                while not self.waiting and self.running and time.monotonic() < self.end:
                    self.lock.wait(1)
                if not self.waiting or time.monotonic() >= self.end:
                    return
                tool, names = self.waiting.pop(0)
                self.running += 1
            try:
                again = self._batch(tool, names)
            finally:
                with self.lock:
                    self.running -= 1
                    self.lock.notify_all()
            with self.lock:
                self.waiting = again + self.waiting
                self.lock.notify_all()

    def _batch(self, tool: str, names: list[str]) -> list[tuple[str, list[str]]]:
        """Run one process; what is to be run again, and how."""
        seen, reports, status = self._process(tool, names)
        if status == "clean" or not reports:  # those that came to their end are clean
            self._keep(tool, seen)
        if status in ("clean", NOT_RUN):
            return []
        stopped = next((name for name in names if name not in seen), None)
        if len(names) == 1 or (stopped is not None and (status == LATE or not reports)):
            outcome = LATE if status == LATE else REPORTED if reports else WRONG
            self._keep(tool, {stopped or names[0]: {"outcome": outcome, "reports": dict(reports), "status": status}})
            names = [name for name in names if name != stopped]
        if len(names) == 1 and stopped is None:
            return []
        if reports or stopped is None:  # of one of them: each half again
            middle = (len(names) + 1) // 2
            return [(tool, half) for half in (names[:middle], names[middle:]) if half]
        rest = [name for name in names if name not in seen]
        return [(tool, rest)] if rest else []

    def _process(self, tool: str, names: list[str]) -> tuple[dict[str, dict], Counter[str], str]:
        command = [sys.executable, str(HERE / "sanitize.py"), "--exact", *names]
        command += ["--racecheck"] if tool == "racecheck" else []
        if tool != "none":
            options = ["--tool", tool, *TOOLS[tool], "--print-limit", "30", "--error-exitcode", "9"]
            command = ["compute-sanitizer", *options, *command]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=lambda: [*map(lines.put, process.stdout or ()), lines.put(None)], daemon=True).start()
        seen: dict[str, dict] = {}
        reports: Counter[str] = Counter()
        status, limit = "", time.monotonic() + self.asked.start
        with self.lock:
            self.logs += 1
            log = (self.asked.logs / f"{tool}_{self.logs:03d}.txt").open("w")
        with log:
            while True:
                try:
                    line = lines.get(timeout=max(min(limit, self.end) - time.monotonic(), 0.01))
                except queue.Empty:
                    status = LATE if time.monotonic() < self.end else NOT_RUN
                    os.killpg(process.pid, 9)
                    break
                if line is None:
                    break
                log.write(line)
                if line.startswith("begin "):
                    limit = time.monotonic() + self.asked.each
                elif found := re.match(r"(.*): right, ([\d.]+) s$", line):
                    seen[found[1]] = {"outcome": RIGHT, "seconds": float(found[2])}
                    limit = time.monotonic() + self.asked.start
                elif found := REPORT.match(line):
                    reports[re.sub(r"0x[0-9a-f]+|\d+", "#", found[0].lstrip("= ").strip())[:120]] += 1
        code = process.wait()
        status = status or ("clean" if code == 0 and not reports else f"exit code {code}")
        return seen, reports, status

    def _keep(self, tool: str, outcomes: dict[str, dict]) -> None:
        with self.lock:
            self.outcomes.update({(tool, name): outcome for name, outcome in outcomes.items()})


def listed(racecheck: bool) -> list[str]:
    """The kernels' names."""
    command = [sys.executable, str(HERE / "sanitize.py"), "--list", *(["--racecheck"] if racecheck else [])]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def said(*command: str) -> str:
    """What a command writes."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def table(results: dict) -> str:
    """A row for each kernel in CUDA C++ and one for each operation's portable kernels, a column for each tool."""
    rows: dict[str, dict[str, list[str]]] = {}
    for row in results["outcomes"]:
        name = row["kernel"]
        parts = name.split(": ", 1)
        if len(parts) == 2:
            name = f"{parts[1].split(', ')[0]}, cases of parity, {parts[0]}"
        rows.setdefault(name, {}).setdefault(row["tool"], []).append(_cell(row))
    tools = [tool for tool in TOOLS if tool != "none"]
    lines = [f"{results['device']}, {results['tool']}; {results['commit']}.", ""]
    lines += ["| kernel | " + " | ".join(tools) + " |", "|---|" + "---|" * len(tools)]
    for name, cells in rows.items():
        texts = []
        for tool in tools:
            counts = Counter(cells.get(tool, [NOT_RUN]))
            texts.append(", ".join(f"{n} {text}" if sum(counts.values()) > 1 else text for text, n in counts.items()))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _cell(row: dict) -> str:
    return "clean" if row["outcome"] == RIGHT else row["outcome"]


def write(results: dict) -> None:
    """Put the table into its page."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="", help="run kernels whose name contains it; nothing is saved then")
    parser.add_argument("--without", help="leave out kernels whose name contains it")
    parser.add_argument("--tools", nargs="+", default=[t for t in TOOLS if t != "none"], choices=TOOLS)
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes at a time")
    parser.add_argument("--batches", type=int, default=8, help="processes that a tool's kernels are divided among")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything")
    parser.add_argument("--each", type=float, default=120, help="seconds for a kernel")
    parser.add_argument("--start", type=float, default=120, help="seconds until the first kernel begins")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="put what was saved into the page")
    asked = parser.parse_args()
    if asked.table:
        return write(json.loads(RESULTS.read_text()))
    names = {tool: [n for n in listed(tool == "racecheck") if asked.text in n] for tool in ("none", *asked.tools)}
    if asked.without:
        names = {tool: [n for n in of_tool if asked.without not in n] for tool, of_tool in names.items()}
    run, start = Run(asked), time.monotonic()
    run.work(["none"], names, asked.batches)
    print(
        f"without a tool: {len(run.outcomes)} of {len(names['none'])} in {time.monotonic() - start:.0f} s", flush=True
    )
    run.work(asked.tools, names, asked.batches)
    print(f"all: {time.monotonic() - start:.0f} s")
    rows = [
        {"tool": tool, "kernel": name, **run.outcomes.get((tool, name), {"outcome": NOT_RUN})}
        for tool in ("none", *asked.tools)
        for name in names[tool]
    ]
    for row in rows:
        if row["outcome"] != RIGHT:
            print(
                f"{row['tool']:10} {row['outcome']:12} {row['kernel']}  {row.get('reports') or row.get('status', '')}"
            )
    for tool in ("none", *asked.tools):
        print(tool, dict(Counter(row["outcome"] for row in rows if row["tool"] == tool)))
    if not asked.text:
        gpus = said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
        versions = re.findall(r"\d{4}\.[\d.]+", said("compute-sanitizer", "--version"))
        results = {
            "device": (gpus or ["?"])[0],
            "tool": "compute-sanitizer " + (versions or ["?"])[0],
            "commit": os.environ.get("COMMIT", ""),
            "outcomes": rows,
        }
        asked.out.write_text(json.dumps(results, indent=1) + "\n")
    if any(row["outcome"] != RIGHT for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
