"""The demo: what it leaves, and that it fails where drafting changes the text."""

import json
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import typer

from dskernels import demo

pytest.importorskip("matplotlib")


@pytest.fixture
def little(monkeypatch):
    """Ten long modules in place of the whole standard library, one batch of what is held out, 16 bytes of each text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse", "ast", "bdb", "calendar", "cmd", "copy", "dis", "enum", "gettext", "heapq")
    monkeypatch.setattr(demo, "standard_library", lambda: [root / f"{name}.py" for name in names])
    monkeypatch.setattr(demo, "DEMO", replace(demo.DEMO, validation_batches=1))
    write = demo._write
    monkeypatch.setattr(demo, "_write", lambda *inputs, **options: write(*inputs, **{**options, "max_new_tokens": 16}))


def test_the_demo_leaves_checkpoint_metrics_and_pictures(little, tmp_path, capsys):
    demo.main(tmp_path / "demo", steps=2, checks=False)
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {
        "config.json",
        "model.safetensors",
        "metrics.jsonl",
        "loss.png",
        "experts.png",
        "training.png",
    }
    assert json.loads((tmp_path / "demo" / "config.json").read_text())["architectures"] == ["DeepseekV3ForCausalLM"]
    printed = capsys.readouterr().out
    assert "Both texts are equal." in printed
    assert "drafts accepted" in printed


def test_different_texts_are_a_failure(little, tmp_path, monkeypatch, capsys):
    write = demo._write

    def wrong(model, prompts, **options):
        generation, speed = write(model, prompts, **options)
        if options.get("drafts") and "temperature" not in options:
            generation.tokens[0][-1] ^= 1
        return generation, speed

    monkeypatch.setattr(demo, "_write", wrong)
    with pytest.raises(typer.Exit) as failure:
        demo.main(tmp_path, steps=1, checks=False)
    assert failure.value.exit_code == 1
    assert "Both texts are not equal." in capsys.readouterr().out


def test_checks_come_first_and_stop_the_demo(tmp_path, monkeypatch):
    def failing():
        raise typer.Exit(1)

    monkeypatch.setattr(demo.cli, "doctor", lambda: None)
    monkeypatch.setattr(demo.cli, "parity", failing)
    with pytest.raises(typer.Exit):
        demo.main(tmp_path / "demo", steps=1, checks=True)
    assert not (tmp_path / "demo").exists()
