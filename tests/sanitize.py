"""Every kernel on small shapes, for compute-sanitizer: each config of those in CUDA C++, and every case of `parity`.

`make sanitize` runs all of it under each of the four tools (tests/sanitizers.py). `python tests/sanitize.py "few rows"`
runs, under whatever tool, only what has the text in its name, to find the kernel that a report is of.

Under a tool each kernel is patched when it is loaded, and each of its memory accesses takes many times as long. So
inputs and expected results are made on the CPU, whose library of kernels on the GPU would be patched too; grids are
as for a GPU of a few multiprocessors; and each tensor is an allocation of its own, as in the caching allocator's blocks
no access is out of bounds. With `--racecheck` products of many rows run as that tool can follow them: without clusters,
as it knows nothing of arrivals from another CTA, and with one reader of what is written by ordinary stores (ONE_READER
in cuda/fp8_gemm.cuh). initcheck does not see what the copy engine writes: with `--filled` all that is allocated is full
of NaN between guards, so that what nothing wrote shows in the results.
"""

import argparse
import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from unittest import mock

if __name__ == "__main__":  # a test process, whose captures need the allocator, imports this too
    os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")  # read when torch first allocates on a GPU

import torch

import dskernels as ds
import sanitize_model
from dskernels import device, parity
from dskernels.cuda import compiler
from dskernels.cuda.driver import Planned
from dskernels.fp8.hopper import swiglu_quantize_rows
from dskernels.gemm import hopper, hopper_small
from dskernels.gemm.config import HOPPER_CONFIGS, HopperConfig
from dskernels.grouped_gemm import config as grouped_config
from dskernels.grouped_gemm import hopper as grouped_hopper
from dskernels.mla.prefill import absorbed, cached
from dskernels.mla.prefill import config as prefill_config
from dskernels.moe import hopper_swiglu
from dskernels.moe.experts import Batch
from dskernels.moe.packed import packed_width
from dskernels.moe.triton_packed import packed
from dskernels.moe.triton_sort import sort
from dskernels.moe.triton_swiglu import swiglu_backward
from dskernels.parity.inputs import quantized, spread
from dskernels.parity.paging import paged_cache
from guarding import guarded
from sanitize_kernels import Noted, everywhere

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
IMPLS = "hopper", "reference"  # on these two
MULTIPROCESSORS = 4


def normal(*shape: int) -> torch.Tensor:
    """Numbers in bf16, on the CPU."""
    return torch.randn(shape).bfloat16()


def ints(*values: int) -> torch.Tensor:
    """Integers of 32 bits, on the CPU."""
    return torch.tensor(values, dtype=torch.int32)


def there(*values):
    """The same on the GPU, whatever of it is a tensor; gradients are asked for as before."""
    moved = [x.detach().to(GPU).requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else
             x.to(GPU) if isinstance(x, ds.Fp8Tensor) else x for x in values]  # fmt: skip
    return moved if len(moved) > 1 else moved[0]


def near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> bool:
    """Whether these agree."""
    return parity.difference(got.cpu(), want) < tolerance


def same(got: ds.Fp8Tensor, want: ds.Fp8Tensor) -> bool:
    """Whether the bytes are the same."""
    return torch.equal(got.data.cpu().view(torch.uint8), want.data.view(torch.uint8))


def kernels(racecheck: bool) -> Iterator[tuple[str, Callable[[], bool | None]]]:
    """Name each kernel, with what runs it and says whether the result was right; None if it takes no such call."""

    def each(configs: tuple[HopperConfig, ...]) -> Iterator[tuple[str, HopperConfig]]:
        names: set[str] = set()
        for config in configs:
            ahead = f", {config.ahead} ahead" if config.ahead else ""
            name = f"{config.tile}, clusters of {config.cluster}{ahead}, tiles in groups of {config.group}"
            name += ", in units" * config.in_units
            if name in names:
                name += f", sharing {'A' if config.shared_a else 'B'}"
            names.add(name)
            yield name, replace(config, cluster=1, one_reader=True) if racecheck else config

    for b_rows, configs in HOPPER_CONFIGS.items():
        for name, config in each(configs):
            yield f"fp8_gemm {name}, B in {b_rows}x128", functools.partial(many_rows, config, b_rows)
    yield "fp8_gemm, few rows", few_rows
    yield "product of few rows, bf16", few_half_rows
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
    yield "mla_prefill", prefill
    yield "mla_prefill_cached", prefill_cached
    for page, dtype in ((64, torch.bfloat16), (16, torch.bfloat16), (3, torch.bfloat16), (64, torch.uint8)):
        yield f"mla_decode, pages of {page}, {dtype}", functools.partial(decode, page, dtype)
    for tokens in (5, 130):
        yield f"mla_decode_queries, {tokens} tokens", functools.partial(decode_queries, tokens)
    yield "mla_prefill's gradient", prefill_backward
    for name, run in sanitize_model.kernels():
        yield name, functools.partial(run, GPU)
    for impl in ("triton", "hopper"):
        for case in parity.all_cases():
            yield f"{impl}: {case.op}, {case.label}", functools.partial(parity_case, case, impl)


