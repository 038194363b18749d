"""Decode over the latent cache in CUDA C++: which config is chosen and what is refused; on the GPU, against fp64."""

import functools
import math
from dataclasses import replace

import pytest
import torch

import dskernels as ds
from dskernels import parity
from dskernels.cuda.driver import Planned
from dskernels.mla.decode import hopper
from dskernels.mla.decode.config import BLOCK, E4M3, MOST_ROWS, ROWS, TMA, choose_hopper_config
from dskernels.parity.paging import paged_cache
from test_mla_decode import DECODE_CASES, check_decode, close, oracle

BRAIN, HALF = torch.bfloat16, torch.float16
SCALE = 576**-0.5


def test_choice():
    assert choose_hopper_config(128, 64, False).loader == TMA
    boxes = {page: choose_hopper_config(16, page, False).box_rows for page in (8, 16, 48, 64, 96, 256)}
    assert boxes == {8: 8, 16: 16, 48: 16, 64: 64, 96: 32, 256: 64}
    assert {choose_hopper_config(16, page, False).loader for page in (1, 3, 4, 60)} == {ROWS}
    assert {choose_hopper_config(rows, page, True).loader for rows in (1, 128) for page in (1, 64)} == {E4M3}
    # Row blocks that can be paired load for each other.
    clusters = {rows: choose_hopper_config(rows, 64, False).cluster for rows in (1, 64, 65, 128, 129, 256)}
    assert clusters == {1: 1, 64: 1, 65: 2, 128: 2, 129: 1, 256: 2}
    assert choose_hopper_config(128, 64, True).cluster == 1
    for rows in (16, 128):
        for page, fp8 in ((64, False), (8, False), (1, False), (64, True), (1, True)):
            config = choose_hopper_config(rows, page, fp8)
            # The CTA has 168 for each of 384 threads, and one that asks for more than are left waits forever.
            assert config.registers % 8 == 0
            assert 504 - 2 * config.registers >= 24


Q = torch.empty(2, 1, 16, 576, dtype=BRAIN)
CACHE = torch.empty(3, 64, 576, dtype=BRAIN)
TABLE, LENGTHS = torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value_dim": 448}, "a value dimension of 512 and a rope dimension of 64"),
        ({"q": Q.float(), "cache": CACHE.float()}, "it takes bf16 and fp16, q is torch.float32"),
        ({"scale": 0.0}, "it takes a positive scale, not 0.0"),
        ({"scale": -1.0}, "it takes a positive scale"),
        ({"q": Q.expand(2, 1, 16, 576).repeat(1, MOST_ROWS // 16 + 1, 1, 1)}, f"up to {MOST_ROWS} query rows"),
        ({"cache": CACHE[:0]}, "there is no cache"),
        ({"block_table": TABLE[:, :0]}, "there is no cache"),
        ({"cache": torch.empty(3, 64, 580, dtype=BRAIN)[..., :576]}, "the rows of cache must be aligned to 16 bytes"),
        ({"q": torch.empty(2, 1, 16, 577, dtype=BRAIN)[..., :576]}, "the rows of q must be aligned to 16 bytes"),
    ],
)
def test_what_it_does_not_take(changes, reason):
    arguments = {"q": Q, "cache": CACHE, "block_table": TABLE, "lengths": LENGTHS, "q_lengths": None}
    arguments = {**arguments, "scale": SCALE, "value_dim": 512, **changes}
    assert reason in hopper.mla_decode_supports(**arguments)


# ---- on the GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [case for case in DECODE_CASES if "fp32" not in case.label], ids=lambda case: case.label
)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "hopper")
    assert outcome.passed, outcome


