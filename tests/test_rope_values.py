"""Rotation by position, and values out of attended latents: parity, strides, bad input, registration, compiling."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import reference
from dskernels.mla.absorb.triton_values import choose_tokens
from dskernels.mla.absorb.triton_values import options as value_options
from dskernels.mla.rope.triton import options as rope_options
from registering import check_registration

NAN = float("nan")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def angles(tokens, rope, device):
    turned = torch.rand(tokens, rope // 2, device=device) * 100
    return turned.cos(), turned.sin()


# 64 of DeepSeek-V3; 6 pairs are no power of two; more heads than a program takes.
@given(
    tokens=st.integers(0, 4),
    heads=st.sampled_from([0, 1, 3, 33]),
    rope=st.sampled_from([2, 12, 64]),
    dtype=st.sampled_from(DTYPES),
    in_place=st.booleans(),
)
def test_rope(device, tokens, heads, rope, dtype, in_place):
    whole = torch.randn(tokens, heads, 10 + rope, device=device).to(dtype)
    before = whole.clone()
    x, (cos, sin) = whole[..., 10:], angles(tokens, rope, device)
    wide = x.double()
    want = reference.apply_rope(wide, cos[:, None].double(), sin[:, None].double())
    if in_place:
        assert ds.apply_rope(x, cos, sin, out=x, impl="triton") is x
        assert torch.equal(whole[..., :10], before[..., :10])
        got = x
    else:
        out = torch.full_like(before, NAN)[..., :rope]
        got = ds.apply_rope(x, cos, sin, out=out, impl="triton")
        assert got is out
        assert torch.equal(whole, before)
        assert torch.equal(got, ds.apply_rope(x, cos, sin, impl="triton"))
    # Products and their sum in fp32, then a rounding to half an ulp.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=eps, atol=eps * 4)


def test_rope_of_the_reference_is_in_place_too():
    x, (cos, sin) = torch.randn(3, 2, 8), angles(3, 8, "cpu")
    want = ds.apply_rope(x, cos, sin, impl="reference")
    assert ds.apply_rope(x, cos, sin, out=x, impl="reference") is x
    assert torch.equal(x, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "heads", "latent", "value"), [(1, 2, 32, 128), (5, 3, 100, 256), (70, 1, 512, 128)])
def test_values(device, tokens, heads, latent, value, dtype):
    """A latent that is no power of two, two tiles a head, more tokens than a program takes; strided as in the model."""
    latents = torch.randn(heads, tokens, latent, device=device).to(dtype).transpose(0, 1)
    kv_b = torch.randn(heads, 40 + value, latent, device=device).to(dtype)
    got = ds.mla_values_quantize(latents, kv_b[:, 40:], impl="triton")
    want = reference.mla_values_quantize(latents, kv_b[:, 40:])
    assert got.scale.stride() == want.scale.stride()
    assert got.block == want.block
    # Sums in another order: a scale is some ulp of fp32 off, an element a step of e4m3 at most.
    torch.testing.assert_close(got.scale, want.scale, rtol=1e-5, atol=0)
    step = want.scale.repeat_interleave(128, 1)
    distance = (got.dequantize() - want.dequantize()).abs()
    assert (distance <= torch.maximum(want.dequantize().abs() / 8, step / 512) * 1.01).all()
    assert (distance > 1e-3 * want.dequantize().abs()).float().mean() < 0.01


def test_nothing_to_multiply():
    for tokens, heads in ((0, 3), (2, 0)):
        got = ds.mla_values_quantize(torch.randn(tokens, heads, 32), torch.randn(heads, 128, 32), impl="triton")
        assert got.shape == (tokens, heads * 128)


X, COS = torch.randn(3, 2, 8), torch.randn(3, 4)
LATENTS, W_UV = torch.randn(3, 2, 16), torch.randn(2, 128, 16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: ds.apply_rope(X[..., :7], COS, COS),
            ValueError,
            "x: expected a positive even number of columns, got 7",
        ),
        (lambda: ds.apply_rope(X, COS[:2], COS), ValueError, r"cos: expected shape \[3, 4\]"),
        (lambda: ds.apply_rope(X, COS, COS.half()), TypeError, "sin: expected dtype float32"),
        (lambda: ds.apply_rope(X, COS, COS, out=X[:2]), ValueError, "out: expected shape"),
        (lambda: ds.apply_rope(X, COS, COS, out=X.half()), TypeError, "out: expected dtype float32"),
        (lambda: ds.mla_values_quantize(LATENTS, W_UV[:1]), ValueError, "w_uv: expected shape"),
        (lambda: ds.mla_values_quantize(LATENTS, W_UV[:, :96]), ValueError, "V a multiple of 128"),
        (lambda: ds.mla_values_quantize(LATENTS, W_UV.half()), TypeError, "w_uv: expected dtype float32"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_registration():
    ops = torch.ops.dskernels
    check_registration(ops.apply_rope.default, (X, COS, COS, torch.empty_like(X)))
    check_registration(ops.apply_rope_.default, (X.clone(), COS, COS))
    check_registration(ops.mla_values_quantize.default, (LATENTS, W_UV))


def test_compiles_whole():
    def both(x, cos, sin, latents, w_uv):
        y = ds.apply_rope(x, cos, sin)
        x = x.clone()
        ds.apply_rope(x, cos, sin, out=x)
        return y, x, ds.mla_values_quantize(latents, w_uv).data.float()

    torch._dynamo.reset()
    arguments = (X, COS, COS, LATENTS, W_UV)
    for got, want in zip(
        torch.compile(both, backend="aot_eager", fullgraph=True)(*arguments), both(*arguments), strict=True
    ):
        assert torch.equal(got, want)


def test_compile_without_spills():
    kernels = []
    strides = ("stride_token", "stride_head", "stride_out_token", "stride_out_head", "stride_cos", "stride_sin")
    for dtype in ("*bf16", "*fp32"):
        signature = {"p_x": dtype, "p_cos": "*fp32", "p_sin": "*fp32", "p_out": dtype, "heads": "i32"}
        signature |= dict.fromkeys(strides, "i32")
        kernels.append(
            Compile("dskernels.mla.rope.triton:rope_kernel", signature, rope_options(64), divisible=list(strides))
        )
        itemsize = 2 if dtype == "*bf16" else 4
        strides_v = ("stride_token", "stride_head", "stride_w_head", "stride_w_row", "stride_qr")
        signature = {"p_x": dtype, "p_w": dtype, "p_q": "*fp8e4nv", "p_s": "*fp32"}
        signature |= dict.fromkeys((*strides_v, "stride_sc", "tokens"), "i32")
        sizes = sorted({choose_tokens(tokens, itemsize) for tokens in (1, 32, 64)})
        gpus = {"deep": ["sm_90", "sm_100"], "nvidia": ["sm_89", "sm_90", "sm_100"], "amd": ["gfx942"]}
        for block_t, (kind, targets) in itertools.product(sizes, gpus.items()):
            deep = kind == "deep"
            chosen = value_options(itemsize, deep, nvidia=kind != "amd")
            constants = {"TILES": 1, "LATENT": 512, "BLOCK_T": block_t, "BLOCK_L": chosen["BLOCK_L"]}
            constants["PROGRAMMATIC"] = deep  # as launches overlap from sm_90 on
            kernels.append(
                Compile(
                    "dskernels.mla.absorb.triton_values:values_kernel",
                    signature,
                    constants,
                    divisible=list(strides_v),
                    targets=targets,
                    num_warps=chosen["num_warps"],
                    num_stages=chosen["num_stages"],
                )
            )
    reports = compile_all(kernels)
    assert_clean(reports)
    for report in (report for report in reports if report.target != "gfx942"):
        assert report.count("LDG.E.128") or report.count("LDGSTS"), report
        if report.count("HGMMA"):  # a maximum of 32 sums a thread: ptxas once took them for zeros
            assert report.count("VIMNMX", "IMNMX", "FMNMX") > 16, report
