// Quantising to e4m3 with one fp32 scale a tile, as the matrix stands, transposed, or both in one pass, on sm_90a.
//
// A CTA takes 16 * WARPS rows of 128 columns and reads them once, into registers: a thread holds 8 rows of 8 columns. The largest
// magnitude of a row is known to half a warp, that of a column after a round through shared memory, where one thread for each row and
// column makes the scale. A transposed tile is put together in shared memory, so that it too is written 16 bytes a thread.
//
// Options (-D): SOURCE, what is quantised: 0 x (bf16), 1 silu(gate) * up, 2 its gradient, first that of the gate, then that of up.
// PLAIN and TRANSPOSED say for each of the two results what shares a scale: 0 (there is no such result), 1 (a row of the tile), 2 (a
// column of it), 3 (the tile). UE8M0. WARPS (8 unless PLAIN = 1 stands alone). BLOCKS to an SM. DOWN: 1 walks the tiles of a column
// of tiles before the next, 0 those of a row.

#include "ptx.cuh"

constexpr int X = 0, PRODUCT = 1, GRADIENT = 2;
constexpr int ROW = 1, COLUMN = 2, TILE = 3;
constexpr bool BY_ROW = PLAIN == ROW || TRANSPOSED == ROW, BY_COLUMN = PLAIN == COLUMN || TRANSPOSED == COLUMN;
constexpr bool BY_TILE = PLAIN == TILE || TRANSPOSED == TILE;
constexpr int ROWS = 16 * WARPS;
constexpr u32 INFINITE = 0x7f800000u;

// ---- scale and division ------------------------------------------------------------------------------------------

// What the elements of a tile are divided by: the scale as `scale * up` in [1, 2), `up` being a power of two, and 1 / (scale * up).
struct alignas(16) Divisor {
    float up, scale, inverse, unused;
};

__device__ __forceinline__ float approximate_inverse(float x) {
    asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
    return x;
}
__device__ __forceinline__ float sigmoid_of(float x) {
    x *= -1.4426950408889634f;
    asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
    return approximate_inverse(1.f + x);
}

// amax / 448, at least 2^-126, and 1 where amax, given as its bits, is 0.
__device__ __forceinline__ float scale_of(u32 amax) {
    // Exact, as the quotient of a float and 7 is never nearer than 1/14 ulp to the middle of two; away from denormals.
    const bool small = amax < 0x10000000u;
    const float x = __uint_as_float(amax) * (small ? 0x1p64f : 1.f), r = 1.f / 448.f, guess = x * r;
    float scale = __fmaf_rn(__fmaf_rn(-guess, 448.f, x), r, guess) * (small ? 0x1p-64f : 1.f);
    if (amax >= INFINITE) scale = x;
    scale = scale < 1.1754943508222875e-38f ? 1.1754943508222875e-38f : scale;
    if (UE8M0) {
        // Up to a power of two: any bit of the mantissa carries into the exponent. Infinity and NaN stay.
        const u32 bits = __float_as_uint(scale);
        scale = bits < INFINITE ? __uint_as_float((bits + 0x7fffffu) & INFINITE) : scale;
    }
    return amax == 0 ? 1.f : scale;
}

__device__ __forceinline__ Divisor divisor_of(float scale) {
    const u32 bits = __float_as_uint(scale);
    const bool finite = bits < INFINITE;
    Divisor d;
    // finite / infinity is 0, infinity / infinity and everything / NaN is NaN
    d.up = finite ? __uint_as_float(0x7f000000u - (bits & INFINITE)) : bits == INFINITE ? 0.f : scale;
    d.scale = finite ? __uint_as_float((bits & ~INFINITE) | 0x3f800000u) : 1.f;
    // The nearest float: what the hardware returns is one ulp off at most, and a step of Newton's takes that away.
    const float guess = approximate_inverse(d.scale);
    d.inverse = UE8M0 ? 1.f : __fmaf_rn(guess, __fmaf_rn(-d.scale, guess, 1.f), guess);
    d.unused = 0.f;
    return d;
}

