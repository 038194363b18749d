"""GPU operations for models with DeepSeek-V3's architecture, each with a plain PyTorch reference that defines it."""

from dskernels.choice import explain, use_impl
from dskernels.fp8 import (
    quantize,
    quantize_both,
    rmsnorm_backward,
    rmsnorm_quantize,
    swiglu_quantize,
    swiglu_quantize_backward,
)
from dskernels.gemm import fp8_gemm, fp8_linear
from dskernels.grouped_gemm import grouped_gemm, grouped_gemm_masked, grouped_wgrad, quantize_grouped
from dskernels.loss import cross_entropy
from dskernels.mla import (
    apply_rope,
    merge_states,
    mla_decode,
    mla_decode_queries,
    mla_prefill,
    mla_prefill_cached,
    mla_values_quantize,
    write_latent_cache,
)
from dskernels.moe import combine, feed_forward, fused_experts, permute
from dskernels.routing import balance_loss, load_statistics, route, route_hidden, update_bias
from dskernels.types import Fp8Tensor, LoadStatistics, Permuted, Routing

__version__ = "0.1.0"

__all__ = [
    "Fp8Tensor",
    "LoadStatistics",
    "Permuted",
    "Routing",
    "apply_rope",
    "balance_loss",
    "combine",
    "cross_entropy",
    "explain",
    "feed_forward",
    "fp8_gemm",
    "fp8_linear",
    "fused_experts",
    "grouped_gemm",
    "grouped_gemm_masked",
    "grouped_wgrad",
    "load_statistics",
    "merge_states",
    "mla_decode",
    "mla_decode_queries",
    "mla_prefill",
    "mla_prefill_cached",
    "mla_values_quantize",
    "permute",
    "quantize",
    "quantize_both",
    "quantize_grouped",
    "rmsnorm_backward",
    "rmsnorm_quantize",
    "route",
    "route_hidden",
    "swiglu_quantize",
    "swiglu_quantize_backward",
    "update_bias",
    "use_impl",
    "write_latent_cache",
]
