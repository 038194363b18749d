"""``dskernels train`` and ``dskernels plot``: training runs, and pictures of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from dskernels.cli import together
from dskernels.cli.beginning import begin, console, of_init

EXAMPLES = """[bold]Examples[/bold]

dskernels train demo --out run

dskernels train small --data 'texts/**/*.txt' --tokenizer train:8192 --precision fp8 --steps 1500 \\
    --batch-tokens 8192 --sequence-length 1024 --learning-rate 1e-3 --out run

dskernels train small --data run/tokens --precision bf16 --steps 1500 --learning-rate 1e-3 --out other

dskernels train --init run --data run/tokens --precision bf16 --steps 500 --learning-rate 3e-4 --out further

dskernels plot run other --out both.png

torchrun --nproc-per-node 4 -m dskernels train demo --plan data=2,expert=2 --out run
"""


def train(
    config: Annotated[
        str | None,
        typer.Argument(
            help="A preset (demo, small, deepseek-v3, ...), a config.json, or a folder that holds one; by default that "
            "of --init, or demo."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files, folders or globs of text, or the tokens folder of another run; by default Python's standard "
            "library."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for tokens, metrics, checkpoints, model and pictures.")] = Path(
        "run"
    ),
    init: Annotated[
        Path | None,
        typer.Option(help="Start from the weights in this folder (another run, or its ema), of any type."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="bytes, a tokenizer.json, or train:N: a byte-level BPE of N tokens, trained on the data; by default "
            "that of --init, or bytes."
        ),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Fraction of the documents held out for validation.")] = 0.05,
    precision: Annotated[str, typer.Option(help="fp32, bf16, or fp8 (linear layers and experts in e4m3).")] = "fp32",
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 300,
    batch_tokens: Annotated[int, typer.Option(help="Tokens per step.")] = 2048,
    microbatches: Annotated[int, typer.Option(help="Parts that a step is split into, to save memory.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Longest sequence; longer documents are cut.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate, after the warm-up.")] = 2e-3,
    final_learning_rate: Annotated[
        float | None, typer.Option(help="Learning rate at the end; by default a tenth of the peak.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Steps of warm-up; by default a tenth of all, at most 20.")
    ] = None,
    decay_from: Annotated[
        float,
        typer.Option(
            help="Fraction of the steps after which the rate decays along a cosine.",
            show_default="10 / 14.8, the report's",
        ),
    ] = 10 / 14.8,
    settle_from: Annotated[
        float,
        typer.Option(
            help="Fraction after which rate and router biases stay constant.", show_default="14.3 / 14.8, likewise"
        ),
    ] = 14.3 / 14.8,
    weight_decay: Annotated[float, typer.Option(help="Weight decay of matrices.")] = 0.1,
    clip: Annotated[float, typer.Option(help="Largest gradient norm; above it the gradient is scaled.")] = 1.0,
    bias_update_rate: Annotated[
        float, typer.Option(help="Change of a router bias per step (gamma); 0 keeps them fixed.")
    ] = 0.001,
    balance_alpha: Annotated[float, typer.Option(help="Weight of the sequence-wise balance loss.")] = 1e-4,
    mtp_lambda: Annotated[float, typer.Option(help="Weight of the MTP loss.")] = 0.3,
    final_mtp_lambda: Annotated[float, typer.Option(help="Weight of the MTP loss once the rate decays.")] = 0.1,
    ema: Annotated[
        float,
        typer.Option(help="Decay of averaged weights, which are exported too, also under torchrun; 0 for none."),
    ] = 0.0,
    recompute: Annotated[
        bool,
        typer.Option("--recompute/--no-recompute", help="Save less for the backward and recompute it."),
    ] = True,
    seed: Annotated[
        int, typer.Option(help="Seed of the weights, the order of the text, and the held-out documents.")
    ] = 0,
    validate_every: Annotated[
        int | None, typer.Option(help="Steps between validations; by default a tenth of all.")
    ] = None,
    validation_batches: Annotated[int, typer.Option(help="Batches in a validation, at most all.")] = 4,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0 for none.")] = 200,
    keep: Annotated[int, typer.Option(help="How many of the newest checkpoints to keep.")] = 2,
    resume: Annotated[
        bool | None,
        typer.Option("--resume/--restart", help="Resume, or begin anew; by default resume if there is a checkpoint."),
    ] = None,
    cuda_graph: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graph/--no-cuda-graph",
            help="Replay steps as a CUDA graph; by default on one GPU. Not under torchrun with more than one process.",
        ),
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="Under torchrun: parallelism, such as data=2,expert=2 or pipeline=2; default: all expert."),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Also write metrics for TensorBoard; under torchrun the first rank does so."
        ),
    ] = False,
    device: Annotated[str | None, typer.Option(help="Such as cuda:1 or cpu; else the GPU if there is one.")] = None,
) -> None:
    """Train a model on text, with a live table, checkpoints and metrics; the result is a model that generate loads.

    If a run was stopped or killed, the same command resumes it from the last checkpoint, with the same numbers.
    """
    from dskernels.cli.generation import _device
    from dskernels.model.progress import require_tensorboard
    from dskernels.model.train import Interrupted
    from dskernels.model.train import train as run
    from dskernels.model.train_config import TrainConfig

    if tensorboard and together.speaks():
        require_tensorboard()  # before the text is read, which may take minutes
    where = _device(device)
    if cuda_graph and where.type != "cuda":
        raise ValueError(f"--cuda-graph: needs a GPU, the model would run on {where.type}")
    for name, value, least in (("checkpoint-every", checkpoint_every, 0), ("keep", keep, 1)):
        if value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value}")
    if not 0 < held_out < 1:
        raise ValueError(f"--held-out: expected a fraction between 0 and 1, got {held_out}")
    config, tokenizer = of_init(init, config, tokenizer, out if resume is not False else None)
    recipe = TrainConfig(
        steps=steps,
        batch_tokens=batch_tokens,
        microbatches=microbatches,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        final_learning_rate=learning_rate / 10 if final_learning_rate is None else final_learning_rate,
        warmup_steps=min(20, steps // 10) if warmup_steps is None else warmup_steps,
        decay_from=decay_from,
        settle_from=settle_from,
        weight_decay=weight_decay,
        clip=clip,
        bias_update_rate=bias_update_rate,
        balance_alpha=balance_alpha,
        mtp_lambda=mtp_lambda,
        final_mtp_lambda=final_mtp_lambda,
        precision=precision,  # type: ignore[arg-type]
        recompute=recompute,
        ema=ema,
        seed=seed,
        validate_every=max(1, steps // 10) if validate_every is None else validate_every,
        validation_batches=validation_batches,
    )
    if together.ranks() > 1 or plan is not None:
        if cuda_graph:
            raise ValueError(f"--cuda-graph: expected one process, torchrun has started {together.ranks()}")
        where_to: dict[str, Any] = dict(init=init, checkpoint_every=checkpoint_every, keep=keep, resume=resume)
        together.train(config, data, out, tokenizer, held_out, recipe, plan, device, tensorboard, **where_to)
        return
    begun = begin(config, data, out, tokenizer, held_out, init, recipe, resume)
    # Imported modules stay alive anyway: scanning them at every garbage collection would slow down each step.
    gc.collect()
    gc.freeze()
    with ExitStack() as stack:
        progress = stack.enter_context(watching(steps, out, begun.checkpoint, tensorboard))
        try:
            history = run(
                begun.model,
                begun.corpus,
                recipe,
                out=out,
                device=where,
                progress=progress,
                init=init,
                checkpoint_every=checkpoint_every,
                keep=keep,
                resume=resume,
                tokenizer_from=begun.tokens,
                cuda_graph=cuda_graph,
            )
        except Interrupted as interrupted:
            stack.close()
            console.print(f"{interrupted}: give the same command again.", highlight=False, soft_wrap=True)
            raise typer.Exit(130) from None
    show_outcome(history, out)


@contextmanager
def watching(
    steps: int, out: Path, checkpoint: Path | None, tensorboard: bool
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is to be called with each line of the metrics: it shows the table and, if asked for, writes the events of
    TensorBoard, from which those after ``checkpoint`` are dropped if the run goes on from one."""
    from dskernels.model.progress import TensorBoardLog, TrainingProgress
    from dskernels.model.train_state import read_about

    with ExitStack() as stack:
        shown: list[Callable[[dict[str, Any]], None]] = [stack.enter_context(TrainingProgress(steps, console))]
        if tensorboard:
            log = TensorBoardLog(out, read_about(checkpoint)["step"] if checkpoint else 0)
            stack.callback(log.close)
            shown.append(log)

        def progress(line: dict[str, Any]) -> None:
            for show in shown:
                show(line)

        yield progress


