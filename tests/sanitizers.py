"""compute-sanitizer's four tools over every kernel of tests/sanitize.py: ``make sanitize``.

Kernels go to several processes at a time in batches, those in CUDA C++ first; first under memcheck, which finds them
compiled by nobody, then under the other tools. A report counts for
the kernel that ran when it came (each ends with a synchronisation), which runs once more in a process of its own. What
initcheck reports there runs in memory that is full of NaN, as the tool does not see what the copy engine writes. A
process that has not ended a kernel in time is killed, and another one goes on behind it. Outcomes go to
docs/sanitize.json, over those of the same kernels that are there; ``--table`` makes the table of docs/trust.md of them.
Whole outputs go to ``--logs``.

    python tests/sanitizers.py --jobs 12 --seconds 180          all of it, ending by then
    python tests/sanitizers.py mla_decode --tools memcheck      what has the text in its name
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
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS, PAGE = ROOT / "docs" / "sanitize.json", ROOT / "docs" / "trust.md"
BEGIN, END = "<!-- made by tests/sanitizers.py -->", "<!-- /made -->"
TOOLS = {
    "memcheck": (),
    "racecheck": ("--racecheck-report", "analysis"),
    "synccheck": (),
    "initcheck": (),
}
REPORT = re.compile(r"=+ +(Error|Invalid|Uninitialized|Barrier|Misaligned|Program hit|Warning|Race|Host API)\b.*")
RIGHT, WRONG, REPORTED, LATE, NOT_RUN = "right", "wrong", "reported", "not in time", "not run"
NOT_TAKEN, FILLED, ONCE = "not taken", "right in filled memory", "reported beside others, not alone"
CELLS = {RIGHT: "clean", FILLED: "clean, filled"}


class Batch(NamedTuple):
    """Kernels for one process; how soon it is its turn; of a single kernel, what was reported of it beside others.

    The tools of `then` get them once they are compiled.
    """

    tool: str
    names: list[str]
    turn: int = 0
    then: tuple[str, ...] = ()
    filled: bool = False
    reported: dict[str, int] | None = None


class Run:
    """All batches of all tools, worked off by several processes at a time until a deadline."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.end = time.monotonic() + asked.seconds
        self.outcomes: dict[tuple[str, str], dict] = {}  # of (tool, kernel)
        self.waiting: list[Batch] = []
        self.lock, self.running = threading.Condition(), 0
        asked.logs.mkdir(parents=True, exist_ok=True)
        self.logs = 0

    def work(self, batches: list[Batch]) -> None:
        """Run these."""
        self.waiting = batches
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
                batch = min(self.waiting, key=lambda batch: batch.turn)
                self.waiting.remove(batch)
                self.running += 1
            again: list[Batch] = []
            try:
                again = self._judged(batch)
            finally:
                with self.lock:
                    self.running -= 1
                    self.waiting = again + self.waiting
                    self.lock.notify_all()

    def _judged(self, batch: Batch) -> list[Batch]:
        """Run one process; what is to be run after it."""
        tool, names, filled = batch.tool, batch.names, batch.filled
        process = Process(self, batch)
        process.run()
        reported = [name for name in names if process.reports[name]]
        for name, outcome in process.ended.items():
            if name not in reported:
                if outcome["outcome"] == RIGHT and batch.reported:
                    outcome = {**outcome, "outcome": FILLED if filled else ONCE, "reports": batch.reported}
                self._keep(tool, name, outcome)
        stopped = process.running
        rest = [name for name in names if name not in process.ended and name != stopped]
        again = [batch._replace(names=rest)] if rest and process.status != NOT_RUN else []
        taken = [n for n in names if n not in rest and process.ended.get(n, {}).get("outcome") != NOT_TAKEN]
        again += [Batch(then, taken, batch.turn + (batch.turn > 1)) for then in batch.then if taken]
        if len(names) > 1:
            alone = [*reported, *([stopped] if stopped and stopped not in reported else [])]
            if process.status == LATE and stopped:
                self._keep(tool, stopped, {"outcome": LATE})
                alone.remove(stopped)
            single = batch._replace(then=())
            return [*(single._replace(names=[n], reported=dict(process.reports[n])) for n in alone), *again]
        if tool == "initcheck" and reported and not filled:
            self._keep(tool, names[0], {"outcome": REPORTED, "reports": dict(process.reports[names[0]])})
            return [batch._replace(filled=True, reported=dict(process.reports[names[0]]))]
        if reported:
            self._keep(tool, names[0], {"outcome": REPORTED, "reports": dict(process.reports[names[0]])})
        elif (stopped or rest) and process.status != NOT_RUN:
            late = process.status == LATE
            self._keep(tool, names[0], {"outcome": LATE if late else WRONG, "status": process.status})
        return [one for one in again if one.tool != tool]

    def _keep(self, tool: str, name: str, outcome: dict) -> None:
        with self.lock:
            self.outcomes[tool, name] = outcome

    def log(self, tool: str) -> Path:
        """A file for the next process."""
        with self.lock:
            self.logs += 1
            return self.asked.logs / f"{tool}_{self.logs:03d}.txt"


