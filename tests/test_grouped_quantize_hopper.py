"""Quantising groups of tokens in CUDA C++: compiled here, run on the GPU against the reference, byte by byte."""

import itertools

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.grouped_gemm import hopper_quantize
from dskernels.grouped_gemm.config import padded_width
from dskernels.reference import quantize_grouped as reference

FORMATS = ["fp32", "ue8m0"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_without_spills(dtype):
    blocks, shared = hopper_quantize.blocks_of(dtype), 8 * (hopper_quantize.MOST_GROUPS + 1)
    reports = [
        compile_cuda(hopper_quantize.SOURCE, hopper_quantize.options(dtype, gather, ue8m0), shared)
        for gather, ue8m0 in itertools.product((False, True), repeat=2)
    ]
    assert_clean(reports, max_registers=65536 // (hopper_quantize.THREADS * blocks))
    for report in reports:
        assert report.shared * blocks <= 228 * 1024
        assert report.count("LDG.E.NA.128", "LDG.E.128.CONSTANT") == (16 if dtype == torch.float32 else 8)
        assert report.count("STG.E.128") == 4
        assert report.count("F2FP") == 32


def test_what_it_does_not_take():
    def reason(x, groups=2, **options):
        return hopper_quantize.quantize_grouped_supports(
            x, torch.zeros(groups + 1, dtype=torch.int32), False, **options
        )

    x = torch.empty(32, 128, dtype=torch.bfloat16)
    assert "whole 16 bytes, there are 127 columns" in reason(x[:, :127])
    assert "a stride of 132" in reason(torch.empty(4, 132, dtype=torch.bfloat16)[:, :128])
    assert "whole 16 bytes" in reason(x[:, 1:121])
    assert "2047 groups at most, there are 2048" in reason(x, groups=2048)
    assert "x has no rows to gather, source has 5" in reason(x[:0], source=torch.zeros(5, dtype=torch.int32))


def matrix(rows, cols, dtype, device, by_column=False):
    """Elements of every magnitude of `dtype`, denormals and both zeros among them, each row or column of about one."""
    low, high = (-8, 4) if dtype == torch.float16 else (-42, 36)
    shape = (1, cols) if by_column else (rows, 1)
    x = torch.randn(rows, cols, device=device) * 10.0 ** torch.randint(low, high, shape, device=device)
    x[torch.rand(rows, cols, device=device) < 0.05] = -0.0
    return x.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def poisoned(device):
    """Free memory full of NaN, for the outputs that are made next."""
    del [torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device=device) for _ in range(4)][:]


def same_bytes(got, want):
    assert torch.equal(got[0].view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got[1], want.scale)
    assert got[1].stride() == want.scale.stride()


def offsets_of(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


MANY = [0, *(i * i % 61 + 60 * i for i in range(1, 1025))]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("values", "rows", "cols"),
    [
        ([0, 1], 1, 8),  # the least
        ([0, 130, 130, 131, 300], 310, 200),  # an empty group, a short one, rows that belong to none
        ([0, 128, 256], 300, 1032),  # whole tiles, and a tile of one thread across
        ([0, 0, 0, 300, 300], 300, 264),  # all in one
        ([0, 0, 0], 77, 128),  # nothing in any
        ([0, 0, 0], 0, 136),  # no tokens
        ([-7, 5000, 3, -(2**31), 2**31 - 1, 9], 1001, 136),  # what no offsets should be
        ([2**31 - 1, 0, 1], 260, 16),
        (MANY, 61440, 72),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_equal_the_reference(device, values, rows, cols, dtype):
    offsets = offsets_of(values, device)
    for by_column, scale_format in itertools.product((False, True), FORMATS):
        x = matrix(rows, cols, dtype, device, by_column)
        used = min(max(0, *values[1:]), rows)
        x[used:] = torch.nan  # never read
        poisoned(device)
        got = hopper_quantize.quantize_grouped(x, offsets, scale_format == "ue8m0")
        assert got[0].shape == (cols, padded_width(rows, len(values) - 1))
        same_bytes(got, reference(x, offsets, scale_format=scale_format))
        again = ds.quantize_grouped(x, offsets, scale_format=scale_format, impl="hopper")
        same_bytes(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32])
def test_quotients_next_to_a_tie(device, dtype):
    """fp32 next to every place where e4m3 rounds, at scales of any mantissa, goes where IEEE division sends it."""
    values = torch.arange(127, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    ties = (values[1:] + values[:-1]) / 2
    for _ in range(20):
        amax = (torch.rand(8192, device=device) + 1) * 448 * 2.0 ** torch.randint(-110, 110, (8192,), device=device)
        scale = amax / torch.full_like(amax, 448.0)
        x = ties[:, None] * scale
        x = (x.view(torch.int32) + torch.randint(-2, 3, x.shape, device=device, dtype=torch.int32)).view(torch.float32)
        x = torch.cat([amax[None], x * torch.randint(0, 2, x.shape, device=device).mul(2).sub(1)])
        offsets = offsets_of([0, x.shape[0]], device)
        same_bytes(hopper_quantize.quantize_grouped(x, offsets, False), reference(x, offsets))


@pytest.mark.gpu
def test_what_is_not_finite(device):
    for dtype in DTYPES:
        x = torch.randn(300, 256, device=device).to(dtype)
        x[3, 5], x[130, 200], x[200, 7] = torch.nan, torch.inf, -torch.inf
        offsets = offsets_of([0, 100, 290], device)
        got, want = ds.quantize_grouped(x, offsets, impl="hopper"), reference(x, offsets)
        assert torch.equal(got.scale.isnan(), want.scale.isnan())
        assert torch.equal(got.dequantize().isnan(), want.dequantize().isnan())
        finite = ~want.dequantize().isnan()
        assert torch.equal(got.data.float()[finite], want.data.float()[finite])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_gathered_rows(device, dtype, top_k):
    tokens, cols = 250, 264
    x = matrix(tokens, cols, dtype, device)
    source = torch.randperm(tokens * top_k, device=device).int()[: tokens * top_k - 5]
    rows = source.shape[0]
    offsets = offsets_of([0, 100, 100, rows // 2, rows - 3], device)
    poisoned(device)
    got = hopper_quantize.quantize_grouped(x, offsets, False, source, top_k)
    same_bytes(got, reference(x[(source // top_k).long()], offsets))


@pytest.mark.gpu
def test_no_source_leads_out_of_bounds(device):
    whole = torch.full((300, 128), torch.nan, device=device, dtype=torch.bfloat16)
    x = whole[100:200]
    x.copy_(torch.randn(100, 128))
    source = torch.tensor([-(2**31), -1, 100, 2**31 - 1, 5] * 30, dtype=torch.int32, device=device)
    got = hopper_quantize.quantize_grouped(x, offsets_of([0, 150], device), False, source, 1)
    taken = torch.where((source < 0) | (source > 99), 99, source)
    same_bytes(got, reference(x[taken.long()], offsets_of([0, 150], device)))


@pytest.mark.gpu
def test_nothing_else_is_read_or_written(device):
    whole = torch.full((400, 1040), torch.nan, device=device, dtype=torch.bfloat16)
    x = whole[8:392:2, 16:824]
    x.copy_(torch.randn(x.shape))
    offsets = offsets_of([0, 5, 192], device)
    tensors = reference(x, offsets)
    buffers = [torch.full((t.numel() + 512,), 77, dtype=torch.uint8, device=device) for t in (tensors.data,)]
    scales = torch.full((tensors.scale.stride(1) * tensors.scale.shape[1] + 128,), 77.0, device=device)
    data = buffers[0][256:-256].view(torch.float8_e4m3fn).view(tensors.data.shape)
    scale = scales[64:-64].as_strided(tensors.scale.shape, tensors.scale.stride(), scales[64:-64].storage_offset())
    hopper_quantize._quantize_grouped(x, offsets, None, False, 1, False, data, scale)
    same_bytes((data, scale), tensors)
    assert (buffers[0][:256] == 77).all()
    assert (buffers[0][-256:] == 77).all()
    assert (scales[:64] == 77).all()
    assert (scales[-64:] == 77).all()


@pytest.mark.gpu
def test_captured_in_a_graph_and_replayed_with_other_offsets(device):
    x = torch.randn(500, 256, device=device).bfloat16()
    offsets = offsets_of([0, 100, 300, 500], device)
    ds.quantize_grouped(x, offsets, impl="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ds.quantize_grouped(x, offsets, impl="hopper")
    for values in ([0, 500, 500, 500], [0, 1, 2, 3], [9, -1, 2**31 - 1, 0]):
        offsets.copy_(offsets_of(values, device))
        captured.data.view(torch.uint8).fill_(0xFF)
        captured.scale.fill_(torch.nan)
        graph.replay()
        same_bytes((captured.data, captured.scale), reference(x, offsets))
