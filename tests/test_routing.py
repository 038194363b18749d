"""Routing: kernels against Python's own arithmetic and the references, gradients, bad input, registration."""

import math
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
import routing_oracle as oracle
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.parity import routing as cases
from dskernels.reference import routing as reference
from dskernels.routing.config import MAX_EXPERTS, RowConfig, choose_config
from registering import check_registration

NAN, INF = math.nan, math.inf
IMPLS = ["reference", "triton"]


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: f"{case.op} {case.label}")
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
    assert (routed.weights == 1).all()


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_scored_in_fp32(device, impl, dtype):
    logits = torch.randn(6, 96, device=device).to(dtype)
    options = dict(top_k=4, n_groups=4, top_groups=2, impl=impl)
    low, single = ds.route(logits, **options), ds.route(logits.float(), **options)
    assert all(torch.equal(a, b) for a, b in zip(low, single, strict=True))
    loss = dict(top_k=4, alpha=0.1, sequence_lengths=torch.tensor([2, 4], dtype=torch.int32, device=device), impl=impl)
    assert torch.equal(ds.balance_loss(logits, **loss), ds.balance_loss(logits.float(), **loss))


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_may_be_strided(device, impl):
    logits = torch.randn(12, 80, device=device)[::2, 16:64]
    strided, dense = (ds.route(x, top_k=3, impl=impl) for x in (logits, logits.contiguous()))
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))
    repeated = ds.route(logits[:1].expand(5, 48), top_k=3, impl=impl)
    assert (repeated.experts == dense.experts[0]).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(device, impl):
    logits = torch.empty(0, 12, device=device, requires_grad=True)
    routed = ds.route(logits, top_k=3, n_groups=4, top_groups=2, impl=impl)
    assert [tuple(t.shape) for t in routed] == [(0, 3), (0, 3), (12,), ()]
    assert not routed.load.any()
    assert routed.nonfinite == 0
    lengths = torch.tensor([0, 4], dtype=torch.int32, device=device)
    loss = ds.balance_loss(logits, top_k=3, alpha=0.1, sequence_lengths=lengths, impl=impl)
    assert loss == 0
    (loss + routed.weights.sum()).backward()
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
    logits[2, 5], logits[2, 6] = INF, -INF
    logits.requires_grad_()
    for normalize in (True, False):
        routed = ds.route(logits, top_k=4, score=score, normalize=normalize, impl=impl)
        grad = torch.randn(4, 4, device=device)
        grad[1] = NAN
        (got,) = torch.autograd.grad(routed.weights, logits, grad)
        assert got.isfinite().all()
        assert not got[1].any()
        assert not got[2, 5:7].any()
        assert got[[0, 3]].any(1).all()
    weights = ds.route(logits, top_k=4, score=score, scale=0.0, impl=impl).weights
    assert not torch.autograd.grad(weights.sum(), logits)[0].any()
    nan_bias = torch.full((12,), NAN, device=device)
    weights = ds.route(logits, nan_bias, top_k=4, score=score, normalize=False, impl=impl).weights
    assert not torch.autograd.grad(weights.sum(), logits)[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtype_of_the_logits(device, dtype):
    logits = torch.randn(3, 64, device=device).to(dtype).requires_grad_()
    lengths = torch.tensor([3], dtype=torch.int32, device=device)
    grads = []
    for x in (logits, logits.detach().float().requires_grad_()):
        weights = ds.route(x, top_k=4, impl="triton").weights
        loss = ds.balance_loss(x, top_k=4, alpha=1.0, sequence_lengths=lengths, impl="triton")
        grads += [torch.autograd.grad(weights[:, 0].sum(), x)[0], torch.autograd.grad(loss, x)[0]]
    assert torch.equal(grads[0], grads[2].to(dtype))
    assert torch.equal(grads[1], grads[3].to(dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize(
    "lengths",
    [
        [11],
        [3, 8],
        [1, 4, 2],  # the last four tokens belong to no sequence
        [5, 0, 0, 6, 0],  # sequences without a token are not averaged over
        [4, 100],  # more than there are
        [4, -3, 5],  # a negative length is an empty sequence
        [1] * 11,
        [0, 0],
        [],
    ],
)
def test_balance_loss(device, impl, lengths, score):
    logits = torch.randn(11, 48)
    logits[3, 40] = NAN  # a padding row counts for nothing
    logits[4, 1], logits[4, 2] = -INF, INF
    x = logits.to(device).requires_grad_()
    lengths_S = torch.tensor(lengths, dtype=torch.int32)
    options = dict(top_k=5, alpha=0.1, score=score)
    loss = ds.balance_loss(x, sequence_lengths=lengths_S.to(device), **options, impl=impl)
    assert loss.shape == ()
    want = oracle.balance_loss(logits.double().tolist(), 5, 0.1, lengths, score)
    torch.testing.assert_close(loss.item(), want, rtol=64 * 2**-23, atol=0)

    (got,) = torch.autograd.grad(loss, x, torch.tensor(3.0, device=device))
    wide = logits.double().requires_grad_()
    (want,) = torch.autograd.grad(3 * reference.balance_loss(wide, sequence_lengths=lengths_S, **options), wide)
    # f reaches E / k = 10, and f - sum(f p) cancels where one expert has all the affinity.
    check_gradient(got, want, 3 * 0.1 * 10 / max(1, min((n for n in lengths if n > 0), default=1)))
    inside = torch.arange(11) < sum(max(n, 0) for n in lengths)
    inside[3] = False
    assert not got.cpu()[~inside].any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("n_experts", "top_k"), [(2, 1), (6, 6), (160, 6), (384, 8), (1000, 3)])
def test_balance_loss_of_other_sizes(device, impl, n_experts, top_k):
    logits = torch.randn(5, n_experts)
    lengths = torch.tensor([2, 3], dtype=torch.int32)
    loss = ds.balance_loss(
        logits.to(device), top_k=top_k, alpha=1.0, sequence_lengths=lengths.to(device), impl=impl
    ).item()
    torch.testing.assert_close(
        loss, oracle.balance_loss(logits.double().tolist(), top_k, 1.0, [2, 3]), rtol=1e-5, atol=0
    )
    if top_k == n_experts:
        torch.testing.assert_close(loss, 1.0)  # f is 1 for all


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(-2, 9), max_size=40),
    n_tokens=st.integers(1, 20),
    score=st.sampled_from(["sigmoid", "softmax"]),
)
def test_balance_loss_of_any_lengths(device, lengths, n_tokens, score):
    logits = torch.randn(n_tokens, 12, device=device)
    lengths_S = torch.tensor(lengths, dtype=torch.int32, device=device)
    options = dict(top_k=3, alpha=1.0, sequence_lengths=lengths_S, score=score)
    got, want = ds.balance_loss(logits, **options, impl="triton"), reference.balance_loss(logits.double(), **options)
    torch.testing.assert_close(got.double(), want, rtol=64 * 2**-23, atol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_update_bias(device, impl, dtype):
    # A mean of 7/3 is no whole number; an expert of just the mean load stays.
    bias = torch.tensor([0.5, -0.5, 12.0], device=device)
    load = torch.tensor([2, 3, 2], dtype=dtype, device=device)
    assert ds.update_bias(bias, load, 0.25, impl=impl) is bias
    assert bias.tolist() == [0.75, -0.75, 12.25]
    assert load.tolist() == [2, 3, 2]
    ds.update_bias(bias, torch.tensor([4, 2, 0], dtype=dtype, device=device), 0.25, impl=impl)
    assert bias.tolist() == [0.5, -0.75, 12.5]
    # Their sum does not fit in 32 bits.
    ds.update_bias(bias, torch.full((3,), 2**31 - 1, dtype=dtype, device=device), 0.25, impl=impl)
    assert bias.tolist() == [0.5, -0.75, 12.5]
    ds.update_bias(bias, torch.tensor([9, 0, 0], dtype=dtype, device=device), 0, impl=impl)
    assert bias.tolist() == [0.5, -0.75, 12.5]


@pytest.mark.parametrize("n_experts", [1, 6, 384, 1000])
def test_update_bias_equals_the_reference(device, n_experts):
    bias = torch.randn(n_experts, device=device)
    load = torch.randint(0, 50, (n_experts,), dtype=torch.int32, device=device)
    want = reference.update_bias(bias.clone(), load, 0.001)
    assert torch.equal(ds.update_bias(bias, load, 0.001, impl="triton"), want)


def test_update_bias_sums_the_load_of_all_ranks():
    """Two ranks as two threads: alone, each would move its bias the other way."""
    store = dist.HashStore()
    loads = [torch.tensor([5, 0, 1], dtype=torch.int32), torch.tensor([0, 7, 2], dtype=torch.int32)]
    biases = [torch.zeros(3), torch.zeros(3)]

    def run(rank):
        gloo = dist.ProcessGroup.BackendType.GLOO
        group = dist.ProcessGroup(store, rank, 2)
        group._set_default_backend(gloo)
        backend = dist.ProcessGroupGloo(store, rank, 2, dist.default_pg_timeout)
        group._register_backend(torch.device("cpu"), gloo, backend)
        ds.update_bias(biases[rank], loads[rank], 0.5, group)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [bias.tolist() for bias in biases] == [[0.0, -0.5, 0.5]] * 2
    assert loads[0].tolist() == [5, 0, 1]


def test_repeated_calls_return_the_same_bits(device):
    logits = torch.randn(40, 32, device=device, requires_grad=True)
    lengths = torch.tensor([7, 30], dtype=torch.int32, device=device)

    def run():
        routed = ds.route(logits, top_k=4, impl="triton")
        loss = ds.balance_loss(logits, top_k=4, alpha=1.0, sequence_lengths=lengths, impl="triton")
        grads = [torch.autograd.grad(out, logits)[0] for out in (routed.weights[:, 0].sum(), loss)]
        return [*routed, loss, *grads]

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
    lengths = torch.tensor([1000, 0, 3000, 9000], dtype=torch.int32, device=device)
    options = dict(top_k=top_k, alpha=1.0, sequence_lengths=lengths, score=score)
    got, want = ds.balance_loss(logits, **options), reference.balance_loss(logits.double(), **options)
    # A near tie may fall the other way in fp64.
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    for _ in range(10):
        assert torch.equal(ds.balance_loss(logits, **options), got)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(device):
    logits = torch.randn(64, 256, device=device, requires_grad=True)
    bias = torch.zeros(256, device=device)
    lengths = torch.tensor([30, 34], dtype=torch.int32, device=device)
    options = dict(top_k=8, alpha=1.0, sequence_lengths=lengths)

    def step():
        routed = ds.route(logits, bias, top_k=8, n_groups=8, top_groups=4)
        loss = ds.balance_loss(logits, **options)
        (grad,) = torch.autograd.grad(loss + routed.weights[:, 0].sum(), logits)
        ds.update_bias(bias, routed.load, 0.01)
        return routed.experts, routed.load, loss, grad

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.normal_()
        bias.zero_()
        lengths.copy_(torch.tensor([60, 2]))
    graph.replay()
    replayed = [t.clone() for t in captured]
    bias.zero_()
    assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


def test_too_many_experts_are_refused_by_the_kernels_alone(device):
    logits = torch.randn(2, MAX_EXPERTS + 1, device=device)
    bias = torch.zeros(MAX_EXPERTS + 1, device=device)
    lengths = torch.tensor([2], dtype=torch.int32, device=device)
    calls = [
        lambda **impl: ds.route(logits, top_k=2, **impl),
        lambda **impl: ds.update_bias(bias, ds.route(logits, top_k=2).load, 0.1, **impl),
        lambda **impl: ds.balance_loss(logits, top_k=2, alpha=1.0, sequence_lengths=lengths, **impl),
    ]
    for call in calls:
        call()
        with pytest.raises(ValueError, match="at most 1024, got 1025"):
            call(impl="triton")


X = torch.randn(5, 12)
BIAS = torch.zeros(12)
LOAD = torch.zeros(12, dtype=torch.int32)
LENGTHS = torch.tensor([2, 3], dtype=torch.int32)


def route(logits=X, bias=None, **options):
    return ds.route(logits, bias, **{"top_k": 2, **options})


def loss(logits=X, **options):
    return ds.balance_loss(logits, **{"top_k": 2, "alpha": 0.1, "sequence_lengths": LENGTHS, **options})


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
        (lambda: ds.update_bias(BIAS.double(), LOAD, 0.1), TypeError, "bias: expected dtype float32, got float64"),
        (lambda: ds.update_bias(X, LOAD, 0.1), ValueError, r"bias: expected shape \[E\], got \[5, 12\]"),
        (lambda: ds.update_bias(BIAS.clone().requires_grad_(), LOAD, 0.1), ValueError, "bias: .* requires no gradient"),
        (
            lambda: ds.update_bias(BIAS, LOAD.float(), 0.1),
            TypeError,
            "load: expected dtype int32 or int64, got float32",
        ),
        (lambda: ds.update_bias(BIAS, LOAD[:3], 0.1), ValueError, r"load: expected shape \[12\], got \[3\]"),
        (lambda: ds.update_bias(BIAS, LOAD.to("meta"), 0.1), ValueError, "load: expected a tensor on cpu"),
        (lambda: ds.update_bias(BIAS, LOAD, None), TypeError, "rate: expected a float, got NoneType"),
        (
            lambda: ds.update_bias(BIAS, LOAD, 0.1, "world"),
            TypeError,
            "group: expected a torch.distributed.ProcessGroup",
        ),
        (lambda: ds.update_bias(BIAS, LOAD, 0.1, impl="gpu"), ValueError, "impl: expected one of"),
        (lambda: loss(X.int()), TypeError, "logits: expected dtype"),
        (lambda: loss(X[None]), ValueError, r"logits: expected shape \[T, E\]"),
        (lambda: loss(top_k=13), ValueError, "top_k: expected an int from 1 to 12, got 13"),
        (lambda: loss(alpha="a"), TypeError, "alpha: expected a float, got str"),
        (lambda: loss(sequence_lengths=[2, 3]), TypeError, "sequence_lengths: expected a torch.Tensor, got list"),
        (lambda: loss(sequence_lengths=LENGTHS.long()), TypeError, "sequence_lengths: expected dtype int32, got int64"),
        (lambda: loss(sequence_lengths=LENGTHS[None]), ValueError, r"sequence_lengths: expected shape \[S\]"),
        (lambda: loss(sequence_lengths=LENGTHS.to("meta")), ValueError, "sequence_lengths: expected a tensor on cpu"),
        (lambda: loss(score=None), ValueError, "score: expected 'sigmoid' or 'softmax', got None"),
        (lambda: loss(impl="gpu"), ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("route", (X, None, 2, 1, 1, "softmax", False, 1.0)),
        ("route", (X.clone().requires_grad_(), BIAS, 2, 4, 2, "sigmoid", True, 2.5)),
        ("route_backward", (X[:, :2], X, X[:, :2].abs(), torch.tensor([[3, 1]] * 5), "sigmoid", True, 2.5)),
        ("update_bias", (BIAS.clone(), LOAD, 0.1)),
        ("balance_loss", (X, LENGTHS, 2, 0.1, "softmax")),
        ("balance_loss", (X.clone().requires_grad_(), LENGTHS, 2, 0.1, "sigmoid")),
        ("balance_loss_backward", (torch.tensor(1.0), X, LENGTHS, 2, 0.1, "sigmoid")),
    ],
)
def test_registration(op, args):
    check_registration(getattr(torch.ops.dskernels, op).default, args)


