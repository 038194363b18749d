"""Grouped products: bad input, registration, whole graphs, choice of tiles."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from dskernels.grouped_gemm.config import (
    E4M3,
    FP8_CONFIGS,
    FP8_CONFIGS_OTHER,
    HALF_CONFIGS,
    SINGLE_CONFIGS,
    choose_config,
    choose_wgrad_config,
    padded_width,
    tile_bound,
)
from dskernels.reference import quantize_grouped as reference_quantize
from registering import check_registration

A, B = torch.randn(6, 40), torch.randn(3, 24, 40)
QA, QB = ds.quantize(A), ds.quantize(B, (128, 128))
OFFSETS = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
DY = torch.randn(6, 24)
QDY, QX = reference_quantize(DY, OFFSETS), reference_quantize(A, OFFSETS)
STACK = torch.randn(3, 2, 40)
COUNTS = torch.tensor([2, 0, 1], dtype=torch.int32)


def gemm(a=A, b=B, offsets=OFFSETS, **options):
    return ds.grouped_gemm(a, b, offsets, **options)


def masked(a=STACK, b=B, counts=COUNTS, **options):
    return ds.grouped_gemm_masked(a, b, counts, **options)


def wgrad(dy=DY, x=A, offsets=OFFSETS, **options):
    return ds.grouped_wgrad(dy, x, offsets, **options)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gemm(a=[1]), TypeError, "a: expected a torch.Tensor, got list"),
        (lambda: gemm(a=A.double()), TypeError, "a: expected dtype bfloat16 or .* got float64"),
        (lambda: gemm(a=A[0]), ValueError, r"a: expected shape \[T, K\], got \[40\]"),
        (lambda: gemm(a=A.T.contiguous().T), ValueError, "a: expected a contiguous last dimension"),
        (lambda: gemm(b=B.half()), TypeError, "b: expected dtype float32, got float16"),
        (lambda: gemm(b=B[0]), ValueError, r"b: expected shape \[E, N, K\]"),
        (lambda: gemm(b=B[:0], offsets=OFFSETS[:1]), ValueError, "b: expected shape .* with E >= 1"),
        (lambda: gemm(b=B[:, :, :32]), ValueError, "b: expected K = 40 columns like a, got 32"),
        (lambda: gemm(b=B.to("meta")), ValueError, "b: expected a tensor on cpu"),
        (lambda: gemm(b=QB), TypeError, "b: expected a torch.Tensor, got Fp8Tensor"),
        (lambda: gemm(a=QA), TypeError, "b: expected an Fp8Tensor"),
        (lambda: gemm(a=ds.quantize(A, (128, 1)), b=QB), ValueError, r"a: expected block \(1, 128\)"),
        (lambda: gemm(a=QA, b=QB._replace(block=(1, 128))), ValueError, r"b: expected block \(128, 128\)"),
        (lambda: gemm(a=QA, b=QB._replace(scale=QB.scale[:2])), ValueError, r"b.scale: expected shape \[3, 1, 1\]"),
        (lambda: gemm(offsets=OFFSETS.long()), TypeError, "offsets: expected dtype int32, got int64"),
        (lambda: gemm(offsets=OFFSETS[:3]), ValueError, r"offsets: expected shape \[4\], got \[3\]"),
        (lambda: gemm(offsets=OFFSETS.to("meta")), ValueError, "offsets: expected a tensor on cpu"),
        (lambda: gemm(out_dtype=torch.int8), ValueError, "out_dtype: expected .* got int8"),
        (lambda: gemm(out=DY[:5]), ValueError, r"out: expected shape \[6, 24\], got \[5, 24\]"),
        (lambda: gemm(out=DY.double()), TypeError, "out: expected dtype"),
        (lambda: gemm(a=A.clone().requires_grad_(), out=DY), ValueError, "out: expected None where a gradient"),
        (lambda: gemm(impl="cuda"), ValueError, "impl: expected one of"),
        (lambda: masked(a=A), ValueError, r"a: expected shape \[E, M, K\]"),
        (lambda: masked(b=B[:2]), ValueError, "b: expected E = 3 matrices like a, got 2"),
        (lambda: masked(b=None), TypeError, "b: expected a torch.Tensor, got NoneType"),
        (lambda: masked(counts=COUNTS.float()), TypeError, "counts: expected dtype int32, got float32"),
        (lambda: masked(counts=COUNTS[:2]), ValueError, r"counts: expected shape \[3\], got \[2\]"),
        (lambda: masked(a=QA, b=QB), ValueError, r"a.data: expected shape \[E, R, C\]"),
        (lambda: masked(out=DY), ValueError, r"out: expected shape \[3, 2, 24\]"),
        (lambda: masked(out_dtype=torch.float64), ValueError, "out_dtype: expected"),
        (lambda: masked(b=B.clone().requires_grad_()), ValueError, "a, b: grouped_gemm_masked has no gradient"),
        (lambda: wgrad(dy=DY.int()), TypeError, "dy: expected dtype"),
        (lambda: wgrad(dy=DY[0]), ValueError, r"dy: expected shape \[T, N\]"),
        (lambda: wgrad(x=A[:5]), ValueError, r"x: expected shape \[6, K\], got \[5, 40\]"),
        (lambda: wgrad(x=A.half()), TypeError, "x: expected dtype float32"),
        (lambda: wgrad(x=A.clone().requires_grad_()), ValueError, "dy, x: grouped_wgrad has no gradient"),
        (lambda: wgrad(dy=QDY), TypeError, "x: expected an Fp8Tensor"),
        (lambda: wgrad(dy=QDY._replace(block=(128, 1)), x=QX), ValueError, r"dy: expected block \(1, 128\)"),
        (lambda: wgrad(dy=ds.quantize(DY), x=ds.quantize(A)), ValueError, "dy: expected a multiple of 128 columns"),
        (lambda: wgrad(dy=QDY, x=ds.quantize(torch.ones(4, 128))), ValueError, "x: expected 512 columns like dy"),
        (lambda: wgrad(offsets=OFFSETS[:1]), ValueError, r"offsets: expected shape \[E \+ 1\] with E >= 1"),
        (lambda: wgrad(offsets=OFFSETS[None]), ValueError, r"offsets: expected shape \[E \+ 1\]"),
        (lambda: wgrad(accumulate=True), ValueError, "accumulate: expected `out`"),
        (lambda: wgrad(out=torch.empty(3, 24, 40, dtype=torch.bfloat16)), TypeError, "out: expected dtype float32"),
        (lambda: wgrad(out=torch.empty(2, 24, 40)), ValueError, r"out: expected shape \[3, 24, 40\]"),
        (lambda: ds.quantize_grouped(A.long(), OFFSETS), TypeError, "x: expected dtype"),
        (lambda: ds.quantize_grouped(A[0], OFFSETS), ValueError, r"x: expected shape \[T, K\]"),
        (lambda: ds.quantize_grouped(A, None), TypeError, "offsets: expected a torch.Tensor"),
        (lambda: ds.quantize_grouped(A, OFFSETS[:1]), ValueError, "offsets: expected shape"),
        (lambda: ds.quantize_grouped(A, OFFSETS, scale_format="e8m0"), ValueError, "scale_format: expected 'fp32'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    check_registration(ops.grouped_gemm.default, (a, None, b, None, OFFSETS, torch.float32))
    check_registration(ops.grouped_gemm.default, (QA.data, QA.scale, QB.data, QB.scale, OFFSETS, torch.bfloat16))
    check_registration(ops.grouped_gemm_out.default, (A, None, B, None, OFFSETS, torch.zeros(6, 24)))
    check_registration(ops.grouped_gemm_masked.default, (STACK, None, B, None, COUNTS, torch.zeros(3, 2, 24)))
    check_registration(ops.grouped_gemm_backward.default, (DY, A, B, OFFSETS, True, True))
    check_registration(ops.grouped_gemm_backward.default, (DY, A, B, OFFSETS, False, True))
    check_registration(ops.grouped_wgrad.default, (DY, None, A, None, OFFSETS, torch.zeros(3, 24, 40), True))
    flat = (QDY.data, QDY.scale, QX.data, QX.scale, OFFSETS, torch.zeros(3, 24, 40), False)
    check_registration(ops.grouped_wgrad.default, flat)
    check_registration(ops.quantize_grouped.default, (A, OFFSETS, True))


def test_compiles_whole():
    def layer(a, b, offsets):
        return ds.grouped_gemm(a, b, offsets).square().sum()

    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    got, want = (torch.autograd.grad(f(a, b, OFFSETS), (a, b)) for f in (compiled, layer))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))

    def step(dy, x, offsets, counts, out):
        q_dy, q_x = ds.quantize_grouped(dy, offsets), ds.quantize_grouped(x, offsets)
        ds.grouped_wgrad(q_dy, q_x, offsets, out=out, accumulate=True)
        return ds.grouped_gemm(ds.quantize(x), QB, offsets), ds.grouped_gemm_masked(x.view(3, 2, 40), B, counts)

    args = (DY, A, OFFSETS, torch.full((3,), 2, dtype=torch.int32))
    got_out, want_out = torch.ones(3, 24, 40), torch.ones(3, 24, 40)
    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*args, got_out)
    want = step(*args, want_out)
    assert torch.equal(got_out, want_out)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- configuration --------------------------------------------------------------------------------------------------


def test_choose_config():
    nvidia, amd = (9, 0), (0, 0)
    assert choose_config(8, 256, E4M3, nvidia) == FP8_CONFIGS[0]  # decode: a row or two for each expert
    assert choose_config(256 * 64, 256, E4M3, nvidia) == FP8_CONFIGS[1]
    assert choose_config(65536, 8, E4M3, nvidia) == FP8_CONFIGS[-1]
    assert choose_config(65536, 8, E4M3, amd) == FP8_CONFIGS_OTHER[-1]
    assert choose_config(65536, 8, torch.bfloat16, nvidia) == HALF_CONFIGS[-1]
    assert choose_config(65536, 8, torch.float32, nvidia) == SINGLE_CONFIGS[-1]
    assert choose_wgrad_config(4096, 7168, E4M3, nvidia) == FP8_CONFIGS[-1]
    assert choose_wgrad_config(4096, 7168, E4M3, amd) == FP8_CONFIGS_OTHER[-1]
    assert choose_wgrad_config(64, 7168, torch.float16, nvidia) == HALF_CONFIGS[1]


@given(sizes=st.lists(st.integers(0, 500), min_size=1, max_size=12), rest=st.integers(0, 300))
def test_tile_bound_and_width_suffice_for_any_division(sizes, rest):
    rows = sum(sizes) + rest
    for block in (16, 64, 128):
        assert sum(-(-size // block) for size in (*sizes, rest)) <= tile_bound(rows, len(sizes), block)
    assert sum(-(-size // 128) * 128 for size in sizes) <= padded_width(rows, len(sizes))
    assert padded_width(rows, len(sizes)) <= -(-rows // 128) * 128 + 128 * len(sizes)
