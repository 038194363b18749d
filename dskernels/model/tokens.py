"""Text to tokens and back for a checkpoint: its own tokenizer, or bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dskernels.model.config import Config
from dskernels.model.data import BOUNDARY, VOCAB_SIZE, decode, encode

# What a folder has for text, beside its weights.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tokenizer.model",
    "tiktoken.model",
)


class Tokenizer(Protocol):
    """What generating text needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""


class ByteTokenizer:
    """Bytes, after the boundary that starts a document."""

    def encode(self, text: str) -> list[int]:
        """The boundary, then the bytes of the text."""
        return [BOUNDARY, *encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes."""
        return decode(tokens)


class FileTokenizer:
    """A checkpoint's ``tokenizer.json``, read by the `tokenizers` package."""

    def __init__(self, file: Path) -> None:
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ImportError(f"{file} needs the package tokenizers: pip install 'dskernels[transformers]'") from None
        try:
            self.reader = Reader.from_file(str(file))
        except Exception as error:  # the package raises bare Exception for a damaged file
            raise ValueError(f"{file}: not a tokenizer ({error})") from None

    def encode(self, text: str) -> list[int]:
        """Tokens of a prompt, with what the tokenizer puts before it."""
        return self.reader.encode(text).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self.reader.decode(list(tokens))


def tokenizer_of(folder: Path, config: Config) -> Tokenizer:
    """The tokenizer of a checkpoint: its ``tokenizer.json``; without one, bytes where the vocabulary is that of bytes.

    Raises:
        FileNotFoundError: there is no ``tokenizer.json`` and the vocabulary is not that of bytes.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        return FileTokenizer(file)
    if config.vocab_size == VOCAB_SIZE:
        return ByteTokenizer()
    raise FileNotFoundError(f"{file}: no such file, and a vocabulary of {config.vocab_size} is not that of bytes")
