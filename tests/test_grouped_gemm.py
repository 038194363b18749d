"""Grouped products: against fp64, ragged and hostile group sizes, gradients."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.parity import grouped_gemm as cases
from dskernels.parity.inputs import spread
from dskernels.reference import grouped_gemm as reference_gemm
from dskernels.reference import grouped_wgrad as reference_wgrad

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
