"""Decode over rows of e4m3 in CUDA C++, on the CPU: the kernel as it is, but for what is spelt in PTX.

The machinery is that of test_mla_decode_emulated.py; what this kernel has beside, products that take an operand from
registers, fragments that become columns, copies of rows as they are, stands here in C++.
"""

import contextlib
import ctypes
import functools
import math
import re

import pytest
import torch

import test_mla_decode_emulated as emulated
from dskernels.cuda.compiler import source_of
from dskernels.mla.decode import hopper, hopper_rows
from dskernels.mla.decode.config import BLOCK, THREADS, choose_rows_config, rows_shared
from dskernels.parity.paging import paged_cache
from dskernels.validate import ceil_div
from emulating_cuda import compiled, has_compiler
from test_mla_decode import close, oracle

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

INSTRUCTIONS = r"""
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float half_of(u32 x) { return (float)bits<_Float16>((u16)x); }
inline u32 halves(float low, float high) { return bits<u16>((_Float16)low) | (u32)bits<u16>((_Float16)high) << 16; }
inline u32 pack_half(float low, float high) { return halves(low, high); }
inline void to_half(u32& first, u32& last, u32 four) {
    first = halves(e4m3(four), e4m3(four >> 8));
    last = halves(e4m3(four >> 16), e4m3(four >> 24));
}
inline u32 __byte_perm(u32 x, u32 y, u32 which) {
    const u64 both = x | (u64)y << 32;
    u32 z = 0;
    for (int i = 0; i < 4; ++i) z |= (u32)(both >> 8 * (which >> 4 * i & 7) & 255) << 8 * i;
    return z;
}
inline uint4 smem_words4(u32 addr) { return shared<uint4>(addr); }
inline u32 smem_word(u32 addr) { return shared<u32>(addr); }
inline float2 smem_load2(u32 addr) { return shared<float2>(addr); }
inline float4 smem_load4(u32 addr) { return shared<float4>(addr); }
inline void smem_store4(u32 addr, float x, float y, float z, float w) { shared<float4>(addr) = {x, y, z, w}; }
inline void smem_store_transposed(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    const auto rows = of_warp(addr);
    const u32 words[4] = {a, b, c, d};
    for (int i = 0; i < 8; ++i) {
        const u32 row = rows[i / 2 * 8 + lane() % 4 * 2 + i % 2];
        shared<u16>(row + lane() / 4 * 2) = words[i / 2] >> i % 2 * 16;
    }
}
inline bool any_of_all(bool x) {
    static int yes, asked;
    static bool answer;
    yes += x;
    if (++asked == 256) answer = yes > 0, yes = asked = 0;
    named_sync<256>(1);
    return answer;
}
inline void bulk_load(u32 dst, const void* src, u32 barrier, u32 bytes) {
    for (u32 i = 0; i < bytes; i += 16) shared<uint4>(dst + i) = ((const uint4*)src)[i / 16];
    barrier_at(barrier).bytes -= bytes;
    barrier_at(barrier).settle();
}
template <int KIND> void multiply_rows(float (&d)[WIDTH / 2], const u32* a, u64 b, int keep) {
    auto number = [](u32 x) { return widen((u16)x, KIND); };
    float rows[2][16];
    for (int i = 0; i < 4; ++i) {
        const auto words = of_warp(a[i]);
        for (int x = 0; x < 8; ++x) rows[i % 2][i / 2 * 8 + x] = number(words[lane() / 4 * 4 + x / 2] >> x % 2 * 16);
    }
    for (int r = 0; r < WIDTH / 2; ++r) {
        const u32 column = first_of(b) + (r / 4 * 8 + lane() % 4 * 2 + r % 2) * 128;
        float sum = keep ? d[r] : 0.f;
        for (int x = 0; x < 16; ++x) sum += rows[r / 2 % 2][x] * number(shared<u16>(swizzled(column + x * 2)));
        d[r] = sum;
    }
}
"""
POINTERS = "Element* q, u8* cache, int* table, int* lengths, int* q_lengths, Element* out, float* lse, float* work"
INTEGERS = (
    "long long stride_request, long long stride_query, long long stride_page, long long stride_row, int stride_table, "
    "int pages, int page, int requests, int capacity, int q_tokens, int heads, int row_blocks, int box, float scale"
)


@functools.cache
def library(options):
    declared = f"{POINTERS}, {INTEGERS}"
    names = ", ".join(parameter.split()[-1] for parameter in declared.split(", "))
    text = re.sub(r"(?s)#define PRODUCT\(.*?DEFINE_PRODUCT\(32[^\n]*", "", source_of(hopper_rows.SOURCE))
    header = (hopper.SOURCE.parents[3] / "tests" / "warpgroups.h").read_text()
    defines = "".join(f"#define {name} {value}\n" for name, value in options)
    entry = (
        f'extern "C" void run(int blocks, {declared}) {{ launch(blocks, {THREADS}, [=] {{ mla_decode({names}); }}); }}'
    )
    parts = (defines, header, emulated.INSTRUCTIONS, INSTRUCTIONS, emulated.without_ptx(text), entry)
    return compiled("\n".join(parts), *emulated.FLAGS)


