"""Initial weights on many ranks: each rank draws or reads the rows that it holds, and never has the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dskernels.model.checkpoint import load_weights
from dskernels.model.config import Config
from dskernels.model.model import DeepseekV3
from dskernels.model.parallel.optimizer import first_row
from dskernels.model.parallel.plan import Team
from dskernels.model.parallel.shards import local
from dskernels.model.train_pieces import Piece

DRAWN = 1 << 22  # numbers that are drawn at a time: 16 MiB
# torch's CPU generator makes normal numbers 16 at a time, and the last 16 of a tensor again if its size is no multiple
# of 16. So a tensor can be drawn in parts with the same values, if every part but the last is a multiple of 16 and the
# last has at least 16 numbers.
AT_ONCE = 16

BIAS = "e_score_correction_bias"


def held(modules: Iterable[nn.Module], team: Team) -> dict[str, Piece]:
    """The parameters and the router biases of which this rank holds rows, by their names in the whole model.

    Args:
        modules: a model that has been spread over the ranks, or the stages of a pipeline.
        team: the ranks.
    """
    pieces: dict[str, Piece] = {}
    for module in modules:
        for name, parameter in module.named_parameters():
            pieces[name] = Piece(local(parameter), *first_row(team, name, parameter))
        pieces |= biases(module)
    return pieces


def biases(module: nn.Module) -> dict[str, Piece]:
    """The biases of a model's routers by name, which every rank that has the layer holds whole."""
    return {name: Piece.all_of(buffer) for name, buffer in module.named_buffers() if name.endswith(BIAS)}


@torch.no_grad()
def fill(pieces: Mapping[str, Piece], config: Config, *, seed: int, init: str | Path | None) -> None:
    """Give what this rank holds its initial values.

    Without ``init`` they are those of `DeepseekV3.init_weights` in fp32 on a CPU, rounded to the type of the pieces:
    every rank draws all numbers of the model in the same order, `DRAWN` at a time, and keeps its own. That takes 3.4 ns
    for each number of the model, on one core.

    Args:
        pieces: see `held`.
        config: of the whole model.
        seed: of the generator.
        init: the folder of a model in the Hugging Face layout, of which only what this rank holds is read.

    Raises:
        FileNotFoundError: see `load_weights`.
        ValueError: likewise.
    """
    whole = DeepseekV3(config, device="meta", dtype=torch.float32)
    if init is not None:
        load_weights(whole, init, into=pieces)
        return
    generator, numbers = torch.Generator().manual_seed(seed), torch.empty(DRAWN + AT_ONCE)
    for name, parameter, is_drawn in whole.initial_parameters():
        piece = pieces.get(name)
        if is_drawn:
            _draw(parameter.shape, piece, config.initializer_range, generator, numbers)
        elif piece is not None:
            piece.rows.fill_(1.0)
    for name, piece in pieces.items():
        if name.endswith(BIAS):
            piece.rows.zero_()


def _draw(
    shape: torch.Size, piece: Piece | None, deviation: float, generator: torch.Generator, numbers: Tensor
) -> None:
    """Draw a tensor of this shape in parts, and keep the rows of the piece."""
    size, row = shape.numel(), shape[1:].numel()
    mine = None if piece is None else Piece(piece.rows.view(-1), piece.first * row, size)
    begin = 0
    while begin < size:
        end = begin + DRAWN if size - begin >= DRAWN + AT_ONCE else size
        part = numbers[: end - begin].normal_(0.0, deviation, generator=generator)
        found = None if mine is None else mine.shared(begin, end)
        if mine is not None and found is not None:
            here, there = found
            mine.rows[here].copy_(part[there])
        begin = end
