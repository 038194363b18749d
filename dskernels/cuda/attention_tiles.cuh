// The tiles of queries of packed sequences, whose lengths only the device knows. The kernel `plan`, a single CTA, finds them and puts them into an
// order; the attention kernel launched after it takes them from that list.
//
// A file that includes this one first defines two constants: ROWS, the number of queries of a tile, and BLOCK_N, the number of keys of a block.
#pragma once

#include "ptx.cuh"

// A tile as `plan` writes it to the list.
struct alignas(32) Tile {
    int row, rows;     // its first query, and the number of its queries, at least 1
    int key, key_end;  // the range of the keys of its sequence
    int seen;          // number of keys that its first query sees; not clamped, since each later query sees one more
    int blocks;        // number of blocks of keys that any of its queries sees
    int head, unused;  // for use by the attention kernel
};
struct alignas(32) Work {
    int next, tiles;  // a counter of the attention kernel, which begins at 0; the number of tiles
    Tile list[1];
};

struct Sizes {
    int tokens_q, tokens_k, sequences, causal;
    int chunk;  // tiles whose sequences begin within this many keys are computed at about the same time, see `plan`
};

// Edge i of the spans that divide [0, tokens). Edges are 0, then the sequences + 1 values of cu_seqlens, then `tokens`. Whatever the values are, an
// edge is within [0, tokens].
__device__ __forceinline__ int edge(const int* cu, int i, int sequences, int tokens) {
    if (i <= 0) return 0;
    if (i > sequences + 1) return tokens;
    return min(max(__ldg(cu + i - 1), 0), tokens);
}

// Tile i of tokens_q / ROWS + sequences + 2, a number that is never too small; surplus tiles have no rows. Span 0 is what lies before the first
// sequence, span s the s-th sequence, the last span what lies after all of them. The first tile of a span has the number edge / ROWS + span.
__device__ __forceinline__ Tile find_tile(const int* cu_q, const int* cu_k, const Sizes& sizes, int i) {
    int low = 0, high = sizes.sequences + 2;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (edge(cu_q, middle, sizes.sequences, sizes.tokens_q) / ROWS + middle <= i) low = middle;
        else high = middle;
    }
    const int start = edge(cu_q, low, sizes.sequences, sizes.tokens_q), end = edge(cu_q, low + 1, sizes.sequences, sizes.tokens_q);
    const int first = (i - start / ROWS - low) * ROWS;
    Tile tile{};
    tile.row = start + first;
    tile.rows = min(end - tile.row, ROWS);
    int keys = 0;
    if (low >= 1 && low <= sizes.sequences) {
        tile.key = edge(cu_k, low, sizes.sequences, sizes.tokens_k);
        keys = max(edge(cu_k, low + 1, sizes.sequences, sizes.tokens_k) - tile.key, 0);
    }
    tile.key_end = tile.key + keys;
    tile.seen = sizes.causal ? keys - (end - start) + 1 + first : keys;
    const int last = sizes.causal ? min(tile.seen + tile.rows - 1, keys) : keys;
    tile.blocks = (max(last, 0) + BLOCK_N - 1) / BLOCK_N;
    return tile;
}

constexpr int PLAN_THREADS = 1024, PLAN_WARPS = PLAN_THREADS / 32;
constexpr int CHUNKS = 32, LEVELS = 256, BUCKETS = CHUNKS * LEVELS;

// Sort the tiles into buckets: by the chunk of keys in which their sequence begins, so that the keys of tiles that are computed at the same time stay
// in the L2; and within a chunk by length, the longest first, so that all multiprocessors finish at about the same time.
extern "C" __global__ void __launch_bounds__(PLAN_THREADS, 1)
plan(const int* __restrict__ cu_q, const int* __restrict__ cu_k, Work* work, Sizes sizes) {
    __shared__ int places[BUCKETS];
    __shared__ int sums[PLAN_WARPS];
    launch_dependents();
    const int most = sizes.tokens_q / ROWS + sizes.sequences + 2, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int longest = (sizes.tokens_k + BLOCK_N - 1) / BLOCK_N;
    auto bucket = [&](const Tile& tile) {
        const int level = longest < LEVELS ? tile.blocks : (int)((long long)tile.blocks * (LEVELS - 1) / longest);
        return tile.key / sizes.chunk * LEVELS + LEVELS - 1 - level;
    };
    for (int i = threadIdx.x; i < BUCKETS; i += PLAN_THREADS) places[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < most; i += PLAN_THREADS) {
        const Tile tile = find_tile(cu_q, cu_k, sizes, i);
        if (tile.rows > 0) atomicAdd(places + bucket(tile), 1);
    }
    __syncthreads();
    // Find where each bucket begins: an exclusive sum over the buckets of a thread, then of a warp, then of the CTA.
    int* mine = places + threadIdx.x * (BUCKETS / PLAN_THREADS);
    int count = 0;
    for (int i = 0; i < BUCKETS / PLAN_THREADS; ++i) count += mine[i];
    int place = count;
    for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, place, d);
        if (lane >= d) place += before;
    }
    if (lane == 31) sums[warp] = place;
    place -= count;
    __syncthreads();
    for (int w = 0; w < warp; ++w) place += sums[w];
    if (threadIdx.x == PLAN_THREADS - 1) work->next = 0, work->tiles = place + count;
    for (int i = 0; i < BUCKETS / PLAN_THREADS; ++i) {
        const int tiles = mine[i];
        mine[i] = place;
        place += tiles;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < most; i += PLAN_THREADS) {
        const Tile tile = find_tile(cu_q, cu_k, sizes, i);
        if (tile.rows > 0) work->list[atomicAdd(places + bucket(tile), 1)] = tile;
    }
}
