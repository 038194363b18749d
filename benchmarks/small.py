"""Every case at a size that a CPU can compute with the reference: for tests, and for ``pytest benchmarks`` without a
GPU."""

from __future__ import annotations

import dataclasses

from benchmarks import workloads
from benchmarks.cases import Case

# What each size is reduced to: a few tiles of every kind, the last one ragged, and no two sizes alike.
SIZES = {
    "Rows": {"m": 5, "n": 264},
    "Gemm": {"m": 5, "n": 136, "k": 256},
    "GroupedGemm": {"g": 3, "m": 6, "n": 136, "k": 256},
    "GroupedRows": {"g": 3, "m": 6, "n": 136},
    "Route": {"t": 12, "e": 16, "k": 4},
    "Replayed": {"t": 12, "e": 16, "k": 4, "calls": 2},
    "RouteHidden": {"t": 12, "e": 16, "k": 4, "h": 72},
    "Moe": {"t": 9, "e": 4, "k": 2, "h": 256, "i": 128},
    "Decode": {"b": 3, "s": 70, "h": 3},
    "SharedPrefix": {"b": 3, "prefix": 64, "own": 70, "h": 3},
    "Prefill": {"b": 2, "s": 33, "h": 3},
    "PackedPrefill": {"t": 70, "mean": 20, "h": 3},
    "ChunkedPrefill": {"b": 2, "s": 70, "q": 5, "h": 3},
    "Tokens": {"t": 9, "h": 3},
    "ModelDecode": {"b": 3, "s": 70},
    "ModelPrefill": {"s": 70},
    "Training": {"b": 2, "s": 70},
    "Generation": {"b": 2, "prompts": 3, "n": 5, "drafts": 1},
}


def shrunk(case: Case) -> Case:
    """The same case with every size reduced; a workload of a new kind needs a line in `SIZES`."""
    limits = SIZES[type(case.workload).__name__]
    sizes = {name: min(getattr(case.workload, name), limit) for name, limit in limits.items()}
    if getattr(case.workload, "uneven", ()):
        sizes["uneven"] = (7, sizes["s"], 5)[: sizes["b"]]  # no fewer than the new tokens
    if hasattr(case.workload, "model"):
        sizes["model"] = workloads.MODEL_TINY
    return dataclasses.replace(case, workload=dataclasses.replace(case.workload, **sizes))
