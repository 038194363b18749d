"""Recorded calls within what else torch does: modules that are copied, saved and moved, `torch.compile`, modes, forks,
results that are the next call's arguments, views of one tensor; and what memory they take.

Calls in random other ways: `make soak ARGS=--ways`.
"""

import copy
import gc
import io
import os
import sys
from unittest import mock

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dskernels as ds
from dskernels import nn, recording
from dskernels.metadata import ByMetadata

pytestmark = pytest.mark.gpu
BRAIN = torch.bfloat16


def draw(*shape):
    return torch.randn(shape, device="cuda", dtype=BRAIN)


def block(tokens):
    """Arguments of fused_experts in e4m3."""
    w13, w2 = (ds.quantize(draw(*shape) / shape[-1] ** 0.5, (128, 128)) for shape in ((16, 256, 256), (16, 256, 128)))
    ids = torch.rand(tokens, 16, device="cuda").topk(4).indices.int()
    return draw(tokens, 256), w13, w2, ds.Routing(torch.rand(tokens, 4, device="cuda"), ids, ids, ids)


def as_written(function):
    """What a call gives with nothing recorded."""
    with (
        mock.patch.object(recording, "may_be_recorded", return_value=False),
        mock.patch.object(ds.fp8_linear.known, "kinds", ByMetadata()),
        mock.patch.object(ds.fused_experts.known, "kinds", ByMetadata()),
    ):
        return function()


@torch.no_grad()
def test_modules_that_are_copied_saved_loaded_and_moved():
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256, bias=False) for _ in range(2))).to("cuda", BRAIN)
    assert len(nn.convert_linear_to_fp8(model)) == 2
    x = draw(40, 256)

    def right(model):
        want = as_written(lambda: model(x))
        assert all(torch.equal(model(x), want) for _ in range(4))
        return want

    first = right(model)
    other = copy.deepcopy(model)
    for weight in other.parameters():
        weight.mul_(2)
    assert not torch.equal(right(other), first)
    assert torch.equal(right(model), first)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    assert torch.equal(right(torch.load(file, weights_only=False)), right(other))
    model.load_state_dict(other.state_dict())
    assert torch.equal(right(model), right(other))
    model.load_state_dict({name: weight / 2 for name, weight in other.state_dict().items()}, assign=True)
    assert torch.equal(right(model), first)
    model.cpu().cuda()
    assert torch.equal(right(model), first)
    torch.nn.utils.vector_to_parameters(3 * torch.nn.utils.parameters_to_vector(model.parameters()), model.parameters())
    right(model)
    for weight in model.parameters():
        ds.fp8_linear(x, weight.data)
        alias = weight.data
        ds.fp8_linear(x, alias)
        alias.mul_(2)
        assert torch.equal(ds.fp8_linear(x, alias), ds.fp8_linear(x, alias.clone()))


def test_a_model_that_is_trained_between():
    model = torch.nn.Sequential(torch.nn.Linear(256, 256, bias=False)).to("cuda", BRAIN)
    nn.convert_linear_to_fp8(model)
    x = draw(40, 256)
    for _ in range(4):
        model(x).square().sum().backward()
        with torch.no_grad():
            for weight in model.parameters():
                weight -= 0.1 * weight.grad / weight.grad.abs().max()
                weight.grad = None
            assert torch.equal(model(x), as_written(lambda: model(x)))


@torch.no_grad()
def test_inside_of_what_torch_has_around_it():
    args = block(40)
    for _ in range(4):
        out = ds.fused_experts(*args)

    compiled = torch.compile(
        lambda x, r: 1 * ds.fused_experts(1 * x, *args[1:3], r), fullgraph=True, backend="aot_eager"
    )
    assert all(torch.equal(compiled(args[0], args[3]), out) for _ in range(3))
    want = ds.quantize(args[0]).data.view(torch.uint8)
    replayed = torch.compile(lambda x: ds.quantize(1 * x)[0].view(torch.uint8), mode="reduce-overhead")
    for _ in range(5):
        assert torch.equal(replayed(args[0]), want)
        assert torch.equal(ds.quantize(args[0]).data.view(torch.uint8), want)
    assert torch.equal(make_fx(lambda x: ds.quantize(x)[0])(args[0])(args[0]).view(torch.uint8), want)
    with torch.profiler.profile():
        assert torch.equal(ds.fused_experts(*args), out)
    with torch.autocast("cuda"):
        assert torch.equal(ds.fused_experts(*args), out)
    with FlopCounterMode(display=False):
        assert torch.equal(ds.fused_experts(*args), out)
    with torch.device("cuda"):
        assert torch.equal(ds.fused_experts(*args), out)
    assert torch.equal(ds.fused_experts(*args), out)


@torch.no_grad()
def test_results_as_arguments_and_views_of_one_tensor():
    x, weight = draw(64, 512), draw(512, 512) / 23
    for _ in range(4):
        y = z = x
        for _ in range(6):
            y = ds.fp8_linear(y, weight)
        for _ in range(6):
            z = as_written(lambda z=z: ds.fp8_linear(z, weight))
        assert torch.equal(y, z)
    whole = draw(400, 512)
    views = [whole[i : i + 64] for i in range(0, 300, 7)] + [whole[:64, i : i + 256] for i in range(0, 200, 8)]
    for view in views:
        got, want = ds.quantize(view), ds.quantize(view.clone(), impl="reference")
        assert torch.equal(got.data.view(torch.uint8), want.data.view(torch.uint8))


@torch.no_grad()
def test_a_fork_of_what_has_recorded():
    """The child says that it cannot; the parent goes on."""
    args = block(40)
    for _ in range(4):
        out = ds.fused_experts(*args)
    torch.cuda.synchronize()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            ds.fused_experts(*args)
        except RuntimeError as error:
            os._exit(0 if "CUDA" in str(error) or "cu" in str(error) else 2)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(ds.fused_experts(*args), out)


@torch.no_grad()
def test_many_kinds_of_calls_take_no_memory_of_torchs(monkeypatch):
    """Each number of tokens is a kind of its own. What a recording keeps is on the host, and the driver's."""
    monkeypatch.setattr(ds.fused_experts.known, "kinds", ByMetadata())
    _, w13, w2, _ = block(1)
    gc.collect()
    before = torch.cuda.memory_allocated()
    for tokens in range(20, 60):
        x, _, _, routing = block(tokens)
        for _ in range(3):
            ds.fused_experts(x, w13, w2, routing)
    del x, routing
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 1 << 20
