"""The gradient of prefill in CUDA C++: compiled here, run on the GPU against fp64 and what one would write in torch."""

import math

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.gemm.config import SHARED_LIMIT
from dskernels.mla.prefill import hopper_backward
from dskernels.reference import mla as reference
from test_mla_prefill import attend, bf16_attention, error, make_inputs, offsets

HALF, BRAIN = torch.float16, torch.bfloat16
MODEL = (128, 64, 128)
SCALE = 192**-0.5


@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_compiles_without_spills(dtype):
    options = hopper_backward.options_of(dtype)
    report = compile_cuda(hopper_backward.SOURCE, options, hopper_backward.shared_bytes())
    # 384 threads enter with 168 registers; setmaxnreg then moves them from the loading warpgroup to the other two.
    assert_clean([report], max_registers=168)
    assert not report.count("LDL", "STL")
    assert hopper_backward.shared_bytes() <= SHARED_LIMIT
    # Of a block, by 16 of what is summed over: scores 12, dout.v 8, dv 4, dq 8, dk 4.
    assert report.count("HGMMA") == 36
    # One wait for the dk before, and one each for scores, dout.v, dv and dq; one at the end: more would mean that ptxas
    # serialised the products.
    assert report.count("WARPGROUP.DEPBAR") == 6
    assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


def test_what_it_does_not_take():
    def reason(rope=64, width=192, value=128, dtype=BRAIN, out=None, step=1):
        q, v = torch.zeros(8, 2, width, dtype=dtype), torch.zeros(8, 2, value, dtype=dtype)
        k = torch.zeros(8, 2 * step, width - rope, dtype=dtype)[:, ::step]
        k_rope = torch.zeros(8, rope, dtype=dtype) if rope else None
        return supports(q, k, k_rope, v, torch.zeros(8, 2, value, dtype=out or dtype))

    def supports(q, k, k_rope, v, out):
        lse = torch.zeros(2, 8)
        cu = offsets([8])
        return hopper_backward.mla_prefill_backward_supports(out, lse, q, k, k_rope, v, out, lse, cu, cu, SCALE, True)

    assert "and values of 128; not 96, 64 and 128" in reason(width=96)
    assert "64 or none of them shared, and values of 128; not 192, 32 and 128" in reason(rope=32)
    assert "not 192, 0 and 64" in reason(rope=0, value=64)
    assert "takes bf16 and fp16, not torch.float32" in reason(dtype=torch.float32)
    assert "with an output in torch.float32" in reason(out=torch.float32)
    q = torch.zeros(8, 2, 192, dtype=BRAIN)
    k, v = torch.zeros(8, 2, 196, dtype=BRAIN)[..., :192], torch.zeros(8, 2, 128, dtype=BRAIN)
    assert "the rows of k must be aligned to 16 bytes" in supports(q, k, None, v, v)
    assert "the rows of v must be" in supports(q, q, None, v[:, :1].expand(8, 2, 128), v)


# ---- on the GPU -----------------------------------------------------------------------------------------------------


def backward(leaves, cu_seqlens, dout, dlse, causal=True, scale=SCALE, out=None, lse=None):
    """Gradients in the order of `leaves`, of the exact outputs rounded, into tensors that hold NaN."""
    q, k, v, *rest = (x.detach() for x in leaves)
    k_rope = rest[0] if rest else None
    if out is None:
        exact = [x.double().nan_to_num() for x in (q, k, v, *rest)]
        out, lse = attend(reference.mla_prefill, exact, cu_seqlens, scale=scale, causal=causal)
        out, lse = out.to(q.dtype), lse.float()
    arguments = (dout, dlse, q, k, k_rope, v, out, lse, *cu_seqlens, scale, causal)
    assert hopper_backward.mla_prefill_backward_supports(*arguments) is None
    dq, dk, dk_rope, dv = hopper_backward.mla_prefill_backward(*arguments)
    return [dq, dk, dv] + [dk_rope] * len(rest)


