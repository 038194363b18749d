"""The MLA references against independent statements of the same mathematics, all in fp64 unless said."""

import math

import pytest
import torch
import torch.nn.functional as F

from dskernels.reference import mla

LATENT, ROPE, NOPE, VALUE, HEADS = 32, 16, 24, 40, 6  # all different, so that a swapped dimension cannot pass
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def paged_cache(lengths, page_size, dtype=torch.float64, seed=0):
    """A cache with the rows of each request on shuffled pages; NaN wherever no row was put."""
    generator = torch.Generator().manual_seed(seed)
    per_request = max(math.ceil(n / page_size) for n in lengths) + 1
    pages = torch.randperm(len(lengths) * per_request + 3, generator=generator)
    table = pages[: len(lengths) * per_request].view(len(lengths), per_request).to(torch.int32)
    cache = torch.full((len(pages), page_size, LATENT + ROPE), math.nan, dtype=dtype)
    rows = [torch.randn(n, LATENT + ROPE, dtype=torch.float64, generator=generator).to(dtype) for n in lengths]
    for b, row in enumerate(rows):
        for s in range(len(row)):
            cache[table[b, s // page_size], s % page_size] = row[s]
    for b, n in enumerate(lengths):
        table[b, math.ceil(n / page_size) :] = 2147480000
    return cache, table, torch.tensor(lengths, dtype=torch.int32), rows


@pytest.mark.parametrize("page_size", [1, 4, 7])
@pytest.mark.parametrize("q_lengths", [None, [3, 1, 2, 0, 3]])
def test_decode_is_a_softmax_over_what_each_query_sees(page_size, q_lengths):
    lengths = [9, 0, 17, 5, 2]  # 2 < 3 new tokens: the first query of the last request sees nothing
    cache, table, length_B, rows = paged_cache(lengths, page_size)
    q = torch.randn(5, 3, HEADS, LATENT + ROPE, dtype=torch.float64)
    n_B = None if q_lengths is None else torch.tensor(q_lengths, dtype=torch.int32)
    out, lse = mla.mla_decode(q, cache, table, length_B, scale=0.3, value_dim=LATENT, q_lengths=n_B)
    for b, length in enumerate(lengths):
        n = 3 if q_lengths is None else q_lengths[b]
        for j in range(3):
            end = length - n + 1 + j if j < n else 0
            if end <= 0:
                assert (out[b, j] == 0).all()
                assert (lse[b, :, j] == -math.inf).all()
                continue
            scores = 0.3 * q[b, j] @ rows[b][:end].T
            torch.testing.assert_close(out[b, j], scores.softmax(-1) @ rows[b][:end, :LATENT], **EXACT)
            torch.testing.assert_close(lse[b, :, j], scores.exp().sum(-1).log(), **EXACT)


def test_absorbed_decode_prefill_over_the_cache_and_plain_prefill_agree():
    """W^UK moved into q and W^UV after the output change nothing: q.(W c) = (W^T q).c."""
    lengths, n_new = [9, 12, 4], 3
    cache, table, length_B, rows = paged_cache(lengths, page_size=4)
    kv_b = torch.randn(HEADS * (NOPE + VALUE), LATENT, dtype=torch.float64)
    w_uk, w_uv = kv_b.view(HEADS, NOPE + VALUE, LATENT).split([NOPE, VALUE], dim=1)
    q = torch.randn(3 * n_new, HEADS, NOPE + ROPE, dtype=torch.float64)
    cu_q = torch.arange(0, 3 * n_new + 1, n_new, dtype=torch.int32)

    q_latent = torch.einsum("thn,hnl->thl", q[..., :NOPE], w_uk)
    absorbed = torch.cat([q_latent, q[..., NOPE:]], dim=-1).view(3, n_new, HEADS, -1)
    out_latent, lse_BHQ = mla.mla_decode(absorbed, cache, table, length_B, scale=0.2, value_dim=LATENT)
    out_decode = torch.einsum("bqhl,hvl->bqhv", out_latent, w_uv).flatten(0, 1)

    out_cached, lse_cached = mla.mla_prefill_cached(q, kv_b, cache, table, length_B, cu_q, scale=0.2)

    kv = torch.cat(rows)
    k_nope, v = (kv[:, :LATENT] @ kv_b.T).view(-1, HEADS, NOPE + VALUE).split([NOPE, VALUE], dim=-1)
    cu_k = torch.tensor([0, *lengths]).cumsum(0).int()
    out, lse = mla.mla_prefill(q, k_nope, v, cu_q, cu_k, scale=0.2, k_rope=kv[:, LATENT:])

    torch.testing.assert_close(out_cached, out, **EXACT)
    torch.testing.assert_close(lse_cached, lse, **EXACT)
    torch.testing.assert_close(out_decode, out, **EXACT)
    torch.testing.assert_close(lse_BHQ.transpose(0, 1).flatten(1), lse, **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_prefill_is_scaled_dot_product_attention_of_each_sequence(causal, groups):
    lengths_q, lengths_k = [5, 0, 3, 1, 4], [5, 2, 7, 1, 4]
    q = torch.randn(sum(lengths_q), HEADS, NOPE, dtype=torch.float64)
    k = torch.randn(sum(lengths_k), groups, NOPE, dtype=torch.float64)
    v = torch.randn(sum(lengths_k), groups, VALUE, dtype=torch.float64)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k))
    out, _ = mla.mla_prefill(q, k, v, cu_q, cu_k, scale=0.25, causal=causal)
    for q_s, k_s, v_s, out_s in zip(
        q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), out.split(lengths_q), strict=True
    ):
        mask = torch.ones(len(q_s), len(k_s), dtype=torch.bool).tril(len(k_s) - len(q_s)) if causal else None
        q_h, k_h, v_h = (x.transpose(0, 1) for x in (q_s, k_s, v_s))
        expected = F.scaled_dot_product_attention(q_h, k_h, v_h, attn_mask=mask, scale=0.25, enable_gqa=True)
        torch.testing.assert_close(out_s, expected.transpose(0, 1), **EXACT)


