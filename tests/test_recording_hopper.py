"""Calls whose launches are recorded, bit for bit those as they are written, on a GPU."""

import pytest
import torch

import dskernels as ds
from dskernels import dispatch, recording, relaunching
from dskernels.choice import OPERATIONS
from dskernels.gemm import api as gemm
from dskernels.metadata import ByMetadata


def random_block(t, e=16, h=256, i=128, k=4, fp8=True, shared=0, n_shared=0, given=False):
    """Arguments of fused_experts."""

    def weight(*shape):
        w = torch.randn(*shape, device="cuda", dtype=torch.bfloat16) / shape[-1] ** 0.5
        return ds.quantize(w, (128, 128)) if fp8 else w

    x = torch.randn(t, h, device="cuda", dtype=torch.bfloat16)
    experts = torch.rand(t, e - n_shared, device="cuda").topk(k).indices.int()
    routing = ds.Routing(torch.rand(t, k, device="cuda"), experts, experts, experts)
    options = {"n_shared": n_shared, "shared": (weight(2 * i, h), weight(h, i)) if shared else None}
    options |= {"quantized": ds.quantize(x)} if given else {}
    return (x, weight(e, 2 * i, h), weight(e, h, i), routing), options


def as_written(function, monkeypatch):
    """A public function, and what it calls, without what is recorded."""
    monkeypatch.setattr(recording, "MOST_TRIES", 0)
    monkeypatch.setattr(recording, "may_be_recorded", lambda tensors: False)
    monkeypatch.setattr(function.known, "kinds", ByMetadata())


def is_recorded(function):
    """Whether the latest kind of calls has been recorded."""
    kind = [entries[0][2] for entries in function.known.kinds._kept.values()][-1]
    return bool(kind.idle)


KINDS = [
    {"t": 1},
    {"t": 1, "fp8": False},
    {"t": 4, "fp8": False, "shared": 1},
    {"t": 5, "n_shared": 1},
    {"t": 40},
    {"t": 40, "shared": 1},
    {"t": 40, "n_shared": 2, "given": True},
    {"t": 40, "fp8": False},
    {"t": 300, "fp8": False, "n_shared": 1},
    {"t": 3000},
    {"t": 3000, "shared": 1, "h": 512, "i": 256},
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(f"{k}{v}" for k, v in kind.items()))
def test_recorded_experts_are_those_as_written(sm_90, monkeypatch, kind):
    monkeypatch.setattr(ds.fused_experts.known, "kinds", ByMetadata())
    calls = [random_block(**kind) for _ in range(3)]
    calls += calls[1:]
    outs = []
    with torch.no_grad():
        for args, options in calls:
            rubbish = torch.full((1 << 22,), float("nan"), device="cuda")  # where the next call's memory may come from
            del rubbish
            outs.append(ds.fused_experts(*args, **options))
        assert is_recorded(ds.fused_experts)
        as_written(ds.fused_experts, monkeypatch)
        for (args, options), out in zip(calls, outs, strict=True):
            assert torch.equal(ds.fused_experts(*args, **options), out)
    assert outs[0].isfinite().all()


@pytest.mark.gpu
def test_a_recording_in_a_graph_and_beside_it(sm_90, monkeypatch):
    monkeypatch.setattr(ds.fused_experts.known, "kinds", ByMetadata())
    args, options = random_block(40)
    with torch.no_grad():
        for _ in range(3):
            out = ds.fused_experts(*args, **options)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ds.fused_experts(*args, **options)
        x = torch.randn_like(args[0])
        other = ds.fused_experts(x, *args[1:])  # the same recording moves on, and the graph keeps its addresses
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, out)
        args[0].copy_(x)
        graph.replay()
        assert torch.equal(captured, other)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = ds.fused_experts(x, *args[1:])
        torch.cuda.current_stream().wait_stream(side)
        assert torch.equal(beside, other)


@pytest.mark.gpu
def test_weights_that_are_quantised_inside_and_change(sm_90):
    (x, w13, w2, routing), _ = random_block(40, fp8=False)
    with torch.no_grad():
        for _ in range(4):
            w13.mul_(1.5)
            w2 = torch.randn_like(w2)
            want = ds.fused_experts(x, ds.quantize(w13, (128, 128)), ds.quantize(w2, (128, 128)), routing)
            for _ in range(3):
                assert torch.equal(ds.fused_experts(x, w13, w2, routing, fp8=True), want)


