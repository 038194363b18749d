"""From prompts to text as it is generated: tokens become characters, and stop strings end a text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dskernels.model.generate import Generation, generate
from dskernels.model.model import DeepseekV3
from dskernels.model.tokens import Tokenizer


def stream_text(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> TextStream:
    """Continue each prompt; iterate over the result to get the text as it comes.

    ::

        for step in stream_text(model, tokenizer, ["def "], stop=["\n\n"]):
            print(step.deltas[0], end="", flush=True)

    A delta never ends in the middle of a character or of a possible stop string. The deltas of a prompt add up to
    ``tokenizer.decode`` of its new tokens, up to the first stop string.

    Args:
        model: the model.
        tokenizer: for the model, see `tokenizer_of`.
        prompts: text, or tokens where more than text is needed (a chat template).
        stop: strings that end a text; the text ends before the first of them, and its place goes to the next prompt.
        **options: those of `generate`.

    Returns:
        The stream, of which nothing has been computed yet.

    Raises:
        TypeError: an unknown option.
        ValueError: an empty stop string, or what `generate` refuses.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if "" in stops:
        raise ValueError("stop: expected strings that are not empty")
    ids = [tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    return TextStream(generate(model, ids, **options), tokenizer, stops)


def generate_text(
    model: DeepseekV3,
    tokenizer: Tokenizer,
    prompts: Sequence[str | Sequence[int]],
    *,
    stop: str | Sequence[str] = (),
    **options: Any,
) -> list[str]:
    """Continue each prompt to its end.

    Args:
        model: see `stream_text`, likewise the others.
        tokenizer: for the model.
        prompts: text or tokens.
        stop: strings that end a text.
        **options: those of `generate`.

    Returns:
        For each prompt the text after it.

    Raises:
        TypeError: as `stream_text`.
        ValueError: likewise.
    """
    return stream_text(model, tokenizer, prompts, stop=stop, **options).finish()


@dataclass(frozen=True)
class TextStep:
    """The result of one step.

    Attributes:
        deltas: for each prompt the new text, often empty.
        tokens: for each prompt the new tokens.
    """

    deltas: list[str]
    tokens: list[list[int]]

    @property
    def count(self) -> int:
        """New tokens of all prompts together."""
        return sum(map(len, self.tokens))


class TextStream:
    """A generation as text: an iterator of steps, and the results so far.

    Attributes:
        generation: tokens, steps and acceptance so far.
        texts: for each prompt the text so far.
    """

    def __init__(self, generation: Generation, tokenizer: Tokenizer, stops: tuple[str, ...]) -> None:
        self.generation = generation
        self.texts = [""] * len(generation.prompts)
        self._readers = [TextReader(tokenizer, stops) for _ in generation.prompts]

    def __iter__(self) -> Iterator[TextStep]:
        return self

    def __next__(self) -> TextStep:
        tokens = next(self.generation)
        deltas = [""] * len(tokens)
        for i, new in enumerate(tokens):
            reader = self._readers[i]
            if not new or reader.stopped:
                continue
            deltas[i] = reader.read(new, last=self.generation.ended(i))
            self.texts[i] += deltas[i]
            if reader.stopped:
                self.generation.abort(i)
        return TextStep(deltas, tokens)

    def close(self) -> None:
        """End the generation early and give its pages back."""
        self.generation.close()

    def finish(self) -> list[str]:
        """Run to the end and return the text of each prompt."""
        for _ in self:
            pass
        return self.texts


class TextReader:
    """The text of one sequence, decoded from its tokens as they come.

    Attributes:
        stopped: a stop string has occurred; there is no more text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, stops
        self.stopped = False
        self._tokens: list[int] = []  # the latest; the first `_known` of them only serve as context for the others
        self._known = 0
        self._text = ""  # decoded from those tokens
        self._held = ""  # text that may be the beginning of a stop string

    def read(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that can be shown after ``tokens``; everything that is left if they are the ``last``."""
        text = self._held + self._decode(tokens, last)
        found = [at for at in map(text.find, self.stops) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        held = 0 if last else max((_overlap(text, stop) for stop in self.stops), default=0)
        shown = len(text) - held
        self._held = text[shown:]
        return text[:shown]

    def _decode(self, tokens: Sequence[int], last: bool) -> str:
        """The text that further tokens add, without an unfinished character at the end, which decodes to U+FFFD."""
        self._tokens += tokens
        text = self.tokenizer.decode(self._tokens)
        whole = text if last else text.rstrip("\ufffd")
        new = whole[len(self._text) :]
        self._text += new
        if new and whole == text:
            # From now on only these tokens are decoded as context: the time does not grow with the text, and decoders
            # that drop the space before a first word still see that it is not the first.
            del self._tokens[: self._known]
            self._known = len(self._tokens)
            self._text = self.tokenizer.decode(self._tokens)
        return new


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of ``text`` that is a proper prefix of ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
