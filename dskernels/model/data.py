"""Text as tokens: bytes, read from files, partly held out, and packed into batches of a fixed number of tokens."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOUNDARY = 256  # the token before and after every document; 0 to 255 are the bytes
VOCAB_SIZE = 257

# Among the standard library's sources, but not its code: packages of others, and tests (which many distributions leave
# out; without them the text is the same everywhere).
NOT_LIBRARY_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test"}


class Corpus(NamedTuple):
    """Documents to train on and documents held out, each an integer tensor of tokens; see `read_corpus`.

    `dskernels.model.token_file` is for text that is larger than memory.
    """

    train: Sequence[Tensor]
    validation: Sequence[Tensor]


class Packed(NamedTuple):
    """A batch: sequences one after the other, without padding.

    Attributes:
        tokens: int64 ``[T]``.
        cu_seqlens: int32 ``[B + 1]``, sequence b is ``tokens[cu_seqlens[b]:cu_seqlens[b + 1]]``.
    """

    tokens: Tensor
    cu_seqlens: Tensor

    @property
    def predictions(self) -> Tensor:
        """How many tokens have a next token in their sequence, int64 ``[]``."""
        return (self.cu_seqlens.diff() - 1).clamp(min=0).sum()

    def to(self, device: torch.device | str) -> Packed:
        """The batch on another device; the host does not wait for a GPU."""
        return Packed(*(on_device(tensor, device) for tensor in self))


def on_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on another device; the host does not wait for a GPU."""
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def encode(text: str | bytes) -> list[int]:
    """The bytes of a text (UTF-8), one token each."""
    return list(text.encode() if isinstance(text, str) else text)


def decode(tokens: Iterable[int]) -> str:
    """The text of tokens; boundaries are left out, and bytes that are not UTF-8 become U+FFFD."""
    return bytes(token for token in tokens if token < BOUNDARY).decode(errors="replace")


def find_files(sources: Iterable[str | Path], pattern: str = "*") -> list[Path]:
    """The files that ``sources`` name, in a fixed order: a file, the matches of a glob (``"lib/**/*.py"``), or all
    files in a folder.

    Hidden files and folders are skipped.

    Raises:
        FileNotFoundError: a source does not exist, or a glob matches no file.
        ValueError: a folder contains no such file.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_file():
            found.append(source)
            continue
        if not source.is_dir():
            matches = [path for path in map(Path, sorted(glob.glob(str(source), recursive=True))) if path.is_file()]
            if not matches:
                raise FileNotFoundError(f"{source}: no such file or folder")
            found += matches
            continue
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
    """Read files as they are, byte for byte, and hold some out.

    Args:
        files: the documents. Empty ones are skipped.
        held_out: the fraction of the documents, at least one, that is not trained on. With a single document it is its
            end.
        seed: decides which. The same files in the same order with the same seed give the same corpus.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file cannot be read, there is too little text, or ``held_out`` is not between 0 and 1.
    """
    texts = [text for text in map(_read, map(Path, files)) if text]
    parts, validation = held_out_order([len(text) for text in texts], held_out, seed)
    documents = [_document(texts[i][begin:end]) for i, begin, end in parts]
    return Corpus(documents[validation:], documents[:validation])


def held_out_order(sizes: Sequence[int], held_out: float, seed: int) -> tuple[list[tuple[int, int, int]], int]:
    """Which texts to hold out, given their sizes, none of which is 0.

    Returns:
        Documents, each as the index of a text and where in it the document begins and ends; and how many of them, the
        first ones, are held out. Arguments and errors are those of `read_corpus`.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out: expected a part between 0 and 1, got {held_out}")
    if len(sizes) == 1:
        cut = round(sizes[0] * (1 - held_out))
        parts = [(0, cut, sizes[0]), (0, 0, cut)]
    else:
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
        parts = [(i, 0, sizes[i]) for i in order]
    if len(parts) < 2 or not all(begin < end for _, begin, end in parts):
        raise ValueError("files: too little text to learn from one part of it and hold out another")
    return parts, min(max(1, round(len(sizes) * held_out)), len(parts) - 1)


class Batches(Iterator[Packed]):
    """An endless iterator over batches of exactly ``batch_tokens`` tokens.

    Documents are cut into sequences of at most ``sequence_length`` tokens, whose order is drawn anew for each pass over
    the text. A sequence that does not fit into a batch is cut once more, and its rest opens the next batch. No token is
    left out, and no sequence contains two documents. It needs 16 bytes of memory for each sequence.

    Args:
        documents: integer tensors of tokens.
        batch_tokens: tokens in a batch.
        sequence_length: the longest sequence.
        seed: decides the order.

    Raises:
        ValueError: there is no document, or a size is below 2 (a sequence of one token has nothing to predict).
    """

    def __init__(self, documents: Sequence[Tensor], *, batch_tokens: int, sequence_length: int, seed: int = 0) -> None:
        for name, size in (("batch_tokens", batch_tokens), ("sequence_length", sequence_length)):
            if size < 2:
                raise ValueError(f"{name}: expected at least 2, got {size}")
        lengths = document_lengths(documents)
        if not lengths.any():
            raise ValueError("documents: expected at least one token, got none")
        self.documents, self.batch_tokens, self.length = documents, batch_tokens, sequence_length
        pieces = (lengths + sequence_length - 1) // sequence_length
        self._document = torch.repeat_interleave(torch.arange(len(pieces)), pieces)
        self._piece = torch.arange(len(self._document)) - (pieces.cumsum(0) - pieces)[self._document]
        self._generator = torch.Generator().manual_seed(seed)
        self._draw()

    def _draw(self) -> None:
        """Draw the order of the next pass."""
        self._drawn_from = self._generator.get_state()
        self._order = torch.randperm(len(self._document), generator=self._generator)
        self._next, self._taken = 0, 0  # the next sequence, and how many of its tokens are used up

    def __next__(self) -> Packed:
        parts: list[Tensor] = []
        room = self.batch_tokens
        while room:
            if self._next == len(self._order):
                self._draw()
            sequence = self._order[self._next]
            start = int(self._piece[sequence]) * self.length
            rest = self.documents[int(self._document[sequence])][start + self._taken : start + self.length]
            part = rest[:room]
            if len(part) < len(rest):
                self._taken += len(part)
            else:
                self._next, self._taken = self._next + 1, 0
            parts.append(part)
            room -= len(part)
        ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
        return Packed(torch.cat([part.long() for part in parts]), ends.int())

    def state(self) -> dict[str, Any]:
        """The position in the text: the numbers ``next`` and ``taken``, and ``generator``, the uint8 state from
        which this pass was drawn."""
        return dict(next=self._next, taken=self._taken, generator=self._drawn_from)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the position of another iterator over the same documents."""
        self._generator.set_state(state["generator"])
        self._draw()
        self._next, self._taken = int(state["next"]), int(state["taken"])


def document_lengths(documents: Sequence[Tensor]) -> Tensor:
    """Tokens of each document, int64."""
    lengths = getattr(documents, "lengths", None)
    return torch.tensor([len(document) for document in documents]).long() if lengths is None else lengths


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
