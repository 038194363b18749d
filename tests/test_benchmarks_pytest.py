"""``pytest benchmarks`` and the JSON that pytest-benchmark compares."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("pytest_benchmark")


def test_a_case_is_timed_saved_and_compared(tmp_path, monkeypatch, capsys):
    """In this process: another one would load torch once more."""
    from pytest_benchmark import cli

    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    path = tmp_path / "speed.json"
    off = ("no:cacheprovider", "no:xdist", "no:randomly")
    words = ["-q", "benchmarks", "-k", "merge_states", f"--benchmark-json={path}"]
    assert pytest.main([*words, *(word for name in off for word in ("-p", name))]) == 0
    document = json.loads(path.read_text())
    (timed,) = document["benchmarks"]
    assert timed["group"] == "merge_states"
    assert "merge_states" in timed["name"]
    assert timed["stats"]["median"] > 0
    assert timed["extra_info"]["impl"]
    assert {"gpu", "torch"} <= set(document["machine_info"]["dskernels"])

    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["pytest-benchmark", "compare", str(path)])
    cli.main()
    assert "merge_states" in capsys.readouterr().out
