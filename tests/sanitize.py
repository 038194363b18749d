"""One config of every CUDA C++ kernel on small shapes, for compute-sanitizer (see `make sanitize`).

`python tests/sanitize.py "few rows"` runs only kernels whose name contains the text, to find the one a report is of.
With `--racecheck` kernels for many rows run as that tool can follow them: without clusters, as it knows nothing of
arrivals from another CTA, and with one reader of what is written by ordinary stores (ONE_READER in cuda/fp8_gemm.cuh).
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import dskernels as ds
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.fp8.hopper import swiglu_quantize_kept
from dskernels.gemm import hopper
from dskernels.gemm.config import HOPPER_CONFIGS, HopperConfig
from dskernels.grouped_gemm import config as grouped_config
from dskernels.grouped_gemm import hopper as grouped_hopper
from dskernels.moe import hopper_swiglu
from dskernels.moe.experts import Batch
from dskernels.moe.packed import packed_width
from dskernels.moe.triton_packed import packed
from dskernels.moe.triton_sort import sort
from dskernels.moe.triton_swiglu import swiglu_backward
from dskernels.parity.inputs import quantized, spread
from dskernels.parity.paging import paged_cache


def kernels(racecheck: bool) -> Iterator[tuple[str, Callable[[], bool]]]:
    """Name each kernel, with what runs it and says whether the result was right."""

    def each(configs: tuple[HopperConfig, ...]) -> Iterator[tuple[str, HopperConfig]]:
        for config in configs:
            if racecheck:
                config = replace(config, cluster=1, one_reader=True)
            yield f"{config.tile}, clusters of {config.cluster}", config

    for b_rows, configs in HOPPER_CONFIGS.items():
        for name, config in each(configs):
            yield f"fp8_gemm {name}, B in {b_rows}x128", functools.partial(many_rows, config, b_rows)
    yield "fp8_gemm, few rows", few_rows
    yield "quantize_both", quantize_both
    yield "quantize_grouped", quantize_grouped
    yield "quantize_both, a weight", quantize_weight
    yield "swiglu_quantize, its transpose and its gradient", swiglu_quantize
    yield "swiglu of experts, kept and its gradient", kept_swiglu
    yield "rmsnorm_quantize", rmsnorm_quantize
    for name, config in each(grouped_config.HOPPER_CONFIGS):
        yield f"grouped_gemm {name}", functools.partial(ragged_rows, config)
        yield f"grouped_gemm_masked {name}", functools.partial(masked_rows, config)
    for name, config in each(grouped_config.HOPPER_WGRAD_CONFIGS):
        yield f"grouped_wgrad {name}", functools.partial(ragged_tokens, config)
    yield "grouped_gemm, few rows", few_ragged_rows
    yield "fused_experts, few tokens", few_tokens
    yield "grouped_gemm and its gradients, bf16", half_precision
    yield "route and its gradient", route
    for dtype in (torch.bfloat16, torch.uint8):
        yield f"write_latent_cache, {dtype}", functools.partial(write_cache, dtype)
    if not racecheck:  # which would take the arrival of one lane for the reads of that lane alone; not tried
        yield "mla_prefill", prefill
        yield "mla_prefill_cached", prefill_cached
        for page, cache in ((64, torch.bfloat16), (16, torch.bfloat16), (3, torch.bfloat16), (64, torch.uint8)):
            name = f"mla_decode, pages of {page}, {cache}"
            yield name, functools.partial(decode, page, cache)
        for tokens in (5, 130):
            yield f"mla_decode_queries, {tokens} tokens", functools.partial(decode_queries, tokens)
    yield "mla_prefill's gradient", prefill_backward


def many_rows(config: HopperConfig, b_rows: int) -> bool:
    # K is long enough that every stage of shared memory is used again.
    a, b = quantized(0, 300, 1424, (1, 128), "cuda"), quantized(1, 392, 1424, (b_rows, 128), "cuda")
    out = torch.full((300, 392), torch.nan, device="cuda")
    Planned(functools.partial(hopper.plan, config))(a.data, a.scale, b.data, b.scale, b_rows, None, out, False)
    return parity.difference(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < parity.E4M3_SUMS


def few_rows() -> bool:
    a, b = quantized(0, 5, 2048, (1, 128), "cuda"), quantized(1, 200, 2048, (128, 128), "cuda")
    out = ds.fp8_gemm(a, b, out_dtype=torch.float32, impl="hopper")
    return parity.difference(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)) < parity.E4M3_SUMS


def quantize_both() -> bool:
    x = torch.randn(144, 264, device="cuda").bfloat16()
    pairs = zip(ds.quantize_both(x, impl="hopper"), ds.reference.quantize_both(x), strict=True)
    return all(torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) for got, want in pairs)


def quantize_weight() -> bool:
    x = torch.randn(2, 144, 272, device="cuda").bfloat16()
    pairs = zip(*(ds.quantize_both(x, block=(128, 128), impl=impl) for impl in ("hopper", "reference")), strict=True)
    return all(torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8)) for got, want in pairs)


def kept_swiglu() -> bool:
    experts = torch.randint(-1, 3, (150, 2), device="cuda", dtype=torch.int32)
    offsets, index, source = sort(experts, 4)
    batch, weights = Batch(300, 2, offsets, index, source), torch.rand(150, 2, device="cuda")
    gate_up, dhidden = torch.randn(300, 512, device="cuda").bfloat16(), torch.randn(300, 256, device="cuda").bfloat16()
    kept = torch.empty(300, packed_width(512), dtype=torch.uint8, device="cuda")
    swiglu_quantize_kept(gate_up, kept)
    right = torch.equal(kept[:, : 512 + 16], packed(gate_up)[:, : 512 + 16])
    for of_batch, of_rows, w in ((batch, 300, weights), (Batch(256), 256, None)):
        got = hopper_swiglu.swiglu_backward(kept[:of_rows], dhidden[:of_rows], of_batch, w)[0]
        want = swiglu_backward(kept[:of_rows], dhidden[:of_rows], of_batch.source, w)[0]
        used = int(offsets[-1]) if of_batch.offsets is not None else of_rows
        right &= parity.difference(got.dequantize()[:used], ds.quantize(want).dequantize()[:used]) < 1e-4
    return right


def swiglu_quantize() -> bool:
    gate_up, dy = torch.randn(1040, 528, device="cuda").bfloat16(), torch.randn(1040, 264, device="cuda").bfloat16()
    pairs = [
        [ds.swiglu_quantize(gate_up, transpose=transpose, impl=impl) for impl in ("hopper", "reference")]
        for transpose in (False, True)
    ]
    gate_up, dy = gate_up[:, :512].contiguous(), dy[:, :256].contiguous()
    gradients = (ds.swiglu_quantize_backward(dy, gate_up, impl=impl) for impl in ("hopper", "reference"))
    return all(torch.equal(got.scale, want.scale) for got, want in [*pairs, *zip(*gradients, strict=True)])


def rmsnorm_quantize() -> bool:
    x, residual = (torch.randn(33, 1416, device="cuda").bfloat16() for _ in range(2))
    weight = torch.randn(1416, device="cuda").bfloat16()
    (got, total), (want, sum_) = (
        ds.rmsnorm_quantize(x, weight, 1e-6, residual, impl=i) for i in ("hopper", "reference")
    )
    return torch.equal(total, sum_) and torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))


def quantize_grouped() -> bool:
    x = torch.randn(300, 264, device="cuda").bfloat16()
    offsets = torch.tensor([0, 150, 150, 290], dtype=torch.int32, device="cuda")
    got, want = ds.quantize_grouped(x, offsets, impl="hopper"), ds.reference.quantize_grouped(x, offsets)
    return torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))


SIZES = [150, 0, 321, 5]


def ragged_rows(config: HopperConfig) -> bool:
    a, b = quantized(0, 500, 1424, (1, 128), "cuda"), ds.quantize(torch.randn(4, 392, 1424, device="cuda"), (128, 128))
    offsets = torch.tensor([0, *SIZES], device="cuda").cumsum(0, dtype=torch.int32)
    out = torch.full((500, 392), torch.nan, device="cuda")
    launch = Planned(functools.partial(grouped_hopper.plan, config))
    launch(a.data, a.scale, b.data, b.scale, offsets, out)
    return parity.difference(out, ds.reference.grouped_gemm(a, b, offsets, out_dtype=out.dtype)) < parity.E4M3_SUMS


def masked_rows(config: HopperConfig) -> bool:
    flat, b = quantized(0, 1200, 1424, (1, 128), "cuda"), ds.quantize(torch.randn(4, 392, 1424).cuda(), (128, 128))
    a = ds.Fp8Tensor(flat.data.unflatten(0, (4, 300)), flat.scale.unflatten(0, (4, 300)))
    counts = torch.tensor(SIZES, dtype=torch.int32, device="cuda")
    out = torch.zeros(4, 300, 392, device="cuda")
    launch = Planned(functools.partial(grouped_hopper.plan_masked, config))
    launch(a.data, a.scale, b.data, b.scale, counts, out)
    want = ds.reference.grouped_gemm_masked(a, b, counts, out_dtype=out.dtype)
    return parity.difference(out, want) < parity.E4M3_SUMS


def ragged_tokens(config: HopperConfig) -> bool:
    offsets = torch.tensor([0, 150, 150, 900], dtype=torch.int32, device="cuda")
    dy, x = (ds.quantize_grouped(spread(i, 900, width).cuda(), offsets) for i, width in enumerate((392, 400)))
    out = torch.full((3, 392, 400), torch.nan, device="cuda")
    launch = Planned(functools.partial(grouped_hopper.plan_wgrad, config))
    launch(dy.data, dy.scale, x.data, x.scale, offsets, out, False)
    return parity.difference(out, ds.reference.grouped_wgrad(dy, x, offsets)) < parity.E4M3_SUMS


def few_ragged_rows() -> bool:
    a, b = quantized(0, 90, 1424, (1, 128), "cuda"), ds.quantize(torch.randn(4, 392, 1424, device="cuda"), (128, 128))
    offsets = torch.tensor([0, 3, 3, 70, 85], dtype=torch.int32, device="cuda")
    out = ds.grouped_gemm(a, b, offsets, out_dtype=torch.float32, impl="hopper")
    return parity.difference(out, ds.reference.grouped_gemm(a, b, offsets, out_dtype=out.dtype)) < parity.E4M3_SUMS


def few_tokens() -> bool:
    w13, w2 = (ds.quantize(torch.randn(8, *shape, device="cuda"), (128, 128)) for shape in ((784, 656), (656, 392)))
    experts = torch.tensor([[6, 0], [3, -1], [6, 3]], dtype=torch.int32, device="cuda")
    routing = ds.Routing(torch.rand(3, 2, device="cuda"), experts, experts, experts)
    x = torch.randn(3, 656, device="cuda").bfloat16()
    got = ds.fused_experts(x, w13, w2, routing, n_shared=1, impl="hopper")
    want = ds.fused_experts(x.float(), w13, w2, routing, n_shared=1, impl="reference")
    return parity.difference(got.float(), want) < 1e-3


def half_precision() -> bool:
    a = torch.randn(500, 712, device="cuda").bfloat16().requires_grad_()
    b = torch.randn(4, 392, 712, device="cuda").bfloat16().requires_grad_()
    offsets = torch.tensor([0, *SIZES], device="cuda").cumsum(0, dtype=torch.int32)
    dy = torch.randn(500, 392, device="cuda").bfloat16()
    got, want = (
        (out.detach(), *torch.autograd.grad(out, (a, b), dy))
        for out in (ds.grouped_gemm(a, b, offsets, impl=impl) for impl in ("hopper", "triton"))
    )
    return all(parity.difference(x, y) < 1e-5 for x, y in zip(got, want, strict=True))


def decode(page: int, dtype: torch.dtype) -> bool:
    # One request that several CTAs share, a short one, an empty one; of one row block, and of two in a cluster.
    right = True
    for heads in (16, 64):
        q = torch.randn(3, 2, heads, 576, device="cuda").bfloat16()
        cache = paged_cache(0, [3000, 5, 0], page, 512, 64, dtype, "cuda", scale=0.1)
        options = {"scale": 576**-0.5, "q_lengths": torch.tensor([2, 1, 2], dtype=torch.int32, device="cuda")}
        got, want = ds.mla_decode(q, *cache, **options, impl="hopper"), ds.reference.mla_decode(q, *cache, **options)
        right &= parity.difference(got[0], want[0]) < 1e-5
    return right


def write_cache(dtype: torch.dtype) -> bool:
    # An odd number of tokens; slots that are skipped.
    kv, k_rope = torch.randn(21, 576, device="cuda").bfloat16().split([512, 64], -1)
    angle = torch.rand(21, 32, device="cuda") * 6
    inputs = kv, k_rope, torch.rand(512, device="cuda").bfloat16(), angle.cos(), angle.sin()
    slots = torch.tensor([-1, 25, 2**40, *range(18)], device="cuda")
    caches = [torch.zeros(5, 5, 656 if dtype == torch.uint8 else 576, dtype=dtype, device="cuda") for _ in range(2)]
    for cache, impl in zip(caches, ("hopper", "reference"), strict=True):
        ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl=impl)
    return torch.equal(*(cache.view(torch.uint8) for cache in caches))


def decode_queries(tokens: int) -> bool:
    q, w_uk = (torch.randn(shape, device="cuda").bfloat16() / 4 for shape in ((tokens, 2, 192), (2, 128, 512)))
    angle = torch.rand(tokens, 32, device="cuda") * 6
    got, want = (ds.mla_decode_queries(q, w_uk, angle.cos(), angle.sin(), impl=i) for i in ("hopper", "reference"))
    return parity.difference(got, want) < 5e-6


def prefill() -> bool:
    # Several tiles and blocks, a sequence without queries, rows outside of all sequences, heads that share a key.
    cu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 150, 150, 437, 440], [0, 150, 180, 600, 600])]
    shapes = (450, 4, 192), (610, 2, 128), (610, 2, 128), (610, 64)
    q, k, v, k_rope = (torch.randn(shape, device="cuda").bfloat16() for shape in shapes)
    right = True
    for causal in (True, False):
        options = {"scale": 192**-0.5, "causal": causal, "k_rope": k_rope}
        got = ds.mla_prefill(q, k, v, *cu, **options, impl="hopper")
        want = ds.reference.mla_prefill(q, k, v, *cu, **options)
        right &= parity.difference(got[0], want[0]) < 5e-6
    return right


def prefill_cached() -> bool:
    # What the second half of the cache gives is merged into what the first one gave.
    q, kv_b = torch.randn(70, 2, 192, device="cuda").bfloat16(), torch.randn(512, 512, device="cuda").bfloat16() / 22
    cache, table = torch.randn(12, 64, 576, device="cuda").bfloat16(), torch.arange(12, device="cuda").view(2, 6).int()
    lengths, cu = (torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([300, 384], [0, 60, 70]))
    options = {"scale": 192**-0.5}
    out, _ = ds.mla_prefill_cached(q, kv_b, cache, table, lengths, cu, **options, impl="hopper")
    want, _ = ds.reference.mla_prefill_cached(q, kv_b, cache, table, lengths, cu, **options)
    return parity.difference(out, want) < 2e-5


def prefill_backward() -> bool:
    # Several tiles of keys that add to the same queries; an empty sequence; rows of none; heads that share a key.
    cu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 150, 150, 437], [0, 150, 180, 600])]
    shapes = (450, 4, 192), (610, 2, 128), (610, 2, 128), (610, 64)
    q, k, v, k_rope = leaves = [torch.randn(shape, device="cuda").bfloat16().requires_grad_() for shape in shapes]
    right = True
    for causal in (True, False):
        options = {"scale": 192**-0.5, "causal": causal, "k_rope": k_rope}
        dout = torch.randn(450, 4, 128, device="cuda").bfloat16()
        got, want = (
            torch.autograd.grad(ds.mla_prefill(q, k, v, *cu, **options, impl=impl)[0], leaves, dout)
            for impl in ("hopper", "reference")
        )
        right &= all(parity.difference(x, y) < 2e-5 for x, y in zip(got, want, strict=True))
    return right


def route() -> bool:
    logits, bias = torch.randn(300, 256, device="cuda"), torch.randn(256, device="cuda")
    logits[3] = 0.5  # ties, which another way is taken for
    physical = torch.randint(-1, 300, (256, 2), dtype=torch.int32, device="cuda")
    options = {"top_k": 8, "n_groups": 8, "top_groups": 4, "physical": physical}
    got, want = ds.route(logits, bias, **options, impl="hopper"), ds.reference.route(logits, bias, **options)
    if not (torch.equal(got.experts, want.experts) and torch.equal(got.load, want.load)):
        return False
    logits.requires_grad_()
    dweights = torch.randn(300, 8, device="cuda")
    gradients = (
        torch.autograd.grad(ds.route(logits, bias, top_k=8, score=score, impl=impl).weights, logits, dweights)[0]
        for score in ("sigmoid", "softmax")
        for impl in ("hopper", "triton")
    )
    return all(parity.difference(x, y) < 1e-10 for x, y in zip(gradients, gradients, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="", help="run kernels whose name contains it")
    parser.add_argument("--racecheck", action="store_true", help="as compute-sanitizer's racecheck can follow them")
    asked = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("these kernels run on a GPU, and torch sees none")
    named = list(kernels(asked.racecheck))
    chosen = [(name, run) for name, run in named if asked.text in name]
    if not chosen:
        raise SystemExit(f"no kernel's name contains {asked.text!r}; there are: {'; '.join(name for name, _ in named)}")
    for name, run in chosen:
        if not run():
            raise SystemExit(f"{name}: wrong")
        print(f"{name}: right", flush=True)


if __name__ == "__main__":
    main()
