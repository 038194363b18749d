"""The expert block in two halves: rows and sums are those of `fused_experts`, forward and backward."""

import contextlib

import pytest
import torch

import dskernels as ds
from dskernels.later import Waiting, WeightGradients
from dskernels.moe import rows as moe_rows
from dskernels.moe.rows import ExpertRows, expert_rows, expert_rows_backward
from dskernels.types import Fp8Tensor, Routing

E, H, I, K = 4, 256, 128, 3
FIRST = 5


def problem(device, tokens, dtype):
    generator = torch.Generator().manual_seed(tokens)
    x, dout = (torch.randn(tokens, H, generator=generator).to(device, dtype) for _ in range(2))
    w13 = (torch.randn(E, 2 * I, H, generator=generator) / 16).to(device, dtype)
    w2 = (torch.randn(E, H, I, generator=generator) / 11).to(device, dtype)
    ids = torch.rand(tokens, E + 3, generator=generator).argsort(1)[:, :K].int().to(device) - 1  # some are dropped
    weights = torch.rand(tokens, K, generator=generator).to(device)
    return [x, w13, w2, weights], ids, dout


def whole(leaves, ids, dout, fp8, queue=None):
    """Output and gradients of `fused_experts`; with a queue those of the weights wait there, and come last."""
    x, w13, w2, weights = leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    none = ids.new_empty(0)
    with contextlib.nullcontext() if queue is None else queue.collecting():  # an empty queue is false
        out = ds.fused_experts(x, w13, w2, Routing(weights, ids, none, none), fp8=fp8, keep="fp8" if fp8 else "input")
    out.backward(dout)
    if queue is not None:
        assert len(queue)
        queue.take()()
    return out.detach(), [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("fp8", "tokens"), [(False, 9), (True, 9), (False, 900), (False, 0)])
@pytest.mark.parametrize("impl", ["reference", None])
def test_rows_and_sums_are_the_expert_block(device, impl, fp8, tokens):
    """Of 900 tokens the choices are too many to be compared with each other: they are counted."""
    if device == "cpu" and impl is None:
        pytest.skip("that is the reference")
    dtype = torch.float32 if impl == "reference" else torch.bfloat16
    leaves, ids, dout = problem(device, tokens, dtype)
    with ds.use_impl(impl):
        out, gradients = whole(leaves, ids, dout, fp8)
        x, w13, w2, weights = leaves
        options = dict(fp8=fp8, keep="fp8" if fp8 else "input")
        rows, index, kept = expert_rows(x, (w13, w2), ids + FIRST, first=FIRST, differentiable=True, **options)
        made = ExpertRows(rows, index, weights)
        assert torch.equal(made.sums(), out) or impl == "reference"  # which adds up expert by expert
        torch.testing.assert_close(made.sums(), out, rtol=1e-4, atol=1e-5)
        chosen = weights, ids + FIRST, FIRST
        found = expert_rows_backward(dout, x, (w13, w2), chosen, kept, fp8=fp8, needs=[True] * 4)
        found = [ExpertRows(found[0], index, None).sums(), *found[1:]]
        for got, want in zip(found, gradients, strict=True):
            assert torch.equal(got, want) or impl == "reference"
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        # In two halves, the second later.
        queue = WeightGradients()
        _, later = whole(leaves, ids, dout, fp8, queue)
        trained = [weight.clone().requires_grad_() for weight in (w13, w2)]
        waiting = Waiting(queue, trained)
        dx, *none, dweights = expert_rows_backward(
            dout, x, (w13, w2), chosen, kept, fp8=fp8, needs=[True] * 4, waiting=waiting
        )
        assert none == [None, None]
        queue.take()()
        halves = [ExpertRows(dx, index, None).sums(), *(weight.grad for weight in trained), dweights]
        # In one piece w * A is quantised where it is made, by another kernel: of 512 columns one had another scale,
        # which is 1.1e-3 of dW2's norm. An epsilon of bf16 is allowed.
        tolerance = 2**-8 if fp8 and impl is None else 1e-5
        for got, want, in_one in zip(halves, later, gradients, strict=True):
            assert torch.equal(got, want) or impl == "reference"
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            assert fp8 or impl == "reference" or torch.equal(got, in_one)
            assert torch.linalg.vector_norm(got - in_one) <= tolerance * torch.linalg.vector_norm(in_one)