def test_compiles_whole():
    def step(logits, bias, lengths):
        routed = ds.route(logits, bias, top_k=3, n_groups=4, top_groups=2)
        loss = ds.balance_loss(logits, top_k=3, alpha=0.1, sequence_lengths=lengths)
        ds.update_bias(bias, routed.load, 0.1)
        return routed, loss + routed.weights[:, 0].sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    logits = X.clone().requires_grad_()
    biases = BIAS.clone(), BIAS.clone()
    (got, got_loss), (want, want_loss) = compiled(logits, biases[0], LENGTHS), step(logits, biases[1], LENGTHS)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    assert torch.equal(*biases)
    assert biases[0].any()
    (got_grad,), (want_grad,) = (torch.autograd.grad(loss, logits) for loss in (got_loss, want_loss))
    torch.testing.assert_close(got_grad, want_grad)


def test_choose_config():
    assert choose_config(256, 8) == RowConfig(rows=2, groups=8, members=32, num_warps=1)
    assert choose_config(256) == RowConfig(rows=2, groups=1, members=256, num_warps=1)
    assert choose_config(160, 8) == RowConfig(rows=2, groups=8, members=32, num_warps=1)
    assert choose_config(6) == RowConfig(rows=64, groups=1, members=8, num_warps=1)
    assert choose_config(1024) == RowConfig(rows=1, groups=1, members=1024, num_warps=1)
    assert choose_config(1000, 40) == RowConfig(rows=1, groups=64, members=32, num_warps=2)


