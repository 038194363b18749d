// RMSNorm of the latent, RoPE of the shared key, and the store of both to a slot of the paged cache, on sm_90a.
//
// Half a warp has a token and reads it once, into registers, 32 columns a lane: 16 adjacent lanes read and write 256 bytes at once or, in e4m3, 8
// lanes 128 bytes, and so two tiles of 128 columns. Lanes take turns at the pairs of the key. No load waits for another, nor for the slot, which only
// decides where the row is stored, and whether. A warp has two tokens, because with one, half of all instructions are done once per token or tile
// (the root, the scale, addresses).
//
// Options (-D): FP8, rows of e4m3; LATENT (a multiple of 8, up to 512) and ROPE, columns; WARPS; BLOCKS to an SM; UE8M0 (0, quantize.cuh
// wants it).

#include "quantize.cuh"
#include "rms_norm.cuh"

constexpr int LANES = 16, CHUNKS = 4;  // lanes of a token; chunks of 8 columns of a lane
// Lanes that have adjacent chunks. 65,536 tokens: 48.4 us with 16, 48.5 with 8, 50.0 with 4; e4m3 40.7 with 8, 41.4 with 4.
constexpr int BESIDE = FP8 ? 8 : 16, CHUNKS_OF_TILE = 2;  // chunks of a tile in a lane, with 8 lanes
constexpr int TILES = (LATENT + 127) / 128, PAIRS = ROPE / 2, PAIRS_PER = (PAIRS + LANES - 1) / LANES;
constexpr int ROPE_AT = FP8 ? LATENT + TILES * 4 : LATENT * 2;  // bytes of a row of the cache

// Tensors with a row per token: their address, and the bytes from one row to the next. The first two are bf16, the others fp32.
struct Inputs {
    const u8 *kv, *k_rope, *cos, *sin;
    const long long* slots;
    u32 stride_kv, stride_k_rope, stride_cos, stride_sin, tokens;
};
// A lane's part of a token.
struct Token {
    uint4 x[CHUNKS];
    u32 pairs[PAIRS_PER];
    float cos[PAIRS_PER], sin[PAIRS_PER];
    long long slot;
};
struct Place {
    u32 lane, chunk;  // the first chunk; the others follow at a distance of BESIDE

    __device__ __forceinline__ Place() : lane(threadIdx.x % LANES), chunk(lane / BESIDE * (BESIDE * CHUNKS) + lane % BESIDE) {}
    __device__ __forceinline__ bool within(int i) const { return LATENT == 512 || (chunk + BESIDE * i) * 8 < LATENT; }
    __device__ __forceinline__ bool paired(int i) const { return PAIRS == LANES * PAIRS_PER || lane + LANES * i < PAIRS; }
};

// Loads that stay where they are written: the compiler would move others behind the first use of an earlier one, causing a second round trip to
// memory. KEEP: in the L1, for other tokens.
template <bool KEEP> __device__ __forceinline__ uint4 load_early(const u8* p) {
    uint4 v;
    if (KEEP) asm volatile("ld.relaxed.cta.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    else asm volatile("ld.relaxed.cta.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ u32 load_word_early(const u8* p) {
    u32 x;
    asm volatile("ld.relaxed.cta.global.L1::no_allocate.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ long long load_slot_early(const long long* p) {
    long long x;
    asm volatile("ld.relaxed.cta.global.L1::no_allocate.s64 %0, [%1];" : "=l"(x) : "l"(p) : "memory");
    return x;
}
__device__ __forceinline__ void store_word(u8* p, u32 x, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1;}" ::"l"(p), "r"(x), "r"((int)valid) : "memory");
}

// Token t; beyond the last token, the last one again, which is then not stored.
__device__ __forceinline__ Token load_token(const Inputs& in, const Place& at, u32 t) {
    Token token;
    const u64 row = t < in.tokens ? t : in.tokens - 1;
    token.slot = load_slot_early(in.slots + row);
#pragma unroll
    for (int i = 0; i < PAIRS_PER; ++i) {
        if (!at.paired(i)) continue;
        token.pairs[i] = load_word_early(in.k_rope + row * in.stride_k_rope + at.lane * 4 + i * LANES * 4);
        token.cos[i] = __uint_as_float(load_word_early(in.cos + row * in.stride_cos + at.lane * 4 + i * LANES * 4));
        token.sin[i] = __uint_as_float(load_word_early(in.sin + row * in.stride_sin + at.lane * 4 + i * LANES * 4));
    }
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        token.x[i] = make_uint4(0, 0, 0, 0);
        if (at.within(i)) token.x[i] = load_early<false>(in.kv + row * in.stride_kv + at.chunk * 16 + i * (BESIDE * 16));
    }
    return token;
}

// One Newton step from q, which is about x / divisor. In PTX, because subnormals matter; its signs preserve a negative zero.
__device__ __forceinline__ float stepped(float q, float x, float divisor, float inverse) {
    float y;
    asm("{.reg .f32 n, r; neg.f32 n, %2; fma.rn.f32 r, %1, %3, n; neg.f32 r, r; fma.rn.f32 %0, r, %4, %1;}" : "=f"(y) : "f"(q), "f"(x), "f"(divisor), "f"(inverse));
    return y;
}

// RMSNorm's factor for a token.
__device__ __forceinline__ float factor_of(const Token& token, float eps) {
    double sums[CHUNKS] = {};
    u32 largest = 0;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i)
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            add_squares(sums[i], word(token.x[i], w));
            largest = larger_or_nan(largest, word(token.x[i], w));
        }
    double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (has_nan(largest)) sum = __hiloint2double(0x7ff80000, 0);
