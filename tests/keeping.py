"""What a compiler made of a text is kept for the next run, as Triton keeps what it made in `~/.triton/cache`.

A name is a hash of all that decides: the text with its headers, the options, the compiler's version. So nothing that is
kept is ever out of date, and a run that finds everything spends no time in NVRTC, g++ and nvdisasm (of a run that finds
nothing: some 200 CPU seconds). `DSKERNELS_TEST_CACHE` names another folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(os.environ.get("DSKERNELS_TEST_CACHE") or Path("~/.cache/dskernels-tests").expanduser())
DAYS = 14  # after which what no run has asked for goes


def kept(make: Callable[[], bytes], *of: str | bytes) -> bytes:
    """What `make` returns, from this run or from one before it with the same `of`."""
    name = hashlib.sha256(repr(of).encode()).hexdigest()
    path = FOLDER / name[:2] / name
    with contextlib.suppress(OSError):
        found = path.read_bytes()
        os.utime(path)
        return found
    made = make()
    with contextlib.suppress(OSError):  # a folder that cannot be written to
        path.parent.mkdir(parents=True, exist_ok=True)
        _tidy(path.parent)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # other processes look here too
            file.write(made)
        os.replace(file.name, path)
    return made


def _tidy(folder: Path) -> None:
    for path in folder.iterdir():
        if path.stat().st_mtime < time.time() - DAYS * 86_400:
            path.unlink(missing_ok=True)
