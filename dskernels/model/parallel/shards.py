"""What a rank holds of a parameter, and checkpoints made of such pieces, which any other number of ranks can read.

Everything is spread along the first dimension: rows by FSDP2, experts over the expert ranks. A piece is so many rows of
a tensor from some row on; each rank writes its own, in safetensors, and reads those that it will hold.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dskernels.model.disk import flush, writing
from dskernels.model.train_state import FOLDER, STATE_FILE, checkpoints

PIECES = "pieces-{:05d}"


class Piece(NamedTuple):
    """Rows of a tensor.

    Attributes:
        rows: these rows, in the memory of what they are of.
        first: the number of the first.
        total: how many the whole tensor has.
    """

    rows: Tensor
    first: int
    total: int


def local(tensor: Tensor) -> Tensor:
    """The rows of this rank, detached, in the same memory and with the same version."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.detach()


def bounds(tensor: Tensor, part: int = 0, parts: int = 1) -> tuple[int, int]:
    """The first row that this rank holds of a parameter, and how many there are in all.

    Args:
        tensor: as the model has it.
        part: which of `parts` equal ones of the whole it is already, as the experts of a rank are.
        parts: of how many.
    """
    first = 0
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first = offset[0]
    return part * tensor.shape[0] + first, parts * tensor.shape[0]


def write_pieces(
    run: Path, step: int, about: Mapping[str, Any], pieces: Mapping[str, Piece], *, keep: int, rank: int
) -> Path:
    """Writes the checkpoint of a step; all ranks call it, each with what it is to write.

    As with one process it is written under another name, flushed, and renamed when every rank is done.

    Args:
        run: the run's folder, which all ranks see.
        step: how many steps have been made.
        about: what ``state.json`` is to hold, from rank 0.
        pieces: by name. What several ranks hold, one of them writes.
        keep: checkpoints that stay.
        rank: of this process.
    """
    path = run / FOLDER / f"step-{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        with writing(path):
            partial.mkdir(parents=True)
    dist.barrier()
    name = PIECES.format(rank)
    with writing(path):
        tensors = {key: piece.rows.detach().to("cpu", copy=True) for key, piece in pieces.items() if piece.rows.numel()}
        save_file(tensors, partial / f"{name}.safetensors")
        index = {key: [pieces[key].first, pieces[key].total] for key in tensors}
        (partial / f"{name}.json").write_text(json.dumps(index), encoding="utf-8")
        flush(partial / f"{name}.safetensors")
        flush(partial / f"{name}.json")
    dist.barrier()
    if rank == 0:
        with writing(path):
            text = json.dumps({"step": step, "files": [], **about}, indent=2) + "\n"
            (partial / STATE_FILE).write_text(text, encoding="utf-8")
            flush(partial / STATE_FILE)
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
            flush(path.parent)
        for old in checkpoints(run)[keep:]:
            (old / STATE_FILE).unlink(missing_ok=True)
            shutil.rmtree(old, ignore_errors=True)
    dist.barrier()
    return path


def read_pieces(path: Path, wanted: Mapping[str, Piece]) -> None:
    """Fills pieces from a checkpoint that any number of ranks wrote.

    Raises:
        ValueError: rows of one are missing, or of another shape; the message names it.
    """
    filled = dict.fromkeys(wanted, 0)
    for file, name, first, read in _stored(path):
        piece = wanted.get(name)
        if piece is None:
            continue
        rows = read()
        begin, end = max(first, piece.first), min(first + rows.shape[0], piece.first + piece.rows.shape[0])
        if begin >= end:
            continue
        if rows.shape[1:] != piece.rows.shape[1:]:
            raise ValueError(f"{file}: {name} is {list(rows.shape)}, expected {list(piece.rows.shape)}")
        piece.rows[begin - piece.first : end - piece.first].copy_(rows[begin - first : end - first])
        filled[name] += end - begin
    for name, piece in wanted.items():
        if filled[name] < piece.rows.shape[0]:
            raise ValueError(f"{path}: {piece.rows.shape[0] - filled[name]} rows of {name} are missing")


def whole_tensors(path: Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor whose name begins so, put together, by the rest of its name."""
    parts: dict[str, dict[int, Tensor]] = {}
    for _, name, first, read in _stored(path):
        if name.startswith(prefix):
            parts.setdefault(name.removeprefix(prefix), {})[first] = read()
    return {name: torch.cat([rows[first] for first in sorted(rows)]) for name, rows in parts.items()}


def _stored(path: Path) -> Iterable[tuple[Path, str, int, Callable[[], Tensor]]]:
    """File, name, first row, and how to read it, of each piece."""
    for index in sorted(path.glob("pieces-*.json")):
        file = index.with_suffix(".safetensors")
        with safe_open(file, framework="pt") as opened:
            for name, (first, _) in json.loads(index.read_text(encoding="utf-8")).items():
                yield file, name, first, functools.partial(opened.get_tensor, name)
