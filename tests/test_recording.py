"""Calls whose launches are recorded: against the driver of test_cuda_driver, on the CPU."""

import collections
import ctypes
import functools
import gc
import threading
import tracemalloc
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dskernels import choice, portable, recording, relaunching
from dskernels import device as devices
from dskernels.cuda.driver import Plan, Planned, Pointer
from dskernels.cuda.tensor_map import TensorMap
from dskernels.metadata import ByMetadata
from dskernels.recording import Recorded
from test_cuda_driver import CPU, INVALID_VALUE, fake  # noqa: F401 - a fixture


@pytest.fixture(params=[1, 100], ids=["graph", "one by one"])
def on_the_cpu(fake, monkeypatch, request):  # noqa: F811
    """Calls of tensors of the CPU are recorded too."""
    fake.kinds = "pp"
    make = torch._C._dynamo.guards._empty_strided_cpu

    def like_this(x):
        return functools.partial(make, tuple(x.shape), x.stride(), x.dtype)

    for launch in (first, second):  # whose plans are those of another test's driver
        monkeypatch.setattr(launch, "_kept", ByMetadata())
    monkeypatch.setattr(relaunching, "like_this", like_this)
    monkeypatch.setattr(relaunching, "FEWEST_IN_GRAPH", request.param)
    monkeypatch.setattr(relaunching, "reason_against_graphs", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: False, raising=False)
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: not devices.dispatch_modes())
    monkeypatch.setattr(recording, "_memory", lambda device: 80_000)
    return fake


def planned(a="x", b="out", maps=False, in_graph=True):
    @Planned
    def launch(x, out):
        arguments = (TensorMap(a, x, (1, 16), swizzle=False), Pointer(b)) if maps else (Pointer(a), Pointer(b))
        return Plan(4321, arguments=arguments, grid=1, threads=32, shared=0, device=CPU, in_graph=in_graph)

    return launch


first, second = planned(), planned(maps=True)


def two_steps(calls):
    """out = second(first(x)), with memory in between; `calls` counts when it runs as it is written."""

    @Recorded
    def run(x):
        calls.append(x.shape)
        between, out = x.new_empty(x.shape), x.new_empty(x.shape)
        first(x, between)
        second(between, out)
        return out

    return run


def arguments_of(fake, n):  # noqa: F811
    return [tuple(launch["arguments"]) for launch in fake.launches[-n:]]


def test_the_third_call_launches_what_the_second_recorded(on_the_cpu):
    calls = []
    run = two_steps(calls)
    kept = []
    for i in range(6):
        x = torch.empty(4, 32)
        out = run(x)
        kept += [x, out]
        assert len(on_the_cpu.launches) == 2 * (i + 1)
        (from_x, between), (from_between, to) = arguments_of(on_the_cpu, 2)
        assert (from_x, from_between, to) == (x.data_ptr(), between, out.data_ptr())
        assert len({from_x, between, to}) == 3
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
    assert len(calls) == 2
    assert len({x.data_ptr() for x in kept}) == 12
    run(torch.empty(5, 32))
    assert len(calls) == 3  # another kind


def test_a_plan_that_is_in_no_graph_keeps_its_recording_out(on_the_cpu, monkeypatch):
    monkeypatch.setattr(relaunching, "FEWEST_IN_GRAPH", 1)
    monkeypatch.setattr(relaunching, "LaunchGraph", lambda plans, device: pytest.fail("a graph is made"))
    apart = planned(in_graph=False)

    @Recorded
    def run(x):
        out = x.new_empty(x.shape)
        first(x, out)
        apart(x, out)
        return out

    for _ in range(4):
        run(torch.empty(4, 32))
    assert len(on_the_cpu.launches) == 8