def many_rows(config: HopperConfig, b_rows: int) -> bool:
    # K is long enough that every stage of shared memory is used again.
    a, b = quantized(0, 300, 1424, (1, 128), CPU), quantized(1, 392, 1424, (b_rows, 128), CPU)
    x, w, out = there(a, b, torch.full((300, 392), torch.nan))
    Planned(functools.partial(hopper.plan, config))(x.data, x.scale, w.data, w.scale, b_rows, None, out, False)
    return near(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32), parity.E4M3_SUMS)


def few_rows() -> bool:
    a, b = quantized(0, 5, 2048, (1, 128), CPU), quantized(1, 200, 2048, (128, 128), CPU)
    got = ds.fp8_gemm(*there(a, b), out_dtype=torch.float32, impl="hopper")
    return near(got, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32), parity.E4M3_SUMS)


def few_half_rows() -> bool:
    a, b, out = normal(5, 2040), normal(200, 2040), there(torch.empty(5, 200))
    hopper_small.half_gemm(*there(a, b), out)
    return near(out, a.float() @ b.float().T, 1e-5)


def quantize_both() -> bool:
    x = normal(144, 264)
    return all(map(same, ds.quantize_both(there(x), impl="hopper"), ds.reference.quantize_both(x)))


def quantize_weight() -> bool:
    x = normal(2, 144, 272)
    got, want = (ds.quantize_both(y, block=(128, 128), impl=i) for y, i in zip((there(x), x), IMPLS, strict=True))
    return all(map(same, got, want))


def quantize_grouped() -> bool:
    x, offsets = normal(300, 264), ints(0, 150, 150, 290)
    got, want = ds.quantize_grouped(*there(x, offsets), impl="hopper"), ds.reference.quantize_grouped(x, offsets)
    return same(got, want)


def kept_swiglu() -> bool:
    offsets, index, source = sort(there(torch.randint(-1, 3, (150, 2), dtype=torch.int32)), 4)
    batch, weights = Batch(300, 2, offsets, index, source), there(torch.rand(150, 2))
    gate_up, dhidden = there(normal(300, 512), normal(300, 256))
    kept = there(torch.zeros(300, packed_width(512), dtype=torch.uint8))
    swiglu_quantize_rows(gate_up, None, kept)
    right = torch.equal(kept.cpu()[:, : 512 + 16], packed(gate_up).cpu()[:, : 512 + 16])
    for of_batch, rows, w in ((batch, 300, weights), (Batch(256), 256, None)):
        got = hopper_swiglu.swiglu_backward(kept[:rows], dhidden[:rows], of_batch, w)[0]
        want = swiglu_backward(kept[:rows], dhidden[:rows], of_batch.source, of_batch.index, w)[0]
        used = int(offsets.cpu()[-1]) if of_batch.offsets is not None else rows
        right &= near(got.to(CPU).dequantize()[:used], ds.quantize(want.cpu()).dequantize()[:used], 1e-4)
    return right


def swiglu_quantize() -> bool:
    gate_up, dy = normal(1040, 528), normal(1040, 264)
    wholes = [
        [
            ds.swiglu_quantize(x, transpose=way, impl=impl)
            for x, impl in zip((there(gate_up), gate_up), IMPLS, strict=True)
        ]
        for way in (False, True)
    ]
    gate_up, dy = gate_up[:, :512].contiguous(), dy[:, :256].contiguous()
    gradients = (
        ds.swiglu_quantize_backward(*pair, impl=impl)
        for pair, impl in zip((there(dy, gate_up), (dy, gate_up)), IMPLS, strict=True)
    )
    pairs = [*wholes, *zip(*gradients, strict=True)]
    return all(torch.allclose(got.scale.cpu(), want.scale, rtol=3e-7, atol=0) for got, want in pairs)