def test_prefill_rows_with_nothing_to_attend_are_zero_and_minus_infinity():
    """More queries than keys, no keys at all, and rows that no sequence holds."""
    q, k = torch.randn(8, 2, NOPE), torch.randn(2, 2, NOPE)
    cu_q, cu_k = torch.tensor([0, 4, 6], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)
    out, lse = mla.mla_prefill(q, k, k, cu_q, cu_k, scale=1.0)
    empty = torch.tensor([True, True, False, False, True, True, True, True])
    assert (out[empty] == 0).all()
    assert (lse[:, empty] == -math.inf).all()
    assert lse[:, ~empty].isfinite().all()


def test_rope_gives_the_scores_of_transformers():
    """Hugging Face emits the rotated halves concatenated, we keep pairs adjacent: the layouts differ, q.k does not."""
    deepseek_v3 = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    q = torch.randn(1, HEADS, 7, ROPE, dtype=torch.float64)
    k = torch.randn(1, 1, 7, ROPE, dtype=torch.float64)
    angle = torch.outer(torch.arange(7.0), 10000 ** (-torch.arange(0, ROPE, 2) / ROPE)).double()
    theirs_cos, theirs_sin = (torch.cat([x, x], dim=-1)[None] for x in (angle.cos(), angle.sin()))
    q_hf, k_hf = deepseek_v3.apply_rotary_pos_emb_interleave(q, k, theirs_cos, theirs_sin)
    ours_q, ours_k = (mla.apply_rope(x, angle.cos(), angle.sin()) for x in (q, k))
    torch.testing.assert_close(ours_q @ ours_k.mT, q_hf @ k_hf.mT, **EXACT)
    torch.testing.assert_close(torch.cat([ours_q[..., 0::2], ours_q[..., 1::2]], dim=-1), q_hf, **EXACT)