#pragma unroll
    for (int m = LANES / 2; m; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
    return factor_of(sum * (1. / LATENT), eps);
}

__device__ __forceinline__ void store_token(const Token& token, const Place& at, const uint4 (&weights)[CHUNKS], float factor, u8* row, bool stored) {
    float y[CHUNKS][8], amax[CHUNKS / CHUNKS_OF_TILE] = {};
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            y[i][j] = mul(mul(element(token.x[i], j), factor), element(weights[i], j));
            if (FP8) amax[i / CHUNKS_OF_TILE] = larger(amax[i / CHUNKS_OF_TILE], y[i][j]);
        }
        if (!FP8) {
            const uint4 bytes = make_uint4(narrowed(y[i][0], y[i][1]), narrowed(y[i][2], y[i][3]), narrowed(y[i][4], y[i][5]), narrowed(y[i][6], y[i][7]));
            store(row + at.chunk * 16 + i * (BESIDE * 16), bytes, stored && at.within(i));
        }
    }
#pragma unroll
    for (int t = 0; t < (FP8 ? CHUNKS / CHUNKS_OF_TILE : 0); ++t) {
        u32 bits = __float_as_uint(amax[t]);
#pragma unroll
        for (int m = BESIDE / 2; m; m /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, m));
        const float scale = scale_of(bits);
        Divisor d;
        prepare(d, scale);
        // As `divided`, but inexact below 2^-100: it is not scaled by a power of two first, which would be a fifth of the instructions per element.
        const float inverse = mul(d.inverse, d.up), divisor = bits < INFINITE ? scale : 1.f;
#pragma unroll
        for (int i = t * CHUNKS_OF_TILE; i < (t + 1) * CHUNKS_OF_TILE; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const float q = mul(y[i][j], inverse);
                y[i][j] = stepped(q, y[i][j], divisor, inverse);
            }
            const uint2 bytes = make_uint2(e4m3(y[i][0], y[i][1], y[i][2], y[i][3]), e4m3(y[i][4], y[i][5], y[i][6], y[i][7]));
            store(row + at.chunk * 8 + i * (BESIDE * 8), bytes, stored && at.within(i));
        }
        const u32 tile = at.lane / BESIDE * (CHUNKS / CHUNKS_OF_TILE) + t;
        store_word(row + LATENT + tile * 4, __float_as_uint(scale), stored && tile < TILES && at.lane % BESIDE == 0);
    }
#pragma unroll
    for (int i = 0; i < PAIRS_PER; ++i) {
        if (!at.paired(i)) continue;
        const float even = low(token.pairs[i]), odd = high(token.pairs[i]), cos = token.cos[i], sin = token.sin[i];
        // Each operation is rounded like the reference's.
        store_word(row + ROPE_AT + at.lane * 4 + i * LANES * 4, narrowed(add(mul(even, cos), -mul(odd, sin)), add(mul(even, sin), mul(odd, cos))), stored);
    }
}

// `weight` is bf16; strides are in bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
write_latent_cache(const u8* __restrict__ kv, const u8* __restrict__ k_rope, const u8* __restrict__ weight, const u8* __restrict__ cos,
                   const u8* __restrict__ sin, u8* __restrict__ cache, const long long* __restrict__ slots, u32 stride_kv, u32 stride_k_rope,
                   u32 stride_cos, u32 stride_sin, u32 stride_page, u32 stride_token, u32 tokens, u32 n_slots, u32 page_size, float eps) {
    const Inputs in{kv, k_rope, cos, sin, slots, stride_kv, stride_k_rope, stride_cos, stride_sin, tokens};
    const Place at;
    const u32 t = blockIdx.x * (2 * WARPS) + threadIdx.x / LANES;
    begin_dependent();
    uint4 weights[CHUNKS];
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
        weights[i] = make_uint4(0, 0, 0, 0);
        if (at.within(i)) weights[i] = load_early<true>(weight + at.chunk * 16 + i * (BESIDE * 16));
    }
    const Token token = load_token(in, at, t);

    // Slots outside of the cache are skipped.
    const bool stored = t < tokens && (u64)token.slot < n_slots;
    const float factor = factor_of(token, eps);
    const u32 slot = (u32)token.slot, page = slot / page_size;  // there are fewer than 2^31, so 32 bits are enough for the division
    store_token(token, at, weights, factor, cache + (u64)page * stride_page + (u64)(slot - page * page_size) * stride_token, stored);
}
