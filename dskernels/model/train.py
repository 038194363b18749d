"""Training by the recipe of the DeepSeek-V3 report (arXiv 2412.19437): the run, its metrics, its checkpoints."""

from __future__ import annotations

import itertools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dskernels.choice import forced_impl
from dskernels.device import default_device
from dskernels.model import train_state
from dskernels.model.config import Config
from dskernels.model.data import Corpus
from dskernels.model.disk import writing
from dskernels.model.ema import Ema
from dskernels.model.optimizer import MasterAdamW
from dskernels.model.train_begin import check, check_identity, first_model, identity, texts
from dskernels.model.train_config import DEMO, TrainConfig
from dskernels.model.train_metrics import METRICS_FILE, History, Metrics
from dskernels.model.train_pieces import Piece, Pieces
from dskernels.model.train_step import MEASURED, Pending, Stepper, evaluate
from dskernels.model.writing import save

__all__ = ["DEMO", "MEASURED", "METRICS_FILE", "History", "Interrupted", "TrainConfig", "evaluate", "train"]

EMA_FOLDER = "ema"
GRAPHED = ("cuda",)  # devices whose steps can be captured as graphs


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, by Ctrl-C or SIGTERM, and has written a checkpoint, which the message names."""


def train(
    model_config: Config,
    data: Corpus,
    train_config: TrainConfig,
    *,
    out: str | Path,
    device: torch.device | str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    init: str | Path | None = None,
    checkpoint_every: int = 0,
    keep: int = 2,
    resume: bool | None = None,
    tokenizer_from: str | Path | None = None,
    cuda_graph: bool | None = None,
) -> History:
    """Train a model, from its initial weights or from a checkpoint, and write it in the Hugging Face layout.

    ``out`` gets ``metrics.jsonl`` (one line per step, written as it happens), ``checkpoints`` if they are asked for,
    and at the end what `save` writes (and the averaged weights, likewise, in ``ema``). A line has

    - for a step: ``step`` (from 1), ``loss`` (main, nats a token), ``mtp_loss``, ``balance_loss``, ``max_load`` (of the
      busiest expert of all layers, relative to an even load), ``layer_loads`` (the same for each layer with experts),
      ``learning_rate``, ``gradient_norm`` (before clipping), ``tokens_per_second``, ``mfu`` (see `step_flops`; None if
      the peak of the device is not known), ``memory_gb`` (the peak so far);
    - for a validation: ``step`` (0 is before the first), ``validation_loss``, ``validation_mtp_loss``, ``load`` (for
    each
      layer with experts, how often each expert was chosen); the last one also ``ema_validation_loss``, of the averaged
      weights.

    A run that is stopped, in whatever way, continues from its last checkpoint with the same numbers: resumed on the
    same machine, it has the bits of a run that was never stopped. The checkpoint may also be one of
    `dskernels.model.parallel.train`, which in turn continues from those of this function. The host is one step behind
    the device: a line is written while the next step runs.

    Args:
        model_config: the shape of the model.
        data: see `read_corpus` and `write_tokens`.
        train_config: how to train.
        out: a folder, created if it does not exist.
        device: by default the GPU if there is one, else the CPU.
        progress: called with each line, see `TrainingProgress`.
        init: the folder of a model in the Hugging Face layout, such as another run's or its ``ema``, whose weights and
            router biases replace the random initial ones. They are rounded to the type of the parameters, and the model
            may have been trained in any precision. Optimiser, schedule and order of the text start afresh. A run that
            is resumed does not read it again.
        checkpoint_every: steps between two checkpoints; there is also one after the last step, and one at Ctrl-C or
            SIGTERM. 0 writes none.
        keep: how many of them to keep.
        resume: True continues from the last checkpoint of ``out``; False starts anew and removes what is there; None
            continues if there is a checkpoint.
        tokenizer_from: a folder whose tokenizer is copied next to the weights.
        cuda_graph: replay each step as a CUDA graph, with the same numbers to the bit: the host takes 50 ms to launch a
            step, longer than a GPU computes for a model of 200 M parameters. The graph has memory of its own. By
            default on a GPU, unless the reference is asked for.

    Returns:
        The lines, including those before a checkpoint. The same arguments on the same machine give the same numbers,
        except for the `MEASURED` ones.

    Raises:
        ValueError: ``out`` is a file, a token of the text is not in the vocabulary, sequences are longer than the
            model's context, or the checkpoint belongs to another recipe, model or text; there is no checkpoint to
            resume. ``init`` has other tensors than the model, or is damaged (see `load_weights`). A CUDA graph is asked
            for without a GPU.
        FileNotFoundError: ``init`` does not exist.
        FloatingPointError: a loss or a gradient is not finite. The message names the first tensor that is not, and the
            last good checkpoint. The parameters are those before this step.
        OSError: such as a full disk; the message names the file, and the last good checkpoint.
        Interrupted: see ``checkpoint_every``. Without checkpoints it is Python's KeyboardInterrupt.
    """
    check(model_config, data, train_config, checkpoint_every, keep)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file, expected a folder")
    found = next(iter(train_state.checkpoints(out)), None)
    if resume and found is None:
        raise ValueError(f"resume: {out / train_state.FOLDER} has no checkpoint to go on from")
    last = None if resume is False else found
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    device = default_device() if device is None else torch.device(device)
    if cuda_graph is None:
        cuda_graph = device.type == "cuda" and forced_impl() != "reference"
    elif cuda_graph and device.type not in GRAPHED:
        raise ValueError(f"cuda_graph: expected a GPU, the device is {device}")
    run = _Run(model_config, data, train_config, out, device, keep, cuda_graph, init, read_init=last is None)
    if last is None:
        train_state.remove_checkpoints(out)
    else:
        run.restore(last)
    with Metrics(out, run.history_bytes) as metrics, _stopping(checkpoint_every > 0) as stopped:
        history = metrics.before
        try:
            for line in run.lines(checkpoint_every, metrics, stopped):
                metrics.append(line)
                history.append(line)
                if progress is not None:
                    progress(line)
        except (FloatingPointError, OSError) as error:
            raise _with_checkpoint(error, out) from None
        with writing(out, _besides(out)):
            run.export(tokenizer_from)
    return history


class _Run:
    """A model on its way through the steps, with everything that a checkpoint stores."""

    def __init__(
        self,
        model_config: Config,
        data: Corpus,
        config: TrainConfig,
        out: Path,
        device: torch.device,
        keep: int,
        cuda_graph: bool,
        init: str | Path | None,
        read_init: bool,
    ) -> None:
        self.config, self.out, self.keep = config, out, keep
        self.model = first_model(model_config, config, device, config.dtype, init if read_init else None)
        self.text, self.held_out = texts(data, config)
        self.optimizer = MasterAdamW(
            self.model, betas=config.betas, weight_decay=config.weight_decay, moments=config.moments
        )
        self.stepper = Stepper(self.model, self.optimizer, config, cuda_graph=cuda_graph)
        self.ema = Ema(self.optimizer, config.ema) if config.ema else None
        self.step, self.history_bytes = 0, 0
        self.identity = identity(model_config, data, config, init)

    def lines(self, checkpoint_every: int, metrics: Metrics, stopped: threading.Event) -> Iterator[dict[str, Any]]:
        """Train; yields the lines of the metrics as they come."""
        config, stepper = self.config, self.stepper
        if self.step == 0:
            yield dict(step=0, **evaluate(self.model, self.held_out))
        pending: Pending | None = None
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
            stop = stopped.is_set() and not last
            checkpoint = checkpoint_every > 0 and (last or stop or self.step % checkpoint_every == 0)
            if not (look or checkpoint or stop):
                continue
            yield stepper.finish(pending)
            pending = None
            if look:
                yield dict(step=self.step, **evaluate(self.model, self.held_out), **self._look_at_average(last))
            if checkpoint:
                path = self.checkpoint(metrics)
                if stop:
                    raise Interrupted(f"stopped after step {self.step} of {config.steps}; {path} goes on from there")
            stepper.rest()

    def _look_at_average(self, last: bool) -> dict[str, float]:
        if self.ema is None or not last:
            return {}
        self.ema.finish()
        with self.optimizer.replaced(self.ema.average):
            return dict(ema_validation_loss=evaluate(self.model, self.held_out)["validation_loss"])

    def export(self, tokenizer_from: str | Path | None) -> None:
        """Write the model, and its average, in the Hugging Face layout."""
        save(self.model, self.out, tokenizer_from=tokenizer_from)
        if self.ema is not None:
            with self.optimizer.replaced(self.ema.average):
                save(self.model, self.out / EMA_FOLDER, tokenizer_from=tokenizer_from)

    def checkpoint(self, metrics: Metrics) -> Path:
        """Write what `restore` reads."""
        if self.ema is not None:
            self.ema.finish()
        place = self.text.state()
        about = dict(history_bytes=metrics.flushed(), text_position=dict(next=place["next"], taken=place["taken"]))
        about |= dict(updates=float(self.optimizer.steps), torch=torch.__version__, **self.identity)
        return train_state.write_checkpoint(
            self.out, self.step, about, iter(self._tensors(place["generator"]).items()), keep=self.keep
        )

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint, of one process or of many ranks.

        Raises:
            ValueError: it was made with other arguments; the message says which. Ranks may have had another number of
                micro-batches.
        """
        about = train_state.read_about(path)
        of_ranks = "plan" in about
        check_identity(path, about, self.identity, microbatches=not of_ranks)
        try:
            self.step, self.history_bytes = int(about["step"]), int(about["history_bytes"])
            position, updates = dict(about["text_position"]), float(about["updates"])
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path / train_state.STATE_FILE}: not a description of a checkpoint") from None
        generator = torch.empty_like(self.text.state()["generator"])
        with torch.no_grad():
            tensors = self._tensors(generator)
            if of_ranks:
                computed = dict(self.model.named_buffers()).keys() - self.model.state_dict().keys()
                wanted = tensors.keys() - {f"buffer.{name}" for name in computed}
                Pieces(path).read({name: Piece.all_of(tensors[name]) for name in wanted})
            else:
                train_state.read_tensors(path, about["files"], tensors)
            self.optimizer.steps.fill_(updates)
        self.optimizer.refresh()
        self.text.restore({**position, "generator": generator})

    def _tensors(self, generator: Tensor) -> dict[str, Tensor]:
        """All tensors that a step depends on, by their names in a checkpoint."""
        optimizer = self.optimizer
        state = {"master": optimizer.flat, "exp_avg": optimizer.exp_avg, "exp_avg_sq": optimizer.exp_avg_sq}
        if self.ema is not None:
            state["ema"] = self.ema.average
        tensors = {
            f"{kind}.{name}": tensor for kind, flat in state.items() for name, tensor in optimizer.named(flat).items()
        }
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.model.named_buffers()}
        return tensors | {"text.generator": generator}


@contextmanager
def _stopping(wanted: bool) -> Iterator[threading.Event]:
    """Set by Ctrl-C or SIGTERM, so that the current step is finished first; a second signal interrupts at once."""
    stopped = threading.Event()
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def handle(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _besides(out: Path) -> str:
    last = next(iter(train_state.checkpoints(out)), None)
    return f"the last good checkpoint is {last}" if last else ""


def _with_checkpoint(error: Exception, out: Path) -> Exception:
    """The same error, with the last good checkpoint named."""
    said, besides = str(error), _besides(out)
    if not besides or besides in said:
        return error
    again = type(error)(f"{said}; {besides}")
    if isinstance(error, OSError) and isinstance(again, OSError):
        again.errno = error.errno
    return again