def show_outcome(history: list[dict[str, Any]], out: Path) -> None:
    """Draw the pictures of a finished run, if matplotlib is installed, and say what is in its folder."""
    from dskernels.model.plot import plot_run, require_matplotlib

    looks = [line["validation_loss"] for line in history if "validation_loss" in line]
    files, missing = ["model", "metrics"], ""
    try:
        require_matplotlib()
        files += plot_run(history, out)
    except ImportError:
        missing = f" No pictures without matplotlib: pip install 'dskernels[plot]', then dskernels plot {out}."
    console.print(
        f"Held-out loss {looks[0]:.3f} -> {looks[-1]:.3f} nats a token. In {out}: {', '.join(files)}.{missing}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def plot(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or metrics.jsonl files.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Picture to write (.png, .svg, .pdf); by default the first run's training.png.")
    ] = None,
    label: Annotated[
        list[str] | None, typer.Option(help="Name of a run, once for each; by default its folder's name.")
    ] = None,
    title: Annotated[str, typer.Option(help="Title of the picture.")] = "",
    pairs: Annotated[
        bool,
        typer.Option(
            "--pairs", help="Show by how many % every second run's losses differ from those of the run before it."
        ),
    ] = False,
) -> None:
    """Draw runs, several in one picture: losses, MTP loss, the load of the experts, throughput."""
    from dskernels.model.plot import PICTURE_FILE, read_history
    from dskernels.model.plot_runs import plot_pairs, plot_runs

    if pairs and len(runs) % 2:
        raise ValueError(f"--pairs: expected an even number of runs, got {len(runs)}")
    pictures = len(runs) // 2 if pairs else len(runs)
    if label is not None and len(label) != pictures:
        raise ValueError(
            f"--label: expected one for each of {pictures} {'pairs' if pairs else 'runs'}, got {len(label)}"
        )
    if out is not None and out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--out: expected a name that ends in .png, .svg or .pdf, got {out}")
    files = [run / "metrics.jsonl" if run.is_dir() else run for run in runs]
    if pairs:
        halves = list(zip(files[::2], files[1::2], strict=True))
        named = label or [f"{second.parent.name} beside {first.parent.name}" for first, second in halves]
        drawn = {name: (read_history(a), read_history(b)) for name, (a, b) in zip(named, halves, strict=True)}
        out = files[0].with_name(PICTURE_FILE) if out is None else out
        plot_pairs(drawn, out, title=title)
        console.print(f"{out}", highlight=False, soft_wrap=True)
        return
    names = label or [(run if run.is_dir() else run.parent).resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run) for run in runs]
    out = files[0].with_name(PICTURE_FILE) if out is None else out
    plot_runs(dict(zip(names, map(read_history, files), strict=True)), out, title=title)
    console.print(f"{out}", highlight=False, soft_wrap=True)
