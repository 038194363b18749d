// Quantising to e4m3 with one fp32 scale per tile, on sm_90a: the matrix as it is, transposed, or both in one pass.
//
// A CTA takes 16 * WARPS rows of 128 columns and reads them once, into registers: a thread holds 8 rows of 8 columns. Half a warp knows the largest
// magnitude of a row; that of a column is known after an exchange through shared memory, where one thread for each row and column computes the scale.
// A transposed tile is assembled in shared memory, so that it too is written in 16 bytes a thread.
//
// Options (-D): SOURCE, what is quantised: 0 x (bf16), 1 silu(gate) * up, 2 its gradient, first that of the gate, then that of up.
// KEPT: a product's gate and up are quantised too, as dskernels/moe/packed.py has them, cols being a multiple of 128.
// PLAIN and TRANSPOSED say for each of the two results what shares a scale: 0 (there is no such result), 1 (a row of the tile), 2 (a
// column of it), 3 (the tile). UE8M0. WARPS (8 unless PLAIN = 1 stands alone). BLOCKS to an SM. DOWN: 1 walks the tiles of a column
// of tiles before the next, 0 those of a row.

#include "quantize.cuh"

constexpr int X = 0, PRODUCT = 1, GRADIENT = 2;
constexpr int ROW = 1, COLUMN = 2, TILE = 3;
constexpr bool BY_ROW = PLAIN == ROW || TRANSPOSED == ROW, BY_COLUMN = PLAIN == COLUMN || TRANSPOSED == COLUMN;
constexpr bool BY_TILE = PLAIN == TILE || TRANSPOSED == TILE;
constexpr int ROWS = 16 * WARPS;

// A product's quotient may be off by an ulp or two (274 us instead of 289 for the gradient at 32768 x 2048); x is divided exactly.
#if SOURCE == 0
typedef Pairs Values;
typedef Divisor Factor;
#else
typedef Singles Values;
typedef Reciprocal Factor;
#endif

// The elements of a thread: 8 rows and 8 columns of a tile.
struct Place : Lane {
    int e, i_r, i_c;

    __device__ __forceinline__ Place(int thread, int block, int tiles_r, int tiles_c) : Lane(thread) {
        e = BY_TILE ? block / (tiles_r * tiles_c) : 0;
        const int tile = BY_TILE ? block - e * tiles_r * tiles_c : block;
        i_r = DOWN ? tile % tiles_r : tile / tiles_c;
        i_c = DOWN ? tile / tiles_r : tile % tiles_c;
    }
    __device__ __forceinline__ int row() const { return i_r * ROWS + row0; }
    __device__ __forceinline__ int col() const { return i_c * 128 + c * 8; }
};

#if KEPT
// A row's tiles of gate and of up, of which each of 16 lanes has 8 elements, in e4m3, with their scales behind the row.
__device__ __forceinline__ void keep(u8* row, const uint4& gates, const uint4& ups, int i_c, int c, int cols, bool valid) {
    u32 of_gate = 0, of_up = 0;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        of_gate = larger(of_gate, word(gates, w) & 0x7fff7fffu);
        of_up = larger(of_up, word(ups, w) & 0x7fff7fffu);
    }
    u32 both = larger(__byte_perm(of_gate, of_up, 0x5410), __byte_perm(of_gate, of_up, 0x7632));
#pragma unroll
    for (int step = 8; step; step /= 2) both = larger(both, __shfl_xor_sync(~0u, both, step));
#pragma unroll
    for (int up = 0; up < 2; ++up) {
        const uint4& x = up ? ups : gates;
        const float scale = scale_of(up ? both & 0xffff0000u : both << 16);
        Divisor d;
        prepare(d, scale);
        float y[8];
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const u32 pair = raised(word(x, w), d);
            y[2 * w] = quotient(low(pair), d), y[2 * w + 1] = quotient(high(pair), d);
        }
        store(row + up * cols + i_c * 128 + c * 8, make_uint2(e4m3(y[0], y[1], y[2], y[3]), e4m3(y[4], y[5], y[6], y[7])), valid);
        if (c == 0 && valid) reinterpret_cast<float*>(row + 2 * cols)[up * (cols / 128) + i_c] = scale;
    }
}
#else
__device__ __forceinline__ void keep(u8*, const uint4&, const uint4&, int, int, int, bool) {}
#endif

