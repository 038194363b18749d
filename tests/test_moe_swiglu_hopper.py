"""The gradient of the SwiGLU in CUDA C++, and what is kept for it: compiled here, run on the GPU against Triton's."""

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.fp8 import hopper as fp8_hopper
from dskernels.grouped_gemm.hopper_quantize import quantize_grouped
from dskernels.moe import hopper_swiglu, packed
from dskernels.moe.experts import Batch
from dskernels.moe.triton_packed import packed as triton_packed
from dskernels.moe.triton_sort import sort
from dskernels.moe.triton_swiglu import swiglu, swiglu_backward

NAN = float("nan")


@pytest.mark.parametrize(("weighted", "grouped"), [(True, True), (False, False)])
def test_compiles_without_spills(weighted, grouped):
    options, shared = hopper_swiglu.options(weighted, grouped), hopper_swiglu.WAITING + 8 * 257
    report = compile_cuda(hopper_swiglu.SOURCE, options, shared)
    assert_clean([report], max_registers=65536 // (hopper_swiglu.THREADS * hopper_swiglu.BLOCKS))
    assert report.shared * hopper_swiglu.BLOCKS <= 227 * 1024


@pytest.mark.parametrize("cols", [256, 200, 2816])
def test_packed_is_quantised_in_tiles(device, cols):
    """Rows of bytes that both the reference and the kernel fill alike; what fills a row up means nothing."""
    x = torch.randn(37, cols, device=device)
    quantized = ds.quantize(x, impl="reference")
    got, want = triton_packed(x), packed.pack(quantized)
    assert got.shape == want.shape == (37, packed.packed_width(cols))
    scales = packed.scales_at(cols) + 4 * quantized.scale.shape[1]
    for begin, end in ((0, cols), (packed.scales_at(cols), scales)):
        assert torch.equal(got[:, begin:end], want[:, begin:end])


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 130, 4096])
def test_what_is_kept_has_the_same_bytes(sm_90, rows):
    gate_up = (torch.randn(rows, 2816, device="cuda") * 3).bfloat16()
    kept = torch.empty(rows, packed.packed_width(2816), dtype=torch.uint8, device="cuda")
    hidden = fp8_hopper.swiglu_quantize_rows(gate_up, None, kept)
    want = triton_packed(gate_up)
    meaning = packed.scales_at(2816) + 4 * 22
    assert torch.equal(kept[:, :meaning], want[:, :meaning])
    for got, same in zip(hidden, fp8_hopper.swiglu_quantize(gate_up, False, False), strict=True):
        assert torch.equal(got.float(), same.float())


@pytest.mark.gpu
def test_rows_of_no_expert_are_left_alone(sm_90):
    """In both forms of the activation, and along tokens: what is there stays, whatever is in the rows it is made of."""
    rows, used, width = 700, 300, 384
    gate_up = torch.randn(rows, 2 * width, device="cuda").bfloat16()
    gate_up[used:] = NAN
    offsets = torch.tensor([0, 130, 130, used], dtype=torch.int32, device="cuda")
    want = fp8_hopper.swiglu_quantize(gate_up[:used].contiguous(), False, False)
    for kept in (None, torch.full((rows, packed.packed_width(2 * width)), 7, dtype=torch.uint8, device="cuda")):
        torch.full((1 << 26,), 7, dtype=torch.uint8, device="cuda")  # freed at once: what is not written stays 7
        data, scale = fp8_hopper.swiglu_quantize_rows(gate_up, offsets, kept)
        assert torch.equal(data[:used].view(torch.uint8), want[0].view(torch.uint8))
        assert torch.equal(scale[:used], want[1][:used])
        assert kept is None or (kept[used:] == 7).all()
        assert kept is None or not (kept[:used, : 2 * width] == 7).all()
    hidden = swiglu(gate_up, offsets)
    assert torch.equal(hidden[:used], swiglu(gate_up[:used].contiguous()))

    whole = quantize_grouped(gate_up, offsets, False)
    part = quantize_grouped(gate_up, offsets, False, leave=True)
    filled = 128 * int(((offsets.diff() + 127) // 128).sum())
    assert torch.equal(*(data.view(torch.uint8)[:, :filled] for data, _ in (whole, part)))
    assert torch.equal(whole[1][:, : filled // 128], part[1][:, : filled // 128])


def test_rows_of_no_expert_change_nothing(device):
    gate_up = torch.randn(37, 256, device=device)
    offsets = torch.tensor([0, 5, 5, 29], dtype=torch.int32, device=device)
    assert torch.equal(swiglu(gate_up, offsets)[:29], swiglu(gate_up)[:29])


@pytest.mark.gpu
@pytest.mark.parametrize("grouped", [True, False])
def test_gradient(sm_90, grouped):
    """Ragged groups, one empty, dropped choices, which nothing may read; all results against the portable kernels'."""
    tokens, top_k, n_experts, width = (500, 3, 7, 384) if grouped else (640, 1, 1, 384)
    batch, weights = Batch(tokens), None
    if grouped:
        experts = torch.randint(0, 6, (tokens, top_k), device="cuda", dtype=torch.int32)
        experts[5:20, 1] = -1
        offsets, index, source = sort(experts, n_experts)
        batch = Batch(source.shape[0], top_k, offsets, index, source)
        weights = torch.rand(tokens, top_k, device="cuda")
    rows = batch.rows
    used = int(batch.offsets[-1]) if grouped else rows
    gate_up = (torch.randn(rows, 2 * width, device="cuda") * 2).bfloat16()
    dhidden = torch.randn(rows, width, device="cuda").bfloat16()
    gate_up[used:], dhidden[used:] = NAN, NAN
    kept = triton_packed(gate_up)
    torch.full((1 << 26,), NAN, device="cuda")  # freed at once: what is not written is NaN
    got = hopper_swiglu.swiglu_backward(kept, dhidden, batch, weights)
    again = hopper_swiglu.swiglu_backward(kept, dhidden, batch, weights)
    dgate_up, hidden, dweights = swiglu_backward(kept, dhidden, batch.source, batch.index, weights)

    by_row, along, along_hidden = got[0], got[1].data, got[2].data
    # Tiles of 128 tokens that no group fills are nobody's, as rows after the last group's are: no product reads them.
    filled = 128 * int(((batch.offsets.diff() + 127) // 128).sum()) if grouped else rows
    assert parity.difference(by_row.dequantize()[:used], ds.quantize(dgate_up).dequantize()[:used]) < 1e-4
    for mine, values in ((along, dgate_up), (along_hidden, hidden)):
        if grouped:
            want = ds.Fp8Tensor(*quantize_grouped(values, batch.offsets, False))
        else:
            want = ds.quantize(values, (128, 1), transpose=True)
        assert mine.data.shape == want.data.shape
        assert mine.scale.stride() == want.scale.stride()
        assert parity.difference(mine.dequantize()[:, :filled], want.dequantize()[:, :filled]) < 1e-4
        assert torch.equal(mine.data.float()[:, :filled] == 0, mine.dequantize()[:, :filled] == 0)
    if weights is not None:
        assert parity.difference(got[3], dweights) < 1e-8
        assert (got[3][5:20, 1] == 0).all()
        assert torch.equal(got[3], again[3])
    bits = [along.data.view(torch.uint8), again[1].data.data.view(torch.uint8)]
    assert torch.equal(*(part[:, :filled] for part in bits))
    assert torch.equal(*(part[:, : filled // 128] for part in (along_hidden.scale, again[2].data.scale)))
