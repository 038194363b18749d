"""The whole library on any machine, in a few minutes: ``python -m dskernels.demo``, or ``make demo``.

It shows what would run here and why, and compares every kernel with its reference. Then it trains a small DeepSeek-V3
on the Python standard library, saves it, loads it back, and lets it write code with and without MTP drafts.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel

from dskernels import cli
from dskernels.device import default_device
from dskernels.model import Config, DeepseekV3, Generation, LatentCache, generate, load
from dskernels.model.data import Corpus, decode, encode, read_corpus, standard_library
from dskernels.model.plot import (
    EXPERTS_FILE,
    LOSS_FILE,
    PICTURE_FILE,
    plot_experts,
    plot_loss,
    plot_training,
    require_matplotlib,
)
from dskernels.model.progress import TrainingProgress
from dskernels.model.train import DEMO, History, train

PROMPTS = ("class ", "def ", "        return ")
# Such a small model gains little from a second thread (0.11 s a step instead of 0.16). If another process uses a core
# too, threads that spin while waiting for one another turn this into seconds.
THREADS = 1

PAGES = 64  # of 64 tokens: room for all prompts of a kind at once

console = Console()


def main(
    out: Annotated[Path, typer.Option(help="Folder for the checkpoint, the metrics and the pictures.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = DEMO.steps,
    checks: Annotated[bool, typer.Option(help="Run doctor and parity first.")] = True,
) -> None:
    """Check the kernels here, train a small DeepSeek-V3 on real text, save it, load it back, and let it write code."""
    start = time.perf_counter()
    require_matplotlib()  # before the training, not after it
    torch.set_num_threads(THREADS)
    if checks:
        _headline("doctor: what would run here, and why")
        cli.doctor()
        _headline("parity: every kernel against its reference")
        cli.parity()

    _headline("train: a byte-level DeepSeek-V3 on the Python standard library")
    corpus = read_corpus(standard_library(), seed=DEMO.seed)
    history, seconds = _train(corpus, out, steps)
    _headline("generate: the checkpoint, loaded back, writes code")
    same = _generate(load(out, device=default_device()), corpus)
    plot_loss(history, out / LOSS_FILE)
    plot_experts(history, out / EXPERTS_FILE)
    plot_training(history, out / PICTURE_FILE, title=_title(seconds))
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    console.print(f"\nIn {out}/: {files}", highlight=False)
    console.print(f"The whole demo took {time.perf_counter() - start:.0f} s.", highlight=False)
    if not same:
        raise typer.Exit(1)


def _train(corpus: Corpus, out: Path, steps: int) -> tuple[History, float]:
    model_config = Config.from_name("demo")
    parameters = model_config.parameter_count()
    console.print(
        f"{sum(map(len, corpus.train)) / 1e6:.1f} MB of Python in {len(corpus.train)} files, "
        f"{len(corpus.validation)} held out; {(parameters.total + parameters.mtp) / 1e6:.1f} M parameters, "
        f"{parameters.active / 1e6:.1f} M for a token; {model_config.num_hidden_layers} layers and an MTP module, "
        f"{model_config.num_experts_per_tok} of {model_config.n_routed_experts} experts for a token.",
        highlight=False,
    )
    start = time.perf_counter()
    with TrainingProgress(steps, console) as progress:
        history = train(model_config, corpus, replace(DEMO, steps=steps), out=out, progress=progress)
    seconds = time.perf_counter() - start
    console.print(
        f"Held-out loss {history[0]['validation_loss']:.2f} -> {history[-1]['validation_loss']:.2f} nats a byte "
        f"in {seconds:.0f} s.",
        highlight=False,
    )
    return history, seconds


def _generate(model: DeepseekV3, corpus: Corpus) -> bool:
    """Continue held-out files with and without drafts; returns whether both wrote the same."""
    long = [document for document in corpus.validation if len(document) > 2000]
    # Of different lengths, from the middle of a file, so that the continuations differ.
    passages = [document[1000 : 1100 + 10 * i].tolist() for i, document in enumerate(long[:8])]
    plain, plain_speed = _write(model, passages, max_new_tokens=64)
    drafting, drafting_speed = _write(model, passages, max_new_tokens=64, drafts=1)
    same = plain.tokens == drafting.tokens
    console.print(
        f"{len(passages)} held-out files continued greedily by {sum(map(len, plain.tokens))} bytes in all:\n"
        f"  one by one       {plain.steps} passes, {plain_speed:.0f} bytes/s\n"
        f"  with MTP drafts  {drafting.steps} passes, {drafting_speed:.0f} bytes/s, "
        f"{drafting.acceptance_rate:.0%} of the drafts accepted\n"
        f"Both texts are {'[green]equal[/green]' if same else '[red]not equal[/red]'}.",
        highlight=False,
    )
    options = dict(max_new_tokens=200, temperature=0.7, drafts=1)
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(0)
    sampled, _ = _write(model, [encode(prompt) for prompt in PROMPTS], generator=generator, **options)
    for prompt, tokens in zip(PROMPTS, sampled.tokens, strict=True):
        console.print(Panel(f"[bold]{escape(prompt)}[/bold]{escape(decode(tokens).rstrip())}", width=100))
    console.print(f"Sampled, with {sampled.acceptance_rate:.0%} of the MTP drafts accepted.", highlight=False)
    return same


def _write(model: DeepseekV3, prompts: list[list[int]], **options: Any) -> tuple[Generation, float]:
    """The finished generation, and its speed in tokens a second."""
    weight = model.embed_tokens.weight
    cache = LatentCache(model.config, pages=PAGES, dtype=weight.dtype, device=weight.device)
    options |= {"cache": cache, "prefix_sharing": False}
    if weight.is_cuda:  # kernels are compiled, and graphs captured, which stay with the cache
        for _ in zip(range(3), generate(model, prompts, **options), strict=False):
            pass
    start = time.perf_counter()
    generation = generate(model, prompts, **options)
    count = sum(map(len, generation.finish()))
    return generation, count / (time.perf_counter() - start)


def _title(seconds: float) -> str:
    parameters = Config.from_name("demo").parameter_count()
    where = "a CPU core" if default_device().type == "cpu" else torch.cuda.get_device_name()
    return (
        f"A DeepSeek-V3 of {(parameters.total + parameters.mtp) / 1e6:.1f} M parameters learns Python: "
        f"{seconds:.0f} s on {where}"
    )


def _headline(text: str) -> None:
    console.print()
    console.rule(f"[bold]{text}", align="left")


if __name__ == "__main__":
    try:
        typer.run(main)
    except cli.EXPECTED as error:
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
