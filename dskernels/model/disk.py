"""What can go wrong while writing: one line that names the file, and files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: str | Path, besides: str = "") -> Iterator[None]:
    """Makes a failure to write one line.

    Args:
        path: what is written, named where the error does not name a file itself.
        besides: what else to say.

    Raises:
        OSError: with the same ``errno``, as from a full disk.
    """
    try:
        yield
    except SafetensorError as error:  # it has no number: "I/O error: No space left on device (os error 28)"
        raise _said(path, str(error).removeprefix("Error while serializing: "), None, besides) from None
    except OSError as error:
        if error.strerror is None:  # has been said
            raise
        raise _said(error.filename or path, error.strerror, error.errno, besides) from None


def _said(path: object, why: str, number: int | None, besides: str) -> OSError:
    error = OSError(f"{path}: cannot be written ({why})" + (f"; {besides}" if besides else ""))
    error.errno = number
    return error


def flush(path: Path) -> None:
    """Waits until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
