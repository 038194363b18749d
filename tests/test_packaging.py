"""What is installed and published: packages pinned, the reference in the wheel; and what `make test` runs of itself."""

import importlib
import importlib.metadata
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import in_part

ROOT = Path(__file__).parent.parent
EXTRAS = ("test", "lint", "plot", "transformers", "tiktoken")  # what the Makefile installs
NOT_OURS = re.compile(r"nvidia-(?!cuda-nvrtc)|cuda-")  # what a CUDA build of torch brings


def pins():
    """Return the pinned version of each package for this Python."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements if r.marker is None or r.marker.evaluate()}


def needed(requirement, extras):
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))


def test_everything_that_make_installs_is_pinned():
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    optional = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    todo = [Requirement(line) for line in [*project["dependencies"], *optional]]
    todo = [requirement for requirement in todo if needed(requirement, ())]
    pinned, seen = pins(), set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, *requirement.extras) in seen or NOT_OURS.match(name):
            continue
        seen.add((name, *requirement.extras))
        assert name in pinned, f"{name} is needed and not in constraints.txt"
        version = next(iter(pinned[name].specifier)).version
        assert version in requirement.specifier, f"{pinned[name]} does not fit {requirement}"
        further = [Requirement(line) for line in importlib.metadata.requires(name) or []]
        todo += [r for r in further if needed(r, requirement.extras)]
    unused = set(pinned) - {name for name, *_ in seen} - {"pip", "setuptools"}
    assert not unused, "constraints.txt pins what nothing needs"


def test_wheel_from_the_source_archive_holds_all_that_runs_and_no_tests(tmp_path):
    """As `python -m build` and PyPI make it: a source archive has no links, so dskernels/reference is not in it."""
    # A copy, since setuptools puts into a wheel what an earlier build left behind.
    shutil.copytree(
        ROOT, tmp_path / "source", symlinks=True, ignore=shutil.ignore_patterns(".*", "build", "site", "*.egg-info")
    )
    make = f"from setuptools.build_meta import build_sdist; build_sdist({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", make], cwd=tmp_path / "source", check=True, stdout=subprocess.DEVNULL)
    (archive,) = tmp_path.glob("dskernels-*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, archive], check=True)
    (wheel,) = tmp_path.glob("dskernels-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"dskernels/reference/{path.name}" for path in (ROOT / "reference").glob("*.py")} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "dskernels").rglob("*.cu*")} <= names
    assert "dskernels/py.typed" in names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dskernels"}


def test_citation_names_this_version():
    assert f"\nversion: {importlib.metadata.version('dskernels')}\n" in (ROOT / "CITATION.cff").read_text()


def test_what_make_test_runs_in_part_is_there():
    """A test by another name would run whole again, and `make test` has a quarter of an hour."""
    for name in (*in_part.ONE_IN, *in_part.LEFT_OUT):
        path, _, test = name.partition("::")
        assert f"def {test}(" in (ROOT / path).read_text(), name
