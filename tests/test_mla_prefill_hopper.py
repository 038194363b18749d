"""Prefill in CUDA C++: compiled here, run on the GPU against fp64 and against what anybody would write in torch."""

import itertools
import math
import re

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.gemm.config import SHARED_LIMIT
from dskernels.mla.prefill import hopper
from dskernels.parity import difference
from dskernels.reference import mla as reference
from test_mla_prefill import attend, bf16_attention, error, make_inputs, offsets

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
MODEL = (128, 64, 128)
SCALE = 192**-0.5
# (inputs, out, merge): every value of each.
KINDS = [(BRAIN, BRAIN, False), (HALF, HALF, False), (BRAIN, SINGLE, False), (HALF, SINGLE, True)]


def instructions(report, *opcodes):
    """These opcodes as they stand in the code, and how many of each in a row."""
    found = re.findall(rf"\b({'|'.join(map(re.escape, opcodes))})\b", report.code)
    return [(name, len(list(run))) for name, run in itertools.groupby(found)]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_compiles_without_spills(kind):
    report = compile_cuda(hopper.SOURCE, hopper.options_of(*kind), 0)
    assert_clean([report])  # of one of the two kernels
    assert not report.count("LDL", "STL")
    assert hopper.SHARED <= SHARED_LIMIT
    # Scores in four places, of 12 products each: at the beginning, in the loop over blocks, of the next item beside the
    # last sums and not beside them; sums in two, of 8. Waits: more would mean that ptxas serialised the products.
    assert report.count("HGMMA") == 4 * 12 + 2 * 8
    assert report.count("WARPGROUP.DEPBAR") == 7
    # Between the waits of the loop are the exponentials, of 64 scores and of two rows' factors: ptxas moves what a wait
    # does not depend on behind it, where no product runs beside it, if `finish` in cuda/attention.cuh does not keep it.
    wait = ("DEPBAR.LE gsb0", 1)
    loop = [("HGMMA", 20), wait, ("MUFU.EX2", 66), wait]
    found = instructions(report, "HGMMA", "DEPBAR.LE gsb0", "MUFU.EX2")
    assert any(found[i : i + 4] == loop for i in range(len(found)))
    assert report.count("BRA.U.ANY") == 0  # one thread is known to be one, so copies need no loop over lanes


def test_what_it_does_not_take():
    def reason(rope=64, width=192, value=128, dtype=BRAIN, out=None, scale=0.1, step=1):
        q, v = torch.zeros(8, 2, width, dtype=dtype), torch.zeros(8, 2, value, dtype=dtype)
        k = torch.zeros(8, 2 * step, width - rope, dtype=dtype)[:, ::step]
        k_rope = torch.zeros(8, rope, dtype=dtype) if rope else None
        return hopper.mla_prefill_supports(q, k, k_rope, v, offsets([8]), offsets([8]), scale, True, out or dtype)

    assert "values of 128, not 96 (64 shared) and 128" in reason(width=96)
    assert "(64 shared, or none) and values of 128, not 192 (32 shared) and 128" in reason(rope=32)
    assert "not 192 and 64" in reason(rope=0, value=64)
    assert "takes bf16 and fp16, and returns that or fp32, not torch.float32" in reason(dtype=SINGLE)
    assert "not torch.bfloat16 and torch.float16" in reason(out=HALF)
    assert "a scale above 0, not -0.3" in reason(scale=-0.3)
    assert "a scale above 0, not 0.0" in reason(scale=0.0)
    q = torch.zeros(8, 2, 192, dtype=BRAIN)
    k, v = torch.zeros(8, 2, 196, dtype=BRAIN)[..., :192], torch.zeros(8, 2, 128, dtype=BRAIN)
    arguments = (offsets([8]), offsets([8]), 0.1, True, BRAIN)
    assert "the rows of k must be aligned to 16 bytes" in hopper.mla_prefill_supports(q, k, None, v, *arguments)
    expanded = v[:, :1].expand(8, 2, 128)
    assert "the rows of v must be" in hopper.mla_prefill_supports(q, q, None, expanded, *arguments)
    out, lse = torch.zeros(8, 2, 128, dtype=BRAIN), torch.zeros(2, 8)
    assert "adds to contiguous fp32" in hopper.mla_prefill_onto_supports(q, q, None, v, *arguments[:3], out, lse)


