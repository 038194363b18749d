"""Absorbed queries: against fp64, strided operands, what decode makes of them, bad input, registration, compilation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.mla.absorb.config import QUERIES_CONFIGS, choose_queries
from dskernels.parity import mla_decode as cases
from dskernels.reference import mla as reference
from registering import check_registration

QUERY_CASES = [case for case in cases.CASES if case.op == "mla_decode_queries"]
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.mark.parametrize("case", QUERY_CASES, ids=lambda case: case.label)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def new_queries(tokens, heads, dims, dtype, device="cpu"):
    """(q, w_uk, cos, sin): weights that keep the size of what they multiply, angles of scattered positions."""
    nope, rope, latent = dims
    angle = torch.randint(0, 4096, (tokens, 1)) * 10000.0 ** (-torch.arange(0, rope, 2) / rope)
    q, w_uk = torch.randn(tokens, heads, nope + rope), torch.randn(heads, nope, latent) * nope**-0.5
    return [x.to(device) for x in (q.to(dtype), w_uk.to(dtype), angle.cos(), angle.sin())]


def queries64(q, w_uk, cos, sin):
    """What the docstring says, and the sum of the magnitudes of each product."""
    q, w_uk, cos, sin = (x.double().cpu() for x in (q, w_uk, cos, sin))
    nope = w_uk.shape[1]
    rope = reference.apply_rope(q[..., nope:], cos[:, None], sin[:, None])
    latent, size = (torch.einsum("thn,hnl->thl", x[..., :nope], w) for x, w in ((q, w_uk), (q.abs(), w_uk.abs())))
    return torch.cat([latent, rope], -1), torch.cat([size, torch.ones_like(rope)], -1)


def assert_exact(got, inputs):
    """Half an ulp of the result; of the sum in fp32, an ulp of its terms for each of them."""
    want, size = queries64(*inputs)
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}[got.dtype]
    assert ((got.double().cpu() - want).abs() <= 1.01 * ulp * want.abs() + 1e-6 * size).all()


@IMPLS
@given(
    tokens=st.integers(1, 20),
    heads=st.integers(1, 3),
    dims=st.sampled_from([(128, 64, 160), (20, 6, 33), (1, 2, 1), (64, 32, 128)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_against_fp64(device, impl, tokens, heads, dims, dtype):
    inputs = new_queries(tokens, heads, dims, dtype, device)
    got = ds.mla_decode_queries(*inputs, impl=impl)
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert_exact(got, inputs)


@IMPLS
def test_operands_may_be_strided(device, impl):
    """A projection's output with other columns beside it, W^UK within kv_b as it lies, angles of a longer table."""
    q, w_uk, cos, sin = new_queries(5, 3, (32, 16, 48), torch.bfloat16, device)
    wide = torch.randn(5, 4, 60, device=device).bfloat16()
    wide[:, :3, 8:56] = q
    kv_b = torch.randn(3 * (32 + 24), 48, device=device).bfloat16()
    part = kv_b.unflatten(0, (3, -1))[:, :32]
    part.copy_(w_uk)
    table = torch.cat([cos, sin, cos], dim=-1)
    got = ds.mla_decode_queries(wide[:, :3, 8:56], part, table[:, :8], table[:, 8:16], impl=impl)
    assert torch.equal(got, ds.mla_decode_queries(q, w_uk, cos, sin, impl=impl))


@IMPLS
def test_tokens_and_heads_do_not_touch_each_other(device, impl):
    q, w_uk, cos, sin = new_queries(5, 3, (32, 16, 48), torch.float32, device)
    q[1, 2, 4], w_uk[0, 3, 7], cos[4, 2] = math.nan, math.nan, math.nan
    nan = ds.mla_decode_queries(q, w_uk, cos, sin, impl=impl).isnan()
    want = torch.zeros(5, 3, 64, dtype=torch.bool)
    want[1, 2, :48] = True
    want[:, 0, 7] = True
    want[4, :, [52, 53]] = True
    assert torch.equal(nan.cpu(), want)


@IMPLS
def test_decode_by_them_is_attention_over_the_written_keys(device, impl):
    """Written cache, absorbed queries and the values' up-projection give what prefill gives for the same tokens."""
    tokens, heads, nope, rope, latent, value = 6, 2, 16, 8, 32, 24
    q, _, cos, sin = new_queries(tokens, heads, (nope, rope, latent), torch.float32, device)
    kv, k_rope, norm = (torch.randn(*shape, device=device) for shape in ((tokens, latent), (tokens, rope), (latent,)))
    kv_b = torch.randn(heads * (nope + value), latent, device=device) * latent**-0.5
    w_uk, w_uv = kv_b.unflatten(0, (heads, -1)).split((nope, value), 1)
    cache = torch.full((2, 4, latent + rope), math.nan, device=device)
    ds.write_latent_cache(kv, k_rope, norm, cos, sin, cache, torch.arange(tokens, device=device), eps=1e-6)

    absorbed = ds.mla_decode_queries(q, w_uk, cos, sin, impl=impl)
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    lengths = torch.tensor([tokens], dtype=torch.int32, device=device)
    out, _ = ds.mla_decode(absorbed[None], cache, table, lengths, scale=0.3, value_dim=latent)
    got = torch.einsum("thl,hvl->thv", out[0], w_uv)

    written = cache.flatten(0, 1)[:tokens]
    k, v = (written[:, :latent] @ kv_b.T).unflatten(1, (heads, -1)).split((nope, value), -1)
    rotated = reference.apply_rope(q[..., nope:], cos[:, None], sin[:, None])
    cu = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    whole = torch.cat((q[..., :nope], rotated), -1)
    want, _ = ds.mla_prefill(whole, k, v, cu, cu, scale=0.3, k_rope=written[:, latent:])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@IMPLS
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_empty(device, impl, shape):
    out = ds.mla_decode_queries(*new_queries(*shape, (32, 16, 48), torch.bfloat16, device), impl=impl)
    assert out.shape == (*shape, 64)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", [None, "triton"])