def rmsnorm_quantize() -> bool:
    x, residual, weight = normal(33, 1416), normal(33, 1416), normal(1416)
    on_gpu, on_gpu_residual, on_gpu_weight = there(x, residual, weight)
    got, total = ds.rmsnorm_quantize(on_gpu, on_gpu_weight, 1e-6, on_gpu_residual, impl="hopper")[:2]
    want, sum_ = ds.reference.rmsnorm_quantize(x, weight, 1e-6, residual)[:2]
    return torch.equal(total.cpu(), sum_) and near(got.to(CPU).dequantize(), want.dequantize(), 1e-4)


SIZES = (150, 0, 321, 5)
OFFSETS = (0, 150, 150, 471, 476)


def ragged_rows(config: HopperConfig) -> bool:
    a, b, offsets = (
        quantized(0, 500, 1424, (1, 128), CPU),
        ds.quantize(normal(4, 392, 1424), (128, 128)),
        ints(*OFFSETS),
    )
    x, w, ends, out = there(a, b, offsets, torch.full((500, 392), torch.nan))
    Planned(functools.partial(grouped_hopper.plan, config))(x.data, x.scale, w.data, w.scale, ends, out)
    return near(out, ds.reference.grouped_gemm(a, b, offsets, out_dtype=out.dtype), parity.E4M3_SUMS)


def masked_rows(config: HopperConfig) -> bool:
    flat, b = quantized(0, 1200, 1424, (1, 128), CPU), ds.quantize(normal(4, 392, 1424), (128, 128))
    a = ds.Fp8Tensor(flat.data.unflatten(0, (4, 300)), flat.scale.unflatten(0, (4, 300)))
    x = there(flat)
    data, scale = x.data.unflatten(0, (4, 300)), x.scale.unflatten(0, (4, 300))
    w, counts, out = there(b, ints(*SIZES), torch.zeros(4, 300, 392))
    Planned(functools.partial(grouped_hopper.plan_masked, config))(data, scale, w.data, w.scale, counts, out)
    return near(out, ds.reference.grouped_gemm_masked(a, b, ints(*SIZES), out_dtype=out.dtype), parity.E4M3_SUMS)


def ragged_tokens(config: HopperConfig) -> bool:
    offsets = ints(0, 150, 150, 900)
    dy, x = (ds.quantize_grouped(spread(i, 900, width), offsets) for i, width in enumerate((392, 400)))
    a, b, ends, out = there(dy, x, offsets, torch.full((3, 392, 400), torch.nan))
    launch = Planned(functools.partial(grouped_hopper.plan_wgrad, config))
    launch(a.data, a.scale, b.data, b.scale, ends, out, False)
    return near(out, ds.reference.grouped_wgrad(dy, x, offsets), parity.E4M3_SUMS)


def few_ragged_rows() -> bool:
    a, b = quantized(0, 90, 1424, (1, 128), CPU), ds.quantize(normal(4, 392, 1424), (128, 128))
    offsets = ints(0, 3, 3, 70, 85)
    got = ds.grouped_gemm(*there(a, b, offsets), out_dtype=torch.float32, impl="hopper")
    return near(got, ds.reference.grouped_gemm(a, b, offsets, out_dtype=got.dtype), parity.E4M3_SUMS)


def few_tokens() -> bool:
    w13, w2 = (ds.quantize(normal(8, *shape), (128, 128)) for shape in ((800, 656), (656, 400)))
    experts, weights = ints(6, 0, 3, -1, 6, 3).view(3, 2), torch.rand(3, 2)
    x = normal(3, 656)
    on_gpu, up, down, ids, w = there(x, w13, w2, experts, weights)
    got = ds.fused_experts(on_gpu, up, down, ds.Routing(w, ids, ids, ids), n_shared=1, impl="hopper")
    routing = ds.Routing(weights, experts, experts, experts)
    want = ds.fused_experts(x.float(), w13, w2, routing, n_shared=1, impl="reference")
    return near(got.float(), want, 1e-3)


