"""The commands of README and of docs/run_a_model.md, and its Python, on small checkpoints of the names used there."""

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from dskernels import cli
from tiny_checkpoint import make_checkpoint

pytest.importorskip("tokenizers")
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "run_a_model.md"


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands():
    """Those that generate, each once; training has tests of its own, and so has torchrun (tests/parallel)."""
    texts = [block.replace("\\\n", "") for path in (PAGE, ROOT / "README.md") for block in blocks(path, "bash")]
    lines = {tuple(shlex.split(line, comments=True)): line for block in texts for line in block.splitlines()}
    return [line for words, line in lines.items() if words[:1] in (("dskernels",), ("echo",)) and "generate" in words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    small = {"num_hidden_layers": 2, "n_routed_experts": 8}
    make_checkpoint(folder / "run", context=1024, changes=small)
    make_checkpoint(folder / "DeepSeek-V2-Lite-Chat", context=1024, changes={**small, "num_nextn_predict_layers": 0})
    shutil.copytree(folder / "DeepSeek-V2-Lite-Chat", folder / "V2-Lite")
    talk = {"messages": [{"role": "user", "content": "Hi"}]}
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": "def "}, talk])))
    (folder / "questions.txt").write_text("Who?\nWhat?\n")
    return folder


def test_there_are_commands():
    assert len(commands()) >= 10


@pytest.mark.parametrize("line", commands())
def test_command(folder, monkeypatch, capsys, line):
    monkeypatch.chdir(folder)
    words = shlex.split(line, comments=True)
    stdin = "Hi\n"
    if words[0] == "echo":
        stdin, words = words[1] + "\n", words[words.index("|") + 1 :]
    assert words[0] == "dskernels"
    # As it stands there, and no longer than shows that it goes: 200 tokens, the default, took 36 CPU seconds for all.
    monkeypatch.setattr("sys.argv", [*words, "--max-new-tokens", "12"])
    monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    out, error = capsys.readouterr()
    assert exit_.value.code == 0, error
    assert "tokens/s" in error
    if "--out" in words:
        assert len((folder / words[words.index("--out") + 1]).read_text().splitlines()) == 2
    else:
        assert out.strip()


def test_python_of_the_page(folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    for block in blocks(PAGE, "python"):
        exec(block, names)
    assert len(names["texts"]) == 2
    for name in ("copy", "copy-fp8"):
        original = {"copy": "run", "copy-fp8": "run-fp8"}[name]
        assert (folder / name / "model.safetensors").read_bytes() == (
            folder / original / "model.safetensors"
        ).read_bytes()
    assert (folder / "copy" / "tokenizer.json").is_file()
