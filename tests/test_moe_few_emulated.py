"""The second kernel of the expert block for a few tokens in CUDA C++, on the CPU: as it is, but for what is PTX.

As in test_mla_decode_emulated.py, with the instructions that it has besides. One CTA for each tile: no clusters.
"""

import ctypes
import math

import pytest
import torch

import dskernels as ds
from dskernels import parity
from dskernels.cuda.compiler import source_of
from dskernels.gemm.config import SmallConfig
from dskernels.moe import config_few, hopper_few
from dskernels.validate import ceil_div
from emulating_cuda import compiled, has_compiler
from test_mla_decode_emulated import FLAGS, without_ptx

pytestmark = pytest.mark.skipif(not has_compiler(), reason="there is no C++ compiler")

# What a matrix of e4m3 is to `TensorMap` in warpgroups.h: `matrices` its columns, `stride_row` the bytes of a row.
INSTRUCTIONS = """
#include <algorithm>
static Index blockDim;
#define __cluster_dims__(...)
#define __restrict__
#define __trap()
using std::max; using std::min;
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline u32 __byte_perm(u32, u32, u32) { return 0; }
inline int __popc(u32 x) { return __builtin_popcount(x); }
inline int __ffs(u32 x) { return __builtin_ffs(x); }
inline u32 __reduce_max_sync(u32, u32 x) { for (u32 y : of_warp(x)) x = max(x, y); return x; }
inline u32 __ballot_sync(u32, bool x) {
    u32 votes = 0, i = 0;
    for (int y : of_warp((int)x)) votes |= (u32)y << i++;
    return votes;
}
inline float mul(float a, float b) { return a * b; }
inline float add(float a, float b) { return a + b; }
inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline u32 larger(u32 a, u32 b) { return 0; }
inline float larger(float a, float b) { return a != a || b != b ? NAN : max(fabsf(a), fabsf(b)); }
inline float approximate_inverse(float x) { return 1.f / x; }
inline float2 smem_load2(u32 at) { return shared<float2>(at); }
inline float4 smem_load4(u32 at) { return shared<float4>(at); }
inline void smem_store4(u32 at, float a, float b, float c, float d) { shared<float4>(at) = {a, b, c, d}; }
inline void smem_store2(u32 at, float a, float b) { shared<float2>(at) = {a, b}; }
struct Divisor;
inline u32 raised(u32 pair, const Divisor&) { return pair; }
inline void smem_or(u32 at, u32 x) { shared<u32>(at) |= x; }
inline int load_fresh(const int* p) { return *p; }
inline uint4 load_fresh(const u16* p, bool valid) { return valid ? global_load16(p) : uint4{}; }
inline void store(u8*, uint2, bool) {}
inline void store(void*, uint4, bool) {}
inline uint4 load(const void*, bool) { return {}; }
inline u16 rounded(float x) { return narrow(x); }
inline u32 byte_of(float x) {
    const u32 sign = bits<u32>(x) >> 31 << 7;
    const double a = fabs((double)x);
    if (x != x) return 0x7f;
    if (a >= 448) return sign | 0x7e;
    const int e = max(a == 0 ? -6 : ilogb(a), -6), steps = (int)nearbyint(ldexp(a, 3 - e));
    return sign | (e == -6 ? steps : ((e + 7) << 3) + steps - 8);
}
inline u32 e4m3(float a, float b, float c, float d) {
    return byte_of(a) | byte_of(b) << 8 | byte_of(c) << 16 | byte_of(d) << 24;
}
inline void tma_load_evict_first(u32 dst, const TensorMap* map, u32 barrier, int x, int y) {
    for (int r = 0; r < map->box_rows; ++r)
        for (int i = 0; i < 128; ++i) {
            const bool inside = y + r < map->rows && x + i < map->matrices;
            shared<u8>(swizzled(dst + r * 128 + i)) = inside ? map->data[(y + r) * map->stride_row + x + i] : 0;
        }
    barrier_at(barrier).bytes -= map->box_rows * 128;
    barrier_at(barrier).settle();
}
inline void tma_load(u32, const TensorMap*, u32, int, int) { fault("rows of A are not loaded here"); }
inline void multiply(float (&d)[4], u64 a, u64 b, int keep) {
    for (int n = 0; n < 4; ++n) {
        const u32 row = first_of(a) + row_of(n / 2) * 128, column = first_of(b) + (lane() % 4 * 2 + n % 2) * 128;
        auto at = [&](u32 addr) { return e4m3(shared<u8>(swizzled(addr))); };
        float sum = keep ? d[n] : 0.f;
        for (int k = 0; k < 32; ++k) sum += at(row + k) * at(column + k);
        d[n] = sum;
    }
}
"""
PARAMETERS = (
    "TensorMap* map, float* sb, u16* gate_up, int* weights, int* ids, u16* out, int tokens, int top_k, int routed, "
    "int shared, int most, int N, int K, int stride_weights, long long stride_sb_expert, int stride_sb, int stages"
)