@pytest.fixture
def poisoned(monkeypatch):
    """What the launcher allocates holds NaN; of integers, large numbers."""
    empty, new_empty = hopper_backward.empty, torch.Tensor.new_empty

    def poison(x):
        return x.fill_(math.nan if x.is_floating_point() else 2**30)

    monkeypatch.setattr(hopper_backward, "empty", lambda *args: poison(empty(*args)))
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda self, *args, **options: poison(new_empty(self, *args, **options))
    )


def check(lengths_q, lengths_k, heads, heads_k, shared_rope, causal, dtype=BRAIN, spare=0):
    """Gradients at most twice as far from fp64 as those of torch in `dtype` are, where that has any."""
    leaves, cu = make_inputs("cuda", lengths_q, lengths_k, heads, heads_k, MODEL, dtype, shared_rope, spare)
    exact = [x.detach().double().nan_to_num().requires_grad_() for x in leaves]
    options = {"scale": SCALE, "causal": causal}
    outputs = attend(reference.mla_prefill, exact, cu, **options)
    dout, dlse = torch.randn_like(outputs[0]).to(dtype), torch.randn_like(outputs[1]).float()
    want = torch.autograd.grad(outputs, exact, (dout.double(), dlse.double()))
    dout[sum(lengths_q) :] = math.nan
    got = backward(leaves, cu, dout, dlse, causal)
    # Torch has no rows outside of sequences, and NaN where a query sees nothing. Its errors do not depend on the shape.
    theirs = [0.004 if dtype == BRAIN else 0.0005] * len(leaves)
    if not spare and all(m >= n > 0 for n, m in zip(lengths_q, lengths_k, strict=True)):
        outputs = attend(bf16_attention, leaves, cu, **options)
        plain = torch.autograd.grad(outputs, leaves, (dout, dlse))
        theirs = [error(x, y) for x, y in zip(plain, want, strict=True)]
    for name, x, y, bound in zip(("dq", "dk", "dv", "dk_rope"), got, want, theirs, strict=False):
        assert x.dtype == dtype
        assert x.isfinite().all(), name
        if y.any():
            # Where all is 0 but for rounding, as dq of a query that sees one key, plain torch rounds to the same.
            assert error(x, y) <= 2 * bound, (name, error(x, y), bound)
        else:
            assert x.abs().max() <= 1e-2 * dout[: sum(lengths_q)].abs().max()
    return leaves, cu, dout, dlse, got


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 17, 113, 128, 203, 1024])
def test_one_sequence(poisoned, length, causal):
    check([length], [length], 2, 2, False, causal)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "heads", "heads_k", "shared_rope", "causal", "dtype", "spare"),
    [
        ([1, 17, 113], [1, 17, 113], 2, 2, True, True, BRAIN, 0),
        ([128, 300], [203, 700], 4, 2, False, True, BRAIN, 0),  # more keys than queries; heads that share a key
        ([203, 40], [128, 5], 6, 2, True, True, BRAIN, 0),  # fewer: queries that see nothing
        ([17, 40], [128, 5], 2, 1, True, False, HALF, 0),
        ([0, 20, 0, 333, 0], [0, 20, 0, 333, 0], 2, 2, True, True, BRAIN, 70),  # empty ones; rows of no sequence, NaN
        ([5, 0, 9, 70], [40, 7, 0, 70], 3, 3, False, True, HALF, 3),  # keys that no query sees, queries without keys
        ([1] * 90, [1] * 90, 1, 1, True, True, BRAIN, 0),  # many sequences in the space of a tile
        ([700, 1100], [700, 1100], 20, 20, True, True, BRAIN, 0),  # more tiles than multiprocessors
    ],
)
def test_sequences_of_all_kinds(poisoned, lengths_q, lengths_k, heads, heads_k, shared_rope, causal, dtype, spare):
    check(lengths_q, lengths_k, heads, heads_k, shared_rope, causal, dtype, spare)


@pytest.mark.gpu
def test_equal_calls_return_equal_bits():
    """With so many tiles that who adds when would differ from call to call."""
    leaves, cu, dout, dlse, _ = check([2048, 1000], [2048, 1000], 16, 8, True, True)
    out, lse = attend(reference.mla_prefill, [x.detach() for x in leaves], cu, scale=SCALE)
    first = backward(leaves, cu, dout, dlse, out=out, lse=lse)
    for _ in range(20):
        again = backward(leaves, cu, dout, dlse, out=out, lse=lse)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.gpu
