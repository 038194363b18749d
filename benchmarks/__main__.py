"""The command ``python -m benchmarks``."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

IMPLEMENTATIONS = ("hopper", "triton", "reference")
FAMILIES = ("fp8", "gemm", "grouped_gemm", "routing", "moe", "mla", "model", "training", "generation")
DEVICE = "cuda"
TABLE_WIDTH = 150  # of a log, which has no width of its own

EXAMPLES = """
Examples:

- `python -m benchmarks`: every family, a few minutes
- `python -m benchmarks gemm mla --save`: two families; their JSON goes to benchmarks/results/
- `python -m benchmarks --filter mla_decode --filter h128`: the cases whose title says both
- `python -m benchmarks gemm --impl triton --impl hopper --host`: two implementations, and what a call costs the host
- `python -m benchmarks --list`: what there is; needs no GPU
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
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long to time each rival for.")] = 0.3,
    commit: Annotated[
        str | None, typer.Option(help="The commit to record, where only the files are and git cannot tell.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
) -> None:
    """Time dskernels' operations on the shapes of DeepSeek-V3, beside their peers.

    Each case is first checked against the reference; a wrong result is not timed. Times are of the device, with a
    cold L2: the median, and what 20% and 80% of the runs stayed below. "% roof" is the share of what this machine was
    just measured to reach, in copying or in matrix products, whichever binds. "× best peer" is how many times as fast
    as the fastest peer: above 1 is faster.

    Exits 1 if a case failed, 0 otherwise, also where there is no GPU.
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
    if save and (filter_ or quick):
        raise typer.BadParameter("--save keeps whole families: leave out --filter and --quick")
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
        return
    seconds = min(seconds, 0.05) if quick else seconds
    failed = measure(
        console, chosen, save=save, impls=tuple(impl or (None,)), seconds=seconds, host=host, commit=commit
    )
    if failed:
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


def measure(
    console: Console,
    chosen: dict[str, list],
    *,
    save: bool,
    impls,
    seconds: float,
    host: bool,
    commit: str | None = None,
) -> bool:
    """Run the cases, print a table a family, and say whether anything failed."""
    import torch

    from benchmarks import peers, results, roofline, timing
    from benchmarks.runner import Runner

    machine = results.Machine.current()
    if commit:
        machine = dataclasses.replace(machine, commit=commit)
    with console.status("measuring the roofs"):
        stopwatch = timing.Stopwatch(seconds)
        roofs = roofline.measure(stopwatch.time)
        torch.cuda.empty_cache()
    console.print(
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}, CUDA {machine.cuda}, "
        f"commit {machine.commit}",
        highlight=False,
    )
    fp8 = "no fp8" if roofs.fp8_tflops is None else f"fp8 {roofs.fp8_tflops:,.0f} TFLOP/s"
    console.print(
        f"roofs: copy {roofs.copy_gbs:,.0f} GB/s, bf16 {roofs.bf16_tflops:,.0f} TFLOP/s, {fp8}", highlight=False
    )
    missing = "; ".join(f"{name} ({reason})" for name, reason in peers.missing().items())
    console.print(f"peers missing: {missing or 'none'}\n", highlight=False)

    runner = Runner(torch.device(DEVICE), stopwatch.time, roofs, impls, timing.host_cost if host else None)
    failed = False
    columns = TextColumn("{task.description:60}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=sum(len(cases) for cases in chosen.values()))
        for family, cases in chosen.items():
            if not cases:
                continue
            outcomes, notes = [], []
            for case in cases:
                progress.update(task, description=case.title)
                outcome = runner.run(case)
                outcomes += outcome.results
                notes += outcome.notes
                progress.advance(task)
            console.print(results.draw(family, outcomes, host=host))
            for failure in (o for o in outcomes if isinstance(o, results.Failure)):
                failed = True
                title = f"{failure.op} {failure.workload} ({failure.impl})"
                console.print(f"[red]failed[/red] {title}: {escape(failure.reason)}", highlight=False)
            for note in notes:
                console.print(f"[dim]{escape(note)}[/dim]", highlight=False)
            rows = [o for o in outcomes if isinstance(o, results.Row)]
            if save and rows:
                console.print(f"saved {results.save(family, machine, roofs, rows)}", highlight=False)
            console.print()
    return failed


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
