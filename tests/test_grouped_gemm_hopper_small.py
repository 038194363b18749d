"""The grouped e4m3 products for groups of few rows: what NVRTC makes of them, here; what they compute, on a GPU."""

import pytest
import torch
from torch import Tensor

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels import parity
from dskernels.cuda.driver import Plan, Planned
from dskernels.fp8.layout import empty_scale
from dskernels.gemm.config import SHARED_OF_MULTIPROCESSOR, SHARED_RESERVED, SmallConfig
from dskernels.grouped_gemm import hopper_small
from dskernels.grouped_gemm.config_small import (
    choose_contiguous_config,
    choose_masked_config,
    grid,
    shared_bytes,
    stages,
)
from dskernels.types import Fp8Tensor
from dskernels.validate import ceil_div

MULTIPROCESSORS = 132
CONFIGS = sorted({choose_masked_config(rows) for rows in range(1, 129)}, key=repr)
TOLERANCES = {torch.bfloat16: 5e-6, torch.float16: 1e-6, torch.float32: parity.E4M3_SUMS}


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
def test_compiles_without_spills(config):
    reports = []
    for out, masked in [(0, True), (1, False), (2, True), (0, False)]:
        reports.append(compile_cuda(hopper_small.SOURCE, hopper_small.options_of(config, out, masked=masked), 0))
    warps = ceil_div(config.resident * (2 * config.tile + 32), 128)
    assert_clean(reports, max_registers=min(16384 // 32 // warps, 255))
    for report in reports:
        assert report.count("QGMMA") >= 4
        assert report.count("UTMALDG") == 6  # before the loop and in it: B, A, scales


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("groups", [1, 32, 1024])
def test_memory(config, groups):
    depth = stages(config, groups)
    taken = config.resident * (shared_bytes(config, depth, groups) + SHARED_RESERVED)
    one_more = config.resident * (shared_bytes(config, depth + 1, groups) + SHARED_RESERVED)
    assert taken <= SHARED_OF_MULTIPROCESSOR < one_more
    assert depth >= 3


def test_choice():
    assert [config.tokens for config in CONFIGS] == [16, 32, 64, 8]
    assert choose_masked_config(17).tokens == 32
    assert choose_masked_config(1024).tokens == 64
    assert choose_contiguous_config(1024, 256).tokens == 8
    assert choose_contiguous_config(1, 1024).tokens == 8
    assert choose_contiguous_config(320, 10).tokens == 64


def test_grid_takes_every_division():
    config = SmallConfig(64, 16, split=1, resident=1)
    # At most one tile high: 3 groups with a row each and one with the rest of 20 make 5 of 16 tokens.
    assert grid(config, 20, 4, 64, MULTIPROCESSORS) == 5
    assert grid(config, 2, 1000, 131, MULTIPROCESSORS) == 6
    assert grid(config, 1024, 256, 4096, MULTIPROCESSORS) == MULTIPROCESSORS


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@Planned
def multiply(
    config: SmallConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor, out: Tensor
) -> Plan:
    return hopper_small.plan(config, a, a_scale, b, b_scale, offsets, out)


@Planned
def multiply_masked(
    config: SmallConfig, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, counts: Tensor, out: Tensor
) -> Plan:
    return hopper_small.plan_masked(config, a, a_scale, b, b_scale, counts, out)


class Case:
    """Operands of `rows` rows (of each group, if `masked`), `sizes` of `groups` groups, and an output full of NaN.

    The rows that belong to no group hold NaN, data and scales. Around the output lies a band that must stay as it is.
    """

    def __init__(self, device, sizes, rows, n, k, *, masked, dtype=torch.bfloat16, band=8, fill=True):
        self.masked, self.rows = masked, rows
        self.groups = len(sizes) if masked else len(sizes) - 1
        self.sizes = torch.tensor(sizes, dtype=torch.int32, device=device)
        total = self.groups * rows if masked else rows
        data = torch.randint(0, 256, (total, k), dtype=torch.uint8, device=device)
        weight = torch.randint(0, 256, (self.groups, n, k), dtype=torch.uint8, device=device)
        for x in (data, weight):
            x[(x & 0x7F) == 0x7F] = 0x30
        self.data = data
        self.scale = empty_scale(data, (total, ceil_div(k, 128)), (1, 128)).uniform_(0.5, 2)
        self.b = weight.view(torch.float8_e4m3fn)
        self.b_scale = torch.rand(self.groups, ceil_div(n, 128), ceil_div(k, 128), device=device) + 0.5
        if dtype == torch.float16:
            self.b_scale /= 256  # so that the sums, up to some millions, fit
        self.whole = torch.full((total + 4, n + 2 * band), torch.nan, dtype=dtype, device=device)
        self.out = self.whole[2:-2, band:-band]
        if fill:
            used = torch.zeros(total, dtype=torch.bool, device=device)
            for _, part in self.parts():
                used[part] = True
            self.data[~used] = 0x7F
            self.scale[~used] = torch.nan

    def parts(self):
        """Rows of each group, as the references read them."""
        if self.masked:
            counts = self.sizes.clamp(0, self.rows).tolist()
            return [(e, slice(e * self.rows, e * self.rows + count)) for e, count in enumerate(counts)]
        ends = self.sizes[1:].clamp(0, self.rows).cummax(0).values.tolist()
        return [(e, slice(begin, end)) for e, (begin, end) in enumerate(zip([0, *ends], ends, strict=False))]

    def launch(self, config=None):
        a, scale, out = self.data.view(torch.float8_e4m3fn), self.scale, self.out
        if self.masked:
            a, scale, out = (x.unflatten(0, (self.groups, self.rows)) for x in (a, scale, out))
        args = a, scale, self.b, self.b_scale, self.sizes, out
        if config is not None:
            (multiply_masked if self.masked else multiply)(config, *args)
        else:
            (hopper_small.grouped_gemm_masked if self.masked else hopper_small.grouped_gemm)(*args)

    def check(self):
        tolerance = TOLERANCES[self.out.dtype]
        a = Fp8Tensor(self.data.view(torch.float8_e4m3fn), self.scale)
        end = 0
        for e, rows in self.parts():
            end = max(end, rows.stop)
            if rows.stop == rows.start:
                continue
            part = Fp8Tensor(a.data[rows], a.scale[rows])
            want = (
                part.dequantize().double() @ Fp8Tensor(self.b[e], self.b_scale[e], (128, 128)).dequantize().double().T
            )
            assert parity.difference(self.out[rows], want) < tolerance, (e, rows)
        if not self.masked:
            assert (self.out[end:] == 0).all()
        around = self.whole.clone()
        around[2:-2, (self.whole.shape[1] - self.out.shape[1]) // 2 :][:, : self.out.shape[1]] = torch.nan
        assert around.isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_every_config(device, config, dtype):
    # Buffers and groups that begin at rows which are not multiples of 4; several tiles of tokens; the last block of K
    # and the last tile of N cut short.
    masked = Case(device, [70, 0, 3, 33, 64], 70, 200, 1040, masked=True, dtype=dtype)
    contiguous = Case(device, [0, 70, 70, 73, 120, 153], 170, 200, 1040, masked=False, dtype=dtype)
    for case in (masked, contiguous):
        case.launch(config)
        case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("counts", "rows", "n", "k"),
    [
        ([24, 0, 99, -5, 1, 17], 24, 576, 400),  # more than there is room for, and less than none
        ([5], 5, 576, 16),  # the least it takes
        ([3, 7, 0, 1, 2, 6], 7, 131, 400),  # rows of C that cannot be written in 16 bytes
        ([0] * 32, 8, 192, 256),
        ([200, 0, 3, 64, 65, 130] * 5 + [1, 199], 200, 320, 2048),  # buffers much higher than a tile
        ([0] * 255 + [8], 8, 192, 128),
        ([0, 0, 1, 4] * 256, 4, 131, 400),
    ],
)
def test_masked(device, counts, rows, n, k):
    case = Case(device, counts, rows, n, k, masked=True, band=8 if n % 8 == 0 else 5)
    case.launch()
    case.check()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("offsets", "rows", "n", "k"),
    [
        ([0, 7], 7, 576, 400),
        ([0, 64, 64, 64, 64, 64, 64], 64, 131, 16),  # all rows to the first, to the last group
        ([0, 0, 0, 0, 0, 0, 61], 64, 131, 400),
        ([3, -7, 9999, -(2**31), 5, 2**31 - 1, 60], 64, 576, 400),  # garbage
        ([9, 30, 20, 40, -1, 41, 3], 64, 576, 400),
        ([0] * 33, 40, 192, 256),
        (list(range(0, 1025, 4)), 1030, 192, 400),
        ([i * 9 // 10 for i in range(1025)], 925, 131, 400),
        ([0, 2], 2, 192, 7168),  # several rounds of 32 scales
    ],
)
def test_contiguous(device, offsets, rows, n, k):
    case = Case(device, offsets, rows, n, k, masked=False, band=8 if n % 8 == 0 else 5)
    case.launch()
    case.check()


@pytest.mark.gpu
def test_replayed_with_other_sizes(device):
    """A graph that was captured with some sizes computes any, and the same bits every time."""
    masked = Case(device, [24, 0, 9, 5, 1, 17], 24, 576, 2000, masked=True, fill=False)
    contiguous = Case(device, [0, 24, 24, 30, 31, 60, 80], 90, 576, 2000, masked=False, fill=False)
    others = {
        masked: ([0, 24, 3, 0, 0, 1], [0] * 6, [24] * 6),
        contiguous: ([0, 1, 2, 3, 4, 5, 6], [0] * 7, [0, 0, 0, 0, 0, 0, 80], [0, 5, 5, 5, 70, 3, 80]),
    }
    for case, all_sizes in others.items():
        case.launch()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.launch()
        for sizes in all_sizes:
            case.sizes.copy_(torch.tensor(sizes, dtype=torch.int32))
            case.out.fill_(torch.nan)
            graph.replay()
            case.check()
            first = case.out.clone()
            for _ in range(10):
                graph.replay()
                assert torch.equal(case.out.view(torch.int16), first.view(torch.int16))


@pytest.mark.gpu
def test_weights_of_more_than_2_to_the_31(device):
    case = Case(device, [0] * 77 + [3, 0, 2], 3, 4096, 7168, masked=True)
    case.launch()
    case.check()


@pytest.mark.gpu
def test_as_the_reference(device):
    a = ds.quantize(torch.randn(6 * 24, 400, device=device), impl="reference")
    a = Fp8Tensor(a.data.view(6, 24, 400), a.scale.unflatten(0, (6, 24)))
    b = ds.quantize(torch.randn(6, 576, 400, device=device), (128, 128), impl="reference")
    counts = torch.tensor([24, 0, 7, 1, 16, 9], dtype=torch.int32, device=device)
    out = torch.zeros(6, 24, 576, device=device)
    hopper_small.grouped_gemm_masked(*a[:2], *b[:2], counts, out)
    want = ds.reference.grouped_gemm_masked(a, b, counts, out_dtype=torch.float32)
    assert parity.difference(out, want) < parity.E4M3_SUMS
