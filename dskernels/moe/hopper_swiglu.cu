// The gradient of the SwiGLU of experts, quantised for the products after it, on sm_90a. From gate and up as they were kept, in e4m3, and from the
// gradient of the activation, it computes dgate and dup in 1x128 tiles (for Dgrad) and along the tokens of each expert (for Wgrad), and the weighted
// activation along tokens. Each value is rounded to bf16 before it is quantised, as if it had been written in bf16 and quantised by separate kernels,
// which would move three times the bytes.
//
// A tile is 128 rows of one expert by 128 columns of the gate and the same columns of up. The CTAs are persistent, and process one row of tiles after
// another. In the order of grouped_gemm/hopper_quantize.cu, one column of tiles after another, 98304 x 1408 took 583 us on an H200 instead of 532. A
// thread has 8 rows of 8 columns: it computes dgate, dup and the activation of these and puts them into shared memory; then the three are quantised
// in turn. Quotients are computed as products with a reciprocal, which are an ulp or two off: one e4m3 value in 2,000 becomes its neighbour, and a
// quarter of the instructions are saved (with exact quotients the kernel took 652 us).
//
// Slower were: prefetching the next tile into the L2 (562 us), and finding the largest magnitudes while the values are still in registers, with 6
// barriers per tile instead of 10 and 14% fewer instructions (590 us). At the speed of a copy, the bytes that it moves would take 294 us.
//
// Options (-D):
//   WEIGHTED  1: rows have routing weights, that of choice source[row]; the gradient of each weight is summed over the columns of a tile
//   GROUPED   0: all rows are one group
//   UE8M0     1: scales are powers of two, see cuda/quantize.cuh
//   BLOCKS    CTAs per multiprocessor

#include "quantize.cuh"
#include "tile_groups.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;

// The four e4m3 numbers of a word, times a scale, in fp32.
__device__ __forceinline__ void widen(u32 word, float scale, float (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
        u32 halves;
        asm("{.reg .b16 h; mov.b16 h, %1; cvt.rn.f16x2.e4m3x2 %0, h;}" : "=r"(halves) : "h"((u16)(word >> 16 * k)));
        float2 two;
        asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}" : "=f"(two.x), "=f"(two.y) : "r"(halves));
        x[2 * k] = mul(two.x, scale), x[2 * k + 1] = mul(two.y, scale);
    }
}
__device__ __forceinline__ uint2 load8(const u8* p, bool valid) {
    uint2 v = make_uint2(0, 0);
    asm volatile("{.reg .pred p; setp.ne.s32 p, %3, 0; @p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];}"
                 : "+r"(v.x), "+r"(v.y)
                 : "l"(p), "r"((int)valid));
    return v;
}
__device__ __forceinline__ u32 bf16_pair(float a, float b) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(b), "f"(a));
    return pair;
}

// Two e4m3, the first in the lower byte.
__device__ __forceinline__ u16 e4m3(float a, float b) {
    u16 two;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(b), "f"(a));
    return two;
}

// Quantise a thread's 8 x 8 elements by the scales of their columns, and put them into the transposed tile `turned`. With ROWS, also quantise them by
// the scales of their rows, and store these to `q`, not transposed.
template <bool ROWS>
__device__ __forceinline__ void emit(const Pairs& v, const Lane& at, const Reciprocal* by_row, const Columns<Pairs, Reciprocal, WARPS>& columns,
                                     Turned& turned, u8* q, int stride_q, int height) {
    float of_row[8];
    u16 before[8];
    u32 out[8][2];
    if (ROWS)
#pragma unroll
        for (int i = 0; i < 8; ++i) of_row[i] = by_row[at.row0 + i].inverse;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        const float left = columns.divisors[2 * w][at.c].inverse, right = columns.divisors[2 * w + 1][at.c].inverse;
        float2 y[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const float a = low(word(v.rows[i], w)), b = high(word(v.rows[i], w));
            y[i] = make_float2(mul(a, left), mul(b, right));
            if (!ROWS) continue;
            const u16 two = e4m3(mul(a, of_row[i]), mul(b, of_row[i]));
            if (w % 2) asm("mov.b32 %0, {%1, %2};" : "=r"(out[i][w / 2]) : "h"(before[i]), "h"(two));
            before[i] = two;
        }
        turned.put(at, w, y);
    }
    if (ROWS)
