"""The shared expert where it lies behind the routed ones in memory: one more of them, in their launches."""

import pytest
import torch

import dskernels as ds
from dskernels.moe import experts as flow


@pytest.mark.parametrize("fp8", [False, True])
def test_a_shared_expert_behind_the_routed_ones_is_one_of_them(device, fp8, monkeypatch):
    """It shares their launches, where nothing is kept; an id that is its number in the stack is still dropped."""
    experts, n_experts = torch.tensor([[0, 2], [2, -1], [3, 0], [1, 3], [-1, -1]], device=device).repeat(2, 1), 3
    all_w13 = torch.randn(n_experts + 1, 2 * 40, 136, device=device) * 136**-0.5
    all_w2 = torch.randn(n_experts + 1, 136, 40, device=device) * 40**-0.5
    # Ten tokens: up to eight have kernels of their own.
    x, weights = torch.randn(10, 136, device=device), torch.rand(10, 4, device=device)[:, 1:3]
    routing = ds.Routing(weights, experts, experts, experts)
    if fp8:
        all_w13, all_w2 = ds.quantize(all_w13, (128, 128)), ds.quantize(all_w2, (128, 128))

    def part(stack, which):
        return ds.Fp8Tensor(stack.data[which], stack.scale[which], stack.block) if fp8 else stack[which]

    def alone(weight):
        return ds.Fp8Tensor(weight.data.clone(), weight.scale.clone(), weight.block) if fp8 else weight.clone()

    routed = [part(stack, slice(n_experts)) for stack in (all_w13, all_w2)]
    behind = tuple(part(stack, n_experts) for stack in (all_w13, all_w2))
    elsewhere = tuple(alone(weight) for weight in behind)
    products = []
    monkeypatch.setattr(flow, "_up", lambda *args, up=flow._up: products.append(args) or up(*args))
    got = ds.fused_experts(x, *routed, routing, shared=behind, impl="triton")
    assert len(products) == 1
    want = ds.fused_experts(x, *routed, routing, shared=elsewhere, impl="triton")
    assert len(products) == 3
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(got[4], want[4])  # the shared expert's alone
    if not fp8:  # weights that are quantised inside are kept one by one
        ds.fused_experts(x, *routed, routing, shared=behind, fp8=True, impl="triton")
        assert len(products) == 5


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_last_experts_of_the_stack_are_shared(device, fp8, impl):
    """Two of them are a network twice as wide: half of its gate, of its up, and of the columns that follow each."""
    n_experts, inner, width = 3, 128, 136
    experts = torch.tensor([[0, 2], [2, -1], [3, 0], [1, 4], [-1, -1]], device=device)
    w13 = torch.randn(n_experts + 2, 2 * inner, width, device=device) * width**-0.5
    w2 = torch.randn(n_experts + 2, width, inner, device=device) * inner**-0.5
    x, weights = torch.randn(5, width, device=device), torch.rand(5, 2, device=device)
    routing = ds.Routing(weights, experts, experts, experts)
    gate, up = w13[n_experts:].chunk(2, 1)
    wide = torch.cat([*gate, *up]), torch.cat([*w2[n_experts:]], 1)
    routed = w13[:n_experts], w2[:n_experts]
    if fp8:
        w13, w2 = (ds.quantize(weight, (128, 128)) for weight in (w13, w2))
        routed, wide = (tuple(ds.quantize(weight, (128, 128)) for weight in pair) for pair in (routed, wide))
    want = ds.fused_experts(x, *routed, routing, shared=wide, impl=impl)
    got = ds.fused_experts(x, w13, w2, routing, n_shared=2, impl=impl)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    if fp8:  # quantised by another operation, x itself is not looked at
        again = ds.fused_experts(
            torch.full_like(x, torch.nan), w13, w2, routing, n_shared=2, quantized=ds.quantize(x), impl=impl
        )
        torch.testing.assert_close(again, got, rtol=1e-5, atol=1e-6)


def test_shared_experts_of_the_stack_get_gradients(device):
    experts = torch.tensor([[0, 1], [1, -1], [2, 0]], device=device)
    w13, w2 = torch.randn(4, 64, 48, device=device) * 48**-0.5, torch.randn(4, 48, 32, device=device) * 32**-0.5
    x, weights = torch.randn(3, 48, device=device), torch.rand(3, 2, device=device)
    gradients = []
    for n_shared in (1, 0):
        leaves = [t.clone().requires_grad_() for t in (x, w13, w2, weights)]
        a, up, down, w = leaves
        routing = ds.Routing(w, experts, experts, experts)
        if n_shared:
            out = ds.fused_experts(a, up, down, routing, n_shared=1, quantized=ds.quantize(x), impl="triton")
        else:
            out = ds.fused_experts(a, up[:3], down[:3], routing, shared=(up[3], down[3]), impl="reference")
        gradients.append(torch.autograd.grad(out.square().sum(), leaves))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