# Experts, choices, groups and groups to keep: small, the published models, the largest, and the widest padding.
MODELS = [
    (2, 1, 1, 1),
    (16, 4, 4, 2),
    (64, 6, 1, 1),
    (160, 6, 8, 3),
    (256, 8, 8, 4),
    (384, 8, 1, 1),
    (1000, 32, 40, 7),
    (1023, 32, 33, 5),
    (1024, 32, 1, 1),
]


def test_kernels_compile_without_spills():
    kernels = []
    for n_experts, top_k, n_groups, top_groups in MODELS:
        softmax = n_experts % 10 == 0
        common = {"E": n_experts, "TOP_K": top_k, "SOFTMAX": softmax}
        config = choose_config(n_experts, n_groups)
        flat = choose_config(n_experts)
        row = {**common, "ROWS": flat.rows, "COLUMNS": flat.members}
        choices = 1 << (top_k - 1).bit_length()
        stride = {"divisible": ("stride_lt",) if n_experts % 16 == 0 else ()}
        integers = dict.fromkeys(("p_sequence", "p_tokens", "p_counts"), "*i32")
        kernels += [
            Compile(
                "dskernels.routing.triton:route_kernel",
                signature={
                    **{"p_logits": "*fp32", "p_bias": "*fp32", "p_weights": "*fp32", "p_experts": "*i32"},
                    **{"p_load": "*i32", "p_nonfinite": "*i32", "T": "i32", "scale": "fp32", "stride_lt": "i32"},
                },
                constants={
                    **common,
                    **{"N_GROUPS": n_groups, "TOP_GROUPS": top_groups, "NORMALIZE": True, "HAS_BIAS": True},
                    **{"ROWS": config.rows, "GROUPS": config.groups, "MEMBERS": config.members, "CHOICES": choices},
                },
                num_warps=config.num_warps,
                **stride,
            ),
            Compile(
                "dskernels.routing.triton:route_backward_kernel",
                signature={
                    **{"p_grad": "*fp32", "p_logits": "*fp32", "p_weights": "*fp32", "p_experts": "*i32"},
                    **{"p_dlogits": "*fp32", "T": "i32", "scale": "fp32", "stride_lt": "i32"},
                },
                constants={**row, "NORMALIZE": True, "CHOICES": choices},
                num_warps=flat.num_warps,
                **stride,
            ),
            Compile(
                "dskernels.routing.triton_balance:count_choices_kernel",
                signature={
                    **{"p_logits": "*fp32", "p_ends": "*i64", "p_filled": "*i32", **integers},
                    **dict.fromkeys(("T", "S", "steps", "stride_lt"), "i32"),
                },
                constants=row,
                num_warps=flat.num_warps,
                **stride,
            ),
            Compile(
                "dskernels.routing.triton_balance:token_loss_kernel",
                signature={"p_logits": "*fp32", **integers, "p_loss": "*fp32", "T": "i32", "stride_lt": "i32"},
                constants=row,
                num_warps=flat.num_warps,
                **stride,
            ),
            Compile(
                "dskernels.routing.triton_balance:balance_loss_backward_kernel",
                signature={
                    **{"p_grad": "*fp32", "p_logits": "*fp32", "p_filled": "*i32", **integers},
                    **{"p_dlogits": "*fp32", "T": "i32", "alpha": "fp32", "stride_lt": "i32"},
                },
                constants=row,
                num_warps=flat.num_warps,
                **stride,
            ),
            Compile(
                "dskernels.routing.triton_balance:update_bias_kernel",
                signature={"p_bias": "*fp32", "p_load": "*i32", "rate": "fp32"},
                constants={"E": n_experts, "COLUMNS": flat.members},
                num_warps=1,
            ),
        ]
    kernels.append(
        Compile(
            "dskernels.routing.triton_balance:sum_loss_kernel",
            signature={"p_parts": "*fp32", "p_filled": "*i32", "p_out": "*fp32", "n_parts": "i32", "alpha": "fp32"},
            constants={"BLOCK": 1024},
        )
    )
    assert_clean(compile_all(kernels))
