"""Which rows of a parameter a rank holds, and how all ranks together write them as a checkpoint.

Everything is divided along the first dimension: rows by FSDP2, experts over the expert ranks. Each rank writes its own
pieces in safetensors; `dskernels.model.train_pieces.read_pieces` reads them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dskernels.model.disk import flush, writing
from dskernels.model.train_pieces import PIECES, Piece
from dskernels.model.train_state import FOLDER, SHARD, STATE_FILE, checkpoints
from dskernels.model.writing import in_shards


def local(tensor: Tensor) -> Tensor:
    """The rows that this rank holds, detached, in the same memory and with the same version counter."""
    if isinstance(tensor, DTensor):
        with torch.no_grad():
            tensor = tensor.to_local()
    return tensor.detach()


def bounds(tensor: Tensor, part: int = 0, parts: int = 1) -> tuple[int, int]:
    """The first row that this rank holds of a parameter, and how many there are in all.

    Args:
        tensor: the parameter as the model has it.
        part: which of ``parts`` equal parts of the whole that is, as a rank has only its part of the experts.
        parts: how many parts there are.
    """
    first = 0
    if isinstance(tensor, DTensor):
        _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        first = offset[0]
    return part * tensor.shape[0] + first, parts * tensor.shape[0]


def write_pieces(
    run: Path, step: int, about: Mapping[str, Any], pieces: Mapping[str, Piece], *, keep: int, rank: int
) -> Path:
    """Write the checkpoint of a step; all ranks call it, each with its own pieces.

    As with one process, it is written under another name, flushed, and renamed when every rank is done. A rank copies
    the pieces of one file at a time to the host, at most `SHARD` bytes or one tensor.

    Args:
        run: the run's folder, which all ranks see.
        step: how many steps have been made.
        about: the content of ``state.json``, which rank 0 writes.
        pieces: by name. If several ranks hold the same rows, one of them writes these.
        keep: how many of the newest checkpoints to keep.
        rank: of this process.
    """
    path = run / FOLDER / f"step-{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        with writing(path):
            partial.mkdir(parents=True)
    dist.barrier()
    with writing(path):
        on_host = (
            (name, piece.rows.detach().to("cpu", copy=True)) for name, piece in pieces.items() if piece.rows.numel()
        )
        for number, tensors in enumerate(in_shards(on_host, SHARD), 1):
            file = partial / PIECES.format(rank, number)
            index = {name: [pieces[name].first, pieces[name].total] for name in tensors}
            file.with_suffix(".json").write_text(json.dumps(index), encoding="utf-8")
            save_file(tensors, file.with_suffix(".safetensors"))
            flush(file.with_suffix(".safetensors"))
            flush(file.with_suffix(".json"))
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
