"""Prefill: against fp64, every gradient, sequences of all kinds."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.mla.prefill import triton as kernels
from dskernels.mla.prefill import triton_backward
from dskernels.mla.prefill.config import AMPERE, BLACKWELL, HOPPER, SINGLE
from dskernels.parity import mla_prefill as cases
from dskernels.reference import mla as reference

PREFILL_CASES = [case for case in cases.CASES if case.op == "mla_prefill"]


@pytest.mark.parametrize("case", PREFILL_CASES, ids=lambda case: case.label)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def make_inputs(device, lengths_q, lengths_k, heads, heads_k, dims, dtype, shared_rope, spare=0):
    """Leaves q, k, v and perhaps k_rope, and both cu_seqlens; `spare` rows after the last sequence are NaN."""
    nope, rope, value = dims
    tokens_q, tokens_k = sum(lengths_q) + spare, sum(lengths_k) + spare
    shapes = [(tokens_q, heads, nope + rope), (tokens_k, heads_k, nope if shared_rope else nope + rope)]
    shapes += [(tokens_k, heads_k, value)] + [(tokens_k, rope)] * shared_rope
    leaves = [torch.randn(shape).to(dtype) for shape in shapes]
    for x, tokens in zip(leaves, (sum(lengths_q), *[sum(lengths_k)] * 3), strict=False):
        x[tokens:] = math.nan
    leaves = [x.to(device).requires_grad_() for x in leaves]
    return leaves, (offsets(lengths_q, device), offsets(lengths_k, device))


def attend(function, leaves, cu_seqlens, **options):
    q, k, v, *k_rope = leaves
    return function(q, k, v, *cu_seqlens, k_rope=k_rope[0] if k_rope else None, **options)


def bf16_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, *, scale, causal, k_rope):
    """What anybody would write in torch: every intermediate result in the dtype of the inputs, the softmax in fp32."""
    if k_rope is not None:
        k = torch.cat([k, k_rope[:, None].expand(-1, k.shape[1], -1)], -1)
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    edges = [itertools.pairwise(cu.tolist()) for cu in (cu_seqlens_q, cu_seqlens_k)]
    for (q_from, q_to), (k_from, k_to) in zip(*edges, strict=True):
        q_s = q[q_from:q_to].transpose(0, 1)
        k_s, v_s = (x[k_from:k_to].transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
        score = (q_s @ k_s.mT * scale).float()
        if causal:
            hidden = torch.ones(score.shape[1:], dtype=torch.bool, device=q.device).triu(
                k_to - k_from - q_to + q_from + 1
            )
            score = score.masked_fill(hidden, -math.inf)
        outs.append((score.softmax(-1).to(q.dtype) @ v_s).transpose(0, 1))
        lses.append(score.logsumexp(-1))
    return torch.cat(outs), torch.cat(lses, 1)


def error(got, want):
    """Root mean square of the difference, relative to that of `want`."""
    return ((got.double() - want).square().sum() / want.square().sum()).sqrt().item()


# A causal query without a key would be NaN in plain torch: at least as many keys as queries here.
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "heads", "heads_k", "dims", "shared_rope", "causal"),
    [
        (
            [1, 17, 113],
            [1, 17, 113],
            1,
            1,
            (128, 64, 128),
            True,
            True,
        ),  # prompts of the model; several tiles in the last
        ([128], [203], 2, 1, (128, 64, 128), False, True),  # new tokens after cached ones; heads that share a key
        ([17, 40], [128, 5], 2, 2, (128, 64, 128), True, False),
        ([33, 64], [65, 64], 2, 2, (32, 0, 32), False, True),  # a small model without a rope part
        ([50], [50], 4, 2, (80, 16, 48), True, True),  # widths that are no powers of two, padded
    ],
)
def test_error_is_at_most_twice_that_of_bf16_torch(
    device, lengths_q, lengths_k, heads, heads_k, dims, shared_rope, causal
):
    leaves, cu = make_inputs(device, lengths_q, lengths_k, heads, heads_k, dims, torch.bfloat16, shared_rope)
    options = {"scale": (dims[0] + dims[1]) ** -0.5, "causal": causal}
    weights = None
    results = {}
    for name, function, inputs in (
        ("exact", reference.mla_prefill, [x.detach().double().requires_grad_() for x in leaves]),
        ("torch", bf16_attention, leaves),
        ("triton", lambda *args, **kwargs: ds.mla_prefill(*args, **kwargs, impl="triton"), leaves),
    ):
        outputs = attend(function, inputs, cu, **options)
        if weights is None:
            weights = [torch.randn_like(x) for x in outputs]
        grads = torch.autograd.grad(outputs, inputs, [w.to(x) for w, x in zip(weights, outputs, strict=True)])
        results[name] = {"out": outputs[0], **dict(zip(("dq", "dk", "dv", "dk_rope"), grads, strict=False))}
        results[name]["lse"] = outputs[1]
    assert results["triton"]["out"].dtype == torch.bfloat16
    assert results["triton"]["lse"].dtype == torch.float32
    for name, want in results["exact"].items():
        ours, theirs = (error(results[impl][name], want) for impl in ("triton", "torch"))
        assert ours <= 2 * theirs, (name, ours, theirs)


def check_against_fp64(device, impl, lengths_q, lengths_k, heads, heads_k, dims, dtype, shared_rope, causal, spare=0):
    """Outputs and gradients; rows that no sequence holds are NaN, and must neither show nor get anything."""
    leaves, cu = make_inputs(device, lengths_q, lengths_k, heads, heads_k, dims, dtype, shared_rope, spare)
    exact = [x.detach().double().nan_to_num().requires_grad_() for x in leaves]
    options = {"scale": (dims[0] + dims[1]) ** -0.5, "causal": causal}
    want = attend(reference.mla_prefill, exact, cu, **options)
    weights = [torch.randn_like(x) for x in want]
    want_grads = torch.autograd.grad(want, exact, weights)
    got = attend(ds.mla_prefill, leaves, cu, **options, impl=impl)
    got_grads = torch.autograd.grad(got, leaves, [w.to(x) for w, x in zip(weights, got, strict=True)])
    assert got[0].dtype == dtype
    assert [g.dtype for g in got_grads] == [dtype] * len(leaves)
    # fp32 has its sums to round; the others round p, ds and the results, all of them sums of numbers around 1.
    tolerance = {torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[dtype]
    assert torch.equal(got[1] == -math.inf, want[1] == -math.inf)
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-5, atol=1e-5)
    for x, y in zip((got[0], *got_grads), (want[0], *want_grads), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=tolerance, atol=tolerance)
    return got, got_grads


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "heads", "heads_k", "dims", "shared_rope", "causal"),
    [
        ([0, 20, 0, 33, 0], [0, 20, 0, 33, 0], 2, 2, (32, 16, 32), True, True),  # empty sequences, at both ends too
        ([40, 9, 5], [11, 9, 0], 2, 1, (16, 16, 16), True, True),  # more queries than keys, and none: rows without any
        ([5, 0], [40, 7], 3, 3, (16, 0, 48), False, True),  # keys that no query sees get no gradient
        ([7, 20], [0, 3], 2, 1, (16, 0, 16), False, False),
        ([1] * 9, [1] * 9, 1, 1, (16, 16, 16), True, True),  # many sequences in the space of one tile
    ],
)
def test_sequences_of_all_kinds(device, impl, lengths_q, lengths_k, heads, heads_k, dims, shared_rope, causal):
    shape = (lengths_q, lengths_k, heads, heads_k, dims, torch.float32, shared_rope, causal)
    check_against_fp64(device, impl, *shape, spare=3 if impl == "triton" else 0)


@settings(max_examples=8)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    dims=st.sampled_from([(16, 16, 16), (32, 16, 32), (24, 8, 20), (48, 32, 64), (5, 3, 1), (96, 0, 32), (112, 0, 16)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    shared_rope=st.booleans(),
    causal=st.booleans(),
    spare=st.integers(0, 2),
)
def test_any_shape(device, lengths, heads, dims, dtype, shared_rope, causal, spare):
    lengths_q, lengths_k = [q for q, _ in lengths], [k for _, k in lengths]
    shape = (lengths_q, lengths_k, *heads, dims, dtype, shared_rope and dims[1] > 0, causal)
    check_against_fp64(device, "triton", *shape, spare=spare)


@pytest.mark.parametrize("tiles", [HOPPER, BLACKWELL, AMPERE, SINGLE], ids=["hopper", "blackwell", "ampere", "single"])
def test_every_table_of_tiles(device, monkeypatch, tiles):
    """The interpreter is given the generic tiles, and a GPU only its own: try the others too, if they fit."""

    def choose(kernel, widths, itemsize, arch):
        return next(iter(tiles[kernel].values()))

    monkeypatch.setattr(kernels, "choose_config", choose)
    monkeypatch.setattr(triton_backward, "choose_config", choose)
    check_against_fp64(
        device, "triton", [70, 20], [140, 20], 1, 1, (16, 16, 16), torch.bfloat16, shared_rope=True, causal=True
    )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_what_is_not_contiguous_is_read_as_it_lies(device, impl):
    """Keys and values cut from one projection, queries from another, and the gradient of a sum, which has no rows."""
    wide = [torch.randn(30, 2, 64, device=device, requires_grad=True) for _ in range(2)]
    wide.append(torch.randn(30, 40, device=device, requires_grad=True))
    cu = offsets([30], device)

    def run(contiguous):
        q, k, v, k_rope = wide[0][..., 8:56], wide[1][..., :32], wide[1][..., 32:], wide[2][:, 16:32]
        parts = [x.contiguous() if contiguous else x for x in (q, k, v, k_rope)]
        out, lse = attend(ds.mla_prefill, parts, (cu, cu), scale=0.2, impl=impl)
        return out, *torch.autograd.grad((out.sum(), lse.mT.sum()), wide)

    for got, want in zip(run(False), run(True), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_each_result_alone_has_a_gradient(device, impl):
    leaves, cu = make_inputs(device, [20], [24], 2, 1, (16, 16, 16), torch.float32, True)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    for i in range(2):
        got = attend(ds.mla_prefill, leaves, cu, scale=0.2, impl=impl)[i]
        want = attend(reference.mla_prefill, exact, cu, scale=0.2)[i]
        weight = torch.randn_like(want)
        got = torch.autograd.grad(got, leaves, weight.to(got))
        want = torch.autograd.grad(want, exact, weight, allow_unused=True)
        for x, y in zip(got, want, strict=True):
            torch.testing.assert_close(
                x.double(), torch.zeros_like(x).double() if y is None else y, rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_only_what_is_asked_for_is_differentiated(device, impl):
    leaves, cu = make_inputs(device, [9], [9], 1, 1, (16, 16, 16), torch.float32, True)
    for x in leaves[1:]:
        x.requires_grad_(False)
    out, _ = attend(ds.mla_prefill, leaves, cu, scale=0.2, impl=impl)
    (dq,) = torch.autograd.grad(out.square().sum(), leaves[0])
    assert dq.shape == leaves[0].shape
    with torch.inference_mode():
        assert not attend(ds.mla_prefill, leaves, cu, scale=0.2, impl=impl)[0].requires_grad


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")  # the interpreter's, of the largest score of a NaN row
def test_a_nan_does_not_leave_its_sequence(device):
    leaves, cu = make_inputs(device, [20, 20, 20], [20, 20, 20], 2, 1, (16, 16, 16), torch.float32, True)
    with torch.no_grad():
        for x in leaves:
            x[20:40] = math.nan
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=0.2, impl="triton")
    inside = torch.zeros(60, dtype=torch.bool, device=device)
    inside[20:40] = True
    assert out[inside].isnan().all()
    assert lse[:, inside].isnan().all()
    assert out[~inside].isfinite().all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad[~inside].isfinite().all()
        assert grad[inside].isnan().all()


@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 2147483647, 50], [0, -2147483648, 50]),
        ([-5, 30, 20], [90, 10, 2147480000]),
        ([7, 60, 61], [2147483647, 2147483647, 2147483647]),
        ([3, 3, 3], [9, -1, -9]),
    ],
)
def test_nothing_is_read_or_written_out_of_bounds(device, monkeypatch, cu_q, cu_k):
    """Inputs lie between NaN, results between a number of their own: neither may be touched."""
    guard = 64

    def between(x, value):
        whole = x.new_full((len(x) + 2 * guard, *x.shape[1:]), value)
        whole[guard:-guard] = x
        return whole

    tokens, heads = 40, 2
    shapes = ((tokens, heads, 32), (tokens, heads, 16), (tokens, heads, 16), (tokens, 16))
    q, k, v, k_rope = (between(torch.randn(shape, device=device), math.nan)[guard:-guard] for shape in shapes)
    cu = [torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, cu_k)]
    made = []

    new_empty = torch.Tensor.new_empty

    def guarded(self, shape, dtype=None, **options):
        if options:  # the interpreter's own
            return new_empty(self, shape, dtype=dtype, **options)
        whole = between(torch.zeros(shape, dtype=dtype or self.dtype, device=device), 777.0)
        made.append(whole)
        return whole[guard : guard + shape[0]]

    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    out, lse = kernels.mla_prefill(q, k, k_rope, v, *cu, 0.2, True, q.dtype)
    dout, dlse = torch.randn(out.shape, device=device), torch.randn(lse.shape, device=device)
    gradients = triton_backward.mla_prefill_backward(dout, dlse, q, k, k_rope, v, out, lse, *cu, 0.2, True)
    monkeypatch.undo()
    assert len(made) >= 7
    for whole in made:
        assert (whole[:guard] == 777).all()
        assert (whole[-guard:] == 777).all()
    for x in (out, *gradients):
        assert not x.isnan().any()


def test_rows_outside_every_sequence_are_empty(device):
    """Before the first sequence, and after the last."""
    q, k = torch.randn(40, 1, 16, device=device), torch.randn(30, 1, 16, device=device)
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([4, 30], [3, 30]))
    for impl in ("reference", "triton"):
        out, lse = ds.mla_prefill(q, k, k, cu_q, cu_k, scale=0.2, impl=impl)
        outside = torch.ones(40, dtype=torch.bool, device=device)
        outside[4:30] = False
        assert (out[outside] == 0).all()
        assert (lse[:, outside] == -math.inf).all()
        assert lse[:, ~outside].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([0], [0]), ([], []), ([0, 0], [3, 0]), ([3], [0])])
def test_empty(device, impl, lengths_q, lengths_k):
    leaves, cu = make_inputs(device, lengths_q, lengths_k, 2, 1, (16, 16, 8), torch.float32, True)
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=0.2, impl=impl)
    assert out.shape == (sum(lengths_q), 2, 8)
    assert lse.shape == (2, sum(lengths_q))
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for x, grad in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
        assert grad.shape == x.shape
        assert (grad == 0).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_any_scale(device, impl, scale):
    leaves, cu = make_inputs(device, [20], [20], 1, 1, (16, 0, 16), torch.float32, False)
    exact = [x.detach().double() for x in leaves]
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=scale, impl=impl)
    want = attend(reference.mla_prefill, exact, cu, scale=scale)
    torch.testing.assert_close((out.double(), lse.double()), want, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of scores that the mask takes out afterwards
def test_large_scores_do_not_overflow(device):
    leaves, cu = make_inputs(device, [20], [20], 1, 1, (16, 0, 16), torch.float32, False)
    exact = [x.detach().double() for x in leaves]
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=1e4, impl="triton")
    want = attend(reference.mla_prefill, exact, cu, scale=1e4)
    torch.testing.assert_close((out.double(), lse.double()), want, rtol=1e-3, atol=1e-3)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), leaves))


def test_repeats_are_bitwise_equal(device):
    leaves, cu = make_inputs(device, [30, 20], [50, 20], 4, 2, (16, 16, 16), torch.bfloat16, True)
    weight = torch.randn(50, 4, 16, device=device).bfloat16()

    def run():
        out, lse = attend(ds.mla_prefill, leaves, cu, scale=0.2, impl="triton")
        return out, lse, *torch.autograd.grad(out, leaves, weight)

    first = run()
    for _ in range(20 if device == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("shared_rope", [True, False])
def test_model_shapes(device, length, shared_rope):
    """Sixteen heads of the model; packed with short sequences, of which one is empty."""
    lengths = [length, 0, 1, 203, 128]
    leaves, cu = make_inputs(device, lengths, lengths, 16, 16, (128, 64, 128), torch.bfloat16, shared_rope)
    options = {"scale": 192**-0.5, "causal": True}
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results = []
    weight = torch.randn(sum(lengths), 16, 128, device=device).bfloat16()
    functions = (reference.mla_prefill, bf16_attention, lambda *args, **kw: ds.mla_prefill(*args, **kw, impl="triton"))
    for function, inputs in zip(functions, (exact, leaves, leaves), strict=True):
        out, lse = attend(function, inputs, cu, **options)
        results.append((out, lse, *torch.autograd.grad(out, inputs, weight.to(out))))
    for want, theirs, ours in zip(*results, strict=True):
        assert error(ours, want) <= 2 * error(theirs, want)
    for _ in range(20):
        out, lse = attend(ds.mla_prefill, leaves, cu, **options, impl="triton")
        again = (out, lse, *torch.autograd.grad(out, leaves, weight))
        assert all(torch.equal(a, b) for a, b in zip(again, results[2], strict=True))


@pytest.mark.gpu
def test_a_graph_replays_with_other_sequences(device):
    leaves, cu = make_inputs(device, [300, 84], [300, 84], 4, 4, (128, 64, 128), torch.bfloat16, True)
    weight = torch.randn(384, 4, 128, device=device).bfloat16()

    def step():
        out, lse = attend(ds.mla_prefill, leaves, cu, scale=0.07, impl="triton")
        return out, lse, *torch.autograd.grad(out, leaves, weight)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1, 383], [200, 100], [0, 0]):
        for x in cu:
            x.copy_(offsets(lengths))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device):
    leaves, cu = make_inputs(device, [300, 84], [300, 84], 4, 4, (128, 64, 128), torch.bfloat16, True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out, _ = attend(ds.mla_prefill, leaves, cu, scale=0.07, impl="triton")
        out.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