def test_rope_is_a_rotation_of_complex_numbers():
    x, angle = torch.randn(5, ROPE, dtype=torch.float64), torch.randn(5, ROPE // 2, dtype=torch.float64)
    rotated = torch.view_as_complex(x.view(5, -1, 2)) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(
        mla.apply_rope(x, angle.cos(), angle.sin()), torch.view_as_real(rotated).flatten(1), **EXACT
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_written_rows_are_read_back_where_the_table_says(dtype):
    kv, k_rope = torch.randn(6, LATENT, dtype=dtype), torch.randn(6, ROPE, dtype=dtype)
    weight, angle = torch.rand(LATENT, dtype=dtype) + 0.5, torch.randn(6, ROPE // 2)
    cache = torch.zeros(4, 3, LATENT + ROPE, dtype=dtype)
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    slots = torch.tensor([6, 7, 8, -1, 0, 12])  # token 3 is skipped, token 5 is beyond the cache
    assert mla.write_latent_cache(kv, k_rope, weight, angle.cos(), angle.sin(), cache, slots, eps=1e-6) is cache
    row = mla.read_latent_cache(cache, table, torch.tensor([4]), LATENT)[0, :4]
    kept = [0, 1, 2, 4]
    expected = torch.cat(
        [
            F.rms_norm(kv.double(), [LATENT], weight.double(), eps=1e-6),
            mla.apply_rope(k_rope.double(), angle.cos(), angle.sin()),
        ],
        dim=-1,
    )[kept]
    torch.testing.assert_close(row.double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-12)
    assert (cache[[1, 3]] == 0).all()


@pytest.mark.parametrize("latent", [32, 128, 320, 512])
def test_fp8_rows_have_the_documented_bytes_and_come_back_within_half_a_step(latent):
    x, rope = torch.randn(5, latent) * torch.logspace(-3, 3, 5)[:, None], torch.randn(5, 16)
    x[1] = 0
    row, n_scales = mla.pack_fp8(x, rope), math.ceil(latent / 128)
    assert row.dtype == torch.uint8
    assert row.shape == (5, latent + 4 * n_scales + 2 * 16)
    scale = row[:, latent : latent + 4 * n_scales].contiguous().view(torch.float32)
    for t, tile in enumerate(x.split(128, dim=-1)):
        amax = tile.abs().amax(-1)
        torch.testing.assert_close(scale[:, t], torch.where(amax == 0, 1.0, amax / 448), rtol=0, atol=0)
    assert torch.equal(row[:, latent + 4 * n_scales :].contiguous().view(torch.bfloat16), rope.bfloat16())
    back = mla.unpack_fp8(row, latent)
    step = scale.repeat_interleave(128, -1)[:, :latent] * 2.0**-9  # e4m3's smallest subnormal
    assert ((back[:, :latent] - x).abs() <= torch.maximum(x.abs() * 2.0**-4, step / 2) * (1 + 1e-6)).all()


def test_decode_over_an_fp8_cache_is_decode_over_its_unpacked_rows():
    _, table, length_B, rows = paged_cache([7, 0, 5], page_size=2)
    packed = torch.full((20, 2, LATENT + 4 + 2 * ROPE), 255, dtype=torch.uint8)  # e4m3 and bf16 NaN where unused
    unpacked = torch.full((20, 2, LATENT + ROPE), math.nan, dtype=torch.float64)
    for b, row in enumerate(rows):
        in_bytes = mla.pack_fp8(row[:, :LATENT], row[:, LATENT:])
        for s in range(len(row)):
            packed[table[b, s // 2], s % 2] = in_bytes[s]
            unpacked[table[b, s // 2], s % 2] = mla.unpack_fp8(in_bytes, LATENT)[s].double()
    q = torch.randn(3, 1, HEADS, LATENT + ROPE, dtype=torch.float64)
    arguments = {"scale": 0.3, "value_dim": LATENT}
    expected = mla.mla_decode(q, unpacked, table, length_B, **arguments)
    torch.testing.assert_close(mla.mla_decode(q, packed, table, length_B, **arguments), expected, rtol=0, atol=0)


def test_merged_halves_are_attention_over_the_whole():
    q, k = torch.randn(2, 3, HEADS, NOPE, dtype=torch.float64), torch.randn(2, 10, 1, NOPE, dtype=torch.float64)
    v = torch.randn(2, 10, 1, VALUE, dtype=torch.float64)
    visible = torch.ones(2, 3, 10, dtype=torch.bool)
    out, lse = mla.attention(q, k, v, visible, 0.3)
    parts = [mla.attention(q, k[:, s], v[:, s], visible[..., s], 0.3) for s in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(mla.merge_states(*parts[0], *parts[1]), (out, lse), **EXACT)


def finite(*tensors):
    """What gradcheck can difference: rows with nothing to attend are constant."""
    return tuple(x.masked_fill(x == -math.inf, 0.0) for x in tensors)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    cu_q, cu_k = torch.tensor([0, 3, 3, 5], dtype=torch.int32), torch.tensor([0, 2, 3, 6], dtype=torch.int32)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    assert torch.autograd.gradcheck(
        lambda q, k, v, k_rope: finite(*mla.mla_prefill(q, k, v, cu_q, cu_k, scale=0.5, k_rope=k_rope)),
        (leaf(5, 4, 6), leaf(6, 2, 4), leaf(6, 2, 3), leaf(6, 2)),
    )
    table, lengths = torch.tensor([[1], [0], [2]], dtype=torch.int32), torch.tensor([3, 2, 0], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda q, cache: finite(*mla.mla_decode(q, cache, table, lengths, scale=0.5, value_dim=4)),
        (leaf(3, 2, 2, 6), leaf(3, 4, 6)),
    )
    assert torch.autograd.gradcheck(
        lambda q, kv_b, cache: finite(*mla.mla_prefill_cached(q, kv_b, cache, table, lengths, cu_q, scale=0.5)),
        (leaf(5, 2, 5), leaf(2 * 5, 4), leaf(3, 4, 6)),
    )
    lse_a, lse_b = leaf(2, 3), leaf(2, 3)
    with torch.no_grad():
        lse_a[0, 0], lse_b[0, 1], lse_b[1, 2] = -math.inf, math.inf, 3.0
    outs = leaf(3, 2, 4), leaf(3, 2, 4)
    out, lse = mla.merge_states(outs[0], lse_a, outs[1], lse_b)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.isfinite().all() for x in (lse_a, lse_b, *outs))
    lse_a, lse_b = leaf(2, 3), leaf(2, 3)
    assert torch.autograd.gradcheck(mla.merge_states, (outs[0], lse_a, outs[1], lse_b))
