"""The snippets of docs/porting.md run."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "porting.md").read_text()
SNIPPETS = re.findall(r"(<!-- not run: [^>]*-->\n)?```python\n(.*?)```", TEXT, re.DOTALL)
RUN = [code for skipped, code in SNIPPETS if not skipped]


def test_there_are_six():
    assert len(RUN) == 6


@pytest.mark.parametrize("number", range(len(RUN)))
def test_snippet(number, monkeypatch):
    if "transformers" in RUN[number]:
        pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    exec(compile(RUN[number], f"docs/porting.md, snippet {number + 1}", "exec"), {"__name__": "snippet"})
