"""What a run starts from, in one process or on many ranks: its weights, its text, the held-out text; and what tells it
from another run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dskernels.model.checkpoint import load_weights
from dskernels.model.config import Config
from dskernels.model.data import Batches, Corpus, Packed, document_lengths
from dskernels.model.model import DeepseekV3
from dskernels.model.token_file import fingerprint, largest_token
from dskernels.model.train_config import TrainConfig


def first_model(
    model_config: Config, config: TrainConfig, device: torch.device, dtype: torch.dtype, init: str | Path | None
) -> DeepseekV3:
    """The model before the first step: weights drawn from the seed, or read from a folder (see `load_weights`)."""
    fp8 = config.precision == "fp8"
    model = DeepseekV3(model_config, fp8=fp8, recompute=config.recompute, device="meta", dtype=dtype)
    model.to_empty(device=device)
    model.init_weights(torch.Generator(device).manual_seed(config.seed))
    if init is not None:
        load_weights(model, init)
    return model


def texts(data: Corpus, config: TrainConfig) -> tuple[Batches, list[Packed]]:
    """An endless iterator of micro-batches to train on, and the held-out ones of each validation, at most all of
    them."""
    tokens = config.batch_tokens // config.microbatches
    sizes = dict(batch_tokens=tokens, sequence_length=config.sequence_length, seed=config.seed)
    one_pass = -(-int(document_lengths(data.validation).sum()) // tokens)
    looks = min(config.validation_batches, one_pass)
    return Batches(data.train, **sizes), list(itertools.islice(Batches(data.validation, **sizes), looks))


def check(model_config: Config, data: Corpus, config: TrainConfig, checkpoint_every: int, keep: int) -> None:
    """Raise a ValueError if text, model and recipe do not fit each other, or a number of checkpoints is too small."""
    for name, value, least in (("checkpoint_every", checkpoint_every, 0), ("keep", keep, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    for name, documents, why in (
        ("train", data.train, "nothing to learn from"),
        ("validation", data.validation, "nothing held out"),
    ):
        if not document_lengths(documents).any():
            raise ValueError(f"data: {why}, {name} is empty")
    largest = max(largest_token(documents) for documents in data)
    if largest >= model_config.vocab_size:
        raise ValueError(f"data: token {largest} is not in the vocabulary of vocab_size = {model_config.vocab_size}")
    if config.sequence_length > model_config.max_position_embeddings:
        raise ValueError(
            f"sequence_length: {config.sequence_length} is more than the model's context, "
            f"max_position_embeddings = {model_config.max_position_embeddings}"
        )


def identity(model_config: Config, data: Corpus, config: TrainConfig, init: str | Path | None) -> dict[str, Any]:
    """What a checkpoint has to agree with: the recipe, the model and the text, as JSON stores them."""
    begun = {} if init is None else {"init": str(Path(init).resolve())}
    return dict(
        recipe=json.loads(json.dumps(dataclasses.asdict(config))) | begun,
        model=json.loads(json.dumps(model_config.to_hf())),
        text=dict(train=fingerprint(data.train), validation=fingerprint(data.validation)),
    )


def check_identity(path: Path, about: Mapping[str, Any], now: Mapping[str, Any], *, microbatches: bool) -> None:
    """Raise a ValueError if a checkpoint is of another run; the message says what differs.

    Args:
        path: the checkpoint, for the message.
        about: what its ``state.json`` contains.
        now: of the run that would go on from it, see `identity`.
        microbatches: whether their number has to agree too. Where ranks are involved it does not: each plan has its
            own, and the position in the text does not depend on it.
    """
    for kind, values in now.items():
        then = about.get(kind)
        for name in sorted({*values, *(then or {})}):
            if (kind, name) == ("recipe", "microbatches") and not microbatches:
                continue
            if not isinstance(then, dict) or then.get(name) != values.get(name):
                was = then.get(name) if isinstance(then, dict) else None
                raise ValueError(
                    f"{path}: another run, its {kind} has {name} = {was!r}, asked for is {values.get(name)!r} "
                    "(begin anew with resume=False or --restart, or in another folder, with these weights by --init)"
                )