def decode(q, cache, table, lengths, new, scale, parts, wide=1):
    batch, q_tokens, heads, _ = q.shape
    row_blocks, kind = ceil_div(q_tokens * heads, BLOCK), hopper_rows.KINDS[q.dtype]
    out, lse = q.new_full((batch, q_tokens, heads, 512), math.nan), torch.full((batch, heads, q_tokens), math.nan)
    work = torch.full((2 * parts * row_blocks * BLOCK * 257 + 4 * batch + parts * row_blocks + 3,), math.nan)
    attend = library(tuple(hopper_rows.options_of(choose_rows_config(q_tokens * heads), kind).items()))
    strides = [ctypes.c_longlong(x) for x in (q.stride(0), q.stride(2), cache.stride(0), cache.stride(1))]
    box = math.gcd(cache.shape[1], 16)
    shape = (table.stride(0), len(cache), cache.shape[1], batch, table.shape[1] * cache.shape[1], q_tokens, heads)
    arguments = (q, cache, table, lengths, new, out, lse, work, *strides, *shape, row_blocks, box)
    emulated.call(attend, parts * row_blocks, *arguments, scale * hopper_rows.LOG2_E)
    options = (("OUT", kind), ("WIDE", wide))
    join = emulated.library(hopper.COMBINE, options, "combine", 32 * hopper.COMBINE_WARPS)
    blocks = min(batch, parts) * row_blocks * 4 * (2 * wide)
    emulated.call(join, blocks, work, out, lse, batch, q_tokens, heads, row_blocks, parts)
    return out, lse


@pytest.mark.parametrize(
    ("lengths", "q_tokens", "heads", "page_size", "parts", "options"),
    [
        ([1000], 1, 9, 64, 3, {"wide": 8}),  # one request for all parts: a pair of blocks and half of one
        ([330, 0, 90], 2, 16, 16, 4, {"new": [1, 2, 2]}),
        ([200, 2], 2, 12, 5, 2, {"dtype": torch.float16}),  # row by row
        ([200, 2, 65], 3, 10, 64, 3, {"new": [3, 3, 1]}),  # more new tokens than positions
    ],
)
def test_against_fp64(lengths, q_tokens, heads, page_size, parts, options):
    dtype, new = options.get("dtype", torch.bfloat16), options.get("new")
    q = (torch.randn(len(lengths), q_tokens, heads, 576) * 8).to(dtype)
    cache = paged_cache(0, lengths, page_size, 512, 64, torch.uint8, "cpu", scale=0.1)
    new = None if new is None else torch.tensor(new, dtype=torch.int32)
    got = decode(q, *cache, new, 576**-0.5, parts, options.get("wide", 1))
    close(got, oracle(q, *cache, impl="reference", scale=576**-0.5, value_dim=512, q_lengths=new), dtype)


@pytest.mark.parametrize("heads", [16, 32])
def test_scales_of_any_size(heads):
    """Scales that differ by powers of ten, within a row, from row to row, and 0; scores that grow along the request."""
    cache, table, lengths = paged_cache(0, [300], 64, 512, 64, torch.uint8, "cpu", scale=0.1)
    scales = cache.view(-1, 656)[:, 512:528].view(torch.float32)
    generator = torch.Generator().manual_seed(1)
    scales *= 10.0 ** torch.randint(-6, 1, scales.shape, generator=generator)
    scales *= torch.rand(scales.shape, generator=generator) > 0.1
    scales *= 1 - 2 * (torch.rand(scales.shape, generator=generator) > 0.5).float()
    q = (torch.randn(1, 1, heads, 576) * 8).bfloat16()
    got = decode(q, cache, table, lengths, None, 1.0, 2)
    close(got, oracle(q, cache, table, lengths, impl="reference", scale=1.0, value_dim=512), q.dtype)


def test_shared_memory_is_as_large_as_the_launcher_says():
    for rows in (16, 32):
        config = choose_rows_config(rows)
        values = {"WIDTH": config.width, "UNITS": config.units}
        header = source_of(hopper_rows.SOURCE).partition("constexpr int VALUE")[2].partition("unit_full")[0]
        for name, expression in re.findall(r"\b([A-Z_]+) = ([^,;{]*)[,;]", "constexpr int VALUE" + header):
            with contextlib.suppress(NameError, SyntaxError):  # of the kernel for 16 bits
                values[name] = eval(expression.replace("/", "//"), {}, values)
        assert values["AT_BARRIERS"] + (2 * config.units + 2) * 8 == rows_shared(config.width, config.units) <= 232448
