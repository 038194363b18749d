// What the gradient of attention does around its products, on sm_90a: it finds the sequences, computes delta before, and scales and rounds dq after.
// mla/prefill/hopper_backward.cu has the rest, and says what the names mean.
//
// Options (-D):
//   KIND   of the inputs: 0 bf16, 1 fp16
#pragma once

#include "attention.cuh"

constexpr bool FP16 = KIND == 1;
constexpr int QK_DIM = 192, V_DIM = 128, ROWS = 64, KEYS = 128;  // ROWS queries are a block, KEYS keys a tile
constexpr int DQ_BYTES = ROWS * QK_DIM * 4;
constexpr float LOG2_E = 1.4426950408889634f;

// ---- where things are --------------------------------------------------------------------------------------------

struct Sizes {
    int tokens_q, tokens_k, sequences, heads, heads_k, causal;
    // A head has this many blocks of queries and tiles of keys, some of them empty.
    __device__ __forceinline__ int blocks_q() const { return tokens_q / ROWS + sequences + 2; }
    __device__ __forceinline__ int tiles_k() const { return tokens_k / KEYS + sequences + 2; }
};

// `turns` says which tile of keys is to add to a block of queries of a head. Behind these is how many tiles have been taken, and then cu_seqlens_k
// made to ascend: a tile of keys that nobody found would be waited for without end.
__device__ __forceinline__ int* counter_of(int* turns, const Sizes& sizes) { return turns + (long long)sizes.heads * sizes.blocks_q(); }
__device__ __forceinline__ int* ascending_of(int* turns, const Sizes& sizes) { return counter_of(turns, sizes) + 1; }

// Edge i of the spans that part [0, tokens): 0, then the sequences + 1 values of cu_seqlens, then tokens. Whatever those values are, an edge lies
// within [0, tokens].
__device__ __forceinline__ int edge(const int* cu, int i, int sequences, int tokens) {
    if (i <= 0) return 0;
    if (i > sequences + 1) return tokens;
    return min(max(__ldg(cu + i - 1), 0), tokens);
}

// Tile i, of SIZE tokens: of which span, where that begins and how long it is, and where in it the tile begins. The first tile of a span is number
// edge / SIZE + span; that leaves every span as many as it needs, and some that begin at its end or later.
template <int SIZE> struct Tile {
    int span, start, length, first;
    __device__ __forceinline__ Tile(const int* cu, int i, int sequences, int tokens) {
        int low = 0, high = sequences + 2;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (edge(cu, middle, sequences, tokens) / SIZE + middle <= i) low = middle;
            else high = middle;
        }
        span = low;
        start = edge(cu, low, sequences, tokens);
        length = edge(cu, low + 1, sequences, tokens) - start;
        first = (i - start / SIZE - low) * SIZE;
    }
};
// How many tokens the sequence of a span has; the first and the last span are none.
__device__ __forceinline__ int length_of(const int* cu, int span, int sequences, int tokens) {
    if (span < 1 || span > sequences) return 0;
    return max(edge(cu, span + 1, sequences, tokens) - edge(cu, span, sequences, tokens), 0);
}
// Query i of a sequence sees the keys up to i + ahead.
__device__ __forceinline__ int keys_ahead(int queries, int keys, int causal) { return causal ? keys - queries : 1 << 29; }

// ---- 16-bit rows from registers ----------------------------------------------------------------------------------

// Of one of a thread's rows four pairs of columns, 8 apart: the four lanes of a quad transpose them, and each writes 16 bytes, columns
// 8 * (lane % 4) on.
__device__ __forceinline__ void store_quad(u16* row, u32 (&x)[4], int quarter, bool inside) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2)
#pragma unroll
        for (int t = 0; t < 4; ++t)
            if (!(t & d)) {
                const bool upper = quarter & d;
                const u32 other = __shfl_xor_sync(0xffffffffu, upper ? x[t] : x[t + d], d);
                if (upper) x[t] = other;
                else x[t + d] = other;
            }
    if (inside) *(uint4*)(row + 8 * quarter) = make_uint4(x[0], x[1], x[2], x[3]);
}

// Columns FROM to TO of a thread's two rows of a product, times `scale`, to the rows `row` and `row` + 8 of `rows`.
template <int FROM, int TO, int N>
__device__ __forceinline__ void store_columns(u16* to, long long stride, const float (&x)[N], float scale, int row, int rows, int quarter) {
#pragma unroll
    for (int j = FROM; j < TO; j += 32)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            u32 y[4];
#pragma unroll
            for (int t = 0; t < 4; ++t) y[t] = pack_half<FP16>(scale * x[j / 2 + 4 * t + 2 * i], scale * x[j / 2 + 4 * t + 2 * i + 1]);
            store_quad(to + (row + 8 * i) * stride + j, y, quarter, row + 8 * i < rows);
        }
}

// ---- before: delta -----------------------------------------------------------------------------------------------

constexpr int PREPARE_THREADS = 128;

