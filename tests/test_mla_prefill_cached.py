"""Prefill over the latent cache: against fp64, any chunks, poisoned caches, bad input, registration."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.mla.prefill import absorbed, cached, config
from dskernels.parity import mla_prefill as cases
from dskernels.parity.paging import paged_cache
from dskernels.reference import mla as reference
from registering import check_registration

CACHED_CASES = [case for case in cases.CASES if case.op == "mla_prefill_cached"]
LENGTHS_AND_NEW = [
    ([40, 0, 9, 25], [3, 2, 9, 0]),  # nothing cached: nothing seen; all of it new; nothing new
    ([6, 30], [10, 1]),  # more new tokens than cached positions
]
SMALL = (32, 24, 16, 40)  # latent, without rope, with it, value: all different, so that no swap can pass


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("case", CACHED_CASES, ids=lambda case: case.label)
def test_parity(case, device, impl):
    outcome = parity.check(case, torch.device(device), impl)
    assert outcome.passed, outcome


def offsets(lengths, device="cpu"):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


def make_inputs(device, lengths, new, heads, page_size, dims=SMALL, dtype=torch.float32, cache_dtype=None, spare=1):
    latent, nope, rope, value = dims
    q = torch.randn(sum(new), heads, nope + rope).to(dtype).to(device)
    kv_b = (torch.randn(heads * (nope + value), latent) * latent**-0.5).to(dtype).to(device)
    cache = paged_cache(0, lengths, page_size, latent, rope, cache_dtype or dtype, device, spare_entries=spare)
    return q, kv_b, *cache, offsets(new, device)


def check(inputs, impl, tolerance=2e-5):
    """Against the reference in fp64, which knows nothing of chunks; unused pages and table entries are poison."""
    q, kv_b, cache, *tables = inputs
    cache64 = cache if cache.dtype == torch.uint8 else cache.double()
    want = reference.mla_prefill_cached(q.double(), kv_b.double(), cache64, *tables, scale=0.2)
    out, lse = ds.mla_prefill_cached(*inputs, scale=0.2, impl=impl)
    assert out.dtype == q.dtype
    assert torch.equal(lse == -math.inf, want[1] == -math.inf)
    torch.testing.assert_close(out.double(), want[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want[1], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize("chunk", [13, 64, None])
@pytest.mark.parametrize(("lengths", "new"), LENGTHS_AND_NEW)
def test_any_lengths_in_chunks_of_any_size(device, monkeypatch, impl, chunk, lengths, new):
    inputs = make_inputs(device, lengths, new, 2, 8)
    if chunk is not None:
        monkeypatch.setattr(cached, "CHUNK_BYTES", chunk * inputs[1].shape[0] * 4)
    check(inputs, impl)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_some_heads_at_a_time(device, monkeypatch, impl):
    """Of 5 heads 2, 2 and 1, with the keys and values of all positions."""
    inputs = make_inputs(device, [40, 0, 9, 25], [3, 2, 9, 0], 5, 8)
    _, kv_b, _, table, *_ = inputs
    monkeypatch.setattr(cached, "CHUNK_BYTES", 2 * table.numel() * 8 * kv_b.shape[0] // 5 * 4)
    check(inputs, impl)


def test_how_many_heads_at_a_time():
    choose = functools.partial(config.heads_at_a_time, most_bytes=2**29, multiprocessors=132)
    assert choose(128, 8192 * 512, tiles=8) == 128  # all of them
    assert choose(128, 32768 * 512, tiles=32) == 32
    assert choose(128, 32768 * 512, tiles=10) == 26  # 10 rounds of tiles; 32 would take 12
    assert choose(128, 131072 * 512, tiles=4) == 0  # 32 tiles of 8 heads would leave most of the GPU idle
    assert choose(16, 2**30, tiles=1000) == 0  # not even a single head
    assert choose(16, 0, tiles=0) == 16  # nothing cached


def test_where_absorbing_pays():
    pays = functools.partial(config.absorbing_pays, most=160, multiprocessors=132)
    assert pays(160, 1, 128)
    assert not pays(161, 1, 128)
    assert pays(16 * 160, 16, 16)
    assert not pays(16 * 161, 16, 16)
    assert pays(256, 1, 16)  # 32 tiles would leave three quarters of the GPU idle
    assert not pays(512, 1, 16)
    assert not pays(0, 1, 16)
    assert not pays(0, 0, 16)


@pytest.mark.parametrize(("lengths", "new"), LENGTHS_AND_NEW)
@pytest.mark.parametrize("group", [1, 3])
def test_groups_of_new_tokens(device, lengths, new, group):
    """Each token has a place in a group of its request, whose last token sees what it should."""
    q, _, _, table, lengths_d, cu = make_inputs(device, lengths, new, 19, 8)
    q = torch.cat([q, q], 1)[:, ::2].to(torch.bfloat16)  # heads that are apart
    latent, _, rope, _ = SMALL
    got, want = (
        torch.ops.dskernels.group_tokens(q, table, lengths_d, cu, group, 8, latent, rope, impl)
        for impl in ("triton", "reference")
    )
    got, want = ([grouped, queries[..., latent:], *rest] for grouped, queries, *rest in (got, want))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    grouped, queries, place, rows, seen, count = (x.cpu() for x in got)
    assert torch.equal(grouped[place.long()], q.cpu())
    assert torch.equal(queries[place.long()], q.cpu()[..., -rope:])
    request = torch.repeat_interleave(torch.arange(len(new)), torch.tensor(new))
    assert torch.equal(rows[place.long() // group], table.cpu()[request])
    ends = torch.cat([torch.arange(n - m + 1, n + 1) for n, m in zip(lengths, new, strict=True)])
    i = place.long() // group
    assert torch.equal((seen[i] - count[i] + 1 + place % group).clamp(min=0), ends.clamp(min=0).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_that_are_taken_are_the_same_bits(device, dtype):
    """Also where the place of a token is none, as hostile cu_seqlens leave it."""
    heads, group, value = 19, 3, 40
    out, lse = torch.randn(6, heads, value).to(dtype).to(device), torch.randn(2, heads, group, device=device)
    for places in ([0, 5, 2, 3], [-7, 2147483647, 6, 1]):
        place = torch.tensor(places, dtype=torch.int32, device=device)
        take = torch.ops.dskernels.take_results
        got, want = (take(out, lse, place, impl) for impl in ("triton", "reference"))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("requests", [0, 1, 4, 1100])
def test_positions_that_are_packed(device, requests):
    lengths = torch.randint(-5, 90, (requests,), dtype=torch.int32).to(device)
    got, want = (torch.ops.dskernels.pack_lengths(lengths, 70, impl) for impl in ("triton", "reference"))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    cu, first, ends = (x.tolist() for x in got)
    assert cu == [0, *lengths.clamp(0, 70).cumsum(0).tolist()]
    assert (first, ends) == ([0] * requests, [0, cu[-1]])


@pytest.mark.parametrize(("impl", "heads", "case"), [("reference", 40, 0), ("reference", 2, 1), ("triton", 40, 0)])
def test_absorbed(device, monkeypatch, impl, heads, case):
    monkeypatch.setattr(cached, "is_absorbed", lambda *args: True)
    inputs = make_inputs(device, *LENGTHS_AND_NEW[case], heads, 8)
    check(inputs, impl)
    # What is said of it runs nothing, and has no index that could be out of bounds.
    chosen = [choice.operation for choice in ds.explain(ds.mla_prefill_cached, *inputs, scale=0.2, impl=impl)]
    assert chosen == ["group_tokens", "mla_decode", "take_results"]


@settings(max_examples=6)
@given(
    requests=st.lists(st.tuples(st.integers(0, 50), st.integers(0, 20)), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    page_size=st.sampled_from([1, 5, 16, 64]),
    cache_dtype=st.sampled_from([torch.float32, torch.uint8]),
    spare=st.integers(0, 3),
    chunk=st.integers(1, 200),
)
def test_any_shape(device, requests, heads, page_size, cache_dtype, spare, chunk):
    lengths, new = zip(*requests, strict=True)
    inputs = make_inputs(device, lengths, new, heads, page_size, cache_dtype=cache_dtype, spare=spare)
    before, cached.CHUNK_BYTES = cached.CHUNK_BYTES, max(chunk, 30) * inputs[1].shape[0] * 4
    try:
        check(inputs, "triton" if chunk > 150 else "reference")
    finally:
        cached.CHUNK_BYTES = before


def test_many_chunks_are_rounded_once(device, monkeypatch):
    """Parts are merged in fp32: with 32 chunks bf16 is no further off than with one."""
    inputs = make_inputs(device, [256], [8], 1, 16, dtype=torch.bfloat16, spare=0)
    exact = reference.mla_prefill_cached(*(x.double() if x.is_floating_point() else x for x in inputs), scale=0.2)[0]
    errors = []
    for chunk in (8, 256):
        monkeypatch.setattr(cached, "CHUNK_BYTES", chunk * inputs[1].shape[0] * 2)
        out, _ = ds.mla_prefill_cached(*inputs, scale=0.2, impl="reference")
        errors.append(parity.difference(out, exact))
    assert errors[0] < 1.2 * errors[1]
    assert errors[1] < 2e-5


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_prompt_in_pieces_is_the_prompt_in_one(device, impl):
    """What extends a cache sees what it would have seen as one prompt."""
    latent, nope, rope, value = SMALL
    (cache, table, lengths), heads, first = paged_cache(0, [30], 8, latent, rope, torch.float32, device), 2, 17
    q, kv_b, *_ = make_inputs(device, [30], [30], heads, 8)
    row = reference.read_latent_cache(cache, table, lengths, latent)[0, :30]
    k, v = (row[:, :latent] @ kv_b.T).unflatten(1, (heads, -1)).tensor_split([nope], -1)
    cu = offsets([30], device)
    whole = ds.mla_prefill(q, k, v, cu, cu, scale=0.2, k_rope=row[:, latent:], impl=impl)
    for begin, end in ((0, first), (first, 30)):
        length = torch.tensor([end], dtype=torch.int32, device=device)
        cu = offsets([end - begin], device)
        out, lse = ds.mla_prefill_cached(q[begin:end], kv_b, cache, table, length, cu, scale=0.2, impl=impl)
        torch.testing.assert_close(out, whole[0][begin:end])
        torch.testing.assert_close(lse, whole[1][:, begin:end])


@pytest.mark.parametrize(
    ("latent", "rope", "dtype", "cache_dtype"),
    [
        (512, 64, torch.bfloat16, torch.bfloat16),
        (512, 64, torch.bfloat16, torch.uint8),
        (160, 16, torch.float16, torch.uint8),  # a second scale, of a part of a tile
        (48, 24, torch.float32, torch.float32),
    ],
)
def test_gathered_rows_are_the_same_bits(device, latent, rope, dtype, cache_dtype):
    lengths, first = [20, 0, 7, 40], [3, 0, 7, 1]
    cache, table, _ = paged_cache(0, lengths, 6, latent, rope, cache_dtype, device)
    cu = offsets([n - f for n, f in zip(lengths, first, strict=True)], device)
    gather = torch.ops.dskernels.gather_latents
    arguments = (cache, table, cu, torch.tensor(first, dtype=torch.int32, device=device))
    for start, rows in ((0, 56), (10, 30), (40, 40), (56, 5)):
        got, want = (gather(*arguments, start, rows, latent, rope, dtype, impl) for impl in ("triton", "reference"))
        used = max(0, min(rows, 56 - start))
        assert torch.equal(got[:used], want[:used])
        assert got.shape == want.shape
        assert want[:used].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_whatever_the_device_holds_is_taken_within_the_tables(device, impl):
    q, kv_b, cache, table, _, cu_q = make_inputs(device, [20, 20], [4, 5], 2, 8, spare=0)
    lengths = torch.tensor([2147483647, -5], dtype=torch.int32, device=device)
    table[0, 2] = -2147483648
    taken = torch.tensor([24, 0], dtype=torch.int32, device=device)
    cache = cache.nan_to_num()
    got = ds.mla_prefill_cached(q, kv_b, cache, table, lengths, cu_q, scale=0.2, impl=impl)
    want = reference.mla_prefill_cached(q, kv_b, cache, table.clamp(min=0), taken, cu_q, scale=0.2)
    torch.testing.assert_close(got, want)
    for hostile in ([0, 2147483647, 9], [-3, 7, -9], [9, 9, 2]):
        cu_q = torch.tensor(hostile, dtype=torch.int32, device=device)
        ds.mla_prefill_cached(q, kv_b, cache, table, lengths, cu_q, scale=0.2, impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("requests", "columns", "pages", "new"), [(0, 2, 3, 0), (1, 0, 3, 2), (1, 2, 0, 2), (1, 2, 3, 0)]
)
def test_empty(device, impl, requests, columns, pages, new):
    latent, nope, rope, value = SMALL
    q, kv_b = torch.randn(new, 2, nope + rope, device=device), torch.randn(2 * (nope + value), latent, device=device)
    cache = torch.randn(pages, 8, latent + rope, device=device)
    table = torch.zeros(requests, columns, dtype=torch.int32, device=device)
    lengths = torch.full((requests,), 5, dtype=torch.int32, device=device)
    out, lse = ds.mla_prefill_cached(
        q, kv_b, cache, table, lengths, offsets([new] * requests, device), scale=0.2, impl=impl
    )
    assert out.shape == (new, 2, value)
    assert lse.shape == (2, new)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("impl", "way"),
    [
        ("hopper", "positions"),
        ("triton", "positions"),
        ("hopper", "heads"),
        ("hopper", "whole"),
        ("hopper", "absorbed"),
    ],
)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8])
def test_model_shapes(device, monkeypatch, impl, way, cache_dtype):
    """In chunks of 1,000, of which one holds the ends of several requests, and one nothing that is cached; some heads
    at a time; in one; absorbed."""
    dims = (512, 128, 64, 128)
    inputs = make_inputs(device, [3000, 0, 64, 1500], [700, 3, 64, 1], 16, 64, dims, torch.bfloat16, cache_dtype)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    want = reference.mla_prefill_cached(*exact, scale=192**-0.5)
    addressable = inputs[3].numel() * 64
    if way in ("positions", "heads"):
        chunk = 1000 * inputs[1].shape[0] if way == "positions" else 7 * addressable * 256
        monkeypatch.setattr(cached, "CHUNK_BYTES", chunk * 2)
        monkeypatch.setattr(config, "LEAST_FILL", 0 if way == "heads" else 2)
    monkeypatch.setattr(absorbed, "MOST_TOKENS", 1000 if way == "absorbed" else 0)
    got = ds.mla_prefill_cached(*inputs, scale=192**-0.5, impl=impl)
    assert parity.difference(got[0], want[0]) < 2e-5
    torch.testing.assert_close(got[1].double(), want[1], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "most"), [("hopper", 160), ("hopper", 0), ("triton", 0)])
def test_a_graph_replays_with_other_lengths(device, monkeypatch, impl, most):
    monkeypatch.setattr(absorbed, "MOST_TOKENS", most)
    inputs = make_inputs(device, [300, 80], [20, 12], 4, 64, (512, 128, 64, 128), torch.bfloat16)
    *_, lengths, cu_q = inputs

    def step():
        return ds.mla_prefill_cached(*inputs, scale=0.07, impl=impl)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for now, new in (([30, 80], [31, 1]), ([0, 75], [2, 30])):
        lengths.copy_(torch.tensor(now))
        cu_q.copy_(offsets(new))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


Q, KV_B, CACHE, TABLE, LENGTHS, CU_Q = make_inputs("cpu", [20, 3], [4, 3], 2, 8)
BYTES, *_ = paged_cache(0, [20, 3], 8, 32, 16, torch.uint8, "cpu")


def call(**changes):
    arguments = {"q": Q, "kv_b": KV_B, "cache": CACHE, "block_table": TABLE, "lengths": LENGTHS, "cu_seqlens_q": CU_Q}
    return ds.mla_prefill_cached(**{**arguments, "scale": 0.1, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
        ({"q": Q.int()}, TypeError, "q: expected dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"q": Q[0]}, ValueError, r"q: expected shape \[T, H, nope \+ rope\], got \[2, 40\]"),
        ({"q": Q.mT.contiguous().mT}, ValueError, "q: expected a contiguous last dimension"),
        ({"q": Q[:, :0]}, ValueError, "kv_b: expected more than 24 rows .* for each of 0 heads, got 128"),
        ({"kv_b": KV_B.bfloat16()}, TypeError, "kv_b: expected dtype float32, got bfloat16"),
        ({"kv_b": KV_B[0]}, ValueError, r"kv_b: expected shape \[H \* \(nope \+ V\), latent\], got \[32\]"),
        ({"kv_b": KV_B[:127]}, ValueError, "kv_b: expected more than 24 rows .* for each of 2 heads, got 127"),
        ({"kv_b": KV_B[:48]}, ValueError, "kv_b: expected more than 24 rows .* for each of 2 heads, got 48"),
        ({"kv_b": KV_B.to("meta")}, ValueError, "kv_b: expected a tensor on cpu like the others, got one on meta"),
        ({"kv_b": KV_B.T.contiguous().T}, ValueError, "kv_b: expected a contiguous last dimension"),
        ({"cache": [1]}, TypeError, "cache: expected a torch.Tensor, got list"),
        ({"cache": CACHE.half()}, TypeError, "cache: expected dtype float32 or uint8, got float16"),
        ({"cache": CACHE[0]}, ValueError, r"cache: expected shape \[pages, page_size, row\], got \[8, 48\]"),
        ({"cache": CACHE[..., :32]}, ValueError, r"cache: expected a row of latent 32 and a rope part of 1 to 39, got"),
        (
            {"cache": torch.zeros(3, 8, 72)},
            ValueError,
            r"cache: expected a row of latent 32 and .* \[3, 8, 72\] of float32",
        ),
        ({"cache": BYTES[..., :36]}, ValueError, "cache: expected a row of latent 32 and .* of uint8"),
        (
            {"cache": torch.zeros(3, 8, 69, dtype=torch.uint8)},
            ValueError,
            "cache: expected shape .*68 bytes of an e4m3",
        ),
        ({"cache": CACHE[:, :0]}, ValueError, "cache: expected a page size of at least 1"),
        ({"cache": CACHE.to("meta")}, ValueError, "cache: expected a tensor on cpu"),
        ({"block_table": TABLE.long()}, TypeError, "block_table: expected dtype int32, got int64"),
        ({"block_table": TABLE[0]}, ValueError, r"block_table: expected shape \[B, pages per request\], got \[4\]"),
        ({"block_table": TABLE.to("meta")}, ValueError, "block_table: expected a tensor on cpu"),
        ({"lengths": [20, 3]}, TypeError, "lengths: expected a torch.Tensor, got list"),
        ({"lengths": LENGTHS.long()}, TypeError, "lengths: expected dtype int32, got int64"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths: expected shape \[2\], got \[1\]"),
        ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths: expected a tensor on cpu"),
        ({"cu_seqlens_q": CU_Q.long()}, TypeError, "cu_seqlens_q: expected dtype int32, got int64"),
        ({"cu_seqlens_q": CU_Q[:2]}, ValueError, r"cu_seqlens_q: expected shape \[3\], got \[2\]"),
        ({"cu_seqlens_q": CU_Q.to("meta")}, ValueError, "cu_seqlens_q: expected a tensor on cpu"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)


def test_what_the_kernels_do_not_take_is_refused_by_name(device):
    inputs = [x.double() if x.is_floating_point() else x for x in (Q, KV_B, CACHE, TABLE, LENGTHS, CU_Q)]
    inputs = [x.to(device) for x in inputs]
    with pytest.raises(
        ValueError, match="gather_latents: impl='triton' cannot run this: float64 runs on the reference only"
    ):
        ds.mla_prefill_cached(*inputs, scale=0.1, impl="triton")
    ds.mla_prefill_cached(*inputs, scale=0.1)


def test_registration():
    op = torch.ops.dskernels.mla_prefill_cached.default
    check_registration(op, (Q, KV_B, CACHE.nan_to_num(), TABLE, LENGTHS, CU_Q, 0.1))
    check_registration(op, (Q.bfloat16(), KV_B.bfloat16(), BYTES, TABLE, LENGTHS, CU_Q, 0.1))
    onto = torch.ops.dskernels.mla_prefill_onto.default
    cu, out, lse = offsets([4, 3]), torch.randn(7, 2, 40), torch.randn(2, 7)
    k, v, k_rope = torch.randn(9, 2, 24), torch.randn(9, 2, 40), torch.randn(9, 16)
    check_registration(onto, (Q, k, k_rope, v, cu, offsets([5, 4]), 0.1, out, lse))
    some = torch.ops.dskernels.mla_prefill_some.default
    check_registration(some, (Q[:, :1], k[:, :1], k_rope, v[:, :1], cu, offsets([5, 4]), 0.1, out[:, :1], lse[:1]))
    check_registration(torch.ops.dskernels.pack_lengths.default, (LENGTHS, 20))
    place = torch.tensor([3, 0, 9], dtype=torch.int32)
    results = torch.randn(6, 2, 40), torch.randn(2, 2, 3), place
    check_registration(torch.ops.dskernels.take_results.default, results)
    gather = torch.ops.dskernels.gather_latents.default
    table, first = TABLE.clamp(0, 1), torch.zeros(2, dtype=torch.int32)
    check_registration(gather, (CACHE.nan_to_num(), table, offsets([20, 3]), first, 2, 21, 32, 16, torch.float32))
    check_registration(gather, (BYTES, TABLE, offsets([20, 3]), first, 2, 21, 32, 16, torch.bfloat16))


def test_compiles_whole():
    def step(q, kv_b, cache, table, lengths, cu_q):
        out, lse = ds.mla_prefill_cached(q * 2, kv_b, cache, table, lengths, cu_q, scale=0.1)
        return out + 1, lse

    inputs = (Q, KV_B, CACHE, TABLE, LENGTHS, CU_Q)
    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(*inputs)
    assert all(torch.equal(a, b) for a, b in zip(got, step(*inputs), strict=True))
