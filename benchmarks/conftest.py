"""``pytest benchmarks``: adds what is known about the machine to pytest-benchmark's JSON."""

from __future__ import annotations

import dataclasses

import torch

from benchmarks.results import Machine


def pytest_benchmark_update_machine_info(config, machine_info):
    if torch.cuda.is_available():
        machine_info["dskernels"] = dataclasses.asdict(Machine.current())
    else:
        machine_info["dskernels"] = {"gpu": None, "torch": torch.__version__}