// `x` is bf16 [E, rows, cols], or gate and up side by side, [rows, 2 * cols], and `dy` [rows, cols]. The results are contiguous; stride_s is the
// stride of scales from one tile to the next, across the direction of a tile's elements. If a product has `offsets`, rows from offsets[groups] on
// belong to no group: they are not read, and their results are not written.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
quantize(const u16* __restrict__ x, const u16* __restrict__ dy, u8* __restrict__ q, float* __restrict__ s, u8* __restrict__ qt, float* __restrict__ st,
         u8* __restrict__ kept, long long stride_xe, int stride_xr, int stride_dyr, int rows, int cols, int tiles_r, int tiles_c, int stride_s,
         int stride_st, int stride_kept, const int* __restrict__ offsets, int groups) {
    __shared__ Factor by_row[BY_ROW ? ROWS : 1];
    __shared__ __align__(16) Columns<Values, Factor, BY_COLUMN ? WARPS : 1> columns;
    __shared__ u32 warp_amax[WARPS];
    __shared__ __align__(128) u8 for_turned[TRANSPOSED ? sizeof(Turned) : 16];
    extern __shared__ float4 of_up[];  // for GRADIENT: holds the gradient of up while that of the gate is written
    Turned& turned = *reinterpret_cast<Turned*>(for_turned);

    const int width = SOURCE == GRADIENT ? 2 * cols : cols;
    Place at(threadIdx.x, blockIdx.x, tiles_r, tiles_c);
    if (SOURCE == PRODUCT && offsets) {
        rows = min(rows, __ldg(offsets + groups));
        if (at.i_r * ROWS >= rows) return;
    }
    const int height = at.col() < cols ? min(rows - at.row(), 8) : 0;  // rows of this thread, may be negative

    Values v;
    auto emit = [&](int i_c) {
        const int e = at.e, i_r = at.i_r, c = at.c, row0 = at.row0, row = at.row(), col = i_c * 128 + c * 8;
        const int height = at.col() < cols ? min(rows - row, 8) : 0;
        if (BY_ROW) {
            // Two lanes have the same row: one of them writes.
            const int mine = c / 2;
            const float scale = scale_of(Values::bits(v.of_row(at.lane)));
            if (at.lane % 2 == 0) {
                prepare(by_row[row0 + mine], scale);
                if (row + mine < rows) {
                    if (PLAIN == ROW) s[(long long)i_c * stride_s + row + mine] = scale;
                    if (TRANSPOSED == ROW) st[(long long)i_c * stride_st + row + mine] = scale;
                }
            }
            __syncwarp();
        }
        if (BY_COLUMN) {
            columns.find(v, at, (PLAIN == COLUMN ? s + (long long)i_r * stride_s : st + (long long)i_r * stride_st) + i_c * 128, width - i_c * 128);
            if (PLAIN == COLUMN) __syncthreads();
        }
        Factor whole;
#if SOURCE == 0
        if (BY_TILE) {
            const u32 of_warp = v.of_warp();
            if (at.lane == 0) warp_amax[at.warp] = of_warp;
            __syncthreads();
            u32 amax = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) amax = max(amax, warp_amax[w]);
            const float scale = scale_of(Values::bits(amax));
            prepare(whole, scale);
            if (threadIdx.x == 0) {
                if (PLAIN) s[(long long)e * tiles_r * tiles_c + i_r * stride_s + i_c] = scale;
                if (TRANSPOSED) st[(long long)e * tiles_r * tiles_c + i_c * stride_st + i_r] = scale;
            }
        }
#endif

        if (PLAIN) {
            u8* p = q + ((long long)e * rows + row) * width + col;
            Factor d[8];
            if (PLAIN == COLUMN)
#pragma unroll
                for (int j = 0; j < 8; ++j) d[j] = columns.divisors[j][c];
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const Factor of_row = PLAIN == ROW ? by_row[row0 + i] : whole;
                float y[8];
#pragma unroll
                for (int w = 0; w < 4; ++w) {
                    const float2 two = PLAIN == COLUMN ? v.quotients(i, w, d[2 * w], d[2 * w + 1]) : v.quotients(i, w, of_row);
                    y[2 * w] = two.x, y[2 * w + 1] = two.y;
                }
                store(p + (long long)i * width, make_uint2(e4m3(y[0], y[1], y[2], y[3]), e4m3(y[4], y[5], y[6], y[7])), i < height);
            }
        }
        if (TRANSPOSED) {
            if (TRANSPOSED == COLUMN) __syncthreads();
            Factor d[8];
            if (TRANSPOSED == ROW)
#pragma unroll
                for (int i = 0; i < 8; ++i) d[i] = by_row[row0 + i];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                Factor left, right;
                if (TRANSPOSED == COLUMN) left = columns.divisors[2 * w][c], right = columns.divisors[2 * w + 1][c];
                float2 y[8];
#pragma unroll
                for (int i = 0; i < 8; ++i)
                    y[i] = TRANSPOSED == COLUMN ? v.quotients(i, w, left, right) : v.quotients(i, w, TRANSPOSED == ROW ? d[i] : whole);
                turned.put(at, w, y);
            }
            __syncthreads();
            turned.store(qt + ((long long)e * width + i_c * 128) * rows + i_r * 128, rows, width - i_c * 128, rows - i_r * 128);
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
        uint4 dys;  // declared first: after the other two, a register spills
        if (SOURCE == GRADIENT) dys = load(from_dy + i * stride_dyr, i < height);
        const uint4 gates = load(from + i * stride_xr, i < height), ups = load(from + i * stride_xr + cols, i < height);
        if (KEPT) keep(kept + (long long)(at.row() + i) * stride_kept, gates, ups, at.i_c, at.c, cols, i < height);
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float other[4];
#pragma unroll
            for (int j = 4 * k; j < 4 * k + 4; ++j) {
                const float gate = element(gates, j), up = element(ups, j), s = sigmoid(gate), swish = mul(gate, s);
                if (SOURCE == PRODUCT) {
                    v.x[i][j] = mul(swish, up);
                } else {
                    // Rounded like the reference, step by step: if the terms of a tile's largest element nearly cancel, its scale would show it.
                    const float d = element(dys, j);
                    v.x[i][j] = mul(mul(d, up), add(s, mul(swish, add(1.f, -s))));
                    other[j % 4] = mul(mul(d, gate), s);
                }
            }
            if (SOURCE == GRADIENT) of_up[(2 * i + k) * 32 * WARPS + threadIdx.x] = make_float4(other[0], other[1], other[2], other[3]);
        }
    }
#if SOURCE == 1
    emit(at.i_c);
#else
    // Computed again rather than kept in registers during the loads, which have none to spare.
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
