"""``torchrun ... -m dskernels train`` and ``generate``: the same commands on many ranks, of which only the first
prints."""

from __future__ import annotations

import atexit
import dataclasses
import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from rich.console import Console

if TYPE_CHECKING:
    from dskernels.model.parallel.plan import Plan, Team
    from dskernels.model.train_config import TrainConfig


def ranks() -> int:
    """The number of ranks that torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def speaks() -> bool:
    """Whether this rank writes and prints: the first, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def tell_torchrun(error: str) -> bool:
    """Pass the error that ended this rank to torchrun, which reports on all ranks at the end; false without
    torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        said = {"message": f"error: {error}", "timestamp": int(time.time())}
        Path(file).write_text(json.dumps(said), encoding="utf-8")
    return file is not None


def parse_plan(text: str | None, count: int) -> Plan:
    """Read ``data=2,expert=4`` as a `Plan` for this number of ranks; by default every rank has its own text and all
    share the experts.

    Two words may follow: ``gathered`` means ``reshard=False``, ``overlap`` means that and ``overlap=True``.

    Raises:
        ValueError: it cannot be read, or is for another number of ranks.
    """
    from dskernels.model.parallel.plan import Plan

    if text is None:
        return Plan(expert=count)
    numbers: dict[str, Any] = {}
    words = {"gathered": {"reshard": False}, "overlap": {"reshard": False, "overlap": True}}
    for part in text.split(","):
        if part.strip() in words:
            numbers |= words[part.strip()]
            continue
        name, _, value = part.strip().partition("=")
        if name not in ("data", "expert", "pipeline") or not value.isdecimal():
            raise ValueError(f"--plan: expected data=N, expert=N or pipeline=N with commas between, got {part!r}")
        numbers[name] = int(value)
    plan = Plan(**numbers)
    if plan.ranks != count:
        raise ValueError(f"--plan: {text} is for {plan.ranks} ranks, torchrun has started {count}")
    return plan


def start(plan: Plan, device: str | None, console: Console) -> Team:
    """Join the ranks; all but the first print nothing from now on."""
    from dskernels.model.parallel.plan import Team

    team = Team.start(plan, device)
    atexit.register(team.close)
    if dist.get_rank():
        console.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    return team


def train(
    config: str,
    data: list[Path] | None,
    out: Path,
    tokenizer: str,
    held_out: float,
    recipe: TrainConfig,
    plan: str | None,
    device: str | None,
    tensorboard: bool,
    *,
    init: Path | None,
    checkpoint_every: int,
    keep: int,
    resume: bool | None,
) -> None:
    """Train on all ranks; the first shows the table and writes the events of TensorBoard."""
    from dskernels.cli import beginning, training
    from dskernels.model.parallel.training import train as run
    from dskernels.model.plot import read_history
    from dskernels.model.train_metrics import METRICS_FILE

    console = beginning.console
    split = parse_plan(plan, ranks())
    least = split.batches * (2 * split.pipeline if split.pipeline > 1 else 2 if split.overlap else 1)
    if recipe.microbatches == 1:
        recipe = dataclasses.replace(recipe, microbatches=least)
    team = start(split, device, console)
    chief = dist.get_rank() == 0
    split.check(beginning.shape_of(config), ranks())
    if not chief:  # the first rank writes the tokens, then the others read them
        dist.barrier()
        data = [out / beginning.TOKENS] if not (data and len(data) == 1 and _tokens(data[0])) else data
    begun = beginning.begin(config, data, out, tokenizer, held_out, init, recipe, resume, writes=chief)
    if chief:
        dist.barrier()
    numbers = ", ".join(f"{n} {getattr(split, n)}" for n in ("data", "expert", "pipeline") if getattr(split, n) > 1)
    console.print(f"{ranks()} ranks: {numbers}; {recipe.microbatches} micro-batches a step.", highlight=False)
    with ExitStack() as stack:
        progress = None
        if chief:
            progress = stack.enter_context(training.watching(recipe.steps, out, begun.checkpoint, tensorboard))
        options: dict[str, Any] = dict(init=init, checkpoint_every=checkpoint_every, keep=keep, resume=resume)
        options |= dict(out=out, progress=progress, tokenizer_from=begun.tokens)
        run(begun.model, begun.corpus, recipe, team, **options)
    if chief:  # with the lines before a checkpoint that the run went on from
        training.show_outcome(read_history(out / METRICS_FILE), out)


def start_generating(device: str | None, console: Console) -> Team:
    """Join the ranks, each of which will have a part of the model for the same text."""
    from dskernels.model.parallel.plan import Plan

    return start(Plan(tensor=ranks()), device, console)


def _tokens(path: Path) -> bool:
    from dskernels.model.token_file import is_token_folder

    return is_token_folder(path)
