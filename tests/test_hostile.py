"""Values that only the device knows, hostile on purpose: nothing is read or written out of bounds, and what comes out
is what the contract says. Every tensor stands between guards full of NaN.

On a GPU at the models' sizes, by every implementation there; else small, in the interpreter.
"""

import pytest
import torch

import dskernels as ds
from benchmarks import exact
from dskernels import parity
from dskernels.moe.rows import ExpertRows
from dskernels.reference.mla import pack_fp8
from guarding import guarded

TOP, BOTTOM = 2**31 - 1, -(2**31)
FAR = 2**63 - 1
OFFSETS = [
    [7, -3, BOTTOM, 100, TOP],
    [TOP, 0, 0, 0, 0],
    [0, TOP, TOP, -1, 3],
    [0, 9, 5, 30, 20],
    [BOTTOM] * 5,
]
OFFSETS = OFFSETS if torch.cuda.is_available() else OFFSETS[:2]  # the interpreter takes half a second for each
IDS = [[0, TOP], [BOTTOM, -1], [1, 1], [3, 4]]
BRAIN = torch.bfloat16


@pytest.fixture(params=["triton", "hopper"])
def impl(request, device):
    if request.param == "hopper" and (device != "cuda" or torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("needs an sm_90 GPU")
    return request.param


@pytest.fixture
def size(device):
    """(rows, N, K) of products, where few elements decide as much as many."""
    return (1000, 576, 2048) if device == "cuda" else (20, 12, 40)


def ints(values, device, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype, device=device)


def normal(*shape, device, dtype=BRAIN):
    return torch.randn(shape).to(dtype).to(device)


def runs(impl, name, *args, write=(), **kwargs):
    """The result between guards, which are whole afterwards; skips what the kernels here do not take."""
    with guarded() as memory:
        guard = lambda x: memory.between(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        parts = [type(a)(*map(guard, a)) if hasattr(a, "_fields") else guard(a) for a in args]
        keywords = {key: guard(value) for key, value in kwargs.items()}
        try:
            result = getattr(ds, name)(*parts, **keywords, impl=impl)
        except ValueError as error:
            if "cannot run this" not in str(error):
                raise
            pytest.skip(str(error))
    if result is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    memory.check()
    return result


def close(got, want, tolerance):
    error = exact.error(got, want.cpu())
    assert error <= tolerance, error


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_offsets(impl, device, size, offsets, fp8):
    rows, n, k = size
    a, b, offsets = normal(rows, k, device=device), normal(4, n, k, device=device), ints(offsets, device)
    if fp8:
        a, b = ds.quantize(a, impl="reference"), ds.quantize(b, (128, 128), impl="reference")
    close(runs(impl, "grouped_gemm", a, b, offsets), exact.grouped_gemm(a, b, offsets), 2**-7)
    out = torch.full((rows, n), torch.nan, device=device)
    close(runs(impl, "grouped_gemm", a, b, offsets, out=out), exact.grouped_gemm(a, b, offsets), 2**-10)


@pytest.mark.parametrize("offsets", OFFSETS, ids=str)
def test_offsets_of_gradients(impl, device, size, offsets):
    rows, n, k = size
    dy, x, offsets = normal(rows, n, device=device), normal(rows, k, device=device), ints(offsets, device)
    close(runs(impl, "grouped_wgrad", dy, x, offsets), exact.grouped_wgrad(dy, x, offsets), 2**-16)
    q, want = runs(impl, "quantize_grouped", x, offsets), ds.reference.quantize_grouped(x, offsets)
    assert torch.equal(q.data.view(torch.uint8), want.data.view(torch.uint8))
    dy, x = (ds.quantize_grouped(t, offsets, impl="reference") for t in (dy, x))
    close(runs(impl, "grouped_wgrad", dy, x, offsets), ds.reference.grouped_wgrad(dy, x, offsets), 2**-10)


@pytest.mark.parametrize("counts", [[TOP, BOTTOM, 3, -1], [10**6, 0, 1, 2]], ids=str)
def test_counts(impl, device, size, counts):
    rows, n, k = size
    rows = rows // 4
    flat = ds.quantize(normal(4 * rows, k, device=device), impl="reference")
    a = ds.Fp8Tensor(flat.data.unflatten(0, (4, rows)), flat.scale.unflatten(0, (4, rows)))
    b, counts = ds.quantize(normal(4, n, k, device=device), (128, 128), impl="reference"), ints(counts, device)
    close(runs(impl, "grouped_gemm_masked", a, b, counts), exact.grouped_gemm_masked(a, b, counts), 2**-7)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ids(impl, device, dtype):
    far = FAR if dtype == torch.int64 else TOP
    experts = ints([*IDS, [far, 2], [-far - 1, 0]], device, dtype)
    hidden, inner = (256, 128) if device == "cuda" else (24, 16)
    x, y = normal(6, hidden, device=device), normal(12, hidden, device=device)
    if impl == "triton":
        got, want = runs(impl, "permute", x, experts, 4), exact.permute(x, experts, 4)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))
        index = experts.clamp(BOTTOM, TOP).int()
        permuted, weights = ds.Permuted(y, ints([0] * 5, device), index), torch.rand(6, 2).to(device)
        close(runs(impl, "combine", y, permuted, weights), exact.combine(y, index, weights), 2**-7)
    w13, w2 = normal(4, 2 * inner, hidden, device=device) / 8, normal(4, hidden, inner, device=device) / 8
    routing = ds.Routing(torch.rand(6, 2).to(device), experts, experts, experts)
    for n_shared in (0, 1):
        want = exact.fused_experts(x, w13, w2, routing.weights, experts, n_shared=n_shared)
        close(runs(impl, "fused_experts", x, w13, w2, routing, n_shared=n_shared), want, 2**-5)


