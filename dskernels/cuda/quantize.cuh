// Quantising to e4m3: the scale of a tile, division by it, and the block of 8 x 8 elements that a thread has of a tile of 128 x 128. Scales are found
// for rows and for columns of a tile; the transposed result passes through shared memory.
//
// Option (-D): UE8M0 1: scales are powers of two.
#pragma once

#include "ptx.cuh"

constexpr u32 INFINITE = 0x7f800000u;

// ---- scale and division ------------------------------------------------------------------------------------------

// The divisor of a tile's elements. `up` is the power of two that brings the tile's scale into [1, 2), `scale` is the scale times `up`, `inverse` is
// 1 / `scale`. (In some cases of `prepare`, infinity, NaN and UE8M0, they have other values.)
struct alignas(16) Divisor {
    float up, scale, inverse, unused;
};
// A divisor for elements that are an ulp or two off themselves, so that a product with the reciprocal is as good as a quotient: it takes a quarter of
// the instructions and registers.
struct Reciprocal {
    float inverse;
};

__device__ __forceinline__ float approximate_inverse(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}

// 1 / (1 + exp(-x)), with the same bits as torch's, but never below 2^-126. That makes scales equal to the reference's. With ex2.approx and
// rcp.approx alone, scales are up to 3 ulp off, and quantising silu(gate) * up of 32768 x 2048, without a transposed result, takes 90 us instead of
// 103 on an H200.
__device__ __forceinline__ float sigmoid(float x) {
    const float y = fminf(add(1.f, expf(-x)), 0x1p126f), guess = approximate_inverse(y);
    return fma(fma(-y, guess, 1.f), guess, guess);  // a Newton step leaves the nearest float
}

// The scale of a tile, given the bits of the largest magnitude: amax / 448, at least 2^-126, and 1 if amax is 0.
__device__ __forceinline__ float scale_of(u32 amax) {
    // One correction of the guess gives the correctly rounded quotient, because the quotient of a float and 7 is never nearer than 1/14 ulp to the
    // middle between two floats. Small values are multiplied by 2^64, to stay away from denormals.
    const bool small = amax < 0x10000000u;
    const float x = __uint_as_float(amax) * (small ? 0x1p64f : 1.f), r = 1.f / 448.f, guess = x * r;
    float scale = __fmaf_rn(__fmaf_rn(-guess, 448.f, x), r, guess) * (small ? 0x1p-64f : 1.f);
    if (amax >= INFINITE) scale = x;
    scale = scale < 1.1754943508222875e-38f ? 1.1754943508222875e-38f : scale;
    if (UE8M0) {
        // Round up to a power of two: any bit of the mantissa carries into the exponent. Infinity and NaN stay.
        const u32 bits = __float_as_uint(scale);
        scale = bits < INFINITE ? __uint_as_float((bits + 0x7fffffu) & INFINITE) : scale;
    }
    return amax == 0 ? 1.f : scale;
}

__device__ __forceinline__ void prepare(Divisor& d, float scale) {
    const u32 bits = __float_as_uint(scale);
    const bool finite = bits < INFINITE;
    // For other scales, finite / infinity has to be 0, infinity / infinity and anything / NaN has to be NaN.
    d.up = finite ? __uint_as_float(0x7f000000u - (bits & INFINITE)) : bits == INFINITE ? 0.f : scale;
    d.scale = finite ? __uint_as_float((bits & ~INFINITE) | 0x3f800000u) : 1.f;
    // The nearest float: the hardware's reciprocal is one ulp off at most, and a Newton step removes that, for each of the 2^23 mantissas.
    const float guess = approximate_inverse(d.scale);
    d.inverse = UE8M0 ? 1.f : __fmaf_rn(guess, __fmaf_rn(-d.scale, guess, 1.f), guess);
    d.unused = 0.f;
}
__device__ __forceinline__ void prepare(Reciprocal& d, float scale) { d.inverse = approximate_inverse(scale); }