// x / scale for x * up, to the bit of IEEE division wherever e4m3 can tell: the product with the reciprocal is 1.5 ulp off at most, and one step
// of Newton's leaves it right next to every point where e4m3 rounds (tests/test_fp8.py). The signs in the step keep a negative zero.
__device__ __forceinline__ float quotient(float x, const Divisor& d) {
    if (UE8M0) return x;
    const float q = __fmul_rn(x, d.inverse);
    return __fmaf_rn(-__fmaf_rn(q, d.scale, -x), d.inverse, q);
}

// x * up. Not `*`: CuPy compiles with -ftz=true, which would take a denormal x for zero.
__device__ __forceinline__ float raised(float x, const Divisor& d) {
    asm("mul.rn.f32 %0, %0, %1;" : "+f"(x) : "f"(d.up));
    return x;
}
__device__ __forceinline__ u32 raised(u32 pair, const Divisor& d) {
    const u32 up = __float_as_uint(d.up);
    asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(pair) : "r"(__byte_perm(up, up, 0x3232)));
    return pair;
}

// Four e4m3 in a word, the first in the lowest byte.
__device__ __forceinline__ u32 e4m3(float a, float b, float c, float d) {
    u16 low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return __byte_perm(low, high, 0x5410);
}

// ---- memory ------------------------------------------------------------------------------------------------------

// 16 bytes, or zeros if not `valid`. Predicated by hand, as the stores below: the compiler would branch around each.
__device__ __forceinline__ uint4 load(const u16* p, bool valid) {
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
__device__ __forceinline__ void store(u8* p, uint4 v, bool valid) {
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p st.global.v4.u32 [%0], {%1, %2, %3, %4};}" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z),
                 "r"(v.w), "r"((int)valid)
                 : "memory");
}

// ---- the 8 x 8 elements of a thread ------------------------------------------------------------------------------

__device__ __forceinline__ float low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ __forceinline__ float element(const uint4& v, int j) {
    const u32 pair = j / 2 == 0 ? v.x : j / 2 == 1 ? v.y : j / 2 == 2 ? v.z : v.w;
    return j % 2 ? high(pair) : low(pair);
}

// Reduce N words over 2 N lanes or more, so that a lane ends up with one of them, named by its bits from BIT down.
template <class F> __device__ __forceinline__ u32 scatter4(const u32 (&m)[4], int lane, F larger) {
    const bool a = lane & 8, b = lane & 4;
    const u32 x = larger(a ? m[2] : m[0], __shfl_xor_sync(~0u, a ? m[0] : m[2], 8));
    const u32 y = larger(a ? m[3] : m[1], __shfl_xor_sync(~0u, a ? m[1] : m[3], 8));
    u32 z = larger(b ? y : x, __shfl_xor_sync(~0u, b ? x : y, 4));
    z = larger(z, __shfl_xor_sync(~0u, z, 2));
    return larger(z, __shfl_xor_sync(~0u, z, 1));
}

#if SOURCE == 0
// In bf16 as loaded. Magnitudes are compared as integers, two at a time: ordered like the floats, and a NaN is larger than all.
struct Values {
    typedef u16 Magnitude;
    uint4 rows[8];

    // The quotients of columns 2 w and 2 w + 1 of a row.
    __device__ __forceinline__ float2 quotients(int i, int w, const Divisor& a, const Divisor& b, bool same) const {
        const u32 pair = w == 0 ? rows[i].x : w == 1 ? rows[i].y : w == 2 ? rows[i].z : rows[i].w;
        const u32 x = raised(pair, a), y = same ? x : raised(pair, b);
        return make_float2(quotient(low(x), a), quotient(high(y), b));
    }
    __device__ static __forceinline__ u32 bits(u32 magnitude) { return magnitude << 16; }
    __device__ static __forceinline__ u32 larger(u32 a, u32 b) {
        u32 both;
        asm("max.u16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
        return both;
    }
    __device__ __forceinline__ u32 word(int i, int w) const {
        return (w == 0 ? rows[i].x : w == 1 ? rows[i].y : w == 2 ? rows[i].z : rows[i].w) & 0x7fff7fffu;
    }
    // The largest magnitude of a row over 16 lanes; bits 3, 2 and 1 of the lane say of which row.
    __device__ __forceinline__ u32 of_row(int lane) const {
        u32 pairs[4];
#pragma unroll
        for (int p = 0; p < 4; ++p) {
            u32 m[2];
#pragma unroll
            for (int k = 0; k < 2; ++k) m[k] = larger(larger(word(2 * p + k, 0), word(2 * p + k, 1)), larger(word(2 * p + k, 2), word(2 * p + k, 3)));
            pairs[p] = larger(__byte_perm(m[0], m[1], 0x5410), __byte_perm(m[0], m[1], 0x7632));
        }
        const u32 both = scatter4(pairs, lane, larger);
        return lane & 2 ? both >> 16 : both & 0xffffu;
    }
    // The largest magnitudes of four columns over both halves of the warp: the lower half takes the first four.
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
    // The largest magnitude of all, in every lane.
    __device__ __forceinline__ u32 of_warp() const {
        u32 m = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i)
#pragma unroll
            for (int w = 0; w < 4; ++w) m = larger(m, word(i, w));
        return __reduce_max_sync(~0u, max(m & 0xffffu, m >> 16));
    }
};
#else
// In fp32 as computed.
struct Values {
    typedef u32 Magnitude;
    float x[8][8];