// A warp's work: values that are less than an earlier one become that one, and all lie within [0, tokens].
__device__ __forceinline__ void ascend(const int* cu, int* to, int count, int tokens, int lane) {
    int before = 0;
    for (int i = lane; i - lane < count; i += 32) {
        int x = i < count ? min(max(__ldg(cu + i), before), tokens) : before;
#pragma unroll
        for (int d = 1; d < 32; d *= 2) {
            const int y = __shfl_up_sync(0xffffffffu, x, d);
            if (lane >= d) x = max(x, y);
        }
        before = __shfl_sync(0xffffffffu, x, 31);
        if (i < count) to[i] = x;
    }
}

// Of a block of queries and a head: lse in units of log 2, and delta; also the counter of its turns is set to 0. One more CTA makes cu_seqlens_k
// ascend. A query that sees nothing gets lse inf instead of -inf, so that its p are 0, and so do the rows behind the sequence's end.
extern "C" __global__ void __launch_bounds__(PREPARE_THREADS)
prepare(const u16* dout, const float* dlse, const u16* out, const float* lse, const int* cu_q, const int* cu_k, float* stats, int* turns,
        long long stride_dt, long long stride_dh, long long stride_ot, long long stride_oh, Sizes sizes) {
    const int block = blockIdx.x / sizes.heads, head = blockIdx.x % sizes.heads, lane = threadIdx.x % 16;
    const long long at = (long long)head * sizes.blocks_q() + block;
    if (block == sizes.blocks_q()) {
        if (threadIdx.x == 0) *counter_of(turns, sizes) = 0;
        if (threadIdx.x < 32) ascend(cu_k, ascending_of(turns, sizes), sizes.sequences + 1, sizes.tokens_k, threadIdx.x);
        return;
    }
    if (threadIdx.x == 0) turns[at] = 0;
    const Tile<ROWS> tile(cu_q, block, sizes.sequences, sizes.tokens_q);
    if (tile.first >= tile.length) return;
    constexpr int AT_ONCE = PREPARE_THREADS / 16, STEPS = ROWS / AT_ONCE;
    uint4 x[STEPS], y[STEPS];
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const int r = i * AT_ONCE + threadIdx.x / 16;
        const long long row = tile.start + tile.first + min(r, tile.length - tile.first - 1);
        x[i] = __ldg((const uint4*)(dout + row * stride_dt + head * stride_dh) + lane);
        y[i] = __ldg((const uint4*)(out + row * stride_ot + head * stride_oh) + lane);
    }
#pragma unroll
    for (int i = 0; i < STEPS; ++i) {
        const u32 a[4] = {x[i].x, x[i].y, x[i].z, x[i].w}, b[4] = {y[i].x, y[i].y, y[i].z, y[i].w};
        float sum = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            sum = fmaf(widen((u16)a[j], KIND), widen((u16)b[j], KIND), sum);
            sum = fmaf(widen((u16)(a[j] >> 16), KIND), widen((u16)(b[j] >> 16), KIND), sum);
        }
#pragma unroll
        for (int d = 8; d > 0; d /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, d);
        const int r = i * AT_ONCE + threadIdx.x / 16;
        if (lane == 0) {
            float from = -MINUS_INFINITY, delta = 0;
            if (tile.first + r < tile.length) {
                const long long row = (long long)head * sizes.tokens_q + tile.start + tile.first + r;
                const float given = lse[row];
                if (given != MINUS_INFINITY) from = given * LOG2_E, delta = sum - dlse[row];
            }
            stats[at * (2 * ROWS) + r] = from;
            stats[at * (2 * ROWS) + ROWS + r] = delta;
        }
    }
}

// ---- after: dq ---------------------------------------------------------------------------------------------------

// Of a block of queries and a head: scale what was summed, and round it. Queries that see nothing, or of no sequence, get 0.
extern "C" __global__ void __launch_bounds__(256)
finish(const float* sums, const int* cu_q, int* turns, u16* dq, long long stride_t, long long stride_h, Sizes sizes, float scale) {
    const int block = blockIdx.x / sizes.heads, head = blockIdx.x % sizes.heads;
    const int half = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32;
    const Tile<ROWS> tile(cu_q, block, sizes.sequences, sizes.tokens_q);
    if (tile.first >= tile.length) return;
    const int keys = length_of(ascending_of(turns, sizes), tile.span, sizes.sequences, sizes.tokens_k);
    const bool seen = min(min(tile.first + ROWS, tile.length) - 1 + keys_ahead(tile.length, keys, sizes.causal), keys - 1) >= 0;
    const float4* from = (const float4*)(sums + (((long long)head * sizes.blocks_q() + block) * 2 + half) * (DQ_BYTES / 8)) + thread;
    float x[48];
#pragma unroll
    for (int i = 0; i < 12; ++i) {
        const float4 y = seen ? __ldcs(from + i * 128) : make_float4(0, 0, 0, 0);
        x[4 * i] = y.x, x[4 * i + 1] = y.y, x[4 * i + 2] = y.z, x[4 * i + 3] = y.w;
    }
    store_columns<0, 96>(dq + (tile.start + tile.first) * stride_t + head * stride_h + half * 96, stride_t, x, scale, thread / 32 * 16 + lane / 4,
                         tile.length - tile.first, lane % 4);
}