@pytest.mark.gpu
def test_gradients_after_recorded_calls(sm_90):
    (x, w13, w2, routing), _ = random_block(40, fp8=False)
    with torch.no_grad():
        for _ in range(4):
            out = ds.fused_experts(x, w13, w2, routing, fp8=True)
    w13.requires_grad_()
    differentiated = ds.fused_experts(x, w13, w2, routing, fp8=True)
    differentiated.sum().backward()
    assert torch.equal(differentiated, out)
    assert w13.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 128, 4096])
def test_recorded_quantising(sm_90, monkeypatch, rows):
    weight = torch.rand(512, device="cuda", dtype=torch.bfloat16)
    calls = {
        "quantize": lambda x: ds.quantize(x),
        "swiglu_quantize": lambda x: ds.swiglu_quantize(x),
        "rmsnorm_quantize": lambda x: ds.rmsnorm_quantize(x, weight, 1e-6, x, with_normed=True),
        "quantize_both": lambda x: ds.quantize_both(x),
    }
    xs = [torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16) for _ in range(5)]
    for name, call in calls.items():
        function = getattr(ds, name)
        with monkeypatch.context() as patch:
            patch.setattr(function.known, "kinds", ByMetadata())
            got = [call(x) for x in xs]
            assert is_recorded(function) or (name == "quantize_both" and rows % 16), name
            as_written(function, patch)
            for x, out in zip(xs, got, strict=True):
                for a, b in zip(tensors_in(call(x)), tensors_in(out), strict=True):
                    assert torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)), name


def tensors_in(result):
    """All tensors of nested tuples, those of scales row by row."""
    if isinstance(result, torch.Tensor):
        return [result.contiguous()]
    return [x for part in result if not isinstance(part, int) for x in tensors_in(part)]


@pytest.mark.gpu
def test_routes_are_new_tensors(sm_90):
    logits = [torch.randn(300, 64, device="cuda") for _ in range(5)]
    routed = [ds.route(x, top_k=4) for x in logits]
    for x, routing in zip(logits, routed, strict=True):
        want = ds.route(x, top_k=4, impl="reference")
        assert torch.equal(routing.experts, want.experts)
        assert torch.equal(routing.load, want.load)


@pytest.mark.gpu
def test_plain_weights_with_a_shared_network(sm_90):
    """Of many tokens its products are torch's, which stand beside what is recorded."""
    from dskernels.moe import hopper

    for tokens in (40, 40, 40, 40, 300, 300, 300, 300):
        (x, w13, w2, routing), options = random_block(tokens, fp8=False, shared=1)
        flat = (x, w13, None, w2, None, routing.weights, routing.experts, options["shared"][0], None)
        with torch.no_grad():
            out = ds.fused_experts(x, w13, w2, routing, **options)
            want = hopper._forward(*flat, options["shared"][1], None, False, 0, None, None, 0)
        assert torch.equal(out, want[0])


@pytest.mark.gpu
def test_choices_from_hidden_states(sm_90):
    weight, bias = torch.randn(64, 256, device="cuda"), torch.rand(64, device="cuda")
    for _ in range(5):
        x = torch.randn(40, 256, device="cuda")
        routing, logits = ds.route_hidden(x, weight, bias, top_k=4)
        want = ds.route(logits, bias, top_k=4, impl="reference")
        assert torch.equal(routing.experts, want.experts)
        torch.testing.assert_close(logits, x.double() @ weight.double().T, rtol=1e-5, atol=1e-4, check_dtype=False)


@pytest.mark.gpu
def test_a_graph_that_goes_while_it_is_launched(sm_90, monkeypatch):
    """Each of two kinds takes the place of the other's, whose launch the device has not begun."""
    monkeypatch.setattr(relaunching, "MOST_GRAPHS", 1)
    monkeypatch.setattr(ds.fused_experts.known, "kinds", ByMetadata())
    with torch.no_grad():
        calls = [random_block(tokens) for tokens in (40, 300)]
        want = [ds.fused_experts(*args, **options) for args, options in calls]
        torch.cuda._sleep(20_000_000)
        got = [ds.fused_experts(*args, **options) for _ in range(8) for args, options in calls]
    for i, out in enumerate(got):
        assert torch.equal(out, want[i % 2])