@pytest.mark.gpu
def test_it_is_what_runs(device):
    for dtype in (BRAIN, torch.uint8):
        cache = paged_cache(0, [70], 64, 512, 64, dtype, device)
        q = torch.randn(1, 1, 16, 576, device=device).to(BRAIN)
        (choice,) = ds.explain(ds.mla_decode, q, *cache, scale=SCALE)
        assert choice.impl == "hopper", choice


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 3, 9, 16, 63, 64, 126, 128])
@pytest.mark.parametrize("q_tokens", [1, 2, 4])
@pytest.mark.parametrize(("batch", "context"), [(1, 20), (2, 4096), (6, 140), (64, 140), (64, 1000)])
def test_model_shapes(device, batch, context, q_tokens, heads):
    """Varied lengths up to `context`, one request in four empty; copies of 64 rows and of fewer, no copies, e4m3."""
    for page_size, fp8 in ((1, False), (16, True), (32, False), (64, False)):
        lengths = [0 if b % 4 == 3 else context - b * 7 % context for b in range(batch)]
        check_decode(device, "hopper", lengths, q_tokens, heads, page_size, (512, 64), BRAIN, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 3, 5, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(("dtype", "fp8"), [(BRAIN, False), (BRAIN, True), (HALF, False), (HALF, True)])
def test_any_page_size(device, page_size, dtype, fp8):
    """As many new tokens as they come in: none, fewer than there are, more than there are positions."""
    lengths, new = [300, 1, 129, 2, 64], [3, 2, 0, 3, 1]
    check_decode(device, "hopper", lengths, 3, 24, page_size, (512, 64), dtype, fp8, new)
    check_decode(device, "hopper", lengths, 3, 40, page_size, (512, 64), dtype, fp8, new)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "q_tokens", "heads"),
    [
        ([20_000], 1, 128),  # one request for all: a part each, combined by a block a row
        ([5000, 3], 8, 128),  # 16 row blocks: 8 parts
        ([900] * 140, 1, 16),  # requests that are whole, some parts with two
        ([64 * b for b in range(150)], 1, 64),  # cut wherever an even share ends
        ([3000, 0, 0, 10, 6000], 3, 64),  # three row blocks, which are no pairs
        ([1] * 700, 1, 16),  # more requests than threads
    ],
)
@pytest.mark.parametrize("fp8", [False, True])
def test_shares_of_every_kind(device, lengths, q_tokens, heads, fp8):
    check_decode(device, "hopper", lengths, q_tokens, heads, 64, (512, 64), BRAIN, fp8)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [-(10**6), 10**6])
def test_cut_and_whole(device, whole):
    """The same batch with requests cut wherever a share ends, and with none cut."""
    lengths = [700, 30, 0, 64, 2000, 129]
    q = torch.randn(6, 1, 128, 576, device=device).to(BRAIN)
    cache, table, length = paged_cache(0, lengths, 64, 512, 64, BRAIN, device, scale=0.1)
    config = replace(choose_hopper_config(128, 64, False), whole=whole)
    out, lse = q.new_full((6, 1, 128, 512), math.nan), q.new_full((6, 128, 1), math.nan, dtype=torch.float32)
    work = q.new_full((hopper.work_size(q),), math.nan, dtype=torch.float32)
    launch = Planned(functools.partial(hopper.plan, config))
    launch(q, cache, table, length, None, out, lse, work, SCALE)
    hopper.combine(work, out, lse)
    close((out, lse), oracle(q, cache, table, length, impl="hopper", scale=SCALE, value_dim=512), BRAIN)


