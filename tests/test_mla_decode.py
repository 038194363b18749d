"""Decode over the latent cache: against fp64, poisoned caches, the kernel's paths, bad input, registration."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dskernels as ds
from dskernels import parity
from dskernels.mla.decode import triton as kernels
from dskernels.mla.decode.config import MAX_SPLITS, MEDIUM, MEDIUM_FP8, NARROW_FP8, WIDE, use_rows
from dskernels.parity import mla_decode as cases
from dskernels.parity.paging import paged_cache
from dskernels.reference import mla as reference
from refusing import check_refused
from registering import check_registration

DECODE_CASES = [case for case in cases.CASES if case.op == "mla_decode"]


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.label)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def close(got, want, dtype):
    """Out and lse against fp64. bf16 and fp16 round the softmax weights and the output, fp32 nothing but its sums."""
    (out, lse), (out64, lse64) = got, want
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), out64, rtol=1e-5, atol=1e-5)
    else:
        error = (out.double() - out64).abs()
        assert ((error < 8e-4) | (error < 2.01 / 128 * out64.abs())).all(), error.max()
        assert parity.difference(out, out64) < 5e-6
    assert torch.equal(lse == -math.inf, lse64 == -math.inf)
    error = (lse.double() - lse64).masked_fill(lse64 == -math.inf, 0.0).abs()
    assert ((error < 1e-6) | (error < 8.01 / 65536 * lse64.abs())).all(), error.max()


def oracle(q, cache, table, lengths, *, value_dim, impl, **options):
    """fp64 decode; over e4m3 rows as the kernels see them, unpacked and rounded to the dtype of q, or as they are."""
    exact = impl == "reference" or (impl == "hopper" and use_rows(q.shape[1] * q.shape[2]))
    if cache.dtype == torch.uint8 and not exact:
        cache = reference.unpack_fp8(cache.flatten(0, 1), value_dim).to(q.dtype).unflatten(0, cache.shape[:2])
    return reference.mla_decode(q.double(), cache, table, lengths, value_dim=value_dim, **options)


def check_decode(device, impl, lengths, q_tokens, heads, page_size, dims, dtype, fp8=False, new=None, spare=1):
    latent, rope = dims
    q = (torch.randn(len(lengths), q_tokens, heads, latent + rope) * 8).to(dtype).to(device)
    cache_dtype = torch.uint8 if fp8 else dtype
    cache = paged_cache(0, lengths, page_size, latent, rope, cache_dtype, device, scale=0.1, spare_entries=spare)
    options = {"scale": (latent + rope) ** -0.5, "value_dim": latent}
    options["q_lengths"] = None if new is None else torch.tensor(new, dtype=torch.int32, device=device)
    got = ds.mla_decode(q, *cache, **options, impl=impl)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    close(got, oracle(q, *cache, impl=impl, **options), dtype)


@pytest.mark.parametrize(
    ("lengths", "q_tokens", "heads", "page_size", "options"),
    [
        ([140], 1, 16, 64, {}),  # one request, one row block, one page a block of positions
        ([20, 5], 1, 1, 16, {}),  # one head: 15 of 16 rows are padding
        ([33, 0, 7], 4, 9, 1, {}),  # rows that are no multiple of the block, each position on a page of its own
        ([100], 2, 63, 128, {}),  # blocks in which the new token changes
        ([64, 65], 1, 128, 32, {}),  # many row blocks; a length at a block's border and one beyond
        ([700, 2], 1, 16, 64, {"spare": 4}),  # several shares, empty ones for the short request
        ([90, 40], 2, 16, 64, {"fp8": True, "new": [1, 2]}),
        ([50], 1, 16, 16, {"dtype": torch.float32}),
    ],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_against_fp64_with_the_dimensions_of_the_model(device, impl, lengths, q_tokens, heads, page_size, options):
    options = {"dtype": torch.bfloat16, **options}
    check_decode(device, impl, lengths, q_tokens, heads, page_size, (512, 64), **options)


@settings(max_examples=12)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=4),
    q_tokens=st.integers(1, 4),
    heads=st.integers(1, 20),
    page_size=st.sampled_from([1, 3, 16, 32, 64, 256]),
    dims=st.sampled_from([(32, 16), (16, 16), (48, 32), (144, 48)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    fp8=st.booleans(),
    padded=st.booleans(),
    spare=st.sampled_from([0, 1, 400]),
    data=st.data(),
)
def test_any_shape(device, lengths, q_tokens, heads, page_size, dims, dtype, fp8, padded, spare, data):
    """Small models' dimensions, padded to powers of two; lengths below the number of new tokens; tables too wide."""
    fp8 = fp8 and dtype != torch.float32
    new = (
        data.draw(st.lists(st.integers(0, q_tokens), min_size=len(lengths), max_size=len(lengths))) if padded else None
    )
    check_decode(device, "triton", lengths, q_tokens, heads, page_size, dims, dtype, fp8, new, spare)


