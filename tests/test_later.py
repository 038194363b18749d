"""Gradients of weights that wait: the same numbers as at once, each product computed once, and nothing left behind."""

import pytest
import torch
import torch.nn.functional as F

import dskernels as ds
from dskernels import later
from dskernels.gemm import api as gemm
from dskernels.moe import split, triton_experts
from dskernels.types import Routing


def parameter(*shape):
    return torch.nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


def run(function, x, weights, dout, queue=None):
    """Output and gradients, those of the weights in a queue's own time where there is one."""
    for tensor in (x, *weights):
        tensor.grad = None
    if queue is None:
        out = function(x, *weights)
        out.backward(dout)
    else:
        with queue.collecting():
            out = function(x, *weights)
        out.backward(dout)
        assert all(weight.grad is None for weight in weights)
        assert len(queue) > 0
        queue.take()()
        assert len(queue) == 0
    return [out.detach(), x.grad, *(weight.grad for weight in weights)]


@pytest.mark.parametrize("operation", [F.linear, ds.fp8_linear], ids=["linear", "fp8_linear"])
def test_a_linear_layer(operation):
    x, dout = torch.randn(5, 256, requires_grad=True), torch.randn(5, 128)
    weights = [parameter(128, 256)]
    at_once = run(operation, x, weights, dout)
    waited = run(later.linear if operation is F.linear else operation, x, weights, dout, later.WeightGradients())
    assert all(torch.equal(a, b) for a, b in zip(at_once, waited, strict=True))


def test_a_linear_layer_does_each_product_once(monkeypatch):
    asked, backward = [], gemm._fp8_linear_backward

    def counted(*args, original=backward.composite, **kwargs):
        asked.append(args[-2:])
        return original(*args, **kwargs)

    monkeypatch.setattr(backward, "composite", counted)
    x, dout, weights = torch.randn(5, 128, requires_grad=True), torch.randn(5, 128), [parameter(128, 128)]
    run(ds.fp8_linear, x, weights, dout)
    run(ds.fp8_linear, x, weights, dout, later.WeightGradients())
    assert asked == [(True, True), (True, False), (False, True)]


def expert_block(device, impl, fp8):
    """The block as a function of its tokens and weights, with arguments: four experts, one idle, one choice dropped."""
    tokens, experts, hidden, inner = 6, 3, 32, 32
    weights = [parameter(experts, 2 * inner, hidden), parameter(experts, hidden, inner)]
    weights += [parameter(2 * inner, hidden), parameter(hidden, inner)]
    weights = [torch.nn.Parameter(weight.detach().to(device)) for weight in weights]
    x = torch.randn(tokens, hidden, device=device, requires_grad=True)
    gates = torch.rand(tokens, 2, device=device, requires_grad=True)
    ids = torch.tensor([[0, 2], [2, 0], [0, -1], [2, 2], [0, 2], [2, 0]], dtype=torch.int32, device=device)
    none = ids.new_empty(0)

    def block(x, w13, w2, s13, s2):
        routing = Routing(gates, ids, none, none)
        return ds.fused_experts(x, w13, w2, routing, shared=(s13, s2), fp8=fp8, impl=impl, recompute=False)

    return block, x, weights, gates, torch.randn(tokens, hidden, device=device)


@pytest.mark.parametrize(
    ("impl", "fp8"), [("reference", False), ("triton", True)], ids=["reference, fp32", "triton, fp8"]
)
def test_the_expert_block(impl, fp8, device):
    block, x, weights, gates, dout = expert_block(device, impl, fp8)
    gates.grad = None
    at_once = [*run(block, x, weights, dout), gates.grad]
    gates.grad = None
    waited = [*run(block, x, weights, dout, later.WeightGradients()), gates.grad]
    assert all(torch.equal(a, b) for a, b in zip(at_once, waited, strict=True))


@pytest.mark.parametrize("waits", [False, True])
def test_weights_that_change_unseen_are_quantised_anew_once_their_gradients_are_there(waits, device):
    block, x, weights, _, dout = expert_block(device, "triton", True)
    run(block, x, weights, dout, later.WeightGradients() if waits else None)
    for weight in weights:
        weight.data.mul_(1.5)
    assert torch.equal(block(x, *weights), block(x, *[weight.detach().clone() for weight in weights]))


def test_the_expert_block_does_each_product_once(device):
    block, x, weights, _, dout = expert_block(device, "triton", False)
    steps, counts = triton_experts.PLAIN, {"product": 0, "wgrad": 0}
    originals = {name: getattr(steps, name) for name in counts}

    def counting(name):
        def counted(*args):
            counts[name] += 1
            return originals[name](*args)

        return counted

    at_once = run(block, x, weights, dout)
    try:
        for name in counts:
            object.__setattr__(steps, name, counting(name))  # the operations hold this very object
        queue = later.WeightGradients()
        for weight in weights:
            weight.grad = None
        with queue.collecting():
            out = block(x, *weights)
        assert counts == {"product": 4, "wgrad": 0}  # w13 and w2, of the routed experts and of the shared one
        out.backward(dout)
        assert counts == {"product": 8, "wgrad": 0}
        queue.take()()
        assert counts == {"product": 8, "wgrad": 4}
        for weight, gradient in zip(weights, at_once[2:], strict=True):
            assert torch.equal(weight.grad, gradient)
    finally:
        for name, original in originals.items():
            object.__setattr__(steps, name, original)


def test_registration(device):
    tokens, hidden = 4, 16
    x, dout = torch.randn(tokens, hidden, device=device), torch.randn(tokens, hidden, device=device)
    w13, w2 = torch.randn(2, 2 * hidden, hidden, device=device), torch.randn(2, hidden, hidden, device=device)
    ids = torch.randint(0, 2, (tokens, 2), dtype=torch.int32, device=device)
    gates = torch.rand(tokens, 2, device=device)
    shared = [w13[0], None, w2[0], None]
    rows, of_shared = torch.randn(2 * tokens, 2 * hidden, device=device), torch.randn(tokens, 2 * hidden, device=device)
    block = [dout, x, w13, None, w2, None, gates, ids, *shared, rows, of_shared]
    kept = split.backward_inputs(*block, False)[2:]
    which = ("test_schema", "test_faketensor")  # they have no gradient, and nobody compiles them
    torch.library.opcheck(split.backward_inputs.overload, (*block, False), test_utils=which)
    weights = (*block, *kept, False, [True, True, False, True])
    torch.library.opcheck(split.backward_weights.overload, weights, test_utils=which)


def test_gradients_add_up_and_only_parameters_wait():
    queue, weight = later.WeightGradients(), parameter(8, 16)
    x = torch.randn(4, 16, requires_grad=True)
    with queue.collecting():
        first, second = later.linear(x, weight), later.linear(x, weight)
        made = later.linear(x, weight * 2)  # not a parameter: its gradient belongs to the graph
    (first.sum() + second.sum()).backward()
    later_gradients = queue.take()
    made.sum().backward()
    assert len(queue) == 0
    after_graph = weight.grad.clone()
    later_gradients()
    one = torch.ones(4, 8).T @ x.detach()
    torch.testing.assert_close(after_graph, 2 * one)
    torch.testing.assert_close(weight.grad, 4 * one)
    later_gradients()  # nothing is left in it
    torch.testing.assert_close(weight.grad, 4 * one)