def test_the_oldest_graph_goes(on_the_cpu, monkeypatch):
    monkeypatch.setattr(relaunching, "MOST_GRAPHS", 2)
    monkeypatch.setattr(relaunching, "_have_graphs", collections.deque())
    run = two_steps([])
    for _ in range(4):
        for rows in (1, 2, 3):
            x = torch.empty(rows, 32)
            out = run(x)
            (from_x, between), (from_between, to) = arguments_of(on_the_cpu, 2)
            assert (from_x, from_between, to) == (x.data_ptr(), between, out.data_ptr())
    assert len(on_the_cpu.graphs) in (0, 6)  # each of the three is made anew
    monkeypatch.setattr(relaunching, "MOST_GRAPHS", 8)
    made = len(on_the_cpu.graphs)
    for width in range(40, 60):
        for shape in ((1, 32), *[(1, width)] * 3):
            run(torch.empty(shape))
    assert len(on_the_cpu.graphs) - made in (0, *range(20, 24))  # the one that is launched all the time stays, mostly


def test_another_stream(on_the_cpu, monkeypatch):
    run = two_steps([])
    for stream in (77, 77, 77, 78, 77):
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device, stream=stream: stream)
        run(torch.empty(4, 32))
        assert [launch["stream"] for launch in on_the_cpu.launches[-2:]] == [stream] * 2


KINDS_OF_MORE = [
    "fill",
    "copy",
    "elsewhere",
    "argument",
    "nothing",
    "view of a result",
    "beginning of a result",
    "memory",
]


@pytest.mark.parametrize("what", KINDS_OF_MORE)
def test_what_is_more_than_launches_runs_as_it_is_written(on_the_cpu, monkeypatch, what):
    calls = []
    monkeypatch.setattr(recording, "_memory", lambda device: 8000 if what == "memory" else 80_000)
    elsewhere = torch.empty(4, 32)

    @Recorded
    def run(x):
        calls.append(what)
        out = x.new_empty(x.shape)
        if what == "fill":
            out.zero_()
        if what != "nothing":
            first(x.t().contiguous().t() if what == "copy" else elsewhere if what == "elsewhere" else x, out)
        parts = {"argument": x, "view of a result": out[1:], "beginning of a result": out[:2]}
        return parts.get(what, out)

    for _ in range(6):
        run(torch.empty(4, 32))
    assert len(calls) == 6


def multiplying(calls, dtype=torch.float32, out_of=None):
    """out = first(x @ w.T), the product with `out=` into memory in between."""

    @Recorded
    def run(x, w):
        calls.append(1)
        between = x.new_empty(x.shape[0], w.shape[0], dtype=dtype) if out_of is None else out_of
        torch.mm(x, w.t(), out=between)
        out = x.new_empty(between.shape)
        first(between, out)
        return out

    return run


def test_a_product_of_torchs_is_made_again(on_the_cpu, monkeypatch):
    calls, results = [], {}
    run = multiplying(calls)
    read = on_the_cpu.read

    def read_and_keep(arguments):
        """What is read when the launch is made."""
        source, to = read(arguments)
        memory = (ctypes.c_float * 32).from_address(source)
        with torch._C._DisableTorchDispatch():
            results[to] = torch.frombuffer(memory, dtype=torch.float32).view(4, 8).clone()
        return [source, to]

    monkeypatch.setattr(on_the_cpu, "read", read_and_keep)
    weights = torch.randn(20, 32)
    for i in range(5):
        x, w = torch.randn(4, 40)[:, 3:35], weights[i : i + 8]  # parts, at other offsets each time
        x = torch.cat([torch.zeros(1), x.flatten()])[1:].view(4, 32) if i == 4 else x
        out = run(x, w)
        assert torch.equal(results[out.data_ptr()], x @ w.t())
    assert not on_the_cpu.graphs  # between its launches there is something else
    assert len(calls) <= 4