// x / scale, given x * up. After rounding to e4m3, it is the same as IEEE division: the product with the reciprocal is 1.5 ulp off at most, and one
// Newton step leaves it on the right side of every point where e4m3 rounds (all mantissas of the scale were tried with all floats next to such a
// point). The signs in the step keep a negative zero.
__device__ __forceinline__ float quotient(float x, const Divisor& d) {
    if (UE8M0) return x;
    const float q = __fmul_rn(x, d.inverse);
    return __fmaf_rn(-__fmaf_rn(q, d.scale, -x), d.inverse, q);
}

// x * up for a pair of bf16. In PTX, because CuPy compiles with -ftz=true, with which `*` would take a denormal x for zero.
__device__ __forceinline__ u32 raised(u32 pair, const Divisor& d) {
    const u32 up = __float_as_uint(d.up);
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(__byte_perm(up, up, 0x3232)));
    return pair;
}
__device__ __forceinline__ float divided(float x, const Divisor& d) { return quotient(mul(x, d.up), d); }
__device__ __forceinline__ float divided(float x, const Reciprocal& d) { return mul(x, d.inverse); }

// Four numbers as e4m3 in a word, the first in the lowest byte.
__device__ __forceinline__ u32 e4m3(float a, float b, float c, float d) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return __byte_perm(low, high, 0x5410);
}

// ---- memory ------------------------------------------------------------------------------------------------------

// Load 16 bytes, or zeros if not `valid`. Predicated in PTX, like the stores below, because the compiler would branch around each of them.
__device__ __forceinline__ uint4 load(const void* p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid));
    return v;
}
__device__ __forceinline__ void store(u8* p, uint2 v, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p st.global.v2.u32 [%0], {%1, %2};}" ::"l"(p), "r"(v.x), "r"(v.y), "r"((int)valid)
                 : "memory");
}
__device__ __forceinline__ void store(void* p, uint4 v, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w), "r"((int)valid)
                 : "memory");
}

// ---- words and elements ------------------------------------------------------------------------------------------

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ u32 word(const uint4& v, int w) { return w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w; }
__device__ __forceinline__ float element(const uint4& v, int j) { return j % 2 ? high(word(v, j / 2)) : low(word(v, j / 2)); }

