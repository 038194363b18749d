"""Grouped gradients of weights, and tokens quantised for them: against fp64, hostile group sizes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.grouped_gemm.config import padded_width
from dskernels.parity.inputs import spread
from dskernels.reference import quantize_grouped as reference_quantize
from test_grouped_gemm import FP32, HOSTILE, IMPLS, NAN, SIZES, UNQUANTIZED, offsets_of


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