class Process:
    """One process under a tool: which kernels came to their end, which one it stopped in, what was reported of each."""

    def __init__(self, run: Run, batch: Batch) -> None:
        self.owner, self.batch = run, batch
        self.ended: dict[str, dict] = {}
        self.reports: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.running: str | None = None
        self.status = ""

    def run(self) -> None:
        """Until it ends, or time is up."""
        asked = self.owner.asked
        lines, process = self._started()
        limit = time.monotonic() + asked.start
        with self.owner.log(self.batch.tool).open("w") as log:
            while True:
                try:
                    line = lines.get(timeout=max(min(limit, self.owner.end) - time.monotonic(), 0.01))
                except queue.Empty:
                    self.status = LATE if time.monotonic() < self.owner.end else NOT_RUN
                    os.killpg(process.pid, 9)
                    break
                if line is None:
                    break
                log.write(line)
                self._read(line)
                if line.startswith("begin "):
                    limit = time.monotonic() + asked.each
        code = process.wait()
        self.status = self.status or ("clean" if code == 0 else f"exit code {code}")

    def _started(self) -> tuple[queue.Queue[str | None], subprocess.Popen]:
        tool, names, filled = self.batch.tool, self.batch.names, self.batch.filled
        command = [sys.executable, str(HERE / "sanitize.py"), "--exact", *names]
        command += ["--racecheck"] * (tool == "racecheck") + ["--filled"] * filled
        options = ["--tool", tool, *TOOLS[tool], "--print-limit", "30", "--error-exitcode", "9"]
        options += ["--show-backtrace", "no"]  # of the host, which takes a minute for 30 reports
        command = ["compute-sanitizer", *options, *command]
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        lines: queue.Queue[str | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        return lines, process

    def _read(self, line: str) -> None:
        if line.startswith("begin "):
            self.running = line[6:].rstrip("\n")
        elif found := re.match(rf"(.*): ({RIGHT}|{NOT_TAKEN}), ([\d.]+) s$", line):
            self.ended[found[1]] = {"outcome": found[2], "seconds": float(found[3])}
            self.running = None
        elif found := REPORT.match(line):
            name = self.running or [self.batch.names[0], *self.ended][-1]
            self.reports[name][re.sub(r"0x[0-9a-f]+|\d+", "#", found[0].lstrip("= ").strip())[:120]] += 1


def batches(tools: list[str], names: list[str], size: int, done: set[tuple[str, str]]) -> list[Batch]:
    """Kernels of a kind go to processes in turn; those in CUDA C++ first, of the portable ones the other tools last."""
    kinds: dict[tuple[int, tuple[str, ...]], list[str]] = defaultdict(list)
    for name in names:
        left = tuple(tool for tool in tools if (tool, name) not in done)
        if left:
            kinds[("", "hopper", "triton").index(name.partition(": ")[0] if ": " in name else ""), left].append(name)
    made = []
    for (turn, left), of_kind in sorted(kinds.items()):
        n = -(-len(of_kind) // size)
        made += [Batch(left[0], of_kind[i::n], turn, left[1:]) for i in range(n)]
    return made


def listed() -> list[str]:
    """The kernels' names."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{HERE}"}
    command = [sys.executable, str(HERE / "sanitize.py"), "--list"]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.splitlines()


def said(*command: str) -> str:
    """What a command writes."""
    return subprocess.run(command, capture_output=True, text=True).stdout


def saved(rows: list[dict], names: list[str], device: str, version: str) -> dict:
    """Outcomes, over those that were saved of kernels that there still are."""
    before = json.loads(RESULTS.read_text())["outcomes"] if RESULTS.exists() else []
    kept = {(row["tool"], row["kernel"]): row for row in before if row["kernel"] in names}
    kept |= {(row["tool"], row["kernel"]): row for row in rows if row["outcome"] != NOT_RUN}
    return {"device": device, "tool": f"compute-sanitizer {version}", "outcomes": list(kept.values())}


def table(results: dict) -> str:
    """A row for each kernel in CUDA C++ and one for each operation's portable kernels, a column for each tool."""
    rows: dict[str, dict[str, list[str]]] = {}
    for row in results["outcomes"]:
        name = row["kernel"]
        parts = name.split(": ", 1)
        if len(parts) == 2:
            name = f"{parts[1].split(', ')[0]}, cases of parity, {parts[0]}"
        rows.setdefault(name, {}).setdefault(row["tool"], []).append(CELLS.get(row["outcome"], row["outcome"]))
    commits = Counter(row.get("commit", "") for row in results["outcomes"])
    lines = [f"{results['device']}, {results['tool']}; of {', '.join(c for c in commits if c)}.", ""]
    lines += ["| kernel | " + " | ".join(TOOLS) + " |", "|---|" + "---|" * len(TOOLS)]
    for name, cells in sorted(rows.items(), key=lambda row: (", cases of parity, " in row[0], row[0])):
        texts = []
        for tool in TOOLS:
            counts = Counter(cells.get(tool, [NOT_RUN]))
            texts.append(", ".join(f"{n} {text}" if sum(counts.values()) > 1 else text for text, n in counts.items()))
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def write(results: dict) -> None:
    """Put the table into its page."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n\n{table(results)}\n\n{END}{rest.partition(END)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", default=[""], help="run kernels whose name contains one of these")
    parser.add_argument("--without", nargs="*", default=[], help="leave out kernels whose name contains one of these")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--left", action="store_true", help="leave out what is saved as clean")
    parser.add_argument("--again", nargs="*", default=[], help="but for kernels whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes at a time")
    parser.add_argument("--size", type=int, default=6, help="kernels of a process")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything")
    parser.add_argument("--each", type=float, default=60, help="seconds for a kernel")
    parser.add_argument("--start", type=float, default=90, help="seconds until the first kernel begins")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "sanitize")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="put what was saved into the page")
    asked = parser.parse_args()
    if asked.table:
        return write(json.loads(RESULTS.read_text()))
    names = [n for n in listed() if any(t in n for t in asked.text) and not any(t in n for t in asked.without)]
    run, start = Run(asked), time.monotonic()
    before = json.loads(RESULTS.read_text())["outcomes"] if asked.left and RESULTS.exists() else []
    done = {(row["tool"], row["kernel"]) for row in before if row["outcome"] in (RIGHT, FILLED)}
    done = {(tool, name) for tool, name in done if not any(text in name for text in asked.again)}
    run.work(batches(asked.tools, names, asked.size, done))
    print(f"all: {time.monotonic() - start:.0f} s")
    not_taken = [n for (_, n), outcome in run.outcomes.items() if outcome["outcome"] == NOT_TAKEN]
    rows = [
        {
            "tool": tool,
            "kernel": name,
            "commit": os.environ.get("COMMIT", ""),
            **run.outcomes.get((tool, name), {"outcome": NOT_RUN}),
        }
        for tool in asked.tools
        for name in names
        if name not in not_taken and (tool, name) not in done
    ]
    bad = [row for row in rows if row["outcome"] not in (RIGHT, FILLED)]
    for row in bad:
        print(f"{row['tool']:10} {row['outcome']:12} {row['kernel']}  {row.get('reports') or row.get('status', '')}")
    print(f"{len(not_taken)} not taken")
    for tool in asked.tools:
        print(tool, dict(Counter(row["outcome"] for row in rows if row["tool"] == tool)))
    gpus = said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    versions = re.findall(r"\d{4}\.[\d.]+", said("compute-sanitizer", "--version"))
    asked.out.write_text(json.dumps(saved(rows, listed(), (gpus or ["?"])[0], (versions or ["?"])[0]), indent=1) + "\n")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
