"""Quantising in CUDA C++: compiled here, run on the GPU against the reference, byte by byte."""

import itertools

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.fp8 import hopper, hopper_norm
from dskernels.fp8.config import HOPPER_CONFIGS, MATRIX, choose_hopper, choose_hopper_norm
from dskernels.reference import fp8 as reference
from test_fp8_fused import close

BLOCKS = [(1, 128), (128, 128), (128, 1)]
FORMATS = ["fp32", "ue8m0"]


@pytest.mark.parametrize("config", HOPPER_CONFIGS, ids=str)
def test_compiles_without_spills(config):
    reports = [compile_cuda(hopper.SOURCE, hopper.options(config, ue8m0), config.shared) for ue8m0 in (False, True)]
    assert_clean(reports, max_registers=65536 // (32 * config.warps * config.blocks))
    for report in reports:
        assert report.shared * config.blocks <= 228 * 1024  # what an SM has: as many blocks as the config counts on
        assert report.count("LDG.E.NA.128") == 8 * (1 if config.source == MATRIX else 1 + config.source)
        assert report.count("STG.E.64") == (8 if config.plain else 0) + (16 if config.kept else 0)
        assert report.count("STG.E.128") == (4 if config.transposed else 0)
        assert report.count("F2FP") == 32 * (bool(config.plain) + bool(config.transposed) + 2 * config.kept)


@pytest.mark.parametrize("cols", [128, 512, 1536, 7168, 16384, 32768])
@pytest.mark.parametrize("residual", [False, True])
def test_norm_compiles_without_spills(cols, residual):
    config = choose_hopper_norm(cols)
    assert config.warps <= 32
    assert 8 * 32 * config.warps * config.per >= cols
    options = [hopper_norm.options(config, residual, ue8m0, ue8m0) for ue8m0 in (False, True)]
    reports = [compile_cuda(hopper_norm.SOURCE, each, 0) for each in options]
    assert_clean(reports, max_registers=65536 // (32 * config.warps * config.blocks))
    for report in reports:
        assert report.count("LDG.E.NA.128") == config.per * (2 + residual)
        assert report.count("DFMA") == 8 * config.per


def test_choice_covers_every_config():
    chosen = {choose_hopper(block, transpose) for block in BLOCKS for transpose in (False, True)}
    assert len(chosen) == 6
    assert chosen <= set(HOPPER_CONFIGS)


def test_what_it_does_not_take():
    def reason(x, transpose=False):
        return hopper.quantize_supports(x, 1, 128, False, transpose)

    x = torch.empty(32, 128, dtype=torch.bfloat16)
    assert "it reads bf16, x is float32" in reason(x.float())
    assert "nothing to quantise" in reason(x[:0])
    assert "rows of x must be aligned to 16 bytes, there are 127 columns" in reason(x[:, :127])
    assert "aligned to 16 bytes" in reason(x[:, 1:121])
    assert "transposed result must be aligned to 16 bytes, x has 31 rows" in reason(x[:31], transpose=True)
    assert "x has 31 rows" in hopper.quantize_both_supports(x[:31], False)
    assert "Triton kernel is faster for fewer than 1024 rows" in hopper.swiglu_quantize_supports(x, False, False)
    assert "rows of gate_up must be aligned to 16 bytes, there are 60" in hopper.swiglu_quantize_supports(
        x[:, :120], False, True
    )
    assert "tiles of 128, there are 64" in hopper.swiglu_quantize_backward_supports(x[:, :64], x, False)


def test_what_the_norm_does_not_take():
    x, weight = torch.empty(32, 256, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bfloat16)
    reason = hopper_norm.rmsnorm_quantize_supports
    assert "it reads bf16, x is float32" in reason(x.float(), weight, 1e-6, None, False)
    assert "it reads bf16, weight is float32" in reason(x, weight.float(), 1e-6, None, False)
    assert "nothing to quantise" in reason(x[:0], weight, 1e-6, None, False)
    assert "rows of x must be aligned to 16 bytes" in reason(x[:, 1:129], weight[:128], 1e-6, None, False)
    assert "rows of residual must be aligned to 16 bytes" in reason(
        x[:, :120].contiguous(), weight[:120], 1e-6, x[:, 1:121], False
    )
    assert "multiples of 8 columns up to 32768, and there are 255" in reason(
        x[:, :255], weight[:255], 1e-6, None, False
    )


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "cols"),
    [
        (1, 8),  # the least
        (3, 136),  # a second tile of one thread
        (5, 200),
        (83, 1536),
        (4096, 7168),
        (40, 32768),  # the widest
    ],
)
@pytest.mark.parametrize("scale_format", FORMATS)
@pytest.mark.parametrize("residual", [False, True])
def test_norm_has_the_references_bytes(device, rows, cols, scale_format, residual):
    x = matrix(rows, cols, device=device)
    weight = torch.randn(cols, device=device).bfloat16()
    stream = matrix(rows, cols, device=device) if residual else None
    poisoned(device)
    options = {"scale_format": scale_format, "with_normed": scale_format == "ue8m0"}
    got = ds.rmsnorm_quantize(x, weight, 1e-6, stream, **options, impl="hopper")
    want = reference.rmsnorm_quantize(x, weight, 1e-6, stream, **options)
    if options["with_normed"]:
        assert torch.equal(got[2].view(torch.int16), want[2].view(torch.int16))
    if residual or options["with_normed"]:
        assert torch.equal(got[1].view(torch.int16), want[1].view(torch.int16))
        got, want = got[0], want[0]
    same_bytes(got, want)


