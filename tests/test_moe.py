"""Permuting tokens to experts and back: exactness, hostile ids, gradients, bad input, registration."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.moe.config import SCAN_BLOCKS, SORT_BLOCK
from dskernels.parity import moe as cases
from dskernels.reference import combine as reference_combine
from dskernels.reference import permute as reference_permute
from registering import check_registration

BF16 = 5e-6  # half the square of half an ulp
FP32 = 1e-10
NAN = float("nan")
IMPLS = ["reference", "triton"]


@pytest.mark.parametrize(
    "case", [c for c in cases.CASES if c.op != "fused_experts"], ids=lambda case: f"{case.op} {case.label}"
)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def check_permuted(permuted, x, experts, n_experts):
    """The contract, stated with lists: expert by expert, tokens in order inside, the rest zero."""
    top_k = experts.shape[1]
    choices = [(e, i) for i, e in enumerate(experts.flatten().tolist()) if 0 <= e < n_experts]
    choices.sort()  # by expert, then by token and choice
    index = torch.full((experts.numel(),), -1, dtype=torch.int32)
    for row, (_, i) in enumerate(choices):
        index[i] = row
    load = torch.bincount(torch.tensor([e for e, _ in choices], dtype=torch.long), minlength=n_experts)
    want_x = torch.zeros(experts.numel(), x.shape[1], dtype=x.dtype)
    for row, (_, i) in enumerate(choices):
        want_x[row] = x[i // top_k].cpu()
    assert permuted.offsets.dtype == permuted.index.dtype == torch.int32
    assert permuted.offsets.tolist() == [0, *load.cumsum(0).tolist()]
    assert torch.equal(permuted.index.cpu(), index.view(experts.shape))
    assert torch.equal(permuted.x.cpu(), want_x)
    assert permuted.x.dtype == x.dtype


@pytest.fixture(params=["few", "many"])
def how_many(request, monkeypatch):
    """Both ways of sorting, whatever the number of choices."""
    from dskernels.moe import triton_sort

    monkeypatch.setattr(triton_sort, "MOST_COMPARED", 1 << 20 if request.param == "few" else 0)


@pytest.mark.usefixtures("how_many")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "n_experts", "width"),
    [
        (1, 1, 1, 8),  # the smallest
        (50, 8, 8, 40),  # every token to every expert, four blocks of the sort
        (37, 7, 160, 24),  # E is no power of two
        (20, 32, 1024, 8),  # the most experts, k = 32
        (3, 2, 384, 1500),  # a row in more than one piece
    ],
)
def test_permute(device, impl, tokens, top_k, n_experts, width):
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    experts = torch.rand(tokens, n_experts, device=device).topk(top_k).indices
    experts = experts.int() if top_k % 2 else experts  # ids of either width
    check_permuted(ds.permute(x, experts, n_experts, impl=impl), x, experts, n_experts)


@pytest.mark.usefixtures("how_many")
@pytest.mark.parametrize("impl", IMPLS)
def test_one_expert_takes_all(device, impl):
    x = torch.randn(150, 8, device=device)
    experts = torch.full((150, 1), 2, device=device)
    permuted = ds.permute(x, experts, 5, impl=impl)
    check_permuted(permuted, x, experts, 5)
    assert torch.equal(permuted.x, x)  # stable: in the order of the tokens


@settings(max_examples=15)
@given(
    ids=st.lists(st.integers(-2, 6) | st.sampled_from([-(2**31), 2**31 - 1, 2**40, -(2**62)]), min_size=3, max_size=60),
    top_k=st.integers(1, 3),
    n_experts=st.integers(1, 5),
)
def test_any_ids(device, ids, top_k, n_experts):
    """Ids out of range, in int64 also beyond int32, and the same expert twice for one token."""
    experts = torch.tensor(ids[: len(ids) // top_k * top_k], device=device).view(-1, top_k)
    x = torch.randn(len(experts), 8, device=device)
    x[((experts < 0) | (experts >= n_experts)).all(1)] = NAN  # a token that nobody takes is not read
    permuted = ds.permute(x, experts, n_experts, impl="triton")
    check_permuted(permuted, x, experts, n_experts)
    assert all(torch.equal(a, b) for a, b in zip(permuted, reference_permute(x, experts, n_experts), strict=True))
    check_source(experts, n_experts)


def check_source(experts, n_experts):
    """Both ways of sorting agree, and `source` is the inverse of `index`."""
    from dskernels.moe import triton_sort

    results = []
    for most in (1 << 20, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(triton_sort, "MOST_COMPARED", most)
            results.append(triton_sort.sort(experts, n_experts))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    offsets, index, source = results[0]
    used = offsets[-1].item()
    rows = torch.arange(used, device=experts.device, dtype=torch.int32)
    assert torch.equal(index.flatten()[source[:used].long()], rows)
    assert (source[used:] == -1).all()


@pytest.mark.parametrize("blocks", [1, *SCAN_BLOCKS])
def test_sort_of_more_blocks_than_are_scanned_at_a_time(device, blocks):
    from dskernels.moe.triton_sort import sort

    size = SORT_BLOCK * blocks + 3 * SORT_BLOCK + 5
    experts = torch.randint(-1, 20, (size, 1), device=device)
    offsets, index, source = sort(experts, 20)
    want = reference_permute(torch.zeros(size, 1), experts.cpu(), 20)
    assert torch.equal(offsets.cpu(), want.offsets)
    assert torch.equal(index.cpu(), want.index)
    used = offsets[-1].item()
    assert torch.equal(index[source[:used].long(), 0], torch.arange(used, device=device, dtype=torch.int32))
    assert (source[used:] == -1).all()


@pytest.mark.parametrize(("tokens", "width"), [(5, 136), (150, 1500)])  # rows and scales in one piece and in several
def test_quantised_rows(device, monkeypatch, tokens, width):
    """Data and scales of each token at the rows of its choices; rows after the last expert's are left alone."""
    from dskernels.moe import triton

    def sevens(like, shape, dtype, strides=None):
        strides = strides or torch.empty(shape, device="meta").stride()
        return like.new_empty_strided(shape, strides, dtype=torch.float32).fill_(7).to(dtype)

    x = ds.quantize(torch.randn(tokens, width, device=device))
    experts = torch.randint(-1, 5, (tokens, 3), device=device)
    offsets, index, source = triton.sort(experts, 5)
    monkeypatch.setattr(triton, "empty", sevens)
    monkeypatch.setattr("dskernels.fp8.layout.empty", sevens)
    rows = triton.permute_rows(x, index, source)
    used = offsets[-1].item()
    token = (source[:used] // 3).long()
    assert torch.equal(rows.data[:used].float(), x.data.float()[token])
    assert torch.equal(rows.scale[:used], x.scale[token])
    assert (rows.data[used:].float() == 7).all()
    assert (rows.scale[used:] == 7).all()
    assert rows.scale.stride() == (1, -(-3 * tokens // 4) * 4)
    plain = triton.permute_rows(x.scale.contiguous(), index, source)
    assert torch.equal(plain[:used], x.scale[token])
    assert (plain[used:] == 7).all()


def test_experts_may_be_part_of_a_wider_tensor(device):
    x, experts = torch.randn(9, 8, device=device), torch.randint(0, 4, (9, 6), device=device)
    got = ds.permute(x, experts[:, 1:3], 4, impl="triton")
    check_permuted(got, x, experts[:, 1:3], 4)
    weights = torch.rand(9, 6, device=device)
    torch.testing.assert_close(
        ds.combine(got.x, got, weights[:, 2:4], impl="triton"), x * weights[:, 2:4].sum(1, keepdim=True)
    )


# ---- combine --------------------------------------------------------------------------------------------------------


def routed(tokens, top_k, n_experts, width, device, dtype=torch.float32):
    """Expert outputs whose rows after the last expert's are NaN, a permutation with dropped choices, and weights."""
    experts = torch.randint(-1, n_experts, (tokens, top_k))
    experts[0] = -1
    permuted = reference_permute(torch.zeros(tokens, width), experts, n_experts)
    permuted = ds.Permuted(*(t.to(device) for t in permuted))
    y = torch.randn(tokens * top_k, width, device=device, dtype=dtype)
    y[permuted.offsets[-1] :] = NAN
    return y, permuted, torch.rand(tokens, top_k, device=device)


def combine64(y, permuted, weights):
    out = torch.zeros(weights.shape[0], y.shape[1], dtype=torch.float64, device=y.device)
    for t, rows in enumerate(permuted.index.tolist()):
        for j, row in enumerate(rows):
            if 0 <= row < len(y):
                out[t] += weights[t, j].double() * y[row].double()
    return out


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 1, 8), (30, 8, 72), (5, 2, 1500)])
def test_combine(device, impl, dtype, tolerance, tokens, top_k, width):
    y, permuted, weights = routed(tokens, top_k, 16, width, device, dtype)
    out = ds.combine(y, permuted, weights, impl=impl)
    assert out.dtype == dtype
    assert parity.difference(out, combine64(y, permuted, weights)) < tolerance
    assert (out[0] == 0).all()  # a token without choices, and no NaN * 0
    assert torch.equal(ds.combine(y, permuted, weights, impl=impl), out)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_index_stays_inside(device, impl):
    y, permuted, weights = routed(20, 3, 4, 40, device)
    hostile = torch.tensor([-(2**31), 2**31 - 1, 60, -1, 59], dtype=torch.int32, device=device)
    permuted = permuted._replace(index=hostile[torch.randint(0, 5, (20, 3), device=device)])
    y = y.nan_to_num(1.0)
    got = ds.combine(y, permuted, weights, impl=impl)
    torch.testing.assert_close(got.double(), combine64(y, permuted, weights), rtol=1e-5, atol=1e-6)
    y, weights = y.requires_grad_(), weights.requires_grad_()
    dy, dweights = torch.autograd.grad(ds.combine(y, permuted, weights, impl=impl).sum(), (y, weights))
    assert dy.shape == y.shape
    inside = (permuted.index >= 0) & (permuted.index < 60)
    assert (dweights[~inside] == 0).all()