@pytest.fixture
def poisoned(monkeypatch):
    """What the launcher allocates holds NaN; of integers, large numbers."""
    empty = hopper.empty

    def filled(*args):
        x = empty(*args)
        return x.fill_(math.nan if x.is_floating_point() else 2147480000)

    monkeypatch.setattr(hopper, "empty", filled)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "heads", "heads_k", "shared_rope", "causal"),
    [
        ([1, 17, 113, 128, 0, 203, 1024], None, 3, 3, True, True),
        ([1, 17, 113, 128, 0, 203, 1024], None, 4, 2, False, True),  # heads that share a key
        ([4096, 100], None, 2, 1, True, True),
        (
            [128, 40],
            [203, 700],
            2,
            2,
            False,
            True,
        ),  # new tokens after cached ones; the diagonal runs through two blocks
        ([17, 640, 300], [128, 5, 129], 5, 1, True, False),
        ([65, 64], [1000, 64], 150, 150, True, True),  # more heads than multiprocessors
    ],
)
def test_error_is_at_most_twice_that_of_torch(
    device, poisoned, dtype, lengths_q, lengths_k, heads, heads_k, shared_rope, causal
):
    """Rows that no sequence holds are NaN, and so is all that is allocated."""
    shape = (lengths_q, lengths_k or lengths_q, heads, heads_k, MODEL, dtype, shared_rope)
    leaves, cu = make_inputs(device, *shape, spare=40)
    options = {"scale": SCALE, "causal": causal}
    out, lse = attend(ds.mla_prefill, leaves, cu, **options, impl="hopper")
    used = sum(lengths_q)
    want = attend(reference.mla_prefill, [x.detach().double().nan_to_num() for x in leaves], cu, **options)
    # At least as many keys as queries in causal cases: plain torch would give NaN.
    theirs = attend(bf16_attention, [x.detach() for x in leaves], cu, **options)
    assert out.dtype == dtype
    assert error(out[:used], want[0][:used]) <= 2 * error(theirs[0], want[0][:used])
    assert error(lse[:, :used], want[1][:, :used]) <= 2 * error(theirs[1], want[1][:, :used])
    assert (out[used:] == 0).all()
    assert (lse[:, used:] == -math.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "causal"),
    [
        (
            [300, 9, 200, 0],
            [11, 9, 0, 40],
            True,
        ),  # more queries than keys, and none: rows without any, tiles without any
        ([7, 200], [0, 3], False),
        ([500], [300], True),  # a tile whose first rows see nothing
        ([1] * 3000, [2] * 3000, True),  # many sequences
    ],
)
def test_queries_that_see_nothing(device, poisoned, lengths_q, lengths_k, causal):
    leaves, cu = make_inputs(device, lengths_q, lengths_k, 2, 1, MODEL, BRAIN, True, 5)
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=SCALE, causal=causal, impl="hopper")
    exact = [x.detach().double().nan_to_num() for x in leaves]
    want = attend(reference.mla_prefill, exact, cu, scale=SCALE, causal=causal)
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)
    assert (out[(want[1] == -math.inf).T] == 0).all()
    assert difference(out, want[0]) < 5e-6
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_more_keys_than_are_read_at_one_time(device):
    """Sequences in several chunks, lengths in more levels than there are, and heads in several rounds."""
    lengths = [1000] * 60 + [9000] + [130] * 50
    leaves, cu = make_inputs(device, lengths, lengths, 3, 3, MODEL, BRAIN, True)
    assert sum(lengths) > hopper.TOGETHER_BYTES // hopper._key_bytes(1)
    got, want = (attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl=impl) for impl in ("hopper", "triton"))
    assert difference(got[0], want[0]) < 1e-5
    torch.testing.assert_close(got[1], want[1], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
def test_a_nan_does_not_leave_its_sequence(device):
    leaves, cu = make_inputs(device, [70, 70, 70], [70, 70, 70], 2, 2, MODEL, BRAIN, True)
    with torch.no_grad():
        for x in leaves:
            x[70:140] = math.nan
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl="hopper")
    inside = torch.zeros(210, dtype=torch.bool, device=device)
    inside[70:140] = True
    assert out[inside].isnan().all()
    assert lse[:, inside].isnan().all()
    assert out[~inside].isfinite().all()
    assert lse[:, ~inside].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("cu_q", "cu_k"),
    [
        ([0, 2147483647, 50], [0, -2147483648, 50]),
        ([-5, 30, 20], [90, 10, 2147480000]),
        ([7, 60, 61], [2147483647, 2147483647, 2147483647]),
        ([0, 40, 0, 40, 0, 40], [0, 300, 0, 300, 0, 300]),
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_nothing_is_read_or_written_out_of_bounds(device, monkeypatch, cu_q, cu_k, causal):
    """Inputs lie between NaN, results between a number of their own: neither may be touched."""
    guard, tokens, tokens_k, heads = 256, 40, 300, 2

    def between(x, value):
        whole = x.new_full((len(x) + 2 * guard, *x.shape[1:]), value)
        whole[guard:-guard] = x
        return whole

    shapes = ((tokens, heads, 192), (tokens_k, heads, 128), (tokens_k, heads, 128), (tokens_k, 64))
    q, k, v, k_rope = (between(torch.randn(s, device=device, dtype=BRAIN), math.nan)[guard:-guard] for s in shapes)
    cu = [torch.tensor(x, dtype=torch.int32, device=device) for x in (cu_q, cu_k)]
    made = []

    def guarded(like, shape, dtype):
        whole = between(torch.zeros(shape, dtype=dtype, device=device), 777)
        made.append(whole)
        return whole[guard:-guard]

    monkeypatch.setattr(hopper, "empty", guarded)
    out, _ = hopper.mla_prefill(q, k, k_rope, v, *cu, SCALE, causal, BRAIN)
    assert len(made) == 3
    for whole in made:
        assert (whole[:guard] == 777).all()
        assert (whole[-guard:] == 777).all()
    assert not out.isnan().any()


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths_q", "lengths_k"), [([0], [0]), ([], []), ([0, 0], [3, 0]), ([3], [0])])
def test_empty(device, poisoned, lengths_q, lengths_k):
    leaves, cu = make_inputs(device, lengths_q, lengths_k, 2, 1, MODEL, BRAIN, True)
    out, lse = attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl="hopper")
    assert out.shape == (sum(lengths_q), 2, 128)
    assert lse.shape == (2, sum(lengths_q))
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.gpu
def test_what_is_not_contiguous_is_read_as_it_lies(device):
    """Keys and values cut from one projection, the rope part from a cached row, tokens of one head after another."""
    wide = [torch.randn(2, 300, 256, device=device, dtype=BRAIN), torch.randn(300, 2, 256, device=device, dtype=BRAIN)]
    row, cu = torch.randn(300, 576, device=device, dtype=BRAIN), offsets([130, 170], device)
    q, k, v, k_rope = wide[0].transpose(0, 1)[..., 8:200], wide[1][..., :128], wide[1][..., 128:], row[:, 512:]
    got = ds.mla_prefill(q, k, v, cu, cu, scale=SCALE, k_rope=k_rope, impl="hopper")
    inputs = [x.contiguous() for x in (q, k, v)]
    want = ds.mla_prefill(*inputs, cu, cu, scale=SCALE, k_rope=k_rope.contiguous(), impl="hopper")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.gpu