@pytest.fixture(scope="module")
def down():
    options = hopper_few.options_of(SmallConfig(config_few.TILE, config_few.OPERAND, 1, 1), 0)
    defines = "".join(f"#define {name} {value}\n" for name, value in options.items())
    header = (hopper_few.DOWN.parents[2] / "tests" / "warpgroups.h").read_text()
    names = ", ".join(parameter.split()[-1] for parameter in PARAMETERS.split(", ")).replace("map", "*map")
    entry = (
        f'extern "C" void run(int blocks, {PARAMETERS}) '
        f"{{ blockDim.x = 160; launch(blocks, 160, [=] {{ few_experts_down({names}); }}); }}"
    )
    text = "\n".join((defines, header, INSTRUCTIONS, without_ptx(source_of(hopper_few.DOWN)), entry))
    library = compiled(text, *FLAGS)

    def run(gate_up, w2, weights, experts, shared, stages=3):
        (tokens, top_k), (total, n, k) = experts.shape, w2.shape
        out = torch.full((tokens, n), math.nan, dtype=torch.bfloat16)
        most = config_few.most_chosen(experts.numel(), total - shared, shared)
        tensor_map = (ctypes.c_longlong * 16)(w2.data.data_ptr(), k, total * n, 0, k, config_few.TILE)
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (w2.scale, gate_up, weights, experts, out)]
        integers = (tokens, top_k, total - shared, shared, most, n, k, weights.stride(0))
        scales = ctypes.c_longlong(w2.scale.stride(0)), w2.scale.stride(1), stages
        library.run(ceil_div(n, config_few.TILE), tensor_map, *pointers, *integers, *scales)
        return out

    return run


def listed(experts, routed, shared):
    """The experts that run, in the kernel's order."""
    return [*range(routed, routed + shared), *sorted({e for e in experts.flatten().tolist() if 0 <= e < routed})]


@pytest.mark.parametrize(
    ("experts", "routed", "shared", "n", "k"),
    [
        ([[5, 0, 3]], 6, 1, 64, 256),
        ([[0, 1], [5, 2], [1, 5], [2, -1], [9, 6], [4, 4], [3, 0], [1, 2]], 6, 2, 136, 400),  # more blocks than a chunk
        ([[2, 2, 2], [-1, 7, 0]], 3, 0, 72, 144),
        ([[-1], [5]], 3, 0, 64, 128),  # nobody
    ],
)
def test_it_is_the_rest_of_the_block(down, experts, routed, shared, n, k):
    experts = torch.tensor(experts, dtype=torch.int32)
    tokens = experts.shape[0]
    places = listed(experts, routed, shared)
    weights = torch.rand(tokens, experts.shape[1] + 3)[:, : experts.shape[1]] + 0.1
    w2 = ds.quantize(torch.randn(routed + shared, n, k) * k**-0.5, (128, 128))
    gate_up = torch.randn(max(len(places), 1) * tokens, 2 * k).bfloat16()
    taken = torch.zeros(len(gate_up), dtype=torch.bool)
    want = torch.zeros(tokens, n, dtype=torch.float64)
    matrices = w2.dequantize(torch.float64)
    for place, e in enumerate(places):
        for token in range(tokens):
            times = weights[token][experts[token] == e].double() if e < routed else torch.ones(1, dtype=torch.float64)
            if len(times):
                row = place * tokens + token
                taken[row] = True
                gate, up = gate_up[row].float().chunk(2)
                hidden = ds.quantize((torch.nn.functional.silu(gate) * up)[None]).dequantize(torch.float64)[0]
                want[token] += times.sum() * (matrices[e] @ hidden)
    gate_up[~taken] = math.nan  # nobody reads what did not choose the expert
    out = down(gate_up, w2, weights, experts, shared)
    if not places:
        assert (out == 0).all()
        return
    assert parity.difference(out.double(), want) < 1e-5
    for stages in (1, 9):
        assert torch.equal(down(gate_up, w2, weights, experts, shared, stages), out)


def test_nan_stays_where_it_is(down):
    """In the weights of an expert it reaches those that chose it; in a row of gate and up, that token."""
    experts = torch.tensor([[0, 1], [2, 0], [3, 1]], dtype=torch.int32)
    weights = torch.rand(3, 2)
    w2 = ds.quantize(torch.randn(4, 64, 128), (128, 128))
    gate_up = torch.randn(4 * 3, 256).bfloat16()
    clean = down(gate_up, w2, weights, experts, 0)
    w2.data.view(torch.uint8)[2] = 0x7F
    gate_up[3 * 3 + 2] = math.nan
    out = down(gate_up, w2, weights, experts, 0)
    assert torch.equal(out[0], clean[0])
    assert out[1:].isnan().all()
