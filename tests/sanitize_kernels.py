"""Which case of `sanitize` runs each kernel of the library: all of them, as a test says that walks the package.

A case that did not launch a kernel that it is named for here ends as wrong (`Noted`), so that this is no mere list.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dskernels.cuda import compiler

PACKAGE = Path(__file__).parent.parent / "dskernels"

PREFILL = "triton: mla_prefill, 20 and 9 over 7 and 50, h3 of 1, dims 32 + 16 / 24, fp32, gradients"
# A portable kernel by its module and name, one in CUDA C++ by its file and name.
CASES = {
    "fp8.triton:quantize_columns_kernel": "triton: quantize, 200x65, fp32, tiles 128x1, transposed",
    "fp8.triton:quantize_kernel": "triton: quantize, 83x576, fp32, tiles 1x128",
    "fp8.triton_norm:rmsnorm_backward_kernel": "triton: rmsnorm_backward, 5x576",
    "fp8.triton_norm:rmsnorm_quantize_kernel": "triton: rmsnorm_quantize, 5x576",
    "fp8.triton_norm:sum_parts_kernel": "triton: rmsnorm_backward, 5x576",
    "fp8.triton_swiglu:swiglu_quantize_backward_kernel": "triton: swiglu_quantize_backward, 37x2x200",
    "fp8.triton_swiglu:swiglu_quantize_columns_kernel": "triton: swiglu_quantize, 144x2x264, transposed",
    "fp8.triton_swiglu:swiglu_quantize_kernel": "triton: swiglu_quantize, 37x2x192",
    "gemm.triton:fp8_gemm_kernel": "triton: fp8_gemm, 83x576x300, bias",
    "grouped_gemm.triton:grouped_gemm_kernel": "triton: grouped_gemm, 72 rows, 4x130x200, bf16",
    "grouped_gemm.triton:grouped_gemm_masked_kernel": "triton: grouped_gemm_masked, 4x24 rows, 4x130x200, e4m3",
    "grouped_gemm.triton:plan_kernel": "triton: grouped_gemm, 72 rows, 4x130x200, bf16",
    "grouped_gemm.triton_wgrad:grouped_wgrad_kernel": "triton: grouped_gemm, 72 rows, 4x48x80, gradients",
    "grouped_gemm.triton_wgrad:quantize_grouped_kernel": "triton: quantize_grouped, 72 tokens, 4 groups, 200 columns",
    "mla.absorb.triton:queries_kernel": "triton: mla_decode_queries, t9 h3",
    "mla.cache.triton:write_kernel": "triton: write_latent_cache, t9, bf16 cache",
    "mla.decode.triton:combine_kernel": "triton: mla_decode, b2 q4 h3, dims 32 + 16, fp32",
    "mla.decode.triton:decode_kernel": "triton: mla_decode, b2 q2 h9, page 1, padded",
    "mla.merge.triton:merge_backward_kernel": "triton: merge_states, t7 h3, gradients",
    "mla.merge.triton:merge_kernel": "triton: merge_states, t7 h3, gradients",
    "mla.prefill.triton:forward_kernel": "triton: mla_prefill, 30 over 70, not causal",
    "mla.prefill.triton_backward:delta_kernel": PREFILL,
    "mla.prefill.triton_backward:dk_dv_kernel": PREFILL,
    "mla.prefill.triton_backward:dq_kernel": PREFILL,
    "mla.prefill.triton_gather:gather_kernel": "triton: mla_prefill_cached, 5, 20 and 0 new of 70, 20 and 3, page 16",
    "mla.prefill.triton_gather:pack_kernel": "triton: mla_prefill_cached, 5, 20 and 0 new of 70, 20 and 3, page 16",
    "moe.triton:combine_backward_kernel": "triton: combine, 33x40, top 2 of 8, gradients",
    "moe.triton:combine_kernel": "triton: permute, 33x40, top 2 of 256, gradient",
    "moe.triton:permute_kernel": "triton: permute, 70x136, top 3 of 6, bf16",
    "moe.triton_sort:compare_kernel": "triton: permute, 70x136, top 3 of 6, bf16",
    "moe.triton_swiglu:swiglu_backward_kernel": "triton: fused_experts, 20x136, 5x40 + shared, gradients",
    "moe.triton_swiglu:swiglu_kernel": "triton: fused_experts, 20x136, 5x40 + shared, bf16",
    "routing.triton:place_kernel": "triton: route, 9x48, top 4, three places an expert",
    "routing.triton:route_backward_kernel": "triton: route, 11x256, top 8, 4 of 8 groups, sigmoid",
    "routing.triton:route_kernel": "triton: route, 11x256, top 8, 4 of 8 groups, sigmoid",
    "routing.triton_balance:balance_loss_backward_kernel": "triton: balance_loss, 9x64, top 6, 4 sequences, sigmoid",
    "routing.triton_balance:begin_kernel": "triton: balance_loss, 9x64, top 6, 4 sequences, sigmoid",
    "routing.triton_balance:count_choices_kernel": "triton: balance_loss, 9x64, top 6, 4 sequences, sigmoid",
    "routing.triton_balance:sum_loss_kernel": "triton: balance_loss, 9x64, top 6, 4 sequences, sigmoid",
    "routing.triton_balance:token_loss_kernel": "triton: balance_loss, 9x64, top 6, 4 sequences, sigmoid",
    "routing.triton_balance:update_bias_kernel": "triton: update_bias, 384",
    "model.triton_adamw:adamw_kernel": "update of the optimiser",
    "model.triton_adamw:add_gradient_kernel": "update of the optimiser",
    "loss.triton:cross_entropy_kernel": "cross_entropy and its gradient",
    "loss.triton:cross_entropy_backward_kernel": "cross_entropy and its gradient",
    "mla.rope.triton:rope_kernel": "apply_rope",
    "fp8.triton_norm:rmsnorm_backward_wide_kernel": "gradient of a norm of wide rows",
    "mla.absorb.triton_values:values_kernel": "values of heads in e4m3",
    "mla.prefill.triton_groups:group_kernel": "new tokens in groups",
    "mla.prefill.triton_groups:take_results_kernel": "new tokens in groups",
    "model.triton_few:products_kernel": "products of few rows, the norm before them",
    "model.triton_few:add_norm_kernel": "norm of a sum",
    "model.triton_few_embed:embed_kernel": "embedding and angles",
    "model.triton_few_embed:look_ahead_kernel": "a draft taken in",
    "model.triton_steps:place_kernel": "places of tokens, and how texts go on",
    "model.triton_steps:advance_kernel": "places of tokens, and how texts go on",
    "model.triton_steps:chances_kernel": "places of tokens, and how texts go on",
    "model.parallel.symmetric_triton:put_kernel": "rows for other ranks",
    "model.parallel.symmetric_triton:sum_kernel": "sum over ranks",
    "model.parallel.triton_wire:unload_kernel": "tokens off the wire",
    "model.parallel.triton_wire:choices_kernel": "tokens off the wire",
    "moe.triton_sort:append_choices_kernel": "choices sorted",
    "moe.triton_sort:count_kernel": "choices sorted",
    "moe.triton_sort:scan_kernel": "choices sorted",
    "moe.triton_sort:place_kernel": "choices sorted",
    "routing.triton_gate:gate_kernel": "products of a gate, in parts, and its gradients",
    "routing.triton_gate:sum_parts_kernel": "products of a gate, in parts, and its gradients",
    "routing.hopper_gate:pieces_kernel": "products of a gate, in parts, and its gradients",
    "gemm.triton_narrow:narrow_kernel": "fp8_gemm of few rows, in parts",
    "gemm.triton_narrow:sum_parts_kernel": "fp8_gemm of few rows, in parts",
    "moe.triton_few:few_up_kernel": "fused_experts, few tokens in plain weights",
    "moe.triton_few:few_down_kernel": "fused_experts, few tokens in plain weights",
    "moe.triton_packed:pack_kernel": "swiglu of experts, kept and its gradient",
    "moe.triton_swiglu:sum_of_choices_kernel": "swiglu of experts, kept and its gradient",
    "moe/hopper_swiglu.cu:swiglu_backward": "swiglu of experts, kept and its gradient",
    "fp8/hopper.cu:quantize": "quantize_both",
    "fp8/hopper_norm.cu:rmsnorm_quantize": "rmsnorm_quantize",
    "gemm/hopper.cu:fp8_gemm": "fp8_gemm 128x128, clusters of 1, 16 ahead, tiles in groups of 4, B in 128x128",
    "gemm/hopper_small.cu:fp8_gemm_small": "fp8_gemm, few rows",
    "grouped_gemm/hopper.cu:grouped_gemm": "grouped_gemm 128x128, clusters of 1, 16 ahead, tiles in groups of 4",
    "grouped_gemm/hopper.cu:grouped_wgrad": "grouped_wgrad 128x128, clusters of 1, 16 ahead, tiles in groups of 16",
    "grouped_gemm/hopper_half.cu:grouped_half": "grouped_gemm and its gradients, bf16",
    "grouped_gemm/hopper_quantize.cu:quantize_grouped": "quantize_grouped",
    "grouped_gemm/hopper_small.cu:grouped_gemm_small": "grouped_gemm, few rows",
    "mla/absorb/hopper.cu:mla_decode_queries": "mla_decode_queries, 130 tokens",
    "mla/cache/hopper.cu:write_latent_cache": "write_latent_cache, torch.bfloat16",
    "mla/decode/hopper.cu:mla_decode": "mla_decode, pages of 64, torch.bfloat16",
    "mla/decode/hopper_combine.cu:combine": "mla_decode, pages of 64, torch.bfloat16",
    "mla/decode/hopper_rows.cu:mla_decode": "mla_decode, pages of 64, torch.uint8",
    "mla/prefill/hopper.cu:plan": "mla_prefill",
    "mla/prefill/hopper.cu:attend": "mla_prefill",
    "mla/prefill/hopper_backward.cu:prepare": "mla_prefill's gradient",
    "mla/prefill/hopper_backward.cu:differentiate": "mla_prefill's gradient",
    "mla/prefill/hopper_backward.cu:finish": "mla_prefill's gradient",
    "moe/hopper_few_up.cu:few_experts_up": "fused_experts, few tokens",
    "moe/hopper_few_down.cu:few_experts_down": "fused_experts, few tokens",
    "routing/hopper.cu:route": "route and its gradient",
    "routing/hopper_backward.cu:route_backward": "route and its gradient",
}


def library() -> Iterator[str]:
    """Every kernel of the package, as its source says."""
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        jitted = [name for name in _jitted(path) if name.endswith("_kernel")]
        yield from (f"{module}:{name}" for name in jitted)
    for path in sorted(PACKAGE.rglob("*.cu")):
        heads = re.findall(r'extern "C" __global__([^{;]*)\{', compiler.source_of(path))
        for head in heads:
            name = re.search(r"(\w+)\s*\(", re.sub(r"__\w+__\([^)]*\)|(?m:^#.*$)", "", head))
            yield f"{path.relative_to(PACKAGE)}:{name[1]}"  # type: ignore[index]


def _jitted(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and any(_is_jit(decorator) for decorator in node.decorator_list):
            yield node.name


def _is_jit(decorator: ast.expr) -> bool:
    name = decorator.func if isinstance(decorator, ast.Call) else decorator
    return isinstance(name, ast.Attribute) and name.attr == "jit"


class Noted:
    """From when it is made on, the kernels that this process has launched or prepared to launch."""

    def __init__(self) -> None:
        import triton

        self.kernels: set[str] = set()
        run, kernel = triton.JITFunction.run, compiler.kernel

        def note_triton(jitted: Any, *args: Any, **kwargs: Any) -> Any:
            self.kernels.add(f"{jitted.fn.__module__.removeprefix('dskernels.')}:{jitted.fn.__name__}")
            return run(jitted, *args, **kwargs)

        def note_cuda(path: Path, name: str, *args: Any) -> Any:
            self.kernels.add(f"{path.relative_to(PACKAGE)}:{name}")
            return kernel(path, name, *args)

        triton.JITFunction.run = note_triton
        everywhere(kernel, note_cuda)

    def missing(self, case: str) -> list[str]:
        """Kernels that this case is to launch, and nobody did."""
        return [kernel for kernel, named in CASES.items() if named == case and kernel not in self.kernels]


def everywhere(old: Any, new: Any) -> None:
    """Put a function in place of another wherever it was imported to; as it is among them, also in what comes later."""
    for module in list(sys.modules.values()):
        names = [name for name, value in vars(module).items() if value is old] if hasattr(module, "__dict__") else []
        for name in names:
            setattr(module, name, new)
