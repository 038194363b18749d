"""Writing files: errors are one line that names the file, and files are either complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def writing(path: str | Path, besides: str = "") -> Iterator[None]:
    """Turn an error of writing into one line that names the file.

    Args:
        path: what is written; named if the error itself does not name a file.
        besides: what else to say.

    Raises:
        OSError: with the original ``errno``, such as that of a full disk.
    """
    try:
        yield
    except SafetensorError as error:  # it has no errno: "I/O error: No space left on device (os error 28)"
        raise _said(path, str(error).removeprefix("Error while serializing: "), None, besides) from None
    except OSError as error:
        if error.strerror is None:  # raised by an inner `writing` already
            raise
        raise _said(error.filename or path, error.strerror, error.errno, besides) from None


def _said(path: object, why: str, number: int | None, besides: str) -> OSError:
    error = OSError(f"{path}: cannot be written ({why})" + (f"; {besides}" if besides else ""))
    error.errno = number
    return error


def flush(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