    __device__ __forceinline__ float2 quotients(int i, int w, const Divisor& a, const Divisor& b, bool same) const {
        return make_float2(quotient(raised(x[i][2 * w], a), a), quotient(raised(x[i][2 * w + 1], b), b));
    }
    __device__ static __forceinline__ u32 bits(u32 magnitude) { return magnitude; }
    __device__ static __forceinline__ float larger(float a, float b) {
        float c;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(fabsf(a)), "f"(fabsf(b)));
        return c;
    }
    __device__ __forceinline__ u32 of_row(int lane) const {
        u32 m[8], pairs[4];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float a = larger(x[i][0], x[i][1]);
#pragma unroll
            for (int j = 2; j < 8; ++j) a = larger(a, x[i][j]);
            m[i] = __float_as_uint(a);
        }
        const bool odd = lane & 2;
#pragma unroll
        for (int p = 0; p < 4; ++p) pairs[p] = max(odd ? m[2 * p + 1] : m[2 * p], __shfl_xor_sync(~0u, odd ? m[2 * p] : m[2 * p + 1], 2));
        const bool a = lane & 8, b = lane & 4;
        const u32 y = max(a ? pairs[2] : pairs[0], __shfl_xor_sync(~0u, a ? pairs[0] : pairs[2], 8));
        const u32 z = max(a ? pairs[3] : pairs[1], __shfl_xor_sync(~0u, a ? pairs[1] : pairs[3], 8));
        const u32 one = max(b ? z : y, __shfl_xor_sync(~0u, b ? y : z, 4));
        return max(one, __shfl_xor_sync(~0u, one, 1));
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
#endif

// ---- kernel ------------------------------------------------------------------------------------------------------

// Which elements a thread has: 8 rows and 8 columns of a tile.
struct Place {
    int warp, lane, e, i_r, i_c;

    __device__ __forceinline__ Place(int thread, int block, int tiles_r, int tiles_c) : warp(thread / 32), lane(thread % 32) {
        e = BY_TILE ? block / (tiles_r * tiles_c) : 0;
        const int tile = BY_TILE ? block - e * tiles_r * tiles_c : block;
        i_r = DOWN ? tile % tiles_r : tile / tiles_c;
        i_c = DOWN ? tile / tiles_r : tile % tiles_c;
    }
    __device__ __forceinline__ int row0() const { return warp * 16 + lane / 16 * 8; }
    __device__ __forceinline__ int row() const { return i_r * ROWS + row0(); }
    __device__ __forceinline__ int col() const { return i_c * 128 + lane % 16 * 8; }
};

