"""Text as it comes: whole characters, stop strings that never show, and the same text in the end."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import SMALL, echo_model

from dskernels.model import LatentCache, generate, generate_text, stream_text
from dskernels.model.text import TextReader
from dskernels.model.tokens import ByteTokenizer

BYTES = ByteTokenizer()


class Words:
    """A tokenizer whose tokens are words, and which drops the space before the first, as sentencepiece does."""

    def encode(self, text):
        return [ord(word[0]) - ord("a") for word in text.split()]

    def decode(self, tokens):
        return " ".join(chr(ord("a") + token) * 3 for token in tokens if token < 26)


def read(tokenizer, parts, stops=()):
    """The deltas of one text whose tokens come in these parts, and the reader."""
    reader = TextReader(tokenizer, stops)
    deltas = []
    for i, part in enumerate(parts):
        if reader.stopped:
            break
        deltas.append(reader.read(part, last=i == len(parts) - 1))
    return deltas, reader


def split(data, tokens):
    """Tokens in parts of 1 to 4, as drafting gives them."""
    parts = []
    while tokens:
        n = data.draw(st.integers(1, 4))
        parts, tokens = [*parts, tokens[:n]], tokens[n:]
    return parts or [[]]


@given(st.lists(st.integers(0, 256), max_size=40), st.data())
def test_deltas_add_up_to_the_decoded_text(tokens, data):
    """Of any bytes, the boundary among them."""
    deltas, _ = read(BYTES, split(data, tokens))
    assert "".join(deltas) == BYTES.decode(tokens)


@given(st.text(max_size=20), st.data())
def test_characters_come_whole_and_at_once(text, data):
    """What has been shown is always all the characters that are complete."""
    reader, seen, tokens = TextReader(BYTES), "", b""
    for part in split(data, list(text.encode())):
        seen += reader.read(part)
        tokens += bytes(part)
        assert seen == tokens.decode(errors="ignore").rstrip("\ufffd")


@given(st.lists(st.integers(0, 30), max_size=20), st.data())
def test_spaces_between_words_are_kept(tokens, data):
    deltas, _ = read(Words(), split(data, tokens))
    assert "".join(deltas) == Words().decode(tokens)


@given(
    st.text("abé", max_size=30),
    st.lists(st.text("abé", min_size=1, max_size=5), min_size=1, max_size=3),
    st.data(),
)
def test_a_stop_string_never_shows(text, stops, data):
    """The text ends before the first to be complete; what is shown on the way is always a part of that."""
    tokens = list(text.encode())
    deltas, reader = read(BYTES, split(data, tokens), tuple(stops))
    shown = "".join(deltas)
    found = [text.find(stop) for stop in stops if stop in text]
    assert reader.stopped == bool(found)
    if not found:
        assert shown == text
    else:
        assert text.startswith(shown)
        assert all(stop not in shown for stop in stops)
        assert len(shown) >= min(found)  # a longer one that begins earlier may come too late
        one_by_one, _ = read(BYTES, [[token] for token in tokens], tuple(stops))
        assert text.startswith("".join(one_by_one))


def test_what_may_become_a_stop_string_is_held_back():
    reader = TextReader(BYTES, ("\n\n", "END"))
    deltas = [reader.read(part.encode()) for part in ("a\n", "b", "E", "N", "N", "\n")]
    assert deltas == ["a", "\nb", "", "", "ENN", ""]
    assert reader.read(b"x\nENDx") == "\nx\n"
    assert reader.stopped
    reader = TextReader(BYTES, ("END",))
    assert reader.read(b"xEN", last=True) == "xEN"


@pytest.fixture(scope="module")
def model():
    """Over the vocabulary of bytes."""
    torch.manual_seed(3)
    return echo_model(0.05, **{**SMALL, "vocab_size": 257})


PROMPTS = ["hello", "x", "héllo and more"]


@pytest.mark.parametrize("drafts", [0, 2])
def test_stream(model, drafts):
    options = {"max_new_tokens": 30, "drafts": drafts}
    tokens = generate(model, [BYTES.encode(prompt) for prompt in PROMPTS], **options).finish()
    stream = stream_text(model, BYTES, PROMPTS, **options)
    texts, count = [""] * 3, 0
    for step in stream:
        assert len(step.deltas) == len(step.tokens) == 3
        texts = [text + delta for text, delta in zip(texts, step.deltas, strict=True)]
        assert texts == stream.texts
        count += step.count
    assert texts == [BYTES.decode(t) for t in tokens]
    assert stream.generation.tokens == tokens
    assert count == sum(map(len, tokens))
    assert generate_text(model, BYTES, PROMPTS, **options) == texts


@pytest.mark.parametrize("drafts", [0, 2])
def test_stop_strings_end_a_text_and_free_its_place(model, drafts):
    options = {"max_new_tokens": 30, "drafts": drafts, "max_batch": 2, "page_size": 4}
    texts = generate_text(model, BYTES, PROMPTS, **options)
    stop = texts[0][5:7]
    assert "\ufffd" not in stop
    stream = stream_text(model, BYTES, PROMPTS, stop=stop, **options)
    assert stream.finish() == [text.split(stop)[0] for text in texts]
    assert len(stream.generation.tokens[0]) < 30
    assert stream.generation.cache.free_pages == stream.generation.cache.pages


def test_tokens_are_prompts_too(model):
    tokens = [BYTES.encode(prompt) for prompt in PROMPTS]
    assert generate_text(model, BYTES, tokens, max_new_tokens=6) == generate_text(
        model, BYTES, PROMPTS, max_new_tokens=6
    )


def test_a_stream_that_is_dropped_frees_its_pages(model):
    cache = LatentCache(model.config, pages=20, page_size=8, dtype=torch.float32)
    for step in stream_text(model, BYTES, PROMPTS, max_new_tokens=9, cache=cache):
        assert step.count == 3
        assert cache.free_pages < 20
        break
    del step
    assert cache.free_pages == 20
    stream = stream_text(model, BYTES, PROMPTS, max_new_tokens=9, cache=cache)
    next(stream)
    stream.close()
    assert cache.free_pages == 20
    assert list(stream) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"stop": [""]}, ValueError, "stop: expected strings that are not empty"),
        ({"stop": ""}, ValueError, "stop: expected strings that are not empty"),
        ({"temprature": 1.0}, TypeError, "unexpected keyword argument 'temprature'"),
        ({"min_p": 2.0}, ValueError, "min_p: expected 0 to 1"),
    ],
)
def test_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        stream_text(model, BYTES, ["a"], **options)