// The larger magnitude of two numbers, NaN if one of them is; denormals are not flushed.
__device__ __forceinline__ float larger(float a, float b) {
    float c;
    asm("{.reg .f32 a, b; abs.f32 a, %1; abs.f32 b, %2; max.NaN.f32 %0, a, b;}" : "=f"(c) : "f"(a), "f"(b));
    return c;
}
// The larger ones of two pairs of 16-bit magnitudes, one for each half of the word.
__device__ __forceinline__ u32 larger(u32 a, u32 b) {
    u32 both;
    asm("max.u16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}

// The largest of each of eight words over 16 lanes; a lane gets the result for word `lane % 16 / 2`.
__device__ __forceinline__ u32 largest_of_each(const u32 (&m)[8], int lane) {
    u32 pairs[4];
    const bool odd = lane & 2, a = lane & 8, b = lane & 4;
#pragma unroll
    for (int p = 0; p < 4; ++p) pairs[p] = max(odd ? m[2 * p + 1] : m[2 * p], __shfl_xor_sync(~0u, odd ? m[2 * p] : m[2 * p + 1], 2));
    const u32 y = max(a ? pairs[2] : pairs[0], __shfl_xor_sync(~0u, a ? pairs[0] : pairs[2], 8));
    const u32 z = max(a ? pairs[3] : pairs[1], __shfl_xor_sync(~0u, a ? pairs[1] : pairs[3], 8));
    const u32 one = max(b ? z : y, __shfl_xor_sync(~0u, b ? y : z, 4));
    return max(one, __shfl_xor_sync(~0u, one, 1));
}

// ---- the 8 x 8 elements of a thread ------------------------------------------------------------------------------

// A thread's elements in bf16, as loaded. Magnitudes are compared as integers, two at a time: their order is that of the floats, and NaN is larger
// than all.
struct Pairs {
    typedef u16 Magnitude;
    uint4 rows[8];

    // The quotients of columns 2 w and 2 w + 1 of row i, by one divisor, or by one for each column.
    __device__ __forceinline__ float2 quotients(int i, int w, const Divisor& d) const {
        const u32 x = raised(::word(rows[i], w), d);
        return make_float2(quotient(low(x), d), quotient(high(x), d));
    }
    __device__ __forceinline__ float2 quotients(int i, int w, const Divisor& a, const Divisor& b) const {
        const u32 x = raised(::word(rows[i], w), a), y = raised(::word(rows[i], w), b);
        return make_float2(quotient(low(x), a), quotient(high(y), b));
    }
    __device__ static __forceinline__ u32 bits(u32 magnitude) { return magnitude << 16; }
    __device__ __forceinline__ u32 word(int i, int w) const { return ::word(rows[i], w) & 0x7fff7fffu; }
    // The largest magnitude of row `lane % 16 / 2` over 16 lanes.
    __device__ __forceinline__ u32 of_row(int lane) const {
        u32 pairs[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            u32 m[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) m[k] = larger(larger(word(2 * p + k, 0), word(2 * p + k, 1)), larger(word(2 * p + k, 2), word(2 * p + k, 3)));
            pairs[p] = larger(__byte_perm(m[0], m[1], 0x5410), __byte_perm(m[0], m[1], 0x7632));
        }
        const bool a = lane & 8, b = lane & 4;
        const u32 x = larger(a ? pairs[2] : pairs[0], __shfl_xor_sync(~0u, a ? pairs[0] : pairs[2], 8));
        const u32 y = larger(a ? pairs[3] : pairs[1], __shfl_xor_sync(~0u, a ? pairs[1] : pairs[3], 8));
        u32 z = larger(b ? y : x, __shfl_xor_sync(~0u, b ? x : y, 4));
        z = larger(z, __shfl_xor_sync(~0u, z, 2));
        z = larger(z, __shfl_xor_sync(~0u, z, 1));
        return lane & 2 ? z >> 16 : z & 0xffffu;
    }
    // Write the largest magnitudes of four columns, over both halves of the warp, to `out`: the lower half has the first four columns of the eight.
    __device__ __forceinline__ void of_columns(Magnitude* out, int half) const {
        u32 m[4];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            m[w] = word(0, w);
#pragma unroll
            for (int i = 1; i < 8; ++i) m[w] = larger(m[w], word(i, w));
        }
        const u32 a = larger(half ? m[2] : m[0], __shfl_xor_sync(~0u, half ? m[0] : m[2], 16));
        const u32 b = larger(half ? m[3] : m[1], __shfl_xor_sync(~0u, half ? m[1] : m[3], 16));
        *reinterpret_cast<uint2*>(out) = make_uint2(a, b);
    }
    // The largest magnitude of all elements of the warp, in every lane.
    __device__ __forceinline__ u32 of_warp() const {
        u32 m = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int w = 0; w < 4; ++w) m = larger(m, word(i, w));
        return __reduce_max_sync(~0u, max(m & 0xffffu, m >> 16));
    }
};

// A thread's elements in fp32; the functions are those of `Pairs`.
struct Singles {
    typedef u32 Magnitude;
    float x[8][8];

