"""What `make sanitize` runs is every kernel of the library, and so is what `make portability` has compiled."""

import json
from pathlib import Path

import sanitize
from sanitize_kernels import CASES, library


def test_no_kernel_is_forgotten():
    """A new one needs a case in tests/sanitize.py or sanitize_model.py, and a line in sanitize_kernels.py."""
    kernels = set(library())
    assert len(kernels) > 90
    assert kernels == set(CASES)


def test_each_is_named_for_a_case_that_there_is():
    named = [name for name, _ in sanitize.kernels(racecheck=False)]
    assert len(named) == len(set(named))
    assert set(CASES.values()) <= set(named)


def test_the_support_matrix_has_every_portable_kernel():
    """Of a new one: `make portability ARGS='--only its_name'`."""
    releases = json.loads((Path(__file__).parent.parent / "docs" / "support.json").read_text())
    portable = {f"dskernels.{kernel}" for kernel in library() if ".cu:" not in kernel}
    for release in releases:
        assert set(release["targets"]["sm_90"]) == portable, release["triton"]
