"""The shared expert where it lies behind the routed ones in memory: one more of them, in their launches."""

import pytest
import torch

import dskernels as ds
from dskernels.moe import experts as flow


@pytest.mark.parametrize("fp8", [False, True])
def test_a_shared_expert_behind_the_routed_ones_is_one_of_them(device, fp8, monkeypatch):
    """It shares their launches, where nothing is kept; an id that is its number in the stack is still dropped."""
    experts, n_experts = torch.tensor([[0, 2], [2, -1], [3, 0], [1, 3], [-1, -1]], device=device), 3
    all_w13 = torch.randn(n_experts + 1, 2 * 40, 136, device=device) * 136**-0.5
    all_w2 = torch.randn(n_experts + 1, 136, 40, device=device) * 40**-0.5
    x, weights = torch.randn(5, 136, device=device), torch.rand(5, 4, device=device)[:, 1:3]
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