@pytest.mark.gpu
@pytest.mark.parametrize(("page_size", "dtype"), [(4, BRAIN), (16, BRAIN), (4, torch.uint8)])
def test_what_only_the_device_knows_stays_in_bounds(device, page_size, dtype):
    """Lengths, q_lengths and page ids of any value are taken as the nearest possible one, as the reference does."""
    cache, *_ = paged_cache(0, [3 * page_size], page_size, 512, 64, dtype, device, scale=0.1)
    used = torch.tensor([[0, -7], [2, 2147483647], [-2147483648, 1], [1, 2]], dtype=torch.int32, device=device)
    rows = ds.reference.mla.unpack_fp8(cache, 512) if dtype == torch.uint8 else cache
    cache[rows.isnan().any(-1)] = cache[~rows.isnan().any(-1)][0]  # any page may be met
    lengths = torch.tensor([2147483647, 2 * page_size, -5, page_size + 2], dtype=torch.int32, device=device)
    new = torch.tensor([2147483647, -1, 2, -2147483648], dtype=torch.int32, device=device)
    q = torch.randn(4, 2, 5, 576, device=device).to(BRAIN)
    options = {"scale": SCALE, "value_dim": 512, "q_lengths": new}
    got = ds.mla_decode(q, cache, used, lengths, **options, impl="hopper")
    close(got, oracle(q, cache, used, lengths, impl="hopper", **options), BRAIN)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 64])
def test_nan_in_a_used_row_is_not_hidden(device, page_size):
    q = torch.randn(2, 1, 16, 576, device=device).to(BRAIN)
    cache, table, lengths = paged_cache(0, [200, 200], page_size, 512, 64, BRAIN, device)
    cache[table[1, 0], 0, 540] = math.nan
    out, lse = ds.mla_decode(q, cache, table, lengths, scale=SCALE, impl="hopper")
    assert out[0].isfinite().all()
    assert out[1].isnan().all()
    assert lse[1].isnan().all()


@pytest.mark.gpu
def test_nan_in_padding_tokens_stays_there(device):
    q = torch.randn(2, 2, 16, 576, device=device).to(BRAIN)
    q[0, 1], q[1] = math.nan, math.nan
    cache, table, lengths = paged_cache(0, [200, 70], 64, 512, 64, BRAIN, device)
    new = torch.tensor([1, 0], dtype=torch.int32, device=device)
    out, lse = ds.mla_decode(q, cache, table, lengths, scale=SCALE, q_lengths=new, impl="hopper")
    assert out[0, 0].isfinite().all()
    assert (out[0, 1] == 0).all()
    assert (out[1] == 0).all()
    assert (lse[0, :, 1] == -math.inf).all()
    assert (lse[1] == -math.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_scores_of_any_size(device, scale):
    """Scores that grow along the request, so that sums are scaled to a new maximum again and again."""
    cache, table, lengths = paged_cache(0, [1500], 64, 512, 64, BRAIN, device)
    cache *= torch.linspace(0, 1, cache.shape[0] * 64, device=device).view(-1, 64, 1).to(BRAIN)
    q = torch.randn(1, 1, 16, 576, device=device).to(BRAIN)
    got = ds.mla_decode(q, cache, table, lengths, scale=scale * SCALE, impl="hopper")
    want = oracle(q, cache, table, lengths, impl="hopper", scale=scale * SCALE, value_dim=512)
    assert parity.difference(got[0], want[0]) < 5e-6
    torch.testing.assert_close(got[1].double(), want[1], rtol=8.01 / 65536, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("q_tokens", [1, 2])
@pytest.mark.parametrize("dtype", [BRAIN, torch.uint8])
def test_rows_may_be_strided(device, q_tokens, dtype):
    """One layer of a cache that holds several, and the queries of a larger projection."""
    cache, table, length = paged_cache(0, [200, 3], 16, 512, 64, dtype, device)
    width = cache.shape[2]
    layers = torch.zeros(len(cache), 3, 16, width + 32, dtype=dtype, device=device)
    layers[:, 1, :, 16 : width + 16] = cache
    layer = layers[:, 1, :, 16 : width + 16]
    wide = torch.randn(2, q_tokens + 1, 5, 640, device=device).to(BRAIN)
    q = wide[:, 1:, :4, 32:608]
    got = ds.mla_decode(q, layer, table, length, scale=SCALE, impl="hopper")
    want = ds.mla_decode(q.contiguous(), cache, table, length, scale=SCALE, impl="hopper")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 64])
