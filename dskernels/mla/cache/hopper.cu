// RMSNorm of the latent, RoPE of the shared key, and the store of both to a slot of the paged cache, on sm_90a.
//
// Half a warp has a token and reads it once, into registers: 4 lanes have a tile of 128 columns, 32 each, and lanes take turns at the pairs of
// the key. No load waits for another, nor for the slot, which only decides where the row is stored, and whether. Two tokens to a warp,
// because what is done once for a token or a tile (the root, the scale, addresses) is half of all instructions with one.
//
// Options (-D): FP8, rows of e4m3; LATENT (a multiple of 8, up to 512) and ROPE, columns; WARPS; BLOCKS to an SM; UE8M0 (0, quantize.cuh
// wants it).

#include "quantize.cuh"
#include "rms_norm.cuh"

constexpr int LANES = 16, CHUNKS = 4;  // of a token; chunks of 8 columns of a lane
constexpr int TILES = (LATENT + 127) / 128, PAIRS = ROPE / 2, PAIRS_PER = (PAIRS + LANES - 1) / LANES;
constexpr int ROPE_AT = FP8 ? LATENT + TILES * 4 : LATENT * 2;  // bytes of a row of the cache

__device__ __forceinline__ u32 load_word(const void* p, bool valid) {
    u32 x = 0;
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p ld.global.nc.L1::no_allocate.u32 %0, [%1];}" : "+r"(x) : "l"(p), "r"((int)valid));
    return x;
}
// Of what all tokens are multiplied by, and the L1 keeps.
__device__ __forceinline__ uint4 load_weights(const void* p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid));
    return v;
}
__device__ __forceinline__ void store_word(void* p, u32 x, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %2, 0; @p st.global.u32 [%0], %1;}" ::"l"(p), "r"(x), "r"((int)valid) : "memory");
}

// `kv`, `k_rope` and `weight` are bf16; strides are in elements, those of a page and a token of the cache in bytes.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
write_latent_cache(const u16* __restrict__ kv, const u16* __restrict__ k_rope, const u16* __restrict__ weight, const float* __restrict__ cos,
                   const float* __restrict__ sin, u8* __restrict__ cache, const long long* __restrict__ slots, long long stride_kv,
                   long long stride_k_rope, long long stride_cos, long long stride_sin, long long stride_page, long long stride_token, int tokens,
                   u32 n_slots, u32 page_size, float eps) {
    const int lane = threadIdx.x % LANES, tile = lane / 4;
    const int first_chunk = tile * 16 + lane % 4;  // and every fourth from there on, so that 4 lanes load and store whole sectors
    const long long t = (long long)blockIdx.x * (2 * WARPS) + threadIdx.x / LANES;
    const bool here = t < tokens;
    const auto within = [=](int i) { return LATENT % 128 ? (first_chunk + 4 * i) * 8 < LATENT : tile < TILES; };

    uint4 x[CHUNKS], weights[CHUNKS];
    const u16* const from = kv + t * stride_kv + first_chunk * 8;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) x[i] = load(from + i * 32, here && within(i));
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) weights[i] = load_weights(weight + first_chunk * 8 + i * 32, within(i));
    u32 pairs[PAIRS_PER];
    float cosine[PAIRS_PER], sine[PAIRS_PER];
    const u16* const from_pairs = k_rope + t * stride_k_rope + lane * 2;
    const float* const from_cos = cos + t * stride_cos + lane;
    const float* const from_sin = sin + t * stride_sin + lane;
#pragma unroll
    for (int i = 0; i < PAIRS_PER; ++i) {
        const bool paired = here && lane + LANES * i < PAIRS;
        pairs[i] = load_word(from_pairs + LANES * i * 2, paired);
        cosine[i] = __uint_as_float(load_word(from_cos + LANES * i, paired));
        sine[i] = __uint_as_float(load_word(from_sin + LANES * i, paired));
    }
    const long long slot = here ? __ldg(slots + t) : -1;

    double sums[CHUNKS] = {};
    u32 largest = 0;  // magnitudes, two at a time
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) largest = larger(largest, word(x[i], w) & 0x7fff7fffu);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const double y = widened(element(x[i], j));
            sums[i] = __fma_rn(y, y, sums[i]);
        }
    }
    double sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if ((largest & 0xffffu) > 0x7f80u || largest >> 16 > 0x7f80u) sum = __hiloint2double(0x7ff80000, 0);  // NaN
#pragma unroll
    for (int m = LANES / 2; m; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
    const float factor = factor_of(sum * (1. / LATENT), eps);

    // Slots outside of the cache are skipped. It has fewer than 2^31, so that 32 bits are enough to divide.
    const bool stored = (u64)slot < n_slots;
    const u32 page = (u32)slot / page_size;
    u8* const row = cache + page * stride_page + ((u32)slot - page * page_size) * stride_token;

    float y[CHUNKS][8], amax = 0.f;
#pragma unroll
    for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            y[i][j] = mul(mul(element(x[i], j), factor), element(weights[i], j));
            if (FP8) amax = larger(amax, y[i][j]);
        }
        if (!FP8) {
            const uint4 bytes = make_uint4(narrowed(y[i][0], y[i][1]), narrowed(y[i][2], y[i][3]), narrowed(y[i][4], y[i][5]), narrowed(y[i][6], y[i][7]));
            store(row + first_chunk * 16 + i * 64, bytes, stored && within(i));
        }
    }
    if (FP8) {
        u32 bits = __float_as_uint(amax);
#pragma unroll
        for (int m = 2; m; m /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, m));
        const float scale = scale_of(bits);
        Divisor d;
        prepare(d, scale);
#pragma unroll
        for (int i = 0; i < CHUNKS; ++i) {
#pragma unroll
            for (int j = 0; j < 8; ++j) y[i][j] = divided(y[i][j], d);
            const uint2 bytes = make_uint2(e4m3(y[i][0], y[i][1], y[i][2], y[i][3]), e4m3(y[i][4], y[i][5], y[i][6], y[i][7]));
            store(row + first_chunk * 8 + i * 32, bytes, stored && within(i));
        }
        store_word(row + LATENT + tile * 4, __float_as_uint(scale), stored && tile < TILES && lane % 4 == 0);
    }
#pragma unroll
    for (int i = 0; i < PAIRS_PER; ++i) {
        const int pair = lane + LANES * i;
        const float even = low(pairs[i]), odd = high(pairs[i]);
        // Each operation rounded, as the reference's.
        const float first = add(mul(even, cosine[i]), -mul(odd, sine[i])), second = add(mul(even, sine[i]), mul(odd, cosine[i]));
        store_word(row + ROPE_AT + pair * 4, narrowed(first, second), stored && pair < PAIRS);
    }
}