def cached_prefill(tokens, spare):
    """Arguments of mla_prefill_cached: four requests of 16 heads, in pages of 64."""
    lengths = torch.randint(tokens, 1024, (4,), dtype=torch.int32, device="cuda")
    table = torch.randperm(4 * (16 + spare), device="cuda").int().view(4, 16 + spare)
    cu = torch.arange(0, 4 * tokens + 1, tokens, dtype=torch.int32, device="cuda")
    kv_b = torch.randn(16 * 256, 512, device="cuda", dtype=torch.bfloat16) / 22
    q = torch.randn(4 * tokens, 16, 192, device="cuda", dtype=torch.bfloat16)
    cache = torch.randn(table.numel(), 64, 576, device="cuda", dtype=torch.bfloat16)
    return q, kv_b, cache, table, lengths, cu


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "spare"), [(24, 0), (24, 3), (400, 3)])
def test_recorded_prefill_over_the_cache_is_that_as_written(sm_90, monkeypatch, tokens, spare):
    """Absorbed, with products of torch's between the launches, and with expanded keys and values."""
    monkeypatch.setattr(ds.mla_prefill_cached.known, "kinds", ByMetadata())
    drawn = [cached_prefill(tokens, spare) for _ in range(3)]
    outs = []
    for given in drawn + drawn[1:]:
        rubbish = torch.full((1 << 24,), float("nan"), device="cuda")
        del rubbish
        outs.append(ds.mla_prefill_cached(*given, scale=0.07))
    assert is_recorded(ds.mla_prefill_cached)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ds.mla_prefill_cached(*drawn[0], scale=0.07)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, outs[0], strict=True))
    as_written(ds.mla_prefill_cached, monkeypatch)
    for given, out in zip(drawn + drawn[1:], outs, strict=True):
        want = ds.mla_prefill_cached(*given, scale=0.07)
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))
        assert out[0].isfinite().all()


@pytest.mark.gpu
def test_recorded_balance_loss_is_that_as_written(device, monkeypatch):
    monkeypatch.setattr(ds.balance_loss.known, "kinds", ByMetadata())
    drawn = [
        (torch.randn(500, 64, device="cuda"), torch.tensor(lengths, dtype=torch.int32, device="cuda"))
        for lengths in ([100, 300, 100], [0, -7, 400], [999, 1, 1])
    ]

    def call(logits, lengths):
        return ds.balance_loss(logits, top_k=6, alpha=1.0, sequence_lengths=lengths)

    got = [call(*given) for given in drawn + drawn]
    assert is_recorded(ds.balance_loss)
    as_written(ds.balance_loss, monkeypatch)
    assert all(torch.equal(out, call(*given)) for given, out in zip(drawn + drawn, got, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("scale_format", ["fp32", "ue8m0"])
def test_steps_of_a_linear_layer_are_those_as_written(device, monkeypatch, scale_format):
    """Forward and backward are recorded, and go past torch's dispatcher; the weight changes from step to step."""
    first = torch.randn(256, 512, device="cuda", dtype=torch.bfloat16) / 22
    drawn = [[torch.randn(n, 128 * m, device="cuda").bfloat16() for n, m in ((300, 4), (300, 2))] for _ in range(3)]

    def steps():
        weight, results = torch.nn.Parameter(first.clone()), []
        for x, dy in drawn + drawn:
            x = x.clone().requires_grad_()
            y = ds.fp8_linear(x, weight, scale_format=scale_format)
            results += [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]
            with torch.no_grad():
                weight.sub_(results[-1], alpha=1e-3)
        return [*results, weight.detach()]

    got = steps()
    monkeypatch.setattr(dispatch, "meets_autograd", lambda tensors: False)
    for operation in OPERATIONS.values():
        if operation._straight is not None:
            monkeypatch.setattr(operation, "_straight", ByMetadata())
    as_written(ds.fp8_gemm, monkeypatch)
    for name in ("_linear_forward", "_linear_gradients"):
        monkeypatch.setattr(getattr(gemm, name), "_known", ByMetadata())
    assert all(torch.equal(a, b) for a, b in zip(got, steps(), strict=True))
    assert got[-1].isfinite().all()


@pytest.mark.gpu
def test_a_step_of_a_linear_layer_in_a_graph(device):
    """Recorded before, captured then: replays quantise the weight that is there, and eager calls go on beside them."""
    x, dy = (torch.randn(300, n, device="cuda").bfloat16() for n in (512, 256))
    x.requires_grad_()
    weight = torch.nn.Parameter(torch.randn(256, 512, device="cuda", dtype=torch.bfloat16) / 22)

    def step():
        y = ds.fp8_linear(x, weight)
        return y.detach(), *torch.autograd.grad(y, (x, weight), dy)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(4):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for factor in (1.0, 1.5, 0.5):
        with torch.no_grad():
            weight.mul_(factor)
        for given in captured:
            given.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
    asked = [choice.operation for choice in ds.explain(ds.fp8_linear, x, weight)]
    assert "fp8_gemm" in asked
