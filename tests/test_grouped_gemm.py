"""Grouped products: against fp64, ragged and hostile group sizes, gradients, bad input, registration."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.grouped_gemm.config import (
    E4M3,
    FP8_CONFIGS,
    HALF_CONFIGS,
    SINGLE_CONFIGS,
    choose_config,
    choose_wgrad_config,
    padded_width,
    tile_bound,
)
from dskernels.parity import grouped_gemm as cases
from dskernels.parity.inputs import spread
from dskernels.reference import grouped_gemm as reference_gemm
from dskernels.reference import grouped_wgrad as reference_wgrad
from dskernels.reference import quantize_grouped as reference_quantize
from registering import check_registration

# calc_diff is half the squared relative error: 5e-6 for a result rounded to bf16, 1e-3 for operands rounded to e4m3.
BF16 = 5e-6
FP32 = 1e-10
UNQUANTIZED = 1e-3
NAN = float("nan")
IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.label}")
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def offsets_of(sizes, device):
    return torch.tensor([0, *sizes], device=device).cumsum(0, dtype=torch.int32)


def ragged(sizes, spare, n, k, device, dtype=torch.float32):
    """Rows of all groups and `spare` NaN rows that belong to none, weights, offsets, and the product in fp64."""
    rows = sum(sizes)
    a = spread(0, rows + spare, k).to(device, dtype)
    a[rows:] = NAN
    b = torch.stack([spread(1 + e, n, k) for e in range(len(sizes))]).to(device, dtype)
    return a, b, offsets_of(sizes, device)


def product64(a, b, sizes):
    """The definition, row by row, in fp64; zero where no group is."""
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    out = a.new_zeros(a.shape[0], b.shape[1], dtype=torch.float64)
    for row, e in enumerate(group.tolist()):
        out[row] = b[e].double() @ a[row].double()
    return out


SIZES = [
    [5],  # a single group: the shared expert, a dense layer
    [40, 40, 40],  # balanced
    [0, 0, 150, 0, 0, 0, 0],  # one group takes all, in more than one tile of 128
    [1, 0, 3, 0, 0, 1, 7, 0, 0, 0, 1, 0, 0],  # decode: many empty groups, some with one row
    [0, 0, 0],  # nothing at all
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["fp32", "bf16", "e4m3"])
def test_against_fp64(device, impl, sizes, dtype):
    n, k = 140, 200  # neither a multiple of a tile, K not of 128
    a, b, offsets = ragged(sizes, 3, n, k, device, dtype or torch.float32)
    want = product64(a, b, sizes)
    out = torch.full((len(a), n), NAN, device=device)
    if dtype is None:
        plain, (a, b) = want, (ds.quantize(a), ds.quantize(b, (128, 128)))
        want = product64(a.dequantize(), b.dequantize(), sizes)
    assert ds.grouped_gemm(a, b, offsets, out=out, impl=impl) is out
    assert parity.difference(out, want) < (parity.E4M3_SUMS if dtype is None else FP32)
    assert (out[sum(sizes) :] == 0).all()  # not NaN * 0
    if dtype is None:
        assert parity.difference(out, plain) < UNQUANTIZED
        rounded = ds.grouped_gemm(a, b, offsets, impl=impl)
        assert rounded.dtype == torch.bfloat16
        assert parity.difference(rounded, want) < BF16


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, BF16), (torch.float16, BF16)])
def test_out_dtype_is_by_default_that_of_a(device, impl, dtype, tolerance):
    a, b, offsets = ragged([3, 9], 0, 65, 130, device)
    a, b = (a / 100).to(dtype), (b / 100).to(dtype)  # inside the range of fp16
    out = ds.grouped_gemm(a, b, offsets, impl=impl)
    assert out.dtype == dtype
    assert parity.difference(out, product64(a, b, [3, 9])) < tolerance
    single = ds.grouped_gemm(a, b, offsets, out_dtype=torch.float32, impl=impl)
    assert single.dtype == torch.float32
    assert parity.difference(single, product64(a, b, [3, 9])) < FP32


def test_repeated_calls_return_the_same_bits(device):
    a, b, offsets = ragged([70, 0, 20], 5, 65, 130, device)
    first = ds.grouped_gemm(a, b, offsets, impl="triton")
    for _ in range(3):
        assert torch.equal(ds.grouped_gemm(a, b, offsets, impl="triton"), first)


def test_as_many_groups_as_an_expert_block_can_have(device):
    sizes = torch.zeros(1024, dtype=torch.int)
    sizes[[3, 500, 1023]] = torch.tensor([2, 17, 1], dtype=torch.int)
    a, b, offsets = ragged([20], 1, 16, 32, device)
    b = b.expand(1024, -1, -1)
    offsets = offsets_of(sizes.tolist(), device)
    out = ds.grouped_gemm(a, b * torch.arange(1024, device=device)[:, None, None], offsets, impl="triton")
    expert = torch.tensor([3] * 2 + [500] * 17 + [1023], device=device)
    want = expert[:, None] * (a[:20].double() @ b[0].double().T)
    assert parity.difference(out[:20], want) < FP32
    assert (out[20] == 0).all()


def sparse(size, dtype, device, path):
    """A tensor of which only what is touched takes memory on the CPU: a mapped file of holes."""
    if device == "cuda":
        return torch.empty(size, dtype=dtype, device=device)
    return torch.from_file(str(path / f"{dtype}"), shared=True, size=size, dtype=dtype)


def test_weights_beyond_two_to_the_31_elements(device, tmp_path):
    """Matrices are 2^30 elements apart: e * stride leaves int32 at the third, though each factor fits."""
    b = sparse(2**31 + 4096, torch.bfloat16, device, tmp_path).as_strided((3, 32, 64), (2**30, 64, 1))
    b.copy_(torch.randn(3, 32, 64))
    sizes = [2, 0, 3]
    a, offsets = torch.randn(5, 64).to(device, torch.bfloat16), offsets_of(sizes, device)
    got = ds.grouped_gemm(a, b, offsets, out_dtype=torch.float32, impl="triton")
    assert parity.difference(got, product64(a, b, sizes)) < FP32
    stack, counts = a[:3].view(3, 1, 64), torch.ones(3, dtype=torch.int32, device=device)
    masked = ds.grouped_gemm_masked(stack, b, counts, out_dtype=torch.float32, impl="triton")
    assert parity.difference(masked, stack.double() @ b.double().mT) < FP32
    dw = sparse(2**31 + 4096, torch.float32, device, tmp_path).as_strided((3, 32, 64), (2**30, 64, 1))
    ds.grouped_wgrad(got, a.float(), offsets, out=dw, impl="triton")
    assert parity.difference(dw, reference_wgrad(got, a.float(), offsets)) < FP32


HOSTILE = st.lists(st.integers(-(2**31), 2**31 - 1) | st.integers(-3, 80), min_size=2, max_size=7)


@settings(max_examples=20)
@given(values=HOSTILE)
def test_any_offsets_are_read_as_their_running_maximum(device, values):
    offsets = torch.tensor(values, dtype=torch.int32, device=device)
    groups = len(values) - 1
    a, b = torch.randn(70, 40, device=device), torch.randn(groups, 24, 40, device=device)
    got, want = ds.grouped_gemm(a, b, offsets, impl="triton"), reference_gemm(a, b, offsets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    dy = torch.randn(70, 24, device=device)
    got = ds.grouped_wgrad(dy, a, offsets, impl="triton")
    torch.testing.assert_close(got, reference_wgrad(dy, a, offsets), rtol=1e-5, atol=1e-4)
    # Group e owns the rows whose first larger end is its own: a statement of the same without slices.
    ends = offsets[1:].long().cpu()
    for row in (0, 35, 69):
        larger = (ends > row).nonzero().flatten().tolist()
        expected = b[larger[0]] @ a[row] if larger else torch.zeros(24, device=device)
        torch.testing.assert_close(want[row], expected, rtol=1e-5, atol=1e-4)


# ---- masked ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [[20, 0, 1], [-5, 99, 20], [0, 0, 0]], ids=str)  # the middle one is hostile
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fp8", [False, True])
def test_masked(device, impl, counts, fp8):
    n, k, rows = 140, 200, 20
    a = spread(0, 3 * rows, k).to(device).view(3, rows, k)
    b = torch.stack([spread(1 + e, n, k) for e in range(3)]).to(device)
    valid = [min(max(count, 0), rows) for count in counts]
    for e, count in enumerate(valid):
        a[e, count:] = NAN  # what is beyond the count must not be read
    operands = a, b
    if fp8:
        flat = ds.quantize(a.view(-1, k))
        stacked = ds.Fp8Tensor(flat.data.view(3, rows, k), flat.scale.view(3, rows, 2))
        operands = stacked, ds.quantize(b, (128, 128))
        a, b = stacked.dequantize(), operands[1].dequantize()
    out = torch.full((3, rows, n), 7.0, device=device)
    counts = torch.tensor(counts, dtype=torch.int32, device=device)
    assert ds.grouped_gemm_masked(*operands, counts, out=out, impl=impl) is out
    for e, count in enumerate(valid):
        tolerance = parity.E4M3_SUMS if fp8 else FP32
        assert parity.difference(out[e, :count], a[e, :count].double() @ b[e].double().T) < tolerance
        if impl == "triton":
            assert (out[e, count:] == 7).all()  # not written either
    fresh = ds.grouped_gemm_masked(*operands, counts, impl=impl)
    assert fresh.dtype == (torch.bfloat16 if fp8 else torch.float32)
    for e, count in enumerate(valid):
        assert parity.difference(fresh[e, :count], out[e, :count]) < BF16


# ---- weight gradient ------------------------------------------------------------------------------------------------


def wgrad64(dy, x, sizes):
    starts = [sum(sizes[:e]) for e in range(len(sizes))]
    pairs = [(dy[s : s + size].double(), x[s : s + size].double()) for s, size in zip(starts, sizes, strict=True)]
    return torch.stack([d.T @ v for d, v in pairs])


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=["fp32", "bf16", "e4m3"])
def test_wgrad(device, impl, sizes, dtype):
    n, k, rows = 140, 70, sum(sizes)
    dy, x = spread(0, rows + 3, n).to(device), spread(1, rows + 3, k).to(device)
    dy[rows:], x[rows:] = NAN, NAN
    offsets = offsets_of(sizes, device)
    want = wgrad64(dy, x, sizes)
    if dtype is None:
        operands = (ds.quantize_grouped(dy, offsets, impl=impl), ds.quantize_grouped(x, offsets, impl=impl))
        tolerance = UNQUANTIZED
    else:
        operands, tolerance = (dy.to(dtype), x.to(dtype)), FP32
        want = wgrad64(*operands, sizes)
    out = torch.full((len(sizes), n, k), NAN, device=device)
    assert ds.grouped_wgrad(*operands, offsets, out=out, impl=impl) is out
    assert parity.difference(out, want) < tolerance
    assert (out[torch.tensor(sizes) == 0] == 0).all()
    if len(sizes) == 3:
        assert torch.equal(ds.grouped_wgrad(*operands, offsets, impl=impl), out)  # repeated, and without `out`


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("fp8", [False, True])
def test_wgrad_accumulates_and_leaves_idle_experts_alone(device, impl, fp8):
    offsets = offsets_of([0, 130, 0, 7], device)
    dy, x = spread(0, 137, 24).to(device), spread(1, 137, 40).to(device)
    operands = [ds.quantize_grouped(t, offsets) for t in (dy, x)] if fp8 else [dy, x]
    before = torch.randn(4, 24, 40, device=device)
    before[0], before[2, 0, 0] = NAN, -0.0  # neither may be read or rewritten
    out = ds.grouped_wgrad(*operands, offsets, out=before.clone(), accumulate=True, impl=impl)
    assert torch.equal(out[[0, 2]].view(torch.int32), before[[0, 2]].view(torch.int32))
    fresh = ds.grouped_wgrad(*operands, offsets, impl=impl)
    torch.testing.assert_close(out[[1, 3]], (before + fresh)[[1, 3]])


def test_wgrad_fp8_is_that_of_the_dequantised_operands(device):
    sizes = [130, 0, 1, 128]
    offsets = offsets_of(sizes, device)
    dy, x = spread(0, 262, 70).to(device), spread(1, 262, 40).to(device)
    q_dy, q_x = ds.quantize_grouped(dy, offsets), ds.quantize_grouped(x, offsets)
    wide_dy, wide_x = (q.dequantize(torch.float64) for q in (q_dy, q_x))
    starts = [0, 256, 256, 384]  # each group padded to a multiple of 128
    want = torch.stack(
        [wide_dy[:, s : s + size] @ wide_x[:, s : s + size].T for s, size in zip(starts, sizes, strict=True)]
    )
    assert parity.difference(ds.grouped_wgrad(q_dy, q_x, offsets, impl="triton"), want) < parity.E4M3_SUMS


@settings(max_examples=15)
@given(values=HOSTILE, form=st.sampled_from(["fp32", "ue8m0"]), half=st.booleans())
def test_quantize_grouped_returns_the_bytes_of_the_reference(device, values, form, half):
    offsets = torch.tensor(values, dtype=torch.int32, device=device)
    x = spread(3, 150, 70).to(device, torch.bfloat16 if half else torch.float32)
    used = min(max(0, *values[1:]), 150)
    x[used:] = NAN
    got = ds.quantize_grouped(x, offsets, scale_format=form, impl="triton")
    want = reference_quantize(x, offsets, scale_format=form)
    assert got.shape == (70, padded_width(150, len(values) - 1))
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    assert got.scale.stride() == want.scale.stride()
    assert not got.dequantize().isnan().any()


def test_quantize_grouped_is_quantising_each_group_alone(device):
    sizes = [130, 0, 5]
    x = spread(3, 140, 70).to(device)
    got = ds.quantize_grouped(x, offsets_of(sizes, device), impl="triton")
    for start, first, size in ((0, 0, 130), (256, 130, 5)):
        alone = ds.quantize(x[first : first + size], (128, 1), transpose=True)
        columns = got.data[:, start : start + size]
        assert torch.equal(columns.float(), alone.data.float())
        assert torch.equal(got.scale[:, start // 128 :][:, : alone.scale.shape[1]], alone.scale)
    assert (got.data[:, 130:256].float() == 0).all()
    assert (got.data[:, 261:].float() == 0).all()
    assert (got.scale[:, 3:] == 1).all()


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_reference_gradient():
    a = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    offsets = offsets_of([2, 0, 5], "cpu")
    assert torch.autograd.gradcheck(lambda a, b: reference_gemm(a, b, offsets), (a, b))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_gradients(device, impl, dtype, tolerance):
    sizes = [20, 0, 33]
    a, b, offsets = ragged(sizes, 2, 48, 80, device, dtype)
    a, b = a.requires_grad_(), b.requires_grad_()
    dy = torch.randn(55, 48, device=device)
    out = ds.grouped_gemm(a, b, offsets, out_dtype=torch.float32, impl=impl)
    da, db = torch.autograd.grad(out, (a, b), dy)
    wide = [t.detach().double().nan_to_num(0).requires_grad_() for t in (a, b)]
    want = torch.autograd.grad(reference_gemm(*wide, offsets), wide, dy.to(dtype).double())
    assert (da.dtype, db.dtype) == (dtype, dtype)
    assert parity.difference(da, want[0]) < tolerance
    assert parity.difference(db, want[1]) < tolerance
    assert (da[53:] == 0).all()
    assert (db[1] == 0).all()


@pytest.mark.parametrize("which", [0, 1])
def test_only_the_gradient_asked_for(device, which):
    a, b, offsets = ragged([3, 4], 0, 24, 40, device)
    operands = [a, b]
    operands[which].requires_grad_()
    (gradient,) = torch.autograd.grad(ds.grouped_gemm(a, b, offsets, impl="triton").sum(), operands[which])
    assert gradient.shape == operands[which].shape


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("rows", "n", "k"), [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(device, impl, rows, n, k):
    a, b = torch.empty(rows, k, device=device), torch.empty(2, n, k, device=device)
    offsets = offsets_of([rows, 0], device)
    out = ds.grouped_gemm(a, b, offsets, impl=impl)
    assert out.shape == (rows, n)
    assert (out == 0).all()
    masked = ds.grouped_gemm_masked(a[None].expand(2, -1, -1), b, offsets[1:], impl=impl)
    assert masked.shape == (2, rows, n)
    assert (masked == 0).all()
    dw = ds.grouped_wgrad(out, a, offsets, impl=impl)
    assert dw.shape == (2, n, k)
    assert (dw == 0).all()
    q = ds.quantize_grouped(a, offsets, impl=impl)
    assert q.shape == (k, 128 * (2 + (rows > 0)))


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
    assert choose_config(8, 256, E4M3) == FP8_CONFIGS[0]  # decode: a row or two for each expert
    assert choose_config(256 * 64, 256, E4M3) == FP8_CONFIGS[1]
    assert choose_config(65536, 8, torch.bfloat16) == HALF_CONFIGS[-1]
    assert choose_config(65536, 8, torch.float32) == SINGLE_CONFIGS[-1]
    assert choose_wgrad_config(4096, 7168, E4M3) == FP8_CONFIGS[-1]
    assert choose_wgrad_config(64, 7168, torch.float16) == HALF_CONFIGS[1]


@given(sizes=st.lists(st.integers(0, 500), min_size=1, max_size=12), rest=st.integers(0, 300))
def test_tile_bound_and_width_suffice_for_any_division(sizes, rest):
    rows = sum(sizes) + rest
    for block in (16, 64, 128):
        assert sum(-(-size // block) for size in (*sizes, rest)) <= tile_bound(rows, len(sizes), block)
    assert sum(-(-size // 128) * 128 for size in sizes) <= padded_width(rows, len(sizes))
    assert padded_width(rows, len(sizes)) <= -(-rows // 128) * 128 + 128 * len(sizes)


# ---- what only a GPU can do in time ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "average"), [(4, 8192), (8, 4096), (256, 8)])
@pytest.mark.parametrize(("n", "k"), [(6144, 7168), (7168, 3072), (4096, 4096), (4096, 2048)])
def test_model_shapes(device, groups, average, n, k):
    generator = torch.Generator().manual_seed(0)
    sizes = (average * (0.7 + 0.6 * torch.rand(groups, generator=generator))).int().tolist()
    offsets = offsets_of(sizes, device)
    a = torch.randn(sum(sizes), k, device=device, dtype=torch.bfloat16)
    b = torch.randn(groups, n, k, device=device, dtype=torch.bfloat16)
    want = torch.cat([a[s:e] @ b[i].T for i, (s, e) in enumerate(pairwise(offsets.tolist()))])
    got = ds.grouped_gemm(a, b, offsets)
    assert parity.difference(got, want) < 1e-5
    assert torch.equal(ds.grouped_gemm(a, b, offsets), got)
    assert parity.difference(ds.grouped_gemm(ds.quantize(a), ds.quantize(b, (128, 128)), offsets), want) < UNQUANTIZED


@pytest.mark.gpu
@pytest.mark.parametrize(("groups", "rows", "count"), [(32, 192, 192), (6, 1024, 1024), (32, 192, 20), (6, 1024, 20)])
def test_masked_model_shapes(device, groups, rows, count):
    n, k = 4096, 7168
    a, b = torch.randn(groups, rows, k, device=device), torch.randn(groups, n, k, device=device)
    counts = (count * (0.7 + 0.3 * torch.rand(groups, device=device))).int()
    flat = ds.quantize(a.view(-1, k))
    q = ds.Fp8Tensor(flat.data.view(groups, rows, k), flat.scale.view(groups, rows, -1))
    out = ds.grouped_gemm_masked(q, ds.quantize(b, (128, 128)), counts)
    valid = torch.arange(rows, device=device) < counts[:, None]
    assert parity.difference(out[valid], (a @ b.mT)[valid]) < UNQUANTIZED


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [4, 8, 16])
def test_wgrad_model_shapes(device, groups):
    n, k = 4096, 7168
    sizes = [0, *(int(s) for s in torch.randint(100, 3000, (groups - 1,)))]
    offsets = offsets_of(sizes, device)
    dy, x = torch.randn(sum(sizes) + 9, n, device=device), torch.randn(sum(sizes) + 9, k, device=device)
    dy[sum(sizes) :], x[sum(sizes) :] = NAN, NAN
    ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
    want = torch.stack([dy[s:e].T @ x[s:e] for s, e in pairwise(ends)])
    assert parity.difference(ds.grouped_wgrad(dy.bfloat16(), x.bfloat16(), offsets), want) < 1e-5
    q_dy, q_x = ds.quantize_grouped(dy, offsets), ds.quantize_grouped(x, offsets)
    got = ds.grouped_wgrad(q_dy, q_x, offsets)
    assert parity.difference(got, want) < UNQUANTIZED
    assert torch.equal(ds.grouped_wgrad(q_dy, q_x, offsets), got)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(device):
    """Sizes change between replays: nothing about them may have been read on the host."""
    a, b, offsets = ragged([20, 30], 14, 136, 256, device)
    a = a.nan_to_num(0.5)
    qa, qb = ds.quantize(a), ds.quantize(b, (128, 128))
    dy = torch.randn(64, 136, device=device)
    ds.grouped_gemm(qa, qb, offsets), ds.grouped_wgrad(dy, a, offsets), ds.quantize_grouped(a, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = ds.grouped_gemm(qa, qb, offsets), ds.grouped_wgrad(dy, a, offsets), ds.quantize_grouped(a, offsets).data
    for sizes in ([0, 64], [1, 2], [33, 31]):
        offsets.copy_(offsets_of(sizes, device))
        graph.replay()
        want = ds.grouped_gemm(qa, qb, offsets), ds.grouped_wgrad(dy, a, offsets), ds.quantize_grouped(a, offsets).data
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g.view(torch.uint8), w.view(torch.uint8))
