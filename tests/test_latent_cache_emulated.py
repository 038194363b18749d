"""The writing of the latent cache in CUDA C++, run on the CPU lane by lane: the reference's bytes."""

import ctypes
import functools
import math
import random

import pytest
import torch

from dskernels.cuda.compiler import HEADERS
from dskernels.mla.cache import hopper
from dskernels.mla.cache.config import choose_hopper
from dskernels.reference import mla as reference
from emulating_cuda import build, has_compiler, pointer
from test_latent_cache_hopper import new_cache, new_tokens, same_rows

pytestmark = pytest.mark.skipif(not has_compiler(), reason="needs g++")


def section(header, begin, end):
    text = (HEADERS / header).read_text()
    return text[text.index(begin) : text.index(end)]


# What the headers say in PTX. An approximate inverse may be an ulp off, either way.
BEFORE = """
struct alignas(16) uint4 { u32 x, y, z, w; }; struct uint2 { u32 x, y; };
static uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
static uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
static float __uint_as_float(u32 x) { return from_bits<float>(x); }
static u32 __float_as_uint(float x) { return bits_of(x); }
static double __hiloint2double(u32 high, u32 low) {
    const u64 b = (u64)high << 32 | low;
    double x;
    memcpy(&x, &b, 8);
    return x;
}
static double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
static float mul(float x, float y) { return x * y; }
static void begin_dependent() {}
static float add(float x, float y) { return x + y; }
static float fma(float x, float y, float z) { return fmaf(x, y, z); }
static void store(void* p, uint4 v, bool valid) { if (valid) memcpy(p, &v, 16); }
static void store(u8* p, uint2 v, bool valid) { if (valid) memcpy(p, &v, 8); }
static u32 bf16_of(float x) {
    const u32 b = bits_of(x);
    return x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
static u32 e4m3_of(float x) {
    const u32 sign = bits_of(x) >> 31 << 7;
    const double a = fabs((double)x);
    if (x != x) return 0x7f;
    if (a >= 448) return sign | 0x7e;
    const int e = max(a == 0 ? -6 : ilogb(a), -6);
    const int steps = (int)nearbyint(ldexp(a, 3 - e));  // of 2^(e - 3); 8 to 16, or less where they are fixed
    return sign | (e == -6 ? steps : ((e + 7) << 3) + steps - 8);
}
static u32 larger_bf16(u32 a, u32 b) {
    a &= 0x7fff, b &= 0x7fff;
    return a > 0x7f80 || b > 0x7f80 ? 0x7fff : max(a, b);
}
static float nudged(float x) {
    return x > 0x1p-120f && x < 0x1p120f ? from_bits<float>(bits_of(x) + random_number() % 3 - 1) : x;
}
"""
IN_CPLUSPLUS = {
    r'#include "quantize.cuh"': BEFORE
    + section("quantize.cuh", "constexpr u32 INFINITE", "// ---- memory")
    + section("quantize.cuh", "__device__ __forceinline__ float low(", "// The largest of each of eight words"),
    r'#include "rms_norm.cuh"': (HEADERS / "rms_norm.cuh").read_text().replace('#include "ptx.cuh"', ""),
    r'asm\("rcp\.approx.*?\)\);': "x = nudged(1.f / x);",
    r'    asm\("mul\.rn\.bf16x2.*?\)\)\);': "",
    r"    u16 low, high;.*?0x5410\);": "return e4m3_of(a) | e4m3_of(b) << 8 | e4m3_of(c) << 16 | e4m3_of(d) << 24;",
    r'asm\("\{\.reg \.f32 a, b; abs.*?\)\);': "c = a != a || b != b ? NAN : max(fabsf(a), fabsf(b));",
    r'asm\("max\.u16x2.*?\)\);': "both = 0;",
    r'asm\("cvt\.rn\.f32\.f64.*?\)\);': "x = (float)mean;",
    r'asm\("sqrt\.rn.*?\)\);': "x = sqrtf(x);",
    r'asm\("rcp\.rn.*?\)\);': "x = 1.f / x;",
    r'asm\("cvt\.rn\.bf16x2.*?\)\);': "pair = bf16_of(x) | bf16_of(y) << 16;",
    r'asm\("and\.b32 %0, %1, 0x7fff;".*?\)\);': "x = pair & 0x7fffu;",
    r'asm\("and\.b32 %0, %1, 0x7fff0000;".*?\)\);': "y = pair & 0x7fff0000u;",
    r'asm\("max\.NaN\.xorsign.*?\)\);': "c = larger_bf16(a, b) | larger_bf16(a >> 16, b >> 16) << 16;",
    r'    if \(KEEP\) asm volatile\("ld.*?return v;': "    memcpy(&v, p, 16); return v;",
    r'    asm volatile\("ld[^"]*?\.u32 .*?return x;': "    memcpy(&x, p, 4); return x;",
    r'    asm volatile\("ld[^"]*?\.s64 .*?return x;': "    return *p;",
    r'    asm volatile\("\{\.reg \.pred p; setp.*?"memory"\);': "    if (valid) memcpy(p, &x, 4);",
    r'    asm\("\{\.reg \.f32 n, r; neg.*?\)\);': "    y = fmaf(-fmaf(q, divisor, -x), inverse, q);",
    r"sum \+= __shfl_xor_sync\(~0u, sum, m\);": (
        "{ u64 b; memcpy(&b, &sum, 8); const u32 h = __shfl_xor_sync(~0u, (u32)(b >> 32), m);"
        " const u32 l = __shfl_xor_sync(~0u, (u32)b, m); sum += __hiloint2double(h, l); }"
    ),
}
ARGUMENTS = (
    "const u8* kv, const u8* k_rope, const u8* weight, const u8* cos, const u8* sin, u8* cache, const long long* slots,"
    " u32 stride_kv, u32 stride_k_rope, u32 stride_cos, u32 stride_sin, u32 stride_page, u32 stride_token, u32 tokens,"
    " u32 n_slots, u32 page_size, float eps"
)


