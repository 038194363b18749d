"""Text to tokens for training: bytes, a ``tokenizer.json``, or a byte-level BPE trained on the text itself."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from dskernels.model.config import read_json
from dskernels.model.data import BOUNDARY, VOCAB_SIZE

END_OF_TEXT = "<|endoftext|>"  # the boundary of a tokenizer that is trained here
# For a tokenizer whose folder does not say what ends a text.
KNOWN_ENDS = (END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
SAMPLE = 100_000_000  # bytes that a tokenizer is trained on at most: merges do not change much after that


class Encoder(Protocol):
    """Text to tokens.

    Attributes:
        name: for people.
        vocab_size: number of tokens.
        boundary: the token between documents.
    """

    name: str
    vocab_size: int
    boundary: int

    def encode(self, texts: Sequence[bytes]) -> Sequence[Sequence[int] | numpy.ndarray]:
        """Tokens of pieces of documents."""

    def save(self, folder: Path) -> None:
        """Write the files that generating text needs, ``tokenizer.json`` and ``tokenizer_config.json``, if there are
        any."""


class ByteEncoder:
    """One token for each byte, and 256 between documents."""

    name, vocab_size, boundary = "bytes", VOCAB_SIZE, BOUNDARY

    def encode(self, texts: Sequence[bytes]) -> list[numpy.ndarray]:
        """The bytes."""
        return [numpy.frombuffer(text, "uint8") for text in texts]

    def save(self, folder: Path) -> None:
        """Nothing to write: a vocabulary of 257 tells it all."""


class FileEncoder:
    """A tokenizer of the package `tokenizers`. Bytes that are not UTF-8 are encoded as U+FFFD."""

    def __init__(self, reader: Any, boundary: str, name: str) -> None:
        self.reader, self.name, self.boundary_text = reader, name, boundary
        self.vocab_size = max(reader.get_vocab().values()) + 1
        self.boundary = reader.token_to_id(boundary)

    def encode(self, texts: Sequence[bytes]) -> list[list[int]]:
        """Tokens of pieces of text, without those that a tokenizer puts around a prompt."""
        decoded = [text.decode(errors="replace") for text in texts]
        return [encoding.ids for encoding in self.reader.encode_batch_fast(decoded, add_special_tokens=False)]

    def save(self, folder: Path) -> None:
        """Write both files; a prompt begins with the boundary, as documents do."""
        self.reader.save(str(folder / "tokenizer.json"))
        ends = dict(bos_token=self.boundary_text, eos_token=self.boundary_text, add_bos_token=True)
        about = dict(tokenizer_class="PreTrainedTokenizerFast", clean_up_tokenization_spaces=False, **ends)
        (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def encoder_of(name: str, files: Iterable[str | Path] = ()) -> Encoder:
    """The encoder that ``--tokenizer`` names.

    Args:
        name: "bytes", the path of a ``tokenizer.json``, or "train:8192" for a byte-level BPE of that many tokens.
        files: what to train on; the first 100 MB are taken.

    Raises:
        ValueError: the file is no tokenizer, has no token that ends a text, or the number is none.
        FileNotFoundError: there is no such file.
        ImportError: the package `tokenizers` is missing.
    """
    if name == "bytes":
        return ByteEncoder()
    if name.startswith("train:"):
        size = name.removeprefix("train:")
        if not size.isdecimal() or int(size) < VOCAB_SIZE:
            raise ValueError(f"tokenizer: expected train:N with N at least {VOCAB_SIZE}, got {name!r}")
        return train_bpe(files, int(size))
    path = Path(name)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file (a tokenizer is bytes, train:N, or a tokenizer.json)")
    package = _tokenizers()
    try:
        reader = package.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception for a damaged file
        raise ValueError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from None
    return FileEncoder(reader, _end_of(path, reader), str(path))


def train_bpe(files: Iterable[str | Path], vocab_size: int) -> FileEncoder:
    """A byte-level BPE of ``vocab_size`` tokens: the 256 bytes, what ends a text, and the merges seen most often."""
    package = _tokenizers()
    reader = package.Tokenizer(package.models.BPE())
    reader.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    reader.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(package.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    reader.train_from_iterator(_sample(files), trainer)
    # A prompt begins as a document does, for every reader of the file.
    reader.post_processor = package.processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B:1",
        special_tokens=[(END_OF_TEXT, reader.token_to_id(END_OF_TEXT))],
    )
    return FileEncoder(reader, END_OF_TEXT, f"byte-level BPE of {reader.get_vocab_size():,} tokens")


def _sample(files: Iterable[str | Path]) -> Iterator[str]:
    left = SAMPLE
    for path in map(Path, files):
        try:
            with path.open("rb") as file:
                text = file.read(left)
        except OSError as error:
            raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
        left -= len(text)
        yield text.decode(errors="replace")
        if left <= 0:
            return


def _end_of(path: Path, reader: Any) -> str:
    """The token that ends a text, according to the file beside the tokenizer, or else by its name."""
    said = read_json(path.with_name("tokenizer_config.json")).get("eos_token")
    said = said.get("content") if isinstance(said, dict) else said
    for text in (said, *KNOWN_ENDS):
        if isinstance(text, str) and reader.token_to_id(text) is not None:
            return text
    raise ValueError(f"{path}: no token that ends a text, and no tokenizer_config.json beside it that names one")


def _tokenizers() -> Any:
    try:
        import tokenizers

        return tokenizers
    except ImportError:
        raise ImportError("--tokenizer needs the package tokenizers: pip install 'dskernels[tokenizers]'") from None
