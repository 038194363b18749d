"""Choice of implementation: what is asked for is obeyed or refused, and `explain` says why."""

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import dskernels as ds
from dskernels import choice, device, dispatch, portable, recording
from dskernels.device import empty
from dskernels.gemm import weights
from dskernels.metadata import ByMetadata


@pytest.fixture
def operands():
    return ds.quantize(torch.randn(4, 128)), ds.quantize(torch.randn(128, 128), (128, 128))


def test_cpu_tensors_run_the_reference_by_default(operands):
    (choice,) = ds.explain(ds.fp8_gemm, *operands)
    assert choice.operation == "fp8_gemm"
    assert choice.impl == "reference"
    assert "the tensors are on the CPU" in choice.rejected["triton"]


def test_explain_is_asked_of_what_calls_operations():
    with pytest.raises(ValueError, match=r"function: expected one that calls operations .*, print called none"):
        ds.explain(print, 1)
    with pytest.raises(TypeError, match="not callable"):
        ds.explain(1)
    assert ds.explain(ds.load_statistics, torch.ones(4).int()) == []
    assert [c.operation for c in ds.explain(lambda: ds.quantize(torch.randn(2, 128)))] == ["quantize"]


def test_explain_runs_nothing(operands):
    out = torch.full((4, 128), 7.0)
    ds.explain(ds.fp8_gemm, *operands, out=out)
    assert (out == 7).all()


def test_explain_follows_a_composite_operation(operands):
    choices = ds.explain(ds.fp8_linear, torch.randn(3, 128), operands[1])
    assert [choice.operation for choice in choices] == ["quantize", "fp8_gemm"]


def test_what_explain_has_not_computed_is_not_kept():
    """A weight's e4m3 copy: the first call after `explain` multiplied by memory that nobody had written."""
    x, weight = torch.randn(3, 128), torch.randn(130, 128)
    ds.explain(ds.fp8_linear, x, weight)
    kept = weights.quantized_weight(weight, transpose=False, impl=None)
    assert torch.equal(kept.data.view(torch.uint8), ds.quantize(weight, (128, 128)).data.view(torch.uint8))


def test_explain_without_arguments_names_every_operation():
    assert {choice.operation for choice in ds.explain()} == set(dispatch.OPERATIONS)


def test_explicit_impl_is_refused_where_it_cannot_run(operands):
    with pytest.raises(ValueError, match="impl='hopper' cannot run this"):
        ds.fp8_gemm(*operands, impl="hopper")


def test_triton_on_the_cpu_is_refused_without_the_interpreter(operands, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is not set"):
        ds.fp8_gemm(*operands, impl="triton")


def test_use_impl_holds_inside_and_ends_outside(operands):
    with ds.use_impl("hopper"), pytest.raises(ValueError, match="impl='hopper' cannot run this"):
        ds.fp8_gemm(*operands)
    with ds.use_impl("hopper"):
        ds.fp8_gemm(*operands, impl="reference")  # a call's own impl wins
    ds.fp8_gemm(*operands)


def test_backward_runs_what_the_forward_was_asked_for(monkeypatch):
    seen = []
    x = torch.randn(3, 128, requires_grad=True)
    weight = torch.randn(128, 128, requires_grad=True)
    with ds.use_impl("reference"):
        y = ds.fp8_linear(x, weight)
    backward = dispatch.OPERATIONS["fp8_linear_backward"]
    monkeypatch.setattr(backward, "composite", lambda *args, impl: seen.append(impl) or backward.fake(*args))
    y.sum().backward()
    assert seen == ["reference"]


@pytest.mark.parametrize("call", [lambda a, b: ds.fp8_gemm(a, b, impl="cuda"), lambda a, b: ds.use_impl("cuda")])
def test_unknown_impl_is_named(operands, call):
    with pytest.raises(ValueError, match=r"impl: expected one of hopper, triton, reference.*got 'cuda'"):
        call(*operands)


@pytest.mark.parametrize("impl", [1, ["triton"]])
def test_impl_that_is_no_name_is_named(operands, impl):
    calls = (
        lambda: ds.fp8_gemm(*operands, impl=impl),
        lambda: ds.permute(torch.ones(2, 4), torch.zeros(2, 1).int(), 3, impl=impl),
    )
    for call in calls:
        with pytest.raises(TypeError, match=rf"impl: expected one of hopper.* or None, got {type(impl).__name__}"):
            call()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_writing_to_an_argument_raises_its_version(operands, device, impl):
    a, b = (operand.to(device) for operand in operands)
    out = torch.zeros(4, 128, device=device)
    before = out._version
    ds.fp8_gemm(a, b, out=out, impl=impl)
    assert out._version > before
    with torch.inference_mode():
        ds.fp8_gemm(a, b, impl=impl)  # inference tensors have no version


def test_every_target_exists():
    """A target is imported on first use: a wrong name would only be found by a user with that GPU."""
    for operation in dispatch.OPERATIONS.values():
        for target in operation.targets.values():
            if isinstance(target, str):
                assert callable(dispatch._load(target)), target


@pytest.fixture
def straight(monkeypatch, device):
    """Let calls go straight to the implementation on the CPU too; return what still goes through torch's dispatcher."""
    through = []
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: False)
    for name in ("quantize", "fp8_gemm", "rmsnorm_quantize"):
        monkeypatch.setattr(getattr(ds, name).known, "kinds", ByMetadata())
    if device == "cpu":
        monkeypatch.setattr(dispatch, "_STRAIGHT_DEVICES", ("cpu",))
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    for operation in dispatch.OPERATIONS.values():
        if operation._straight is not None:
            monkeypatch.setattr(operation, "_straight", ByMetadata())
        overload = operation.overload
        monkeypatch.setattr(
            operation, "overload", lambda *args, overload=overload: through.append(overload.name()) or overload(*args)
        )
    return through


