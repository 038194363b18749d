"""Where fuzzing runs, and after `make fuzz` how each operation's cases came out."""

import os
from collections import Counter

import pytest

from fuzz.judging import OUTCOMES


@pytest.fixture
def on_the_cpu(device):
    """Skip where kernels run on a GPU: drawn arguments, guards and exact results lie on the CPU, and are judged there.

    On a GPU `make soak` draws such calls, moves them there, and asks the same judge: valid ones, some of whose integers
    are hostile. What is spoiled otherwise, and gradients, are judged on the CPU alone.
    """
    if device != "cpu":
        pytest.skip("on a GPU such calls are drawn by make soak")


def pytest_terminal_summary(terminalreporter):
    if "DSKERNELS_FUZZ_CASES" not in os.environ:
        return
    terminalreporter.section("cases")
    for name, counts in [*OUTCOMES.items(), ("all", sum(OUTCOMES.values(), Counter()))]:
        columns = (f"{counts[outcome]:7} {outcome}" for outcome in ("right", "refused", "wrong"))
        terminalreporter.write_line(f"{name:24}" + "".join(columns))