@pytest.mark.gpu
def test_norm_of_what_is_not_finite(device):
    x, weight = torch.randn(64, 1536, device=device).bfloat16(), torch.ones(1536, device=device).bfloat16()
    x[3, 700], x[9, 3], x[20, 1500] = float("nan"), float("inf"), float("-inf")
    whole = torch.randn(128, 1544, device=device).bfloat16()  # rows that are not one after the other
    for rows in (x, whole[::2, 8:]):
        got = ds.rmsnorm_quantize(rows, weight, 1e-6, impl="hopper")
        want = reference.rmsnorm_quantize(rows, weight, 1e-6)
        assert torch.equal(got.scale.isnan(), want.scale.isnan())
        assert torch.equal(got.dequantize().isnan(), want.dequantize().isnan())
        finite = ~want.dequantize().isnan()
        assert torch.equal(got.data.float()[finite], want.data.float()[finite])


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "width"), [(400, 1024), (4096, 2048)])
def test_gradient_of_swiglu(device, rows, width):
    dy, gate_up = torch.randn(rows, width, device=device).bfloat16(), torch.randn(rows, 2 * width, device=device) * 3
    gate_up = gate_up.bfloat16()
    poisoned(device)
    got = ds.swiglu_quantize_backward(dy, gate_up, impl="hopper")
    for g, w in zip(got, reference.swiglu_quantize_backward(dy, gate_up), strict=True):
        close(g, w, scale_ulp=0)
    for q in ds.swiglu_quantize_backward(dy, gate_up, scale_format="ue8m0", impl="hopper"):
        assert torch.equal(q.scale, q.scale.log2().round().exp2())
    transposed = ds.swiglu_quantize(gate_up, transpose=True, impl="hopper")
    close(transposed, reference.swiglu_quantize(gate_up, transpose=True), scale_ulp=0)


def same_bytes(got, want):
    assert got.block == want.block
    assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)
    assert got.scale.stride() == want.scale.stride() or 1 in got.scale.shape


def poisoned(device):
    """Free memory full of NaN, for the outputs that are made next."""
    del [torch.full((1 << 26,), 0xFF, dtype=torch.uint8, device=device) for _ in range(4)][:]


def matrix(*shape, device):
    """Rows of every magnitude bf16 has, denormals, both zeros and a row of zeros among them."""
    x = torch.randn(*shape, device=device) * 10.0 ** torch.randint(-42, 36, (*shape[:-1], 1), device=device)
    x[torch.rand(shape, device=device) < 0.05] = -0.0
    x[..., shape[-2] // 2, :] = 0.0
    return x.clamp(-3e38, 3e38).bfloat16()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8),  # the least
        (16, 8),
        (16, 136),  # a second tile of one thread
        (400, 1032),  # partial tiles in both directions
        (83, 576),  # rows that cannot be transposed 16 bytes at a time
        (4096, 7168),
        (7168, 16384),
        (3, 272, 584),  # a stack of expert weights
        (32, 2048, 7168),
    ],
)
def test_bytes_equal_the_reference(device, shape):
    x = matrix(*shape, device=device)
    for block, scale_format, transpose in itertools.product(BLOCKS, FORMATS, (False, True)):
        if (len(shape) == 3 and block != (128, 128)) or (transpose and shape[-2] % 16):
            continue
        options = {"scale_format": scale_format, "transpose": transpose}
        poisoned(device)
        got = ds.quantize(x, block, **options, impl="hopper")
        same_bytes(got, reference.quantize(x, block, **options))
        for _ in range(10):
            same_bytes(ds.quantize(x, block, **options, impl="hopper"), got)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 16), (400, 1040), (3, 272, 144), (4096, 7168)])
