"""A plugin of vLLM: block-scaled fp8 linear layers and the grouped router of DeepSeek's models on these operations.

vLLM finds it where dskernels is installed (entry point ``vllm.general_plugins``), and it does something where the
variable ``VLLM_PLUGINS``, the list of the plugins that vLLM loads, names ``dskernels``: whoever installs these
operations for something else keeps vLLM's own. Written against vLLM 0.33. Its experts stay its own: it takes no kernels
for them from outside.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.types import Fp8Tensor

KERNELS = "vllm.model_executor.kernels.linear"
ROUTER = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router"
BLOCK = (128, 128)


def register_if_named() -> None:
    """What vLLM calls in each of its processes: `register`, where ``VLLM_PLUGINS`` names dskernels."""
    if "dskernels" in os.environ.get("VLLM_PLUGINS", "").split(","):
        register()


def register() -> None:
    """Put these operations into vLLM; once is enough."""
    kernels = importlib.import_module(KERNELS)
    kernel = linear_kernel()
    platform = importlib.import_module("vllm.platforms").PlatformEnum.CUDA
    candidates = kernels._POSSIBLE_FP8_BLOCK_KERNELS.get(platform, [])
    if kernel not in candidates:
        kernels.register_linear_kernel(kernel, platform, "fp8_block")
        candidates = kernels._POSSIBLE_FP8_BLOCK_KERNELS[platform]
        candidates.insert(0, candidates.pop())  # the first that can is taken, and registering appends
    router: Any = importlib.import_module(ROUTER)
    if not getattr(router.grouped_topk, "of_dskernels", False):
        router.grouped_topk = _or_ours(router.grouped_topk)


@functools.cache
def linear_kernel() -> type:
    """The class of linear kernels that vLLM chooses from, made when vLLM is there."""
    base = importlib.import_module(f"{KERNELS}.scaled_mm.BlockScaledMMLinearKernel").Fp8BlockScaledMMLinearKernel

    class DskernelsFp8BlockScaledMMKernel(base):  # type: ignore[misc, valid-type]
        """`dskernels.quantize` and `dskernels.fp8_gemm` for weights in 128x128 blocks."""

        apply_input_quant = False  # ours is in the layout that the product reads

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            """On NVIDIA GPUs that multiply e4m3: from sm_89 on."""
            if compute_capability is None:
                if not torch.cuda.is_available():
                    return False, "dskernels: there is no CUDA GPU"
                major, minor = torch.cuda.get_device_capability()
                compute_capability = 10 * major + minor
            return (True, None) if compute_capability >= 89 else (False, "dskernels: e4m3 needs sm_89 or later")

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            """Dynamic activations in 1x128 tiles, weights in 128x128 blocks."""
            can, reason = super().can_implement(config)
            if not can:
                return can, reason
            tiles = tuple(config.activation_quant_key.scale.group_shape)
            blocks = tuple(config.weight_quant_key.scale.group_shape)
            if tiles != (1, 128) or blocks != BLOCK:
                return False, f"dskernels: expected tiles (1, 128) by blocks {BLOCK}, got {tiles} by {blocks}"
            if config.out_dtype not in (torch.bfloat16, torch.float16, torch.float32):
                return False, f"dskernels: the result is {config.out_dtype}"
            return True, None

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            """A @ B.T of plain activations and a quantised weight."""
            weight = Fp8Tensor(B, Bs.float(), BLOCK)
            return ds.fp8_gemm(ds.quantize(A.contiguous()), weight, out_dtype=self.config.out_dtype)

    return DskernelsFp8BlockScaledMMKernel


def _or_ours(original: Any) -> Any:
    """`grouped_topk` of vLLM by `dskernels.route`, where that computes it."""

    @functools.wraps(original)
    def grouped_topk(
        hidden_states: Tensor,
        gating_output: Tensor,
        topk: int,
        renormalize: bool,
        num_expert_group: int = 0,
        topk_group: int = 0,
        scoring_func: str = "softmax",
        routed_scaling_factor: float = 1.0,
        e_score_correction_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Groups score by their largest without a bias, which `route` does for softmax; by the two largest with one.
        if (scoring_func == "sigmoid") != (e_score_correction_bias is not None):
            return original(
                hidden_states,
                gating_output,
                topk,
                renormalize,
                num_expert_group,
                topk_group,
                scoring_func,
                routed_scaling_factor,
                e_score_correction_bias,
            )
        bias = e_score_correction_bias
        routing = ds.route(
            gating_output.contiguous(),
            None if bias is None else bias.float(),
            top_k=topk,
            n_groups=max(num_expert_group, 1),
            top_groups=max(topk_group, 1),
            score=scoring_func,
            normalize=renormalize,
            scale=float(routed_scaling_factor),
        )
        return routing.weights, routing.experts

    grouped_topk.of_dskernels = True  # type: ignore[attr-defined]
    return grouped_topk
