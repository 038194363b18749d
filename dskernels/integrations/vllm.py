"""A plugin for vLLM: block-scaled fp8 linear layers, experts and the grouped router on these operations.

vLLM finds it through the entry point ``vllm.general_plugins``. It only acts if the environment variable
``VLLM_PLUGINS``, the list of plugins that vLLM loads, contains ``dskernels``, so that installing dskernels for another
purpose does not change vLLM. Written against vLLM 0.33.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

import dskernels as ds
from dskernels.types import Fp8Tensor, Routing

KERNELS = "vllm.model_executor.kernels.linear"
MOE = "vllm.model_executor.layers.fused_moe"
ROUTER = f"{MOE}.router.grouped_topk_router"
CHOICES = {f"{MOE}.oracle.fp8": "Fp8MoeBackend", f"{MOE}.oracle.unquantized": "UnquantizedMoeBackend"}
BLOCK = (128, 128)


def register_if_named() -> None:
    """Called by vLLM in each of its processes: `register`, if ``VLLM_PLUGINS`` contains dskernels."""
    if "dskernels" in os.environ.get("VLLM_PLUGINS", "").split(","):
        register()


def register() -> None:
    """Register these operations with vLLM. Calling it again has no effect."""
    kernels = importlib.import_module(KERNELS)
    kernel = linear_kernel()
    platform = importlib.import_module("vllm.platforms").PlatformEnum.CUDA
    candidates = kernels._POSSIBLE_FP8_BLOCK_KERNELS.get(platform, [])
    if kernel not in candidates:
        kernels.register_linear_kernel(kernel, platform, "fp8_block")
        candidates = kernels._POSSIBLE_FP8_BLOCK_KERNELS[platform]
        candidates.insert(0, candidates.pop())  # vLLM takes the first that supports a layer, and registering appends
    for name, backends in CHOICES.items():
        choice: Any = importlib.import_module(name)
        if not getattr(choice.backend_to_kernel_cls, "of_dskernels", False):
            triton = getattr(choice, backends).TRITON
            choice.backend_to_kernel_cls = _ours_before(choice.backend_to_kernel_cls, triton)
    router: Any = importlib.import_module(ROUTER)
    if not getattr(router.grouped_topk, "of_dskernels", False):
        router.grouped_topk = _or_ours(router.grouped_topk)


@functools.cache
def linear_kernel() -> type:
    """The class of linear kernels to register; created on demand, since its base class is vLLM's."""
    base = importlib.import_module(f"{KERNELS}.scaled_mm.BlockScaledMMLinearKernel").Fp8BlockScaledMMLinearKernel

    class DskernelsFp8BlockScaledMMKernel(base):  # type: ignore[misc, valid-type]
        """`dskernels.quantize` and `dskernels.fp8_gemm` for weights in 128x128 blocks."""

        apply_input_quant = False  # we quantise into the layout that our product reads

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            """NVIDIA GPUs that can multiply e4m3: sm_89 and newer."""
            if compute_capability is None:
                compute_capability = _capability()
                if not compute_capability:
                    return False, "dskernels: there is no CUDA GPU"
            return (True, None) if compute_capability >= 89 else (False, "dskernels: e4m3 needs sm_89 or later")

        @classmethod
        def can_implement(cls, config: Any) -> tuple[bool, str | None]:
            """Dynamic activation scales in 1x128 tiles, weights in 128x128 blocks."""
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
            """A @ B.T of unquantised activations and a quantised weight."""
            weight = Fp8Tensor(B, Bs.float(), BLOCK)
            return ds.fp8_gemm(ds.quantize(A.contiguous()), weight, out_dtype=self.config.out_dtype)

    return DskernelsFp8BlockScaledMMKernel


