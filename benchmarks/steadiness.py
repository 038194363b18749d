"""Whether the machine was steady during a measurement: warm at the beginning, and with the same roofs at the end.

A GPU that has been idle runs its first products faster than it can keep up: it is cool, and its power limit does not
apply yet. So a run begins with products until their time settles, and records how many that took; and after each family
the roofs are measured again, together with the clock of the multiprocessors at that moment.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.roofline import Roofs
from benchmarks.timing import Call, Times

SETTLED = 0.01  # two turns that differ by less count as equal
MOST_TURNS = 20


@dataclass(frozen=True)
class WarmUp:
    """The warm-up: how many turns it took, and the microseconds of the product in the first and the last."""

    turns: int
    first_us: float
    settled_us: float

    def __str__(self) -> str:
        change = self.settled_us / self.first_us - 1
        return f"warm after {self.turns} turns of a product, whose time changed by {change:+.1%} from the first"


def warm_up(measure: Callable[[Mapping[str, Call]], dict[str, Times]], product: Call) -> WarmUp:
    """Time `product` with `timing.Stopwatch.time` until it takes as long as in the preceding turn, twice in a row."""
    first = last = measure({"product": product})["product"].us
    turns, alike = 1, 0
    while turns < MOST_TURNS and alike < 2:
        us = measure({"product": product})["product"].us
        alike = alike + 1 if abs(us / last - 1) < SETTLED else 0
        last, turns = us, turns + 1
    return WarmUp(turns, first, last)


def clock_mhz(product: Call, times: int = 200) -> float | None:
    """The clock of the multiprocessors while products run (for 0.3 s); None if it cannot be read."""
    import torch

    for _ in range(times):
        product()
    time.sleep(0.1)
    mhz = _sm_clock(f"GPU-{torch.cuda.get_device_properties().uuid}")
    torch.cuda.synchronize()
    return mhz


def _sm_clock(uuid: str) -> float | None:
    """The clock according to the driver's library; nvidia-smi would still be starting when the products are done.

    The library counts all GPUs of the machine whatever CUDA_VISIBLE_DEVICES says, so the GPU is found by its name.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    device, mhz = ctypes.c_void_p(), ctypes.c_uint()
    sm_clock = 1  # NVML_CLOCK_SM
    steps = (
        lambda: nvml.nvmlInit_v2(),
        lambda: nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)),
        lambda: nvml.nvmlDeviceGetClockInfo(device, sm_clock, ctypes.byref(mhz)),
    )
    return float(mhz.value) if all(step() == 0 for step in steps) else None


def clocks(before: Roofs, after: Roofs, mhz_before: float | None, mhz_after: float | None) -> dict[str, float | None]:
    """What the file of a family records: clocks before and after it, and the roofs after it relative to those
    before."""

    def ratio(now: float | None, then: float | None) -> float | None:
        return now / then if now and then else None

    return {
        "mhz_before": mhz_before,
        "mhz_after": mhz_after,
        "copy": ratio(after.copy_gbs, before.copy_gbs),
        "bf16": ratio(after.bf16_tflops, before.bf16_tflops),
        "fp8": ratio(after.fp8_tflops, before.fp8_tflops),
    }


def describe(clocks: Mapping[str, float | None]) -> str:
    """One line about it."""
    roofs = [f"{name} {clocks[name] - 1:+.1%}" for name in ("copy", "bf16", "fp8") if clocks[name]]  # type: ignore[operator]
    mhz = [clocks[name] for name in ("mhz_before", "mhz_after")]
    clock = [f"clock {mhz[0]:,.0f} to {mhz[1]:,.0f} MHz"] if mhz[0] and mhz[1] else []
    return "drift of the roofs over these cases: " + ", ".join(roofs + clock)