# ---- gradients ------------------------------------------------------------------------------------------------------


def test_reference_gradients():
    experts = torch.tensor([[0, 2], [2, -1], [1, 0], [7, 7]])
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reference_permute(x, experts, 3).x, x)
    permuted = reference_permute(x.detach(), experts, 3)
    y = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, w: reference_combine(y, permuted, w), (y, weights))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
def test_permute_gradient(device, impl, dtype, tolerance):
    x = torch.randn(20, 72, device=device, dtype=dtype, requires_grad=True)
    experts = torch.randint(-1, 6, (20, 3), device=device)
    permuted = ds.permute(x, experts, 6, impl=impl)
    dy = torch.randn(60, 72, device=device, dtype=dtype)
    dy[permuted.offsets[-1] :] = NAN  # such rows went nowhere
    (dx,) = torch.autograd.grad(permuted.x, x, dy)
    want = combine64(dy, permuted, torch.ones(20, 3, device=device))
    assert dx.dtype == dtype
    assert parity.difference(dx, want) < tolerance


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)])
@pytest.mark.parametrize("width", [72, 1500])
def test_combine_gradients(device, impl, dtype, tolerance, width):
    y, permuted, weights = routed(15, 3, 4, width, device, dtype)
    dout = torch.randn(15, width, device=device, dtype=dtype)
    y, weights = y.requires_grad_(), weights.requires_grad_()
    dy, dweights = torch.autograd.grad(ds.combine(y, permuted, weights, impl=impl), (y, weights), dout)
    wide = [t.detach().double().nan_to_num(0).requires_grad_() for t in (y, weights)]
    want = torch.autograd.grad(reference_combine(wide[0], permuted, wide[1]), wide, dout.double())
    assert (dy.dtype, dweights.dtype) == (dtype, torch.float32)
    assert parity.difference(dy, want[0]) < tolerance
    assert parity.difference(dweights, want[1]) < FP32
    assert (dy[permuted.offsets[-1] :] == 0).all()  # not left as it was
    assert (dweights[permuted.index < 0] == 0).all()


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("tokens", "top_k", "width"), [(0, 2, 8), (3, 0, 8), (3, 2, 0)])
def test_empty(device, impl, tokens, top_k, width):
    x = torch.randn(tokens, width, device=device)
    experts = torch.zeros(tokens, top_k, dtype=torch.int32, device=device)
    permuted = ds.permute(x, experts, 4, impl=impl)
    assert permuted.x.shape == (tokens * top_k, width)
    assert permuted.offsets.tolist() == [0] + [tokens * top_k] * 4
    out = ds.combine(permuted.x, permuted, torch.ones(tokens, top_k, device=device), impl=impl)
    assert out.shape == (tokens, width)
    assert (out == 0).all()


