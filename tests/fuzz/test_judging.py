"""The judge of networks in e4m3 and of attention: what is right passes, what is wrong in one number does not."""

from unittest import mock

import pytest
import torch

import dskernels as ds
from dskernels.reference.fp8 import quantize, swiglu
from dskernels.reference.mla import pack_fp8
from dskernels.types import Fp8Tensor
from fuzz.allowing import SUMS, feed_forward, mla_prefill_cached
from fuzz.drawing import Call
from fuzz.judging import WrongError, _compare, overlapping, settled

TOKENS, HIDDEN, INNER = 9, 256, 384


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def call(request):
    x = torch.randn(TOKENS, HIDDEN).to(request.param)
    w13, w2 = (quantize(torch.randn(*shape) / 5, (128, 128)) for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
    arguments = {"x": x, "w13": w13, "w2": w2, "quantized": None, "fp8": True, "recompute": None}
    return Call("feed_forward", arguments, loose=2.0, apart=feed_forward)


def tensor_cores(a, b):
    """a @ b.T as tensor cores add it up: 32 products at a time, cut off at 2^-13 of the largest."""
    out = torch.zeros(a.data.shape[0], b.data.shape[0])
    for tile in range(0, a.data.shape[1], 128):
        total = torch.zeros_like(out)
        for start in range(tile, tile + 128, 32):
            x, w = (t.data[:, start : start + 32].float() for t in (a, b))
            addends = torch.cat([total[..., None], x[:, None] * w[None]], -1)
            unit = 2.0 ** (addends.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor() - 13)
            total = ((addends / unit).trunc() * unit).sum(-1)
        scale_b = b.scale[:, tile // 128].repeat_interleave(128)[: len(b.data)]
        out += total * a.scale[:, tile // 128, None] * scale_b
    return out


def network(call, product, spoil=lambda hidden: hidden):
    """The network by a product, and what becomes of it."""
    dtype = call.arguments["x"].dtype
    gate_up = product(quantize(call.arguments["x"]), call.arguments["w13"]).to(dtype)
    return product(spoil(quantize(swiglu(gate_up))), call.arguments["w2"]).to(dtype)


def plain(a, b):
    """a @ b.T in fp32."""
    return a.dequantize(torch.float32) @ b.dequantize(torch.float32).T


def judged(call, got, sums=SUMS["cuda"]):
    """Compare with the reference as on a GPU, or as on another device by how much its sums may lose."""
    with mock.patch.dict(SUMS, cpu=sums):
        _compare(call, [got], [network(call, plain)], "hopper")


def test_what_tensor_cores_lose_is_allowed(call):
    for _ in range(8):
        call.arguments["x"] = torch.randn(TOKENS, HIDDEN).to(call.arguments["x"].dtype)
        judged(call, network(call, tensor_cores))


def of_another_tile(hidden):
    return hidden._replace(scale=hidden.scale.roll(1, 1))


def of_another_row(hidden):
    return hidden._replace(scale=hidden.scale.roll(1, 0))


def one_number_lost(hidden):
    data = hidden.data.clone().view(torch.uint8)
    data[2, int(hidden.data[2].float().abs().argmax())] = 0
    return hidden._replace(data=data.view(hidden.data.dtype))


def one_number_a_neighbour_off(hidden):
    data = hidden.data.clone().view(torch.uint8)
    data[2, int(hidden.data[2].float().abs().argmax())] -= 1
    return hidden._replace(data=data.view(hidden.data.dtype))


def last_tile_lost(hidden):
    scale = hidden.scale.clone()
    scale[:, -1] = 0
    return hidden._replace(scale=scale)


@pytest.mark.parametrize("spoil", [of_another_tile, of_another_row, one_number_lost, last_tile_lost])
def test_what_is_wrong_is_found(call, spoil):
    with pytest.raises(WrongError, match="off by"):
        judged(call, network(call, tensor_cores, spoil))


def test_a_step_that_nothing_explains_is_found_in_fp32(call):
    if call.arguments["x"].dtype == torch.float32:  # in bf16 it is less than roundings
        with pytest.raises(WrongError, match="off by"):
            judged(call, network(call, plain, one_number_a_neighbour_off), SUMS["cpu"])


def test_a_block_of_a_weight_with_another_scale_is_found(call):
    w2 = call.arguments["w2"]
    wrong = Fp8Tensor(w2.data, w2.scale.clone(), w2.block)
    wrong.scale[0, 0] *= 1.5
    got = network(Call("feed_forward", {**call.arguments, "w2": wrong}), tensor_cores)
    with pytest.raises(WrongError, match="off by"):
        judged(call, got)


@pytest.mark.parametrize("spoil", [None, of_another_tile, last_tile_lost])
def test_results_that_are_subnormal_are_neighbours_at_most(call, spoil):
    call.arguments["x"] = call.arguments["x"].half()
    call.arguments["w2"] = quantize(call.arguments["w2"].dequantize() * 2.0**-23, (128, 128))
    got = network(call, tensor_cores, spoil or (lambda hidden: hidden))
    want = network(call, plain)
    assert 0 < want.abs().max() < torch.finfo(torch.float16).tiny
    if spoil is None:
        judged(call, torch.nextafter(got, got.new_full((), 1.0)))
    else:
        with pytest.raises(WrongError, match="off by"):
            judged(call, got)


def test_an_infinite_scale_gives_nan_or_infinity_and_nothing_else():
    a, b = quantize(torch.randn(1, 3, 128).flatten(0, 1)), quantize(torch.randn(1, 8, 128), (128, 128))
    b.scale.fill_(float("inf"))
    given = {"a": Fp8Tensor(a.data[None], a.scale[None]), "b": b, "counts": torch.tensor([3], dtype=torch.int32)}
    call = Call("grouped_gemm_masked", given)
    nan = torch.full((1, 3, 8), float("nan"))
    _compare(call, [nan.clone().fill_(float("inf"))], [nan], "triton")
    with pytest.raises(WrongError, match="NaN where"):
        _compare(call, [nan.clone().fill_(1e30)], [nan], "triton")


@pytest.fixture
def written():
    """A call that writes rows of e4m3, two of them to one slot, and what the reference makes of it."""
    tokens, latent, rope = 5, 256, 64
    cache = pack_fp8(torch.randn(4, 2, latent), torch.randn(4, 2, rope))
    arguments = {
        "kv": torch.randn(tokens, latent),
        "k_rope": torch.randn(tokens, rope),
        "norm_weight": torch.randn(latent),
        "cos": torch.rand(tokens, rope // 2),
        "sin": torch.rand(tokens, rope // 2),
        "cache": cache,
        "slots": torch.tensor([6, 0, -1, 6, 3]),
        "eps": 1e-6,
    }
    want = ds.write_latent_cache(**{**arguments, "cache": cache.clone()}, impl="reference")
    return Call("write_latent_cache", arguments, writes=("cache",)), want


def test_a_step_of_e4m3_and_parts_of_two_tokens_in_one_slot_are_allowed(written):
    call, want = written
    got = want.clone()
    got[0, 0, :256] += torch.where(want[0, 0, :256] % 8 > 0, -1, 1)  # within a power of two
    got[3, 0] = torch.randint(256, (got.shape[2],), dtype=torch.uint8)
    _compare(call, [got], [want], "triton")


def two_steps(got):
    got[0, 0, int((got[0, 0, :256] % 8 == 1).nonzero()[0])] += 2


def another_scale(got):
    got[0, 0, 256:260].view(torch.float32).mul_(2)


def scales_exchanged(got):
    got[0, 0, 256:264] = got[0, 0, 256:264].roll(4)


def tile_lost(got):
    got[0, 0, 128:256] = 0


def rope_of_another(got):
    got[0, 0, 264:] = got[1, 1, 264:]


def row_of_no_token(got):
    got[2, 1, 5] ^= 1


@pytest.mark.parametrize(
    "spoil", [two_steps, another_scale, scales_exchanged, tile_lost, rope_of_another, row_of_no_token]
)
def test_wrong_rows_of_e4m3_are_found(written, spoil):
    call, want = written
    got = want.clone()
    spoil(got)
    with pytest.raises(WrongError, match=r"more than a step off|a row that no token"):
        _compare(call, [got], [want], "triton")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_only_rows_that_several_tokens_go_to_are_left_open(written, dtype):
    call, want = written
    got = settled(call, want.to(dtype))
    assert not got[3, 0].any()
    got[3, 0] = want[3, 0].to(dtype)
    assert torch.equal(got, want.to(dtype))


@pytest.mark.parametrize(
    ("ends", "overlap"),
    [([0, 0, 1], False), ([0, 1, 1], False), ([0, 0, 0], False), ([0, 1, 0], True), ([2**30, 0, 1], True),
     ([1, 1, 1], True), ([0, 1, 2], True)],
)  # fmt: skip
def test_bits_are_left_open_where_offsets_do_not_ascend_from_0_to_the_rows(ends, overlap):
    given = {"q": torch.zeros(1, 16, 192), "cu_seqlens_q": torch.tensor(ends, dtype=torch.int32)}
    assert overlapping(Call("mla_prefill_cached", given)) is overlap


def test_attention_may_lose_more_where_its_scale_is_greater_and_is_finite_all_the_same():
    want = torch.randn(2, 1, 4, 16)

    def judged(scale, got):
        _compare(Call("mla_decode", {"q": want, "cache": want, "scale": scale}, loose=8.0), [got], [want], "triton")

    judged(2.0**70, want.flip(0))
    for scale, got in ((1.0, want + 1e-3), (2.0**70, want / 0)):
        with pytest.raises(WrongError):
            judged(scale, got)


@pytest.mark.parametrize("wrong", [None, {"lost": 3}, {"scale": 2.0}, {"scale": 0.5}], ids=str)
def test_absorbed_is_as_right_as_projected_and_a_lost_or_misscaled_key_is_found(wrong):
    tokens, keys, heads, latent, nope, rope = 17, 48, 4, 512, 128, 64
    q, cache = torch.randn(tokens, heads, nope + rope).bfloat16(), torch.randn(3, 16, latent + rope).bfloat16()
    kv_b = (torch.randn(heads * 2 * nope, latent) * 0.3).bfloat16()
    given = {
        "q": q,
        "kv_b": kv_b,
        "cache": cache,
        "block_table": torch.arange(3, dtype=torch.int32)[None],
        "lengths": torch.tensor([keys], dtype=torch.int32),
        "cu_seqlens_q": torch.tensor([0, tokens], dtype=torch.int32),
        "scale": 1.0,
    }
    rows, weights = cache.flatten(0, 1).float(), kv_b.float().unflatten(0, (heads, -1))
    rows[5, :128] *= (wrong or {}).get("scale", 1.0)
    absorbed = torch.einsum("thn,hnl->htl", q[..., :nope].float(), weights[:, :nope]).bfloat16().float()
    score = absorbed @ rows[:, :latent].T + q[..., nope:].float().transpose(0, 1) @ rows[:, latent:].T
    hidden = torch.arange(keys) >= (keys - tokens + 1 + torch.arange(tokens))[:, None]
    hidden |= torch.arange(keys) == (wrong or {}).get("lost", -1)
    score = score.masked_fill(hidden, -torch.inf)
    latents = (score.softmax(-1).bfloat16().float() @ rows[:, :latent]).bfloat16().float()
    got = [(latents @ weights[:, nope:].mT).transpose(0, 1).bfloat16(), score.logsumexp(-1)]
    want = list(ds.mla_prefill_cached(**given, impl="reference"))
    call = Call("mla_prefill_cached", given, loose=4.0, apart=mla_prefill_cached)
    if wrong is None:
        _compare(call, got, want, "hopper")
    else:
        with pytest.raises(WrongError, match="off by"):
            _compare(call, got, want, "hopper")
