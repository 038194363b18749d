"""The Hopper GEMM in CUDA C++: compiled here, run on the GPU against the reference."""

import functools

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.gemm import hopper
from dskernels.gemm.config import HOPPER_CONFIGS, choose_hopper_config
from dskernels.parity.inputs import quantized, spread

# (b_rows, out, bias, direct, accumulate): every value of each, and the combinations with the most registers.
KINDS = [
    *((128, 0, 0, 0, 0), (128, 1, 3, 0, 0), (128, 2, 1, 0, 0), (128, 2, 2, 0, 1), (128, 0, 3, 1, 1)),
    *((1, 2, 0, 0, 0), (1, 2, 0, 0, 1), (1, 0, 3, 0, 0), (1, 0, 0, 1, 1), (1, 2, 2, 1, 1)),
]
CONFIGS = [(b_rows, config) for b_rows, configs in HOPPER_CONFIGS.items() for config in configs]


@pytest.mark.parametrize(("b_rows", "config"), CONFIGS, ids=lambda x: str(getattr(x, "tile", x)))
def test_compiles_without_spills(b_rows, config):
    # The largest tile in every kind, the others in the plainest and the fullest.
    kinds = [kind for kind in KINDS if kind[0] == b_rows]
    kinds = kinds if config == HOPPER_CONFIGS[b_rows][0] else [kinds[0], kinds[-1]]
    reports = [
        compile_cuda(
            hopper.SOURCE,
            hopper.options_of(config, b_rows, out, bias, accumulate, direct),
            hopper.shared_bytes(config, b_rows, bool(direct)),
        )
        for _, out, bias, direct, accumulate in kinds
    ]
    # 384 threads enter with 168 registers; setmaxnreg then moves them from the loading warpgroup to the other two.
    assert_clean(reports, max_registers=168)
    # Products in the code: a tile's first, and those of the loop over K, unrolled and then once more for the rest.
    products = 1 + config.waves * (config.unroll + (config.unroll > 1))
    for (_, _, bias, *_), report in zip(kinds, reports, strict=True):
        # Four to a product, all of a block of K in a row: more waiting than products means that ptxas serialised them.
        assert report.count("QGMMA") % 4 == 0
        assert 4 * products <= report.count("QGMMA") <= 4 * (products + bool(bias))  # a bias has one started again
        assert report.count("WARPGROUP.DEPBAR") <= report.count("QGMMA") // 4 + 1
        assert report.count("UTMALDG") >= 3
        assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


def test_choice():
    def tile(m, n, k, b_rows=128):
        config = choose_hopper_config(m, n, k, b_rows, 132)
        return config.block_m, config.block_n

    assert tile(4096, 4096, 7168) == (256, 128)
    assert tile(4096, 2112, 7168) == (128, 192)  # 3 rounds of tiles either way, and these are smaller
    assert tile(512, 4096, 7168) == (128, 128)
    assert tile(300, 7168, 16384) == (128, 192)  # 114 tiles, in one round
    assert tile(1280, 8192, 4096) == (128, 128)  # 640 tiles are five rounds, 430 of 128x192 are four
    assert tile(300, 32768, 512) == (128, 128)  # C is most of what moves
    assert tile(384, 2112, 7168) == (128, 64)  # one round of 99 tiles, not of 51
    assert tile(7168, 4096, 4096, b_rows=1) == (256, 128)


def test_what_it_does_not_take():
    def reason(m, n, k, **change):
        a, b = quantized(0, m, k, (1, 128), "cpu"), quantized(1, n, k, (128, 128), "cpu")
        arguments = {"a": a.data, "a_scale": a.scale, "b": b.data, "b_scale": b.scale, "b_rows": 128, "bias": None}
        return hopper.fp8_gemm_supports(**(arguments | {"out": torch.empty(m, n), "accumulate": False} | change))

    assert "takes B in 128x128 blocks only, and there are 8 rows" in reason(8, 128, 128, b_rows=1)
    assert "the rows of a must be aligned to 16 bytes, K = 300" in reason(64, 128, 300)
    assert "nothing to multiply" in reason(64, 0, 128)


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (33, 136, 16),  # less than a tile, with a K shorter than a scale
        (129, 576, 512),  # one row past a tile, N not a multiple of the block
        (300, 131, 208),  # rows of C that the accelerator cannot address
        (1000, 2112, 2048),  # every kind of tile more than once, a last pair of CTAs with half its work
        (4100, 4200, 400),  # more tiles than multiprocessors: the ring and C's buffers are used again
    ],
)
@pytest.mark.parametrize(("b_rows", "config"), CONFIGS, ids=lambda x: str(getattr(x, "tile", x)))
def test_every_epilogue(device, b_rows, config, m, n, k):
    launch = Planned(functools.partial(hopper.plan, config))
    a, b = quantized(0, m, k, (1, 128), device), quantized(1, n, k, (b_rows, 128), device)
    for dtype, bias_dtype, accumulate in [
        *((BRAIN, None, False), (HALF, SINGLE, False), (SINGLE, BRAIN, False), (SINGLE, None, False)),
        *((BRAIN, HALF, True), (HALF, None, True), (SINGLE, HALF, True), (SINGLE, None, True)),
    ]:
        bias = None if bias_dtype is None else torch.randn(n, device=device).to(bias_dtype)
        out = (
            torch.randn(m, n, device=device).to(dtype)
            if accumulate
            else torch.full((m, n), torch.nan, dtype=dtype, device=device)
        )
        want = ds.reference.fp8_gemm(a, b, bias=bias, out=out.float(), accumulate=accumulate)
        launch(a.data, a.scale, b.data, b.scale, b_rows, bias, out, accumulate)
        tolerance = 5e-6 if dtype == torch.bfloat16 else 1e-6 if dtype == torch.float16 else parity.E4M3_SUMS
        kept = want.abs() < 6e4 if dtype == torch.float16 else slice(None)  # `spread` data may be beyond fp16's range
        assert parity.difference(out[kept], want[kept]) < tolerance, (dtype, bias_dtype, accumulate)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [5, 300])
def test_scales_of_one_column_of_any_stride(device, m):
    a, b = quantized(0, m, 128, (1, 128), device), quantized(1, 576, 128, (128, 128), device)
    want = ds.fp8_gemm(a, b, impl="hopper")
    plain = a._replace(scale=a.scale.clone(memory_format=torch.contiguous_format))
    assert torch.equal(ds.fp8_gemm(plain, b, impl="hopper"), want)


@pytest.mark.gpu
def test_bits_repeat_and_nothing_else_is_written(device):
    a, b = quantized(0, 700, 1024, (1, 128), device), quantized(1, 576, 1024, (128, 128), device)
    whole = torch.full((704, 640), 3.0, device=device, dtype=torch.bfloat16)
    first = ds.fp8_gemm(a, b, out=whole[2:702, 32:608], impl="hopper").clone()
    for _ in range(10):
        assert torch.equal(ds.fp8_gemm(a, b, impl="hopper"), first)
    whole[2:702, 32:608] = 3.0
    assert (whole == 3).all()


@pytest.mark.gpu
def test_captured_in_a_graph(device):
    x, w = spread(0, 256, 512).to(device), spread(1, 576, 512).to(device)
    a, b = ds.quantize(x), ds.quantize(w, (128, 128))
    out = ds.fp8_gemm(a, b, impl="hopper")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ds.fp8_gemm(a, b, impl="hopper")
    captured.fill_(torch.nan)
    graph.replay()
    assert torch.equal(captured, out)
