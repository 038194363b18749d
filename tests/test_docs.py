"""What the documentation says: its Python runs, its links lead somewhere, and no page is left out."""

import re
from pathlib import Path

import pytest
import torch

import dskernels

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([ROOT / "README.md", *DOCS.rglob("*.md")])
# Their Python has tests of its own: test_run_a_model.py, which makes checkpoints, and integrations/test_porting.py.
ELSEWHERE = {DOCS / "run_a_model.md", DOCS / "porting.md"}
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path):
    """The Python of a page, but for blocks behind ``<!-- not run: why -->``."""
    return [code for mark, code in BLOCK.findall(path.read_text(encoding="utf-8")) if not mark]


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", [p for p in PAGES if p not in ELSEWHERE and blocks(p)], ids=name)
def test_python_of_a_page_runs(path, monkeypatch, tmp_path):
    """All blocks of a page in order, on the CPU; a later one may use what an earlier one has made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"__name__": "page"}
    for i, code in enumerate(blocks(path)):
        exec(compile(code, f"{name(path)}, block {i + 1}", "exec"), names)


def test_a_block_may_be_marked():
    text = "<!-- not run: needs a GPU -->\n```python\na\n```\n```python\nb\n```\n"
    assert [bool(mark) for mark, _ in BLOCK.findall(text)] == [True, False]


def anchors(path):
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"], ids=name)
def test_links_lead_somewhere(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        where = (path.parent / file).resolve() if file else path
        assert where.exists(), f"{name(path)}: {target}"
        if where.suffix == ".md" and anchor:
            assert anchor in anchors(where), f"{name(path)}: {target}"
    for file in re.findall(r"`((?:dskernels|reference|tests|benchmarks|docs|examples|tools)/[\w/.]+\.\w+)", text):
        assert (ROOT / file).exists(), f"{name(path)}: {file}"


def test_every_public_name_is_documented():
    """In the reference that is made of docstrings; and an operation on a page that says what it means."""
    reference = (DOCS / "operations.md").read_text(encoding="utf-8")
    pages = "".join(page.read_text(encoding="utf-8") for page in (DOCS / "operations").glob("*.md"))
    assert sorted(re.findall(r"^::: dskernels\.(\w+)$", reference, re.MULTILINE)) == sorted(dskernels.__all__)
    operations = [name for name in dskernels.__all__ if name[0].islower() and name not in ("use_impl", "explain")]
    assert [name for name in operations if f"`{name}" not in pages] == []


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2])
    assert sorted(listed) == sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