@pytest.mark.parametrize("config", [MEDIUM, MEDIUM_FP8, NARROW_FP8, WIDE], ids=lambda c: f"{c.block_m}x{c.block_n}")
def test_every_config(device, monkeypatch, config):
    """The interpreter is given the narrow ones, and a GPU only its own: try the others too."""
    monkeypatch.setattr(kernels, "choose_config", lambda *args: config)
    for page_size, fp8 in ((16, True), (64, False), (5, False)):
        check_decode(device, "triton", [100, 64, 3], 3, 24, page_size, (32, 16), torch.bfloat16, fp8, [3, 1, 2])


@pytest.mark.parametrize("parts", [1, 2, 7, MAX_SPLITS])
def test_any_number_of_shares(device, monkeypatch, parts):
    monkeypatch.setattr(kernels, "choose_splits", lambda *args: parts)
    check_decode(device, "triton", [0, 50], 2, 5, 16, (32, 16), torch.float32)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_half_of_the_batch_is_empty(device, impl):
    lengths = [17, 0] * 4
    q = torch.randn(8, 2, 4, 48, device=device)
    cache = paged_cache(0, lengths, 16, 32, 16, torch.float32, device)
    out, lse = ds.mla_decode(q, *cache, scale=0.1, value_dim=32, impl=impl)
    assert (out[1::2] == 0).all()
    assert (lse[1::2] == -math.inf).all()
    assert out[0::2].abs().amin() > 0
    assert lse[0::2].isfinite().all()


def test_what_only_the_device_knows_stays_in_bounds(device):
    """Lengths, q_lengths and page ids of any value are taken as the nearest possible one, as the reference does."""
    cache = torch.randn(3, 4, 48, device=device)
    table = torch.tensor([[0, -7], [2, 2147483647], [-2147483648, 1], [1, 2]], dtype=torch.int32, device=device)
    lengths = torch.tensor([2147483647, 8, -5, 6], dtype=torch.int32, device=device)
    new = torch.tensor([2147483647, -1, 2, -2147483648], dtype=torch.int32, device=device)
    q = torch.randn(4, 2, 5, 48, device=device)
    options = {"scale": 0.2, "value_dim": 32, "q_lengths": new}
    got = ds.mla_decode(q, cache, table, lengths, **options, impl="triton")
    torch.testing.assert_close(got, reference.mla_decode(q, cache, table, lengths, **options))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_new_tokens_see_themselves_and_the_past_only(device, impl):
    """A row written over the last position changes the last new token and no other."""
    q = torch.randn(1, 3, 4, 48, device=device)
    cache, table, lengths = paged_cache(0, [20], 16, 32, 16, torch.float32, device)
    before = ds.mla_decode(q, cache, table, lengths, scale=0.2, value_dim=32, impl=impl)
    cache[table[0, 1], 3] += 1
    after = ds.mla_decode(q, cache, table, lengths, scale=0.2, value_dim=32, impl=impl)
    assert torch.equal(before[0][:, :2], after[0][:, :2])
    assert torch.equal(before[1][:, :, :2], after[1][:, :, :2])
    assert (before[0][:, 2] != after[0][:, 2]).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_rows_may_be_strided(device, impl):
    """One layer of a cache that holds several, and the queries of a larger projection."""
    lengths = [20, 3]
    for dtype, width in ((torch.bfloat16, 48), (torch.uint8, 68)):
        cache, table, length = paged_cache(0, lengths, 16, 32, 16, dtype, device)
        layers = torch.zeros(len(cache), 3, 16, width + 12, dtype=dtype, device=device)
        layers[:, 1, :, 4 : width + 4] = cache
        layer = layers[:, 1, :, 4 : width + 4]
        wide = torch.randn(2, 3, 5, 100, device=device).bfloat16()
        q = wide[:, 1:, :4, 30:78]
        got = ds.mla_decode(q, layer, table, length, scale=0.2, value_dim=32, impl=impl)
        want = ds.mla_decode(q.contiguous(), cache, table, length, scale=0.2, value_dim=32, impl=impl)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("batch", "q_tokens", "columns", "pages"), [(0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 1, 0, 0)]
)
def test_empty(device, impl, batch, q_tokens, columns, pages):
    q = torch.randn(batch, q_tokens, 4, 48, device=device)
    cache = torch.randn(pages, 16, 48, device=device)
    table = torch.zeros(batch, columns, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), 5 if columns == 0 else 0, dtype=torch.int32, device=device)
    out, lse = ds.mla_decode(q, cache, table, lengths, scale=0.1, value_dim=32, impl=impl)
    assert out.shape == (batch, q_tokens, 4, 32)
    assert lse.shape == (batch, 4, q_tokens)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_nan_in_a_used_row_is_not_hidden(device, impl):
    q = torch.randn(2, 1, 4, 48, device=device)
    cache, table, lengths = paged_cache(0, [20, 20], 16, 32, 16, torch.float32, device)
    cache[table[1, 0], 2, 40] = math.nan
    out, lse = ds.mla_decode(q, cache, table, lengths, scale=0.1, value_dim=32, impl=impl)
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


