"""The benchmark suite: its arithmetic against numbers worked by hand, and every case at a size that a CPU can do."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import __main__ as cli
from benchmarks import cases, peers, results, roofline, runner, timing, workloads
from benchmarks.bench_gemm import Fp8Gemm
from benchmarks.bench_mla import MergeStates
from benchmarks.cases import calc_diff, difference
from benchmarks.peers import Peer
from benchmarks.peers.gemm import padded_rows
from benchmarks.results import Failure, Machine, Row
from benchmarks.roofline import Roofs, Work
from benchmarks.timing import Times
from dskernels import Fp8Tensor

ROOT = Path(__file__).parent.parent
ROOFS = Roofs(copy_gbs=3000.0, bf16_tflops=700.0, fp8_tflops=1400.0)
MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "3.6.0", "13.0", "abc123")
EVERY = cli.select(cli.FAMILIES, [])

# What each size is cut down to: a few tiles of every kind, the last one ragged, and no two sizes alike.
SMALL = {
    "Rows": {"m": 5, "n": 264},
    "Gemm": {"m": 5, "n": 136, "k": 256},
    "GroupedGemm": {"g": 3, "m": 6, "n": 136, "k": 256},
    "GroupedRows": {"g": 3, "m": 6, "n": 136},
    "Route": {"t": 12, "e": 16, "k": 4},
    "Moe": {"t": 9, "e": 4, "k": 2, "h": 256, "i": 128},
    "Decode": {"b": 3, "s": 70, "h": 3},
    "Prefill": {"b": 2, "s": 33, "h": 3},
    "ChunkedPrefill": {"b": 2, "s": 70, "q": 5, "h": 3},
    "Tokens": {"t": 9, "h": 3},
}


def shrunk(case):
    limits = SMALL[type(case.workload).__name__]
    sizes = {name: min(getattr(case.workload, name), limit) for name, limit in limits.items()}
    return dataclasses.replace(case, workload=dataclasses.replace(case.workload, **sizes))


def run_at_once(rivals):
    """Stand in for the stopwatch: call everything, and let each take ten microseconds."""
    for call in rivals.values():
        call()
    return {name: Times(10.0, 9.0, 11.0) for name in rivals}


def a_runner(time=run_at_once, **options):
    return runner.Runner(torch.device("cpu"), time, ROOFS, **options)


def one_of_each():
    """The cases that still differ once they are small."""
    found = {}
    for family, listed in EVERY.items():
        for case in listed:
            small = shrunk(case)
            found.setdefault((family, small.title), small)
    return [pytest.param(case, id=f"{family}-{case.title}") for (family, _), case in found.items()]


# ---- workloads and formulas --------------------------------------------------------------------------------------


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


def test_no_case_is_listed_twice():
    titles = [(family, case.title) for family, cases in EVERY.items() for case in cases]
    assert len(titles) == len(set(titles))


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
    work = roofline.prefill_cached(workloads.ChunkedPrefill(1, 10, 2, h=1))
    assert work.flops == 2 * 10 * 512 * 256 + 2 * 320 * (9 + 10)


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
        (roofline.merge_states(workloads.Tokens(10, 2)), 3 * 20 * (256 + 4)),
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


# ---- timing ------------------------------------------------------------------------------------------------------


def test_quantiles():
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.us, times.p20, times.p80) == (3.5, 2.0, 5.0)
    assert Times.of([7.0]) == Times(7.0, 7.0, 7.0)


def test_rivals_take_turns_in_both_orders():
    rounds = timing.schedule({"ours": 4, "peer": 4})
    assert rounds == [["ours", "peer"], ["peer", "ours"]] * 2


def test_slow_rivals_take_part_in_fewer_rounds_evenly_spread():
    rounds = timing.schedule({"fast": 100, "slow": 5})
    taking_part = [i for i, names in enumerate(rounds) if "slow" in names]
    assert sum("fast" in names for names in rounds) == 100
    assert taking_part == [19, 39, 59, 79, 99]
    assert timing.schedule({}) == []


class FakeDevice:
    """A device whose clock a test moves, in place of `torch` in `benchmarks.timing`; it logs what was asked of it."""

    uint8 = torch.uint8

    def __init__(self):
        self.now_us, self.log, self.cuda = 0.0, [], self
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                device.log.append("record")
                self.at_us = device.now_us

            def elapsed_time(self, end):
                return (end.at_us - self.at_us) / 1e3

        self.Event = Event

    def empty(self, size, dtype, device):
        assert size >= 50 << 20  # larger than the L2
        return self

    def zero_(self):
        self.log.append("flush")
        self.now_us += 70

    def _sleep(self, cycles):
        self.log.append("spin")
        self.now_us += 1

    def current_device(self):
        return 0

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=50 << 20)

    def synchronize(self):
        self.log.append("synchronize")

    def kernel(self, name, us):
        def call():
            self.log.append(name)
            self.now_us += us

        return call


def test_stopwatch_flushes_and_spins_before_every_run_and_times_the_call_alone(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(timing, "torch", device)
    times = timing.Stopwatch(seconds=0.3, most=20).time(
        {
            "fast": device.kernel("fast", 10.0),
            "slow": device.kernel("slow", 30_000.0),
            "slower": device.kernel("slower", 2e5),
        }
    )
    assert times == {"fast": Times(10.0, 10.0, 10.0), "slow": Times(3e4, 3e4, 3e4), "slower": Times(2e5, 2e5, 2e5)}
    timed = device.log[max(i for i, what in enumerate(device.log[:-1]) if what == "synchronize") + 1 : -1]
    runs = [timed[i : i + 5] for i in range(0, len(timed), 5)]
    assert all(run[:3] == ["flush", "spin", "record"] and run[4] == "record" for run in runs)
    order = [run[3] for run in runs]
    assert (order.count("fast"), order.count("slow"), order.count("slower")) == (20, 10, 3)
    assert "slow fast" in (text := " ".join(order))  # a backward round
    assert "fast slow" in text


@pytest.mark.gpu
def test_stopwatch_tells_a_long_spin_from_a_short_one():
    """A spin of n cycles takes at least n / 2 GHz, and twice the cycles twice the time."""
    stopwatch = timing.Stopwatch(seconds=0.02)
    times = stopwatch.time({"short": lambda: torch.cuda._sleep(200_000), "long": lambda: torch.cuda._sleep(400_000)})
    assert times["short"].us > 100
    assert times["long"].us == pytest.approx(2 * times["short"].us, rel=0.2)


# ---- results -----------------------------------------------------------------------------------------------------


def a_row(**changes):
    row = {
        "op": "fp8_gemm",
        "workload": "m4096_n7168_k2048",
        "impl": "triton",
        "times": Times(171.8, 170.0, 175.0),
        "work": roofline.gemm(workloads.Gemm(4096, 7168, 2048)),
        "roofs": ROOFS,
        "peers": {"torch": 200.0, "cublaslt": 107.4},
    }
    return Row.of(**{**row, **changes})


def test_row_rates():
    row = a_row()
    assert row.tflops == pytest.approx(700, rel=1e-3)  # 120.26 G in 171.8 µs
    assert row.gbs == pytest.approx(477.6, rel=1e-3)  # 82.05 MB
    assert row.roof_pct == pytest.approx(50, rel=1e-3)
    assert row.best_peer == "cublaslt"
    assert row.vs_best_peer == pytest.approx(107.4 / 171.8)


def test_row_without_peers():
    row = a_row(peers={})
    assert row.best_peer is None
    assert row.to_json()["vs_best_peer"] is None


def test_saved_file_has_the_schema(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    path = results.save("gemm", MACHINE, ROOFS, [a_row(), a_row(work=Work(None, 3_000_000))])
    assert path == tmp_path / "h100" / "gemm.json"
    saved = json.loads(path.read_text())
    assert set(saved) == {"gpu", "driver", "torch", "triton", "cuda", "commit", "date", "roofs", "rows"}
    assert saved["roofs"] == {"copy_gbs": 3000.0, "bf16_tflops": 700.0, "fp8_tflops": 1400.0}
    row, memory_bound = saved["rows"]
    keys = ["op", "workload", "impl", "us", "p20", "p80", "tflops", "gbs", "roof_pct", "peers", "vs_best_peer"]
    assert list(row) == keys
    assert row["peers"] == {"torch": 200.0, "cublaslt": 107.4}
    assert (row["us"], row["tflops"], row["vs_best_peer"]) == (171.8, 700.0, 0.6251)
    assert memory_bound["tflops"] is None


def test_host_cost_is_kept_only_where_it_was_measured():
    assert a_row(host_us=12.3).to_json()["host_us"] == 12.3
    assert "host_us" not in a_row().to_json()


@pytest.mark.parametrize(
    ("gpu", "folder"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100_mig"),
    ],
)
def test_folder_of_a_gpu(gpu, folder):
    assert dataclasses.replace(MACHINE, gpu=gpu).folder == folder


def rendered(table):
    console = Console(width=cli.TABLE_WIDTH, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table)
    return console.export_text()


def test_table_shows_rows_and_failures():
    failure = Failure("route", "t1_e256_k8_g8", "hopper", "ValueError: no")
    text = rendered(results.draw("gemm", [a_row(), a_row(peers={}, work=Work(None, 3_000_000)), failure]))
    head, good, alone, bad = (line for line in text.splitlines() if "│" in line or "┃" in line)
    for heading in ("op", "workload", "impl", "µs", "p20–p80", "TFLOP/s", "GB/s", "% roof", "× best peer"):
        assert heading in head
    assert "host" not in head
    for cell in (
        "fp8_gemm",
        "m4096_n7168_k2048",
        "triton",
        "171.8",
        "170.0–175.0",
        "700",
        "478",
        "50",
        "0.63 cublaslt",
    ):
        assert cell in good
    assert alone.count("–") == 3  # p20–p80, no TFLOP/s, no peer
    assert "t1_e256_k8_g8" in bad
    assert "failed" in bad


def test_table_shows_host_cost_when_asked():
    text = rendered(results.draw("gemm", [a_row(host_us=12.3), Failure("a", "b", "c", "d")], host=True))
    assert "host µs" in text
    assert "12.3" in text


# ---- what counts as right ----------------------------------------------------------------------------------------


def test_calc_diff_by_hand():
    x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    assert calc_diff(x, y) == pytest.approx(1 - 2 * 7 / 15)
    assert calc_diff(x, x) == 0
    assert calc_diff(torch.zeros(3), torch.zeros(3)) == 0
    assert calc_diff(torch.zeros(2), x) == 1
    assert calc_diff(torch.tensor([math.nan, 2.0]), x) == math.inf
    assert calc_diff(torch.tensor([-math.inf, 1.0]), torch.tensor([-math.inf, 1.0])) == 0
    assert calc_diff(torch.tensor([-math.inf, 1.0]), torch.tensor([0.0, 1.0])) == math.inf


def test_calc_diff_of_more_than_one_chunk(monkeypatch):
    x, y = torch.randn(2, 5, 7)
    whole = calc_diff(x, y)
    monkeypatch.setattr(cases, "CHUNK", 4)
    assert calc_diff(x, y) == pytest.approx(whole)
    assert whole == pytest.approx(1 - 2 * (x * y).sum().item() / (x * x + y * y).sum().item(), rel=1e-5)


def test_bytes_ids_and_shapes_must_be_equal():
    data = torch.tensor([[1.0, 2.0]]).to(torch.float8_e4m3fn)
    other = torch.tensor([[1.0, 2.25]]).to(torch.float8_e4m3fn)
    scale = torch.ones(1, 1)
    assert difference(Fp8Tensor(data, scale), Fp8Tensor(data, scale)) == 0
    assert difference(Fp8Tensor(data, scale), Fp8Tensor(other, scale)) == math.inf
    assert difference(torch.tensor([1, 2]), torch.tensor([1, 3])) == math.inf
    assert difference(torch.ones(2), torch.ones(3)) == math.inf
    assert difference((torch.ones(2), torch.tensor([1.0, 2.0])), (torch.ones(2), torch.tensor([1.0, 3.0]))) > 0.05


# ---- running cases -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", one_of_each())
def test_every_case_runs_small_and_agrees_with_its_peers(case):
    """Inputs, the call, the part that is checked, and the peers that torch alone has: none may be left out or fail."""
    outcome = a_runner().run(case)
    (row,) = outcome.results
    assert isinstance(row, Row), row
    assert row.impl == "reference"
    assert row.gbs > 0
    assert set(row.peers) <= set(peers.NAMES)
    needs_more = ("needs N % 128 == 0", "float8", "scaled_mm", "not supported", "CPU")
    assert all(any(text in note for text in needs_more) for note in outcome.notes), outcome.notes


class Broken(MergeStates):
    """A case whose kernel is wrong by one element in a hundred."""

    def ours(self, x, impl):
        call = super().ours(x, impl)
        if impl == "reference":
            return call

        def wrong():
            out, lse = call()
            out[0, 0, 0] += 100.0
            return out, lse

        return wrong


def test_a_wrong_result_is_reported_and_not_timed():
    timed = []
    (failure,) = a_runner(timed.append).run(Broken(workloads.Tokens(4, 2))).results
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("wrong result: calc_diff ")
    assert timed == []


class Raising(MergeStates):
    def ours(self, x, impl):
        if impl == "triton":
            raise ValueError("merge_states: it needs a GPU\nand more")
        return super().ours(x, impl)


def test_a_case_that_raises_leaves_the_others_alone():
    outcome = a_runner(impls=("triton", "reference")).run(Raising(workloads.Tokens(4, 2)))
    failure, row = outcome.results
    assert failure == Failure("merge_states", "t4_h2", "triton", "ValueError: merge_states: it needs a GPU")
    assert isinstance(row, Row)
    assert row.impl == "reference"


class BadInputs(MergeStates):
    def inputs(self, device):
        raise RuntimeError("CUDA out of memory")


def test_inputs_that_cannot_be_made_fail_the_case():
    outcome = a_runner(impls=("triton", "hopper")).run(BadInputs(workloads.Tokens(4, 2)))
    assert [f.impl for f in outcome.results] == ["triton", "hopper"]
    assert {f.reason for f in outcome.results} == {"RuntimeError: CUDA out of memory"}


class Rivals(MergeStates):
    def peers(self, x):
        def absent():
            raise peers.NotApplicable("needs a moon")

        def breaking():
            raise RuntimeError("boom")

        right = self.ours(x, "reference")
        return {
            "torch": lambda: Peer(lambda: (right(), "extra"), lambda out: out[0]),
            "cublaslt": absent,
            "grouped_mm": breaking,
            "torch_compile": lambda: Peer(lambda: (x.out_a, x.lse_a)),
            "deepgemm": lambda: pytest.fail("a missing peer was asked"),
        }


def test_peers_are_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(peers, "missing", lambda: {"deepgemm": "deep_gemm is not installed"})
    outcome = a_runner().run(Rivals(workloads.Tokens(4, 2)))
    assert outcome.results[0].peers == {"torch": 10.0}
    assert [note.removeprefix("merge_states t4_h2: ") for note in outcome.notes[:2]] == [
        "cublaslt left out, needs a moon",
        "grouped_mm left out, RuntimeError: boom",
    ]
    assert outcome.notes[2].startswith("merge_states t4_h2: torch_compile left out, wrong result")


def test_missing_peers_say_why():
    assert all(name in peers.NAMES and reason for name, reason in peers.missing().items())


def test_host_cost_is_measured_when_asked():
    (row,) = a_runner(host_cost=lambda call: 42.0).run(MergeStates(workloads.Tokens(4, 2))).results
    assert row.host_us == 42.0


def test_cublaslt_says_what_it_needs():
    x = Fp8Gemm(workloads.Gemm(4, 576, 256)).inputs(torch.device("cpu"))
    from benchmarks.peers.gemm import cublaslt

    with pytest.raises(peers.NotApplicable, match="N % 128"):
        cublaslt(x.a, x.b)


def test_padded_rows_keep_groups_apart():
    source, group = padded_rows((2, 0, 5), 4)
    assert source.tolist() == [0, 1, -1, -1, 2, 3, 4, 5, 6, -1, -1, -1]
    assert group.tolist() == [0, 0, -1, -1, 2, 2, 2, 2, 2, -1, -1, -1]


# ---- command line ------------------------------------------------------------------------------------------------


def invoke(*args):
    return CliRunner().invoke(cli.app, args)


def test_without_a_gpu_it_says_so_and_exits_0(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("fp8", "--save")
    assert result.exit_code == 0
    assert result.output.startswith("No GPU here")
    assert len(result.output.splitlines()) == 1


def test_list_names_every_case():
    result = invoke("--list")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) == sum(len(cases) for cases in EVERY.values())
    assert "mla_decode" in result.output
    assert "b128_s4096_q1_h128" in result.output


def test_filters_must_all_match():
    result = invoke("--list", "mla", "--filter", "mla_decode_fp8", "--filter", "h16")
    assert result.output.split() == ["mla", "mla_decode_fp8", "b128_s4096_q1_h16"]


def test_quick_takes_the_first_of_each_operation():
    cases = cli.select(["gemm"], [], quick=True)["gemm"]
    assert [case.op for case in cases] == ["fp8_gemm", "fp8_gemm_wgrad", "fp8_linear_training"]
    assert cases[0] == EVERY["gemm"][0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nope"], "no family nope"),
        (["--filter", "nope"], "no case matches"),
        (["--impl", "cuda"], "no implementation cuda"),
        (["--save", "--quick"], "--save keeps whole families"),
        (["--save", "--filter", "q"], "--save keeps whole families"),
    ],
)
def test_bad_arguments_are_one_error(args, message):
    result = invoke(*args)
    assert result.exit_code == 2
    assert message in result.output


@pytest.fixture
def gpu_stand_in(monkeypatch, tmp_path):
    """All of `measure` but the GPU: cases run small on the CPU, the stopwatch says ten microseconds."""

    class Stopwatch:
        def __init__(self, seconds):
            self.time = run_at_once

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Machine, "current", classmethod(lambda cls: MACHINE))
    monkeypatch.setattr(timing, "Stopwatch", Stopwatch)
    monkeypatch.setattr(roofline, "measure", lambda time: ROOFS)
    monkeypatch.setattr(cli, "DEVICE", "cpu")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    select = cli.select
    monkeypatch.setattr(
        cli, "select", lambda *a, **k: {f: [shrunk(c) for c in cases][:3] for f, cases in select(*a, **k).items()}
    )
    return tmp_path


def test_a_whole_run_prints_tables_and_saves(gpu_stand_in):
    result = invoke("fp8", "gemm", "--save", "--commit", "def456")
    assert result.exit_code == 0, result.output
    for text in ("NVIDIA H100 80GB HBM3", "roofs: copy 3,000 GB/s", "peers missing: ", "quantize", "fp8_gemm"):
        assert text in result.output
    for family in ("fp8", "gemm"):
        saved = json.loads((gpu_stand_in / "h100" / f"{family}.json").read_text())
        assert len(saved["rows"]) == 3
        assert saved["commit"] == "def456"


def test_a_failed_case_makes_the_run_fail_but_not_stop(gpu_stand_in, monkeypatch):
    monkeypatch.setattr(
        cli, "select", lambda *a, **k: {"mla": [Broken(workloads.Tokens(4, 2)), MergeStates(workloads.Tokens(5, 2))]}
    )
    result = invoke("mla")
    assert result.exit_code == 1
    assert "failed merge_states t4_h2 (auto): wrong result" in result.output
    assert "t5_h2" in result.output


@pytest.mark.gpu
def test_a_quick_run_on_the_gpu():
    result = invoke("mla", "--quick", "--filter", "merge_states", "--host")
    assert result.exit_code == 0, result.output
    assert "host µs" in result.output
