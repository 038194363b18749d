"""Halves of the expert block whose calls are recorded, bit for bit those as they are written, on a GPU."""

import pytest
import torch

from dskernels import recording
from dskernels.later import Waiting, WeightGradients
from dskernels.metadata import ByMetadata
from dskernels.moe import rows as moe_rows
from dskernels.moe.rows import ExpertRows, expert_rows, expert_rows_backward
from test_recording_hopper import is_recorded

FUNCTIONS = ("expert_rows", "_sums", "_gradients", "_gradients_of_inputs", "_gradients_of_weights")
E, H, I, K, FIRST = 8, 256, 128, 4, 3


def forget(monkeypatch):
    """Nothing is known of any call."""
    for name in FUNCTIONS:
        monkeypatch.setattr(getattr(moe_rows, name).known, "kinds", ByMetadata())


def layer(x, dout, gates, ids, came, weights, fp8):
    """All halves, and both ways to sum; what a step of a parallel layer calls."""
    places = (torch.arange(x.shape[0], device="cuda", dtype=torch.int32)[:, None] - 5) % 11
    options = {"fp8": fp8, "keep": "fp8" if fp8 else "input"}
    rows, index, kept = expert_rows(x, weights, ids, first=FIRST, differentiable=True, **options)
    made = ExpertRows(rows, index, gates)
    out = torch.full_like(x, float("nan"))
    results = [made.sums(came=came, places=places, residual=x, out=out), made.of(slice(3, 9)).sums()]
    back = dout, x, weights, (gates, ids, FIRST), kept
    results += expert_rows_backward(*back, fp8=fp8, needs=[True] * 4)
    results[2] = ExpertRows(results[2], index, None).sums()
    queue = WeightGradients()
    trained = [weight.clone().requires_grad_() for weight in weights]
    dx, _, _, dgates = expert_rows_backward(*back, fp8=fp8, needs=[True] * 4, waiting=Waiting(queue, trained))
    queue.take()()
    return [*results, ExpertRows(dx, index, None).sums(), dgates, *(weight.grad for weight in trained)]


@pytest.mark.gpu
@pytest.mark.parametrize(("fp8", "tokens"), [(False, 40), (True, 40), (True, 1000)])
def test_recorded_halves_are_those_as_written(sm_90, monkeypatch, fp8, tokens):
    def draw(*shape):
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    weights = draw(E, 2 * I, H) / 16, draw(E, H, I) / 11
    drawn = []
    for _ in range(4):
        ids = torch.rand(tokens, E + 2, device="cuda").topk(K).indices.int() + FIRST  # of which some are dropped
        drawn.append((draw(tokens, H), draw(tokens, H), torch.rand(tokens, K, device="cuda"), ids, draw(9, H)))
    forget(monkeypatch)
    with torch.no_grad():
        got = [layer(*given, weights, fp8) for given in drawn + drawn]
        assert all(is_recorded(getattr(moe_rows, name)) for name in FUNCTIONS)
        forget(monkeypatch)
        monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: False)
        want = [layer(*given, weights, fp8) for given in drawn]
    for i, results in enumerate(got):
        for a, b in zip(results, want[i % 4], strict=True):
            assert torch.equal(a, b)
            assert a.isfinite().all()
