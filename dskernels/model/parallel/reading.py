"""A checkpoint for generation on many ranks: each rank reads its experts, and one block after the other."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from dskernels.device import free_memory
from dskernels.model.checkpoint import Progress, Reader, clear_filling, fp8_block_of, load
from dskernels.model.config import read_json
from dskernels.model.fp8_weights import SCALE_SUFFIX, write_out_for_decode
from dskernels.model.hf_names import Entry, entries
from dskernels.model.model import DeepseekV3
from dskernels.model.parallel.decode import blocks_of, check_division, divide, experts_of
from dskernels.model.parallel.plan import Team
from dskernels.model.shards import Shards


@torch.no_grad()
def load_divided(
    folder: str | Path,
    team: Team,
    *,
    dtype: torch.dtype | None = None,
    fp8: bool = False,
    mtp: bool | None = None,
    progress: Progress | None = None,
) -> DeepseekV3:
    """What `load` and then `parallelize_decode` make, without the whole model on any rank.

    A rank reads the routed experts that are its own, and all else. It does so block by block on its host, and moves its
    part of a block to its device before it reads the next one.

    Args:
        folder: see `load`.
        team: ranks of a plan of ``tensor`` alone.
        dtype: see `load`.
        fp8: likewise; weights stay in e4m3.
        mtp: likewise.
        progress: called with the number of bytes that this rank has read, and of those that it reads in all.

    Raises:
        FileNotFoundError: as `load`.
        ValueError: as `load` and `parallelize_decode`, before any weight is read.
        torch.OutOfMemoryError: this rank's part does not fit in the memory of its device.
    """
    folder = Path(folder)
    model = load(folder, device="meta", dtype=dtype, fp8=fp8, mtp=mtp)
    check_division(model, team)
    _check_memory(model, team, folder)
    raw, shards = read_json(folder / "config.json"), Shards(folder)
    of_block = _by_block(model, team, shards, fp8)
    copies = [entry for entry in of_block[""] if entry.copy]
    total, done = sum(_size(entry, shards) for found in of_block.values() for entry in found if not entry.copy), 0
    for name, module in model.named_children():
        if name not in ("layers", "mtp"):
            module.to_empty(device=team.device)

    def fill(found: list[Entry]) -> Reader:
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        reader = Reader(shards, tensors, fp8_block_of(raw, folder, fp8), model)
        nonlocal done
        for entry in found:
            reader.fill(entry)
            done += _size(entry, shards)
            if progress is not None:
                progress(done, total)
        shards.close()
        return reader

    whole = fill([entry for entry in of_block[""] if not entry.copy])
    for entry in copies:
        whole.compare(entry)
    for name, block in blocks_of(model):
        block.to_empty(device="cpu")  # memory of experts that are not filled is never touched, so it costs nothing
        if fp8:
            clear_filling(model.config, dict(block.named_parameters()))
        fill(of_block[name])
        divide(block, team)
        block.to(team.device)
    shards.close()
    write_out_for_decode(model)
    return model


def _by_block(model: DeepseekV3, team: Team, shards: Shards, fp8: bool) -> dict[str, list[Entry]]:
    """The tensors that this rank reads, by the block of their parameter; "" has those of no block."""
    own = experts_of(model.config.n_routed_experts, team.place("tensor"), team.plan.tensor)
    found: dict[str, list[Entry]] = {"": [], **{name: [] for name, _ in blocks_of(model)}}
    for entry in entries(model.config, kept_in_fp8=fp8):
        expert = entry.part[0] if entry.part else None
        if entry.copy and entry.name not in shards:
            continue
        if not isinstance(expert, int) or expert in range(own.start, own.stop):
            block = ".".join(entry.parameter.split(".")[:2])
            found[block if block in found else ""].append(entry)
    return found


def _size(entry: Entry, shards: Shards) -> int:
    """Bytes of a tensor and its scales in the files."""
    names = entry.name, entry.name + SCALE_SUFFIX
    return sum(shards[name].nbytes for name in names if name in shards)


def _check_memory(model: DeepseekV3, team: Team, folder: Path) -> None:
    """Raise if this rank's part does not fit on its device."""
    part = copy.deepcopy(model)
    for _, block in blocks_of(part):
        divide(block, team)
    needed = sum(tensor.nbytes for tensor in (*part.parameters(), *part.buffers()))
    free = free_memory(team.device)
    if free is not None and needed > free:
        raise torch.OutOfMemoryError(
            f"{folder}: the weights of a rank take {needed / 1e9:,.1f} GB, {team.device} has {free / 1e9:,.1f} GB free"
        )
