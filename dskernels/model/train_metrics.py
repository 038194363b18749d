"""The file of a run's metrics: one line of JSON for each step and each validation."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dskernels.model.disk import writing

METRICS_FILE = "metrics.jsonl"

History = list[dict[str, Any]]


class Metrics:
    """The lines, truncated to where a checkpoint was made.

    Args:
        out: the run's folder.
        size: bytes of the file at that checkpoint; 0 begins a new file.

    Attributes:
        before: the lines that it had then.

    Raises:
        ValueError: the file is shorter.
    """

    def __init__(self, out: Path, size: int) -> None:
        self.path = out / METRICS_FILE
        self.size = size
        self.before: History = []
        if size:
            there = self.path.read_bytes() if self.path.is_file() else b""
            if len(there) < size:
                raise ValueError(f"{self.path}: {len(there):,} bytes, the checkpoint was made at {size:,}")
            self.before = [json.loads(line) for line in there[:size].splitlines()]

    def __enter__(self) -> Metrics:
        with writing(self.path):
            self._file = self.path.open("r+b" if self.size else "wb", buffering=0)
            if self.size:
                self._file.truncate(self.size)
                self._file.seek(self.size)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()

    def append(self, line: dict[str, Any]) -> None:
        """Write a line, at once."""
        rest = json.dumps(line).encode() + b"\n"
        with writing(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def flushed(self) -> int:
        """The number of bytes of all lines, which are on the disk now."""
        with writing(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()