def test_repeats_are_bitwise_equal(device, monkeypatch):
    monkeypatch.setattr(kernels, "choose_splits", lambda *args: 3)
    q = torch.randn(2, 1, 3, 48, device=device).bfloat16()
    cache = paged_cache(0, [90, 20], 16, 32, 16, torch.bfloat16, device)
    first = ds.mla_decode(q, *cache, scale=0.1, value_dim=32, impl="triton")
    for _ in range(20):
        again = ds.mla_decode(q, *cache, scale=0.1, value_dim=32, impl="triton")
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("q_tokens", [1, 2, 4])
@pytest.mark.parametrize(("batch", "context"), [(1, 20), (2, 4096), (6, 140), (64, 140), (64, 1000)])
def test_model_shapes(device, batch, context, q_tokens, heads):
    """Varied lengths up to `context`, one request in four empty, every page size and both caches."""
    for page_size, fp8 in ((1, False), (16, True), (32, False), (64, False), (64, True), (128, False)):
        lengths = [0 if b % 4 == 3 else context - b * 7 % context for b in range(batch)]
        check_decode(device, "triton", lengths, q_tokens, heads, page_size, (512, 64), torch.bfloat16, fp8)


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths_and_tables(device):
    q = torch.randn(4, 2, 16, 576, device=device).bfloat16()
    cache, table, lengths = paged_cache(0, [300, 80, 5, 0], 64, 512, 64, torch.bfloat16, device)
    new = torch.tensor([2, 1, 2, 0], dtype=torch.int32, device=device)

    def step():
        return ds.mla_decode(q, cache, table, lengths, scale=0.04, q_lengths=new, impl="triton")

    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for order in ([3, 2, 1, 0], [1, 1, 0, 2]):
        table.copy_(table[order])
        lengths.copy_(lengths[order])
        new.copy_(new[order])
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


Q = torch.randn(2, 1, 4, 48)
CACHE, TABLE, LENGTHS = paged_cache(0, [20, 3], 16, 32, 16, torch.float32, "cpu")
BYTES, *_ = paged_cache(0, [20, 3], 16, 32, 16, torch.uint8, "cpu")


