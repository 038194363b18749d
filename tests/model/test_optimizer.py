"""AdamW on masters: against the formula with the moments rounded as they are kept, in pieces, and left out."""

import pytest
import torch
from torch import nn

import dskernels as ds
from dskernels.model import optimizer as module
from dskernels.model.optimizer import MasterAdamW, clipping

BETAS, DECAY, RATE = (0.9, 0.95), 0.1, 1e-2


def layers(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).to(dtype)


def draw_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_updates_are_those_of_the_formula(moments, impl, device):
    """In fp64, with both moments rounded to the dtype that they are kept in after each step."""
    with ds.use_impl(impl):
        _updates_are_those_of_the_formula(moments, device)


def _updates_are_those_of_the_formula(moments, device):
    model = layers(torch.bfloat16).to(device)
    optimizer = MasterAdamW(model, betas=BETAS, weight_decay=DECAY, moments=moments)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(w) for name, w in weights.items()}
    v = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 9):
        draw_gradients(model, step)
        gradients = {name: p.grad.double() for name, p in model.named_parameters()}
        optimizer.collect()
        norm = optimizer.norm()
        assert norm.item() == pytest.approx(sum(g.square().sum().item() for g in gradients.values()) ** 0.5, rel=1e-5)
        optimizer.step(RATE, clipping(norm, 2.0))
        factor = min(1.0, 2.0 / norm.item())
        for name, w in weights.items():
            g = gradients[name] * factor
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g * g
            if w.dim() > 1:
                w *= 1 - RATE * DECAY
            w -= RATE * (m[name] / (1 - BETAS[0] ** step)) / ((v[name] / (1 - BETAS[1] ** step)).sqrt() + 1e-8)
            m[name], v[name] = m[name].to(moments).double(), v[name].to(moments).double()
    assert optimizer.exp_avg.dtype == optimizer.exp_avg_sq.dtype == moments
    assert optimizer.steps == 8
    # A moment on the edge of two bf16 numbers may fall to either side; an update is at most about RATE.
    tolerance = 2e-6 if moments == torch.float32 else RATE * 2.0**-8
    for name, master in optimizer.named(optimizer.flat).items():
        assert (master - weights[name]).abs().max() < tolerance, name
        assert torch.equal(model.get_parameter(name), master.bfloat16())


def test_bf16_moments_end_where_fp32_ones_do():
    """Noisy gradients towards a target: both arrive, at the same distance within a few percent."""
    distances = []
    for moments in (torch.float32, torch.bfloat16):
        model = nn.Linear(16, 16, bias=False)
        generator = torch.Generator().manual_seed(1)
        target = torch.randn(16, 16, generator=generator)
        optimizer = MasterAdamW(model, betas=BETAS, weight_decay=0.0, moments=moments)
        for step in range(150):
            noise = torch.randn(16, 16, generator=generator)
            model.weight.grad = model.weight.detach() - target + 0.3 * noise
            optimizer.collect()
            optimizer.step(0.06 * (1 - step / 150))
        distances.append((model.weight - target).norm().item() / target.norm().item())
    assert distances[0] < 0.05
    assert distances[1] == pytest.approx(distances[0], rel=0.05)


def test_pieces_give_the_same_bits(monkeypatch):
    states = []
    for piece in (1 << 25, 4):
        monkeypatch.setattr(module, "PIECE", piece)
        model = layers(torch.bfloat16)
        optimizer = MasterAdamW(model, betas=BETAS, weight_decay=DECAY, moments=torch.bfloat16)
        for step in range(3):
            draw_gradients(model, step)
            optimizer.collect()
            optimizer.step(RATE)
        states.append((optimizer.flat, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_that_is_left_out_changes_nothing(dtype, impl, device):
    with ds.use_impl(impl):
        _a_step_that_is_left_out_changes_nothing(dtype, device)


def _a_step_that_is_left_out_changes_nothing(dtype, device):
    model = layers(dtype).to(device)
    optimizer = MasterAdamW(model, betas=BETAS, weight_decay=DECAY, moments=torch.bfloat16)
    draw_gradients(model, 0)
    optimizer.collect()
    optimizer.step(RATE)
    kept = optimizer.flat, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.steps, *model.parameters()
    before = [tensor.detach().clone() for tensor in kept]
    draw_gradients(model, 1)
    model[0].weight.grad[0, 0] = torch.nan
    optimizer.collect()
    assert optimizer.norm().isnan()
    optimizer.step(RATE, clipping(optimizer.norm(), 1.0), torch.ones((), device=device))
    for tensor, was in zip(kept, before, strict=True):
        assert torch.equal(tensor, was)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_gradients_are_added_up_in_fp32(impl, device, monkeypatch):
    """Large ones, small ones, one that does not lie in order, one that is not there."""
    monkeypatch.setattr(module, "LARGE", 12)
    model = layers(torch.bfloat16).to(device)
    optimizer, wanted = MasterAdamW(model, betas=BETAS, weight_decay=DECAY), {}
    optimizer._gradient.fill_(torch.nan)
    for step in range(3):
        draw_gradients(model, step)
        model[0].weight.grad = model[0].weight.grad.T.contiguous().T
        model[1].bias.grad = None
        for name, parameter in model.named_parameters():
            gradient = torch.zeros(3, device=device) if parameter.grad is None else parameter.grad.float()
            wanted[name] = wanted.get(name, 0) + gradient
        with ds.use_impl(impl):
            optimizer.collect()
    for name, gradient in optimizer.gradients().items():
        assert torch.equal(gradient, wanted[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters_follow_their_masters_and_their_version_tells(dtype):
    """Quantised weights are kept until the version of a parameter changes."""
    model = layers(dtype)
    optimizer = MasterAdamW(model, betas=BETAS, weight_decay=DECAY)
    before = model[0].weight.detach().clone()
    version = model[0].weight._version
    draw_gradients(model, 0)
    optimizer.collect()
    optimizer.step(RATE)
    assert model[0].weight._version > version
    after = model[0].weight.detach().clone()
    assert not torch.equal(after, before)
    version = model[0].weight._version
    with optimizer.replaced(torch.zeros_like(optimizer.flat)):
        assert not model[1].bias.any()
        assert model[0].weight._version > version
    assert torch.equal(model[0].weight, after)


def test_a_parameter_without_a_gradient_has_one_of_zeros():
    model = layers(torch.bfloat16)
    optimizer = MasterAdamW(model, betas=BETAS, weight_decay=0.0)
    draw_gradients(model, 0)
    optimizer.collect()
    optimizer.step(RATE)
    draw_gradients(model, 1)
    model[1].weight.grad = None
    optimizer.collect()
    assert not optimizer.gradients()["1.weight"].any()
    assert optimizer.gradients()["0.weight"].any()
