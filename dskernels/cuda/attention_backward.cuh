// What the gradient of attention does before and after its main kernel, on sm_90a: the kernel `prepare` computes delta, the kernel `finish` scales
// and rounds dq; and how all of them find the sequences. The main kernel, and what the names mean, are in mla/prefill/hopper_backward.cu.
//
// Options (-D):
//   KIND   dtype of the inputs: 0 bf16, 1 fp16
#pragma once

#include "attention.cuh"

constexpr bool FP16 = KIND == 1;
constexpr int QK_DIM = 192, V_DIM = 128, ROWS = 64, KEYS = 128;  // a block is ROWS queries, a tile is KEYS keys
constexpr int DQ_BYTES = ROWS * QK_DIM * 4;
constexpr float LOG2_E = 1.4426950408889634f;

// ---- where things are --------------------------------------------------------------------------------------------

struct Sizes {
    int tokens_q, tokens_k, sequences, heads, heads_k, causal;
    // The number of blocks of queries, and of tiles of keys, of a head; it never is too small, and some of them are empty.
    __device__ __forceinline__ int blocks_q() const { return tokens_q / ROWS + sequences + 2; }
    __device__ __forceinline__ int tiles_k() const { return tokens_k / KEYS + sequences + 2; }
};

// `turns` has, for each head and block of queries, the tile of keys whose turn it is to add to this block. After these comes the number of tiles that
// have been taken, and then cu_seqlens_k made ascending: otherwise no CTA might find a certain tile of keys, and its turn would be waited for
// forever.
__device__ __forceinline__ int* counter_of(int* turns, const Sizes& sizes) { return turns + (long long)sizes.heads * sizes.blocks_q(); }
__device__ __forceinline__ int* ascending_of(int* turns, const Sizes& sizes) { return counter_of(turns, sizes) + 1; }

// Edge i of the spans that divide [0, tokens). Edges are 0, then the sequences + 1 values of cu_seqlens, then `tokens`: so span 0 is what lies before
// the first sequence, span s the s-th sequence, and the last span what lies after all of them. Whatever the values are, edges are within
// [0, tokens].
__device__ __forceinline__ int edge(const int* cu, int i, int sequences, int tokens) {
    if (i <= 0) return 0;
    if (i > sequences + 1) return tokens;
    return min(max(__ldg(cu + i - 1), 0), tokens);
}

// Tile i of SIZE tokens: the span that it belongs to, where this begins and how long it is, and where in the span the tile begins. The first tile of
// a span has the number edge / SIZE + span. This leaves each span as many tiles as it needs; surplus ones begin at its end or later.
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
// The number of tokens of a span's sequence; 0 for the first and the last span, which are no sequences.
__device__ __forceinline__ int length_of(const int* cu, int span, int sequences, int tokens) {
    if (span < 1 || span > sequences) return 0;
    return max(edge(cu, span + 1, sequences, tokens) - edge(cu, span, sequences, tokens), 0);
}
// The difference `ahead`: query i of a sequence sees the keys up to i + ahead.
__device__ __forceinline__ int keys_ahead(int queries, int keys, int causal) { return causal ? keys - queries : 1 << 29; }

// ---- 16-bit rows from registers ----------------------------------------------------------------------------------

// Store 32 columns of one of a thread's rows. Each lane has four pairs of columns, which are 8 columns apart; the four lanes of a quad transpose
// them, so that each writes 16 bytes, the 8 columns from 8 * (lane % 4) on.
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

// Store columns FROM to TO of a thread's two rows of a product, times `scale`, to rows `row` and `row` + 8 of a matrix with `rows` rows.
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

// A warp's work: clamp `count` values to [0, tokens] and replace them by their running maximum.
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

// Each CTA has one block of queries of a head: it writes their lse in units of log 2 and their delta to `stats`, and sets the block's turn to 0. One
// more block per head makes cu_seqlens_k ascending and resets the counter of tiles. A query that sees no key gets lse inf instead of -inf, so that
// its weights p become 0, and so do the rows after the end of the sequence.
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

// Each CTA has one block of queries of a head: it scales the sums of dq and rounds them. Queries that see no key, or belong to no sequence, get 0.
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
