"""What a run starts from, in one process or on many ranks: its weights, its text, and the held-out text."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch

from dskernels.model.checkpoint import load_weights
from dskernels.model.config import Config
from dskernels.model.data import Batches, Corpus, Packed, document_lengths
from dskernels.model.model import DeepseekV3
from dskernels.model.token_file import largest_token
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


def check(model_config: Config, data: Corpus, config: TrainConfig) -> None:
    """Raise a ValueError if text, model and recipe do not fit each other."""
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
