"""Plain PyTorch that defines what each operation means: fp32 arithmetic (fp64 stays fp64), no tricks, any device."""

from dskernels.reference.fp8 import (
    quantize,
    quantize_both,
    rmsnorm_backward,
    rmsnorm_quantize,
    swiglu_quantize,
    swiglu_quantize_backward,
)
from dskernels.reference.gemm import fp8_gemm, fp8_linear
from dskernels.reference.grouped_gemm import grouped_gemm, grouped_gemm_masked, grouped_wgrad, quantize_grouped
from dskernels.reference.loss import cross_entropy
from dskernels.reference.mla import (
    apply_rope,
    merge_states,
    mla_decode,
    mla_decode_queries,
    mla_prefill,
    mla_prefill_cached,
    mla_values_quantize,
    write_latent_cache,
)
from dskernels.reference.moe import combine, feed_forward, fused_experts, permute
from dskernels.reference.routing import balance_loss, load_statistics, route, route_hidden, update_bias

__all__ = [
    "apply_rope",
    "balance_loss",
    "combine",
    "cross_entropy",
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
    "write_latent_cache",
]
