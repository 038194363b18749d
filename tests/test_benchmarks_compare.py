"""Results that were saved, beside others: comparing, the gate against losses, and another commit."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from benchmarks import __main__ as cli
from benchmarks import base, check, compare, saved, steadiness
from benchmarks.roofline import Roofs
from benchmarks.saved import SavedRow
from benchmarks.timing import Times

ROOT = Path(__file__).parent.parent
ROOFS = {"copy_gbs": 3000.0, "bf16_tflops": 700.0, "fp8_tflops": None}
STAMP = {"gpu": "NVIDIA H100", "torch": "2.11.0", "commit": "abc123", "date": "2026-01-02T03:04:05+00:00"}


def row(op="fp8_gemm", workload="m1", impl="hopper", us=100.0, roof_pct=50.0, peers=None):
    return SavedRow(op, workload, impl, us, us, us, None, 1.0, roof_pct, peers or {})


def write(folder, family, *rows, **stamp):
    folder.mkdir(parents=True, exist_ok=True)
    document = {**STAMP, **stamp, "roofs": ROOFS, "rows": [dataclasses.asdict(r) for r in rows]}
    (folder / f"{family}.json").write_text(json.dumps(document))


def invoke(*args):
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


# ---- reading -----------------------------------------------------------------------------------------------------


def test_every_committed_result_is_read():
    for gpu in saved.gpus():
        for family in saved.read(gpu).values():
            assert family.rows
            assert {"gpu", "driver", "torch", "triton", "cuda", "commit", "date"} <= set(family.stamp)


def test_a_place_is_a_gpu_a_folder_or_a_file(tmp_path):
    write(tmp_path / "h100", "gemm", row())
    assert saved.gpus(tmp_path) == ["h100"]
    for where in ("h100", str(tmp_path / "h100"), str(tmp_path / "h100" / "gemm.json")):
        assert saved.read(where, tmp_path)["gemm"].rows == (row(),)


@pytest.mark.parametrize("where", ["h999", "nowhere/at/all", "no-such-commit:h100", "HEAD:h999"])
def test_a_place_without_results_says_so(where):
    with pytest.raises(saved.NotThere):
        saved.read(where)


def test_a_file_that_is_something_else_says_so(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": []}')
    with pytest.raises(saved.NotThere, match="not a file of results"):
        saved.read(str(tmp_path))


def test_results_of_a_commit(tmp_path):
    def git(*args):
        subprocess.run(("git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *args), check=True)

    write(tmp_path / "h100", "gemm", row(us=100.0))
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "x")
    write(tmp_path / "h100", "gemm", row(us=90.0))
    assert saved.read("HEAD:h100", tmp_path)["gemm"].rows[0].us == 100.0
    assert saved.read("h100", tmp_path)["gemm"].rows[0].us == 90.0


# ---- comparing ---------------------------------------------------------------------------------------------------


def test_pairs_are_of_the_same_implementation_or_of_the_fastest(tmp_path):
    write(tmp_path / "a", "gemm", row(us=100), row(impl="triton", us=200), row("route", "t1", "triton", us=10))
    write(tmp_path / "b", "gemm", row(us=50), row("route", "t1", us=5), row("permute"))
    found = compare.pairs(*(saved.read(str(tmp_path / name)).values() for name in "ab"))
    assert [(p.a.op, p.a.impl, p.b.impl, p.speedup) for p in found] == [
        ("fp8_gemm", "hopper", "hopper", 2.0),
        ("route", "triton", "hopper", 2.0),
    ]


def test_a_family_is_compared_with_itself(tmp_path):
    write(tmp_path / "a", "gemm", row(us=100))
    write(tmp_path / "a", "scaling", row(us=90))
    write(tmp_path / "b", "gemm", row(us=50))
    write(tmp_path / "b", "scaling", row(us=30))
    a, b = (saved.read(str(tmp_path / name)) for name in "ab")
    assert [p.speedup for p in compare.pairs(a.values(), b.values())] == [2.0, 3.0]
    assert [p.speedup for p in compare.pairs(a.values(), [b["gemm"]])] == [2.0]  # a sweep has no other name


def test_compare_prints_ratios_and_their_mean(tmp_path):
    write(tmp_path / "a", "gemm", row(us=100), row(workload="m2", us=100, peers={"torch": 200.0}))
    write(tmp_path / "b", "gemm", row(us=50), row(workload="m2", us=200))
    result = invoke("--compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 0, result.output
    for text in ("2.000", "0.500", "geometric mean", "2 jobs, geometric mean 1.000", "commit abc123", "no fp8"):
        assert text in result.output
    assert "1 jobs" in invoke("--compare", tmp_path / "a", tmp_path / "b", "--filter", "m2").output


def test_compare_says_what_is_missing(tmp_path):
    write(tmp_path / "a", "gemm", row())
    write(tmp_path / "b", "gemm", row("other"))
    assert "no results at h999" in invoke("--compare", "h100", "h999").output
    result = invoke("--compare", tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 2
    assert "no job in common" in " ".join(result.output.split())


# ---- the gate ----------------------------------------------------------------------------------------------------


def judged(then, *repeats, **options):
    later = iter(repeats[1:])
    return check.judge(repeats[0], then, lambda: next(later), **options)


def test_a_loss_by_every_view_and_in_every_repetition_is_one():
    verdict = judged(row(), *[row(us=us, roof_pct=5000 / us) for us in (110, 107, 108)])
    assert verdict.fell
    assert verdict.ratio == pytest.approx(100 / 107)
    assert len(verdict.ratios) == check.REPEATS


def test_a_figure_within_the_margin_is_not_repeated():
    verdict = judged(row(), row(us=105, roof_pct=50 / 1.05))
    assert not verdict.fell
    assert len(verdict.ratios) == 1


def test_noise_that_does_not_come_again_is_not_a_loss():
    verdict = judged(row(), row(us=120, roof_pct=40), row(us=101, roof_pct=49))
    assert not verdict.fell
    assert len(verdict.ratios) == 2
    assert verdict.us == 101


def test_a_slower_machine_is_not_a_loss():
    """Its time is longer, and so are those of the roof and of the peer."""
    assert not judged(row(), row(us=120, roof_pct=50)).fell
    then = row(peers={"torch": 200.0})
    assert not judged(then, row(us=120, roof_pct=40, peers={"torch": 240.0})).fell
    slow = [row(us=120, roof_pct=40, peers={"torch": 240.0})] * 3
    assert judged(then, *slow, same_peers=False).fell  # another torch may have another kernel


def test_a_case_that_cannot_be_repeated_stays_fallen():
    assert judged(row(), row(us=120, roof_pct=40), None).fell


def test_the_figure_to_hold_is_the_fastest_unless_one_was_asked_for():
    rows = [row(us=100), row(impl="triton", us=200)]
    assert check.saved_figure(rows, None).us == 100
    assert check.saved_figure(rows, "triton").us == 200
    assert check.saved_figure(rows, "reference") is None


# ---- another commit ----------------------------------------------------------------------------------------------


in_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a checkout of the repository")


@in_git
def test_the_library_of_a_commit_beside_these_benchmarks():
    with base.checked_out("HEAD") as (name, place):
        assert len(name) == 40
        find = "import importlib.util as u; print(*(u.find_spec(n).origin for n in ('dskernels', 'benchmarks')))"
        out = subprocess.run((sys.executable, "-c", find), cwd=place, capture_output=True, text=True, check=True).stdout
        library, benchmarks = (Path(path) for path in out.split())
        assert library.parent == place / "dskernels"
        assert library.resolve().is_relative_to(place.parent / "tree")
        assert benchmarks.resolve().parent == ROOT / "benchmarks"
    assert not place.exists()
    listed = subprocess.run(("git", "-C", ROOT, "worktree", "list"), capture_output=True, text=True, check=True).stdout
    assert str(place.parent) not in listed


def test_the_library_of_another_folder(tmp_path):
    (tmp_path / "other" / "dskernels").mkdir(parents=True)
    (tmp_path / "other" / "dskernels" / "__init__.py").touch()
    with base.checked_out(str(tmp_path / "other")) as (name, place):
        assert name == "other"
        assert (place / "dskernels").resolve() == tmp_path / "other" / "dskernels"
    assert (tmp_path / "other" / "dskernels" / "__init__.py").exists()


@in_git
def test_commits_run_in_turns_and_are_compared(monkeypatch):
    turns, speed = [], iter((100.0, 50.0, 50.0, 102.0))

    def start(arguments, place, commit, out):
        turns.append(commit)
        assert arguments == ["gemm"]
        write(out / "h100", "gemm", row(us=next(speed)), row(workload="m2", us=100.0 + len(turns)))
        return "failed fp8_gemm m3 (auto): no\n"

    said = []
    found = base.beside("HEAD", ["gemm"], said.append, start)
    assert turns[0] == turns[3] != turns[1] == turns[2]
    fast, same = found
    assert fast.speedup == pytest.approx((100 * 102) ** 0.5 / 50)
    assert fast.noise == pytest.approx(0.02)
    assert (fast.says_something, same.says_something) == (True, False)
    assert sum("failed fp8_gemm m3" in line for line in said) == 4
    base.draw(found, "HEAD")


def test_a_commit_that_does_not_exist_says_so():
    with pytest.raises(base.Failed, match="no commit nope"):
        base.beside("nope", [], print)


def test_a_run_without_results_fails_with_its_last_words(tmp_path):
    with pytest.raises(base.Failed, match=r"No module named .*benchmarks"):
        base.run([], tmp_path, "abc", tmp_path / "out")


# ---- steadiness --------------------------------------------------------------------------------------------------


def test_warming_up_ends_when_the_time_settles():
    times = iter([100.0, 110.0, 115.0, 115.5, 116.0, 200.0])
    warm = steadiness.warm_up(lambda calls: {"product": Times(us := next(times), us, us)}, lambda: None)
    assert warm == steadiness.WarmUp(5, 100.0, 116.0)
    assert "5 turns" in str(warm)
    assert "+16.0%" in str(warm)


def test_warming_up_ends_anyway():
    times = iter(range(1, 100))
    warm = steadiness.warm_up(lambda calls: {"product": Times(us := next(times) * 10.0, us, us)}, lambda: None)
    assert warm.turns == steadiness.MOST_TURNS


def test_without_a_driver_nobody_knows_the_clock(monkeypatch):
    def absent(name):
        raise OSError

    monkeypatch.setattr(steadiness.ctypes, "CDLL", absent)
    assert steadiness._sm_clock("GPU-1") is None


def test_the_clock_is_what_the_driver_says(monkeypatch):
    def clock(device, kind, mhz):
        mhz._obj.value = 1755
        return 0

    driver = SimpleNamespace(
        nvmlInit_v2=lambda: 0,
        nvmlDeviceGetHandleByUUID=lambda uuid, device: 0 if uuid == b"GPU-1" else 6,
        nvmlDeviceGetClockInfo=clock,
    )
    monkeypatch.setattr(steadiness.ctypes, "CDLL", lambda name: driver)
    assert steadiness._sm_clock("GPU-1") == 1755
    assert steadiness._sm_clock("GPU-0") is None


def test_drift_of_the_roofs():
    before, after = Roofs(3000.0, 700.0, None), Roofs(3030.0, 693.0, None)
    clocks = steadiness.clocks(before, after, 1980.0, None)
    assert clocks == {"mhz_before": 1980, "mhz_after": None, "copy": 1.01, "bf16": pytest.approx(0.99), "fp8": None}
    assert steadiness.describe(clocks).endswith("copy +1.0%, bf16 -1.0%")
    assert "clock 1,980 to 1,755 MHz" in steadiness.describe({**clocks, "mhz_after": 1755.0})