@pytest.mark.parametrize("dtype", [BRAIN, torch.uint8])
def test_slots(impl, device, dtype):
    slots = ints([FAR, -FAR - 1, -1, 14, 15, 16, 2**32, 2**32 + 3, 3], device, torch.int64)
    kv, k_rope, weight = (normal(*s, device=device) for s in ((9, 512), (9, 64), (512,)))
    angle = (torch.rand(9, 32) * 6).to(device)
    width = 656 if dtype == torch.uint8 else 576
    caches = [torch.full((3, 5, width), 1, dtype=dtype, device=device) for _ in range(2)]
    inputs = kv, k_rope, weight, angle.cos(), angle.sin()
    got = runs(impl, "write_latent_cache", *inputs, caches[0], slots, eps=1e-6)
    ds.write_latent_cache(*inputs, caches[1], slots, eps=1e-6, impl="reference")
    changed = [(c.flatten(0, 1) != 1).any(-1).nonzero().flatten().tolist() for c in (got, caches[1])]
    assert changed[0] == changed[1] == [3, 14]


def paged(device, dtype, latent):
    rows = torch.randn(3 * 4, latent + 64) / 2
    rows = pack_fp8(rows[:, :latent], rows[:, latent:]) if dtype == torch.uint8 else rows.to(dtype)
    return rows.unflatten(0, (3, 4)).contiguous().to(device)


@pytest.mark.parametrize("dtype", [BRAIN, torch.uint8])
@pytest.mark.parametrize("queries", [1, 2])
def test_tables_and_lengths_of_decode(impl, device, dtype, queries):
    latent, heads = (512, 16) if device == "cuda" else (128, 2)
    q, cache = normal(5, queries, heads, latent + 64, device=device) / 2, paged(device, dtype, latent)
    table = ints([[0, TOP], [BOTTOM, -1], [2, 3], [1, 1], [TOP, BOTTOM]], device)
    lengths, counts = ints([TOP, 8, BOTTOM, 7, -1], device), ints([TOP, BOTTOM, 1, 2, 0], device)
    options = {"scale": 0.05, "value_dim": latent}
    for q_lengths in (None, counts):
        got = runs(impl, "mla_decode", q, cache, table, lengths, **options, q_lengths=q_lengths)
        want = exact.mla_decode(q, cache, table, lengths, **options, q_lengths=q_lengths)
        close(got[0], want[0], 2**-6)
        finite = want[1].isfinite()
        close(got[1].cpu()[finite], want[1][finite], 2**-10)
        assert bool((got[1].cpu()[~finite] == float("-inf")).all())


@pytest.mark.parametrize("cu", [[TOP, BOTTOM, 5], [0, 99, 3], [-1, 5, 0], [0, TOP, TOP]], ids=str)
def test_sequences_of_prefill(impl, device, cu):
    """What comes out is unspecified; nothing is out of bounds."""
    widths = (192, 192, 128) if device == "cuda" else (24, 24, 16)
    q, k, v = (normal(9, 2, width, device=device) for width in widths)
    good = ints([0, 4, 9], device)
    for lengths_q, lengths_k in ((ints(cu, device), good), (good, ints(cu, device))):
        out, lse = runs(impl, "mla_prefill", q, k, v, lengths_q, lengths_k, scale=0.1)
        assert out.shape == (9, 2, widths[2])
        assert lse.shape == (2, 9)


