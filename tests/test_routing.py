"""The choice of experts: kernels against Python's own arithmetic and the references, bad input, registration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
import routing_oracle as oracle
from dskernels import parity
from dskernels.parity import routing as cases
from dskernels.reference import routing as reference
from dskernels.routing.config import MAX_EXPERTS
from registering import check_registration

NAN, INF = math.nan, math.inf
IMPLS = ["reference", "triton"]


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.op.startswith("route")], ids=lambda case: f"{case.op} {case.label}"
)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def check_route(logits, bias, impl, **options):
    """Compare with the fp64 oracle; ids wherever no other choice is within what fp32 can tell apart."""
    routed = ds.route(logits, bias, **options, impl=impl)
    E, k = logits.shape[1], options["top_k"]
    wide = logits.detach().cpu().double()
    bias_list = None if bias is None else bias.double().tolist()
    _, experts, _, nonfinite, gaps = oracle.route(wide.tolist(), bias_list, **options)
    got = routed.experts.cpu().long()

    # s + b and the sum of two are rounded to 2^-24 of their size, s itself is off by a few ulp.
    blur = 1e-6 + 2**-22 * (0 if bias is None else bias.abs().max().item())
    clear = torch.tensor(gaps) > blur
    assert torch.equal(got[clear], torch.tensor(experts)[clear])
    assert ((got >= 0) & (got < E)).all()
    assert all(len(set(row)) == k for row in got.tolist())

    # The exponential of x is off by some |x| 2^-24, a sum of k gates by another k 2^-24.
    s, void = reference.affinities(wide, options.get("score", "sigmoid"))
    want = reference.gates(s, void, got, options.get("normalize", True), options.get("scale", 1.0))
    size = wide[wide.isfinite()].abs().max().item()
    torch.testing.assert_close(routed.weights.cpu().double(), want, rtol=(size + k + 8) * 2**-23, atol=1e-30)

    counted = got[~void].flatten()
    assert torch.equal(routed.load.cpu().long(), counted.bincount(minlength=E))
    assert routed.nonfinite == nonfinite
    assert [t.dtype for t in routed] == [torch.float32, torch.int32, torch.int32, torch.int32]
    return routed


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "top_groups", "score", "normalize"),
    [
        (2, 1, 1, 1, "sigmoid", True),  # the smallest; many tokens a program
        (6, 6, 1, 1, "softmax", False),  # every expert; no power of two
        (16, 4, 4, 2, "sigmoid", False),
        (16, 3, 16, 5, "sigmoid", True),  # one expert a group: its score is that of the one
        (64, 64, 1, 1, "softmax", True),  # every expert
        (64, 32, 8, 5, "sigmoid", True),  # many choices
        (160, 6, 8, 3, "softmax", False),  # groups of 20
        (256, 8, 8, 4, "sigmoid", True),
        (384, 8, 1, 1, "sigmoid", True),
        (1000, 5, 40, 7, "sigmoid", True),  # pads to 64 groups of 32, over two warps
        (1000, 8, 1, 1, "softmax", True),
    ],
)
def test_route(device, impl, n_experts, top_k, n_groups, top_groups, score, normalize):
    logits = 2 * torch.randn(5, n_experts, device=device)
    bias = 0.3 * torch.randn(n_experts, device=device)
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, score=score, normalize=normalize, scale=2.5)
    check_route(logits, bias, impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("n_tokens", [1, 3, 4, 33])  # under, at and over the 32 rows of a program of 16 experts
def test_ragged_numbers_of_tokens(device, impl, n_tokens):
    check_route(torch.randn(n_tokens, 16, device=device), None, impl, top_k=4)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_bias(device, impl):
    # s + b has 20 bits left for s: a gate recovered as (s + b) - b would be wrong in the third digit, and here 0.
    logits = torch.linspace(-16, -14, 64).repeat(4, 1)[:, torch.randperm(64)].to(device)
    bias = torch.where(torch.arange(64) % 2 == 0, 12.0, -12.0).to(device)
    routed = check_route(logits, bias, impl, top_k=4, n_groups=8, top_groups=2)
    assert (routed.experts % 2 == 0).all()
    torch.testing.assert_close(routed.weights.sum(1), torch.ones(4, device=device))
    # All biases negative: experts of the groups that are out, masked with 0 instead of -inf, would win.
    routed = check_route(torch.randn(4, 64, device=device), -bias.abs(), impl, top_k=8, n_groups=8, top_groups=1)
    assert (routed.experts // 8 == routed.experts[:, :1] // 8).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_smaller_id(device, impl):
    even = torch.full((3, 24), 0.7, device=device)
    options = dict(top_k=5, n_groups=6, top_groups=2)
    for score in ("sigmoid", "softmax"):
        routed = ds.route(even, torch.full((24,), -12.0, device=device), **options, score=score, impl=impl)
        assert routed.experts.tolist() == [[0, 1, 2, 3, 4]] * 3
        torch.testing.assert_close(routed.weights, torch.full((3, 5), 0.2, device=device))
        assert routed.load.tolist() == [3] * 5 + [0] * 19
    # The maximum twice inside group 0 and group 2, once in group 1: the copy counts as second largest.
    logits = torch.tensor([[1.0, 1.0, 0.0, 1.0, 0.5, 0.9, 1.0, 1.0, 0.0]], device=device)
    assert ds.route(logits, top_k=4, n_groups=3, top_groups=2, impl=impl).experts.tolist() == [[0, 1, 6, 7]]
    assert ds.route(logits, top_k=3, n_groups=3, top_groups=1, impl=impl).experts.tolist() == [[0, 1, 2]]
    # With softmax a group counts by its largest alone: all three groups tie.
    routed = ds.route(logits, top_k=4, n_groups=3, top_groups=2, score="softmax", impl=impl)
    assert routed.experts.tolist() == [[0, 1, 3, 5]]


# Scores of 0, 1/2 and 1 and biases in halves are exact in fp32, and so are sums of two: all ties are true ones, and
# whatever the kernel chooses must be what the reference does, bit by bit.
@settings(max_examples=40)
@given(st.data())
def test_route_with_many_ties(device, data):
    n_groups, size = data.draw(st.sampled_from([(1, 7), (3, 1), (4, 3), (5, 2), (2, 8)]))
    n = n_groups * size
    top_groups = data.draw(st.integers(1, n_groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    values = st.sampled_from([0.0, 0.0, 40.0, -800.0, -INF, INF, NAN])
    rows = data.draw(st.lists(st.lists(values, min_size=n, max_size=n), min_size=1, max_size=3))
    biases = st.sampled_from([-12.0, -1.0, 0.0, 0.5, 12.0, -INF, INF])
    bias = data.draw(st.none() | st.lists(biases, min_size=n, max_size=n))
    logits = torch.tensor(rows, device=device)
    bias = None if bias is None else torch.tensor(bias, device=device)
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups)
    got = ds.route(logits, bias, **options, impl="triton")
    want = reference.route(logits, bias, **options)
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.load, want.load)
    assert torch.equal(got.nonfinite, want.nonfinite)
    torch.testing.assert_close(got.weights, want.weights, rtol=2**-20, atol=0)


@settings(max_examples=25)
@given(
    n_experts=st.integers(1, 70),
    n_tokens=st.integers(1, 5),
    choices=st.floats(0, 1),
    score=st.sampled_from(["sigmoid", "softmax"]),
    seed=st.integers(0, 99),
)
def test_properties(device, n_experts, n_tokens, choices, score, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_tokens, n_experts, generator=generator).to(device)
    top_k = 1 + int(choices * (n_experts - 1))
    routed = ds.route(logits, top_k=top_k, score=score, scale=2.5, impl="triton")
    assert (routed.weights.diff(dim=1) <= 0).all()  # no bias: best first is heaviest first
    torch.testing.assert_close(routed.weights.sum(1), torch.full((n_tokens,), 2.5, device=device))
    assert routed.load.sum() == n_tokens * top_k
    # Experts that all see the same bias are chosen as with none.
    biased = ds.route(logits, torch.full((n_experts,), -12.0, device=device), top_k=top_k, score=score, impl="triton")
    gap = logits.sigmoid() if score == "sigmoid" else logits.softmax(-1)
    if n_experts == 1 or gap.sort().values.diff(dim=1).min() > 1e-5:
        assert torch.equal(biased.experts, routed.experts)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_expert_takes_all(device, impl):
    logits = torch.randn(70, 64, device=device)
    logits[:, 63] = 20.0
    routed = check_route(logits, None, impl, top_k=1)
    assert routed.load.tolist() == [0] * 63 + [70]
    torch.testing.assert_close(routed.weights, torch.ones(70, 1, device=device))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_rows_with_nan_or_nothing_finite(device, impl, score):
    logits = torch.randn(7, 24, device=device)
    logits[1, 23] = NAN
    logits[2] = -INF
    logits[3, ::2], logits[3, 1::2] = INF, -INF
    logits[4] = NAN
    logits[5, 1:] = -INF  # one finite logit is enough
    logits[6, 3] = INF
    routed = check_route(logits, None, impl, top_k=6, n_groups=6, top_groups=2, score=score)
    assert routed.experts[1:5].tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    assert not routed.weights[1:5].any()
    assert routed.nonfinite == 4
    assert routed.load.sum() == 3 * 6
    assert routed.experts[6, 0] == 3
    assert not ds.route(logits, torch.full((24,), NAN, device=device), top_k=6, score=score, impl=impl).load.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_too_small_to_normalise(device, impl):
    logits = torch.tensor([[-80.0, -90.0, -200.0], [-60.0, -61.0, -200.0]], device=device, requires_grad=True)
    weights = ds.route(logits, top_k=2, impl=impl).weights
    assert weights[0].tolist() == [0, 0]
    torch.testing.assert_close(weights[1].sum().item(), 1.0)
    (grad,) = torch.autograd.grad(weights, logits, torch.tensor([[1e9, 1.0]] * 2, device=device))
    assert grad.isfinite().all()
    assert not grad[0].any()
    assert grad[1].any()


def same(got, want):
    """The same choice; weights up to the order of a sum, which may follow the layout in memory."""
    assert torch.equal(got.experts, want.experts)
    assert torch.equal(got.load, want.load)
    torch.testing.assert_close(got.weights, want.weights)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_fp32(device, impl, dtype):
    logits = torch.randn(6, 96, device=device).to(dtype)
    options = dict(top_k=4, n_groups=4, top_groups=2, impl=impl)
    same(ds.route(logits, **options), ds.route(logits.float(), **options))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_be_strided(device, impl):
    logits = torch.randn(12, 80, device=device)[::2, 16:64]
    dense = ds.route(logits.contiguous(), top_k=3, impl=impl)
    same(ds.route(logits, top_k=3, impl=impl), dense)
    repeated = ds.route(logits[:1].expand(5, 48), top_k=3, impl=impl)
    assert (repeated.experts == dense.experts[0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(device, impl):
    logits = torch.empty(0, 12, device=device, requires_grad=True)
    routed = ds.route(logits, top_k=3, n_groups=4, top_groups=2, impl=impl)
    assert [tuple(t.shape) for t in routed] == [(0, 3), (0, 3), (12,), ()]
    assert not routed.load.any()
    assert routed.nonfinite == 0
    routed.weights.sum().backward()
    assert logits.grad.shape == (0, 12)


def check_gradient(got, want, size):
    """Within a few dozen roundings of fp32 of the gradient's terms, `size` being their magnitude."""
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=size * 2**-18)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("score", "n_experts", "top_k"), [("sigmoid", 256, 8), ("softmax", 160, 6), ("sigmoid", 6, 6)])
def test_gradient_of_route(device, impl, score, n_experts, top_k, normalize):
    logits = torch.randn(5, n_experts, device=device, requires_grad=True)
    bias = torch.randn(n_experts, device=device)
    options = dict(top_k=top_k, n_groups=2, top_groups=2, score=score, normalize=normalize, scale=2.5)
    routed = ds.route(logits, bias, **options, impl=impl)
    grad = torch.randn(5, top_k, device=device)
    (got,) = torch.autograd.grad(routed.weights, logits, grad)

    wide = logits.detach().cpu().double().requires_grad_()
    s, void = reference.affinities(wide, score)
    weights = reference.gates(s, void, routed.experts.cpu(), normalize, 2.5)
    (want,) = torch.autograd.grad(weights, wide, grad.cpu().double())
    check_gradient(got, want, want.abs().max().item())
    if score == "sigmoid":  # experts that were not chosen get exactly none
        assert torch.equal(got != 0, want.to(device) != 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_gradient_where_there_is_no_choice(device, impl, score):
    """Void rows, even with NaN coming from above, and infinite logits get none; a scale of 0 gives zeros."""
    logits = torch.randn(4, 12, device=device)
    logits[1, 5] = NAN
    logits[2, 5], logits[2, 6], logits[2, 7] = INF, -INF, INF  # with softmax, the two share all the mass
    logits.requires_grad_()
    for normalize in (True, False):
        routed = ds.route(logits, top_k=4, score=score, normalize=normalize, impl=impl)
        grad = torch.randn(4, 4, device=device)
        grad[1] = NAN
        (got,) = torch.autograd.grad(routed.weights, logits, grad)
        assert got.isfinite().all()
        assert not got[1].any()
        assert not got[2, 5:8].any()
        assert got[[0, 3]].any(1).all()
        assert score == "softmax" or got[2].any()
    weights = ds.route(logits, top_k=4, score=score, scale=0.0, impl=impl).weights
    assert not torch.autograd.grad(weights.sum(), logits)[0].any()
    nan_bias = torch.full((12,), NAN, device=device)
    weights = ds.route(logits, nan_bias, top_k=4, score=score, normalize=False, impl=impl).weights
    assert not torch.autograd.grad(weights.sum(), logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtype_of_the_logits(device, dtype):
    logits = torch.randn(3, 64, device=device).to(dtype).requires_grad_()
    single = logits.detach().float().requires_grad_()
    got, want = (
        torch.autograd.grad(ds.route(x, top_k=4, impl="triton").weights[:, 0].sum(), x)[0] for x in (logits, single)
    )
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_repeated_calls_return_the_same_bits(device):
    logits = torch.randn(40, 32, device=device, requires_grad=True)

    def run():
        routed = ds.route(logits, top_k=4, impl="triton")
        return *routed, *torch.autograd.grad(routed.weights[:, 0].sum(), logits)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("n_tokens", [4001, 8001])
@pytest.mark.parametrize(
    ("n_experts", "top_k", "n_groups", "top_groups", "score"),
    [(256, 8, 8, 4, "sigmoid"), (160, 6, 8, 3, "softmax"), (64, 6, 1, 1, "sigmoid"), (1000, 32, 40, 7, "sigmoid")],
)
def test_model_shapes(device, n_tokens, n_experts, top_k, n_groups, top_groups, score):
    logits = torch.randn(n_tokens, n_experts, device=device)
    bias = 12 * torch.randn(n_experts, device=device) if score == "sigmoid" else None
    options = dict(top_k=top_k, n_groups=n_groups, top_groups=top_groups, score=score)
    check_route(logits, bias, "triton", **options)


def test_too_many_experts_are_refused_by_the_kernels_alone(device):
    logits = torch.randn(2, MAX_EXPERTS + 1, device=device)
    assert ds.explain(ds.route, logits, top_k=2)[0].impl == "reference"
    assert ds.route(logits, top_k=2).load.sum() == 4
    with pytest.raises(ValueError, match="at most 1024, got 1025"):
        ds.route(logits, top_k=2, impl="triton")


X = torch.randn(5, 12)
BIAS = torch.zeros(12)


def route(logits=X, bias=None, **options):
    return ds.route(logits, bias, **{"top_k": 2, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: route([1.0]), TypeError, "logits: expected a torch.Tensor, got list"),
        (lambda: route(X.double()), TypeError, "logits: expected dtype bfloat16 or float16 or float32, got float64"),
        (lambda: route(X[0]), ValueError, r"logits: expected shape \[T, E\], got \[12\]"),
        (lambda: route(X.t()), ValueError, "logits: expected a contiguous last dimension"),
        (lambda: route(X[:, :0]), ValueError, r"logits: expected at least one expert, got \[5, 0\]"),
        (lambda: route(bias=0.0), TypeError, "bias: expected a torch.Tensor, got float"),
        (lambda: route(bias=BIAS.bfloat16()), TypeError, "bias: expected dtype float32, got bfloat16"),
        (lambda: route(bias=BIAS[:11]), ValueError, r"bias: expected shape \[12\], got \[11\]"),
        (lambda: route(bias=BIAS.to("meta")), ValueError, "bias: expected a tensor on cpu like the others"),
        (lambda: route(bias=torch.zeros(24)[::2]), ValueError, "bias: expected a contiguous last dimension"),
        (lambda: route(top_k=2.0), TypeError, "top_k: expected an int, got float"),
        (lambda: route(top_k=0), ValueError, "top_k: expected an int from 1 to 12, got 0"),
        (lambda: route(top_k=13), ValueError, "top_k: expected an int from 1 to 12, got 13"),
        (lambda: route(top_k=7, n_groups=4, top_groups=2), ValueError, "top_k: expected an int from 1 to 6, got 7"),
        (lambda: route(n_groups=0), ValueError, "n_groups: expected an int at least 1, got 0"),
        (lambda: route(n_groups=5), ValueError, "n_groups: expected a divisor of E = 12, got 5"),
        (lambda: route(n_groups=True), TypeError, "n_groups: expected an int, got bool"),
        (lambda: route(top_groups=2), ValueError, "top_groups: expected an int from 1 to 1, got 2"),
        (lambda: route(n_groups=4, top_groups="2"), TypeError, "top_groups: expected an int, got str"),
        (lambda: route(score="relu"), ValueError, "score: expected 'sigmoid' or 'softmax', got 'relu'"),
        (lambda: route(normalize="no"), ValueError, "normalize: expected True or False, got 'no'"),
        (lambda: route(scale="2"), TypeError, "scale: expected a float, got str"),
        (lambda: route(impl="cuda"), ValueError, "impl: expected one of hopper, triton, reference, got 'cuda'"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("route", (X, None, 2, 1, 1, True, False, 1.0)),
        ("route", (X.clone().requires_grad_(), BIAS, 2, 4, 2, False, True, 2.5)),
        ("route_backward", (X[:, :2], X, X[:, :2].abs(), torch.tensor([[3, 1]] * 5), False, True, 2.5)),
    ],
)
def test_registration(op, args):
    check_registration(getattr(torch.ops.dskernels, op).default, args)
