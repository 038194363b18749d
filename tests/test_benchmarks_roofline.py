"""The sizes that benchmarks speak of, and what a job must at least do, against numbers worked by hand."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import roofline, workloads
from benchmarks.roofline import Roofs, Work

ROOT = Path(__file__).parent.parent
ROOFS = Roofs(copy_gbs=3000.0, bf16_tflops=700.0, fp8_tflops=1400.0)


@pytest.mark.parametrize(
    ("workload", "name"),
    [
        (workloads.Gemm(4096, 7168, 2048), "m4096_n7168_k2048"),
        (workloads.Decode(128, 4096), "b128_s4096_q1_h128"),
        (workloads.Decode(128, 4096, varied=True), "b128_s4096_q1_h128_varied"),
        (workloads.Route(8192), "t8192_e256_k8_g8"),
        (workloads.GroupedGemm(4, 8192, 4096, 7168), "g4_m8192_n4096_k7168"),
        (workloads.GroupedRows(8, 4096, 7168), "g8_m4096_n7168"),
        (workloads.Moe(2048), "t2048_e256_k8_h7168_i2048"),
        (workloads.Prefill(1, 8192), "b1_s8192_h128"),
        (workloads.ChunkedPrefill(4, 8192, 1024, h=16), "b4_s8192_q1024_h16"),
        (workloads.Rows(4096, 7168), "m4096_n7168"),
        (workloads.Tokens(128), "t128"),
        (workloads.Tokens(128, 16), "t128_h16"),
    ],
)
def test_a_workload_is_named_by_its_sizes(workload, name):
    assert workload.name == name


def test_workloads_import_without_torch():
    """Tests and tools read the shapes without paying for torch."""
    check = "import benchmarks.workloads, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=False).returncode == 0


def test_rows_of_groups_vary_by_30_percent_and_stay_the_same():
    w = workloads.GroupedGemm(32, 192, 4096, 7168)
    assert len(w.rows) == 32
    assert all(134 <= n <= 250 for n in w.rows)
    assert len(set(w.rows)) > 1
    assert w.rows == workloads.GroupedGemm(32, 192, 4096, 7168).rows
    assert max(w.rows) <= w.capacity


def test_varied_lengths_fit_their_context():
    w = workloads.Decode(64, 100, q=2, varied=True)
    assert all(2 <= n <= 100 for n in w.lengths)
    assert len(set(w.lengths)) > 1


def test_gemm_counts():
    work = roofline.gemm(workloads.Gemm(4096, 7168, 2048))
    assert work.flops == 120_259_084_288
    # a 8,388,608 + scales 4096 * 16 * 4; b 14,680,064 + scales 56 * 16 * 4; out 58,720,256
    assert work.bytes == 8_388_608 + 262_144 + 14_680_064 + 3_584 + 58_720_256
    assert work.unit == "fp8"


def test_gemm_counts_partial_tiles_whole_in_the_scales_only():
    assert roofline.gemm(workloads.Gemm(1, 576, 200)).bytes == (200 + 2 * 4) + (576 * 200 + 5 * 2 * 4) + 576 * 2


def test_decode_counts():
    work = roofline.decode(workloads.Decode(128, 4096))
    assert work.flops == 2 * 128 * 1088 * 128 * 4096
    # 128 * 4096 rows of 1,152 bytes; q 576 and out 512 in bf16, lse in fp32 for each of 128 * 128
    assert work.bytes == 603_979_776 + 16_384 * (1_152 + 1_024 + 4)
    # A kernel of 260 µs was published as 561 TFLOP/s and 2,459 GB/s.
    assert work.tflops(260) == pytest.approx(561, rel=0.002)
    assert work.gbs(260) == pytest.approx(2459, rel=0.002)


def test_decode_of_two_tokens_sees_one_position_less_with_the_first():
    one, two = (roofline.decode(workloads.Decode(1, 10, q=q, h=1)) for q in (1, 2))
    assert (one.flops, two.flops) == (2 * 1088 * 10, 2 * 1088 * (9 + 10))


def test_fp8_decode_reads_656_bytes_a_token():
    bf16, fp8 = (roofline.decode(workloads.Decode(1, 1000), row_bytes=n).bytes for n in (1152, 656))
    assert bf16 - fp8 == 1000 * (1152 - 656)


def test_prefill_counts_the_causal_half():
    w = workloads.Prefill(2, 3, h=1)
    assert roofline.prefill(w).flops == 2 * (192 + 128) * 2 * (1 + 2 + 3)
    assert roofline.prefill_backward(w).flops == 2 * (3 * 192 + 2 * 128) * 2 * (1 + 2 + 3)
    assert roofline.prefill(w).bytes == 6 * ((192 + 192 + 128 + 128) * 2 + 4)


def test_prefill_over_a_cache_counts_the_up_projection_and_the_visible_positions():
    work = roofline.prefill_cached(workloads.ChunkedPrefill(1, 300, 200, h=1))
    assert work.flops == 2 * 300 * 512 * 256 + 2 * 320 * sum(range(101, 301))
    absorbed = roofline.prefill_cached(workloads.ChunkedPrefill(1, 10, 2, h=1))  # which is less, of few new tokens
    assert absorbed.flops == 2 * 2 * 512 * 256 + 2 * (576 + 512) * (9 + 10)


def test_grouped_counts():
    w = workloads.GroupedGemm(2, 10, 128, 256)
    rows = sum(w.rows)
    assert roofline.grouped_gemm(w).flops == 2 * rows * 128 * 256
    assert roofline.grouped_gemm(w).bytes == rows * (256 + 8) + 2 * (128 * 256 + 8) + rows * 128 * 2
    assert roofline.grouped_gemm(w, fp8=False).bytes == 2 * (rows * 256 + 2 * 128 * 256 + rows * 128)
    tiles = math.ceil(rows / 128)
    padded = roofline.quantize_grouped(workloads.GroupedRows(2, 10, 256)).bytes  # each group of 10 in a tile of 128
    assert padded == rows * 256 * 2 + 256 * 256 + 256 * 2 * 4
    assert roofline.grouped_wgrad(w).bytes == rows * (128 + 256) + 4 * tiles * (128 + 256) + 2 * 128 * 256 * 4


def test_expert_block_reads_the_experts_that_somebody_chose():
    assert roofline.expected_experts(workloads.Moe(1)) == pytest.approx(8)
    assert roofline.expected_experts(workloads.Moe(128)) == pytest.approx(251.6, abs=0.1)
    work = roofline.fused_experts(workloads.Moe(128))
    assert work.flops == 6 * 128 * 8 * 7168 * 2048
    # 251.6 experts of 44 M weights in fp8: the published floor is 3.8 ms at 3 TB/s.
    assert ROOFS.floor_us(work) == pytest.approx(3700, rel=0.01)


@pytest.mark.parametrize(
    ("work", "n_bytes"),
    [
        (roofline.quantize(workloads.Rows(4, 256), (1, 128)), 4 * 256 * 3 + 4 * 2 * 4),
        (roofline.quantize(workloads.Rows(130, 256), (128, 128)), 130 * 256 * 3 + 2 * 2 * 4),
        (roofline.quantize_both(workloads.Rows(4, 256)), 4 * 256 * 4 + 4 * 2 * 4 + 256 * 4),
        (roofline.swiglu_quantize(workloads.Rows(4, 128)), 4 * 128 * 5 + 4 * 4),
        (roofline.rmsnorm_quantize(workloads.Rows(4, 128), residual=False), 4 * 128 * 3 + 256 + 16),
        (roofline.rmsnorm_quantize(workloads.Rows(4, 128), residual=True), 4 * 128 * 7 + 256 + 16),
        (roofline.route(workloads.Route(10)), 10 * 256 * 4 + 256 * 8 + 10 * 8 * 8),
        (roofline.permute(workloads.Moe(10, e=4, k=2, h=128)), 3 * 10 * 128 * 2 + 2 * 10 * 2 * 4 + 5 * 4),
        (roofline.combine(workloads.Moe(10, e=4, k=2, h=128)), 3 * 10 * 128 * 2 + 10 * 2 * 8),
        (roofline.write_cache(workloads.Tokens(10)), 10 * (1152 + 256 + 8 + 1152) + 1024),
        (roofline.decode_queries(workloads.Tokens(10, 2)), 2 * 128 * 512 * 2 + 10 * (2 * (192 + 576) * 2 + 256)),
        (roofline.merge_states(workloads.Tokens(10, 2)), 3 * 20 * (256 + 4)),
        (roofline.values_quantize(workloads.Tokens(10, 2)), 2 * 128 * 512 * 2 + 20 * (512 * 2 + 128 + 4)),
        (roofline.cross_entropy(workloads.Rows(10, 30)), 10 * 60 + 10 * 12),
        (roofline.cross_entropy_backward(workloads.Rows(10, 30)), 2 * 10 * 60 + 10 * 16),
    ],
)
def test_memory_bound_counts(work, n_bytes):
    assert work.bytes == n_bytes
    assert work.flops is None
    assert work.tflops(1.0) is None


def test_the_roof_is_that_of_the_slower_resource():
    assert ROOFS.floor_us(Work(None, 3_000_000)) == pytest.approx(1.0)
    assert ROOFS.floor_us(Work(7_000_000_000, 3_000_000, "bf16")) == pytest.approx(10.0)
    assert ROOFS.floor_us(Work(7_000_000_000, 3_000_000, "fp8")) == pytest.approx(5.0)
    assert ROOFS.floor_us(Work(7_000_000, 3_000_000, "bf16")) == pytest.approx(1.0)


def test_where_there_is_no_fp8_the_roof_is_bf16():
    roofs = dataclasses.replace(ROOFS, fp8_tflops=None)
    assert roofs.floor_us(Work(7_000_000_000, 0, "fp8")) == pytest.approx(10.0)
