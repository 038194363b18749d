"""Detect truncated kernels in Triton's cache before the driver gets them.

Triton (3.6 to 3.9) loads whatever it finds in its folder, and given half a binary the driver ends the process
(SIGSEGV). The header of a binary says where it ends. So each file is checked when its kernel is loaded, once per
process: 0.13 ms on a busy CPU, and nothing at a call.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import triton

_cut_off: dict[str, str] = {}  # by the hash of a kernel, whose binary stays in Triton's memory


def name_what_is_cut_off() -> None:
    """Have each Triton kernel checked before it is loaded."""
    triton.knobs.runtime.kernel_load_start_hook.add(_look)


def _look(module: Any, function: Any, name: str, files: Mapping[str, str], key: str) -> None:
    path = _cut_off.get(key) or next((p for file, p in files.items() if file.endswith(".cubin")), None)
    if path is None or not (key in _cut_off or is_cut_off(Path(path))):
        return
    _cut_off[key] = path
    raise OSError(
        errno.EIO,
        f"Triton's cache holds a part of the kernel {name} only: remove this folder (TRITON_CACHE_DIR says where they "
        "are) and start again",
        str(Path(path).parent),
    )


def is_cut_off(path: Path) -> bool:
    """Whether an ELF file ends before its section and segment tables do; False if the file no longer exists."""
    try:
        with path.open("rb") as file:
            header = file.read(64)
            size = file.seek(0, 2)
    except FileNotFoundError:
        return False
    if len(header) < 64:
        return True
    segments, sections = struct.unpack_from("<QQ", header, 0x20)
    of_segment, n_segments, of_section, n_sections = struct.unpack_from("<HHHH", header, 0x36)
    return size < max(segments + of_segment * n_segments, sections + of_section * n_sections)