def test_more_than_2_31_elements(device, page_size):
    """Rows at both ends of a cache of 2^31 elements and more."""
    pages = 2**31 // (page_size * 576) + 300
    cache = torch.full((pages, page_size, 576), math.nan, dtype=BRAIN, device=device)
    used = torch.cat([torch.arange(2), torch.arange(pages - 2, pages)]).to(device)
    cache[used] = (torch.randn(4, page_size, 576, device=device) / 10).to(BRAIN)  # as elsewhere: `close` counts on it
    table = used.int()[None]
    lengths = torch.tensor([4 * page_size], dtype=torch.int32, device=device)
    q = (torch.randn(1, 1, 16, 576, device=device) * 8).to(BRAIN)
    got = ds.mla_decode(q, cache, table, lengths, scale=SCALE, impl="hopper")
    few = torch.arange(4, dtype=torch.int32, device=device)[None]
    close(got, oracle(q, cache[used], few, lengths, impl="hopper", scale=SCALE, value_dim=512), BRAIN)


@pytest.mark.gpu
@pytest.mark.parametrize(("page_size", "fp8"), [(64, False), (1, False), (64, True)])
@pytest.mark.parametrize("heads", [16, 128])
def test_a_graph_replays_with_other_lengths_and_tables_and_bits_repeat(device, heads, page_size, fp8):
    """Also with requests that are empty, with more work than at the capture, and with less; each 20 times."""
    all_lengths = [[300, 80, 5, 0], [0, 300, 300, 300], [5, 0, 0, 0], [3000, 1, 1, 5000], [0, 0, 0, 0]]
    dtype = torch.uint8 if fp8 else BRAIN
    caches = [
        paged_cache(i, lengths, page_size, 512, 64, dtype, device, scale=0.1) for i, lengths in enumerate(all_lengths)
    ]
    first = [0]
    for cache, *_ in caches:
        first.append(first[-1] + len(cache))
    cache = torch.cat([cache for cache, *_ in caches])
    columns = max(table.shape[1] for _, table, _ in caches)
    q = torch.randn(4, 2, heads, 576, device=device).to(BRAIN)
    table = torch.zeros(4, columns, dtype=torch.int32, device=device)
    lengths, new = torch.zeros_like(table[:, 0]), torch.zeros_like(table[:, 0])
    options = {"scale": SCALE, "value_dim": 512, "q_lengths": new}

    def step():
        return ds.mla_decode(q, cache, table, lengths, **options, impl="hopper")

    def become(i):
        _, pages, length = caches[i]
        used = pages < len(caches[i][0])
        table.fill_(2147480000)
        table[:, : pages.shape[1]] = torch.where(used, pages + first[i], pages)
        lengths.copy_(length)
        new.copy_(torch.tensor([2, 1, 2, i % 3], dtype=torch.int32))

    become(0)
    step()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for i in range(len(all_lengths)):
        become(i)
        for x in captured:
            x.fill_(math.nan)
        graph.replay()
        got = [x.clone() for x in captured]
        close(got, oracle(q, cache, table, lengths, impl="hopper", **options), BRAIN)
        for run in [graph.replay, step] * 10:
            again = run() or captured
            assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("batch", "q_tokens", "columns", "pages"), [(0, 1, 2, 3), (2, 0, 2, 3), (2, 1, 0, 3), (2, 1, 0, 0)]
)
def test_empty(device, batch, q_tokens, columns, pages):
    """Nothing to do, or no cache at all: the latter is not for this kernel, which the choice sees."""
    q = torch.randn(batch, q_tokens, 16, 576, device=device).to(BRAIN)
    cache = torch.randn(pages, BLOCK, 576, device=device).to(BRAIN)
    table = torch.zeros(batch, columns, dtype=torch.int32, device=device)
    lengths = torch.full((batch,), 5 if columns == 0 else 0, dtype=torch.int32, device=device)
    out, lse = ds.mla_decode(q, cache, table, lengths, scale=SCALE)
    assert out.shape == (batch, q_tokens, 16, 512)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