def test_a_nan_does_not_leave_its_sequence():
    leaves, cu = make_inputs("cuda", [100] * 3, [150] * 3, 2, 2, MODEL, BRAIN, True)
    dout, dlse = torch.randn(300, 2, 128, device="cuda").to(BRAIN), torch.zeros(2, 300, device="cuda")
    clean = backward(leaves, cu, dout, dlse)
    with torch.no_grad():
        for x, n in zip((*leaves, dout), (100, 150, 150, 150, 100), strict=True):
            x[n : 2 * n] = math.nan
    for x, y in zip(backward(leaves, cu, dout, dlse), clean, strict=True):
        n = len(x) // 3
        assert torch.equal(x[:n], y[:n])
        assert torch.equal(x[2 * n :], y[2 * n :])
        assert x[n : 2 * n].isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 2147483647, 50], [0, -2147483648, 50]),
        ([-5, 300, 20], [90, 10, 2147480000]),
        ([400, 3, 400, 3, 400], [3, 400, 3, 400, 3]),
    ],
)
def test_nothing_is_written_out_of_bounds_whatever_the_lengths(monkeypatch, cu_q, cu_k):
    guard, made = 64, []

    def guarded(self, shape, dtype=None):
        whole = torch.full((shape[0] + 2 * guard, *shape[1:]), 777, dtype=dtype or self.dtype, device="cuda")
        made.append(whole)
        return whole[guard : guard + shape[0]]

    leaves, _ = make_inputs("cuda", [400], [400], 2, 2, MODEL, BRAIN, True)
    cu = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in (cu_q, cu_k)]
    dout, dlse = torch.randn(400, 2, 128, device="cuda").to(BRAIN), torch.zeros(2, 400, device="cuda")
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded)
    monkeypatch.setattr(hopper_backward, "empty", guarded)
    backward(leaves, cu, dout, dlse, out=dout, lse=dlse)
    torch.cuda.synchronize()
    assert len(made) == 7
    for whole in made:
        assert (whole[:guard] == 777).all()
        assert (whole[-guard:] == 777).all()


@pytest.mark.gpu
def test_a_captured_call_follows_other_lengths():
    leaves, cu, dout, dlse, _ = check([300, 100], [300, 100], 2, 2, True, True)
    out, lse = attend(reference.mla_prefill, [x.detach() for x in leaves], cu, scale=SCALE)
    backward(leaves, cu, dout, dlse, out=out, lse=lse)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = backward(leaves, cu, dout, dlse, out=out, lse=lse)
    for lengths in ([50, 350], [400, 0], [300, 100]):
        for x in cu:
            x.copy_(offsets(lengths, "cuda"))
        new_out, new_lse = attend(reference.mla_prefill, [x.detach() for x in leaves], cu, scale=SCALE)
        out.copy_(new_out)
        lse.copy_(new_lse)
        graph.replay()
        want = backward(leaves, cu, dout, dlse, out=out, lse=lse)
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
def test_the_public_function_runs_it(monkeypatch):
    leaves, cu = make_inputs("cuda", [200, 90], [200, 90], 2, 2, MODEL, BRAIN, True)
    calls = []
    prepare = hopper_backward.prepare
    monkeypatch.setattr(hopper_backward, "prepare", lambda *args: (calls.append(1), prepare(*args)))
    out, _ = attend(ds.mla_prefill, leaves, cu, scale=SCALE)
    got = torch.autograd.grad(out.sum(), leaves)  # the gradient of a sum has no rows: it is expanded
    assert calls
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = torch.autograd.grad(attend(reference.mla_prefill, exact, cu, scale=SCALE)[0].sum(), exact)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=0.1, atol=0.1)
    empty = [x.detach()[:0].requires_grad_() for x in leaves]
    out, _ = attend(ds.mla_prefill, empty, (offsets([0], "cuda"),) * 2, scale=SCALE)
    assert [x.shape for x in torch.autograd.grad(out.sum(), empty)] == [x.shape for x in empty]