X, EXPERTS = torch.randn(6, 8), torch.tensor([[0, 1], [2, 3], [1, 1], [3, 0], [0, 2], [-1, 2]])
PERMUTED = reference_permute(X, EXPERTS, 4)
Y, WEIGHTS = torch.randn(12, 8), torch.rand(6, 2)


def combined(y=Y, permuted=PERMUTED, weights=WEIGHTS, **parts):
    return ds.combine(y, permuted._replace(**parts) if parts else permuted, weights)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ds.permute(X.numpy(), EXPERTS, 4), TypeError, "x: expected a torch.Tensor, got ndarray"),
        (lambda: ds.permute(X.double(), EXPERTS, 4), TypeError, "x: expected dtype .* got float64"),
        (lambda: ds.permute(X[0], EXPERTS, 4), ValueError, r"x: expected shape \[T, H\]"),
        (lambda: ds.permute(X.T.contiguous().T, EXPERTS, 4), ValueError, "x: expected a contiguous last dimension"),
        (lambda: ds.permute(X, EXPERTS.float(), 4), TypeError, "experts: expected dtype int32 or int64, got float32"),
        (lambda: ds.permute(X, EXPERTS[:5], 4), ValueError, r"experts: expected shape \[6, k\], got \[5, 2\]"),
        (lambda: ds.permute(X, EXPERTS[:, 0], 4), ValueError, r"experts: expected shape \[6, k\]"),
        (lambda: ds.permute(X, EXPERTS.to("meta"), 4), ValueError, "experts: expected a tensor on cpu"),
        (lambda: ds.permute(X, EXPERTS, 0), ValueError, "n_experts: expected an int from 1 to 1024, got 0"),
        (lambda: ds.permute(X, EXPERTS, 1025), ValueError, "n_experts: expected an int from 1 to 1024"),
        (lambda: ds.permute(X, EXPERTS, 4.0), TypeError, "n_experts: expected an int, got float"),
        (lambda: ds.permute(X, EXPERTS, 4, impl="cuda"), ValueError, "impl: expected one of"),
        (lambda: combined(y=Y.int()), TypeError, "y: expected dtype"),
        (lambda: combined(y=Y[None]), ValueError, r"y: expected shape \[T \* k, H\]"),
        (lambda: combined(y=Y[:11]), ValueError, r"y: expected T \* k rows .* shape \[6, 2\], got 11"),
        (lambda: combined(permuted=tuple(PERMUTED)), TypeError, "permuted: expected a Permuted .* got tuple"),
        (lambda: combined(index=PERMUTED.index.long()), TypeError, "permuted.index: expected dtype int32"),
        (lambda: combined(index=PERMUTED.index[0]), ValueError, r"permuted.index: expected shape \[T, k\]"),
        (lambda: combined(offsets=PERMUTED.offsets.long()), TypeError, "permuted.offsets: expected dtype int32"),
        (lambda: combined(offsets=PERMUTED.index), ValueError, r"permuted.offsets: expected shape \[E \+ 1\]"),
        (lambda: combined(weights=WEIGHTS.bfloat16()), TypeError, "weights: expected dtype float32, got bfloat16"),
        (
            lambda: combined(weights=WEIGHTS.T.contiguous()),
            ValueError,
            r"weights: expected shape \[6, 2\], got \[2, 6\]",
        ),
        (lambda: combined(weights=WEIGHTS.to("meta")), ValueError, "weights: expected a tensor on cpu"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    x, y, weights = (t.clone().requires_grad_() for t in (X, Y, WEIGHTS))
    offsets, index = PERMUTED.offsets, PERMUTED.index
    check_registration(ops.permute.default, (x, EXPERTS, 4))
    check_registration(ops.permute_backward.default, (Y, index))
    check_registration(ops.combine.default, (y, offsets, index, weights))
    check_registration(ops.combine_backward.default, (X, Y, offsets, index, WEIGHTS))


def test_compiles_whole():
    def through(x, experts, weights):
        permuted = ds.permute(x, experts, 4)
        return ds.combine(permuted.x.square(), permuted, weights)

    x, weights = X.clone().requires_grad_(), WEIGHTS.clone().requires_grad_()
    compiled = torch.compile(through, backend="aot_eager", fullgraph=True, dynamic=True)
    got, want = (f(x, EXPERTS, weights) for f in (compiled, through))
    assert torch.equal(got, want)
    got, want = (torch.autograd.grad(out.sum(), (x, weights)) for out in (got, want))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


# ---- what only a GPU can do in time ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "width"), [(4001, 7168), (70_000, 512)])  # more programs than a grid's y may have
def test_model_shapes(device, tokens, width):
    x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
    experts = torch.rand(tokens, 256, device=device).topk(8).indices.int()
    got, want = ds.permute(x, experts, 256), reference_permute(x, experts, 256)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
    weights = torch.rand(tokens, 8, device=device)
    out = ds.combine(got.x, got, weights)
    assert parity.difference(out, reference_combine(got.x, got, weights)) < BF16
    assert torch.equal(ds.combine(got.x, got, weights), out)


@pytest.mark.gpu
def test_runs_in_a_cuda_graph(device):
    x, weights = torch.randn(300, 136, device=device), torch.rand(300, 4, device=device)
    experts = torch.randint(-1, 16, (300, 4), device=device)

    def through():
        permuted = ds.permute(x, experts, 16)
        return ds.combine(permuted.x, permuted, weights)

    through()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = through()
    for _ in range(3):
        experts.copy_(torch.randint(-3, 20, (300, 4)))
        graph.replay()
        assert torch.equal(got, through())
