"""Gradients beyond plain autograd: transforms of `torch.func`, operations that have none, autocast."""

import warnings

import pytest
import torch

import dskernels as ds

# Maps over examples run the operation once for each, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.fixture
def layer(device):
    x, weight = torch.randn(5, 256, device=device), torch.randn(128, 256, device=device)

    def loss(weight, x=x):
        return ds.fp8_linear(x, weight).square().sum()

    return x, weight, loss


def gradient(loss, weight, *rest):
    weight = weight.clone().requires_grad_()
    return torch.autograd.grad(loss(weight, *rest), weight)[0]


def test_functional_gradients_have_the_bits_of_autograds(layer):
    x, weight, loss = layer
    want = gradient(loss, weight)
    assert torch.equal(torch.func.grad(loss)(weight), want)
    value, pullback = torch.func.vjp(loss, weight)
    assert torch.equal(pullback(torch.ones_like(value))[0], want)
    module = torch.nn.Linear(256, 128, bias=False)
    module.forward = lambda x: ds.fp8_linear(x, module.weight)

    def of_module(parameters):
        return torch.func.functional_call(module, parameters, (x,)).square().sum()

    assert torch.equal(torch.func.grad(of_module)({"weight": weight})["weight"], want)
    assert torch.equal(
        torch.func.grad(lambda w: torch.vmap(lambda x: ds.fp8_linear(x, w))(x[None]).square().sum())(weight), want
    )


def test_gradients_of_each_example_and_jacobians(layer):
    x, weight, loss = layer
    examples = torch.stack([x, -2 * x, x.flip(0)])
    got = torch.vmap(torch.func.grad(loss), (None, 0))(weight, examples)
    assert all(torch.equal(one, gradient(loss, weight, x)) for one, x in zip(got, examples, strict=True))
    out, lse = torch.randn(2, 1, 3, 8, device=x.device), torch.randn(2, 3, 1, device=x.device)

    def merged(out):
        return ds.merge_states(out[0], lse[0], out[1], lse[1])[0]

    assert torch.allclose(torch.func.jacrev(merged)(out), torch.autograd.functional.jacobian(merged, out))


def test_what_a_transform_cannot_differentiate_raises(layer):
    """Zeros, or a part of it, would be the answer otherwise."""
    x, weight, loss = layer
    with pytest.raises(NotImplementedError, match="fp8_linear_backward has no gradient"):
        torch.func.grad(lambda w: torch.func.grad(loss)(w).square().sum())(weight)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(loss, (weight,), (weight,))
    with pytest.raises(NotImplementedError, match="quantize has no gradient"):
        torch.func.grad(lambda x: ds.quantize(x).dequantize().sum())(x)


def test_operations_without_a_gradient_say_so_by_every_implementation(device):
    """By the reference autograd differentiated what it is made of; by kernels it went on with None."""
    x, weight = torch.randn(5, 256, device=device, requires_grad=True), torch.randn(128, 256, device=device)
    for impl in ("reference", "triton"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            quantized = ds.quantize(x, impl=impl)
            product = ds.fp8_gemm(quantized, ds.quantize(weight, (128, 128)), impl=impl)
            with pytest.raises(NotImplementedError, match=r"quantize has no gradient: call it under torch\.no_grad"):
                quantized.dequantize().sum().backward()
            with pytest.raises(NotImplementedError, match="fp8_gemm has no gradient"):
                (x[:, :128] + product).sum().backward()
    assert x.grad is None
    with torch.no_grad():
        assert not ds.quantize(x).scale.requires_grad
    assert not ds.quantize(x.detach()).scale.requires_grad


def test_autocast_has_no_say(device):
    """What an operation computes in its arguments say; products of torch's inside it were in bf16."""
    x, weight = torch.randn(5, 256, device=device, requires_grad=True), torch.randn(64, 256, device=device)

    def both():
        y = ds.fp8_linear(x, weight), ds.route_hidden(x, weight, top_k=4)[0].weights
        return *y, *torch.autograd.grad([one.square().sum() for one in y], x)

    wants = both()
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        for _ in range(3):
            assert all(torch.equal(got, want) for got, want in zip(both(), wants, strict=True))
