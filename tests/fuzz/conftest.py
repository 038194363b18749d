"""After `make fuzz`, how each operation's cases came out."""

import os
from collections import Counter

from fuzz.judging import OUTCOMES


def pytest_terminal_summary(terminalreporter):
    if "DSKERNELS_FUZZ_CASES" not in os.environ:
        return
    terminalreporter.section("cases")
    for name, counts in [*OUTCOMES.items(), ("all", sum(OUTCOMES.values(), Counter()))]:
        columns = (f"{counts[outcome]:7} {outcome}" for outcome in ("right", "refused", "wrong"))
        terminalreporter.write_line(f"{name:24}" + "".join(columns))
