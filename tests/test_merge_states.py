"""Merging attention states: against fp64, infinities, gradients, bad input, registration, compilation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.parity import mla_decode as cases
from dskernels.reference import mla as reference
from registering import check_registration

MERGE_CASES = [case for case in cases.CASES if case.op == "merge_states"]
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
PREFILL, DECODE = (7, 3, 20), (2, 3, 5, 20)  # [T, H, V] and [B, Q, H, V]


@pytest.mark.parametrize("case", MERGE_CASES, ids=lambda case: case.label)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def states(shape, dtype=torch.float32, device="cpu", spread=5.0):
    """(out, lse) twice."""
    *batch, queries, heads, _ = shape
    tensors = [torch.randn(shape).to(dtype) if i % 2 == 0 else torch.randn(*batch, heads, queries) for i in range(4)]
    return [(t if i % 2 == 0 else t * spread).to(device) for i, t in enumerate(tensors)]


def merged64(out_a, lse_a, out_b, lse_b):
    """By plain exponentials, row by row: what the docstring says."""
    (a, la, b, lb) = (x.double().cpu() for x in (out_a, lse_a, out_b, lse_b))
    w_a, w_b = (x.exp().transpose(-1, -2)[..., None] for x in (la, lb))
    return (w_a * a + w_b * b) / (w_a + w_b), (la.exp() + lb.exp()).log()


@IMPLS
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 20, 128, 512])),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.sampled_from([7, 64])),
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.just(16)),
    ),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_against_fp64(device, impl, shape, dtype):
    inputs = states(shape, dtype, device)
    out, lse = ds.merge_states(*inputs, impl=impl)
    want_out, want_lse = merged64(*inputs)
    assert out.dtype == dtype
    # Half an ulp of a result of two roundings at most; fp32 loses a few ulp in exp and log.
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 1.01
    torch.testing.assert_close(out.double().cpu(), want_out, rtol=rtol, atol=1e-5)
    torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=1e-5, atol=2e-6)


@IMPLS
@pytest.mark.parametrize("shape", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_a_state_that_saw_nothing_does_not_count(device, impl, shape):
    """Whatever its out holds, and whichever infinity marks it; two of them give 0 and -inf."""
    out_a, lse_a, out_b, lse_b = states(shape, device=device)
    empty_a = torch.rand_like(lse_a) < 0.5
    empty_b = torch.rand_like(lse_b) < 0.5
    assert (empty_a & empty_b).any()
    assert (~empty_a & ~empty_b).any()
    signs = [torch.where(torch.rand_like(lse_a) < 0.5, -math.inf, math.inf) for _ in range(2)]
    rows_a, rows_b = (x.transpose(-1, -2)[..., None] for x in (empty_a, empty_b))
    poisoned = (
        out_a.masked_fill(rows_a, math.nan),
        torch.where(empty_a, signs[0], lse_a),
        out_b.masked_fill(rows_b, math.inf),
        torch.where(empty_b, signs[1], lse_b),
    )
    out, lse = ds.merge_states(*poisoned, impl=impl)
    both, both_lse = reference.merge_states(out_a, lse_a, out_b, lse_b)
    want = torch.where(rows_a, torch.where(rows_b, 0.0, out_b), torch.where(rows_b, out_a, both))
    want_lse = torch.where(empty_a, torch.where(empty_b, -math.inf, lse_b), torch.where(empty_b, lse_a, both_lse))
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)


@IMPLS
def test_far_apart_states_do_not_overflow(device, impl):
    shape = (2, 3, 8)
    out_a, _, out_b, _ = states(shape, device=device)
    lse_a = torch.tensor([[1e38, -1e38], [1e5, -1e5], [700.0, 0.0]], device=device)
    lse_b = torch.tensor([[-1e38, 1e38], [-1e5, 1e5], [0.0, 700.0]], device=device)
    out, lse = ds.merge_states(out_a, lse_a, out_b, lse_b, impl=impl)
    torch.testing.assert_close(out, torch.stack([out_a[0], out_b[1]]), rtol=0, atol=0)
    assert torch.equal(lse, torch.maximum(lse_a, lse_b))


@IMPLS
def test_nan_passes_on(device, impl):
    out_a, lse_a, out_b, lse_b = states(PREFILL, device=device)
    lse_a[1, 4] = math.nan
    out_b[2, 0, 3] = math.nan
    out, lse = ds.merge_states(out_a, lse_a, out_b, lse_b, impl=impl)
    assert out[4, 1].isnan().all()
    assert lse[1, 4].isnan()
    assert out[2, 0, 3].isnan()
    assert out.isnan().sum() == 20 + 1
    assert lse.isnan().sum() == 1


def test_merging_is_symmetric_and_nearly_associative():
    parts = [states(DECODE, torch.float64)[:2] for _ in range(3)]
    parts = [(out, lse.double()) for out, lse in parts]
    ab, ba = ds.merge_states(*parts[0], *parts[1]), ds.merge_states(*parts[1], *parts[0])
    torch.testing.assert_close(ab, ba, rtol=1e-13, atol=1e-13)
    bc = ds.merge_states(*parts[1], *parts[2])
    left, right = ds.merge_states(*ab, *parts[2]), ds.merge_states(*parts[0], *bc)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@IMPLS
def test_split_decode_is_whole_decode(device, impl):
    """The two halves of a request's pages, decoded apart and merged."""
    q = torch.randn(2, 1, 3, 48, device=device)
    cache = torch.randn(8, 4, 48, device=device)
    table = torch.randperm(8).view(2, 4).int().to(device)
    lengths = torch.tensor([16, 9], dtype=torch.int32, device=device)
    options = {"scale": 0.2, "value_dim": 32}
    halves = [
        ds.mla_decode(q, cache, table[:, :2].contiguous(), lengths.clamp(max=8), **options),
        ds.mla_decode(q, cache, table[:, 2:].contiguous(), (lengths - 8).clamp(min=0), **options),
    ]
    whole = ds.mla_decode(q, cache, table, lengths, **options)
    torch.testing.assert_close(ds.merge_states(*halves[0], *halves[1], impl=impl), whole)


