"""The safetensors files of a folder: all headers are checked before any data is read, and tensors are mapped from
disk."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library
# Other types keep the names that they have in the file; they cannot be read.
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
}


class Stored(NamedTuple):
    """What a header says about a tensor.

    Attributes:
        file: the file that contains it.
        dtype: torch's, or the file's own name of a type that cannot be read.
        shape: sizes.
        nbytes: bytes in the file.
        begin: offset of the data behind the header.
    """

    file: Path
    dtype: torch.dtype | str
    shape: list[int]
    nbytes: int
    begin: int


class Shards(Mapping[str, Stored]):
    """The tensors of a folder by name, whichever file they are in.

    A file is mapped when its first tensor is read, and unmapped by `close`: after that, what was read of it no longer
    counts as memory of this process.

    Raises:
        FileNotFoundError: there are no weights, or a file of the index does not exist.
        ValueError: the index or a file is damaged, or they contradict each other. The message is one line that names
            the file and, if it is known, the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[Path, Any] = {}
        index, single = folder / INDEX_FILE, folder / SINGLE_FILE
        if index.is_file():
            promised = _read_index(index)
        elif single.is_file():
            promised = {single: []}
        else:
            raise FileNotFoundError(f"{folder}: neither {INDEX_FILE} nor {SINGLE_FILE}")
        self._stored: dict[str, Stored] = {}
        self.unlisted: dict[str, Path] = {}  # in a file, but not in the index
        for file, names in promised.items():
            there = read_header(file, names[0] if names else None)
            for name in names:
                if name not in there:
                    raise ValueError(f"{file}: tensor {name} is missing, {INDEX_FILE} says that it is in this file")
            listed = set(names) if names else there.keys()
            self._stored.update({name: stored for name, stored in there.items() if name in listed})
            self.unlisted.update(dict.fromkeys(there.keys() - listed, file))

    def __getitem__(self, name: str) -> Stored:
        if name not in self._stored:
            raise ValueError(f"{self.folder}: tensor {name} is missing, no file has it")
        return self._stored[name]

    def __iter__(self) -> Any:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU: a view of the file, valid until the file is closed."""
        file = self[name].file
        try:
            if file not in self._open:
                self._open[file] = safe_open(file, framework="pt")
            return self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: tensor {name} cannot be read ({_line(error)})") from None

    def close(self, keep: Iterable[Path] = ()) -> None:
        """Unmap every file except those in ``keep``."""
        for file in self._open.keys() - set(keep):
            del self._open[file]


def read_header(file: Path, promised: str | None = None) -> dict[str, Stored]:
    """Read the header of a safetensors file, and check that the file is complete.

    Args:
        file: the file.
        promised: a tensor that should be in it, named in the message if the file is too damaged to name one itself.
    """
    who = f", tensor {promised} cannot be read" if promised else ""
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LARGEST_HEADER + 1
            text = opened.read(length) if length <= LARGEST_HEADER else b""
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: no such file{who}") from None
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}{who}") from None
    if len(text) < length:
        raise ValueError(f"{file}: truncated or not a safetensors file ({size:,} bytes){who}")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _read_entry(file, entry) for name, entry in header.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{file}: not a safetensors file (its header is not one){who}") from None
    end = 0
    for name, (stored, stop) in sorted(tensors.items(), key=lambda item: (item[1][0].begin, item[1][1])):
        if stored.begin != end or stop - end != stored.nbytes:
            raise ValueError(f"{file}: tensor {name} has a wrong place or size in the header")
        end = stop
        if 8 + length + end > size:
            raise ValueError(f"{file}: truncated, tensor {name} ends at byte {8 + length + end:,} of {size:,}")
    if 8 + length + end < size:
        raise ValueError(f"{file}: not a safetensors file ({size - 8 - length - end:,} bytes after the last tensor)")
    return {name: stored for name, (stored, _) in tensors.items()}


def _read_entry(file: Path, entry: Mapping[str, Any]) -> tuple[Stored, int]:
    """A tensor of a header, and the offset of its end."""
    begin, stop = (int(place) for place in entry["data_offsets"])
    shape, name = [int(size) for size in entry["shape"]], str(entry["dtype"])
    if min((*shape, begin, stop - begin)) < 0:
        raise ValueError
    dtype = DTYPES.get(name)
    nbytes = stop - begin if dtype is None else math.prod(shape) * dtype.itemsize
    return Stored(file, dtype or name, shape, nbytes, begin), stop


def _read_index(index: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each file."""
    files: dict[Path, list[str]] = {}
    try:
        for name, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise ValueError
            files.setdefault(index.parent / file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        raise ValueError(f"{index}: not an index of tensors (JSON with a weight_map to files beside it)") from None
    if not files:
        raise ValueError(f"{index}: not an index of tensors (its weight_map is empty)")
    return files


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
