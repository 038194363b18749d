"""Text to tokens and back for a checkpoint: its own tokenizer, or bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from dskernels.model.chat import special_tokens
from dskernels.model.config import Config, read_json
from dskernels.model.data import BOUNDARY, VOCAB_SIZE, decode, encode
from dskernels.model.tiktoken import TiktokenTokenizer

# The files that a folder has for text, in addition to its weights.
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
    """The interface that generating text needs of a tokenizer."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; with ``special``, those that the tokenizer puts before a prompt come first."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""


class ByteTokenizer:
    """Bytes, preceded by the boundary token that starts a document."""

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The boundary if ``special``, then the bytes of the text."""
        return [*([BOUNDARY] if special else []), *encode(text)]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes."""
        return decode(tokens)


class FileTokenizer:
    """A checkpoint's ``tokenizer.json``, read by the `tokenizers` package.

    If ``tokenizer_config.json`` asks for it (``add_bos_token``, as in DeepSeek-V3), a prompt begins with the token that
    starts a text, even if ``tokenizer.json`` does not put it there.
    """

    def __init__(self, file: Path) -> None:
        try:
            from tokenizers import Tokenizer as Reader
        except ImportError:
            raise ImportError(f"{file} needs the package tokenizers: pip install 'dskernels[transformers]'") from None
        try:
            self.reader = Reader.from_file(str(file))
        except Exception as error:  # the package raises bare Exception for a damaged file
            raise ValueError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from None
        self.bos: list[int] = []
        if read_json(file.parent / "tokenizer_config.json").get("add_bos_token") is True:
            token = special_tokens(file.parent).get("bos_token")
            known = None if token is None else self.reader.token_to_id(token)
            if known is None:
                raise ValueError(f"{file}: add_bos_token is set and its bos_token {token!r} is not a token")
            self.bos = [known]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; with ``special``, those of a prompt, including what precedes it."""
        ids: list[int] = self.reader.encode(text, add_special_tokens=special).ids
        return self.bos + ids if special and ids[:1] != self.bos else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self.reader.decode(list(tokens))


def tokenizer_of(folder: str | Path, config: Config) -> Tokenizer:
    """The tokenizer of a checkpoint: ``tokenizer.json``, else ``tiktoken.model``, else bytes if the vocabulary allows
    it.

    Args:
        folder: of the checkpoint.
        config: of its model.

    Returns:
        An object with ``encode(text) -> tokens`` and ``decode(tokens) -> text``.

    Raises:
        FileNotFoundError: neither file exists, and the vocabulary is not that of bytes.
        ValueError: the file is damaged, or it has tokens that the model does not have.
        ImportError: the package `tokenizers`, or `tiktoken`, is missing.
    """
    file = Path(folder) / "tokenizer.json"
    if file.is_file():
        tokenizer = FileTokenizer(file)
        largest = max(tokenizer.reader.get_vocab().values(), default=-1)
        if largest >= config.vocab_size:
            raise ValueError(f"{file}: has a token {largest}, the model's vocabulary ends at {config.vocab_size - 1}")
        return tokenizer
    if (ranks := file.with_name("tiktoken.model")).is_file():
        return TiktokenTokenizer(ranks, config.vocab_size)
    if config.vocab_size == VOCAB_SIZE:
        return ByteTokenizer()
    raise FileNotFoundError(f"{file}: no such file, and a vocabulary of {config.vocab_size} is not that of bytes")


def end_tokens(folder: str | Path, config: Config) -> tuple[int, ...]:
    """The tokens that end a text: those in ``generation_config.json``, where chat models define them, else the
    config's.

    Raises:
        ValueError: the file is damaged.
    """
    file = Path(folder) / "generation_config.json"
    value = read_json(file).get("eos_token_id")
    if value is None:
        return config.eos_token_id
    tokens = tuple(value) if isinstance(value, list) else (value,)
    if not all(type(token) is int for token in tokens):
        raise ValueError(f"{file}: eos_token_id must be tokens, got {value!r}")
    return tokens
