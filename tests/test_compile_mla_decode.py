"""Decode over the latent cache in CUDA C++, compiled for sm_90a without a GPU."""

import pytest

from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.mla.decode import hopper
from dskernels.mla.decode.config import SHARED, choose_hopper_config

# Query rows, page size, e4m3: every loader, whole boxes and parts of them, in clusters and not.
CHOICES = [(128, 64, False), (64, 8, False), (128, 1, False), (64, 64, True)]


@pytest.mark.parametrize(("rows", "page_size", "fp8"), CHOICES)
def test_compiles_without_spills(rows, page_size, fp8):
    config = choose_hopper_config(rows, page_size, fp8)
    # fp16 differs in a letter of its instructions: once is enough.
    dtypes = (0, 1) if (rows, page_size, fp8) == CHOICES[0] else (0,)
    reports = [compile_cuda(hopper.SOURCE, hopper.options_of(config, out), SHARED) for out in dtypes]
    # 384 threads enter with 168 registers; setmaxnreg then moves them from the loading warpgroup to the other two.
    assert_clean(reports, max_registers=168)
    for report in reports:
        # 36 products for the scores of each of two blocks; four for the sums of a block, which warpgroup 0 adds in two
        # places and warpgroup 1 in three.
        assert report.count("HGMMA") == 2 * 36 + 5 * 4
        # One wait for each: more would mean that ptxas serialised the products.
        assert report.count("WARPGROUP.DEPBAR") == 7
        if page_size == 64 and not fp8:
            assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])
def test_it_compiles_as_racecheck_follows_it(fp8):
    options = hopper.options_of(choose_hopper_config(128, 64, fp8), 0)
    report = compile_cuda(hopper.SOURCE, {**options, "RACECHECK": 1}, SHARED)
    assert (report.spills, report.stack) == (0, 0)
    assert report.count("BAR.ARV") == 0  # named barriers are barriers in shared memory


def test_combination_compiles_without_spills():
    options = [{"OUT": out, "WIDE": wide} for out in (0, 1) for wide in (1, hopper.COMBINE_WARPS)]
    assert_clean([compile_cuda(hopper.COMBINE, each, 0) for each in options], max_registers=255)