    template <class D> __device__ __forceinline__ float2 quotients(int i, int w, const D& d) const { return quotients(i, w, d, d); }
    template <class D> __device__ __forceinline__ float2 quotients(int i, int w, const D& a, const D& b) const {
        return make_float2(divided(x[i][2 * w], a), divided(x[i][2 * w + 1], b));
    }
    __device__ static __forceinline__ u32 bits(u32 magnitude) { return magnitude; }
    __device__ __forceinline__ u32 of_row(int lane) const {
        u32 m[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float a = larger(x[i][0], x[i][1]);
#pragma unroll
            for (int j = 2; j < 8; ++j) a = larger(a, x[i][j]);
            m[i] = __float_as_uint(a);
        }
        return largest_of_each(m, lane);
    }
    __device__ __forceinline__ void of_columns(Magnitude* out, int half) const {
        u32 m[8], mine[4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            float a = larger(x[0][j], x[1][j]);
#pragma unroll
            for (int i = 2; i < 8; ++i) a = larger(a, x[i][j]);
            m[j] = __float_as_uint(a);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) mine[j] = max(half ? m[4 + j] : m[j], __shfl_xor_sync(~0u, half ? m[j] : m[4 + j], 16));
        *reinterpret_cast<uint4*>(out) = make_uint4(mine[0], mine[1], mine[2], mine[3]);
    }
};

// ---- a tile of 16 rows a warp, 128 columns -----------------------------------------------------------------------

// The position of a thread's 8 x 8 elements in its tile: rows from `row0` on, columns from 8 c on.
struct Lane {
    int warp, lane, half, c, row0;

    __device__ __forceinline__ Lane(int thread) : warp(thread / 32), lane(thread % 32), half(lane / 16), c(lane % 16), row0(warp * 16 + half * 8) {}
};

// The largest magnitudes of a tile's columns: for each warp, and combined over the CTA. The divisor of column 8 c + j is at [j][c], so that the lanes
// of a warp read neighbouring ones.
template <class V, class D, int N> struct Columns {
    D divisors[8][16];
    typename V::Magnitude amax[N][128];

    // Find the scales of the columns; those of the first `width` columns are stored to `scales`. Threads see `divisors` after the next barrier.
    __device__ __forceinline__ void find(const V& v, const Lane& at, float* scales, int width) {
        v.of_columns(&amax[at.warp][at.c * 8 + at.half * 4], at.half);
        __syncthreads();
        if (threadIdx.x < 128) {
            const int j = threadIdx.x;
            u32 largest = 0;
#pragma unroll
            for (int w = 0; w < N; ++w) largest = max(largest, (u32)amax[w][j]);
            const float scale = scale_of(V::bits(largest));
            prepare(divisors[j % 8][j / 8], scale);
            if (j < width) scales[j] = scale;
        }
    }
};

// A transposed tile of 128 x 128 in shared memory. Its row 8 c + j has 16 bytes from each warp; those of warp w are at 16-byte chunk w ^ c % 8, so
// that the 16 rows to which a warp writes at a time cover all banks.
struct Turned {
    u8 bytes[128 * 128];

    // Put columns 8 c + 2 w and 8 c + 2 w + 1 of a thread's 8 rows, `y`, into the tile.
    __device__ __forceinline__ void put(const Lane& at, int w, const float2 (&y)[8]) {
        u8* to = &bytes[(at.c * 8 + 2 * w) * 128 + ((at.warp ^ at.c % 8) * 16) + at.half * 8];
        *reinterpret_cast<uint2*>(to) = make_uint2(e4m3(y[0].x, y[1].x, y[2].x, y[3].x), e4m3(y[4].x, y[5].x, y[6].x, y[7].x));
        *reinterpret_cast<uint2*>(to + 128) = make_uint2(e4m3(y[0].y, y[1].y, y[2].y, y[3].y), e4m3(y[4].y, y[5].y, y[6].y, y[7].y));
    }
    // Store the first `height` rows and `width` bytes of each to a matrix whose rows are `stride` bytes apart, by 256 threads.
    __device__ __forceinline__ void store(u8* to, int stride, int height, int width) const {
        const int place = threadIdx.x % 8;
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const int j = threadIdx.x / 8 + 32 * k;
            ::store(to + (long long)j * stride + place * 16, *reinterpret_cast<const uint4*>(&bytes[j * 128 + ((place ^ j / 8 % 8) * 16)]),
                    j < height && place * 16 < width);
        }
    }
};