#pragma unroll
        for (int i = 0; i < 8; ++i) store(q + (long long)i * stride_q, make_uint2(out[i][0], out[i][1]), i < height);
}

// Inputs: a row of `kept` has `stride_kept` bytes, 2 * cols e4m3 values and, from byte `scales_at` on, a float for each 128 of them; `dhidden` is
// bf16 [rows, cols], cols a multiple of 128. Results: dgate and dup as q [rows, 2 * cols] with scales s, and transposed as qt [2 * cols, 128 * tiles]
// with scales st; the weighted activation transposed as ht [cols, 128 * tiles] with scales hst; dweights [cols / 128, rows], the parts of each row's
// sum.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
swiglu_backward(const u8* __restrict__ kept, const u16* __restrict__ dhidden, const int* __restrict__ offsets, const int* __restrict__ source,
                const float* __restrict__ weights, u8* __restrict__ q, float* __restrict__ s, u8* __restrict__ qt, float* __restrict__ st,
                u8* __restrict__ ht, float* __restrict__ hst, float* __restrict__ dweights, long long stride_kept, int scales_at, int stride_d,
                int rows, int cols, int groups, int tiles, int stride_s, int stride_st, int stride_hst) {
    __shared__ __align__(16) Reciprocal by_row[128];
    __shared__ __align__(16) Columns<Pairs, Reciprocal, WARPS> columns;
    extern __shared__ __align__(128) uint4 waiting[];  // dgate, dup and the activation, [3][8][THREADS]; after them the table of groups
    Turned& turned = *reinterpret_cast<Turned*>(waiting);  // overwrites dgate, which has been read by then
    int* const first_row = reinterpret_cast<int*>(waiting + 24 * THREADS);
    int* const first_tile = first_row + groups + 1;
    if (GROUPED) find_groups<THREADS>(offsets, rows, groups, first_row, first_tile);

    const Lane at(threadIdx.x);
    const int filled = GROUPED ? first_tile[groups] : tiles;  // tiles that belong to no group stay uninitialised: they are never read
    const int wide = cols / 128, items = filled * wide;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int tile = item / wide, i_c = item % wide;
        int row = tile * 128 + at.row0, height = min(rows - row, 8);  // first row of this thread, and how many of its 8 rows the group has
        if (GROUPED) {
            const int group = group_of(tile, groups, first_tile);
            row = height = 0;
            if (group < groups) {
                row = first_row[group] + (tile - first_tile[group]) * 128 + at.row0;
                height = min(first_row[group + 1] - row, 8);
            }
        }
        const int col = i_c * 128 + at.c * 8;

        __syncthreads();  // all threads have stored their part of the preceding transposed tile
        {
            const u8* const p = kept + (long long)row * stride_kept;
            const u16* const p_d = dhidden + (long long)row * stride_d + col;
            // Each lane loads a scale and the weight of one row: of 16 lanes, the lower 8 load the scales of gate, the upper 8 those of up.
            const int of = at.c % 8;
            float mine = 0.f, weight = 0.f, product = 0.f;
            if (of < height) {
                mine = *reinterpret_cast<const float*>(p + of * stride_kept + scales_at + 4 * (i_c + (at.c < 8 ? 0 : wide)));
                const int choice = WEIGHTED ? source[row + of] : 0;
                weight = !WEIGHTED ? 1.f : choice < 0 ? 0.f : weights[choice];
            }
#pragma unroll 1
            for (int first = 0; first < 8; first += 4) {
                uint2 gates[4], ups[4];
                uint4 ds[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    gates[i] = load8(p + (first + i) * stride_kept + col, first + i < height);
                    ups[i] = load8(p + (first + i) * stride_kept + cols + col, first + i < height);
                    ds[i] = load(p_d + (long long)(first + i) * stride_d, first + i < height);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int lane = at.half * 16 + first + i;
                    const float gate_scale = __shfl_sync(~0u, mine, lane), up_scale = __shfl_sync(~0u, mine, lane + 8), w = __shfl_sync(~0u, weight, lane);
                    u32 of_gate[4], of_up[4], of_hidden[4];
                    float sum = 0.f;
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        float gate[4], up[4], dgate[4], dup[4], hidden[4];
                        widen(k ? gates[i].y : gates[i].x, gate_scale, gate);
                        widen(k ? ups[i].y : ups[i].x, up_scale, up);
#pragma unroll
                        for (int j = 0; j < 4; ++j) {
                            // The hardware's approximations are good enough, since the results are rounded to bf16.
                            const float d = element(ds[i], 4 * k + j), sig = approximate_inverse(1.f + __expf(-gate[j])), silu = gate[j] * sig;
                            const float of_silu = d * up[j], weighted = silu * w;
                            sum += of_silu * silu;
                            dgate[j] = of_silu * w * (sig + silu * (1.f - sig));
                            dup[j] = d * weighted;
                            hidden[j] = up[j] * weighted;
                        }
#pragma unroll
                        for (int j = 0; j < 2; ++j) {
                            of_gate[2 * k + j] = bf16_pair(dgate[2 * j], dgate[2 * j + 1]);
                            of_up[2 * k + j] = bf16_pair(dup[2 * j], dup[2 * j + 1]);
                            of_hidden[2 * k + j] = bf16_pair(hidden[2 * j], hidden[2 * j + 1]);
                        }
                    }
                    waiting[(first + i) * THREADS + threadIdx.x] = make_uint4(of_gate[0], of_gate[1], of_gate[2], of_gate[3]);
                    waiting[(8 + first + i) * THREADS + threadIdx.x] = make_uint4(of_up[0], of_up[1], of_up[2], of_up[3]);
                    waiting[(16 + first + i) * THREADS + threadIdx.x] = make_uint4(of_hidden[0], of_hidden[1], of_hidden[2], of_hidden[3]);
                    if (WEIGHTED) {
#pragma unroll
                        for (int step = 8; step; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
                        if (at.c == first + i) product = sum;
                    }
                }
            }
            if (WEIGHTED && at.c < height) dweights[(long long)i_c * rows + row + at.c] = product;
        }

#pragma unroll 1
        for (int turn = 0; turn < 3; ++turn) {
            Pairs v;
#pragma unroll
            for (int i = 0; i < 8; ++i) v.rows[i] = waiting[(turn * 8 + i) * THREADS + threadIdx.x];
            const int i_out = turn == 1 ? i_c + wide : i_c;  // index of these 128 columns in the gradient's 2 * cols, or the activation's cols
            if (turn < 2) {
                const int mine = at.c / 2;
                const float scale = scale_of(Pairs::bits(v.of_row(at.lane)));
                if (at.lane % 2 == 0) {
                    prepare(by_row[at.row0 + mine], scale);
                    if (mine < height) s[(long long)i_out * stride_s + row + mine] = scale;
                }
            }
            columns.find(v, at, (turn < 2 ? st + (long long)tile * stride_st : hst + (long long)tile * stride_hst) + i_out * 128, 128);
            __syncthreads();
            if (turn < 2) emit<true>(v, at, by_row, columns, turned, q + (long long)row * 2 * cols + i_out * 128 + at.c * 8, 2 * cols, height);
            else emit<false>(v, at, by_row, columns, turned, q, 0, 0);
            __syncthreads();
            turned.store((turn < 2 ? qt : ht) + ((long long)i_out * 128 * tiles + tile) * 128, tiles * 128, 128, 128);
        }
    }
}
