"""The command line as a user meets it: what it prints, how it refuses, and its exit status."""

import json

import pytest
import torch

from dskernels import __version__, cli, parity
from dskernels.choice import OPERATIONS


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["dskernels", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as exit_:
            status = exit_.code or 0
        return status, *capsys.readouterr()

    return run


def test_help_names_the_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(command in out for command in ("doctor", "parity", "train", "generate"))


def test_version(run):
    assert run("--version")[:2] == (0, f"{__version__}\n")


def test_doctor(run):
    status, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["packages"]["torch"] == torch.__version__
    assert {operation["operation"] for operation in facts["operations"]} == set(OPERATIONS)
    shown, everything = (" ".join(run("doctor", *more)[1].split()) for more in ((), ("--all",)))
    assert "fp8_gemm" in shown
    assert "fp8_linear_backward" not in shown
    assert "fp8_linear_backward" in everything


def test_parity_of_a_family(run):
    status, out, _ = run("parity", "gemm", "--json")
    report = json.loads(out)
    assert status == 0
    assert report["failed"] == 0
    assert [row["case"] for row in report["rows"]] == [case.label for case in parity.all_cases(["gemm"])]
    assert all(row["impl"] == "triton" for row in report["rows"])


def test_parity_says_what_there_is_and_what_cannot_run(run, monkeypatch):
    assert all(family in run("parity", "--help")[1] for family in parity.FAMILIES)
    monkeypatch.setattr("dskernels.device.default_device", lambda: torch.device("cpu"))
    status, _, error = run("parity", "gemm", "--impl", "hopper")
    assert (status, error) == (1, "error: --impl: hopper cannot run here: it needs an sm_90 GPU\n")


def test_parity_fails_where_a_kernel_is_wrong(run, monkeypatch):
    monkeypatch.setattr(parity, "check", lambda case, device, impl: parity.Outcome(1.0, False))
    status, out, _ = run("parity", "gemm")
    assert status == 1
    assert "5 of 5 cases failed" in " ".join(out.split())


def test_parity_shows_a_kernel_that_raises(run, monkeypatch):
    def broken(case, device, impl):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(parity, "check", broken)
    status, out, _ = run("parity", "gemm", "--json")
    assert status == 1
    assert "no such instruction" in json.loads(out)["rows"][0]["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parity", "gem"], "families: expected some of fp8, gemm"),
        (["parity", "gemm", "--impl", "cuda"], "--impl: expected triton or hopper, got 'cuda'"),
        (["generate", "nowhere", "--prompt", "x"], "nowhere: no such folder"),
        (["train", "nowhere"], "nowhere"),
        (["train", "demo", "--data", "nowhere"], "nowhere: no such file or folder"),
        (["train", "demo", "--steps", "0"], "steps: expected at least 1, got 0"),
        (["train", "demo", "--precision", "int8"], "precision: expected"),
        (
            ["train", "--keep", "0", "--data", "nowhere"],
            "--keep: expected at least 1, got 0",
        ),  # before the text is read
    ],
)
def test_what_a_user_gets_wrong_is_said_in_one_line(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, error = run(*arguments)
    assert status == 1
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["parity", "--bogus"], "error: No such option: --bogus. See dskernels parity --help."),
        (["bogus"], "error: No such command 'bogus'. See dskernels --help."),
        (["doctr"], "error: No such command 'doctr'. Did you mean 'doctor'? See dskernels --help."),
        (["generate"], "error: Missing argument"),
        (["train", "demo", "--steps", "many"], "error: Invalid value for '--steps'"),
    ],
)
def test_a_wrong_option_is_one_line_too(run, arguments, message):
    status, _, error = run(*arguments)
    assert status == 2
    assert error.startswith(message)
    assert error.count("\n") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_torchruns_report_says_what_was_wrong(run, tmp_path, monkeypatch, rank):
    """It comes last, behind the lines of all ranks, of which the first says the same."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("RANK", str(rank))
    status, _, error = run("train", "demo", "--steps", "0")
    assert status == 1
    assert (error == "") is (rank == 1)
    assert json.loads((tmp_path / "error.json").read_text())["message"] == "error: steps: expected at least 1, got 0"


def test_no_command_shows_the_help(run):
    status, out, error = run()
    assert status == 2
    assert "Usage" in out + error
    assert "Traceback" not in out + error


def test_train_and_generate(run, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(4):
        (text / f"{i}.py").write_text("def f(x):\n    return x\n" * 40)
    out = tmp_path / "run"
    options = ["--steps", 2, "--batch-tokens", 128, "--sequence-length", 64]
    status, printed, error = run("train", "demo", "--data", text, "--out", out, *options)
    assert status == 0, error
    assert "Held-out loss" in printed
    files = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "train.json", "loss.png", "experts.png"} <= files

    texts = []
    for draft in (0, 1):
        status, printed, error = run("generate", out, "--prompt", "def ", "--max-new-tokens", 12, "--draft", draft)
        assert status == 0, error
        assert printed.startswith("def ")
        texts.append(printed)
        assert ("accepted" in error) == bool(draft)
    assert texts[0] == texts[1]
