"""Decode over rows of e4m3 by hopper_rows.cu: what it is chosen for and compiles to; on the GPU, against fp64."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.cuda.driver import Planned
from dskernels.device import multiprocessors
from dskernels.mla.decode import hopper, hopper_rows
from dskernels.mla.decode.config import choose_rows_config, rows_shared, use_rows
from dskernels.parity.paging import paged_cache
from test_mla_decode import check_decode, close, oracle

SCALE = 576**-0.5


def test_choice():
    assert [use_rows(rows) for rows in (1, 16, 32, 33, 64, 128)] == [True, True, True, False, False, False]
    for rows in (1, 8, 16, 17, 32):
        config = choose_rows_config(rows)
        assert config.width >= rows
        assert rows_shared(config.width, config.units) <= 232448
        # Two blocks are worked on at a time, while the next rows arrive.
        assert config.units >= 2 * 4 + 4
        assert config.registers % 8 == 0
        assert 504 - 2 * config.registers >= 24


@pytest.mark.parametrize("rows", [16, 32])
def test_compiles_without_spills(rows):
    config = choose_rows_config(rows)
    shared = rows_shared(config.width, config.units)
    reports = [compile_cuda(hopper_rows.SOURCE, hopper_rows.options_of(config, out), shared) for out in (0, 1)]
    assert_clean(reports, max_registers=168)
    for report in reports:
        assert report.count("HGMMA") == 36 + 16  # of scores, and of the values of a block
        assert report.count("F2FP.F16.E4M3") == 128 + 64


# ---- on the GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 3, 8, 9, 16, 32])
@pytest.mark.parametrize("q_tokens", [1, 2, 4])
@pytest.mark.parametrize(("batch", "context"), [(1, 20), (2, 4096), (6, 140), (64, 1000)])
def test_model_shapes(device, batch, context, q_tokens, heads):
    generator = torch.Generator().manual_seed(batch * context)
    lengths = torch.randint(1, context + 1, (batch,), generator=generator).tolist()
    if batch > 2:
        lengths[::4] = [0] * len(lengths[::4])
    check_decode(device, "hopper", lengths, q_tokens, heads, 64, (512, 64), torch.bfloat16, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page_size", [1, 3, 16, 24, 64, 128])
def test_any_page_size(device, page_size, dtype):
    lengths, new = [300, 1, 129, 2, 64], [3, 2, 0, 3, 1]
    check_decode(device, "hopper", lengths, 3, 5, page_size, (512, 64), dtype, True, new)
    check_decode(device, "hopper", lengths, 3, 10, page_size, (512, 64), dtype, True, new)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [-(10**6), 10**6])
def test_cut_and_whole(device, whole):
    """The same batch with requests cut wherever a share ends, and with none cut; by the kernel for more rows."""
    q = (torch.randn(6, 1, 16, 576, device=device) * 8).bfloat16()
    cache, block_table, lengths = paged_cache(
        0, [700, 30, 0, 64, 2000, 129], 64, 512, 64, torch.uint8, device, scale=0.1
    )
    out = q.new_full((6, 1, 16, 512), math.nan)
    lse = q.new_full((6, 16, 1), math.nan, dtype=torch.float32)
    work = q.new_full((hopper.work_size(q),), math.nan, dtype=torch.float32)

    def prepare(q, cache, block_table, lengths, q_lengths, out, lse, work, scale):
        config = replace(choose_rows_config(32), whole=whole)
        arguments = (q, cache, block_table, lengths, q_lengths, out, lse, work, scale)
        return hopper_rows.plan(config, *arguments, row_blocks=1, parts=multiprocessors(q.device))

    Planned(prepare)(q, cache, block_table, lengths, None, out, lse, work, SCALE)
    hopper.combine(work, out, lse)
    want = oracle(q, cache, block_table, lengths, impl="hopper", scale=SCALE, value_dim=512)
    close((out, lse), want, q.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [16, 32])
@pytest.mark.parametrize("powers", [0, 3, 6])
def test_scales_of_any_size(device, heads, powers):
    """Scales that differ by powers of ten, in a row and from row to row, some 0 and negative; scores of any size."""
    cache, table, lengths = paged_cache(0, [900, 300], 64, 512, 64, torch.uint8, device, scale=0.1)
    generator = torch.Generator().manual_seed(powers)
    shape = (cache.shape[0] * 64, 4)
    factor = 10.0 ** torch.randint(-powers, 1, shape, generator=generator)
    factor *= torch.rand(shape, generator=generator) > 0.1
    factor *= torch.where(torch.rand(shape, generator=generator) > 0.5, 1, -1)
    rows = cache.view(-1, 656)
    scales = rows[:, 512:528].contiguous().view(torch.float32) * factor.to(device)
    rows[:, 512:528] = scales.view(torch.uint8)
    q = (torch.randn(2, 1, heads, 576, device=device) * 8).bfloat16()
    got = ds.mla_decode(q, cache, table, lengths, scale=0.3, impl="hopper")
    close(got, oracle(q, cache, table, lengths, impl="hopper", scale=0.3, value_dim=512), q.dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_scores_that_grow_along_the_request(device, scale):
    """So that sums are scaled to new maxima again and again, of weights and of scales."""
    cache, table, lengths = paged_cache(0, [1500], 64, 512, 64, torch.uint8, device)
    rows = cache.view(-1, 656)
    grow = torch.empty(len(cache), 64, device=device).fill_(1.0)
    grow[table[0, :24].long()] = torch.linspace(0.01, 3, 24 * 64, device=device).view(24, 64)
    scales = rows[:, 512:528].contiguous().view(torch.float32) * grow.view(-1, 1)
    rows[:, 512:528] = scales.view(torch.uint8)
    q = torch.randn(1, 1, 16, 576, device=device).bfloat16()
    got = ds.mla_decode(q, cache, table, lengths, scale=scale * SCALE, impl="hopper")
    want = oracle(q, cache, table, lengths, impl="hopper", scale=scale * SCALE, value_dim=512)
    assert ds.parity.difference(got[0], want[0]) < 5e-6
    torch.testing.assert_close(got[1].double(), want[1], rtol=8.01 / 65536, atol=1e-6)


@pytest.mark.gpu
def test_bits_repeat(device):
    q = torch.randn(9, 1, 16, 576, device=device).bfloat16()
    cache = paged_cache(0, [4000, 1, 0, 900, 65, 64, 63, 20_000, 7], 64, 512, 64, torch.uint8, device, scale=0.1)
    call = functools.partial(ds.mla_decode, q, *cache, scale=SCALE, impl="hopper")
    first = [x.clone() for x in call()]
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
