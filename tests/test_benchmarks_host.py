"""What a call costs the host, measured alone and put into saved results."""

import json

import torch
from rich.console import Console

from benchmarks import host, workloads
from benchmarks.around_mla import MergeStates
from benchmarks.bench_generation import CASES as GENERATIONS
from benchmarks.results import Machine

MACHINE = Machine("NVIDIA H100 80GB HBM3", "580.1", "2.11.0", "3.6.0", "13.0", "abc123")
CASE = MergeStates(workloads.Tokens(4, 2))


class Broken(MergeStates):
    """A case that cannot be called."""

    def ours(self, x, impl):
        raise RuntimeError("no such kernel")


def costs_of(monkeypatch, *cases):
    called = []
    monkeypatch.setattr(host, "cost", lambda call: called.append(call()) or 10.0 * len(called))
    return host.measure(cases, torch.device("cpu"))


def test_every_case_but_those_that_wait_beside_an_addition_of_torch(monkeypatch):
    costs = costs_of(monkeypatch, CASE, Broken(workloads.Tokens(5, 2)), *GENERATIONS)
    assert costs.add_us == 10.0
    assert costs.us == {("merge_states", "t4_h2", "reference"): 20.0}
    assert costs.failures == ["merge_states t5_h2: RuntimeError: no such kernel"]


def test_costs_are_put_into_what_is_saved(monkeypatch, tmp_path):
    rows = [
        {"op": "merge_states", "workload": "t4_h2", "impl": "reference", "us": 2.0, "host_us": 99.0},
        {"op": "merge_states", "workload": "t4_h2", "impl": "triton", "us": 3.0, "host_us": 98.0},
    ]
    file = tmp_path / "h100" / "mla.json"
    file.parent.mkdir()
    file.write_text(json.dumps({"commit": "old", "rows": rows}))
    monkeypatch.setattr(host, "DEVICE", "cpu")
    monkeypatch.setattr(host, "cost", lambda call: 20.0)
    monkeypatch.setattr(host.Machine, "current", lambda: MACHINE)
    console = Console(record=True, width=200)
    assert host.run(console, {"mla": [CASE]}, commit="def456", save=True, folder=tmp_path)
    assert "1 rows" in console.export_text()
    document = json.loads(file.read_text())
    assert [row["host_us"] for row in document["rows"]] == [20.0, 98.0]  # of the implementation that was called
    assert document["commit"] == "old"  # of the times on the device, which stay
    assert document["host_alone"].keys() == {"commit", "date", "add_us"}
    assert document["host_alone"]["commit"] == "def456"
    assert not host.run(console, {"fp8": [CASE]}, commit=None, save=True, folder=tmp_path)
    assert "nothing is saved of h100" in console.export_text()
