"""The scripts of examples/ run, and their own checks hold; README's table names them all."""

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example(path, capsys, monkeypatch):
    """By the reference: tests of the kernels are elsewhere, and the interpreter would take minutes."""
    if path.stem.startswith("patch_"):
        pytest.importorskip("transformers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    runpy.run_path(str(path), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.gpu
@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_example_on_a_gpu(path):
    runpy.run_path(str(path), run_name="__main__")


def test_every_example_is_listed():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert all(f"examples/{path.name}" in page for path in SCRIPTS)
    assert page.count("python examples/") == 5
