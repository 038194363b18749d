"""Calls with a gradient that go straight to the implementation from the second of a kind on, as on a GPU: on the CPU.

Each is compared with what torch's dispatcher makes of it, through which the first call goes, and all that is unusual.
"""

import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dskernels as ds
from dskernels import dispatch
from dskernels.choice import OPERATIONS
from dskernels.gradients import Straight
from dskernels.later import WeightGradients
from dskernels.metadata import ByMetadata


@pytest.fixture
def counted(monkeypatch):
    """Calls on the CPU go straight as well; how many did so far."""
    calls = []
    apply = Straight.apply
    monkeypatch.setattr(dispatch, "_STRAIGHT_DEVICES", ("cpu",))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(Straight, "apply", lambda *inputs: (calls.append(1), apply(*inputs))[1])
    for operation in OPERATIONS.values():
        if operation._straight is not None:
            monkeypatch.setattr(operation, "_straight", ByMetadata())
    return calls


def offsets(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def rows(*shape):
    return torch.randn(shape).bfloat16()


def loss_of_choices(x):
    routing = ds.route(x, top_k=2, normalize=True)
    return routing.weights * torch.arange(1.0, 3.0)


CALLS = {
    "fp8_linear": (lambda x, w, b: ds.fp8_linear(x, w, b), (rows(9, 40), rows(24, 40), rows(24))),
    "fp8_linear, its input kept": (lambda x, w: ds.fp8_linear(x, w, keep="input"), (rows(9, 40), rows(24, 40))),
    "mla_prefill": (
        lambda q, k, v: ds.mla_prefill(q, k, v, offsets(4, 3), offsets(4, 3), scale=0.3),
        (torch.randn(7, 2, 24), torch.randn(7, 2, 24), torch.randn(7, 2, 16)),
    ),
    "merge_states": (ds.merge_states, (rows(5, 2, 8), torch.randn(2, 5), rows(5, 2, 8), torch.randn(2, 5))),
    "balance_loss": (
        lambda x: ds.balance_loss(x, top_k=2, alpha=0.1, sequence_lengths=torch.tensor([3, 4], dtype=torch.int32)),
        (torch.randn(7, 6),),
    ),
    "route": (loss_of_choices, (torch.randn(7, 6),)),
    "cross_entropy": (lambda x: ds.cross_entropy(x, torch.arange(7)), (torch.randn(7, 11),)),
    "grouped_gemm": (lambda a, b: ds.grouped_gemm(a, b, offsets(5, 4)), (rows(9, 40), rows(2, 24, 40))),
}


def results_and_gradients(function, inputs):
    outputs = function(*inputs)
    outputs = [x for x in (outputs if isinstance(outputs, tuple) else (outputs,)) if x.requires_grad]
    wanted = [x for x in inputs if x.requires_grad]
    weights = [torch.linspace(0.5, 1.5, x.numel()).view(x.shape).to(x.dtype) for x in outputs]
    return [x.detach() for x in outputs], torch.autograd.grad(outputs, wanted, weights, allow_unused=True)


def assert_same(got, want):
    for a, b in zip([*got[0], *got[1]], [*want[0], *want[1]], strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("name", CALLS)
def test_results_and_gradients_are_those_of_the_dispatcher(counted, monkeypatch, name):
    function, tensors = CALLS[name]
    for needed in ([True] * len(tensors), *[[i == j for j in range(len(tensors))] for i in range(len(tensors))]):
        drawn = [[torch.randn_like(x).requires_grad_(n) for x, n in zip(tensors, needed, strict=True)] for _ in "123"]
        before = len(counted)
        got = [results_and_gradients(function, inputs) for inputs in drawn]
        assert len(counted) > before
        with monkeypatch.context() as patched:
            patched.setattr(dispatch, "meets_autograd", lambda tensors: False)
            patched.setattr(dispatch, "_STRAIGHT_DEVICES", ())
            for operation in OPERATIONS.values():
                if operation._straight is not None:
                    patched.setattr(operation, "_straight", ByMetadata())
            n = len(counted)
            want = [results_and_gradients(function, inputs) for inputs in drawn]
            assert len(counted) == n
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)


def linear_calls(n=3):
    x, w = rows(9, 40).requires_grad_(), rows(24, 40).requires_grad_()
    for _ in range(n):
        want = results_and_gradients(ds.fp8_linear, (x, w))
    return x, w, want


def test_inside_of_checkpoints_and_hooks(counted):
    x, w, want = linear_calls()
    n = len(counted)
    got = results_and_gradients(lambda x, w: checkpoint(ds.fp8_linear, x, w, use_reentrant=False), (x, w))
    assert_same(got, want)
    assert len(counted) == n + 2  # forward, and forward again
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (seen.append(t), t.clone())[1], lambda t: t):
        got = results_and_gradients(ds.fp8_linear, (x, w))
    assert seen
    assert_same(got, want)


