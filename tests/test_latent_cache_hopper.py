"""The latent cache written in CUDA C++: compiled here, what it does not take, and on a GPU the reference's bytes."""

import math

import pytest
import torch

import dskernels as ds
from compiling import assert_clean
from compiling_cuda import compile_cuda
from dskernels.mla.cache import hopper
from dskernels.mla.cache.config import choose_hopper
from dskernels.mla.cache.layout import fp8_row_bytes
from dskernels.reference import mla as reference
from dskernels.validate import ceil_div

CACHES = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])


@CACHES
@pytest.mark.parametrize(("latent", "rope"), [(512, 64), (320, 128), (136, 2)])
def test_compiles_without_spills(fp8, latent, rope):
    config = choose_hopper(fp8)
    report = compile_cuda(hopper.SOURCE, hopper.options_of(config, fp8, latent, rope), 0)
    assert_clean([report], max_registers=65536 // (32 * config.warps * config.blocks))
    # 8 columns a lane and step; 16 lanes are beside one another, or, with e4m3, twice 8.
    steps = min(4, ceil_div(latent, 64 if fp8 else 128))
    assert report.count("LDG.E.NA.128") == steps
    assert report.count("STG.E.64" if fp8 else "STG.E.128") == steps
    assert 8 * steps <= report.count("DFMA") <= 32


def new_tokens(tokens, latent, rope, device="cpu"):
    """The two halves of one projection, in rows of multiples of 16 bytes, with latents over four decades; a weight; the
    angles of scattered positions."""
    size = torch.logspace(-2, 2, tokens)[:, None]
    parts = torch.randn(tokens, latent) * size, torch.randn(tokens, rope), torch.zeros(tokens, -(latent + rope) % 8)
    projected = torch.cat(parts, -1).bfloat16().to(device)
    angle = torch.randint(0, 4096, (tokens, 1)) * 10000.0 ** (-torch.arange(0, rope, 2) / rope)
    weight = (torch.rand(latent) + 0.5).bfloat16()
    kv, k_rope, _ = projected.split([part.shape[1] for part in parts], -1)
    return [kv, k_rope, *(x.to(device) for x in (weight, angle.cos(), angle.sin()))]


def new_cache(pages, page, latent, rope, fp8, device="cpu"):
    """Bytes that are NaN in whatever they are read as."""
    width = fp8_row_bytes(latent, rope) if fp8 else 2 * (latent + rope)
    cache = torch.full((pages, page, width), 255, dtype=torch.uint8, device=device)
    return cache if fp8 else cache.view(torch.bfloat16)


def test_what_it_does_not_take():
    kv, k_rope, weight, cos, sin = new_tokens(3, 32, 16)
    cache, slots = new_cache(2, 4, 32, 16, False), torch.arange(3)

    def reason(**changes):
        given = {"kv": kv, "k_rope": k_rope, "norm_weight": weight, "cos": cos, "sin": sin, "cache": cache}
        return hopper.write_latent_cache_supports(**{**given, **changes}, slots=slots, eps=1e-6)

    assert "nothing to write" in reason(kv=kv[:0])
    assert "nothing to write" in reason(cache=cache[:0])
    assert "it takes bf16, kv is float16" in reason(kv=kv.half())
    assert "it takes bf16, norm_weight is float32" in reason(norm_weight=weight.float())
    assert "it takes bf16, cache is float32" in reason(cache=cache.float())
    assert "rows of kv must be aligned to 16 bytes" in reason(kv=torch.zeros(3, 36).bfloat16()[:, :32])
    assert "rows of kv must be aligned to 16 bytes" in reason(kv=torch.zeros(3, 48).bfloat16()[:, 1:33])
    assert "rows of cache must be aligned to 16 bytes" in reason(cache=new_cache(2, 4, 32, 16, True))
    assert "pairs of k_rope must be aligned to 4 bytes" in reason(k_rope=torch.zeros(3, 17).bfloat16()[:, :16])
    far = torch.empty_strided((3, 32), (2**31, 1), dtype=torch.bfloat16, device="meta")
    assert "strides of kv must be below 2^32 bytes" in reason(kv=far)
    assert "multiples of 8 columns up to 512, and there are 520" in reason(
        kv=torch.zeros(3, 520).bfloat16(), norm_weight=torch.zeros(520).bfloat16()
    )


def same_rows(got, want):
    assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))


@pytest.mark.gpu
@CACHES
@pytest.mark.parametrize(
    ("tokens", "latent", "rope", "page"),
    [
        (1, 512, 64, 64),
        (7, 512, 64, 1),  # a warp of one token, a block of an odd number of tokens
        (4097, 512, 64, 64),
        (9, 320, 96, 3),  # half a tile, more pairs than lanes
        (5, 136, 4, 16),  # a tile of one chunk
        (6, 64, 32, 5),
    ],
)
def test_it_has_the_references_bytes(device, fp8, tokens, latent, rope, page):
    if fp8 and fp8_row_bytes(latent, rope) % 16:
        rope += (-fp8_row_bytes(latent, rope) % 16) // 2
    elif not fp8:
        rope += -rope % 8
    inputs = new_tokens(tokens, latent, rope, device)
    pages = tokens // page + 2
    slots = torch.randperm(pages * page)[:tokens].to(device)
    if tokens > 4:
        slots[1], slots[2], slots[3] = -1, pages * page, 2**40 + 5  # skipped
    caches = [new_cache(pages, page, latent, rope, fp8, device) for _ in range(2)]
    for cache, impl in zip(caches, ("hopper", "reference"), strict=True):
        ds.write_latent_cache(*inputs, cache, slots, eps=1e-6, impl=impl)
    same_rows(*caches)


@pytest.mark.gpu
@CACHES
def test_what_is_not_finite(device, fp8):
    inputs = new_tokens(8, 512, 64, device)
    kv, k_rope = (x.clone() for x in inputs[:2])
    kv[1] = 0  # scale 1
    kv[2, 5], kv[3, 300], kv[5] = math.nan, math.inf, 1e-30
    k_rope[4, 3] = math.nan
    caches = [new_cache(8, 1, 512, 64, fp8, device) for _ in range(2)]
    for cache, impl in zip(caches, ("hopper", "reference"), strict=True):
        ds.write_latent_cache(kv, k_rope, *inputs[2:], cache, torch.arange(8, device=device), eps=1e-6, impl=impl)
    got, want = (reference.unpack_fp8(c, 512) if fp8 else c.float() for c in caches)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@CACHES
def test_one_layer_of_a_cache_beyond_4_gib(device, fp8):
    """Offsets beyond 2^32 bytes; the layers beside are not touched; a graph replays with other slots."""
    width = 656 if fp8 else 1152
    layers = torch.zeros(70000, 2, 64, width, dtype=torch.uint8, device=device)
    layer = layers[:, 1] if fp8 else layers.view(torch.bfloat16)[:, 1]
    inputs = new_tokens(40, 512, 64, device)
    rows = new_cache(40, 1, 512, 64, fp8, device)
    ds.write_latent_cache(*inputs, rows, torch.arange(40, device=device), eps=1e-6, impl="reference")
    slots = torch.arange(40, device=device)
    ds.write_latent_cache(*inputs, layer, slots, eps=1e-6)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ds.write_latent_cache(*inputs, layer, slots, eps=1e-6)
    layers.zero_()
    slots.copy_(70000 * 64 - 1 - torch.arange(40, device=device) * 1001)
    graph.replay()
    written = layer[slots // 64, slots % 64]
    same_rows(written, rows[:, 0])
    layer[slots // 64, slots % 64] = 0
    assert not layers.view(torch.int64).any()