@functools.cache
def emulated(fp8, latent, rope):
    options = hopper.options_of(choose_hopper(fp8), fp8, latent, rope)
    return build(hopper.SOURCE, IN_CPLUSPLUS, options, "write_latent_cache", ARGUMENTS).launch


def emulate(kv, k_rope, weight, cos, sin, cache, slots, eps):
    fp8 = cache.dtype == torch.uint8
    tokens, latent = kv.shape
    config = choose_hopper(fp8)
    faults = emulated(fp8, latent, k_rope.shape[1])(
        *(-(-tokens // (2 * config.warps)), 32 * config.warps, random.getrandbits(31)),
        *map(pointer, (kv, k_rope, weight, cos, sin, cache, slots)),
        *(x.stride(0) * x.element_size() for x in (kv, k_rope, cos, sin)),
        *(stride * cache.element_size() for stride in cache.stride()[:2]),
        *(tokens, cache.shape[0] * cache.shape[1], cache.shape[1]),
        ctypes.c_float(eps),
    )
    assert faults == 0


@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "e4m3"])
@pytest.mark.parametrize(
    ("tokens", "latent", "rope", "page"), [(37, 512, 64, 5), (9, 320, 96, 3), (5, 136, 8, 16), (1, 512, 64, 1)]
)
def test_it_has_the_references_bytes(fp8, tokens, latent, rope, page):
    """In any order of lanes; skipped slots, rows beside the written ones, and what is not finite included."""
    kv, k_rope, weight, cos, sin = new_tokens(tokens, latent, rope)
    if tokens > 8:
        kv, k_rope = kv.clone(), k_rope.clone()
        kv[4] = 0
        kv[5, 3], kv[6, 40], kv[7], k_rope[8, 1] = math.nan, -math.inf, 1e-30, math.nan
    pages = tokens // page + 2
    slots = torch.randperm(pages * page)[:tokens]
    if tokens > 4:
        slots[1], slots[2], slots[3] = -1, pages * page, 2**40 + 5
    caches = [new_cache(pages, page, latent, rope, fp8) for _ in range(2)]
    emulate(kv, k_rope, weight, cos, sin, caches[0], slots, 1e-6)
    reference.write_latent_cache(kv, k_rope, weight, cos, sin, caches[1], slots, eps=1e-6)
    # NaN has many bits: rows without it are compared by their bytes, all rows as numbers.
    got, want = (reference.unpack_fp8(cache, latent) if fp8 else cache.float() for cache in caches)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    finite = want.isfinite().all(-1)
    assert finite.sum() >= tokens - 8
    same_rows(*(cache[finite] for cache in caches))
