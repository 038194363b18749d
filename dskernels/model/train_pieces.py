"""Checkpoints in pieces: consecutive rows of tensors, from which any number of processes reads those that it holds."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dskernels.model.train_state import read_about

PIECES = "pieces-{:05d}-{:05d}"  # a rank, and which of its files


class Piece(NamedTuple):
    """Rows of a tensor.

    Attributes:
        rows: these rows, in the memory of the tensor that they belong to.
        first: the number of the first one.
        total: how many rows the whole tensor has.
    """

    rows: Tensor
    first: int
    total: int

    @classmethod
    def all_of(cls, tensor: Tensor) -> Piece:
        """Every row of a tensor."""
        return cls(tensor, 0, tensor.shape[0])

    def shared(self, begin: int, end: int) -> tuple[slice, slice] | None:
        """The rows that this piece has in common with rows ``begin`` to ``end`` of the tensor, counted in this piece
        and from ``begin``; None if there are none."""
        low, high = max(begin, self.first), min(end, self.first + self.rows.shape[0])
        if low >= high:
            return None
        return slice(low - self.first, high - self.first), slice(low - begin, high - begin)


def read_pieces(path: Path, wanted: Mapping[str, Piece]) -> None:
    """Fill pieces from a checkpoint that one process wrote, or any number of ranks.

    Args:
        path: the checkpoint's folder.
        wanted: the pieces by the name of their tensor, converted to their type; other tensors of the checkpoint are not
            read.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or rows are missing or have another shape; the message names the file or the
            checkpoint, and the tensor.
    """
    filled = dict.fromkeys(wanted, 0)
    for file, name, first, read in _stored(path):
        piece = wanted.get(name)
        if piece is None:
            continue
        rows, into = read(), piece.rows
        if rows.shape[1:] != into.shape[1:]:
            raise ValueError(
                f"{file}: tensor {name} has rows of shape {list(rows.shape[1:])}, expected {list(into.shape[1:])}"
            )
        found = piece.shared(first, first + rows.shape[0])
        if found is not None:
            here, there = found
            into[here].copy_(rows[there])
            filled[name] += here.stop - here.start
    for name, piece in wanted.items():
        if filled[name] < piece.rows.shape[0]:
            raise ValueError(f"{path}: {piece.rows.shape[0] - filled[name]} rows of tensor {name} are missing")


def _stored(path: Path) -> Iterable[tuple[Path, str, int, Callable[[], Tensor]]]:
    """File, name, first row, and what reads it, of each piece; the tensors of one process are whole."""
    files: dict[Path, dict[str, int] | None] = {path / name: None for name in read_about(path)["files"]}
    for index in sorted(path.glob("pieces-*.json")):
        try:
            firsts = {name: int(first) for name, (first, _) in json.loads(index.read_text(encoding="utf-8")).items()}
        except (ValueError, TypeError, AttributeError, OSError):
            raise ValueError(f"{index}: not a list of pieces of tensors") from None
        files[index.with_suffix(".safetensors")] = firsts
    for file, pieces in files.items():
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file")
        try:
            with safe_open(file, framework="pt") as opened:
                named = dict.fromkeys(opened.keys(), 0) if pieces is None else pieces
                for name, first in named.items():
                    yield file, name, first, functools.partial(opened.get_tensor, name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
