"""What keeps the load of experts even: the bias update and the sequence-wise loss, kernels and references."""

import math
import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
import routing_oracle as oracle
from benchmarks import balancing
from dskernels import parity
from dskernels.parity import routing as cases
from dskernels.reference import routing as reference
from dskernels.routing.config import MAX_EXPERTS
from dskernels.routing.triton_balance import sum_loss_kernel
from registering import check_registration

NAN, INF = math.nan, math.inf
IMPLS = ["reference", "triton"]


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if not c.op.startswith("route")], ids=lambda case: f"{case.op} {case.label}"
)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


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
    logits[4, 0], logits[4, 1:8] = -INF, INF  # five of seven equal ones are chosen
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
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=3 * 0.1 * 10 * 2**-20)
    inside = torch.arange(11) < sum(max(n, 0) for n in lengths)
    inside[3] = False
    assert not got.cpu()[~inside].any()
    assert not got.cpu()[4, :8].any()


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


def test_load_statistics(device):
    load = torch.tensor([[4, 4, 4, 4], [16, 0, 0, 0], [0, 0, 0, 0], [2, 4, 6, 4]], dtype=torch.int32, device=device)
    for statistics in (ds.load_statistics(load), ds.reference.load_statistics(load.long())):
        assert statistics.share.tolist() == [[1] * 4, [4, 0, 0, 0], [1] * 4, [0.5, 1, 1.5, 1]]
        assert statistics.violation.tolist() == [0, 3, 0, 0.5]
        torch.testing.assert_close(statistics.deviation.cpu(), torch.tensor([0, 3**0.5, 0, 0.125**0.5]))
        assert statistics.idle.tolist() == [0, 0.75, 0, 0]
    assert ds.load_statistics(load[1]).violation == 3
    with pytest.raises(TypeError, match="load: expected dtype int32 or int64, got float32"):
        ds.load_statistics(load.float())
    with pytest.raises(ValueError, match=r"load: expected at least one expert, got \[4, 0\]"):
        ds.load_statistics(load[:, :0])


def test_a_skewed_router_becomes_even():
    """The experiment that the docs draw, with a quarter of the tokens: their noise alone makes a violation of 0.17."""
    skewed = balancing.run(0.0, steps=1, tokens=2048)
    assert skewed.violation[0] > 2
    run = balancing.run(0.001, steps=190, tokens=2048)
    assert 100 < run.even_from(limit=0.25) < 170
    assert max(run.last) < 1.4
    assert min(run.last) > 0.6
    assert balancing.run(0.01, steps=60, tokens=2048).even_from(limit=0.4) < 20


