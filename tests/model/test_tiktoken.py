"""Tokenizers in a tiktoken.model: their code is read and never run."""

import base64
import builtins
import json

import pytest

from dskernels.model import Config, tokenizer_of

CODE = '''
import os
raise SystemExit("this is not to be run")


class Tokenizer:
    pat_str = "|".join(
        [
            r"""[\\p{Han}]+""",
            r"""[^\\r\\n\\p{L}\\p{N}]?\\p{L}+""",
            r"""\\p{N}{1,3}""",
            r"""\\s+|[^\\s]""",
        ]
    )
'''
MERGED = (b"he", b"ll", b"hell", b"hello", b" w", b"12", b"123", "é".encode())
SPECIAL = {"265": {"content": "[EOS]"}, "264": {"content": "<|im_end|>", "special": True}}


@pytest.fixture
def folder(tmp_path):
    pytest.importorskip("tiktoken")
    return write(tmp_path)


def write(folder):
    tokens = [*(bytes([i]) for i in range(256)), *MERGED]
    lines = [base64.b64encode(token) + b" %d\n" % i for i, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    (folder / "tokenization_own.py").write_text(CODE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": SPECIAL, "eos_token": "[EOS]"}))
    return folder


def config(vocab_size=270):
    return Config.from_name("tiny", vocab_size=vocab_size)


def test_text_becomes_tokens_and_text_again(folder):
    """By the pattern first (three digits at a time), then by the merges; special tokens by their names."""
    tokenizer = tokenizer_of(folder, config())
    assert tokenizer.encode("hello") == [259]
    assert tokenizer.encode("12345") == [262, ord("4"), ord("5")]
    assert tokenizer.encode("hello<|im_end|>[EOS]é<|reserved_token_269|>") == [259, 264, 265, 263, 269]
    for text in ("", "hello, world\n\n 1234 日本 é 🎉", "a" * 1000):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([259, 264, 265]) == "hello"
    assert tokenizer.decode([259, "é".encode()[0]]) == "hello\ufffd"  # the character may go on


def test_a_token_that_starts_a_text(folder):
    settings = {"added_tokens_decoder": SPECIAL, "add_bos_token": True, "bos_token": "[EOS]"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_of(folder, config())
    assert tokenizer.encode("hello") == [265, 259]
    assert tokenizer.encode("hello", special=False) == [259]
    assert tokenizer.encode("[EOS]hello") == [265, 259]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<s>"}))
    with pytest.raises(ValueError, match=r"add_bos_token is set and its bos_token '<s>' is not a token"):
        tokenizer_of(folder, config())


def test_a_pattern_in_one_string(folder):
    (folder / "tokenization_own.py").write_text("class T:\n    pat_str = r'\\s+|\\S+'\n")
    assert tokenizer_of(folder, config()).encode("hello") == [259]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenization_own.py").unlink(), r"has tiktoken.model, but no token\*.py with the pat_str"),
        (lambda f: (f / "tokenization_own.py").write_text("pat_str = f()"), r"no token\*.py with the pat_str"),
        (lambda f: (f / "tokenization_own.py").write_text("def ("), r"tokenization_own.py: not Python code"),
        (lambda f: (f / "tokenization_own.py").write_text("pat_str = '('"), r"tiktoken.model: not a tokenizer \("),
        (lambda f: (f / "tiktoken.model").write_bytes(b"aGU= 0\nx\n"), r"tiktoken.model, line 2: expected a token in"),
        (lambda f: (f / "tiktoken.model").write_bytes(b"aGU= 1\n"), r"expected tokens of the numbers 0, 1, 2"),
        (lambda f: (f / "tiktoken.model").write_bytes(b""), r"expected tokens of the numbers 0, 1, 2"),
    ],
)
def test_damaged_files(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        tokenizer_of(folder, config())


def test_more_tokens_than_the_model_has(folder):
    with pytest.raises(ValueError, match=r"tiktoken.model: has 264 tokens, the model's vocabulary has 200"):
        tokenizer_of(folder, config(200))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    def without(name, *args, **options):
        if name == "tiktoken":
            raise ImportError(name)
        return imported(name, *args, **options)

    imported = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs the package tiktoken: pip install 'dskernels\[tiktoken\]'"):
        tokenizer_of(write(tmp_path), config())
