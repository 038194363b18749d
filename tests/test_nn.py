"""Modules on the operations: names of their state dicts, and outputs and gradients against plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

import dskernels as ds
from dskernels.nn import Fp8Linear, LatentAttention, MoE, Router, convert_linear_to_fp8

HIDDEN, INNER, EXPERTS = 64, 32, 8


@pytest.mark.parametrize("keep", [False, True])
def test_fp8_linear_is_fp8_linear(keep):
    torch.manual_seed(0)
    plain = nn.Linear(200, 136)
    layer = Fp8Linear(200, 136, keep=keep)
    layer.load_state_dict(plain.state_dict(), strict=not keep)
    x = torch.randn(3, 5, 200)
    weight = ds.quantize(plain.weight.detach(), (128, 128)) if keep else plain.weight
    assert torch.equal(layer(x), ds.fp8_linear(x, weight, plain.bias))
    assert (layer(x) - plain(x)).norm() < 0.06 * plain(x).norm()
    names = {"weight", "bias"} | ({"weight_scale_inv"} if keep else set())
    assert layer.state_dict().keys() == names


def test_kept_weights_survive_casts_and_checkpoints():
    layer = Fp8Linear(256, 130, bias=False, keep=True)
    x = torch.randn(4, 256)
    expected = layer(x)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert state["weight"].dtype == torch.float8_e4m3fn
    assert state["weight_scale_inv"].shape == (2, 2)
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn
    assert layer.weight_scale_inv.dtype == torch.float32
    other = Fp8Linear(256, 130, bias=False, keep=True)
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_fp8_linear_learns():
    torch.manual_seed(0)
    layer, x = Fp8Linear(128, 128), torch.randn(16, 128, requires_grad=True)
    layer(x).square().sum().backward()
    plain = nn.Linear(128, 128)
    plain.load_state_dict(layer.state_dict())
    y = x.detach().requires_grad_()
    plain(y).square().sum().backward()
    for got, expected in ((x.grad, y.grad), (layer.weight.grad, plain.weight.grad), (layer.bias.grad, plain.bias.grad)):
        assert (got - expected).norm() < 0.1 * expected.norm()


def test_only_modules_are_converted():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got Tensor"):
        convert_linear_to_fp8(torch.zeros(1))


def test_convert_linear_to_fp8():
    class Derived(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128)),
            "small": nn.Linear(64, 256),
            "derived": Derived(128, 128),
            "lm_head": nn.Linear(128, 300),
        }
    ).eval()
    parameters = dict(model.named_parameters())
    kept = copy.deepcopy(model)
    assert convert_linear_to_fp8(model) == ["a.0", "a.1"]
    assert type(model["a"][0]) is Fp8Linear
    assert not model["a"][0].training
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert convert_linear_to_fp8(kept, lambda name, linear: name != "lm_head", keep=True) == ["a.0", "a.1", "small"]
    assert kept["small"].weight.dtype == torch.float8_e4m3fn
    x = torch.randn(2, 128)
    assert torch.equal(kept["a"](x), model["a"](x))


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_router(score):
    router = Router(HIDDEN, EXPERTS, 3, n_groups=4, top_groups=2, score=score, scale=2.5)
    x = torch.randn(7, HIDDEN)
    routing, logits = router(x)
    again = ds.route(logits, router.e_score_correction_bias, top_k=3, n_groups=4, top_groups=2, score=score, scale=2.5)
    assert torch.equal(routing.experts, again.experts)
    names = {"weight", "e_score_correction_bias"} if score == "sigmoid" else {"weight"}
    assert router.state_dict().keys() == names


@pytest.mark.parametrize("fp8", [False, True])
def test_moe(fp8):
    """Against experts one by one, whose checkpoint it loads."""
    torch.manual_seed(0)
    moe = MoE(HIDDEN, INNER, EXPERTS, 3, n_shared=2, fp8=fp8)
    names = [f"experts.{i}.{part}_proj.weight" for i in range(EXPERTS) for part in ("gate", "up", "down")]
    sizes = {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    state = {name: 0.2 * torch.randn(sizes[name.split(".")[2].removesuffix("_proj")]) for name in names}
    others = {name: tensor for name, tensor in moe.state_dict().items() if not name.startswith("experts.")}
    moe.load_state_dict({**state, **others})
    x = torch.randn(2, 5, HIDDEN, requires_grad=True)
    out = moe(x)

    def network(x, prefix, weights):
        gate, up, down = (weights[f"{prefix}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    tokens = x.reshape(-1, HIDDEN)
    expected = network(tokens, "shared_experts", others)
    for j in range(3):
        routed = [
            network(t, f"experts.{e}", state) for t, e in zip(tokens, moe.routing.experts[:, j].tolist(), strict=True)
        ]
        expected = expected + moe.routing.weights[:, j : j + 1] * torch.stack(routed)
    if fp8:
        assert (out.reshape(-1, HIDDEN) - expected).norm() < 0.1 * expected.norm()
    else:
        torch.testing.assert_close(out.reshape(-1, HIDDEN), expected, rtol=0, atol=1e-5)
    (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sum(), x)
    assert (grad - wanted).norm() < (0.2 if fp8 else 1e-5) * wanted.norm()
    assert moe.logits.shape == (10, EXPERTS)


def test_latent_attention():
    """A prompt at once, against its pieces over a cache: extended, then absorbed."""
    torch.manual_seed(0)
    sizes = {"kv_rank": 32, "nope": 16, "rope": 8, "value": 16}
    attention = LatentAttention(HIDDEN, 4, q_rank=24, **sizes)
    x = torch.randn(20, HIDDEN, requires_grad=True)
    angles = torch.arange(10)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    cos, sin = (f(angles).repeat(2, 1) for f in (torch.cos, torch.sin))
    cu = torch.tensor([0, 10, 20], dtype=torch.int32)
    expected = attention(x, cos, sin, cu)
    expected.sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in attention.parameters())

    cache = torch.full((4, 8, 40), torch.nan)
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
    rows = x.detach().view(2, 10, HIDDEN)
    got = []
    for begin, end, absorb in ((0, 6, False), (6, 9, False), (9, 10, True)):
        new = end - begin
        positions = torch.arange(begin, end).repeat(2)
        pages = table.repeat_interleave(new, 0)[torch.arange(2 * new), positions // 8]
        out = attention(
            rows[:, begin:end].reshape(-1, HIDDEN),
            cos[positions],
            sin[positions],
            torch.tensor([0, new, 2 * new], dtype=torch.int32),
            cache=cache,
            slots=pages.long() * 8 + positions % 8,
            block_table=table,
            lengths=torch.full((2,), end, dtype=torch.int32),
            absorb=absorb,
        )
        got.append(out.view(2, new, HIDDEN))
    torch.testing.assert_close(torch.cat(got, 1).reshape(20, HIDDEN), expected.detach(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="slots: expected them with a cache"):
        attention(x, cos, sin, cu, cache=cache)
    with pytest.raises(ValueError, match="block_table: expected a cache and lengths"):
        attention(x, cos, sin, cu, block_table=table)
    names = {f"{name}.weight" for name in ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa")}
    names |= {f"{name}.weight" for name in ("kv_a_layernorm", "kv_b_proj", "o_proj")}
    assert attention.state_dict().keys() == names
