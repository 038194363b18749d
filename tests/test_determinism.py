"""What is the same to the bit: in the next call, on another stream, beside others, in a CUDA graph, on another GPU.

Cases are those of `parity`, gradients included. Batches of other prompts are in tests/model/test_invariance.py, sums
over ranks in tests/parallel.
"""

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import dskernels as ds
from dskernels import parity

CASES = {f"{case.op}, {case.label}": case for case in parity.all_cases()}
FIRST = {case.op: case for case in reversed(CASES.values())}  # of each operation
# On a CPU, where nothing is at stake, those that take no seconds.
EVERY = list(CASES) if torch.cuda.is_available() else [f"{c.op}, {c.label}" for c in FIRST.values() if not c.gradient]
IMPLS = ["reference"] if not torch.cuda.is_available() else ["triton", "hopper"]


@pytest.fixture(params=IMPLS)
def impl(request):
    return request.param


def results(case, impl, device="cuda"):
    """Outputs and gradients; skips what this implementation does not take."""
    try:
        return parity._results(getattr(ds, case.op), case, torch.device(device), impl=impl)
    except ValueError as error:
        if "cannot run this" not in str(error):
            raise
        pytest.skip(str(error))


def same(one, other):
    """Whether the bytes are the same."""
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(one, other, strict=True))


def bits(x):
    """The bytes of a result."""
    return x.contiguous().as_strided((x.numel(),), (1,)).view(torch.uint8)


@pytest.mark.parametrize("label", EVERY)
def test_the_next_call_gives_the_same_bits(device, impl, label):
    first = results(CASES[label], impl, device)
    for _ in range(4 if device == "cuda" else 1):
        assert same(results(CASES[label], impl, device), first)


@pytest.mark.parametrize("label", EVERY)
def test_torchs_defaults_have_no_say(device, impl, label):
    """A loader sets bf16 as the default dtype, or another default device, for as long as it makes a model."""
    case = CASES[label]

    def made(*args, **kwargs):
        torch.set_default_dtype(torch.bfloat16)
        torch.set_default_device("meta")
        try:
            return getattr(ds, case.op)(*args, **kwargs)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)

    want = results(case, impl, device)
    assert same(parity._results(made, case, torch.device(device), impl=impl), want)


@pytest.mark.gpu
@pytest.mark.parametrize("op", FIRST)
def test_streams_beside_each_other_give_the_same_bits(impl, op):
    want = results(FIRST[op], impl)
    streams = [torch.cuda.Stream() for _ in range(4)]
    gots = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                gots.append(results(FIRST[op], impl))
    torch.cuda.synchronize()
    assert all(same(got, want) for got in gots)


@pytest.mark.gpu
def test_threads_on_streams_of_their_own_give_the_same_bits():
    """All of an operation's implementations at once: plans, compilation and caches are shared by threads."""
    calls = [(case, impl) for case in FIRST.values() for impl in ("triton", "hopper")]

    def run(call):
        with torch.cuda.stream(torch.cuda.Stream()):
            try:
                got = parity._results(getattr(ds, call[0].op), call[0], torch.device("cuda"), impl=call[1])
            except ValueError:
                return []
            torch.cuda.current_stream().synchronize()
            return got

    wants = [run(call) for call in calls]
    with ThreadPoolExecutor(8) as pool:
        gots = list(pool.map(run, calls * 3))
    assert sum(map(bool, wants)) > len(FIRST)
    for got, want, (case, impl) in zip(gots, wants * 3, calls * 3, strict=True):
        assert same(got, want), f"{case.op} by {impl}"


@pytest.mark.gpu
@pytest.mark.parametrize("op", FIRST)
def test_a_graph_gives_the_same_bits(impl, op):
    case, function = FIRST[op], functools.partial(getattr(ds, op), impl=impl)
    results(case, impl)  # skips
    for _ in range(2):  # compiles what only this path runs, and is of known metadata then
        args, kwargs = case.inputs(torch.device("cuda"))
        want = [x.clone() for x in parity._flatten(function(*args, **kwargs))]
    args, kwargs = case.inputs(torch.device("cuda"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = parity._flatten(function(*args, **kwargs))
    graph.replay()
    torch.cuda.synchronize()
    assert same(captured, want)


def digests(impl, device):
    """Of each operation's first case, a digest of its results; nothing where the implementation does not take it."""
    found = {}
    for op, case in FIRST.items():
        with contextlib.suppress(ValueError):
            given = parity._results(getattr(ds, op), case, torch.device(device), impl=impl)
            found[op] = hashlib.sha256(b"".join(bits(x).cpu().numpy().tobytes() for x in given)).hexdigest()
    return found


@pytest.mark.gpu
def test_another_process_gives_the_same_bits(impl):
    """What a process has chosen, compiled or recorded before has no say."""
    code = f"import json, test_determinism; print(json.dumps(test_determinism.digests({impl!r}, 'cuda')))"
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
    environment = os.environ | {"PYTHONPATH": path, "DSKERNELS_TEST_DEVICE": "cuda"}
    other = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    here = digests(impl, "cuda")
    assert here
    assert json.loads(other.stdout.splitlines()[-1]) == here


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("op", FIRST)
def test_another_gpu_gives_the_same_bits(impl, op):
    """Whichever of them is the current one, and that stays so."""
    want = [x.cpu() for x in results(FIRST[op], impl, "cuda:0")]
    for current in (0, 1):
        with torch.cuda.device(current):
            for index in (1, 0, 1):
                got = results(FIRST[op], impl, f"cuda:{index}")
                assert all(x.device.index == index for x in got)
                assert same([x.cpu() for x in got], want)
            assert torch.cuda.current_device() == current