def test_the_parts_of_the_loss_are_summed_block_by_block(device):
    parts, out = torch.randn(13, device=device), torch.empty((), device=device)
    filled = torch.tensor(3, dtype=torch.int32, device=device)
    sum_loss_kernel[(1,)](parts, filled, out, 13, 0.5, BLOCK=4)
    torch.testing.assert_close(out, 0.5 * parts.sum() / 3)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_tokens(device, impl):
    logits = torch.empty(0, 12, device=device, requires_grad=True)
    lengths = torch.tensor([0, 4], dtype=torch.int32, device=device)
    loss = ds.balance_loss(logits, top_k=3, alpha=0.1, sequence_lengths=lengths, impl=impl)
    assert loss == 0
    loss.backward()
    assert logits.grad.shape == (0, 12)
    bias = torch.ones(12, device=device)
    ds.update_bias(bias, ds.route(logits, top_k=3, impl=impl).load, 0.1, impl=impl)
    assert (bias == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits(device, dtype):
    logits = torch.randn(5, 64, device=device).to(dtype).requires_grad_()
    single = logits.detach().float().requires_grad_()
    lengths = torch.tensor([2, 3], dtype=torch.int32, device=device)
    options = dict(top_k=4, alpha=1.0, sequence_lengths=lengths, impl="triton")
    got, want = (ds.balance_loss(x, **options) for x in (logits, single))
    torch.testing.assert_close(got, want)
    (got_grad,), (want_grad,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, single)
    assert got_grad.dtype == dtype
    torch.testing.assert_close(got_grad, want_grad.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=2**-24)


def test_repeated_calls_return_the_same_bits(device):
    logits = torch.randn(40, 32, device=device, requires_grad=True)
    lengths = torch.tensor([7, 30], dtype=torch.int32, device=device)

    def run():
        loss = ds.balance_loss(logits, top_k=4, alpha=1.0, sequence_lengths=lengths, impl="triton")
        return loss, *torch.autograd.grad(loss, logits)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(("n_tokens", "n_experts", "top_k"), [(4001, 256, 8), (8001, 160, 6), (4001, 1000, 32)])
@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_model_shapes(device, n_tokens, n_experts, top_k, score):
    logits = torch.randn(n_tokens, n_experts, device=device, requires_grad=True)
    lengths = torch.tensor([1000, 0, 3000, 9000], dtype=torch.int32, device=device)
    options = dict(top_k=top_k, alpha=1.0, sequence_lengths=lengths, score=score)
    wide = logits.detach().double().requires_grad_()
    got, want = ds.balance_loss(logits, **options, impl="triton"), reference.balance_loss(wide, **options)
    # A near tie may fall the other way in fp64, which moves f by one of some hundred choices.
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=0)
    (got_grad,), (want_grad,) = torch.autograd.grad(got, logits), torch.autograd.grad(want, wide)
    assert parity.difference(got_grad, want_grad) < 1e-4
    for _ in range(10):
        assert torch.equal(ds.balance_loss(logits, **options, impl="triton"), got)


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
    load = torch.ones(MAX_EXPERTS + 1, device=device, dtype=torch.int32)
    lengths = torch.tensor([2], dtype=torch.int32, device=device)
    for call in (
        lambda **impl: ds.update_bias(bias, load, 0.1, **impl),
        lambda **impl: ds.balance_loss(logits, top_k=2, alpha=1.0, sequence_lengths=lengths, **impl),
    ):
        call()
        with pytest.raises(ValueError, match="at most 1024, got 1025"):
            call(impl="triton")


X = torch.randn(5, 12)
BIAS = torch.zeros(12)
LOAD = torch.zeros(12, dtype=torch.int32)
LENGTHS = torch.tensor([2, 3], dtype=torch.int32)


def loss(logits=X, **options):
    return ds.balance_loss(logits, **{"top_k": 2, "alpha": 0.1, "sequence_lengths": LENGTHS, **options})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.update_bias(BIAS.double(), LOAD, 0.1), TypeError, "bias: expected dtype float32, got float64"),
        (lambda: ds.update_bias(X, LOAD, 0.1), ValueError, r"bias: expected shape \[E\], got \[5, 12\]"),
        (lambda: ds.update_bias(BIAS.clone().requires_grad_(), LOAD, 0.1), ValueError, "bias: .* requires no gradient"),
        (
            lambda: ds.update_bias(BIAS, LOAD.float(), 0.1),
            TypeError,
            "load: expected dtype int32 or int64, got float32",
        ),
        (
            lambda: ds.update_bias(BIAS, LOAD, 0.1, "world"),
            TypeError,
            "group: expected a torch.distributed.ProcessGroup",
        ),
        (lambda: ds.update_bias(BIAS, LOAD[:3], 0.1), ValueError, r"load: expected shape \[12\], got \[3\]"),
        (lambda: ds.update_bias(BIAS, LOAD.to("meta"), 0.1), ValueError, "load: expected a tensor on cpu"),
        (lambda: ds.update_bias(BIAS, LOAD, None), TypeError, "rate: expected a float, got NoneType"),
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
        ("update_bias", (BIAS.clone(), LOAD, 0.1)),
        ("balance_loss", (X, LENGTHS, 2, 0.1, True)),
        ("balance_loss", (X.clone().requires_grad_(), LENGTHS, 2, 0.1, False)),
        ("balance_loss_backward", (torch.tensor(1.0), X, LENGTHS, 2, 0.1, False)),
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