@functools.cache
def experts_kernel() -> type:
    """The class of expert kernels to register; created on demand, since its base class is vLLM's."""
    modular: Any = importlib.import_module(f"{MOE}.modular_kernel")
    keys: Any = importlib.import_module("vllm.model_executor.layers.quantization.utils.quant_utils")
    silu = importlib.import_module(f"{MOE}.activation").MoEActivation.SILU
    summed = importlib.import_module(f"{MOE}.topk_weight_and_reduce").TopKWeightAndReduceNoOP

    class DskernelsExperts(modular.FusedMoEExpertsModular):
        """`dskernels.fused_experts` for plain weights, and for e4m3 in 128x128 blocks."""

        # The operation quantises its input itself, into the layout that its products read.
        expects_unquantized_inputs = True

        @staticmethod
        def is_supported_config(
            cls: Any, moe_config: Any, weight_key: Any, activation_key: Any, activation_format: Any
        ) -> tuple[bool, str | None]:
            """vLLM's usual conditions, and that the SwiGLU is unmodified, which vLLM does not check."""
            can, reason = modular.FusedMoEExperts.is_supported_config(
                cls, moe_config, weight_key, activation_key, activation_format
            )
            if not can:
                return can, reason
            for name in ("swiglu_limit", "swiglu_alpha", "swiglu_beta"):
                if getattr(moe_config, name) is not None:
                    return False, f"dskernels: {name} is {getattr(moe_config, name)}, expected the plain SwiGLU"
            return (False, "dskernels: experts have a bias") if moe_config.has_bias else (True, None)

        @staticmethod
        def activation_format() -> Any:
            return modular.FusedMoEActivationFormat.Standard

        @staticmethod
        def _supports_current_device() -> bool:
            return _capability() >= 80

        @staticmethod
        def _supports_no_act_and_mul() -> bool:
            return False

        @staticmethod
        def _supports_quant_scheme(weight_key: Any, activation_key: Any) -> bool:
            if weight_key is None and activation_key is None:
                return True
            blocks = weight_key == keys.kFp8Static128BlockSym and activation_key == keys.kFp8Dynamic128Sym
            return blocks and _capability() >= 89

        @staticmethod
        def _supports_activation(activation: Any) -> bool:
            return activation == silu

        @staticmethod
        def _supports_parallel_config(moe_parallel_config: Any) -> bool:
            # Between ranks, vLLM sends e4m3 and scales in the layout of its own experts, which differs.
            return not moe_parallel_config.use_all2all_kernels

        def finalize_weight_and_reduce_impl(self) -> Any:
            """Nothing is left to do: the operation applies the routing weights and sums."""
            return summed()

        def workspace_shapes(self, M: int, N: int, K: int, *rest: Any) -> tuple[tuple[int, ...], ...]:
            """No scratch memory from vLLM, and one output row for each token."""
            return (0,), (0,), (M, K)

        def apply(
            self,
            output: Tensor,
            hidden_states: Tensor,
            w1: Tensor,
            w2: Tensor,
            topk_weights: Tensor,
            topk_ids: Tensor,
            activation: Any,
            global_num_experts: int,
            expert_map: Tensor | None,
            a1q_scale: Tensor | None,
            a2_scale: Tensor | None,
            workspace13: Tensor,
            workspace2: Tensor,
            expert_tokens_meta: Any,
            apply_router_weight_on_input: bool,
        ) -> None:
            """This rank's experts for all tokens; ids of other ranks' experts are -1 in `expert_map` and dropped."""
            if self.post_gemm2_hook is not None:
                raise NotImplementedError("dskernels: post_gemm2_hook wants rows before they are summed")
            experts = topk_ids if expert_map is None else expert_map[topk_ids.long()]
            weights = torch.ones_like(topk_weights) if apply_router_weight_on_input else topk_weights
            w13: Tensor | Fp8Tensor = w1
            down: Tensor | Fp8Tensor = w2
            if self.w1_scale is not None:
                w13, down = Fp8Tensor(w1, self.w1_scale, BLOCK), Fp8Tensor(w2, self.w2_scale, BLOCK)
            routing = Routing(weights.float(), experts, experts, experts)  # the load is not used here
            output.copy_(ds.fused_experts(hidden_states, w13, down, routing))

    return DskernelsExperts


def _capability() -> int:
    """Compute capability of the GPU, 90 for sm_90; 0 if vLLM runs on something else."""
    platform = importlib.import_module("vllm.platforms").current_platform
    capability = platform.get_device_capability() if platform.is_cuda() else None
    return 0 if capability is None else capability.to_int()


def _ours_before(original: Any, triton: Any) -> Any:
    """vLLM's `backend_to_kernel_cls`, which lists the kernels of a backend, with ours before its Triton experts."""

    @functools.wraps(original)
    def backend_to_kernel_cls(backend: Any) -> list[type]:
        kernels = original(backend)
        return [experts_kernel(), *kernels] if backend == triton else kernels

    backend_to_kernel_cls.of_dskernels = True  # type: ignore[attr-defined]
    return backend_to_kernel_cls


def _or_ours(original: Any) -> Any:
    """vLLM's `grouped_topk`, computed by `dskernels.route` where that gives the same result."""

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
        # `route` scores a group by its largest expert for softmax, and by its two largest for sigmoid; vLLM does this
        # without and with a bias.
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