def test_a_weight_and_its_transpose_equal_the_reference(device, shape):
    x = matrix(*shape, device=device)
    poisoned(device)
    got = ds.quantize_both(x, block=(128, 128), impl="hopper")
    for g, transpose in zip(got, (False, True), strict=True):
        same_bytes(g, reference.quantize(x, (128, 128), transpose=transpose))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(16, 8), (400, 1032), (4096, 7168), (4096, 16384)])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_both_equal_the_reference(device, shape, scale_format):
    x = matrix(*shape, device=device)
    poisoned(device)
    got = ds.quantize_both(x, scale_format=scale_format, impl="hopper")
    for g, w in zip(got, reference.quantize_both(x, scale_format=scale_format), strict=True):
        same_bytes(g, w)
    for _ in range(10):
        for g, w in zip(ds.quantize_both(x, scale_format=scale_format, impl="hopper"), got, strict=True):
            same_bytes(g, w)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["hopper", "triton"])
@pytest.mark.parametrize("scale_format", FORMATS)
def test_every_largest_magnitude_and_every_mantissa(device, impl, scale_format):
    """All quotients of bf16: each finite magnitude as a tile's largest, each mantissa in the 18 octaves below."""
    largest = torch.arange(1, 0x7F80, dtype=torch.int32, device=device)[:, None]
    mantissas = torch.arange(128, dtype=torch.int32, device=device)
    for octave in range(18):
        bits = ((largest - 128 * octave) & ~0x7F).clamp(min=0) + mantissas
        bits = torch.where(bits > largest, 0, bits)
        bits[:, 0] = largest[:, 0]
        x = bits.to(torch.int16).view(torch.bfloat16)
        x[:, 1::2] *= (-1) ** octave
        got = ds.quantize(x, scale_format=scale_format, impl=impl)
        same_bytes(got, reference.quantize(x, scale_format=scale_format))


@pytest.mark.gpu
def test_what_is_not_finite(device):
    x = torch.randn(256, 256, device=device).bfloat16()
    x[3, 5], x[130, 200], x[200, 7] = float("nan"), float("inf"), float("-inf")
    for block, transpose in itertools.product(BLOCKS, (False, True)):
        got = ds.quantize(x, block, transpose=transpose, impl="hopper")
        want = reference.quantize(x, block, transpose=transpose)
        assert torch.equal(got.scale.isnan(), want.scale.isnan())
        assert torch.equal(got.dequantize().isnan(), want.dequantize().isnan())
        finite = ~want.dequantize().isnan()
        assert torch.equal(got.data.float()[finite], want.data.float()[finite])


@pytest.mark.gpu
def test_nothing_else_is_written_and_strides_are_obeyed(device):
    whole = torch.randn(400, 1040, device=device).bfloat16()
    x = whole[8:392:2, 16:824]
    for block in BLOCKS:
        same_bytes(ds.quantize(x, block, impl="hopper"), reference.quantize(x, block))
    for g, w in zip(ds.quantize_both(x, impl="hopper"), reference.quantize_both(x), strict=True):
        same_bytes(g, w)


@pytest.mark.gpu
def test_captured_in_a_graph(device):
    x = torch.randn(256, 512, device=device).bfloat16()
    want = ds.quantize_both(x, impl="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ds.quantize_both(x, impl="hopper")
    for q in captured:
        q.data.view(torch.uint8).fill_(0)
        q.scale.fill_(torch.nan)
    graph.replay()
    for g, w in zip(captured, want, strict=True):
        same_bytes(g, w)