// `x` is bf16 [E, rows, cols], or gate and up side by side, [rows, 2 * cols], and `dy` [rows, cols]. The results are contiguous;
// stride_s is that of scales from one tile to the next, across the direction in which they stand side by side.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
quantize(const u16* __restrict__ x, const u16* __restrict__ dy, u8* __restrict__ q, float* __restrict__ s, u8* __restrict__ qt, float* __restrict__ st,
         long long stride_xe, int stride_xr, int stride_dyr, int rows, int cols, int tiles_r, int tiles_c, int stride_s, int stride_st) {
    __shared__ Divisor by_row[BY_ROW ? ROWS : 1];
    __shared__ Divisor by_column[BY_COLUMN ? 8 : 1][16];  // column 8 c + j at [j][c], so that lanes read side by side
    __shared__ __align__(16) Values::Magnitude column_amax[BY_COLUMN ? WARPS : 1][128];
    __shared__ u32 warp_amax[WARPS];
    __shared__ __align__(128) u8 turned[TRANSPOSED ? 128 * ROWS : 16];
    extern __shared__ float4 of_up[];  // of GRADIENT: what up gets, while that of the gate is written

    const int width = SOURCE == GRADIENT ? 2 * cols : cols;
    Place at(threadIdx.x, blockIdx.x, tiles_r, tiles_c);
    const int height = at.col() < cols ? min(rows - at.row(), 8) : 0;  // rows of this thread, may be negative

    Values v;
    auto emit = [&](int i_c) {
        const int warp = at.warp, lane = at.lane, c = at.lane % 16, half = at.lane / 16, row0 = at.row0();
        const int e = at.e, i_r = at.i_r, row = at.row(), col = i_c * 128 + c * 8;
        const int height = at.col() < cols ? min(rows - row, 8) : 0;
        if (BY_ROW) {
            // Two lanes have the same row: one of them writes.
            const int mine = c / 2;
            const float scale = scale_of(Values::bits(v.of_row(lane)));
            if (lane % 2 == 0) {
                by_row[row0 + mine] = divisor_of(scale);
                if (row + mine < rows) {
                    if (PLAIN == ROW) s[(long long)i_c * stride_s + row + mine] = scale;
                    if (TRANSPOSED == ROW) st[(long long)i_c * stride_st + row + mine] = scale;
                }
            }
            __syncwarp();
        }
        if (BY_COLUMN) {
            v.of_columns(&column_amax[warp][c * 8 + half * 4], half);
            __syncthreads();
            if (threadIdx.x < 128) {
                const int j = threadIdx.x;
                u32 amax = 0;
#pragma unroll
                for (int w = 0; w < WARPS; ++w) amax = max(amax, (u32)column_amax[w][j]);
                const float scale = scale_of(Values::bits(amax));
                by_column[j % 8][j / 8] = divisor_of(scale);
                if (i_c * 128 + j < width) {
                    if (PLAIN == COLUMN) s[(long long)i_r * stride_s + i_c * 128 + j] = scale;
                    if (TRANSPOSED == COLUMN) st[(long long)i_r * stride_st + i_c * 128 + j] = scale;
                }
            }
            if (PLAIN == COLUMN) __syncthreads();
        }
        Divisor whole;
#if SOURCE == 0
        if (BY_TILE) {
            const u32 of_warp = v.of_warp();
            if (lane == 0) warp_amax[warp] = of_warp;
            __syncthreads();
            u32 amax = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) amax = max(amax, warp_amax[w]);
            const float scale = scale_of(Values::bits(amax));
            whole = divisor_of(scale);
            if (threadIdx.x == 0) {
                if (PLAIN) s[(long long)e * tiles_r * tiles_c + i_r * stride_s + i_c] = scale;
                if (TRANSPOSED) st[(long long)e * tiles_r * tiles_c + i_c * stride_st + i_r] = scale;
            }
        }
#endif

        if (PLAIN) {
            u8* p = q + ((long long)e * rows + row) * width + col;
            Divisor d[8];
            if (PLAIN == COLUMN)
#pragma unroll
                for (int j = 0; j < 8; ++j) d[j] = by_column[j][c];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const Divisor of_row = PLAIN == ROW ? by_row[row0 + i] : whole;
                float y[8];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float2 two = PLAIN == COLUMN ? v.quotients(i, w, d[2 * w], d[2 * w + 1], false) : v.quotients(i, w, of_row, of_row, true);
                    y[2 * w] = two.x, y[2 * w + 1] = two.y;
                }
                store(p + (long long)i * width, make_uint2(e4m3(y[0], y[1], y[2], y[3]), e4m3(y[4], y[5], y[6], y[7])), i < height);
            }
        }
        if (TRANSPOSED) {
            if (TRANSPOSED == COLUMN) __syncthreads();
            Divisor d[8];
            if (TRANSPOSED == ROW)
#pragma unroll
                for (int i = 0; i < 8; ++i) d[i] = by_row[row0 + i];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                Divisor left = whole, right = whole;
                if (TRANSPOSED == COLUMN) left = by_column[2 * w][c], right = by_column[2 * w + 1][c];
                float2 y[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    y[i] = TRANSPOSED == ROW ? v.quotients(i, w, d[i], d[i], true) : v.quotients(i, w, left, right, TRANSPOSED == TILE);
                // The 16 bytes of `warp` in column 8 c + j stand in place warp ^ c: the 16 columns of a store hit all banks.
                u8* to = &turned[(c * 8 + 2 * w) * 128 + ((warp ^ c % 8) * 16) + half * 8];
                *reinterpret_cast<uint2*>(to) = make_uint2(e4m3(y[0].x, y[1].x, y[2].x, y[3].x), e4m3(y[4].x, y[5].x, y[6].x, y[7].x));
                *reinterpret_cast<uint2*>(to + 128) = make_uint2(e4m3(y[0].y, y[1].y, y[2].y, y[3].y), e4m3(y[4].y, y[5].y, y[6].y, y[7].y));
            }
            __syncthreads();
            const int place = threadIdx.x % 8, first = i_r * 128 + place * 16;
            u8* p = qt + ((long long)e * width + i_c * 128) * rows + first;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const int j = threadIdx.x / 8 + 32 * k;
                store(p + (long long)j * rows, *reinterpret_cast<const uint4*>(&turned[j * 128 + ((place ^ j / 8 % 8) * 16)]),
                      i_c * 128 + j < width && first < rows);
            }
        }
    };

    const u16* from = x + at.e * stride_xe + (long long)at.row() * stride_xr + at.col();
