"""How benchmarks time, and the tables and files that a run leaves behind."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import __main__ as cli
from benchmarks import results, roofline, timing, workloads
from benchmarks.results import Failure, Machine, Row
from benchmarks.roofline import Roofs, Work
from benchmarks.timing import Times

ROOFS = Roofs(copy_gbs=3000.0, bf16_tflops=700.0, fp8_tflops=1400.0)
MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "3.6.0", "13.0", "abc123")

# ---- timing ------------------------------------------------------------------------------------------------------


def test_quantiles():
    times = Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.us, times.p20, times.p80) == (3.5, 2.0, 5.0)
    assert times.drift == 2.0  # 4.0 in the second half, 2.0 in the first
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
    assert (order.count("fast"), order.count("slow"), order.count("slower")) == (20, 10, 5)
    assert "slow fast" in (text := " ".join(order))  # a backward round
    assert "fast slow" in text


def test_what_is_made_ready_before_a_run_is_not_timed_and_runs_are_as_many_as_asked(monkeypatch):
    device = FakeDevice()
    monkeypatch.setattr(timing, "torch", device)
    ready, call = device.kernel("ready", 5e5), device.kernel("slow", 30_000.0)
    prepared = timing.Prepared(ready, call, runs=7)
    times = timing.Stopwatch(seconds=0.01).time({"ours": prepared, "peer": device.kernel("peer", 30_000.0)})
    assert times["ours"] == Times(3e4, 3e4, 3e4)
    timed = device.log[max(i for i, what in enumerate(device.log[:-1]) if what == "synchronize") + 1 : -1]
    assert timed.count("peer") == 5
    assert [timed[i - 4 : i] for i, what in enumerate(timed) if what == "slow"] == [
        ["ready", "flush", "spin", "record"]
    ] * 7


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
    stamp = {"gpu", "driver", "torch", "triton", "cuda", "commit", "python", "cupy", "host", "power_limit_w"}
    assert set(saved) == {*stamp, "date", "roofs", "rows"}
    assert saved["roofs"] == {"copy_gbs": 3000.0, "bf16_tflops": 700.0, "fp8_tflops": 1400.0}
    row, memory_bound = saved["rows"]
    keys = ["op", "workload", "impl", "us", "p20", "p80", "tflops", "gbs", "roof_pct", "peers", "vs_best_peer"]
    assert list(row) == [*keys, "drift"]
    assert row["peers"] == {"torch": 200.0, "cublaslt": 107.4}
    assert (row["us"], row["tflops"], row["vs_best_peer"]) == (171.8, 700.0, 0.6251)
    assert memory_bound["tflops"] is None


def test_rounds_have_ratios_of_their_own():
    """A machine that slows down in the middle changes both, and not how far they are apart."""
    rounds = timing.ratios(Times.of([10.0, 20.0, 10.0, 20.0]), Times.of([13.0, 26.0, 12.0, 24.0]))
    assert rounds == pytest.approx((1.25, 1.2, 1.3))
    row = a_row(rounds=rounds)
    assert row.vs_best_peer == row.vs_rival == rounds[0]  # in every table and sentence
    assert row.times_as_fast("torch") == pytest.approx(200 / 171.8)
    assert row.to_json()["rounds"] == [1.25, 1.2, 1.3]
    assert "rounds" not in a_row().to_json()


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
