"""GPUs that each kernel is compiled for beside those of its tests: one of Blackwell's for desks (sm_120), one of AMD's.

What differs is what a block has of shared memory, and on AMD's gfx942 all of the compiler, warps of 64 lanes, and e4m3:
its instructions read and write e4m3fnuz, another format of half the value. Triton converts e4m3 there by integers and
multiplies it as fp16, which holds each of its numbers; that none of those instructions is used is looked at here.

Where the GPU decides which configuration of a kernel is launched, the kernel's test names such a GPU as a target, with
what is launched there. Of every other kernel `compiling.compile_all` compiles one configuration for them, the smallest
that it is given first, once in a run of all test processes (some 80 CPU seconds for all of them); with `THOROUGH=1` all
of them: the smallest fit where larger ones did not. By several releases of Triton, one of each set of argument types:
`make portability`.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import in_part

if TYPE_CHECKING:
    from compiling import Compile, Report

TARGETS = ("sm_120", "gfx942")
SHARED = {"sm_120": 101_376, "gfx942": 65_536}  # bytes of a block; on gfx942 LDS
SCRATCH = {"sm_120": 64, "gfx942": 0}  # bytes of a thread: 40 of grouped_gemm_masked_kernel, 32 of embed_kernel
# A kernel that has more: tiles of 128x128, where ptxas takes 255 registers for every GPU, and for sm_120 alone also
# spills. With 16 warps it spills 144 bytes there, and 8 for sm_100.
SPILLING = {("sm_120", "dskernels.fp8.triton:quantize_kernel"): 232}
MOST_WARPS = {"sm_120": 32, "gfx942": 16}  # a block has 1,024 threads
FNUZ = re.compile(r"^\s*(v_\w*(?:fp8|bf8)\w*)", re.MULTILINE)

# Kernels of which some configurations are for blocks with the shared memory of sm_90 and sm_100 alone, by the choice in
# mla/decode/config.py (WIDE), mla/absorb/triton_values.py (roomy) and mla/prefill/config.py (HOPPER, BLACKWELL).
ROOMY = (
    "dskernels.mla.decode.triton:decode_kernel",
    "dskernels.mla.absorb.triton_values:values_kernel",
    "dskernels.mla.prefill.triton:forward_kernel",
    "dskernels.mla.prefill.triton_backward:dq_kernel",
    "dskernels.mla.prefill.triton_backward:dk_dv_kernel",
)

_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID") or str(os.getpid())
_TAKEN = Path(tempfile.gettempdir()) / f"dskernels-compiled-elsewhere-{_RUN}"


def also(kernels: Sequence[Compile]) -> list[Compile]:
    """Of these what is compiled for other GPUs, and was not yet in this run.

    Nothing more of a kernel is compiled for a GPU that the same test names: its other configurations are not for it.
    """
    named = {(target, spec.kernel) for spec in kernels for target in spec.targets}
    smallest: dict[tuple[str, str], Compile] = {}
    for spec in kernels:
        for one in _there(spec):
            if (one.targets[0], one.kernel) in named:
                continue
            key = one.targets[0], _name(one)
            if key not in smallest or _size(one) < _size(smallest[key]):
                smallest[key] = one
    return [one for key, one in smallest.items() if _first("-".join(key))]


def _name(spec: Compile) -> str:
    """What one of is compiled."""
    if in_part.IN_PART:
        return spec.kernel
    return f"{spec} {sorted(spec.signature.items())} {sorted(spec.divisible)}"


def _there(spec: Compile) -> Iterator[Compile]:
    """This configuration as it would be launched there, if it is."""
    portable = bool({"sm_80", "sm_89"} & set(spec.targets))
    if not spec.kernel.startswith("dskernels.") or set(spec.targets) <= set(TARGETS):
        return
    if portable or spec.kernel not in ROOMY:
        yield replace(spec, targets=("sm_120",))
    if not any(type_.startswith("tensordesc") for type_ in spec.signature.values()) and (
        portable or spec.constants.get("PROGRAMMATIC") or tuple(spec.targets) == ("sm_90",)
    ):
        constants = {k: False if k == "PROGRAMMATIC" else value for k, value in spec.constants.items()}
        yield replace(spec, targets=("gfx942",), constants=constants, options={})


def _size(spec: Compile) -> int:
    """By which configurations are compared: the product of what is an integer."""
    return prod(v for v in spec.constants.values() if isinstance(v, int) and not isinstance(v, bool) and v > 0)


def _first(name: str) -> bool:
    """Whether nobody has asked for it in this run: test processes share a folder."""
    if not _TAKEN.exists():
        _TAKEN.mkdir(exist_ok=True)
        atexit.register(shutil.rmtree, _TAKEN, ignore_errors=True)
    try:
        (_TAKEN / hashlib.sha256(name.encode()).hexdigest()).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def usage_of(compiled: Any) -> dict[str, int]:
    """Registers, stack and shared memory of what was compiled for gfx942, as `compiling.Report` has them.

    Raises:
        ValueError: it has an instruction that takes e4m3 for e4m3fnuz.
    """
    text = compiled.asm["amdgcn"]
    if wrong := sorted(set(FNUZ.findall(text))):
        raise ValueError(f"instructions of e4m3fnuz, whose numbers are half of e4m3's: {', '.join(wrong)}")
    found = dict(re.findall(r"^\s+\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text, re.MULTILINE))
    return {
        "registers": int(found["vgpr_count"]),
        "stack": int(found["private_segment_fixed_size"]),
        "shared": compiled.metadata.shared,
    }


def _scratch(report: Report) -> int:
    """Bytes of stack that a thread may have."""
    return SPILLING.get((report.target, report.source.kernel), SCRATCH[report.target])


def faults(reports: Sequence[Report]) -> list[str]:
    """What would not run there."""
    return [
        f"{report.source} {report.target}: {what}"
        for report in reports
        for wrong, what in (
            (report.shared > SHARED[report.target], f"{report.shared} bytes of shared memory"),
            (report.stack > _scratch(report), f"{report.stack} bytes of stack"),
            (report.source.num_warps > MOST_WARPS[report.target], f"{report.source.num_warps} warps"),
        )
        if wrong
    ]