@pytest.mark.parametrize("why", ["another dtype", "memory of others", "autocast", "no elements"])
def test_products_that_are_not_made_again(on_the_cpu, why):
    calls = []
    elsewhere = torch.empty(4, 8) if why == "memory of others" else None
    run = multiplying(calls, out_of=elsewhere)
    x = torch.empty(4, 0 if why == "no elements" else 32)
    if why == "another dtype":
        x = x.view(torch.int32)  # of which `first` is given a part that is read as floats

        @Recorded
        def run(x):
            calls.append(1)
            between, out = x.new_empty(4, 4, dtype=torch.float32), x.new_empty(4, 4, dtype=torch.float32)
            torch.mm(x.view(torch.float32), x.view(torch.float32).t(), out=between)
            first(between, out)
            return out

    given = (x,) if why == "another dtype" else (x, torch.empty(8, x.shape[1]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=why == "autocast"):
        for _ in range(5):
            run(*given)
    assert len(calls) == 5


def test_results_without_elements_and_nothing(on_the_cpu):
    @Recorded
    def run(x, absent):
        out, empty = x.new_empty(x.shape), x.new_empty(0, 7)
        first(x, out)
        return empty, out, None

    for _ in range(4):
        x = torch.empty(4, 32)
        empty, out, none = run(x, None)
        assert (empty.shape, none) == ((0, 7), None)
        assert arguments_of(on_the_cpu, 1) == [(x.data_ptr(), out.data_ptr())]


def test_what_only_writes(on_the_cpu):
    calls = []

    @Recorded
    def run(x, out):
        calls.append(1)
        first(x, out[1:])

    for _ in range(4):
        x, out = torch.empty(3, 32), torch.empty(4, 32)
        assert run(x, out) is None
        assert arguments_of(on_the_cpu, 1) == [(x.data_ptr(), out[1:].data_ptr())]
    assert len(calls) == 2


def test_neighbours_are_recorded_apart(on_the_cpu):
    """What was decided since two arguments follow each other does not hold for two that do not."""
    calls = []

    @Recorded
    def run(x, y):
        follows = y.data_ptr() == x.data_ptr() + x.numel() * 4
        calls.append(follows)
        out = x.new_empty(x.shape)
        first(x if follows else y, out)
        return out

    both = torch.empty(8, 32)
    for _ in range(4):
        run(both[:4], both[4:])
        assert arguments_of(on_the_cpu, 1)[0][0] == both.data_ptr()
    for _ in range(4):
        x, y = torch.empty(4, 32), both[2:6]
        run(x, y)
        assert arguments_of(on_the_cpu, 1)[0][0] == y.data_ptr()
    assert calls == [True, True, False]


def test_a_function_that_is_explained_runs_as_it_is_written(on_the_cpu):
    """Also where it has been recorded: what it calls says what would run."""
    calls = []
    run = two_steps(calls)
    x = torch.empty(4, 32)
    for _ in range(4):
        run(x)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="run called none"):
        choice.explain(run, x)
    assert len(calls) == 3
    run(x)
    assert len(calls) == 3


def test_the_recording_that_fits_is_found_among_several(on_the_cpu):
    """Of calls whose arguments lie at changing distances, each finds its own; more distances than are tried run as
    they are written."""
    calls = []

    @Recorded
    def run(x, y):
        calls.append(y.data_ptr() - x.data_ptr())
        out = x.new_empty(x.shape)
        first(y, out)
        return out

    both = torch.empty(64, 32)
    given = [(both[8:12], both[i : i + 4]) for i in (8, 9, 10, 11)]
    for i in [0, 1, 2, 3, 0, 3, 1, 2, 2, 0, 3, 1]:
        x, y = given[i]
        out = run(x, y)
        assert arguments_of(on_the_cpu, 1) == [(y.data_ptr(), out.data_ptr())]
    assert len(calls) == 5  # the first call of the kind, and one that is recorded for each distance