@pytest.mark.parametrize("weighted", [True, False])
def test_sums_are_in_fp32_and_read_nothing_that_is_not_theirs(device, weighted):
    """Own rows, then what came, then the residual; rows of no choice, and memory that nobody sent to, are NaN."""
    tokens, rows, width = 37, 50, 1300
    generator = torch.Generator().manual_seed(0)
    y, came = (torch.full((n, width), float("nan")) for n in (rows, 40))
    index = torch.randint(-1, rows - 10, (tokens, 3), generator=generator).int()
    places = torch.randint(-1, 30, (tokens, 2), generator=generator).int()
    y[: rows - 10] = torch.randn(rows - 10, width, generator=generator)
    came[:30] = torch.randn(30, width, generator=generator)
    weights = torch.rand(tokens, 3, generator=generator) if weighted else None
    residual = torch.randn(tokens, width, generator=generator)
    y, came, residual = (part.bfloat16() for part in (y, came, residual))
    want = torch.zeros(tokens, width, dtype=torch.float64)
    for t in range(tokens):
        for j in range(3):
            if index[t, j] >= 0:
                want[t] += y[index[t, j]].double() * (weights[t, j].double() if weighted else 1)
        want[t] += sum(came[i].double() for i in places[t] if i >= 0) + residual[t].double()
    y, index, came, places, residual = (part.to(device) for part in (y, index, came, places, residual))
    made = ExpertRows(y, index, weights.to(device) if weighted else None)
    out = torch.full((tokens, width), float("nan"), dtype=torch.bfloat16, device=device)
    for impl in ("reference", "triton"):
        with ds.use_impl(impl):
            found = made.sums(came=came, places=places, residual=residual, out=out.clone())
            part = made.of(slice(5, 20)).sums(came=came, places=places[5:20], residual=residual[5:20])
            alone = made._replace(rows=y[:tokens], index=None, weights=None)
        error = (found.cpu().double() - want).abs()
        assert (error <= 2**-8 * want.abs() + 1e-6).all()
        assert torch.equal(part, found[5:20])
        assert alone.sums() is alone.rows
    first = dict(came=came, places=torch.arange(tokens, device=device, dtype=torch.int32)[:, None].contiguous() % 30)
    with ds.use_impl("triton"):
        y = torch.randn(tokens, width, device=device).bfloat16()
        found = ExpertRows(y, None, None).sums(**first)
    assert torch.equal(found, (y.float() + came[first["places"][:, 0].long()].float()).bfloat16())


def test_quantised_tokens_may_bring_their_scales_row_by_row(device):
    """As they come from another GPU."""
    if device == "cpu":
        pytest.skip("of the reference scales are what they are")
    (x, w13, w2, _), ids, _ = problem(device, 300, torch.bfloat16)
    quantized = ds.quantize(x)
    by_row = Fp8Tensor(quantized.data, quantized.scale.clone(memory_format=torch.contiguous_format))
    for impl in (None, "triton"):
        with ds.use_impl(impl):
            found = [expert_rows(x, (w13, w2), ids, quantized=q, fp8=True)[:2] for q in (None, quantized, by_row)]
        valid = found[0][1][found[0][1] >= 0].long()
        for rows, index in found[1:]:
            assert torch.equal(index, found[0][1])
            assert torch.equal(rows[valid], found[0][0][valid])


def test_fakes_have_the_shapes_of_the_reference():
    (x, w13, w2, weights), ids, dout = problem("cpu", 7, torch.float32)
    network = x, w13, None, w2, None
    rows, index, kept = moe_rows._expert_rows(*network, ids, 0, False, 1, None, None)
    block = *network, weights, ids, 0, kept, False
    calls = [
        (moe_rows._expert_rows, (*network, ids, 0, False, 1, None, None)),
        (moe_rows._backward, (dout, *block, [True, True, False, True])),
        (moe_rows._backward_inputs, (dout, *block)),
    ]
    for operation, arguments in calls:
        real, fake = operation(*arguments), operation.fake(*arguments)
        assert [(a.shape, a.dtype) for a in real] == [(a.shape, a.dtype) for a in fake]


def test_bad_arguments_name_themselves():
    (x, w13, w2, weights), ids, _ = problem("cpu", 5, torch.float32)
    rows, index, _ = expert_rows(x, (w13, w2), ids)
    made = ExpertRows(rows, index, weights)
    with pytest.raises(ValueError, match="places: expected with came"):
        made.sums(came=x)
    with pytest.raises(ValueError, match=r"residual: expected shape \[5, 256\]"):
        made.sums(residual=x[:3])
    with pytest.raises(TypeError, match="places: expected dtype int32"):
        made.sums(came=x, places=ids.long())
    with pytest.raises(ValueError, match="w13"):
        expert_rows(x, (w13[:, :, :8], w2), ids)
