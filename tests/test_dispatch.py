"""Choice of implementation: what is asked for is obeyed or refused, and `explain` says why."""

import pytest
import torch

import dskernels as ds
from dskernels import dispatch


@pytest.fixture
def operands():
    return ds.quantize(torch.randn(4, 128)), ds.quantize(torch.randn(128, 128), (128, 128))


def test_cpu_tensors_run_the_reference_by_default(operands):
    (choice,) = ds.explain(ds.fp8_gemm, *operands)
    assert choice.operation == "fp8_gemm"
    assert choice.impl == "reference"
    assert "the tensors are on the CPU" in choice.rejected["triton"]


def test_explain_runs_nothing(operands):
    out = torch.full((4, 128), 7.0)
    ds.explain(ds.fp8_gemm, *operands, out=out)
    assert (out == 7).all()


def test_explain_follows_a_composite_operation(operands):
    choices = ds.explain(ds.fp8_linear, torch.randn(3, 128), operands[1])
    assert [choice.operation for choice in choices] == ["quantize", "fp8_gemm"]


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
