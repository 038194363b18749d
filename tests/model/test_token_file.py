"""Tokens in a mapped file: the same text as one read into memory, and what does not fit is named."""

import errno
import json
import os

import pytest
import torch

from dskernels.model import token_file
from dskernels.model.config import Config
from dskernels.model.data import Batches, document_lengths, find_files, read_corpus
from dskernels.model.encoders import ByteEncoder, encoder_of
from dskernels.model.token_file import fingerprint, is_token_folder, largest_token, read_tokens, write_tokens
from dskernels.model.tokens import tokenizer_of


@pytest.fixture
def files(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(9):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}  # é\n" * (i % 4))
    return find_files([folder])


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x.long(), y.long()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("piece", [1 << 20, 7])
def test_bytes_are_those_of_a_corpus_in_memory(files, tmp_path, monkeypatch, piece):
    """In pieces of any size, whose tokens are encoded a few at a time."""
    monkeypatch.setattr(token_file, "PIECE", piece)
    monkeypatch.setattr(token_file, "BATCH", 3 * piece)
    seen = []
    written = write_tokens(
        files, tmp_path / "tokens", ByteEncoder(), held_out=0.3, seed=5, progress=lambda *p: seen.append(p)
    )
    read = read_corpus(files, held_out=0.3, seed=5)
    for mapped, plain in zip(written, read, strict=True):
        assert same(mapped, plain)
        assert fingerprint(mapped) == fingerprint(plain)
        assert torch.equal(document_lengths(mapped), document_lengths(plain))
        assert largest_token(mapped) == largest_token(plain) == 256
    assert seen[-1] == (sum(path.stat().st_size for path in files),) * 2
    assert is_token_folder(tmp_path / "tokens")
    assert same(read_tokens(tmp_path / "tokens").train, read.train)
    streams = [Batches(corpus.train, batch_tokens=50, sequence_length=16, seed=1) for corpus in (written, read)]
    for _ in range(40):  # several passes
        one, other = map(next, streams)
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.cu_seqlens, other.cu_seqlens)


def test_a_stream_goes_on_where_another_stood(files):
    corpus = read_corpus(files)
    sizes = dict(batch_tokens=50, sequence_length=16, seed=1)
    stream = Batches(corpus.train, **sizes)
    for _ in range(25):  # in each place of a pass, and over the end of one
        later = Batches(corpus.train, **sizes)
        later.restore(stream.state())
        for _ in range(3):
            assert torch.equal(next(later).tokens, next(stream).tokens)


def test_a_bpe_is_trained_written_and_read_by_generate(files, tmp_path):
    pytest.importorskip("tokenizers")
    encoder = encoder_of("train:300", files)
    corpus = write_tokens(files, tmp_path / "tokens", encoder, held_out=0.3)
    about = json.loads((tmp_path / "tokens" / "tokens.json").read_text())
    assert about["vocab_size"] == encoder.vocab_size <= 300
    assert about["dtype"] == "uint16"
    tokenizer = tokenizer_of(tmp_path / "tokens", Config.from_name("tiny", vocab_size=encoder.vocab_size))
    texts = {path.read_text() for path in files}
    for document in (*corpus.train, *corpus.validation):
        ids = document.tolist()
        assert ids[0] == ids[-1] == encoder.boundary
        assert tokenizer.decode(ids) in texts
        assert tokenizer.encode(tokenizer.decode(ids)) == ids[:-1]  # a prompt begins as a document does
    assert sum(map(len, corpus.train)) < sum(map(len, read_corpus(files, held_out=0.3).train))  # fewer than bytes

    again = encoder_of(str(tmp_path / "tokens" / "tokenizer.json"))
    assert (again.vocab_size, again.boundary) == (encoder.vocab_size, encoder.boundary)
    other = write_tokens(files, tmp_path / "again", again, held_out=0.3)
    assert same(other.train, corpus.train)


def test_a_tokenizer_says_what_ends_a_text(files, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    reader = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "<stop>": 1, "?": 2}, unk_token="?"))
    reader.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"tokenizer\.json: no token that ends a text"):
        encoder_of(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<stop>"}}))
    assert encoder_of(str(tmp_path)).boundary == 1
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        encoder_of(str(tmp_path))


class Wide(ByteEncoder):
    """A vocabulary that needs 32 bits."""

    vocab_size, boundary = 70_000, 69_999


def test_large_vocabularies_take_four_bytes(files, tmp_path):
    corpus = write_tokens(files, tmp_path / "tokens", Wide())
    assert largest_token(corpus.train) == 69_999
    total = int(document_lengths(corpus.train).sum())
    tokens = next(Batches(corpus.train, batch_tokens=total, sequence_length=8)).tokens
    assert (tokens == 69_999).sum() == 2 * len(corpus.train)
    assert json.loads((tmp_path / "tokens" / "tokens.json").read_text())["dtype"] == "uint32"


def test_text_that_is_none_is_named_and_leaves_what_was_there(files, tmp_path):
    write_tokens(files, tmp_path / "tokens", ByteEncoder())
    before = (tmp_path / "tokens" / "tokens.bin").read_bytes()
    bad = tmp_path / "picture"
    bad.write_bytes(b"x" * 10 + b"\0")
    for sources, message in (
        ([*files, bad], r"picture: binary, not text \(byte 10 is zero\)"),
        ([*files, tmp_path / "absent"], "absent: no such file"),
        ([*files, tmp_path], r"cannot be read \(Is a directory\)"),
        (files[:1], "too little text"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            write_tokens(sources, tmp_path / "tokens", ByteEncoder())
    assert (tmp_path / "tokens" / "tokens.bin").read_bytes() == before
    assert not (tmp_path / "tokens.partial").exists()


def test_a_full_disk_is_one_line(files, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(token_file.os, "replace", full)
    with pytest.raises(OSError, match=r"tokens\.partial: cannot be written \(No space left on device\)$") as failure:
        write_tokens(files, tmp_path / "tokens", ByteEncoder())
    assert failure.value.errno == errno.ENOSPC
    assert not (tmp_path / "tokens.partial").exists()


def test_a_disk_that_takes_a_part_is_one_line_too(files, tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=r"tokens\.partial: cannot be written \(File too large\)$"):
            write_tokens(files, tmp_path / "tokens", ByteEncoder())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokens.bin", b"12", r"tokens\.bin: 2 bytes, tokens\.json promises"),
        ("documents.bin", b"", r"documents\.bin: 0 bytes"),
        ("tokens.json", b"{}", r"tokens\.json: not a description of tokens"),
        ("tokens.json", b"{", r"tokens\.json: not JSON"),
    ],
)
def test_damaged_folders_are_named(files, tmp_path, name, content, message):
    write_tokens(files, tmp_path / "tokens", ByteEncoder())
    (tmp_path / "tokens" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tokens(tmp_path / "tokens")


def test_globs_and_their_misses(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/x.txt", "a/y.txt", "z.txt", "z.md"):
        (tmp_path / name).write_text(name)
    assert [path.name for path in find_files([tmp_path / "**/*.txt"])] == ["x.txt", "y.txt", "z.txt"]
    with pytest.raises(FileNotFoundError, match=r"\*\.rs: no such file"):
        find_files([tmp_path / "*.rs"])