@pytest.mark.parametrize("shape", [PREFILL, DECODE], ids=["prefill", "decode"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_kernel_against_fp64(device, shape, dtype):
    inputs = states(shape, dtype, device, spread=1.0)
    dout, dlse = torch.randn(shape).to(dtype).to(device), torch.randn_like(inputs[1])

    def gradients(inputs, dout, dlse, merge):
        inputs = [x.detach().clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(merge(*inputs), inputs, (dout, dlse))

    got = gradients(inputs, dout, dlse, lambda *x: ds.merge_states(*x, impl="triton"))
    want = gradients([x.double() for x in inputs], dout.double(), dlse.double(), reference.merge_states)
    for g, w, x in zip(got, want, inputs, strict=True):
        assert g.dtype == x.dtype
        rtol = 2**-8 if g.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(g.double(), w, rtol=rtol * 1.01, atol=2e-5)


@IMPLS
def test_gradients_of_states_that_saw_nothing_are_zero(device, impl):
    inputs = states(PREFILL, device=device)
    inputs[1][:, 0] = -math.inf
    inputs[3][:, 1] = math.inf
    inputs[1][:, 2], inputs[3][:, 2] = math.inf, -math.inf
    for x in inputs:
        x.requires_grad_()
    out, lse = ds.merge_states(*inputs, impl=impl)
    # A loss over lse hands an infinite or NaN gradient to rows without one.
    dlse = torch.ones_like(lse).masked_fill(lse.isinf(), math.nan)
    gradients = torch.autograd.grad((out, lse), inputs, (torch.ones_like(out), dlse))
    assert all(g.isfinite().all() for g in gradients)
    d_out_a, d_lse_a, d_out_b, d_lse_b = gradients
    assert (d_out_a[[0, 2]] == 0).all()
    assert (d_out_b[[1, 2]] == 0).all()
    assert (d_lse_a[:, [0, 2]] == 0).all()
    assert (d_lse_b[:, [1, 2]] == 0).all()
    assert (d_out_a[1] == 1).all()
    torch.testing.assert_close(d_lse_a[:, 1], torch.ones_like(d_lse_a[:, 1]))


@IMPLS
def test_gradient_of_one_output_alone(device, impl):
    inputs = [x.requires_grad_() for x in states(PREFILL, device=device)]
    (d_lse_a,) = torch.autograd.grad(ds.merge_states(*inputs, impl=impl)[1].sum(), inputs[1])
    torch.testing.assert_close(d_lse_a, torch.sigmoid(inputs[1] - inputs[3]))
    (d_out_a,) = torch.autograd.grad(ds.merge_states(*inputs, impl=impl)[0].sum(), inputs[0])
    torch.testing.assert_close(d_out_a, torch.sigmoid(inputs[1] - inputs[3]).T[..., None].expand(PREFILL))


@IMPLS
def test_strided_states(device, impl):
    """Heads sliced out of more, and log-sum-exps of a transposed batch."""
    out_a, lse_a, out_b, lse_b = states((4, 6, 10), device=device)
    got = ds.merge_states(out_a[:, ::2], lse_a[::2], out_b[:, 1::2], lse_b[1::2], impl=impl)
    want = reference.merge_states(*(x.contiguous() for x in (out_a[:, ::2], lse_a[::2], out_b[:, 1::2], lse_b[1::2])))
    torch.testing.assert_close(got, want)


@IMPLS
@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8), (0, 2, 3, 8)])
def test_empty(device, impl, shape):
    inputs = states(shape, device=device)
    out, lse = ds.merge_states(*inputs, impl=impl)
    assert out.shape == shape
    torch.testing.assert_close(lse, reference.merge_states(*inputs)[1])