def half_precision() -> bool:
    leaves, offsets = [normal(500, 712).requires_grad_(), normal(4, 392, 712).requires_grad_()], ints(*OFFSETS)
    return gradients_agree(
        leaves,
        normal(500, 392),
        lambda impl, offsets, a, b: ds.grouped_gemm(a, b, offsets, impl=impl),
        offsets,
        tolerance=1e-5,
    )


def gradients_agree(leaves, dout, run, *others, tolerance) -> bool:
    """Whether ``run(impl, *others, *leaves)`` and its gradients are those of the reference on the CPU."""
    results = []
    for impl, values in zip(IMPLS, (there(dout, *others, *leaves), [dout, *others, *leaves]), strict=True):
        weights, *rest = values
        out = run(impl, *rest)
        results.append([out.detach(), *torch.autograd.grad(out, rest[len(others) :], weights)])
    return all(near(got, want, tolerance) for got, want in zip(*results, strict=True))


def decode(page: int, dtype: torch.dtype) -> bool:
    # One request that several CTAs share, a short one, an empty one; of one row block, and of two in a cluster.
    right = True
    for heads in (16, 64):
        q = normal(3, 2, heads, 576)
        cache, q_lengths = paged_cache(0, [500, 5, 0], page, 512, 64, dtype, CPU, scale=0.1), ints(2, 1, 2)
        got, want = (
            ds.mla_decode(*inputs, scale=576**-0.5, q_lengths=lengths, impl=impl)
            for impl, (*inputs, lengths) in zip(
                IMPLS, (there(q, *cache, q_lengths), (q, *cache, q_lengths)), strict=True
            )
        )
        right &= near(got[0], want[0], 1e-5)
    return right


def write_cache(dtype: torch.dtype) -> bool:
    # An odd number of tokens; slots that are skipped.
    kv, k_rope = normal(21, 576).split([512, 64], -1)
    angle = torch.rand(21, 32) * 6
    inputs = [kv, k_rope, torch.rand(512).bfloat16(), angle.cos(), angle.sin()]
    slots = torch.tensor([-1, 25, 2**40, *range(18)])
    cache = torch.zeros(5, 5, 656 if dtype == torch.uint8 else 576, dtype=dtype)
    *moved, written, places = there(*inputs, cache, slots)
    ds.write_latent_cache(*moved, written, places, eps=1e-6, impl="hopper")
    ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl="reference")
    if dtype == torch.uint8:
        got, want = (ds.reference.mla.unpack_fp8(x.cpu(), 512)[0].float() for x in (written, cache))
        return parity.difference(got, want) < 1e-4
    return near(written, cache, 1e-5)


def decode_queries(tokens: int) -> bool:
    q, w_uk, angle = normal(tokens, 2, 192) / 4, normal(2, 128, 512) / 4, torch.rand(tokens, 32) * 6
    inputs = q, w_uk, angle.cos(), angle.sin()
    got = ds.mla_decode_queries(*there(*inputs), impl="hopper")
    return near(got, ds.mla_decode_queries(*inputs, impl="reference"), 5e-6)


def prefill() -> bool:
    # Several tiles and blocks, a sequence without queries, rows outside of all sequences, heads that share a key.
    inputs = (
        normal(450, 4, 192),
        normal(610, 2, 128),
        normal(610, 2, 128),
        ints(0, 150, 150, 437, 440),
        ints(0, 150, 180, 600, 600),
    )
    k_rope, right = normal(610, 64), True
    for causal in (True, False):
        got, want = (
            ds.mla_prefill(*of, scale=192**-0.5, causal=causal, k_rope=rope, impl=impl)
            for impl, (*of, rope) in zip(IMPLS, (there(*inputs, k_rope), (*inputs, k_rope)), strict=True)
        )
        right &= near(got[0], want[0], 5e-6)
    return right


