"""Checkpoints in pieces: consecutive rows of tensors, from which any number of processes reads those that it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
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


class Pieces:
    """Where the rows of every tensor of a checkpoint are, which one process wrote, or any number of ranks.

    Args:
        path: the checkpoint's folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: dict[str, list[_Place]] = {}
        files: dict[Path, dict[str, int] | None] = {path / name: None for name in read_about(path)["files"]}
        for index in sorted(path.glob("pieces-*.json")):
            files[index.with_suffix(".safetensors")] = _first_rows(index)
        for file, firsts in files.items():
            with _opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    first = 0 if firsts is None else firsts[name]  # the tensors of one process are whole
                    shape = opened.get_slice(name).get_shape()
                    self._places.setdefault(name, []).append(_Place(file, first, shape))

    def read(self, wanted: Mapping[str, Piece]) -> None:
        """Fill pieces, from the files that have some of their rows.

        Args:
            wanted: by the name of their tensor. What is read is converted to their type.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or rows are missing or have another shape; the message names the file or the
                checkpoint, and the tensor.
        """
        of_files: dict[Path, list[tuple[str, tuple[slice, slice]]]] = {}
        missing = {name: piece.rows.shape[0] for name, piece in wanted.items()}
        for name, piece in wanted.items():
            for file, first, shape in self._places.get(name, ()):
                if shape[1:] != list(piece.rows.shape[1:]):
                    raise ValueError(
                        f"{file}: tensor {name} has rows of shape {shape[1:]}, expected {list(piece.rows.shape[1:])}"
                    )
                found = piece.shared(first, first + shape[0])
                if found is not None:
                    of_files.setdefault(file, []).append((name, found))
                    missing[name] -= found[0].stop - found[0].start
        for name, rows in missing.items():
            if rows > 0:
                raise ValueError(f"{self.path}: {rows} rows of tensor {name} are missing")
        for file, found_there in of_files.items():
            with _opened(file) as opened:
                for name, (here, there) in found_there:
                    wanted[name].rows[here].copy_(opened.get_slice(name)[there])


class _Place(NamedTuple):
    """Some rows of a tensor: their file, the number of the first one, and the shape of them all."""

    file: Path
    first: int
    shape: list[int]


def _first_rows(index: Path) -> dict[str, int]:
    """The number of the first row of each tensor in a file of pieces."""
    try:
        return {name: int(first) for name, (first, _) in json.loads(index.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError, OSError):
        raise ValueError(f"{index}: not a list of pieces of tensors") from None


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file of tensors; what goes wrong with it is said in one line that names it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, KeyError) as error:
        raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None


class StoredTensor:
    """A tensor of a checkpoint in pieces, of which parts are read when they are asked for.

    Args:
        pieces: the checkpoint.
        name: of the tensor in it.
        like: a tensor of its shape, and of the type in which the parts are wanted; on the meta device as a rule.
    """

    def __init__(self, pieces: Pieces, name: str, like: Tensor) -> None:
        self.pieces, self.name, self.shape, self.dtype = pieces, name, like.shape, like.dtype

    def detach(self) -> StoredTensor:
        """Itself: it has no gradient."""
        return self

    def __getitem__(self, part: tuple[int | slice, ...]) -> Tensor:
        """A part of it, on the CPU."""
        first, *rest = part or (slice(None),)
        begin, end = (first, first + 1) if isinstance(first, int) else first.indices(self.shape[0])[:2]
        rows = torch.empty(end - begin, *self.shape[1:], dtype=self.dtype)
        self.pieces.read({self.name: Piece(rows, begin, self.shape[0])})
        within = (0 if isinstance(first, int) else slice(None), *rest)
        return rows[within]
