"""Training on many ranks: the recipe of one process, step by step, with the same numbers whatever the plan.

Every rank generates the same sequence of micro-batches and processes its own share of it. A plan therefore changes
which rank computes what, and nothing else: losses differ from those of one process only by rounding.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dskernels.model.config import Config
from dskernels.model.data import Corpus
from dskernels.model.disk import writing
from dskernels.model.ema import Ema
from dskernels.model.model import DeepseekV3
from dskernels.model.moe import MoE
from dskernels.model.parallel.initial import biases, fill, held
from dskernels.model.parallel.optimizer import TeamAdamW
from dskernels.model.parallel.pipeline import Pipeline
from dskernels.model.parallel.plan import Team, move, parallelize, spread_experts
from dskernels.model.parallel.shards import write_pieces
from dskernels.model.parallel.team_step import TeamStepper
from dskernels.model.parallel.whole import WholeAdamW
from dskernels.model.train import EMA_FOLDER
from dskernels.model.train_begin import check, check_identity, identity, texts
from dskernels.model.train_config import TrainConfig
from dskernels.model.train_metrics import History, Metrics
from dskernels.model.train_pieces import Piece, Pieces, StoredTensor
from dskernels.model.train_state import STATE_FILE, checkpoints, read_about, remove_checkpoints
from dskernels.model.train_step import Pending
from dskernels.model.writing import save


def train(
    model_config: Config,
    data: Corpus,
    train_config: TrainConfig,
    team: Team,
    *,
    out: str | Path,
    progress: Callable[[dict[str, Any]], None] | None = None,
    init: str | Path | None = None,
    checkpoint_every: int = 0,
    keep: int = 2,
    resume: bool | None = None,
    schedule: str = "dualpipev",
    tokenizer_from: str | Path | None = None,
) -> History:
    """Train a model on all ranks of a team; every rank calls it with the same arguments.

    It writes what `dskernels.model.train.train` writes: rank 0 writes the metrics, the model and, with
    ``train_config.ema``, the averaged weights in ``ema``; every rank writes its pieces of a checkpoint. There is always
    a checkpoint after the last step, because the model is written from it.

    Args:
        model_config: as in `dskernels.model.train.train`, like every argument that is not described here.
        data: the text, the same on every rank.
        train_config: how to train. ``microbatches`` is their number on all ranks together: a multiple of the number of
            ranks that process different text, and with a pipeline of P ranks at least 2 P for each of these.
        team: the ranks, see `Team.start`.
        out: a folder that all ranks see.
        progress: called with each line of the metrics, on rank 0 only. For TensorBoard, rank 0 passes a
            `dskernels.model.progress.TensorBoardLog`.
        init: a folder that all ranks see, whose weights are the initial ones.
        checkpoint_every: steps between two checkpoints; 0 writes only the one after the last step. Any other number of
            ranks can resume from a checkpoint, and so can one process.
        keep: how many of the newest checkpoints to keep.
        resume: True continues from the last checkpoint; False starts anew and removes what is there; None continues if
            there is a checkpoint.
        schedule: of a pipeline, see `Pipeline`.
        tokenizer_from: a folder whose tokenizer is copied next to the weights.

    Returns:
        The lines of this call, on every rank.

    Raises:
        ValueError: as with one process, except that a checkpoint may have had another number of micro-batches; or the
            plan does not fit the model or the micro-batches.
        FloatingPointError: a loss or a gradient is not finite; raised on every rank.
    """
    check(model_config, data, train_config, checkpoint_every, keep)
    found = next(iter(checkpoints(out)), None)
    if resume and found is None:
        raise ValueError(f"resume: {out} has no checkpoint to go on from")
    last = None if resume is False else found
    run = _Run(model_config, data, train_config, team, Path(out), schedule, init, fresh=last is None)
    dist.barrier()  # all ranks have looked for checkpoints, and the folder exists
    if last is not None:
        run.restore(last)
    elif run.chief:
        remove_checkpoints(out)
    history: History = []
    with Metrics(run.out, run.history_bytes) if run.chief else nullcontext() as metrics:
        for line in run.lines(checkpoint_every, keep, metrics):
            history.append(line)
            if metrics is not None:
                metrics.append(line)
                if progress is not None:
                    progress(line)
    run.export(tokenizer_from)
    return history


class _Run:
    """A model on its way through the steps, with what this rank holds of everything that a checkpoint stores."""

    def __init__(
        self,
        model_config: Config,
        data: Corpus,
        config: TrainConfig,
        team: Team,
        out: Path,
        schedule: str,
        init: str | Path | None,
        fresh: bool,
    ) -> None:
        self.config, self.team, self.out, self.model_config = config, team, out, model_config
        self.rank, self.step, self.history_bytes = dist.get_rank(), 0, 0
        self.chief = self.rank == 0
        if self.chief:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
        plan = team.plan
        if config.microbatches % plan.batches:
            raise ValueError(
                f"microbatches: expected a multiple of the {plan.batches} ranks with their own text, "
                f"got {config.microbatches}"
            )
        least = plan.batches * 2 * plan.pipeline
        if plan.pipeline > 1 and config.microbatches < least:
            raise ValueError(
                f"microbatches: expected at least {least}, {2 * plan.pipeline} for each of {plan.batches} pipelines of "
                f"{plan.pipeline} ranks, got {config.microbatches}"
            )
        # Without memory, until a rank allocates what it holds.
        self.model = DeepseekV3(
            model_config,
            fp8=config.precision == "fp8",
            recompute=config.recompute,
            device="meta",
            dtype=torch.float32,
        )

        def begin(pieces: Mapping[str, Piece]) -> None:
            if fresh:  # else `restore` fills them
                fill(pieces, model_config, seed=config.seed, init=init)

        self.pipeline: Pipeline | None = None
        if plan.pipeline > 1:
            self.pipeline = Pipeline(
                self.model.to(config.dtype),
                team,
                tokens=config.batch_tokens // config.microbatches,
                microbatches=config.microbatches // plan.batches,
                schedule=schedule,
                collect=lambda: self.optimizer.collect(),
            )
            begin(held(self.pipeline.stages, team))
            self.optimizer = _optimizer(WholeAdamW, self.pipeline.named_parameters(), team, config)
        else:
            self.optimizer = spread(self.model, team, config, begin)
        model = self.model if self.pipeline is None else _parts(self.pipeline, model_config, team.device)
        self.stepper = TeamStepper(model, self.optimizer, config, team, self.pipeline)
        # Each rank averages the rows that it updates, on its CPU; together these are the average of one process.
        self.ema = Ema(self.optimizer, config.ema) if config.ema else None
        self.identity = identity(model_config, data, config, init)
        self.text, self.held_out = texts(data, config)

    def lines(self, checkpoint_every: int, keep: int, metrics: Metrics | None) -> Iterator[dict[str, Any]]:
        """Train; yields the lines of the metrics as they come."""
        config, stepper = self.config, self.stepper
        if self.step == 0:
            yield dict(step=0, **stepper.evaluate(self.held_out))
        pending: Pending | None = None
        stepper.rest()
        while self.step < config.steps:
            text = list(itertools.islice(self.text, config.microbatches))
            started = stepper.start(text, self.step)
            if self.ema is not None:
                self.ema.start(self.step)
            if pending is not None:
                yield stepper.finish(pending)
            pending = started
            self.step += 1
            last = self.step == config.steps
            look = last or self.step % config.validate_every == 0
            checkpoint = last or (checkpoint_every > 0 and self.step % checkpoint_every == 0)
            if not (look or checkpoint):
                continue
            yield stepper.finish(pending)
            pending = None
            if look:
                yield dict(step=self.step, **stepper.evaluate(self.held_out), **self._look_at_average(last))
            if checkpoint:
                self.checkpoint(keep, metrics)
            stepper.rest()

    def _look_at_average(self, last: bool) -> dict[str, float]:
        if self.ema is None or not last:
            return {}
        self.ema.finish()
        with self.optimizer.replaced(self.ema.average):
            return dict(ema_validation_loss=self.stepper.evaluate(self.held_out)["validation_loss"])

    def checkpoint(self, keep: int, metrics: Metrics | None) -> None:
        """Write what `restore` reads."""
        if self.ema is not None:
            self.ema.finish()
        place = self.text.state()
        about = dict(
            history_bytes=0 if metrics is None else metrics.flushed(),
            text_position=dict(next=place["next"], taken=place["taken"]),
            updates=float(self.optimizer.steps),
            torch=torch.__version__,
            plan=dataclasses.asdict(self.team.plan),
            **self.identity,
        )
        pieces = {name: piece for name, piece in self._pieces(place["generator"]).items() if self._writes(name)}
        write_pieces(self.out, self.step, about, pieces, keep=keep, rank=self.rank)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint, whichever ranks made it, or one process.

        Raises:
            ValueError: it was made with other arguments; the message says which.
        """
        about = read_about(path)
        check_identity(path, about, self.identity, microbatches=False)
        generator = torch.empty_like(self.text.state()["generator"])
        with torch.no_grad():
            Pieces(path).read(self._pieces(generator))
        try:
            self.step, self.history_bytes = int(about["step"]), int(about["history_bytes"])
            position, updates = dict(about["text_position"]), float(about["updates"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path / STATE_FILE}: not a description of a checkpoint") from None
        self.optimizer.steps.fill_(updates)
        self.optimizer.refresh()
        self.text.restore({**position, "generator": generator})

    def export(self, tokenizer_from: str | Path | None) -> None:
        """Write the whole model, and its average, in the Hugging Face layout, from the pieces of the last
        checkpoint."""
        if self.chief:
            pieces = Pieces(checkpoints(self.out)[0])
            for kind, folder in (("master", self.out), ("ema", self.out / EMA_FOLDER)):
                if kind == "master" or self.ema is not None:
                    model = _stored_model(self.model_config, self.config.dtype, pieces, kind)
                    save(model, folder, tokenizer_from=tokenizer_from)
        dist.barrier()

    def _pieces(self, generator: Tensor) -> dict[str, Piece]:
        """What this rank holds of all that a step depends on, by the names in a checkpoint."""
        optimizer = self.optimizer
        state = {"master": optimizer.flat, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        if self.ema is not None:
            state["ema"] = self.ema.average
        pieces = {
            f"{kind}.{name}": Piece(rows, *optimizer.place(name))
            for kind, flat in state.items()
            for name, rows in optimizer.named(flat).items()
        }
        for model in [self.model] if self.pipeline is None else self.pipeline.stages:
            pieces |= _buffers(model)
        return pieces | {"text.generator": Piece.all_of(generator)}

    def _writes(self, name: str) -> bool:
        """Whether this rank writes a piece: of the ranks that hold the same one, the first does."""
        team = self.team
        if name == "text.generator":
            return self.chief
        if name.startswith("buffer."):
            return team.place("batch") == 0
        return self.optimizer.writes(name.partition(".")[2])


def _stored_model(config: Config, dtype: torch.dtype, pieces: Pieces, kind: str) -> DeepseekV3:
    """What `save` uses of a model, whose weights it reads from a checkpoint one by one.

    Args:
        config: of the model.
        dtype: of its parameters.
        pieces: the checkpoint.
        kind: "master" or "ema", the weights that are wanted.
    """
    model = DeepseekV3(config, device="meta", dtype=dtype)
    parameters = {name: StoredTensor(pieces, f"{kind}.{name}", like) for name, like in model.named_parameters()}
    buffers = {name: StoredTensor(pieces, f"buffer.{name}", bias.rows) for name, bias in biases(model).items()}
    stored = SimpleNamespace(
        config=config,
        source=None,
        scale_format=model.scale_format,
        embed_tokens=model.embed_tokens,
        parameters=parameters.values,
        named_parameters=parameters.items,
        named_buffers=buffers.items,
    )
    return cast(DeepseekV3, stored)


def _buffers(model: nn.Module) -> dict[str, Piece]:
    """The biases of a model's routers, by their names in a checkpoint."""
    return {f"buffer.{name}": piece for name, piece in biases(model).items()}


def spread(
    model: DeepseekV3,
    team: Team,
    config: TrainConfig,
    begin: Callable[[Mapping[str, Piece]], None] | None = None,
) -> TeamAdamW:
    """Spread a model over the ranks of a plan without a pipeline.

    Args:
        model: in fp32, the same on every rank, or on the meta device.
        team: the ranks.
        config: how to train.
        begin: gives the rows that this rank holds (see `held`) their initial values, which those of a model on the meta
            device need.

    Returns:
        The optimiser of its parameters.
    """
    tokens = config.batch_tokens // config.microbatches
    kind = TeamAdamW if team.plan.reshard else WholeAdamW
    if team.plan.reshard:
        parallelize(model, team, dtype=None if config.dtype == torch.float32 else config.dtype, tokens=tokens)
    else:
        team.plan.check(model.config, dist.get_world_size())
        spread_experts(model, team, tokens=tokens, dtype=config.dtype)
        move(model.to(config.dtype), team.device)
    if begin is not None:
        begin(held([model], team))
    return _optimizer(kind, dict(model.named_parameters()), team, config)


def _optimizer(
    kind: type[TeamAdamW], parameters: Mapping[str, nn.Parameter], team: Team, config: TrainConfig
) -> TeamAdamW:
    betas, decay = config.betas, config.weight_decay
    return kind(parameters, team, betas=betas, weight_decay=decay, moments=config.moments)


def _parts(pipeline: Pipeline, config: Config, device: torch.device) -> Any:
    """What a `Stepper` uses of a model, for the stages of this rank."""
    here = pipeline.moe_layers()
    layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    elsewhere = cast(MoE, SimpleNamespace(gate=SimpleNamespace(e_score_correction_bias=None)))
    return SimpleNamespace(
        config=config,
        embed_tokens=SimpleNamespace(weight=torch.empty(0, device=device)),
        moe_layers=[here.get(i, elsewhere) for i in range(layers)],
    )