@pytest.mark.parametrize("dtype", [BRAIN, torch.uint8])
def test_tables_and_lengths_of_cached_prefill(impl, device, dtype):
    latent, own, value = (512, 128, 128) if device == "cuda" else (128, 16, 16)
    q, kv_b = normal(9, 2, own + 64, device=device), normal(2 * (own + value), latent, device=device) / 16
    cache, cu = paged(device, dtype, latent), ints([0, 4, 7, 9], device)
    table, lengths = ints([[0, TOP], [BOTTOM, -1], [TOP, 1]], device), ints([TOP, 3, BOTTOM], device)
    got, _ = runs(impl, "mla_prefill_cached", q, kv_b, cache, table, lengths, cu, scale=0.1)
    want, _ = ds.reference.mla_prefill_cached(q, kv_b, cache, table, lengths, cu, scale=0.1)
    close(got, want, 2**-5)
    for bad in ([TOP, BOTTOM, 5, 1], [0, 99, 3, TOP])[: 2 if device == "cuda" else 1]:
        runs(impl, "mla_prefill_cached", q, kv_b, cache, table, lengths, ints(bad, device), scale=0.1)


def test_places_and_sequences_of_routing(impl, device):
    logits = torch.randn(30, 16, device=device)
    physical = ints([[TOP, BOTTOM], [-1, 5], [0, -7], [TOP, TOP]] * 4, device)
    got = runs(impl, "route", logits, top_k=4, physical=physical)
    want = ds.route(logits, top_k=4, physical=physical, impl="reference")
    assert torch.equal(got.experts, want.experts)
    if impl == "hopper":
        return  # the rest has no such kernel
    for lengths in ([TOP, TOP, 5], [BOTTOM, 10, TOP], [-1, -1, -1], [29, 2, TOP]):
        lengths = ints(lengths, device)
        got = runs(impl, "balance_loss", logits, top_k=2, alpha=1.0, sequence_lengths=lengths)
        close(got, exact.balance_loss(logits, top_k=2, alpha=1.0, sequence_lengths=lengths), 1e-5)
    targets = ints([FAR, -FAR - 1, 2**32, -1, 15, 16] * 5, device, torch.int64)
    close(runs(impl, "cross_entropy", logits, targets), exact.cross_entropy(logits, targets), 1e-5)
    load = ints([TOP] * 15 + [BOTTOM], device)
    bias = runs(impl, "update_bias", torch.zeros(16, device=device), load, 1.0)
    assert torch.equal(bias.cpu(), (load.sum(dtype=torch.int64) - 16 * load.long()).sign().float().cpu())


def test_rows_and_places_of_sums(device):
    """Half of a combine, added up elsewhere: what lies beyond the rows, and beyond those that came, is zero."""
    y, came, residual = (normal(n, 72, device=device) for n in (9, 4, 5))
    far = [TOP, BOTTOM, -1, 9, 2**30]
    index = ints([[far[t], t, 8] for t in range(5)], device)
    places = ints([[[TOP, 4, BOTTOM, -1, 3][t], t % 4] for t in range(5)], device)
    weights = torch.rand(5, 3, device=device)
    with guarded() as memory, ds.use_impl("triton"):
        inputs = {"came": came, "places": places, "residual": residual}
        between = {name: memory.between(x) for name, x in inputs.items()}
        got = ExpertRows(*map(memory.between, (y, index, weights))).sums(**between)
    memory.check()
    valid = (index >= 0) & (index < 9)
    want = (weights * valid).double()[..., None] * y.double()[index.clamp(0, 8)]
    there = (places >= 0) & (places < 4)
    want = want.sum(1) + (there[..., None] * came.double()[places.clamp(0, 3)]).sum(1) + residual.double()
    close(got, want, 2**-7)


CASES = {f"{case.op}, {case.label}": case for case in parity.all_cases()}


@pytest.mark.gpu
@pytest.mark.parametrize("label", CASES)
def test_every_result_between_guards(impl, label):
    """Of each case of `parity`, gradients too: all that is allocated is full of NaN before, and nothing around it is
    written to."""
    with guarded() as memory:
        try:
            outcome = parity.check(CASES[label], torch.device("cuda"), impl)
        except ValueError as error:
            if "cannot run this" not in str(error):
                raise
            pytest.skip(str(error))
    torch.cuda.synchronize()
    memory.check()
    assert outcome.passed, outcome
