"""Text that is tokenised once, into a file that is memory-mapped: what a long run trains on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy
import torch
from torch import Tensor

from dskernels.model.config import read_json
from dskernels.model.data import Corpus, held_out_order
from dskernels.model.disk import writing
from dskernels.model.encoders import Encoder

TOKENS_FILE, ENDS_FILE, ABOUT_FILE = "tokens.bin", "documents.bin", "tokens.json"
PIECE = 1 << 20  # bytes of a text that are encoded in one go
BATCH = 1 << 24  # bytes encoded at a time, on all cores: one by one, 31 MB of Python take 30 s
DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}


class Documents(Sequence[Tensor]):
    """Documents, one after the other, in one tensor, which may be a mapped file.

    Args:
        tokens: integers.
        lengths: int64, the number of tokens of each document; they add up to all tokens.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor) -> None:
        self.tokens, self.lengths = tokens, lengths
        self._ends = lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        end = int(self._ends[index])
        return self.tokens[end - int(self.lengths[index]) : end]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))


def write_tokens(
    files: Iterable[str | Path],
    folder: str | Path,
    encoder: Encoder,
    *,
    held_out: float = 0.05,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Corpus:
    """Tokenise files, hold some out, and map the result.

    ``folder`` gets ``tokens.bin`` (uint16, or uint32 for a vocabulary above 65,536: first the documents to train on,
    then those held out, each between two boundary tokens), ``documents.bin`` (int64, their lengths), ``tokens.json``,
    and the tokenizer. They are first written under other names, so that an interruption leaves what was there before.
    At most one document's text is in memory at a time.

    Args:
        files: the documents. Empty ones are skipped.
        folder: created if it does not exist; its content is replaced.
        encoder: text to tokens, see `dskernels.model.encoders`.
        held_out: as for `read_corpus`, which holds out the same documents.
        seed: as for `read_corpus`.
        progress: called with the bytes encoded and their total.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read or is not text, or there is too little text; the message names it.
        OSError: the disk is full; the message names the file.
    """
    folder = Path(folder)
    sized = [(path, _size(path)) for path in map(Path, files)]
    sized = [(path, size) for path, size in sized if size]
    parts, n_validation = held_out_order([size for _, size in sized], held_out, seed)
    total = sum(size for _, size in sized)
    dtype = "uint16" if encoder.vocab_size <= 1 << 16 else "uint32"
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(partial):
            partial.mkdir(parents=True)
            encoder.save(partial)
            # The documents to train on come first in the file, as in `Corpus`.
            ordered = [(sized[i][0], begin, end) for i, begin, end in (*parts[n_validation:], *parts[:n_validation])]
            with (partial / TOKENS_FILE).open("wb") as file:
                lengths, largest = _write(ordered, file, encoder, dtype, total, progress)
            (partial / ENDS_FILE).write_bytes(lengths.tobytes())
            about = dict(
                dtype=dtype,
                documents=len(lengths),
                held_out=n_validation,
                tokens=int(lengths.sum()),
                bytes=total,
                largest=largest,
                vocab_size=encoder.vocab_size,
                boundary=encoder.boundary,
                tokenizer=encoder.name,
            )
            (partial / ABOUT_FILE).write_text(json.dumps(about, indent=2) + "\n")
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return read_tokens(folder)


def read_tokens(folder: str | Path) -> Corpus:
    """Map what `write_tokens` wrote.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file does not fit the others; the message names it.
    """
    folder = Path(folder)
    about_file = folder / ABOUT_FILE
    for name in (ABOUT_FILE, TOKENS_FILE, ENDS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name}: no such file")
    about = read_json(about_file)
    try:
        dtype, documents = DTYPES[about["dtype"]], int(about["documents"])
        n_validation, total = int(about["held_out"]), int(about["tokens"])
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{about_file}: not a description of tokens") from None
    for name, size in ((TOKENS_FILE, total * dtype.itemsize), (ENDS_FILE, 8 * documents)):
        there = (folder / name).stat().st_size
        if there != size:
            raise ValueError(f"{folder / name}: {there:,} bytes, {ABOUT_FILE} promises {size:,}")
    lengths = torch.from_numpy(numpy.fromfile(folder / ENDS_FILE, "int64"))
    if int(lengths.sum()) != total or not 0 < n_validation < documents:
        raise ValueError(f"{folder / ENDS_FILE}: lengths that {ABOUT_FILE} does not promise")
    tokens = torch.from_file(str(folder / TOKENS_FILE), shared=False, size=total, dtype=dtype)
    first = documents - n_validation
    learnt = int(lengths[:first].sum())
    return Corpus(Documents(tokens[:learnt], lengths[:first]), Documents(tokens[learnt:], lengths[first:]))


def is_token_folder(path: str | Path) -> bool:
    """Whether a folder contains tokens rather than text."""
    return (Path(path) / ABOUT_FILE).is_file()


def largest_token(documents: Sequence[Tensor]) -> int:
    """The largest token of all documents, -1 if there is none."""
    if isinstance(documents, Documents):
        pieces = documents.tokens.split(1 << 24)
        return max((int(piece.view(-1).to(torch.int64).max()) for piece in pieces if len(piece)), default=-1)
    return max((int(document.max()) for document in documents if len(document)), default=-1)


def fingerprint(documents: Sequence[Tensor]) -> str:
    """A number that differs, except by accident, if documents do: a hash of their lengths and first 1,024 tokens."""
    value = len(documents)
    for document in documents:
        weights = torch.arange(1, min(len(document), 1024) + 1)
        here = int((document[:1024].long() * weights).sum())
        value = (value * 1_000_003 + len(document) * 8191 + here) % (2**61 - 1)
    return f"{value:016x}"


def _write(
    documents: Sequence[tuple[Path, int, int]],
    file: BinaryIO,
    encoder: Encoder,
    dtype: str,
    total: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[numpy.ndarray, int]:
    """Write the tokens of parts of files; returns the length of each, and the largest token."""
    lengths, largest = numpy.zeros(len(documents), "int64"), encoder.boundary
    boundary = numpy.array([encoder.boundary], dtype)
    waiting: list[tuple[int, bytes]] = []
    size, done, document = 0, 0, -1

    def encode() -> None:
        nonlocal size, done, document, largest
        for (i, text), ids in zip(waiting, encoder.encode([text for _, text in waiting]), strict=True):
            if i != document:
                file.write(boundary.repeat(2 if document >= 0 else 1).data)  # end of one, start of the next
                lengths[i], document = 2, i
            tokens = numpy.asarray(ids, dtype)
            file.write(tokens.data)  # numpy's tofile does not say why a disk accepted less
            lengths[i] += len(tokens)
            largest = max(largest, int(tokens.max(initial=0)))
            done += len(text)
        waiting.clear()
        size = 0
        if progress is not None:
            progress(min(done, total), total)

    for i, part in enumerate(documents):
        for text in _pieces(*part):
            waiting.append((i, text))
            size += len(text)
            if size >= BATCH:
                encode()
    encode()
    file.write(boundary.data)
    return lengths, largest


def _size(path: Path) -> int:
    try:
        size = path.stat().st_size
        if path.is_dir():
            raise IsADirectoryError(21, "Is a directory")
        return size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _pieces(path: Path, begin: int, end: int) -> Iterator[bytes]:
    """The bytes of a file between two offsets, about a MiB at a time, cut after a line if there are lines."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            place, rest = begin, b""
            while place < end:
                block = file.read(min(PIECE, end - place))
                if not block:
                    break
                if (zero := block.find(b"\0")) >= 0:
                    raise ValueError(
                        f"{path}: binary, not text (byte {place + zero:,} is zero); a pattern such as "
                        f"'{path.parent}/**/*.txt' leaves it out"
                    )
                place += len(block)
                block = rest + block
                cut = len(block) if place >= end else block.rfind(b"\n") + 1
                if cut:
                    yield block[:cut]
                rest = block[cut:]
            if rest:
                yield rest
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