def test_a_refused_launch_raises_and_is_recorded_anew(on_the_cpu):
    calls = []
    run = two_steps(calls)
    for _ in range(3):
        run(torch.empty(4, 32))
    on_the_cpu.status["launch"] = INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"(cuLaunchKernelEx|cuGraphLaunch): no good \(1\)"):
        run(torch.empty(4, 32))
    for _ in range(3):
        x = torch.empty(4, 32)
        run(x)
        assert arguments_of(on_the_cpu, 2)[0][0] == x.data_ptr()
    assert len(calls) == 3


def test_threads_do_not_share_a_recording(on_the_cpu):
    run = two_steps([])
    kept = [[] for _ in range(4)]

    def work(i):
        for _ in range(100):
            x = torch.empty(4, 32)
            kept[i].append((x, run(x)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launched = [tuple(launch["arguments"]) for launch in on_the_cpu.launches]
    assert len(launched) == 800
    made_of = {}
    for x, to in launched:
        made_of.setdefault(x, set()).add(to)
    for x, out in (pair for pairs in kept for pair in pairs):
        assert any(out.data_ptr() in made_of.get(between, ()) for between in made_of[x.data_ptr()])


pieces = st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 8), st.integers(0, 4)), max_size=12)


@given(pieces)
def test_memory_is_shared_only_one_after_the_other(drawn):
    wanted = [(size, first, first + more) for size, first, more in drawn]
    offsets, size = relaunching.packed(wanted)
    assert all(offset % relaunching.ALIGNMENT == 0 for offset in offsets)
    assert size == max((o + n for o, (n, _, _) in zip(offsets, wanted, strict=True)), default=0)
    for i, (n, a, b) in enumerate(wanted):
        for j, (m, c, d) in enumerate(wanted[:i]):
            apart = offsets[i] + n <= offsets[j] or offsets[j] + m <= offsets[i]
            assert apart or b < c or d < a


def test_a_triton_kernel_as_the_driver_takes_it(on_the_cpu):
    """Arguments without the constexprs, and two addresses of scratch memory behind them."""
    on_the_cpu.kinds = "pilfpp"
    x = torch.empty(4)
    signature = {"p_x": "*fp32", "p_absent": "constexpr", "n": "i32", "one": "constexpr", "stride": "i64", "f": "fp32"}
    wants = {"global_scratch_size": 0, "profile_scratch_size": 0, "launch_cooperative_grid": False, "num_ctas": 1}
    metadata = types.SimpleNamespace(**wants, num_warps=8, shared=1234, launch_pdl=True)
    compiled = types.SimpleNamespace(function=99, src=types.SimpleNamespace(signature=signature), metadata=metadata)
    plan = portable._plan(compiled, (3, 2, 1), (x, None, -5, 1, 2**40, 0.5), 0)
    plan.launch_at({"p_x": x.data_ptr()})
    (launch,) = on_the_cpu.launches
    assert (launch["function"], launch["grid"], launch["block"], launch["shared"]) == (99, (3, 2, 1), (256, 1, 1), 1234)
    assert launch["arguments"] == [x.data_ptr(), -5, 2**40, 0.5, 0, 0]
    assert launch["attributes"] == {6: (1, 0, 0)}
    for change in ({"global_scratch_size": 8}, {"num_ctas": 2}, {"launch_cooperative_grid": True}):
        compiled.metadata = types.SimpleNamespace(**(wants | change), num_warps=8, shared=0, launch_pdl=False)
        assert portable._plan(compiled, (3, 2, 1), (x, None, -5, 1, 2**40, 0.5), 0) is None


def test_what_a_kind_keeps_is_small(on_the_cpu):
    """Of two launches and of the plans of the first call 14 KB, and 3 more of their graph; as objects of ctypes 22."""
    run = two_steps([])

    def make(widths):
        for width in widths:
            for _ in range(3):
                run(torch.empty(1, width))

    make(range(20, 24))
    gc.collect()
    tracemalloc.start()
    try:
        make(range(24, 56))
        on_the_cpu.launches.clear(), on_the_cpu.graphs.clear(), on_the_cpu.encoded.clear()
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] < 32 * 20_000
    finally:
        tracemalloc.stop()