def test_what_is_not_the_same_goes_through_the_dispatcher(counted):
    x, w, want = linear_calls()
    n = len(counted)
    with torch.no_grad():
        assert torch.equal(ds.fp8_linear(x, w), want[0][0])
    assert not ds.fp8_linear(x.detach(), w.detach()).requires_grad
    with torch.inference_mode():
        assert torch.equal(ds.fp8_linear(x, w), want[0][0])

    def summed(x):
        return ds.fp8_linear(x, w.detach()).float().sum()

    for _ in range(2):
        assert torch.func.grad(summed)(x.detach()).shape == x.shape
    assert len(counted) == n
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(3):
            assert_same(results_and_gradients(ds.fp8_linear, (x, w)), want)


def test_a_gradient_of_the_gradient_is_refused(counted):
    x, w, _ = linear_calls()
    y = ds.fp8_linear(x, w)
    (dx,) = torch.autograd.grad(y.float().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the gradient of its gradient was asked for"):
        dx.float().sum().backward()
    assert counted


def test_a_graph_is_used_once_unless_it_is_retained(counted):
    x, w, _ = linear_calls()
    y = ds.fp8_linear(x, w).float().sum()
    first = torch.autograd.grad(y, (x, w), retain_graph=True)
    second = torch.autograd.grad(y, (x, w))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(y, (x, w))
    changed = ds.fp8_linear(x, w).float().sum()
    with torch.no_grad():
        w.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(changed, x)


def test_gradients_of_weights_that_wait(counted):
    x, w, want = linear_calls()
    queue = WeightGradients()
    with queue.collecting():
        y = ds.fp8_linear(x, w)
    y.backward(torch.linspace(0.5, 1.5, y.numel()).view(y.shape).to(y.dtype))
    assert w.grad is None
    queue.take()()
    assert torch.equal(x.grad, want[1][0])
    assert torch.equal(w.grad, want[1][1])


def test_a_weight_that_changed_is_quantised_anew(counted):
    x, w, _ = linear_calls()
    for _ in range(3):
        with torch.no_grad():
            w.mul_(1.5)
        fresh = w.detach().clone().requires_grad_()
        assert_same(results_and_gradients(ds.fp8_linear, (x, w)), results_and_gradients(ds.fp8_linear, (x, fresh)))


def test_threads(counted):
    x, w, want = linear_calls()
    results = []

    def work():
        for _ in range(20):
            results.append(results_and_gradients(ds.fp8_linear, (x, w)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 80
    for got in results:
        assert_same(got, want)


def test_arguments_are_refused_as_ever(counted):
    x, w, _ = linear_calls()
    with pytest.raises(ValueError, match="weight: expected 40 columns like x, got 39"):
        ds.fp8_linear(x, w[:, :39])
    with pytest.raises(TypeError, match="bias: expected"):
        ds.fp8_linear(x, w, torch.zeros(24, dtype=torch.int32))
    with pytest.raises(ValueError, match="impl"):
        ds.fp8_linear(x, w, impl="cuda")
    with torch.inference_mode():
        made = rows(9, 40)
    with pytest.raises(ValueError, match="x: expected a tensor that was not made in inference mode"):
        ds.fp8_linear(made, w, keep="input")
