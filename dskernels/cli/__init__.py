"""The command `dskernels`: what would run here, whether it agrees with the references, training, generation."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from dskernels import __all__ as PUBLIC
from dskernels import __version__
from dskernels.cli import together, training
from dskernels.cli.generation import EXAMPLES, generate

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="GPU operations for models with DeepSeek-V3's architecture, each with a PyTorch reference.\n\n"
    "Start with [bold]doctor[/bold] (what would run here, and why) and [bold]parity[/bold] (does it agree with the "
    "references), then [bold]generate[/bold] from a checkpoint.",
    rich_markup_mode="rich",
)
console = Console()
EXPECTED = (ValueError, TypeError, OSError, ImportError, FloatingPointError, torch.OutOfMemoryError)
# The class of typer's usage errors. It is click's, of which typer has its own copy since 0.25.
USAGE: Any = typer.BadParameter.__mro__[2]

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


@app.command()
def doctor(
    as_json: Json = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Also the operations inside of others, such as their gradients.")
    ] = False,
) -> None:
    """Show this machine, the versions, and what would run for each operation and why."""
    from dskernels import doctor as facts

    machine, choices = facts.machine(), facts.choices()
    if as_json:
        operations = [choice._asdict() for choice in choices]
        print(json.dumps({**machine, "operations": operations}, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("system", machine["system"])
    table.add_row("python", machine["python"])
    for name, version in machine["packages"].items():
        table.add_row(name, version or "[dim]not installed[/dim]")
    for name, value in (machine["gpu"] or {"gpu": "none"}).items():
        table.add_row(name, str(value))
    console.print(table)
    console.print(f"\n{facts.summary()}\n")

    # Operations that run the same way for the same reasons share a row.
    groups: dict[tuple[str, str], list[str]] = {}
    for choice in choices:
        if choice.operation not in PUBLIC and not everything:
            continue
        runs = "their parts, chosen one by one" if choice.impl == "composite" else choice.impl
        why = "\n".join(f"not {impl}: {reason}" for impl, reason in choice.rejected.items())
        groups.setdefault((runs, why), []).append(choice.operation)
    grouped = Table(show_lines=True)
    for name in ("operations", "run", "why"):  # in a narrow terminal nothing is cut off
        grouped.add_column(name, overflow="fold", min_width=24 if name == "operations" else None)
    for (runs, why), names in groups.items():
        grouped.add_row(", ".join(names), runs, why)
    console.print(grouped)


@app.command()
def parity(
    families: Annotated[
        list[str] | None,
        typer.Argument(help="Some of fp8, gemm, grouped_gemm, moe, routing, mla_decode, mla_prefill; all by default."),
    ] = None,
    impl: Annotated[str, typer.Option(help="Implementation to check: triton or hopper.")] = "triton",
    as_json: Json = False,
) -> None:
    """Run every kernel against its reference here, and show the differences.

    Without a GPU, the kernels run in Triton's interpreter. The difference is 1 - 2 sum(xy) / sum(x^2 + y^2) in fp64,
    the largest over all results (and gradients); integer results must be equal. Exits with status 1 if a case is beyond
    its tolerance.
    """
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is first imported, which happens below
    from dskernels.choice import reason_of_device
    from dskernels.device import default_device
    from dskernels.parity import FAMILIES, all_cases, check

    if impl not in ("triton", "hopper"):
        raise ValueError(f"--impl: expected triton or hopper, got {impl!r}")
    if unknown := set(families or ()) - set(FAMILIES):
        raise ValueError(f"families: expected some of {', '.join(FAMILIES)}, got {', '.join(sorted(unknown))}")
    device = default_device()
    if reason := reason_of_device(impl, device, asked_for=True):
        raise ValueError(f"--impl: {impl} cannot run here: {reason}")
    cases = all_cases(families or FAMILIES)
    rows: list[dict[str, Any]] = []
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        console=console,
        disable=as_json,
        transient=True,
    )
    with bar:
        task = bar.add_task("parity", total=len(cases))
        for case in cases:
            bar.update(task, description=escape(f"{case.op} {case.label}"))
            start = time.perf_counter()
            row = {"operation": case.op, "case": case.label, "impl": impl, "tolerance": case.tolerance}
            try:
                outcome = check(case, device, impl)
                row |= {"difference": outcome.difference, "passed": outcome.passed}
            except Exception as error:  # one kernel that raises must not hide the others
                row |= {"difference": None, "passed": False, "error": f"{type(error).__name__}: {error}"}
            rows.append(row | {"seconds": round(time.perf_counter() - start, 3)})
            bar.advance(task)

    failed = [row for row in rows if not row["passed"]]
    where = "in Triton's interpreter on the CPU" if device.type == "cpu" else f"on {torch.cuda.get_device_name(device)}"
    if as_json:
        print(json.dumps({"where": where, "rows": rows, "failed": len(failed)}, indent=2))
    else:
        _print_parity(rows)
        verdict = f"[red]{len(failed)} of {len(rows)} cases failed[/red]" if failed else f"all {len(rows)} cases passed"
        console.print(f"{impl} kernels {where}, each against its reference: {verdict}.")
    if failed:
        raise typer.Exit(1)


def _print_parity(rows: Sequence[dict[str, Any]]) -> None:
    table = Table("operation", "case", "difference", "tolerance", "")
    for row in rows:
        if "error" in row:
            shown = f"[red]{escape(row['error'].splitlines()[0])}[/red]"
        else:
            shown = "equal" if row["difference"] == 0 else f"{row['difference']:.1e}"
        limit = "equal" if row["tolerance"] == 0 else f"{row['tolerance']:.0e}"
        verdict = "[green]ok[/green]" if row["passed"] else "[red]FAILED[/red]"
        table.add_row(row["operation"], escape(row["case"]), shown, limit, verdict)
    console.print(table)


app.command(epilog=training.EXAMPLES)(training.train)
app.command()(training.plot)
app.command(epilog=EXAMPLES)(generate)


def _version(value: bool) -> None:
    if value:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command. Whatever a user can get wrong is one line on stderr and exit status 1, or 2 for a wrong
    option."""
    try:
        sys.exit(app(standalone_mode=False, prog_name="dskernels") or 0)
    except USAGE as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # its message is the help
        else:
            context = getattr(error, "ctx", None)
            said = error.format_message().rstrip(".")
            if context is not None:  # "Did you mean 'doctor'?" has its punctuation already
                said += f"{'' if said.endswith('?') else '.'} See {context.command_path} --help."
            _say(said)
        sys.exit(error.exit_code)
    except EXPECTED as error:
        _say(str(error) or type(error).__name__)
        sys.exit(1)
    except RuntimeError as error:  # torch has no class for a host that is out of memory
        wanted = re.search(r"can't allocate memory: you tried to allocate (\d+) bytes", str(error))
        if wanted is None:
            raise
        _say(f"this machine is out of memory: a tensor of {int(wanted[1]) / 1e9:,.1f} GB did not fit")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)


def _say(text: str) -> None:
    line = " ".join(text.split())
    if together.tell_torchrun(line) and not together.speaks():
        return  # usually all ranks would say the same
    Console(stderr=True).print(f"[red]error:[/red] {escape(line)}", highlight=False, soft_wrap=True)
