"""A file of prompts, one per line, and the lines that answer them."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dskernels.model import ChatTemplate
    from dskernels.model.tokens import Tokenizer


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        where: file and line, for messages.
        values: the content of the line, which the answer repeats.
        tokens: what the model is given.
    """

    where: str
    values: dict[str, Any]
    tokens: list[int]

    def check(self, max_new_tokens: int, context: int) -> None:
        """Check that the prompt is not empty, and that it fits the model's context together with its answer.

        Raises:
            ValueError: one of these does not hold.
        """
        if not self.tokens:
            raise ValueError(f"{self.where}: the prompt is empty")
        if len(self.tokens) + max_new_tokens > context:
            raise ValueError(
                f"{self.where}: {len(self.tokens):,} tokens and up to {max_new_tokens:,} new ones, "
                f"the model's context is {context:,}"
            )

    def answered(self, text: str, tokens: int, finish_reason: str) -> str:
        """The line of JSON with the answer."""
        answer = {"text": text, "tokens": tokens, "finish_reason": finish_reason}
        return json.dumps({**self.values, **answer}, ensure_ascii=False)


def read_prompts(
    file: Path,
    said: ChatTemplate | None,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    before: list[dict[str, Any]],
) -> list[Prompt]:
    """Read the prompts of a file.

    Args:
        file: has a prompt in each line, or a JSON object with "prompt" or "messages" (the first line decides which);
            ``-`` is stdin. Empty lines are skipped.
        said: the template that makes every prompt a conversation; None to continue prompts as they are.
        template: the template for messages.
        tokenizer: the model's.
        before: messages to put before every conversation that does not begin with a system message.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not text, or a line is not as described; the message names it.
    """
    name = "stdin" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if name == "stdin" else file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{name}: a folder, expected a file of prompts") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not text in UTF-8") from None
    # Not splitlines: a prompt may contain a form feed or a line separator.
    lines = [
        (f"{name}, line {n}", line) for n, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()
    ]
    in_json = bool(lines) and lines[0][1].lstrip().startswith("{")
    prompts = []
    for where, line in lines:
        values = _object(where, line) if in_json else {"prompt": line}
        messages = values.get("messages")
        if messages is None and said is not None:
            messages = [{"role": "user", "content": values["prompt"]}]
        if messages is None:
            prompts.append(Prompt(where, values, tokenizer.encode(values["prompt"])))
            continue
        if template is None:
            raise ValueError(f"{where}: has messages, and the checkpoint has no chat template")
        if not (isinstance(messages[0], dict) and messages[0].get("role") == "system"):
            messages = [*before, *messages]
        try:
            rendered = template.render(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        prompts.append(Prompt(where, values, tokenizer.encode(rendered, special=False)))
    return prompts


def _object(where: str, line: str) -> dict[str, Any]:
    """A line of JSON with a prompt or messages."""
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    prompt = values.get("prompt") if isinstance(values, dict) else None
    messages = values.get("messages") if isinstance(values, dict) else None
    if not isinstance(prompt, str) and not (isinstance(messages, list) and messages):
        raise ValueError(f'{where}: expected an object with "prompt" (text) or "messages" (a list)')
    return values