ARGUMENTS = {"q": Q, "cache": CACHE, "block_table": TABLE, "lengths": LENGTHS, "scale": 0.1, "value_dim": 32}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
        ({"q": Q.int()}, TypeError, "q: expected dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"q": Q[0]}, ValueError, r"q: expected shape \[B, Q, H, D\], got \[1, 4, 48\]"),
        ({"q": Q.mT.contiguous().mT}, ValueError, "q: expected a contiguous last dimension"),
        ({"cache": [1]}, TypeError, "cache: expected a torch.Tensor, got list"),
        ({"cache": CACHE.half()}, TypeError, "cache: expected dtype float32 or uint8, got float16"),
        ({"cache": CACHE[0]}, ValueError, r"cache: expected shape \[pages, page_size, row\], got \[16, 48\]"),
        ({"cache": CACHE[..., :40]}, ValueError, r"cache: expected shape .* latent 32 \+ rope 16 = 48 columns\], got"),
        (
            {"cache": BYTES[..., :64]},
            ValueError,
            r"cache: expected shape \[pages, page_size, 68 bytes of an e4m3 row\]",
        ),
        ({"cache": CACHE[:, :0]}, ValueError, "cache: expected a page size of at least 1"),
        ({"cache": CACHE.to("meta")}, ValueError, "cache: expected a tensor on cpu like the others, got one on meta"),
        ({"cache": CACHE.mT.contiguous().mT}, ValueError, "cache: expected a contiguous last dimension"),
        (
            {"cache": torch.zeros(2, 16, 70, dtype=torch.uint8)[..., :68]},
            ValueError,
            "cache: expected rows that start at multiples of 4 bytes",
        ),
        ({"block_table": TABLE.long()}, TypeError, "block_table: expected dtype int32, got int64"),
        ({"block_table": TABLE[:1]}, ValueError, r"block_table: expected shape \[2, pages per request\], got \[1, 3\]"),
        ({"block_table": TABLE.to("meta")}, ValueError, "block_table: expected a tensor on cpu"),
        ({"block_table": TABLE.t().contiguous().t()}, ValueError, "block_table: expected a contiguous last dimension"),
        ({"lengths": [20, 3]}, TypeError, "lengths: expected a torch.Tensor, got list"),
        ({"lengths": LENGTHS.long()}, TypeError, "lengths: expected dtype int32, got int64"),
        ({"lengths": LENGTHS[:1]}, ValueError, r"lengths: expected shape \[2\], got \[1\]"),
        ({"lengths": LENGTHS.to("meta")}, ValueError, "lengths: expected a tensor on cpu"),
        ({"scale": "1"}, TypeError, "scale: expected a float, got str"),
        ({"scale": None}, TypeError, "scale: expected a float, got NoneType"),
        ({"value_dim": 32.0}, TypeError, "value_dim: expected an int, got float"),
        ({"value_dim": 48}, ValueError, "value_dim: expected an int from 1 to 47, got 48"),
        ({"value_dim": 0}, ValueError, "value_dim: expected an int from 1 to 47, got 0"),
        ({"value_dim": 30, "cache": BYTES}, ValueError, r"cache: expected shape \[pages, page_size, 70 bytes"),
        (
            {"value_dim": 30, "cache": torch.zeros(2, 16, 72, dtype=torch.uint8)[..., :70]},
            ValueError,
            "cache: expected a latent dimension that is a multiple of 4 in uint8, got 30",
        ),
        ({"q_lengths": LENGTHS.float()}, TypeError, "q_lengths: expected dtype int32, got float32"),
        ({"q_lengths": LENGTHS[:1]}, ValueError, r"q_lengths: expected shape \[2\], got \[1\]"),
        ({"q_lengths": LENGTHS.to("meta")}, ValueError, "q_lengths: expected a tensor on cpu"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ds.mla_decode(**{**ARGUMENTS, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"q": Q.double(), "cache": CACHE.double()}, "float64 runs on the reference only"),
        ({"q": Q[..., :45], "cache": CACHE[..., :45]}, "multiples of 16, not 32 and 13"),
        ({"value_dim": 24}, "multiples of 16, not 24 and 24"),
        ({"cache": BYTES}, "float32 queries over an e4m3 cache"),
    ],
)
def test_what_the_kernel_does_not_take_is_refused_by_name(device, changes, reason):
    check_refused(ds.mla_decode, {**ARGUMENTS, **changes}, device, reason)


def test_registration():
    op = torch.ops.dskernels.mla_decode.default
    check_registration(op, (Q, CACHE.nan_to_num(), TABLE, LENGTHS, None, 0.1, 32))
    check_registration(op, (Q.double(), CACHE.double().nan_to_num(), TABLE, LENGTHS, LENGTHS, 0.1, 32))
    check_registration(op, (Q.bfloat16(), BYTES, TABLE, LENGTHS, None, 0.1, 32))


def test_compiles_whole():
    def step(q, cache, table, lengths):
        out, lse = ds.mla_decode(q * 2, cache, table, lengths, scale=0.1, value_dim=32)
        return out + 1, lse

    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(Q, CACHE, TABLE, LENGTHS)
    assert all(torch.equal(a, b) for a, b in zip(got, step(Q, CACHE, TABLE, LENGTHS), strict=True))
