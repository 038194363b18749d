"""The Hopper GEMM for few rows: compiled here, run on the GPU against the reference."""

import itertools

import pytest
import torch
from torch import Tensor

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.cuda.driver import Plan, Planned
from dskernels.gemm import hopper_small
from dskernels.gemm.config import (
    SHARED_OF_MULTIPROCESSOR,
    SHARED_RESERVED,
    SmallConfig,
    choose_small_config,
    use_small,
)
from dskernels.parity.inputs import quantized
from dskernels.validate import ceil_div

MULTIPROCESSORS = 132
SHAPES = [(4096, 7168), (7168, 2048), (24576, 1536), (32768, 512), (7168, 16384), (2112, 7168), (576, 7168), (130, 16)]
ROWS = [1, 8, 16, 32, 64, 128, 129, 256]
CHOSEN = {
    (m, n, k): choose_small_config(m, n, k, MULTIPROCESSORS)
    for m in ROWS
    for n, k in SHAPES
    if use_small(m, n, k, MULTIPROCESSORS)
}
CONFIGS = sorted(set(CHOSEN.values()), key=repr)
# (out, bias, accumulate): every value of each.
KINDS = [(0, 0, 0), (1, 3, 0), (2, 1, 1), (0, 2, 1)]


@pytest.mark.parametrize("tokens", sorted({config.tokens for config in CONFIGS}))
def test_compiles_without_spills(tokens):
    """Every config; of those that differ in the size of a cluster or in residents alone, the fullest in every kind."""
    configs = sorted((config for config in CONFIGS if config.tokens == tokens), key=lambda c: (c.resident, c.split))
    fullest = {(config.tile, config.split > 1): config for config in configs}.values()
    compiled = [
        (config, compile_cuda(hopper_small.SOURCE, hopper_small.options_of(config, *kind), 0))
        for config in configs
        for kind in (KINDS if config in fullest else KINDS[-1:])
    ]
    for config, report in compiled:
        # Each quarter of a multiprocessor has 16,384 registers, for its share of the warps of `resident` CTAs.
        warps = ceil_div(config.resident * (2 * config.tile + 32), 128)
        assert_clean([report], max_registers=min(16384 // 32 // warps, 255))
        assert report.count("QGMMA") >= 4, report
        assert report.count("UTMALDG") == 6, report  # before the loop and in it: B, A, scales
        assert (report.count("STAS") > 0) == (config.split > 1), report


@pytest.mark.parametrize(("shape", "config"), CHOSEN.items(), ids=str)
def test_memory(shape, config):
    m, n, k = shape
    stages = config.stages(m, n, k, MULTIPROCESSORS)
    tiles = config.tiles(m, n, MULTIPROCESSORS)
    assert config.resident * (config.shared_bytes(stages, tiles) + SHARED_RESERVED) <= SHARED_OF_MULTIPROCESSOR
    assert stages >= min(3, ceil_div(ceil_div(k, 128), config.split))
    assert tiles > 1 or config.c <= stages * config.stage  # the only tile leaves through the memory of the stages


@pytest.mark.parametrize(("shape", "config"), CHOSEN.items(), ids=str)
def test_every_tile_has_a_cta(shape, config):
    m, n, _ = shape
    tiles, grid = ceil_div(n, config.tile), config.grid(m, n, MULTIPROCESSORS)
    if config.split > 1 or m > config.tokens:
        assert grid == tiles * ceil_div(m, config.tokens) * config.split
    else:
        assert grid == min(tiles, config.resident * MULTIPROCESSORS)


@Planned
def multiply(
    config: SmallConfig | None,
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    bias: Tensor | None,
    out: Tensor,
    accumulate: bool,
) -> Plan:
    """`fp8_gemm`, by this kernel whatever the size."""
    if config is None:
        config = choose_small_config(a.shape[0], b.shape[0], a.shape[1], MULTIPROCESSORS)
    return hopper_small.plan(config, a, a_scale, b, b_scale, bias, out, accumulate)


def run(m, n, k, out, *, config=None, bias=None, accumulate=False):
    """Quantised operands of that size, and what multiplies them into `out`."""
    a, b = quantized(0, m, k, (1, 128), out.device), quantized(1, n, k, (128, 128), out.device)
    return a, b, lambda: multiply(config, a.data, a.scale, b.data, b.scale, bias, out, accumulate)


def agree(got, want):
    finite = want.abs() < 6e4 if got.dtype == torch.float16 else torch.ones_like(want, dtype=torch.bool)
    tolerance = {torch.bfloat16: 5e-6, torch.float16: 1e-6, torch.float32: parity.E4M3_SUMS}[got.dtype]
    return parity.difference(got[finite].float(), want[finite].float()) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 130, 16),  # the least it takes: one row, a K shorter than a scale, N not a multiple of a tile
        (7, 576, 7168),
        (33, 131, 208),  # rows of C that cannot be written in 16 bytes, a last block of K cut short
        (83, 2112, 3872),
        (129, 576, 512),  # one row past the tokens of a tile
    ],
)
def test_every_epilogue(device, m, n, k):
    kinds = [torch.bfloat16, torch.float16, torch.float32]
    for dtype, bias_dtype, accumulate in itertools.product(kinds, [None, *kinds], (False, True)):
        bias = None if bias_dtype is None else torch.randn(n, device=device).to(bias_dtype)
        out = torch.full((m, n), torch.nan, dtype=dtype, device=device)
        if accumulate:
            out = torch.randn(m, n, device=device).to(dtype)
        before = out.float()
        a, b, launch = run(m, n, k, out, bias=bias, accumulate=accumulate)
        launch()
        want = ds.reference.fp8_gemm(a, b, bias=bias, out=before, accumulate=accumulate)
        assert agree(out, want), (dtype, bias_dtype, accumulate)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_every_config(device, config):
    for m, n, k in [(min(config.tokens, 5), 200, 1536), (config.tokens, 704, 4112), (config.tokens + 3, 192, 2048)]:
        out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=device)
        a, b, launch = run(m, n, k, out, config=config)
        launch()
        assert agree(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32)), (m, n, k)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "n", "k"), [(1, 4096, 7168), (64, 7168, 16384), (128, 2112, 7168), (16, 32768, 512)])
