"""``dskernels train`` and ``plot``: from text to a model that generates, gone on with, and what is refused."""

import json
import struct
import sys

import pytest

from dskernels import cli
from dskernels.model import Config
from dskernels.model.plot import read_history

pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

SIZES = ["--batch-tokens", 64, "--sequence-length", 32, "--validation-batches", 1]


@pytest.fixture
def run(monkeypatch, capfd):
    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["dskernels", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, error = capfd.readouterr()
        return ended.value.code, out, error

    return command


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(5):
        (folder / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 20)
    return folder


@pytest.fixture
def little(tmp_path):
    """A model file of the preset "tiny", with half its layers."""
    config = Config.from_name("tiny", num_hidden_layers=2, n_routed_experts=8, n_group=1, topk_group=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_hf()))
    return path


def test_a_trained_tokenizer_an_average_and_a_second_run(run, text, little, tmp_path):
    """BPE trained on the text; the same command goes on; another run takes the tokens; others load the model."""
    out, other = tmp_path / "run", tmp_path / "other"
    options = ["--out", out, "--steps", 4, "--checkpoint-every", 2, "--ema", 0.9, *SIZES]
    status, printed, error = run("train", little, "--data", text, "--tokenizer", "train:270", *options)
    assert status == 0, error
    assert "byte-level BPE of 270 tokens" in printed
    assert "Held-out loss" in printed
    files = {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "train.json", "tokens", "ema", "checkpoints"} <= files
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (out / "ema").iterdir()}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 270

    before = (out / "metrics.jsonl").read_text()
    for path in text.iterdir():  # the run has its own copy
        path.unlink()
    status, printed, error = run("train", little, "--data", text, "--tokenizer", "train:270", *options)
    assert status == 0, error
    assert "Going on from" in printed
    assert (out / "metrics.jsonl").read_text() == before

    options = ["--data", out / "tokens", "--out", other, "--steps", 2, *SIZES, "--checkpoint-every", 0]
    status, printed, error = run("train", little, *options)
    assert status == 0, error
    status, printed, error = run("plot", out, other, "--title", "Two runs")
    assert status == 0, error
    assert struct.unpack(">II", (out / "training.png").read_bytes()[16:24])[0] >= 1600

    status, printed, error = run("plot", out, other, "--pairs", "--out", tmp_path / "pairs.png")
    assert status == 0, error
    assert (tmp_path / "pairs.png").stat().st_size > 10_000

    texts = {}
    for folder in (out, out / "ema"):
        status, printed, error = run("generate", folder, "--prompt", "def f1", "--max-new-tokens", 4, "--draft", 1)
        assert status == 0, error
        texts[folder] = printed
    assert all(printed.startswith("def f1") for printed in texts.values())

    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    ids = tokenizer("def f1", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id == 0
    new = model.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)[0, ids.shape[1] :]
    assert texts[out].rstrip("\n") == "def f1" + tokenizer.decode(new, skip_special_tokens=True).rstrip("\n")


