"""Public functions whose calls are recorded whole, against the driver of test_cuda_driver on the CPU."""

import inspect
import pickle

import pytest
import torch
import triton

import dskernels as ds
from dskernels import dispatch, recording, validate
from dskernels.cuda.driver import Plan, Planned, Pointer, Word
from dskernels.dispatch import Operation
from dskernels.recording import Recorder
from dskernels.repeated import repeated
from dskernels.types import Fp8Tensor
from test_cuda_driver import CPU, fake  # noqa: F401 - a fixture
from test_recording import arguments_of, first, on_the_cpu, second  # noqa: F401 - fixtures

NOT_RECORDED = {"load_statistics"}  # nothing but torch's


@pytest.fixture
def repeating(on_the_cpu, monkeypatch):  # noqa: F811
    """Calls on the CPU are known as those on a GPU are."""
    monkeypatch.setattr(dispatch, "_STRAIGHT_DEVICES", ("cpu",))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    return on_the_cpu


def write(x, out):
    first(x, out)


_write = Operation("test_repeated_write(Tensor x, Tensor(a!) out) -> ()", reference=write)


def test_every_public_operation_is_repeated():
    for name in set(ds.__all__) - {"explain", "use_impl", "Fp8Tensor", "LoadStatistics", "Permuted", "Routing"}:
        assert hasattr(getattr(ds, name), "known") != (name in NOT_RECORDED), name
        assert inspect.getsource(getattr(ds, name)), name
        assert pickle.loads(pickle.dumps(getattr(ds, name))) is getattr(ds, name)


def test_results_of_any_shape_and_arguments_among_them(repeating):
    calls = []

    @repeated
    def run(q, factor, *, options=(1, None), mode="plain"):
        calls.append(mode)
        out, scale, extra = (q.data.new_empty(4, n) for n in (8, 2, 0))
        first(q.data, out)
        second(out, scale)
        return (Fp8Tensor(out, scale, (128, 128)), q.scale), None, extra, options

    for _ in range(5):
        q = Fp8Tensor(torch.empty(4, 32), torch.empty(4, 1))
        (quantized, given), none, extra, options = run(q, 1.5, options=(7, None))
        assert (type(quantized), quantized.block) == (Fp8Tensor, (128, 128))
        assert given is q.scale
        assert (none, extra.shape, options) == (None, (4, 0), (7, None))
        assert arguments_of(repeating, 2) == [
            (q.data.data_ptr(), quantized.data.data_ptr()),
            (quantized.data.data_ptr(), quantized.scale.data_ptr()),
        ]
    assert len(calls) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"factor": 2.5},
        {"factor": 1},
        {"mode": "other"},
        {"options": (1.0, None)},
        {"options": (True, None)},
        {"options": (1, None, None)},
        {"x": torch.empty(4, 16)},
        {"x": torch.empty(4, 32, dtype=torch.float16)},
        {"x": torch.empty(4, 32, requires_grad=True)},
        {"x": torch._neg_view(torch.empty(4, 32))},
    ],
    # Not by what a tensor holds, which is another thing in every process: test processes compare names.
    ids=[
        "factor",
        "factor as int",
        "mode",
        "a float",
        "a bool",
        "more options",
        "shape",
        "dtype",
        "gradient",
        "negated",
    ],
)
def test_what_differs_is_another_kind(repeating, change):
    calls = []

    @repeated
    def run(x, factor, *, options=(1, None), mode="plain"):
        calls.append(1)
        out = x.new_empty(x.shape)
        first(x, out)
        return out

    usual = {"x": torch.empty(4, 32), "factor": 1.5, "options": (1, None), "mode": "plain"}
    for _ in range(4):
        run(**usual)
    assert len(calls) == 2
    run(**usual | change)
    assert len(calls) == 3


def test_what_is_written_to_gets_a_version(repeating):
    calls = []

    @repeated
    def run(x, out):
        calls.append(1)
        _write(x, out, impl="reference")
        return out

    for _ in range(5):
        x, out = torch.empty(4, 32), torch.empty(4, 32)
        before = out._version
        assert run(x, out) is out
        assert out._version > before
        assert arguments_of(repeating, 1) == [(x.data_ptr(), out.data_ptr())]
    assert len(calls) == 2