def test_the_default_runs_it_and_has_a_gradient(device):
    leaves, cu = make_inputs(device, [200, 3], [200, 50], 2, 2, MODEL, BRAIN, True)
    assert ds.explain(lambda: attend(ds.mla_prefill, leaves, cu, scale=SCALE))[0].impl == "hopper"
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got, want = (attend(f, x, cu, scale=SCALE) for f, x in ((ds.mla_prefill, leaves), (reference.mla_prefill, exact)))
    weights = [torch.randn_like(x) for x in want]
    grads = torch.autograd.grad(got, leaves, [w.to(x) for w, x in zip(weights, got, strict=True)])
    for x, y in zip(grads, torch.autograd.grad(want, exact, weights), strict=True):
        assert difference(x, y) < 2e-5


@pytest.mark.gpu
def test_repeats_are_bitwise_equal(device):
    lengths = [1024, 0, 1, 203, 128, 2000]
    leaves, cu = make_inputs(device, lengths, lengths, 16, 16, MODEL, BRAIN, True)
    with torch.no_grad():
        first = attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl="hopper")
        for _ in range(20):
            again = attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl="hopper")
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
def test_a_graph_replays_with_other_sequences(device):
    leaves, cu = make_inputs(device, [300, 84], [300, 84], 4, 4, MODEL, BRAIN, True)

    def step():
        with torch.no_grad():
            return attend(ds.mla_prefill, leaves, cu, scale=SCALE, impl="hopper")

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ([1, 383], [200, 100], [0, 0]):
        for x in cu:
            x.copy_(offsets(lengths))
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [BRAIN, HALF])
def test_onto_what_other_keys_gave(device, dtype):
    """In two parts, of which one has sequences without keys: as in one."""
    leaves, cu = make_inputs(device, [200, 0, 70, 5], [300, 10, 0, 400], 3, 3, MODEL, dtype, True)
    first, cu_first = make_inputs(device, [200, 0, 70, 5], [100, 10, 0, 0], 3, 3, MODEL, dtype, True)
    with torch.no_grad():
        q, *keys = leaves
        first = [q, *first[1:]]
        k, v, k_rope = keys
        out, lse = hopper.mla_prefill(q, first[1], first[3], first[2], *cu_first, SCALE, False, SINGLE)
        part = hopper.mla_prefill(q, k, k_rope, v, *cu, SCALE, False, SINGLE)
        want = reference.merge_states(*(x.double() for x in (out, lse, *part)))
        hopper.mla_prefill_onto(q, k, k_rope, v, *cu, SCALE, out, lse)
    torch.testing.assert_close(out.double(), want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), want[1], rtol=1e-5, atol=1e-5)