def test_a_run_that_begins_with_the_weights_of_another(run, text, little, tmp_path):
    """Model and tokenizer are the other's unless said otherwise; what does not fit is one line."""
    first, out = tmp_path / "first", tmp_path / "out"
    options = ["--data", text, "--steps", 2, *SIZES]
    status, _, error = run("train", little, "--tokenizer", "train:270", "--precision", "fp8", "--out", first, *options)
    assert status == 0, error
    status, printed, error = run("train", "--init", first, "--precision", "bf16", "--out", out, *options)
    assert status == 0, error
    looks = [read_history(folder / "metrics.jsonl") for folder in (first, out)]
    assert looks[1][0]["validation_loss"] == pytest.approx(looks[0][-1]["validation_loss"], rel=0.02)
    assert json.loads((out / "train.json").read_text())["init"] == str(first)
    assert (out / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    assert (out / "config.json").read_bytes() == (first / "config.json").read_bytes()

    for arguments, message in (
        (["--init", first, "--tokenizer", "bytes"], f"--init: {first}/tokenizer.json is not the tokenizer of "),
        (["tiny", "--init", first], "model.safetensors: tensor model.layers.1."),
        (["--init", tmp_path / "nowhere"], "nowhere: no such folder"),
    ):
        status, _, error = run("train", *arguments, "--out", tmp_path / "other", *options)
        assert status == 1
        assert message in " ".join(error.split())
        assert error.count("\n") == 1


def test_the_same_recipe_or_an_error(run, text, little, tmp_path):
    options = ["--data", text, "--out", tmp_path / "run", "--checkpoint-every", 1, *SIZES]
    assert run("train", little, *options, "--steps", 1)[0] == 0
    (tmp_path / "other.txt").write_text("text\n" * 9)
    for again, message in (
        (["--steps", 2], "another run, its recipe has"),
        (["--steps", 1, "--data", tmp_path / "other.txt"], "other.txt (leave out --data to go on with that text"),
    ):
        status, _, error = run("train", little, *options, *again)
        assert status == 1
        assert message in " ".join(error.split())
        assert error.count("\n") == 1
    assert run("train", little, *options, "--steps", 2, "--restart")[0] == 0
    assert read_history(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", r"empty.txt: empty"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0", r"picture.png: binary, not text (byte 8 is zero)"),
        ("*.rs", None, r"*.rs: no such file or folder"),
    ],
)
def test_data_that_is_no_text_is_named(run, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
        (tmp_path / "other.txt").write_bytes(b"text")
    status, _, error = run(
        "train", "tiny", "--data", tmp_path / name, "--data", tmp_path / "other.txt", "--out", tmp_path / "run"
    )
    assert status == 1
    assert message in " ".join(error.split())
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "tokens").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "train:100"], "tokenizer: expected train:N with N at least 257, got 'train:100'"),
        (["--tokenizer", "nowhere.json"], "nowhere.json: no such file"),
        (["--ema", 1.5], "ema: expected a decay in [0, 1), got 1.5"),
        (["--learning-rate", "inf"], "learning_rate: expected a finite number above 0, got inf"),
        (["--held-out", 1], "--held-out: expected a fraction between 0 and 1, got 1.0"),
        (["--resume"], "has no checkpoint to go on from"),
        (["--device", "cuda:99"], "--device: 'cuda:99' cannot be used"),
        (["--device", "cpu", "--cuda-graph"], "--cuda-graph: needs a GPU, the model would run on cpu"),
    ],
)
def test_wrong_options_are_one_line(run, text, tmp_path, options, message):
    status, _, error = run("train", "tiny", "--data", text, "--out", tmp_path / "run", *options)
    assert status == 1
    assert message in " ".join(error.split())
    assert error.count("\n") == 1
    assert not (tmp_path / "run" / "tokens").exists()  # said before the text is read


def test_missing_packages_are_one_line(run, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    status, _, error = run("train", "tiny", "--data", text, "--out", tmp_path / "run", "--tokenizer", "train:300")
    assert (status, "pip install 'dskernels[tokenizers]'" in " ".join(error.split())) == (1, True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    status, _, error = run("train", "tiny", "--data", text, "--out", tmp_path / "run", "--tensorboard", *SIZES)
    assert (status, "pip install 'dskernels[tensorboard]'" in " ".join(error.split())) == (1, True)
    assert not (tmp_path / "run" / "tokens").exists()


def test_plot_says_what_it_cannot_draw(run, tmp_path):
    status, _, error = run("plot", tmp_path)
    assert status == 1
    assert "metrics.jsonl: no such file" in " ".join(error.split())
    (tmp_path / "metrics.jsonl").write_text("")
    status, _, error = run("plot", tmp_path)
    assert (status, "no training step in its history" in error) == (1, True)
    (tmp_path / "metrics.jsonl").write_bytes(b"\x80")
    status, _, error = run("plot", tmp_path)
    assert (status, "metrics.jsonl: not text" in " ".join(error.split())) == (1, True)
    status, _, error = run("plot", tmp_path, "--label", "a", "--label", "b")
    assert (status, "--label: expected one for each of 1 runs, got 2" in error) == (1, True)
    status, _, error = run("plot", tmp_path, "--pairs")
    assert (status, "--pairs: expected an even number of runs, got 1" in error) == (1, True)
