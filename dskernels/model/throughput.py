"""How much of a chip a training step uses."""

from __future__ import annotations

import resource
import sys

import torch
from torch import Tensor

from dskernels.model.config import Config

# Dense bf16 TFLOP/s from data sheets, by the prefix of `torch.cuda.get_device_name` after "NVIDIA "; longer names
# first.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "GH200": 989.0,
    "H20": 148.0,
    "B200": 2250.0,
    "GB200": 2500.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a device according to its data sheet; None if it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    fitting = [
        peak for known, peak in PEAK_TFLOPS.items() if name == known or name.startswith((known + " ", known + "-"))
    ]
    return fitting[0] * 1e12 if fitting else None


def active_parameters(config: Config, *, mtp: bool) -> int:
    """Matrix parameters that a token is multiplied by, see `ParameterCount.active`.

    With ``mtp`` those of the MTP modules are included, and the head once more for each of them.
    """
    count = config.parameter_count()
    if not mtp:
        return count.active
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert
    modules = config.num_nextn_predict_layers
    return count.active + count.mtp - modules * idle + modules * config.vocab_size * config.hidden_size


def step_flops(config: Config, cu_seqlens: Tensor, *, mtp: bool) -> float:
    """Floating-point operations of forward and backward over packed sequences, as they are counted for MFU.

    With A active parameters (`active_parameters`), L layers (including MTP modules), H heads, and causal attention
    within sequences of lengths s::

        6 A sum(s) + 3 L H (qk_head_dim + v_head_dim) sum(s (s + 1))

    A product is two operations for each pair, the backward is twice the forward, and half of the pairs of a sequence
    are masked. Recomputation, the router's choice, norms and the optimiser do not count. In fp8 the operations are the
    same, so MFU is bf16-equivalent: these operations per second, divided by the chip's bf16 peak.

    Args:
        config: the model's shape.
        cu_seqlens: where sequences begin and end, on the CPU.
        mtp: whether the MTP modules run.
    """
    lengths = cu_seqlens.diff().double()
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    heads = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    products = 6.0 * active_parameters(config, mtp=mtp) * float(lengths.sum())
    return products + 3.0 * layers * heads * float((lengths * (lengths + 1)).sum())


def peak_memory(device: torch.device) -> int:
    """The peak number of bytes used: of the GPU's memory by tensors, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