@pytest.mark.parametrize("tokens", [1, 17, 64, 130])
@pytest.mark.parametrize("heads", [16, 128])
def test_model_shapes(device, impl, tokens, heads):
    inputs = new_queries(tokens, heads, (128, 64, 512), torch.bfloat16, device)
    assert_exact(ds.mla_decode_queries(*inputs, impl=impl), inputs)


Q, W_UK, COS, SIN = new_queries(3, 2, (32, 16, 48), torch.float32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": None}, TypeError, "q: expected a torch.Tensor, got NoneType"),
        ({"q": Q.int()}, TypeError, "q: expected dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"q": Q[0]}, ValueError, r"q: expected shape \[T, H, nope \+ rope\], got \[2, 48\]"),
        ({"q": Q.mT.contiguous().mT}, ValueError, "q: expected a contiguous last dimension"),
        ({"w_uk": W_UK.half()}, TypeError, "w_uk: expected dtype float32, got float16"),
        ({"w_uk": W_UK[:1]}, ValueError, r"w_uk: expected shape \[2, nope, latent\], got \[1, 32, 48\]"),
        ({"w_uk": W_UK[:, :31]}, ValueError, "leaves a positive even number of q's 48 columns to the rope part"),
        ({"w_uk": W_UK[:, :0]}, ValueError, "leaves a positive even number of q's 48 columns to the rope part"),
        ({"w_uk": W_UK[..., :0]}, ValueError, "of at least one latent column"),
        ({"w_uk": torch.cat([W_UK, W_UK], 1)}, ValueError, "leaves a positive even number of q's 48 columns"),
        ({"w_uk": W_UK.mT.contiguous().mT}, ValueError, "w_uk: expected a contiguous last dimension"),
        ({"w_uk": W_UK.to("meta")}, ValueError, "w_uk: expected a tensor on cpu"),
        ({"cos": COS.half()}, TypeError, "cos: expected dtype float32, got float16"),
        ({"cos": COS[:, :4]}, ValueError, r"cos: expected shape \[3, 8\], got \[3, 4\]"),
        ({"sin": SIN[:2]}, ValueError, r"sin: expected shape \[3, 8\], got \[2, 8\]"),
        ({"sin": SIN.to("meta")}, ValueError, "sin: expected a tensor on cpu"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        ds.mla_decode_queries(**{"q": Q, "w_uk": W_UK, "cos": COS, "sin": SIN, **changes})


def test_what_the_kernel_does_not_take(device):
    wide = new_queries(2, 1, (257, 2, 4), torch.float32, device)
    with pytest.raises(ValueError, match="it takes up to 256 columns without rope, and there are 257"):
        ds.mla_decode_queries(*wide, impl="triton")
    assert_exact(ds.mla_decode_queries(*wide), wide)
    inputs = [x.to(device) for x in (Q.double(), W_UK.double(), COS, SIN)]
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        ds.mla_decode_queries(*inputs, impl="triton")
    torch.testing.assert_close(ds.mla_decode_queries(*inputs).cpu(), queries64(*inputs)[0], rtol=1e-12, atol=1e-12)


def test_registration():
    check_registration(torch.ops.dskernels.mla_decode_queries.default, (Q, W_UK, COS, SIN))


def test_compiles_whole():
    def step(q, w_uk):
        return ds.mla_decode_queries(q * 2, w_uk, COS, SIN).sum(-1)

    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(Q, W_UK)
    assert torch.equal(got, step(Q, W_UK))


def test_choice_covers_every_config():
    assert {choose_queries(t, size) for t in range(1, 300) for size in (2, 4)} == set(QUERIES_CONFIGS)


def compile_queries(config, dtype, dims):
    from dskernels.mla.absorb.triton import options

    nope, rope, latent = dims
    strides = [f"stride_{name}" for name in ("token", "head", "w_head", "w_row", "cos", "sin")]
    return Compile(
        "dskernels.mla.absorb.triton:queries_kernel",
        signature={
            **dict.fromkeys(("p_q", "p_w", "p_out"), f"*{dtype}"),
            **dict.fromkeys(("p_cos", "p_sin"), "*fp32"),
            **dict.fromkeys((*strides, "tokens", "heads"), "i32"),
        },
        constants=options(nope, rope, latent, config.block_t, config.block_l),
        divisible=(*strides, "heads"),
        num_warps=config.num_warps,
    )


def test_kernel_compiles_without_spills():
    shapes = [(c, "fp32" if c == choose_queries(1, 4) else "bf16", (128, 64, 512)) for c in QUERIES_CONFIGS]
    shapes += [(choose_queries(1, 4), "fp32", (256, 64, 512)), (choose_queries(64, 2), "bf16", (256, 64, 512))]
    assert_clean(compile_all(compile_queries(*shape) for shape in shapes))
