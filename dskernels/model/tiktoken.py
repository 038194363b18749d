"""Tokenizers in a ``tiktoken.model``, as in Moonlight and Kimi-K2.

The file lists the tokens. How text is split before the tokens are looked up is only written in the Python code that
comes with it, as a regular expression: the class attribute ``pat_str``. That code is parsed and never run.
"""

from __future__ import annotations

import ast
import base64
import binascii
from collections.abc import Sequence
from pathlib import Path

from dskernels.model.chat import special_tokens
from dskernels.model.config import read_json

LONGEST = 400_000  # characters: the package fails for much longer texts, and Moonlight's own code splits them here


class TiktokenTokenizer:
    """A ``tiktoken.model``, read by the package `tiktoken`.

    Token ids beyond those of the file are special tokens, which ``added_tokens_decoder`` in ``tokenizer_config.json``
    may name; the others are reserved. In a text, a special token is written by its name, as chat templates do.

    Args:
        file: with the Python code of the tokenizer and ``tokenizer_config.json`` beside it.
        vocab_size: of the model.

    Raises:
        ImportError: the package is missing.
        ValueError: a file is damaged, the code has no ``pat_str``, or there are more tokens than the model has.
    """

    def __init__(self, file: Path, vocab_size: int) -> None:
        try:
            import tiktoken
        except ImportError:
            raise ImportError(f"{file} needs the package tiktoken: pip install 'dskernels[tiktoken]'") from None
        settings = read_json(file.parent / "tokenizer_config.json")
        ranks = _ranks(file)
        self.ordinary = len(ranks)
        if self.ordinary > vocab_size:
            raise ValueError(f"{file}: has {self.ordinary} tokens, the model's vocabulary has {vocab_size}")
        names = settings.get("added_tokens_decoder") or {}
        special = {
            names.get(str(i), {}).get("content", f"<|reserved_token_{i}|>"): i for i in range(self.ordinary, vocab_size)
        }
        pattern = _pattern(file.parent)
        try:
            self.reader = tiktoken.Encoding(
                file.parent.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:  # the regular expression is invalid
            raise ValueError(f"{file}: not a tokenizer ({' '.join(str(error).split())})") from None
        self.bos: list[int] = []
        if settings.get("add_bos_token") is True:
            token = special_tokens(file.parent).get("bos_token")
            if token not in special:
                raise ValueError(f"{file}: add_bos_token is set and its bos_token {token!r} is not a token")
            self.bos = [special[token]]

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Tokens of a text; with ``special``, those of a prompt, including what precedes it."""
        parts = [text[start : start + LONGEST] for start in range(0, len(text), LONGEST)]
        ids = [token for part in parts for token in self.reader.encode(part, allowed_special="all")]
        return self.bos + ids if special and ids[:1] != self.bos else ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, without special ones."""
        return self.reader.decode([token for token in tokens if token < self.ordinary])


def _ranks(file: Path) -> dict[bytes, int]:
    """The tokens of the file, which has in each line a token in base64 and its number: 0, 1, 2, ..."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{file}, line {number}: expected a token in base64 and its number") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not ranks:
        raise ValueError(f"{file}: expected tokens of the numbers 0, 1, 2, ... with none left out")
    return ranks


def _pattern(folder: Path) -> str:
    """The regular expression in a tokenizer's code: a string, or ``"|".join`` of a list of strings."""
    for code in sorted(folder.glob("token*.py")):
        try:
            tree = ast.parse(code.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            raise ValueError(f"{code}: not Python code") from None
        for node in ast.walk(tree):
            named = isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "pat_str" for target in node.targets
            )
            if named and (pattern := _text(node.value)) is not None:  # type: ignore[attr-defined]
                return pattern
    raise ValueError(f"{folder}: has tiktoken.model, but no token*.py with the pat_str that belongs to it")


def _text(node: ast.expr) -> str | None:
    """The value of an expression that is a string or a join of strings; None for other code."""
    try:
        value = ast.literal_eval(node)
        return value if isinstance(value, str) else None
    except ValueError:
        pass
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "join":
        try:
            between, parts = ast.literal_eval(node.func.value), ast.literal_eval(node.args[0])
            return between.join(parts)
        except (ValueError, IndexError, AttributeError, TypeError):
            pass
    return None
