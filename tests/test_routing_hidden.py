"""Routing from hidden states, and the places of experts that have copies: kernels against references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.reference import routing as reference
from dskernels.routing.config import MAX_EXPERTS
from registering import check_registration

IMPLS = ["reference", "triton"]
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32


def hidden(tokens, width, n_experts, device, x_dtype=BRAIN, weight_dtype=BRAIN):
    x = torch.randn(tokens, width, device=device).to(x_dtype)
    return x, (torch.randn(n_experts, width, device=device) * width**-0.5).to(weight_dtype)


def same_routing(got, want):
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.load, want.load)
    assert torch.equal(got.nonfinite, want.nonfinite)
    torch.testing.assert_close(got.weights, want.weights, rtol=1e-5, atol=1e-30)


def check_hidden(x, weight, bias, impl, **options):
    """Logits within what an fp32 sum of exact products may be off; the routing is that of these logits."""
    routed, logits = ds.route_hidden(x, weight, bias, **options, impl=impl)
    want = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T  # of the terms: each of H additions rounds to 2^-24 of it at most
    assert logits.dtype == SINGLE
    assert ((logits.double() - want).abs() <= size * 2**-19).all()
    same_routing(routed, ds.route(logits, bias, **options, impl=impl))
    return routed, logits


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("weight_dtype", [BRAIN, HALF, SINGLE])
@pytest.mark.parametrize("x_dtype", [BRAIN, HALF, SINGLE])
def test_every_pair_of_dtypes(device, impl, x_dtype, weight_dtype):
    x, weight = hidden(5, 96, 24, device, x_dtype, weight_dtype)
    check_hidden(x, weight, torch.randn(24, device=device), impl, top_k=4, n_groups=4, top_groups=2, scale=2.5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("tokens", "width", "n_experts"),
    [
        (1, 700, 33),  # one token: K in parts, the last one short
        (17, 130, 160),  # one over a tile of 16; K no multiple of a tile
        (70, 64, 8),  # several tiles of tokens
        (3, 1, 2),
    ],
)
def test_ragged_shapes(device, impl, tokens, width, n_experts):
    x, weight = hidden(tokens, width, n_experts, device, weight_dtype=SINGLE)
    check_hidden(x, weight, None, impl, top_k=2, score="softmax")


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_be_strided(device, impl):
    x, weight = hidden(12, 160, 32, device)
    check_hidden(x[::2, 16:112], weight[::2, 16:112], None, impl, top_k=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_token_that_is_not_finite(device, impl):
    x, weight = hidden(4, 64, 16, device)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    routed, logits = ds.route_hidden(x, weight, top_k=4, impl=impl)
    assert not logits[1:3].isfinite().any()
    assert routed.nonfinite == 2
    assert routed.experts[1:3].tolist() == [[0, 1, 2, 3]] * 2
    assert logits[[0, 3]].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(device, impl):
    x, weight = hidden(0, 64, 16, device)
    x.requires_grad_(), weight.requires_grad_()
    routed, logits = ds.route_hidden(x, weight, top_k=4, impl=impl)
    assert logits.shape == (0, 16)
    assert routed.experts.shape == (0, 4)
    assert not routed.load.any()
    (routed.weights.sum() + logits.sum()).backward()
    assert x.grad.shape == (0, 64)
    assert not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("score", "x_dtype", "weight_dtype"),
    [("sigmoid", SINGLE, SINGLE), ("softmax", BRAIN, SINGLE), ("sigmoid", BRAIN, BRAIN)],
)
def test_gradients(device, impl, score, x_dtype, weight_dtype):
    """Through the weights and through the logits, against fp64."""
    x, weight = hidden(21, 80, 24, device, x_dtype, weight_dtype)
    x.requires_grad_(), weight.requires_grad_()
    options = dict(top_k=4, n_groups=4, top_groups=2, score=score, scale=2.5)
    bias = torch.randn(24, device=device)
    routed, logits = ds.route_hidden(x, weight, bias, **options, impl=impl)
    grads = torch.randn(21, 4, device=device), torch.randn(21, 24, device=device)
    got = torch.autograd.grad((routed.weights, logits), (x, weight), grads, retain_graph=True)

    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    wide_logits = reference.gate(*wide)
    s, void = reference.affinities(wide_logits, score)
    weights = reference.gates(s, void, routed.experts, True, 2.5)
    want = torch.autograd.grad((weights, wide_logits), wide, [g.double() for g in grads], retain_graph=True)
    for g, w, t in zip(got, want, (x, weight), strict=True):
        assert g.dtype == t.dtype
        assert parity.difference(g, w) < (1e-11 if t.dtype == SINGLE else 1e-5)

    # One of them alone, by either way.
    for outputs, grad in (((routed.weights,), grads[:1]), ((logits,), grads[1:])):
        (only,) = torch.autograd.grad(outputs, x, grad, retain_graph=True)
        wide_outputs = (weights,) if outputs[0] is routed.weights else (wide_logits,)
        (want_x,) = torch.autograd.grad(wide_outputs, wide[0], [g.double() for g in grad], retain_graph=True)
        assert parity.difference(only, want_x) < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [2113, 16384])
def test_gradients_by_products_of_pieces(sm_90, tokens):
    """On Hopper the fp32 gradient is three matrices of bf16; numbers of all sizes, that each of them counts."""
    x, weight = hidden(tokens, 72, 16, "cuda", torch.bfloat16, torch.bfloat16)
    dlogits = torch.randn(tokens, 16, device="cuda") * 10 ** torch.randn(tokens, 1, device="cuda")
    got = torch.ops.dskernels.gate_backward(dlogits, x, weight, True, True, "hopper")
    want = dlogits.double() @ weight.double(), dlogits.double().T @ x.double()
    for g, w in zip(got, want, strict=True):
        assert parity.difference(g, w) < 1e-5
    again = torch.ops.dskernels.gate_backward(dlogits, x, weight, True, True, "hopper")
    assert all(torch.equal(g, a) for g, a in zip(got, again, strict=True))


@pytest.mark.gpu
def test_the_gradient_of_the_weight_along_many_tokens(device):
    """Enough tokens for the tile that sums along them in many parts; the last part is ragged."""
    x, weight = hidden(2113, 72, 12, device, torch.bfloat16, torch.bfloat16)
    dlogits = torch.randn(2113, 12, device=device)
    _, got = torch.ops.dskernels.gate_backward(dlogits, x, weight, False, True, "triton")
    assert parity.difference(got, dlogits.double().T @ x.double()) < 1e-5


def test_gradcheck_of_the_reference():
    x, weight = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def run(x, weight):
        routed, logits = reference.route_hidden(x, weight, top_k=2, n_groups=2, top_groups=1)
        return routed.weights, logits

    assert torch.autograd.gradcheck(run, (x, weight))


def test_repeated_calls_return_the_same_bits(device):
    x, weight = hidden(20, 160, 32, device, SINGLE, SINGLE)
    x.requires_grad_(), weight.requires_grad_()

    def run():
        routed, logits = ds.route_hidden(x, weight, top_k=4, impl="triton")
        return *routed, logits, *torch.autograd.grad(routed.weights[:, 0].sum() + logits.sum(), (x, weight))

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


# ---- places ----------------------------------------------------------------------------------------------------------

# Expert 1 has three places, 0 two, 2 and 3 one; 4 has none, and 5 has entries behind its end, which count for nothing.
PHYSICAL = [[4, 7, -1], [1, 5, 6], [2, -1, -1], [3, -1, -1], [-1, -1, -1], [0, -1, 9]]


@pytest.mark.parametrize("impl", IMPLS)
def test_places_take_turns(device, impl):
    logits = torch.tensor([3.0, 5.0, 0.0, 1.0, 4.0, 2.0], device=device).repeat(5, 1)
    physical = torch.tensor(PHYSICAL, dtype=torch.int32, device=device)
    routed = ds.route(logits, top_k=4, physical=physical, impl=impl)
    assert routed.experts.tolist() == [[1, -1, 4, 0], [5, -1, 7, 0], [6, -1, 4, 0], [1, -1, 7, 0], [5, -1, 4, 0]]
    plain = ds.route(logits, top_k=4, impl=impl)
    assert torch.equal(routed.load, plain.load)
    assert torch.equal(routed.weights, plain.weights)


@pytest.mark.parametrize("impl", IMPLS)
def test_places_of_tokens_without_a_choice(device, impl):
    logits = torch.randn(3, 6, device=device)
    logits[1] = float("nan")
    physical = torch.tensor(PHYSICAL, dtype=torch.int32, device=device)
    routed = ds.route(logits, top_k=3, physical=physical, impl=impl)
    assert routed.experts[1].tolist() == [7, 5, 2]
    assert routed.nonfinite == 1
    assert not routed.weights[1].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_places_from_hidden_states_and_gradients(device, impl):
    x, weight = hidden(9, 32, 6, device, SINGLE, SINGLE)
    physical = torch.tensor(PHYSICAL, dtype=torch.int32, device=device)
    x.requires_grad_()
    routed, logits = ds.route_hidden(x, weight, top_k=3, physical=physical, impl=impl)
    same_routing(routed, ds.route(logits, top_k=3, physical=physical, impl=impl))
    plain, _ = ds.route_hidden(x, weight, top_k=3, impl=impl)
    grad = torch.randn(9, 3, device=device)
    got, want = (torch.autograd.grad(r.weights, x, grad)[0] for r in (routed, plain))
    assert torch.equal(got, want)
    x = x.detach().requires_grad_()
    routed = ds.route(logits.detach().requires_grad_(), top_k=3, physical=physical, impl=impl)
    assert routed.weights.requires_grad


@settings(max_examples=20)
@given(st.data())
def test_places_equal_the_reference(device, data):
    n_experts, replicas = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 4))
    tokens = data.draw(st.integers(1, 5))
    entries = st.lists(st.integers(-1, 20), min_size=replicas, max_size=replicas)
    rows = data.draw(st.lists(entries, min_size=n_experts, max_size=n_experts))
    physical = torch.tensor(rows, dtype=torch.int32, device=device)
    logits = torch.randn(tokens, n_experts, device=device)
    top_k = data.draw(st.integers(1, n_experts))
    got = ds.route(logits, top_k=top_k, physical=physical, impl="triton")
    plain = ds.route(logits, top_k=top_k, impl="triton").experts.tolist()
    for t, row in enumerate(got.experts.tolist()):
        for place, expert in zip(row, plain[t], strict=True):
            entries = rows[expert]
            n = entries.index(-1) if -1 in entries else replicas
            assert place == (entries[t % n] if n else -1)


def test_permute_takes_the_places(device):
    logits = torch.randn(6, 6, device=device)
    physical = torch.tensor(PHYSICAL, dtype=torch.int32, device=device)
    routed = ds.route(logits, top_k=3, physical=physical)
    permuted = ds.permute(torch.randn(6, 8, device=device), routed.experts, 8)
    assert permuted.offsets[-1] == (routed.experts >= 0).sum()


# ---- arguments -------------------------------------------------------------------------------------------------------

X = torch.randn(5, 8)
W = torch.randn(12, 8)
MAP = torch.zeros(12, 2, dtype=torch.int32)


def route_hidden(x=X, weight=W, bias=None, **options):
    return ds.route_hidden(x, weight, bias, **{"top_k": 2, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: route_hidden(None), TypeError, "x: expected a torch.Tensor, got NoneType"),
        (lambda: route_hidden(X.double()), TypeError, "x: expected dtype bfloat16 or float16 or float32, got float64"),
        (lambda: route_hidden(X.t()), ValueError, "x: expected a contiguous last dimension"),
        (lambda: route_hidden(weight=W[:, :7]), ValueError, r"weight: expected shape \[E, 8\], got \[12, 7\]"),
        (lambda: route_hidden(weight=W.int()), TypeError, "weight: expected dtype bfloat16 or float16 or float32"),
        (
            lambda: route_hidden(weight=W[:0]),
            ValueError,
            r"weight: expected at least one expert and one column",
        ),
        (lambda: route_hidden(bias=torch.zeros(11)), ValueError, r"bias: expected shape \[12\], got \[11\]"),
        (lambda: route_hidden(top_k=13), ValueError, "top_k: expected an int from 1 to 12, got 13"),
        (lambda: route_hidden(n_groups=5), ValueError, "n_groups: expected a divisor of E = 12, got 5"),
        (lambda: route_hidden(score=1), ValueError, "score: expected 'sigmoid' or 'softmax', got 1"),
        (lambda: route_hidden(physical=MAP.long()), TypeError, "physical: expected dtype int32, got int64"),
        (lambda: route_hidden(physical=MAP[:11]), ValueError, r"physical: expected shape \[12, R\], got \[11, 2\]"),
        (lambda: route_hidden(physical=MAP[:, :0]), ValueError, r"physical: expected at least one column, contiguous"),
        (
            lambda: ds.route(W.T.contiguous(), top_k=1, physical=torch.zeros(12, 4, dtype=torch.int32)[:, :2]),
            ValueError,
            r"physical: expected at least one column, contiguous, got \[12, 2\] with strides \[4, 1\]",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_too_many_experts_are_refused_by_the_kernels_alone(device):
    x, weight = hidden(2, 16, MAX_EXPERTS + 1, device)
    assert ds.route_hidden(x, weight, top_k=2)[0].load.sum() == 4
    with pytest.raises(ValueError, match="at most 1024, got 1025"):
        ds.route_hidden(x, weight, top_k=2, impl="triton")


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("route_replicated", (torch.randn(5, 12), None, MAP, 2, 1, 1, True, False, 1.0)),
        ("route_replicated", (torch.randn(5, 12).requires_grad_(), torch.zeros(12), MAP, 2, 4, 2, False, True, 2.5)),
        ("route_hidden", (X, W, None, None, 2, 1, 1, True, False, 1.0)),
        ("route_hidden", (X, W, torch.zeros(12), MAP, 2, 4, 2, False, True, 2.5)),
        (
            "route_hidden",
            (X.clone().requires_grad_(), W.clone().requires_grad_(), None, None, 2, 4, 2, False, True, 2.5),
        ),
        ("gate_backward", (torch.randn(5, 12), X, W, True, True)),
        ("gate_backward", (torch.randn(5, 12), X.bfloat16(), W, False, True)),
    ],
)
def test_registration(op, args):
    check_registration(getattr(torch.ops.dskernels, op).default, args)


def test_compiles_in_one_graph():
    """The whole router of a training step, reference implementation: what is compiled is the registration."""
    x, weight, bias = X.clone().requires_grad_(), W.clone().requires_grad_(), torch.zeros(12)
    lengths = torch.tensor([2, 3], dtype=torch.int32)

    def step(x, weight):
        routed, logits = ds.route_hidden(x, weight, bias, top_k=2, n_groups=4, top_groups=2)
        loss = ds.balance_loss(logits, top_k=2, alpha=0.1, sequence_lengths=lengths)
        return routed.weights.square().sum() + loss, routed.experts

    got, experts = torch.compile(step, fullgraph=True, backend="aot_eager")(x, weight)
    want, want_experts = step(x, weight)
    assert torch.equal(experts, want_experts)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad(loss, (x, weight)) for loss in (got, want))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
