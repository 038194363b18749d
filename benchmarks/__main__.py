"""The command ``python -m benchmarks``."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

IMPLEMENTATIONS = ("hopper", "triton", "reference")
FAMILIES = (
    *("fp8", "gemm", "grouped_gemm", "routing", "moe", "mla", "loss"),
    *("model", "transformers", "training", "generation", "scaling"),
)
TABLE_WIDTH = 240  # of a log, which has no width of its own: no cell is cut short

EXAMPLES = """
Examples:

- `python -m benchmarks`: every family, a few minutes
- `python -m benchmarks gemm mla --save`: two families; their JSON goes to benchmarks/results/
- `python -m benchmarks --filter mla_decode --filter h128`: the cases whose title says both
- `python -m benchmarks gemm --impl triton --impl hopper --host`: two implementations, and what a call costs the host
- `python -m benchmarks gemm moe --host-only --save`: that alone, on a quiet machine, put into what is saved
- `python -m benchmarks --list`: what there is; needs no GPU
- `python -m benchmarks gemm --check`: fails if a figure fell by more than 5% against the saved results of this GPU
- `python -m benchmarks gemm --base HEAD~5`: the library of another commit beside this one
- `python -m benchmarks --compare h100 h200`: two sets of saved results, as ratios; needs no GPU
- `python -m benchmarks --compare HEAD~5:h200 h200`: saved results as a commit had them, beside today's
- `python -m benchmarks --report`: a page of all saved results, docs/report.html, and pictures; needs no GPU
"""

app = typer.Typer(rich_markup_mode="markdown", add_completion=False)


@app.command(epilog=EXAMPLES)
def main(
    families: Annotated[
        list[str] | None,
        typer.Argument(help=f"Families to run, of {', '.join(FAMILIES)}. All of them if none is named."),
    ] = None,
    save: Annotated[bool, typer.Option("--save", help="Write `benchmarks/results/<gpu>/<family>.json`.")] = False,
    impl: Annotated[
        list[str] | None,
        typer.Option(
            help="Run this implementation (hopper, triton, reference) in place of the chosen one. May be repeated."
        ),
    ] = None,
    filter_: Annotated[
        list[str] | None,
        typer.Option(
            "--filter", help="Only cases whose operation and workload contain this text. May be repeated: all must."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first workload of each operation, and fewer runs.")
    ] = False,
    host: Annotated[bool, typer.Option("--host", help="Also measure what a call costs on the host, in µs.")] = False,
    host_only: Annotated[
        bool,
        typer.Option(
            "--host-only",
            help="Measure nothing but what a call costs the host; with --save, put it into the saved results.",
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long to time each rival for.")] = 0.3,
    commit: Annotated[
        str | None, typer.Option(help="The commit to record, where only the files are and git cannot tell.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Fail if a figure fell by more than 5% against the saved results of this GPU: as a time, as a share "
            "of the roof and beside its peers, in three repetitions.",
        ),
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(help="Time the library of this commit, or of the checkout in this folder, before and after."),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Print the ratios of two saved results: files, folders, GPUs, or COMMIT: before any."),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Write a page of all saved results, and pictures, and stop.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Where --save writes to in place of benchmarks/results, and --report in place of docs."),
    ] = None,
) -> None:
    """Time dskernels' operations on the shapes of DeepSeek-V3, beside their peers.

    Each case is first checked against the reference; a wrong result is not timed. Times are of the device, with a
    cold L2: the median, and what 20% and 80% of the runs stayed below. "% roof" is the share of what this machine was
    just measured to reach, in copying or in matrix products, whichever binds. "× best peer" is how many times as fast
    as the fastest peer: above 1 is faster.

    Exits 1 if a case failed or, with --check, fell; where there is no GPU 1 with --check, --base and --save, else 0.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    unknown = sorted(set(families or ()) - set(FAMILIES))
    if unknown:
        raise typer.BadParameter(f"no family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    for name in impl or ():
        if name not in IMPLEMENTATIONS:
            raise typer.BadParameter(f"no implementation {name}; there are {', '.join(IMPLEMENTATIONS)}")
    if compare:
        return show_comparison(console, *compare, families or FAMILIES, filter_ or [])
    if report:
        return write_report(console, out)
    if save and (filter_ or quick) and out is None:
        raise typer.BadParameter("--save keeps whole families: leave out --filter and --quick, or say --out")
    chosen = select(families or FAMILIES, filter_ or [], quick=quick)
    if not any(chosen.values()):
        raise typer.BadParameter("no case matches")
    if list_:
        for family, cases in chosen.items():
            for case in cases:
                console.print(f"{family:13} {case.op:28} {case.workload.name}", highlight=False)
        return

    import torch

    if not torch.cuda.is_available():
        console.print("No GPU here: nothing to time. `python -m benchmarks --list` shows what there is.")
        if check or base or save:  # a gate that has looked at nothing is not passed
            raise typer.Exit(1)
        return
    seconds = min(seconds, 0.05) if quick else seconds
    if base:
        arguments = [*(families or FAMILIES), "--seconds", str(seconds)]
        arguments += [word for name in impl or () for word in ("--impl", name)]
        arguments += [word for text in filter_ or () for word in ("--filter", text)]
        return show_base(console, base, arguments + ["--quick"] * quick)

    if host_only:
        from benchmarks import host as alone

        if not alone.run(console, chosen, commit=commit, save=save, folder=out):
            raise typer.Exit(1)
        return

    from benchmarks.session import Session

    session = Session(console, impls=tuple(impl or (None,)), seconds=seconds, host=host, commit=commit)
    session.introduce()
    well = True
    for done in session.run(chosen):
        well &= not done.failures
        if check:
            well &= session.check(done)
        if save:
            session.save(done, out)
        console.print()
    if not well:
        raise typer.Exit(1)


def select(families, filters, *, quick: bool = False) -> dict[str, list]:
    """The cases of each family that contain every text of `filters`; with `quick` only the first of each operation."""
    chosen = {}
    for family in families:
        cases = importlib.import_module(f"benchmarks.bench_{family}").CASES
        cases = [case for case in cases if all(text in case.title for text in filters)]
        if quick:
            cases = list({case.op: case for case in reversed(cases)}.values())[::-1]
        chosen[family] = cases
    return chosen


def show_comparison(console: Console, a: str, b: str, families, filters) -> None:
    """Print the ratios of two sets of saved results."""
    from benchmarks import compare, saved

    try:
        sets = {name: saved.read(name) for name in (a, b)}
    except saved.NotThere as reason:
        raise typer.BadParameter(str(reason)) from reason
    sets = {name: {f: s for f, s in some.items() if f in families} for name, some in sets.items()}
    found = compare.pairs(sets[a].values(), sets[b].values())
    found = [pair for pair in found if all(text in pair.a.title for text in filters)]
    if not found:
        raise typer.BadParameter(f"no job in common: {a}, {b}")
    short = {name: name if len(name) <= 8 else letter for name, letter in ((a, "A"), (b, "B"))}
    for name, some in sets.items():
        for line in compare.introduce(name if short[name] == name else f"{short[name]} = {name}", some):
            console.print(line, highlight=False)
    console.print(compare.draw(found, short[a], short[b]))
    mean = compare.geometric_mean(pair.speedup for pair in found)
    console.print(f"{len(found)} jobs, geometric mean {mean:.3f}", highlight=False)


def show_base(console: Console, commit: str, arguments: list[str]) -> None:
    """Time another commit beside this tree and print the ratios."""
    from benchmarks import base

    try:
        found = base.beside(commit, arguments, lambda line: console.print(line, highlight=False))
    except base.Failed as reason:
        raise typer.BadParameter(str(reason)) from reason
    console.print(base.draw(found, commit))
    told = sum(job.says_something for job in found)
    console.print(f"{told} of {len(found)} differ by more than two runs of one commit do", highlight=False)


def write_report(console: Console, folder: Path | None) -> None:
    """Write the page of all saved results."""
    from benchmarks import report

    for path in report.write(folder or report.DOCS):
        console.print(f"wrote {path}", highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
