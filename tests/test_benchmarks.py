"""The benchmark suite: every case at a size that a CPU can do, what counts as right, and the command line."""

import json
import math
import sys

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import __main__ as cli
from benchmarks import base, cases, peers, results, roofline, runner, session, steadiness, timing, workloads
from benchmarks.around_mla import MergeStates
from benchmarks.bench_gemm import Fp8Gemm
from benchmarks.cases import calc_diff, difference, kept_within_a_family
from benchmarks.peers import Peer
from benchmarks.peers.gemm import padded_rows
from benchmarks.results import Failure, Machine, Row
from benchmarks.roofline import Roofs
from benchmarks.small import shrunk
from benchmarks.timing import Times
from dskernels import Fp8Tensor

ROOFS = Roofs(copy_gbs=3000.0, bf16_tflops=700.0, fp8_tflops=1400.0)
MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "3.6.0", "13.0", "abc123")
EVERY = cli.select(cli.FAMILIES, [])


def run_at_once(rivals):
    """Stand in for the stopwatch: call everything, and let each take ten microseconds."""
    for call in rivals.values():
        call()
    return {name: Times(10.0, 9.0, 11.0) for name in rivals}


def a_runner(time=run_at_once, **options):
    return runner.Runner(torch.device("cpu"), time, ROOFS, **options)


def one_of_each():
    """The cases that still differ once they are small; a sweep's are those of its families."""
    found = {}
    for family, listed in EVERY.items():
        for case in listed:
            small = shrunk(case)
            found.setdefault((type(small), small.title), (family, small))
    return [pytest.param(case, id=f"{family}-{case.title}") for family, case in found.values()]


def test_no_case_is_listed_twice():
    titles = [(family, case.title) for family, cases in EVERY.items() for case in cases]
    assert len(titles) == len(set(titles))


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


class Overwritten(MergeStates):
    """A case of rounds whose inputs are written over once it was checked, as a graph's may be by peers."""

    rounds = 2

    def ours(self, x, impl):
        call = super().ours(x, impl)
        if impl == "reference":
            return call
        calls = []

        def right_once():
            calls.append(call())
            out, lse = calls[-1]
            return (out, lse) if len(calls) == 1 else (out + 1.0, lse)

        return right_once


def test_what_is_wrong_after_its_rounds_is_reported():
    (failure,) = a_runner().run(Overwritten(workloads.Tokens(4, 2))).results
    assert isinstance(failure, Failure)
    assert failure.reason.startswith("wrong result: calc_diff ")


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


@pytest.mark.parametrize(("words", "code"), [([], 0), (["--check"], 1), (["--save"], 1), (["--base", "HEAD"], 1)])
def test_without_a_gpu_it_says_so_and_no_gate_passes(words, code, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("fp8", *words)
    assert result.exit_code == code
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
    monkeypatch.setattr(roofline, "products", lambda: {"bf16": lambda: None})
    monkeypatch.setattr(steadiness, "clock_mhz", lambda product: 1980.0)
    monkeypatch.setattr(session, "DEVICE", "cpu")
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    select = cli.select
    monkeypatch.setattr(
        cli, "select", lambda *a, **k: {f: [shrunk(c) for c in cases][:3] for f, cases in select(*a, **k).items()}
    )
    return tmp_path


def test_a_whole_run_prints_tables_and_saves(gpu_stand_in):
    result = invoke("fp8", "gemm", "--save", "--commit", "def456")
    assert result.exit_code == 0, result.output
    for text in ("NVIDIA H100 80GB HBM3", "roofs: copy 3,000 GB/s", "peers missing: ", "quantize", "fp8_gemm", " s: "):
        assert text in result.output
    for family in ("fp8", "gemm"):
        saved = json.loads((gpu_stand_in / "h100" / f"{family}.json").read_text())
        assert len(saved["rows"]) == 3
        assert saved["commit"] == "def456"
        assert saved["clocks"] == {"mhz_before": 1980, "mhz_after": 1980, "copy": 1, "bf16": 1, "fp8": 1, "turns": 3}


def test_what_a_family_keeps_is_let_go_after_it(gpu_stand_in):
    made = []

    @kept_within_a_family
    def model(name):
        made.append(name)
        return name

    assert [model("a"), model("a"), model("b")] == ["a", "a", "b"]
    assert made == ["a", "b"]
    assert invoke("gemm").exit_code == 0
    model("b")
    assert made == ["a", "b", "b"]


def test_nothing_that_holds_memory_of_the_device_is_kept_for_ever():
    """What a family or a peer makes and keeps is let go of after it: a peer's model left 73 GiB to the next family."""
    kept = set()
    for module in [
        module for name, module in sys.modules.items() if name.startswith(("benchmarks.bench_", "benchmarks.peers"))
    ]:
        kept |= {value for value in vars(module).values() if hasattr(value, "cache_clear")}
    forgotten = {getattr(clear, "__self__", None) for clear in cases._forgetting}
    assert {function.__name__ for function in kept - forgotten} == {"corpus", "missing"}


def test_what_was_timed_is_kept_where_the_device_is_unusable_afterwards(gpu_stand_in, monkeypatch):
    measured = iter([ROOFS])

    def measure(time):
        for roofs in measured:
            return roofs
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.\nand more")

    monkeypatch.setattr(roofline, "measure", measure)
    result = invoke("gemm", "--save")
    assert result.exit_code == 0, result.output
    assert "the roofs could not be measured again, RuntimeError: Offset increment outside graph" in result.output
    saved = json.loads((gpu_stand_in / "h100" / "gemm.json").read_text())
    assert len(saved["rows"]) == 3
    assert "clocks" not in saved


@pytest.fixture
def two_cases(gpu_stand_in, monkeypatch):
    two = [MergeStates(workloads.Tokens(4, 2)), MergeStates(workloads.Tokens(5, 2))]
    monkeypatch.setattr(cli, "select", lambda *a, **k: {"mla": two})
    return gpu_stand_in


def test_check_fails_when_a_figure_fell_and_is_quiet_when_none_did(two_cases):
    assert invoke("mla", "--save").exit_code == 0
    kept = two_cases / "h100" / "mla.json"
    result = invoke("mla", "--check")
    assert result.exit_code == 0, result.output
    assert "mla: 0 of 2 figures fell" in result.output
    document = json.loads(kept.read_text())
    document["rows"][0] |= {"us": 5.0, "roof_pct": 2 * document["rows"][0]["roof_pct"]}
    kept.write_text(json.dumps(document))
    result = invoke("mla", "--check")
    assert result.exit_code == 1, result.output
    assert "mla: 1 of 2 figures fell" in result.output
    assert "0.500 0.500 0.500" in result.output


def test_check_does_not_pass_where_nothing_is_saved(two_cases):
    result = invoke("mla", "--check")
    assert result.exit_code == 1
    assert "nothing is saved of h100" in result.output


def test_base_hands_its_arguments_on(two_cases, monkeypatch):
    asked = []
    monkeypatch.setattr(base, "beside", lambda commit, arguments, say: asked.extend([commit, *arguments]) or [])
    result = invoke("fp8", "--base", "HEAD~1", "--impl", "triton", "--filter", "m4096", "--quick")
    assert result.exit_code == 0, result.output
    words = ["HEAD~1", "fp8", "--seconds", "0.05", "--impl", "triton", "--filter", "m4096", "--quick"]
    assert asked == words


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