@pytest.mark.gpu
def test_model_shapes(device):
    for shape in ((4097, 128, 128), (64, 2, 128, 512)):
        inputs = states(shape, torch.bfloat16, device)
        for got, want in zip(ds.merge_states(*inputs, impl="triton"), merged64(*inputs), strict=True):
            assert parity.difference(got.cpu(), want) < 5e-6


OUT, LSE, *_ = states(DECODE)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, LSE, OUT, LSE), TypeError, "out_a: expected a torch.Tensor, got NoneType"),
        ((OUT.int(), LSE, OUT, LSE), TypeError, "out_a: expected dtype"),
        ((OUT[0, 0], LSE, OUT, LSE), ValueError, r"out_a: expected shape \[..., Q, H, V\], V > 0, got \[5, 20\]"),
        ((OUT[..., :0], LSE, OUT, LSE), ValueError, r"out_a: expected shape \[..., Q, H, V\], V > 0, got"),
        ((OUT.mT.contiguous().mT, LSE, OUT, LSE), ValueError, "out_a: expected a contiguous last dimension"),
        ((OUT, LSE.half(), OUT, LSE), TypeError, "lse_a: expected dtype float32, got float16"),
        ((OUT, LSE.mT.contiguous(), OUT, LSE), ValueError, r"lse_a: expected shape \[2, 5, 3\], got \[2, 3, 5\]"),
        ((OUT, LSE.to("meta"), OUT, LSE), ValueError, "lse_a: expected a tensor on cpu"),
        ((OUT, LSE.mT.contiguous().mT, OUT, LSE), ValueError, "lse_a: expected a contiguous last dimension"),
        ((OUT, LSE, OUT.half(), LSE), TypeError, "out_b: expected dtype float32, got float16"),
        ((OUT, LSE, OUT[:1], LSE), ValueError, r"out_b: expected shape \[2, 3, 5, 20\], got \[1, 3, 5, 20\]"),
        ((OUT, LSE, OUT.to("meta"), LSE), ValueError, "out_b: expected a tensor on cpu"),
        ((OUT, LSE, OUT, LSE.double()), TypeError, "lse_b: expected dtype float32, got float64"),
        ((OUT, LSE, OUT, LSE[:1]), ValueError, r"lse_b: expected shape \[2, 5, 3\], got \[1, 5, 3\]"),
        ((OUT, LSE, OUT, LSE.to("meta")), ValueError, "lse_b: expected a tensor on cpu"),
        ((OUT.double(), LSE, OUT.double(), LSE), TypeError, "lse_a: expected dtype float64, got float32"),
    ],
)
def test_bad_input(args, error, message):
    with pytest.raises(error, match=message):
        ds.merge_states(*args)


def test_float64_is_the_reference_s(device):
    inputs = [x.double() for x in states(PREFILL)]
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        ds.merge_states(*(x.to(device) for x in inputs), impl="triton")
    torch.testing.assert_close(ds.merge_states(*inputs), merged64(*inputs), rtol=1e-12, atol=1e-12)


def test_registration():
    inputs = [x.requires_grad_() for x in states(DECODE)]
    check_registration(torch.ops.dskernels.merge_states.default, tuple(inputs))
    gradients = [torch.randn_like(x) for x in inputs[:2]]
    inputs = [x.detach() for x in inputs]
    check_registration(torch.ops.dskernels.merge_states_backward.default, (*gradients, *inputs))


def test_compiles_whole():
    def step(*inputs):
        out, lse = ds.merge_states(*inputs)
        return (out * 2).sum() + lse.sum()

    inputs = [x.requires_grad_() for x in states(DECODE)]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    got, want = (torch.autograd.grad(function(*inputs), inputs) for function in (compiled, step))
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def compile_merge(kernel, dtype, value):
    block_v = 1 << (value - 1).bit_length()
    outs, lses = ["p_out_a", "p_out_b"], ["p_lse_a", "p_lse_b"]
    outs += ["p_out"] if kernel == "merge_kernel" else ["p_dout", "p_dout_a", "p_dout_b"]
    lses += ["p_lse"] if kernel == "merge_kernel" else ["p_dlse", "p_dlse_a", "p_dlse_b"]
    return Compile(
        f"dskernels.mla.merge.triton:{kernel}",
        signature={
            **dict.fromkeys(outs, f"*{dtype}"),
            **dict.fromkeys(lses, "*fp32"),
            **dict.fromkeys(("rows", "queries", "heads"), "i32"),
        },
        constants={"VALUE": value, "BLOCK_V": block_v, "BLOCK_R": max(1, 2048 // block_v)},
        divisible=("heads",),
    )


def test_kernels_compile_without_spills():
    kernels = [("bf16", 512), ("bf16", 128), ("fp32", 20)]
    assert_clean(compile_all(compile_merge(k, *s) for s in kernels for k in ("merge_kernel", "merge_backward_kernel")))
