// Quantising x.T to e4m3 along the tokens of each group, on sm_90a: this makes the operands of the grouped weight gradient.
//
// A tile is 128 tokens of one group by 128 channels, and becomes 128 rows of 128 bytes. It has a scale for each channel. A CTA reads a tile once,
// into registers (a thread holds 8 tokens by 8 channels), finds the scales, and transposes the quantised tile in shared memory, see
// cuda/quantize.cuh.
//
// CTAs are persistent, BLOCKS per multiprocessor. Each computes once, from the offsets, where groups and their tiles begin, and then takes every
// gridDim.x-th tile. Tiles are ordered by channels first, so that all tokens come before the next channels: thus the rows of the result are filled by
// tiles that run at the same time, and a token that several experts gather is still in the L2. A tile that no group fills becomes zero, unless
// `leave` says that it is not written.
//
// Options (-D):
//   KIND    dtype of x: 0 bf16, 1 fp16, 2 fp32
//   GATHER  1: row r of the batch is row source[r] / top_k of x
//   UE8M0   1: scales are powers of two
//   BLOCKS  CTAs per multiprocessor

#include "quantize.cuh"
#include "tile_groups.cuh"

constexpr int WARPS = 8;
constexpr int WIDTH = KIND == 2 ? 4 : 2;  // bytes of an element

// `x` [tokens, cols], `source` [rows], `offsets` [groups + 1]; q [cols, 128 * tiles], s [tiles, stride_s].
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
quantize_grouped(const u8* __restrict__ x, const int* __restrict__ offsets, const int* __restrict__ source, u8* __restrict__ q, float* __restrict__ s,
                 int stride_x, int tokens, int rows, int cols, int groups, int tiles, int stride_s, int top_k, int leave) {
#if KIND == 0
    typedef Pairs Values;
#else
    typedef Singles Values;
#endif
    __shared__ __align__(16) Columns<Values, Divisor, WARPS> columns;
    __shared__ __align__(128) Turned turned;
    extern __shared__ int first_row[];  // [groups + 1], and after them first_tile
    int* const first_tile = first_row + groups + 1;
    find_groups<32 * WARPS>(offsets, rows, groups, first_row, first_tile);

    const Lane at(threadIdx.x);
    const int walked = leave ? first_tile[groups] : tiles;
    const int items = walked * ((cols + 127) / 128);
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int tile = item % walked, col = item / walked * 128;
        const int group = group_of(tile, groups, first_tile);
        int row = 0, height = 0;  // first row of this thread, and how many of the 8 from there on belong to the group
        if (group < groups) {
            row = first_row[group] + (tile - first_tile[group]) * 128 + at.row0;
            height = min(first_row[group + 1] - row, 8);
        }
        int token = row;
        if (GATHER) {
            // Each lane loads the source of one row. A source that is not a row of x is replaced by its last row.
            token = at.c < height ? min((u32)source[row + at.c] / (u32)top_k, (u32)tokens - 1) : 0;
        }
        if (col + at.c * 8 >= cols) height = 0;

        Values v;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const long long from = GATHER ? __shfl_sync(~0u, token, at.half * 16 + i) : row + i;
            const u8* p = x + (from * stride_x + col + at.c * 8) * WIDTH;
#if KIND == 0
            v.rows[i] = load(p, i < height);
#else
            const uint4 left = load(p, i < height), right = KIND == 2 ? load(p + 16, i < height) : left;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                if (KIND == 2)
                    v.x[i][j] = __uint_as_float(word(j < 4 ? left : right, j % 4));
                else
                    v.x[i][j] = widen(word(left, j / 2) >> 16 * (j % 2), 1);
            }
#endif
        }
        columns.find(v, at, s + (long long)tile * stride_s + col, cols - col);
        __syncthreads();
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            const Divisor left = columns.divisors[2 * w][at.c], right = columns.divisors[2 * w + 1][at.c];
            float2 y[8];
#pragma unroll
            for (int i = 0; i < 8; ++i) y[i] = v.quotients(i, w, left, right);
            turned.put(at, w, y);
        }
        __syncthreads();
        turned.store(q + ((long long)col * tiles + tile) * 128, tiles * 128, cols - col, 128);
    }
}