def prefill_cached() -> bool:
    # A head at a time; and all heads, half of the positions at a time, which are merged. Cases of parity are absorbed.
    table, lengths, cu = torch.arange(12).view(2, 6).int(), ints(300, 384), ints(0, 60, 70)
    inputs = normal(70, 2, 192), normal(512, 512) / 22, normal(12, 64, 576), table, lengths, cu
    want, right = ds.reference.mla_prefill_cached(*inputs, scale=192**-0.5)[0], True
    for fill in (0, 2):
        with (
            mock.patch.object(absorbed, "MOST_TOKENS", 0),
            mock.patch.object(cached, "CHUNK_BYTES", 12 * 64 * 512),
            mock.patch.object(prefill_config, "LEAST_FILL", fill),
        ):
            got = ds.mla_prefill_cached(*there(*inputs), scale=192**-0.5, impl="hopper")[0]
        right &= near(got, want, 2e-5)
    return right


def prefill_backward() -> bool:
    # Several tiles of keys that add to the same queries; an empty sequence; rows of none; heads that share a key.
    shapes = (450, 4, 192), (610, 2, 128), (610, 2, 128), (610, 64)
    leaves = [normal(*shape).requires_grad_() for shape in shapes]
    return all(
        gradients_agree(
            leaves,
            normal(450, 4, 128),
            lambda impl, cu_q, cu_k, q, k, v, k_rope, causal=causal: ds.mla_prefill(
                q, k, v, cu_q, cu_k, scale=192**-0.5, causal=causal, k_rope=k_rope, impl=impl
            )[0],
            ints(0, 150, 150, 437),
            ints(0, 150, 180, 600),
            tolerance=2e-5,
        )
        for causal in (True, False)
    )


def route() -> bool:
    logits, bias = torch.randn(300, 256), torch.randn(256)
    logits[3] = 0.5  # ties, which another way is taken for
    physical = torch.randint(-1, 300, (256, 2), dtype=torch.int32)
    options = {"top_k": 8, "n_groups": 8, "top_groups": 4}
    got = ds.route(*there(logits, bias), **options, physical=there(physical), impl="hopper")
    want = ds.reference.route(logits, bias, **options, physical=physical)
    if not (torch.equal(got.experts.cpu(), want.experts) and torch.equal(got.load.cpu(), want.load)):
        return False
    return all(
        gradients_agree(
            [logits.clone().requires_grad_()],
            torch.randn(300, 8),
            lambda impl, bias, x, score=score: ds.route(x, bias, top_k=8, score=score, impl=impl).weights,
            bias,
            tolerance=1e-10,
        )
        for score in ("sigmoid", "softmax")
    )


def parity_case(case: parity.Case, impl: str) -> bool | None:
    try:
        return parity.check(case, GPU, impl, reference_on=CPU).passed
    except ValueError as error:
        if "cannot run this" in str(error):
            return None
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="*", default=[""], help="run kernels whose name contains one of these")
    parser.add_argument("--racecheck", action="store_true", help="as compute-sanitizer's racecheck can follow them")
    parser.add_argument("--exact", action="store_true", help="the texts are whole names")
    parser.add_argument("--filled", action="store_true", help="allocate memory full of NaN, between guards")
    parser.add_argument("--list", action="store_true", help="print the names; needs no GPU")
    asked = parser.parse_args()
    if asked.racecheck:
        compiler.FLAGS += ("-DRACECHECK=1",)  # see cuda/handover.cuh
    named = list(kernels(asked.racecheck))
    if asked.list:
        print("\n".join(name for name, _ in named))
        return
    if not torch.cuda.is_available():
        raise SystemExit("these kernels run on a GPU, and torch sees none")
    texts = asked.text
    chosen = [(n, run) for n, run in named if any(n == text if asked.exact else text in n for text in texts)]
    if not chosen:
        raise SystemExit(f"no kernel's name contains {texts}; there are: {'; '.join(name for name, _ in named)}")
    everywhere(device.multiprocessors, lambda *_, **__: MULTIPROCESSORS)
    noted = Noted()
    torch.manual_seed(0)
    for name, run in chosen:
        print(f"begin {name}", flush=True)
        start = time.monotonic()
        with guarded() if asked.filled else contextlib.nullcontext() as memory:
            right = run()
        torch.cuda.synchronize()
        if memory is not None:
            memory.check()
        if right is False:
            raise SystemExit(f"{name}: wrong")
        if missing := noted.missing(name):
            raise SystemExit(f"{name}: wrong, it did not run {', '.join(missing)}")
        print(f"{name}: {'right' if right else 'not taken'}, {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
