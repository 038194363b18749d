"""Peak memory of a training step of the expert block, compared with autograd's: ``python -m benchmarks.memory``.

It counts what a step needs at its peak in addition to what exists before it: inputs, weights and, in fp8, their
quantised copies, which stay until the weights change. The last columns also leave out the gradients of the weights,
which every version has to make.
"""

from __future__ import annotations

import torch

import dskernels as ds
from benchmarks import bench_moe, workloads
from benchmarks.cases import Call
from benchmarks.peers import moe as moe_peers

# One of 8 GPUs, and one of 32, each with its share of the tokens' choices.
WORKLOADS = (workloads.Moe(4096, e=32), workloads.Moe(16384, e=32), workloads.Moe(4096, e=8))
AUTOGRAD = "autograd on grouped_mm"


def peak_bytes(step: Call) -> int:
    """What the second call takes at its peak; the first compiles, and makes what is kept between steps."""
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def steps(w: workloads.Moe) -> dict[str, Call]:
    """A forward and backward of each version."""
    x = bench_moe.FusedExpertsTraining(w).inputs(torch.device("cuda"))

    def gradients(forward) -> Call:
        return lambda: torch.autograd.grad(forward(), (x.x, x.w13, x.w2), x.dy)

    def ours(fp8: bool, recompute: bool) -> Call:
        return gradients(lambda: ds.fused_experts(x.x, x.w13, x.w2, x.routing, fp8=fp8, recompute=recompute))

    return {
        AUTOGRAD: gradients(moe_peers.grouped_mm_experts(x.x, x.w13, x.w2, x.routing).run),
        "bf16": ours(False, False),
        "bf16, recompute": ours(False, True),
        "fp8": ours(True, False),
        "fp8, recompute": ours(True, True),
    }


def main() -> None:
    """Print a line for each workload and version: GB, and the share of autograd's."""
    for w in WORKLOADS:
        weight_gradients = 2 * w.e * 3 * w.h * w.i
        peaks = {name: peak_bytes(step) for name, step in steps(w).items()}
        print(w.name)
        for name, peak in peaks.items():
            shares = (peak / peaks[AUTOGRAD], (peak - weight_gradients) / (peaks[AUTOGRAD] - weight_gradients))
            without = (peak - weight_gradients) / 1e9
            print(f"  {name:24} {peak / 1e9:6.2f} GB {shares[0]:4.0%}   without dW {without:6.2f} GB {shares[1]:4.0%}")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    if torch.cuda.is_available():
        main()
    else:
        print("No GPU here: nothing to measure.")