def test_a_part_of_what_requires_a_gradient_is_written_by_nobody(repeating):
    """Its metadata are those of any tensor: where it is written to, it is looked at again."""

    @repeated
    def run(x, out):
        validate.check_written("out", out)
        _write(x, out, impl="reference")

    for _ in range(4):
        run(torch.empty(4, 32), torch.empty(4, 32))
    for leaf in (torch.zeros(8, 32), torch.zeros(8, 32, requires_grad=True)):
        with torch.no_grad():
            part = leaf[4:]
            run(torch.empty(4, 32), part)
        if not leaf.requires_grad:
            run(torch.empty(4, 32), part)
            continue
        n = len(repeating.launches)
        with pytest.raises(ValueError, match="out: expected a tensor that requires no gradient"):
            run(torch.empty(4, 32), part)
        assert len(repeating.launches) == n


def test_a_part_that_is_written_to_is_not_recorded(repeating):
    calls = []

    @repeated
    def run(x, out):
        calls.append(1)
        _write(x, out[1:], impl="reference")

    for _ in range(4):
        run(torch.empty(3, 32), torch.empty(4, 32))
    assert len(calls) == 4


def copied(x, out):
    first(x.t().contiguous(), out)


_copied = Operation("test_repeated_copied(Tensor x, Tensor(a!) out) -> ()", reference=copied)


@pytest.mark.parametrize("what", ["a copy that torch calls a view", "a kernel that Triton launches"])
def test_what_nobody_notes_is_not_recorded(repeating, what):
    """Below autograd a mode sees `contiguous` itself, not the copy that it makes."""
    calls = []

    @repeated
    def run(x):
        calls.append(1)
        out = x.new_empty(x.shape)
        if what == "a copy that torch calls a view":
            _copied(x, out, impl="reference")
        else:
            first(x, out)
            triton.knobs.runtime.launch_enter_hook(None)  # as its launcher does
        return out

    for _ in range(8):
        run(torch.empty(4, 32))
    assert len(calls) == 8


def test_what_is_kept_of_an_argument_is_asked_for_each_time(repeating):
    kept, calls = {}, []

    def copy_of(x):
        if id(x) not in kept:
            kept[id(x)] = x, torch.empty(4, 32), torch.empty(4)
        return kept[id(x)][1:]

    @repeated
    def run(x, weight):
        calls.append(1)
        out = x.new_empty(x.shape)
        recorder = recording.driver.recorder.get()
        data, _ = copy_of(weight) if recorder is None else recorder.keep(weight, copy_of)
        first(data, out)
        return out

    for _ in range(6):
        weight = torch.empty(4, 32)
        out = run(torch.empty(4, 32), weight)
        assert arguments_of(repeating, 1) == [(kept[id(weight)][1].data_ptr(), out.data_ptr())]
    assert len(calls) == 2


def test_a_captured_launch_has_words_of_its_own(repeating, monkeypatch):
    """Those of a stream's other launches stay, in what is recorded as in its graph."""
    repeating.kinds, capturing, words, calls = "pl", [False], iter(range(100, 200)), []
    monkeypatch.setattr(torch._C, "_cuda_isCurrentStreamCapturing", lambda: capturing[0], raising=False)
    word = Word(lambda: next(words) if capturing[0] else 7)

    @Planned
    def launch(x, out):
        return Plan(4321, arguments=(Pointer("out"), word), grid=1, threads=32, shared=0, device=CPU)

    @repeated
    def run(x):
        calls.append(1)
        out = x.new_empty(x.shape)
        launch(x, out)
        return out

    for capture, tries, wants in ((False, 4, [7] * 4), (True, 2, [100, 101]), (False, 2, [7, 7])):
        capturing[0] = capture
        for _ in range(tries):
            run(torch.empty(4, 32))
        assert [word for _, word in arguments_of(repeating, tries)] == wants
    assert len(calls) == 2


def test_nothing_is_known_under_a_mode_or_a_transform(repeating):
    calls = []

    @repeated
    def run(x):
        calls.append(1)
        out = x.new_empty(x.shape)
        first(x, out)
        return out

    x = torch.empty(4, 32)
    for _ in range(3):
        run(x)
    assert len(calls) == 2
    with Recorder([x]):
        run(x)
    assert len(calls) == 3
    with ds.use_impl("reference"):
        run(x)
    with torch.no_grad():
        run(x)
    with torch.inference_mode():
        run(x)
    assert len(calls) == 6
    with pytest.raises(ValueError, match="run called none"):
        ds.explain(run, x)
    assert len(calls) == 7
