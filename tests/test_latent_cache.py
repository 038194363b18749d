"""Writing the latent cache: against fp64, bytes of e4m3 rows, skipped slots, bad input, registration, compilation."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dskernels as ds
from compiling import Compile, assert_clean, compile_all
from dskernels import parity
from dskernels.mla.cache.layout import fp8_row_bytes
from dskernels.parity import mla_decode as cases
from dskernels.reference import mla as reference
from dskernels.reference.fp8 import rmsnorm
from registering import check_registration

WRITE_CASES = [case for case in cases.CASES if case.op == "write_latent_cache"]
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])


@pytest.mark.parametrize("case", WRITE_CASES, ids=lambda case: case.label)
def test_parity(case, device):
    outcome = parity.check(case, torch.device(device), "triton")
    assert outcome.passed, outcome


def new_tokens(tokens, latent, rope, dtype, device="cpu"):
    """Latents over four decades, rope parts, a weight, and the angles of scattered positions."""
    kv = torch.randn(tokens, latent) * torch.logspace(-2, 2, tokens)[:, None]
    angle = torch.randint(0, 4096, (tokens, 1)) * 10000.0 ** (-torch.arange(0, rope, 2) / rope)
    weight = torch.rand(latent) + 0.5
    floats = [kv.to(dtype), torch.randn(tokens, rope).to(dtype), weight.to(dtype)]
    return [x.to(device) for x in (*floats, angle.cos(), angle.sin())]


def row64(kv, k_rope, weight, cos, sin, eps):
    kv, k_rope, weight, cos, sin = (x.double().cpu() for x in (kv, k_rope, weight, cos, sin))
    return rmsnorm(kv, weight, eps), reference.apply_rope(k_rope, cos, sin)


@IMPLS
@given(
    tokens=st.integers(1, 6),
    dims=st.sampled_from([(512, 64), (320, 48), (128, 2), (48, 16), (5, 6)]),
    page_size=st.sampled_from([1, 3, 64]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    cache_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_rows_against_fp64_and_nothing_else_is_touched(device, impl, tokens, dims, page_size, dtype, cache_dtype, data):
    latent, rope = dims
    pages = math.ceil(tokens / page_size) + 1
    places = st.lists(st.integers(-3, pages * page_size + 2), min_size=tokens, max_size=tokens, unique=True)
    slots = torch.tensor(data.draw(places))
    inputs = new_tokens(tokens, latent, rope, dtype, device)
    cache = torch.full((pages, page_size, latent + rope), math.nan, dtype=cache_dtype, device=device)
    assert ds.write_latent_cache(*inputs, cache, slots.to(device), eps=1e-5, impl=impl) is cache
    flat = cache.flatten(0, 1).cpu()
    stored = (slots >= 0) & (slots < len(flat))
    want = torch.cat(row64(*inputs, 1e-5), dim=-1)[stored]
    # Half an ulp of the cache's dtype; in fp32 a few, of the terms rather than of their sum.
    rtol = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[cache_dtype] * 1.001
    torch.testing.assert_close(flat[slots[stored]].double(), want, rtol=rtol, atol=2e-6)
    untouched = torch.ones(len(flat), dtype=torch.bool)
    untouched[slots[stored]] = False
    assert flat[untouched].isnan().all()


def e4m3_parts(cache, latent):
    row, scales = cache.flatten(0, 1).cpu(), 4 * math.ceil(latent / 128)
    data, scale, rope = (part.contiguous() for part in row.split([latent, scales, row.shape[1] - latent - scales], -1))
    return data.view(torch.float8_e4m3fn), scale.view(torch.float32), rope.view(torch.bfloat16)


@IMPLS
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (320, 32), (48, 16), (4, 2)])
def test_e4m3_rows_are_within_a_step_of_the_exact_ones(device, impl, latent, rope):
    inputs = new_tokens(5, latent, rope, torch.bfloat16, device)
    inputs[0][3] = 0  # a row of zeros: scale 1
    cache = torch.full((3, 2, fp8_row_bytes(latent, rope)), 255, dtype=torch.uint8, device=device)
    slots = torch.tensor([5, 0, -1, 2, 3], device=device)
    ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl=impl)
    data, scale, rotated = e4m3_parts(cache, latent)
    kept, rows = [0, 1, 3, 4], [5, 0, 2, 3]
    exact, exact_rope = (x[kept] for x in row64(*inputs, 1e-6))
    tiles = torch.nn.functional.pad(exact, (0, -latent % 128)).unflatten(1, (-1, 128))
    exact_scale = (tiles.abs().amax(-1) / 448).where(tiles.abs().amax(-1) > 0, 1.0)
    # fp32 sums in another order, then 2 ulp of the scale; half a step of e4m3, or half of 2^-9 where it is fixed-point.
    torch.testing.assert_close(scale[rows].double(), exact_scale, rtol=1e-6, atol=0)
    spread = exact_scale.repeat_interleave(128, 1)[:, :latent]
    step = torch.maximum(exact.abs() * 2.0**-4, spread * 2.0**-10)
    assert ((data[rows].double() * spread - exact).abs() <= step * 1.0001).all()
    torch.testing.assert_close(rotated[rows].double(), exact_rope, rtol=2**-8 * 1.001, atol=1e-6)
    assert (cache.flatten(0, 1)[[1, 4]] == 255).all()


def test_e4m3_bytes_of_both_implementations_differ_by_a_step_at_most(device):
    inputs = new_tokens(16, 512, 64, torch.bfloat16, device)
    caches = [torch.zeros(16, 1, 656, dtype=torch.uint8, device=device) for _ in range(2)]
    for cache, impl in zip(caches, ("reference", "triton"), strict=True):
        ds.write_latent_cache(*inputs, cache, torch.arange(16, device=device), eps=1e-6, impl=impl)
    (data_a, scale_a, rope_a), (data_b, scale_b, rope_b) = (e4m3_parts(cache, 512) for cache in caches)
    ulps = (scale_a.view(torch.int32) - scale_b.view(torch.int32)).abs()
    # The norm's factor differs by an ulp or two, and one ulp below a power of two is two above it.
    assert ulps.max() <= 4
    steps = data_a.view(torch.uint8).int() - data_b.view(torch.uint8).int()
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < 0.01
    torch.testing.assert_close(rope_a, rope_b, rtol=2**-7, atol=1e-6)


@IMPLS
def test_written_tokens_are_what_decode_attends_to(device, impl):
    """Written by one call, read by another: the value of one token attended to alone is its own latent."""
    for dtype, width in ((torch.float32, 48), (torch.uint8, 68)):
        inputs = new_tokens(6, 32, 16, torch.float32, device)
        cache = torch.full((5, 4, width), 255 if dtype == torch.uint8 else math.nan, dtype=dtype, device=device)
        table = torch.arange(5, dtype=torch.int32, device=device)[:, None].flip(0)
        slots = table[:, 0].long().repeat(2)[:6] * 4 + torch.tensor([0, 0, 0, 0, 0, 1], device=device)
        ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl=impl)
        lengths = torch.ones(5, dtype=torch.int32, device=device)
        q = torch.zeros(5, 1, 1, 48, device=device)
        out, lse = ds.mla_decode(q, cache, table, lengths, scale=1.0, value_dim=32)
        latent = row64(*inputs, 1e-6)[0][:5]
        step = 2.0**-4 if dtype == torch.uint8 else 1e-6
        assert ((out[:, 0, 0].double().cpu() - latent).abs() <= step * latent.abs().amax(-1, keepdim=True)).all()
        assert (lse == 0).all()


@IMPLS
def test_rows_may_be_strided(device, impl):
    """Both halves of one projection, angles of a longer table, and one layer of a cache that holds several."""
    kv, k_rope, weight, cos, sin = new_tokens(4, 32, 16, torch.bfloat16, device)
    projected = torch.cat([kv, k_rope], dim=-1)
    table = torch.cat([cos, sin, cos], dim=-1)
    slots = torch.tensor([3, 0, 5, 4], device=device)
    for dtype, width in ((torch.bfloat16, 48), (torch.uint8, 68)):
        layers = torch.zeros(2, 3, 3, width + 12, dtype=dtype, device=device)
        layer, plain = layers[:, 1, :, 8 : width + 8], torch.zeros(2, 3, width, dtype=dtype, device=device)
        strided = (projected[:, :32], projected[:, 32:], weight, table[:, :8], table[:, 8:16])
        ds.write_latent_cache(*strided, layer, slots, eps=1e-6, impl=impl)
        ds.write_latent_cache(kv, k_rope, weight, cos, sin, plain, slots, eps=1e-6, impl=impl)
        assert torch.equal(layer, plain)
        layer.zero_()
        assert (layers == 0).all()


@IMPLS
def test_nan_stays_in_its_row(device, impl):
    for dtype, width in ((torch.float32, 48), (torch.uint8, 68)):
        inputs = new_tokens(3, 32, 16, torch.float32, device)
        inputs[0][1, 5] = math.nan
        cache = torch.zeros(3, 1, width, dtype=dtype, device=device)
        ds.write_latent_cache(*inputs, cache, torch.arange(3, device=device), eps=1e-6, impl=impl)
        rows = cache[:, 0] if dtype == torch.float32 else reference.unpack_fp8(cache[:, 0], 32)
        assert rows[1, :32].isnan().all()
        assert rows[[0, 2]].isfinite().all()


@IMPLS
def test_no_tokens_is_no_work(device, impl):
    cache = torch.full((2, 3, 48), 7.0, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    ds.write_latent_cache(*new_tokens(0, 32, 16, torch.float32, device), cache, slots, eps=1e-6, impl=impl)
    assert (cache == 7).all()
    no_pages = torch.empty(0, 3, 48, device=device)
    slots = torch.tensor([0, 5], device=device)
    ds.write_latent_cache(*new_tokens(2, 32, 16, torch.float32, device), no_pages, slots, eps=1e-6, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 4097])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.uint8])
def test_model_shapes(device, tokens, cache_dtype):
    inputs = new_tokens(tokens, 512, 64, torch.bfloat16, device)
    width = 656 if cache_dtype == torch.uint8 else 576
    caches = [torch.zeros(tokens // 64 + 2, 64, width, dtype=cache_dtype, device=device) for _ in range(2)]
    slots = torch.randperm(caches[0].shape[0] * 64)[:tokens].to(device)
    for cache, impl in zip(caches, ("reference", "triton"), strict=True):
        ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl=impl)
    rows = [reference.unpack_fp8(c, 512) if cache_dtype == torch.uint8 else c.float() for c in caches]
    scale = rows[0][..., :512].abs().amax(-1, keepdim=True)
    step = 2.0**-3 if cache_dtype == torch.uint8 else 2.0**-7
    assert ((rows[1] - rows[0]).abs() <= step * rows[0].abs() + 2.0**-9 * scale).all()
    assert parity.difference(rows[1], rows[0]) < 1e-6


KV, K_ROPE, WEIGHT, COS, SIN = new_tokens(3, 32, 16, torch.float32)
CACHE, SLOTS = torch.zeros(2, 4, 48), torch.arange(3)


def call(**changes):
    arguments = {
        "kv": KV,
        "k_rope": K_ROPE,
        "norm_weight": WEIGHT,
        "cos": COS,
        "sin": SIN,
        "cache": CACHE,
        "slots": SLOTS,
    }
    return ds.write_latent_cache(**{**arguments, "eps": 1e-6, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"kv": None}, TypeError, "kv: expected a torch.Tensor, got NoneType"),
        ({"kv": KV.int()}, TypeError, "kv: expected dtype bfloat16 or float16 or float32 or float64, got int32"),
        ({"kv": KV[0]}, ValueError, r"kv: expected shape \[T, latent\], got \[32\]"),
        ({"kv": KV.T.contiguous().T}, ValueError, "kv: expected a contiguous last dimension"),
        ({"k_rope": K_ROPE.half()}, TypeError, "k_rope: expected dtype float32, got float16"),
        ({"k_rope": K_ROPE[:2]}, ValueError, r"k_rope: expected shape \[3, rope\], got \[2, 16\]"),
        ({"k_rope": K_ROPE[:, :15]}, ValueError, "k_rope: expected a positive even number of columns, got 15"),
        ({"k_rope": K_ROPE[:, :0]}, ValueError, "k_rope: expected a positive even number of columns, got 0"),
        ({"k_rope": K_ROPE.to("meta")}, ValueError, "k_rope: expected a tensor on cpu"),
        ({"norm_weight": WEIGHT[:9]}, ValueError, r"norm_weight: expected shape \[32\], got \[9\]"),
        ({"norm_weight": WEIGHT.int()}, TypeError, "norm_weight: expected dtype"),
        ({"norm_weight": WEIGHT.to("meta")}, ValueError, "norm_weight: expected a tensor on cpu"),
        ({"cos": COS.half()}, TypeError, "cos: expected dtype float32, got float16"),
        ({"cos": COS[:, :4]}, ValueError, r"cos: expected shape \[3, 8\], got \[3, 4\]"),
        ({"cos": COS.to("meta")}, ValueError, "cos: expected a tensor on cpu"),
        ({"sin": SIN.double()}, TypeError, "sin: expected dtype float32, got float64"),
        ({"sin": SIN[:2]}, ValueError, r"sin: expected shape \[3, 8\], got \[2, 8\]"),
        ({"sin": SIN.to("meta")}, ValueError, "sin: expected a tensor on cpu"),
        ({"cache": CACHE.long()}, TypeError, "cache: expected dtype .* or uint8, got int64"),
        ({"cache": CACHE[0]}, ValueError, r"cache: expected shape \[pages, page_size, row\], got \[4, 48\]"),
        ({"cache": CACHE[..., :47]}, ValueError, r"latent 32 \+ rope 16 = 48 columns\], got \[2, 4, 47\]"),
        ({"cache": CACHE.byte()}, ValueError, r"68 bytes of an e4m3 row\], got \[2, 4, 48\]"),
        ({"cache": CACHE[:, :0]}, ValueError, "cache: expected a page size of at least 1"),
        ({"cache": CACHE.to("meta")}, ValueError, "cache: expected a tensor on cpu"),
        (
            {"cache": torch.zeros(2, 4, 72, dtype=torch.uint8)[..., 1:69]},
            ValueError,
            "cache: expected rows that start at multiples of 4 bytes, got strides .* from byte 1",
        ),
        ({"slots": SLOTS.int()}, TypeError, "slots: expected dtype int64, got int32"),
        ({"slots": SLOTS[:2]}, ValueError, r"slots: expected shape \[3\], got \[2\]"),
        ({"slots": SLOTS.to("meta")}, ValueError, "slots: expected a tensor on cpu"),
        ({"eps": None}, TypeError, "eps: expected a float, got NoneType"),
        ({"impl": "cuda"}, ValueError, "impl: expected one of"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        call(**changes)
    assert (CACHE == 0).all()


def test_float64_is_the_reference_s(device):
    inputs = [x.double() for x in (KV, K_ROPE, WEIGHT)]
    want = torch.cat(row64(*inputs, COS, SIN, 1e-6), -1)
    *inputs, cos, sin, slots = (x.to(device) for x in (*inputs, COS, SIN, SLOTS))
    cache = torch.zeros(2, 4, 48, dtype=torch.float64, device=device)
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        ds.write_latent_cache(*inputs, cos, sin, cache, slots, eps=1e-6, impl="triton")
    ds.write_latent_cache(*inputs, cos, sin, cache, slots, eps=1e-6)
    torch.testing.assert_close(cache[0, :3].cpu(), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [48, 68])
def test_registration(width):
    cache = torch.zeros(2, 4, width, dtype=torch.uint8 if width == 68 else torch.float32)
    op = torch.ops.dskernels.write_latent_cache.default
    check_registration(op, (KV, K_ROPE, WEIGHT, COS, SIN, cache, SLOTS, 1e-6))


def test_compiles_whole():
    def step(kv, cache):
        ds.write_latent_cache(kv * 2, K_ROPE, WEIGHT, COS, SIN, cache, SLOTS, eps=1e-6)
        return cache.sum()

    caches = [torch.zeros(2, 4, 48) for _ in range(2)]
    got = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)(KV, caches[0])
    assert torch.equal(got, step(KV, caches[1]))
    assert torch.equal(caches[0], caches[1])


def compile_write(dtype, cache_dtype, latent, rope):
    fp8 = cache_dtype == "uint8"
    tile = min(128, 1 << (latent - 1).bit_length())
    strides = [f"stride_{name}" for name in ("kv", "k_rope", "cos", "sin", "page", "token")]
    return Compile(
        "dskernels.mla.cache.triton:write_kernel",
        signature={
            **dict.fromkeys(("p_kv", "p_k_rope", "p_weight"), f"*{dtype}"),
            **{"p_cos": "*fp32", "p_sin": "*fp32", "p_slots": "*i64"},
            **{"p_latent": "*fp8e4nv" if fp8 else f"*{cache_dtype}", "p_rope": "*bf16" if fp8 else f"*{cache_dtype}"},
            **({"p_scale": "*fp32"} if fp8 else {}),
            **dict.fromkeys((*strides, "pages", "page_size"), "i32"),
            "eps": "fp32",
        },
        constants={
            **({} if fp8 else {"p_scale": None}),
            **{"LATENT": latent, "ROPE": rope, "FP8": fp8, "TILE": tile},
            "TILES": 1 << (-(-latent // tile) - 1).bit_length(),
            "PAIRS": 1 << (rope // 2 - 1).bit_length(),
        },
        divisible=strides,
        num_warps=1,
    )


def test_kernel_compiles_without_spills():
    shapes = [
        ("bf16", "bf16", 512, 64),
        ("bf16", "uint8", 512, 64),
        ("fp32", "fp32", 512, 64),
        ("bf16", "uint8", 32, 16),
    ]
    assert_clean(compile_all(compile_write(*shape) for shape in shapes))
