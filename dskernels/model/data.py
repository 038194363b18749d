"""Text as tokens: bytes, read from files, held out, and packed into batches of a fixed number of tokens."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

BOUNDARY = 256  # the token before and after every document; 0 to 255 are the bytes
VOCAB_SIZE = 257

# What lies among the standard library's sources and is not its code: packages of others, and tests (which many
# distributions leave out: without them the text is the same everywhere).
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Corpus(NamedTuple):
    """Documents to learn from and documents held out, each an int16 tensor of tokens."""

    train: list[Tensor]
    validation: list[Tensor]


class Packed(NamedTuple):
    """A batch: sequences one after the other.

    Attributes:
        tokens: int64 ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, sequence b is ``tokens[cu_seqlens[b]:cu_seqlens[b + 1]]``.
    """

    tokens: Tensor
    cu_seqlens: Tensor

    @property
    def predictions(self) -> Tensor:
        """How many tokens have a next one in their sequence, int64 ``[]``."""
        return (self.cu_seqlens.diff() - 1).clamp(min=0).sum()

    def to(self, device: torch.device | str) -> Packed:
        """The batch on another device."""
        return Packed(self.tokens.to(device), self.cu_seqlens.to(device))


def encode(text: str | bytes) -> list[int]:
    """The bytes of a text (UTF-8), one token each."""
    return list(text.encode() if isinstance(text, str) else text)


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens; boundaries are left out, bytes that are no UTF-8 become U+FFFD."""
    return bytes(token for token in tokens if token < BOUNDARY).decode(errors="replace")


def find_files(sources: Iterable[str | Path], pattern: str = "*") -> list[Path]:
    """The files of ``sources``: each itself if it is a file, else all below it whose names match, in a fixed order.

    Hidden files and folders are passed over.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: a folder has no such file.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_file():
            found.append(source)
            continue
        if not source.is_dir():
            raise FileNotFoundError(f"{source}: no such file or folder")
        below = sorted(path.relative_to(source) for path in source.rglob(pattern))
        shown = [path for path in below if not any(part.startswith(".") for part in path.parts)]
        files = [source / path for path in shown if (source / path).is_file()]
        if not files:
            raise ValueError(f"{source}: no file named {pattern} in this folder")
        found += files
    return found


def standard_library() -> list[Path]:
    """The Python standard library's own sources, on every machine that has Python.

    Raises:
        ValueError: this Python was installed without its sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = find_files([root], "*.py")
    return [path for path in files if NOT_LIBRARY_CODE.isdisjoint(path.relative_to(root).parts)]


def read_corpus(files: Iterable[str | Path], *, held_out: float = 0.05, seed: int = 0) -> Corpus:
    """Reads files as they are, byte for byte, and holds some out.

    Args:
        files: the documents. Empty ones are passed over.
        held_out: part of the documents, at least one, that is not learnt from. Of a single document it is the end.
        seed: decides which. The same files in the same order with the same seed give the same corpus.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: it cannot be read, there is too little text, or ``held_out`` is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a part between 0 and 1, got {held_out}")
    texts = [text for text in map(_read, map(Path, files)) if text]
    if len(texts) == 1:
        cut = round(len(texts[0]) * (1 - held_out))
        texts = [texts[0][cut:], texts[0][:cut]]
        order = [0, 1]
    else:
        order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    if len(texts) < 2 or not all(texts):
        raise ValueError("files: too little text to learn from one part of it and hold out another")
    documents = [_document(texts[i]) for i in order]
    validation = min(max(1, round(len(texts) * held_out)), len(texts) - 1)
    return Corpus(documents[validation:], documents[:validation])


def batches(documents: Sequence[Tensor], *, batch_tokens: int, sequence_length: int, seed: int = 0) -> Iterator[Packed]:
    """Batches of exactly ``batch_tokens`` tokens, without end.

    Documents are cut into sequences of at most ``sequence_length`` tokens, whose order is drawn anew for each pass over
    all of them. A sequence that a batch has no room for is cut once more, and its rest opens the next batch. No token
    of a pass is left out, and no sequence holds two documents.

    Args:
        documents: integer tensors of tokens.
        batch_tokens: tokens of a batch.
        sequence_length: the longest sequence.
        seed: decides the order.

    Raises:
        ValueError: there is no document, or a size is below 2 (a sequence of one token has nothing to predict).
    """
    if not any(len(document) for document in documents):
        raise ValueError("documents: expected at least one token, got none")
    for name, size in (("batch_tokens", batch_tokens), ("sequence_length", sequence_length)):
        if size < 2:
            raise ValueError(f"{name}: expected at least 2, got {size}")
    return _pack(documents, batch_tokens, sequence_length, torch.Generator().manual_seed(seed))


def _pack(documents: Sequence[Tensor], batch_tokens: int, length: int, generator: torch.Generator) -> Iterator[Packed]:
    sequences = [sequence for document in documents for sequence in document.split(length)]
    parts: list[Tensor] = []
    room = batch_tokens
    while True:
        for i in torch.randperm(len(sequences), generator=generator).tolist():
            rest = sequences[i]
            while len(rest):
                part, rest = rest[:room], rest[room:]
                parts.append(part)
                room -= len(part)
                if room == 0:
                    ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
                    yield Packed(torch.cat(parts).long(), ends.int())
                    parts, room = [], batch_tokens


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _document(text: bytes) -> Tensor:
    tokens = torch.full((len(text) + 2,), BOUNDARY, dtype=torch.int16)
    tokens[1:-1] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return tokens