#if SOURCE == 0
#pragma unroll
    for (int i = 0; i < 8; ++i) v.rows[i] = load(from + i * stride_xr, i < height);
    emit(at.i_c);
#else
    const u16* from_dy = dy + (long long)at.row() * stride_dyr + at.col();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        uint4 dys;  // first: behind the other two, a register spills
        if (SOURCE == GRADIENT) dys = load(from_dy + i * stride_dyr, i < height);
        const uint4 gates = load(from + i * stride_xr, i < height), ups = load(from + i * stride_xr + cols, i < height);
        float other[8];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float gate = element(gates, j), up = element(ups, j), sigmoid = sigmoid_of(gate);
            const float swish = gate * sigmoid;
            if (SOURCE == PRODUCT) {
                v.x[i][j] = swish * up;
            } else {
                const float d = element(dys, j);
                v.x[i][j] = d * up * (sigmoid + swish * (1.f - sigmoid));
                other[j] = d * swish;
            }
        }
        if (SOURCE == GRADIENT)
#pragma unroll
            for (int k = 0; k < 2; ++k)
                of_up[(2 * i + k) * 32 * WARPS + threadIdx.x] = make_float4(other[4 * k], other[4 * k + 1], other[4 * k + 2], other[4 * k + 3]);
    }
#if SOURCE == 1
    emit(at.i_c);
#else
    // Found again rather than kept in registers through the loads, where there are none to spare.
    int thread, block;
    asm volatile("mov.u32 %0, %%tid.x; mov.u32 %1, %%ctaid.x;" : "=r"(thread), "=r"(block));
    at = Place(thread, block, tiles_r, tiles_c);
#pragma unroll 1
    for (int turn = 0; turn < 2; ++turn) {
        if (turn) {
            __syncthreads();
#pragma unroll
            for (int i = 0; i < 8; ++i)
#pragma unroll
                for (int k = 0; k < 2; ++k) {
                    const float4 four = of_up[(2 * i + k) * 32 * WARPS + threadIdx.x];
                    v.x[i][4 * k] = four.x, v.x[i][4 * k + 1] = four.y, v.x[i][4 * k + 2] = four.z, v.x[i][4 * k + 3] = four.w;
                }
        }
        emit(at.i_c + turn * tiles_c);
    }
#endif
#endif
}
