"""Checkpoints of a run: everything that the next step depends on, complete or absent.

They are safetensors and JSON: `torch.distributed.checkpoint` stores its metadata as a pickle, which can execute code
when it is read. A folder ``checkpoints/step-00000120`` has ``state.json`` and files of tensors, by parameter name: the
masters (the parameters are their rounded copy), both moments, the average if there is one, the router biases, and the
generator state from which the order of the text was drawn. Nothing else in a step is random.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dskernels.model.config import read_json
from dskernels.model.disk import flush, writing
from dskernels.model.writing import in_shards

FOLDER, STATE_FILE = "checkpoints", "state.json"
SHARD = 2_000_000_000  # bytes of a file, and of what the host holds while it is written


def checkpoints(run: str | Path) -> list[Path]:
    """The complete checkpoints of a run, newest first."""
    folder = Path(run) / FOLDER
    found = folder.iterdir() if folder.is_dir() else ()
    named = [path for path in found if re.fullmatch(r"step-\d{8,}", path.name) and (path / STATE_FILE).is_file()]
    return sorted(named, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def write_checkpoint(
    run: str | Path, step: int, about: Mapping[str, Any], tensors: Iterator[tuple[str, Tensor]], *, keep: int
) -> Path:
    """Write the checkpoint of a step, then remove all but the ``keep`` newest.

    It is written to a folder with another name, flushed to the disk, and renamed: whenever the machine stops, each
    folder that `checkpoints` finds is complete.

    Args:
        run: the run's folder.
        step: how many steps have been made.
        about: the content of ``state.json``.
        tensors: names and tensors, on any device; each is copied when its turn comes.
        keep: at least 1.

    Raises:
        OSError: such as a full disk. The checkpoints that were there remain.
    """
    last = next(iter(checkpoints(run)), None)
    besides = f"the last good checkpoint is {last}" if last else ""
    path = Path(run) / FOLDER / f"step-{step:08d}"
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path, besides):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            files: list[str] = []
            on_host = ((name, tensor.detach().to("cpu", copy=True)) for name, tensor in tensors)
            for shard in in_shards(on_host, SHARD):
                files.append(f"state-{len(files) + 1:05d}.safetensors")
                save_file(shard, partial / files[-1])
                flush(partial / files[-1])
            text = json.dumps({"step": step, "files": files, **about}, indent=2) + "\n"
            (partial / STATE_FILE).write_text(text, encoding="utf-8")
            flush(partial / STATE_FILE)
            flush(partial)
            shutil.rmtree(path, ignore_errors=True)
            os.replace(partial, path)
            flush(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for old in checkpoints(run)[keep:]:
        _remove(old)
    return path


def remove_checkpoints(run: str | Path) -> None:
    """Remove all checkpoints of a run, and the leftovers of an interrupted one."""
    for path in checkpoints(run):
        _remove(path)
    shutil.rmtree(Path(run) / FOLDER, ignore_errors=True)


def read_about(path: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``.

    Raises:
        ValueError: it is damaged.
    """
    about = read_json(path / STATE_FILE)
    files = about.get("files")
    if type(about.get("step")) is not int or not isinstance(files, list) or not all(type(f) is str for f in files):
        raise ValueError(f"{path / STATE_FILE}: not a description of a checkpoint")
    return about


def read_tensors(path: Path, files: list[str], into: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors to where they belong.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is damaged, or has other tensors than these; the message names it, and the tensor.
    """
    missing = set(into)
    for file in (path / name for name in files):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file{_without(path)}")
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    if name not in into:
                        raise ValueError(f"{file}: tensor {name} is not of this run")
                    tensor, target = opened.get_tensor(name), into[name]
                    if tensor.shape != target.shape or tensor.dtype != target.dtype:
                        raise ValueError(
                            f"{file}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, "
                            f"expected {target.dtype} {list(target.shape)}"
                        )
                    target.copy_(tensor)
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({' '.join(str(error).split())}){_without(path)}") from None
    if missing:
        raise ValueError(f"{path}: tensor {min(missing)} is missing{_without(path)}")


def _without(path: Path) -> str:
    """What a user can do about a damaged checkpoint: there may be an earlier one."""
    before = [other for other in checkpoints(path.parent.parent) if other != path]
    return f"; with {path} removed, the run goes on from {before[0]}" if before else ""


def _remove(path: Path) -> None:
    """Remove a checkpoint, beginning with the file that makes it one, so that half of one never counts."""
    (path / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
