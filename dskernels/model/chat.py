"""A conversation as a prompt: the chat template of a checkpoint, run in jinja2's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dskernels.model.config import read_json

Message = Mapping[str, Any]


class ChatTemplate:
    """What a model was trained to see of a conversation.

    The template comes with the checkpoint and is run as ``transformers`` runs it: in a sandbox that reaches neither
    files nor Python, with ``raise_exception``, ``strftime_now``, ``tojson``, ``break`` and ``continue``.

    Args:
        text: the template.
        file: where it is from, for messages.
        special_tokens: what it knows by name, such as ``bos_token``.

    Raises:
        ValueError: it is no template.
    """

    def __init__(self, text: str, file: Path, special_tokens: Mapping[str, str] | None = None) -> None:
        self.file = file
        self.special_tokens = dict(special_tokens or {})
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self.template = environment.from_string(text)
        except jinja2.TemplateError as error:
            raise ValueError(f"{file}: not a chat template ({_line(error)})") from None

    @classmethod
    def of(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a checkpoint, None if it has none.

        Looked for in ``chat_template.jinja``, ``chat_template.json`` and ``tokenizer_config.json``.

        Raises:
            ValueError: one of them is damaged.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        special = special_tokens(folder)
        file = folder / "chat_template.jinja"
        if file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), file, special)
            except UnicodeDecodeError:
                raise ValueError(f"{file}: not text in UTF-8") from None
        for file, values in (
            (folder / "chat_template.json", read_json(folder / "chat_template.json")),
            (folder / "tokenizer_config.json", settings),
        ):
            text = values.get("chat_template")
            if isinstance(text, list):  # several templates, by name
                named = {str(t.get("name")): t.get("template") for t in text if isinstance(t, dict)}
                text = named.get("default")
            if isinstance(text, str):
                return cls(text, file, special)
        return None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The prompt for the next answer.

        Args:
            messages: dicts with ``role`` and ``content``, oldest first.
            add_generation_prompt: end with what comes before an answer.

        Raises:
            ValueError: a message without a role or content, or the template refuses the conversation.
        """
        for i, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(f'messages: expected objects with "role" and "content", number {i} is {message!r}')
        try:
            return self.template.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self.special_tokens,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{self.file}: the chat template refuses the conversation ({_line(error)})") from None


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by their name in the tokenizer's settings, such as ``bos_token``."""
    found = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):  # the latter takes precedence
        for key, value in read_json(folder / name).items():
            token = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(token, str):
                found[key] = token
    return found


class _Generation(Extension):
    """``{% generation %}`` marks what is learned from; for a prompt it is only what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """JSON as a model reads it; jinja2's own escapes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
