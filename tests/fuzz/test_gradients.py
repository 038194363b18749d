"""Gradients of drawn calls, valid ones: kernels against the reference, which autograd differentiates."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import dskernels as ds
from fuzz.drawing import Draw, leaves, replaced
from fuzz.judging import E4M3, ROUNDING, flat
from fuzz.test_operations import CALLS, CASES

DIFFERENTIABLE = (
    "grouped_gemm",
    "route",
    "balance_loss",
    "permute",
    "combine",
    "feed_forward",
    "mla_prefill",
    "merge_states",
    "cross_entropy",
)
EACH = -(-CASES // 20 // len(DIFFERENTIABLE)) or 2


def gradients(call, impl):
    """Of a sum of the results with fixed weights, by where each argument stands."""
    arguments = call.arguments
    inputs = {}
    for path, x in leaves(arguments):
        if (
            x.is_floating_point()
            and x.dtype != torch.float8_e4m3fn
            and path not in ("out", "bias")
            and ".scale" not in path
        ):
            inputs[path] = x.detach().clone().requires_grad_()
            arguments = replaced(arguments, path, inputs[path])
    results = [x for x in flat(getattr(ds, call.function)(**arguments, impl=impl)) if x.requires_grad]
    if not results:
        return {}
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in results]
    given = torch.autograd.grad(results, list(inputs.values()), weights, allow_unused=True)
    return dict(zip(inputs, given, strict=True))


def rounding(call):
    """Of the shortest type on the way, which is e4m3 where a network runs in it."""
    if call.arguments.get("fp8") or any(x.dtype == torch.float8_e4m3fn for _, x in leaves(call.arguments)):
        return E4M3
    return max(ROUNDING.get(x.dtype, 0.0) for _, x in leaves(call.arguments))


def consistent(call):
    """Whether the index of a `combine` is one that `permute` returns: each row of the groups, once."""
    permuted = call.arguments.get("permuted")
    if permuted is None:
        return True
    rows = permuted.index[permuted.index >= 0]
    return sorted(rows.tolist()) == list(range(int(permuted.offsets[-1])))


def check(call):
    wants = gradients(call, "reference")
    try:
        gots = gradients(call, "triton")
    except ValueError as error:
        if "cannot run this" not in str(error):
            raise
        return
    for path, want in wants.items():
        got = gots[path]
        assert (got is None) == (want is None), path
        if want is None or not want.numel():
            continue
        assert got.dtype == want.dtype
        a, b = got.double().nan_to_num(0, 0, 0), want.double().nan_to_num(0, 0, 0)
        worst, size = float((a - b).abs().max()), float(b.abs().max())
        allowed = 16 * rounding(call) * size + 2e-5
        if worst > allowed:
            allowed += cancelled(call, path)
        assert worst <= allowed, f"{path}: off by {worst:.3g} of {size:.3g}"


def cancelled(call, path):
    """What roundings on the way may cost where terms cancel out: as much as roundings of the arguments do, in fp32."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for i in range(5):
        arguments = call.arguments
        for where, x in leaves(arguments):
            if x.is_floating_point() and x.dtype != torch.float8_e4m3fn and ".scale" not in where:
                noise = (torch.rand(x.shape, generator=generator) * 2 - 1) * rounding(call) if i else 0.0
                arguments = replaced(arguments, where, x.float() * (1 + noise))
        found.append(gradients(dataclasses.replace(call, arguments=arguments), "reference")[path].double())
    least = 0.0
    if call.function == "mla_prefill":  # a row's gradient is what its own sum is taken from: nothing, of a single key
        q, k, v = (x.detach().double().abs() for x in (call.arguments[name] for name in "qkv"))
        least = float(torch.maximum(q.max(), k.max()) * v.max() * v.shape[-1] ** 0.5) * call.arguments["scale"]
    return least * rounding(call) + max(
        float((other - found[0]).nan_to_num(0, 0, 0).abs().max()) for other in found[1:]
    )


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("operation", DIFFERENTIABLE)
def test_gradients(operation):
    @settings(
        max_examples=EACH,
        derandomize=CASES == 0,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink] if CASES else [Phase.generate],
    )
    @given(st.data())
    def run(data):
        call = CALLS[operation](Draw(data.draw))
        call.arguments.pop("out", None)
        call.arguments.pop("physical", None)
        if consistent(call):
            check(call)

    run()