def gemm_twice(device):
    """Two calls that differ in nothing but values and addresses."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        a = ds.quantize(torch.randn(40, 256, device=device))
        b = ds.quantize(torch.randn(128, 256, device=device), (128, 128))
        yield a, b, ds.fp8_gemm(a, b)


def test_known_calls_go_straight_and_mean_the_same(straight, device):
    (_, _, first), (a, b, second) = gemm_twice(device)
    assert straight.count("dskernels::fp8_gemm") == 1
    assert straight.count("dskernels::quantize") == 2  # the two tilings
    assert not torch.equal(first, second)
    want = torch.empty_like(second)
    torch.ops.dskernels.fp8_gemm(a.data, a.scale, b.data, b.scale, 128, None, want, False)
    assert torch.equal(second, want)


@pytest.mark.parametrize("change", ["sizes", "strides", "dtype", "value", "optional", "impl"])
def test_other_calls_are_decided_anew(straight, device, change):
    *_, (a, b, _) = gemm_twice(device)
    out = torch.zeros(40, 128, device=device)
    ds.fp8_gemm(a, b, out=out)
    before = len(straight)
    match change:
        case "sizes":
            ds.fp8_gemm(ds.quantize(torch.randn(41, 256, device=device)), b)
        case "strides":
            ds.fp8_gemm(a, b, out=torch.zeros(40, 256, device=device)[:, :128])
        case "dtype":
            ds.fp8_gemm(a, b, out_dtype=torch.float16)
        case "value":
            ds.fp8_gemm(a, b, out=out, accumulate=True)
        case "optional":
            ds.fp8_gemm(a, b, out=out, bias=torch.zeros(128, device=device))
        case "impl":
            ds.fp8_gemm(a, b, out=out, impl="reference")
    assert straight[before:].count("dskernels::fp8_gemm") == 1


def test_forcing_and_explaining_reach_known_calls(straight, device):
    *_, (a, b, _) = gemm_twice(device)
    with ds.use_impl("reference"):
        assert ds.explain(ds.fp8_gemm, a, b)[0].impl == "reference"
        ds.fp8_gemm(a, b)
    assert [choice.operation for choice in ds.explain(ds.fp8_gemm, a, b)] == ["fp8_gemm"]
    if device == "cpu":
        with ds.use_impl("hopper"), pytest.raises(ValueError, match="impl='hopper' cannot run this"):
            ds.fp8_gemm(a, b)


def test_known_calls_raise_the_version_of_what_they_write(straight, device):
    *_, (a, b, _) = gemm_twice(device)
    out = torch.zeros(40, 128, device=device, dtype=torch.bfloat16)
    ds.fp8_gemm(a, b, out=out)
    before, n = out._version, len(straight)
    ds.fp8_gemm(a, b, out=out)
    assert len(straight) == n
    assert out._version > before


def test_gradients_flow_after_the_same_call_without(straight, device):
    x, weight = torch.randn(40, 256, device=device), torch.randn(128, 256, device=device)
    with torch.no_grad():
        for _ in range(2):
            ds.fp8_linear(x, weight)
    ds.fp8_linear(x, weight)
    x.requires_grad_()
    for _ in range(2):
        x.grad = None
        ds.fp8_linear(x, weight).sum().backward()
        assert x.grad is not None
    with torch.no_grad():
        for _ in range(2):
            assert not ds.fp8_linear(x, weight).requires_grad
    x.grad = None
    ds.fp8_linear(x, weight).sum().backward()
    assert x.grad is not None


def test_modes_and_the_profiler_see_known_calls(straight, device):
    x = torch.randn(40, 256, device=device)
    for _ in range(2):
        ds.quantize(x)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        ds.quantize(x)
    assert seen == ["dskernels.quantize.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:  # no CUPTI to wait for
        ds.quantize(x)
    assert "dskernels::quantize" in {event.key for event in profile.key_averages()}
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(ds.quantize(x).data, FakeTensor)


def test_numbers_are_converted_as_ever(straight, device):
    x, weight = torch.randn(40, 256, device=device), torch.randn(256, device=device)
    for eps in (1.0, 1.0, 1):
        y = ds.rmsnorm_quantize(x, weight, eps)
    want = ds.rmsnorm_quantize(x, weight, 1.0)
    assert torch.equal(y.data.float(), want.data.float())
    assert straight == ["dskernels::rmsnorm_quantize"] * 2  # the first, and the one with an integer


def test_one_tensor_for_two_arguments(straight, device):
    x = torch.randn(40, 256, device=device)
    for _ in range(3):
        a = ds.quantize(x)
        square = ds.fp8_gemm(a, a)
    assert straight.count("dskernels::fp8_gemm") == 1
    assert torch.equal(square, ds.fp8_gemm(a, ds.Fp8Tensor(a.data.clone(), a.scale)))


@pytest.mark.parametrize("seen_first", [True, False])
def test_a_negative_view_never_goes_straight(straight, device, seen_first):
    """A kernel reads what lies in memory, which is the other sign."""
    x = torch.randn(40, 256, device=device)
    want = ds.quantize(-x, impl="reference").data.float()
    if not seen_first:
        ds.quantize(x, impl="triton")
    for _ in range(3):
        assert torch.equal(ds.quantize(torch._neg_view(x), impl="triton").data.float(), want)


@pytest.mark.parametrize("shape", [(5, 7), (0, 7), (5, 0), (2, 3, 4), (6,), (), torch.Size((5, 7))])
def test_empty_is_new_empty(device, shape):
    like = torch.empty(3, device=device)
    got, want = empty(like, shape, torch.float16), like.new_empty(shape, dtype=torch.float16)
    assert (got.shape, got.stride(), got.dtype, got.device) == (want.shape, want.stride(), want.dtype, want.device)
    with torch.inference_mode():
        assert empty(like, shape, torch.float16).is_inference()


def test_empty_with_strides_and_in_a_mode(device):
    like = torch.empty(3, device=device)
    assert empty(like, (5, 2), torch.float32, (1, 8)).stride() == (1, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(empty(like, (5, 2), torch.float32), FakeTensor)


def test_a_gpu_that_is_too_old_runs_the_reference(monkeypatch):
    """Triton (3.7) compiles most kernels for sm_75 and ends in an error of ptxas for others."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device.capability.cache_clear()
    reason = choice.reason_of_device("triton", torch.device("cuda", 0), asked_for=False)
    assert reason == "Triton's kernels need sm_80 or newer, this GPU is sm_75"
    device.capability.cache_clear()


def test_an_amd_gpu_is_none_of_nvidias(monkeypatch):
    """Torch calls one of gfx90a "cuda" and its capability (9, 0), and gfx942 has (9, 4)."""
    monkeypatch.setattr(torch.version, "hip", "6.4")
    for numbers in ((9, 0), (9, 4)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, numbers=numbers: numbers)
        device.capability.cache_clear()
        where = torch.device("cuda", 0)
        assert device.capability(where) == (0, 0)
        assert choice.reason_of_device("hopper", where, asked_for=True) == "it needs an sm_90 GPU"
        assert portable.reason_against_e4m3(where) is None  # which Triton converts and multiplies without fnuz there
    device.capability.cache_clear()