def test_bits_repeat(device, m, n, k):
    out = torch.full((m, n), torch.nan, dtype=torch.bfloat16, device=device)
    a, b, launch = run(m, n, k, out)
    launch()
    assert agree(out, ds.reference.fp8_gemm(a, b, out_dtype=torch.float32))
    first = out.clone()
    for _ in range(10):
        out.fill_(torch.nan)
        launch()
        assert torch.equal(out, first)


@pytest.mark.gpu
def test_nothing_else_is_written_and_rows_do_not_mix(device):
    whole = torch.full((20, 700), 3.0, device=device, dtype=torch.bfloat16)
    inner = whole[2:15, 33:609]
    a, b, launch = run(13, 576, 1024, inner)
    want = ds.reference.fp8_gemm(a, b)
    a.scale[5] = torch.nan
    launch()
    assert inner[5].isnan().all()
    rest = torch.arange(13, device=device) != 5
    assert agree(inner[rest], want[rest])
    inner.fill_(3.0)
    assert (whole == 3).all()


@pytest.mark.gpu
def test_captured_in_a_graph(device):
    out = torch.empty(16, 2112, dtype=torch.bfloat16, device=device)
    _, _, launch = run(16, 2112, 7168, out)
    launch()
    want = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, want)


def test_choice():
    assert choose_small_config(1, 7168, 16384, MULTIPROCESSORS).split == 1
    assert choose_small_config(64, 4096, 7168, MULTIPROCESSORS).split == 2
    assert choose_small_config(128, 24576, 1536, MULTIPROCESSORS).tokens == 64
    assert choose_small_config(128, 4096, 7168, MULTIPROCESSORS).tile == 128
    assert choose_small_config(16, 4096, 7168, MULTIPROCESSORS).tokens == 16
    for (m, _, k), config in CHOSEN.items():
        assert config.tokens >= min(m, 64)
        assert config.split <= ceil_div(k, 128)
    assert choose_small_config(1, 64, 16, 1) == SmallConfig(64, 8, split=1, resident=2)


def test_where_it_is_used():
    assert use_small(64, 24576, 1536, MULTIPROCESSORS)
    assert not use_small(65, 24576, 1536, MULTIPROCESSORS)  # three full rounds of HOPPER_LEAN's tiles
    assert use_small(128, 12288, 4096, MULTIPROCESSORS)  # a round and a half of them
    assert use_small(128, 4096, 7168, MULTIPROCESSORS)
    assert not use_small(128, 32768, 512, MULTIPROCESSORS)
    assert use_small(64, 32768, 512, MULTIPROCESSORS)
    assert use_small(256, 2112, 7168, MULTIPROCESSORS)  # half a round
    assert not use_small(256, 4096, 7168, MULTIPROCESSORS)
    assert not use_small(256, 7168, 2048, MULTIPROCESSORS)
    assert not use_small(257, 2112, 7168, MULTIPROCESSORS)


@pytest.mark.parametrize("config", [SmallConfig(64, 32, 4, 2), SmallConfig(64, 128, 2, 1)], ids=str)
def test_halves_compile_without_spills(config):
    options = hopper_small.options_of(config, 0, 0, 0, half=1)
    report = compile_cuda(hopper_small.SOURCE, options, 0)
    assert_clean([report], max_registers=96)
    assert report.count("HGMMA") >= 4, report
    assert report.count("UTMALDG") == 4, report  # before the loop and in it: B, A


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 130, 8),  # the least it takes
        (9, 576, 7168),
        (33, 131, 104),  # rows of C that cannot be written in 16 bytes, a last block of K cut short
        (64, 32768, 512),  # several tiles for a CTA
        (83, 2112, 3872),
        (129, 576, 512),  # one row past the tokens of a tile
    ],
)
def test_halves(sm_90, m, n, k, dtype):
    torch.manual_seed(0)
    a, b = (torch.randn(rows, k + 8, device="cuda").to(dtype)[:, :k] for rows in (m, n))
    room = torch.full((m + 2, n), float("nan"), device="cuda", dtype=dtype)
    assert hopper_small.takes_half(a, b)
    hopper_small.half_gemm(a, b, room[1:-1])
    want = a.double() @ b.double().T
    assert ((room[1:-1].double() - want).abs() <= want.abs() * 2.0**-8 + k**0.5 * 2.0**-16).all()
    assert room[[0, -1]].isnan().all()
    again = torch.empty_like(room[1:-1])
    hopper_small.half_gemm(a, b, again)
    assert torch.equal(again, room[1:-1])
