// What the parts of the decode kernel over the latent cache share: where things are in shared memory, the products, and how the cached
// positions of a batch are shared out over the GPU. mla/decode/hopper.cu tells how the kernel works, and what the options are.
#pragma once

#include "groups.cuh"
#include "handover.cuh"
#include "mla_parts.cuh"
#include "wgmma.cuh"

// ---- sizes ---------------------------------------------------------------------------------------------------------

constexpr int TILE = BLOCK * 128, TILES = (VALUE + ROPE) / 64, ROWS = TILES * TILE;  // bytes of 64 rows of 64 columns; of 64 rows
// Tiles are waited for in groups: two tiles each, as many columns as share one scale of e4m3, and last the rope part.
constexpr int TILE_GROUPS = 5;
__host__ __device__ constexpr int tiles_of(int group) { return group < 4 ? 2 : 1; }

constexpr int THREADS = 384;  // three warpgroups: two multiply, the third loads
constexpr int OFFSET_Q = 0, OFFSET_K = ROWS, OFFSET_P = OFFSET_K + 2 * ROWS, OFFSET_MAXIMA = OFFSET_P + TILE;
constexpr int OFFSET_SUMS = OFFSET_MAXIMA + 2 * BLOCK * 4, OFFSET_PIECES = OFFSET_SUMS + 4 * BLOCK * 4;
constexpr int OFFSET_BARRIERS = OFFSET_PIECES + 2 * 32;

__device__ __forceinline__ u32 full(u32 base, int stage, int group) { return base + OFFSET_BARRIERS + (stage * TILE_GROUPS + group) * 8; }
// Half 0 of a stage is the left half of the values, half 1 the right one.
__device__ __forceinline__ u32 empty(u32 base, int stage, int half) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + stage * 2 + half) * 8; }
// The rope part, of which there are no values, is free as soon as the scores have been made.
__device__ __forceinline__ u32 rope_empty(u32 base, int stage) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 6 + stage) * 8; }
__device__ __forceinline__ u32 q_full(u32 base) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 4) * 8; }
__device__ __forceinline__ u32 q_empty(u32 base) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 5) * 8; }

// The order in which the tiles of a stage are loaded and multiplied by: of stage 1 the right half comes first, as it is free first; the rope
// part comes last.
__device__ __forceinline__ int group_at(int stage, int i) { return i < 4 ? (i + 2 * stage) % 4 : 4; }

// ---- products ------------------------------------------------------------------------------------------------------

// 64 x 64 scores of a tile of queries and one of keys, both of 16 columns.
__device__ __forceinline__ void multiply_scores(float (&d)[32], u64 q, u64 k, int keep) {
#define SCORES(TYPE)                                                                                                      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0;}\n" \
                 : SUMS_32(0)                                                                                             \
                 : "l"(q), "l"(k), "r"(keep))
    if (OUT == 0) SCORES("bf16");
    else SCORES("f16");
}

// 64 x 256 values: 16 weights a row from registers, as `multiply_scores` leaves them, times 16 rows of values.
__device__ __forceinline__ void multiply_values(float (&d)[128], const u32* p, u64 v) {
#define VALUES(TYPE)                                                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" REGISTERS_128                          \
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"                                                       \
                 : SUMS_128(0)                                                                                            \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v))
    if (OUT == 0) VALUES("bf16");
    else VALUES("f16");
}

// ---- how the work is shared out ------------------------------------------------------------------------------------

// A run of blocks of 64 positions of one request, which one CTA works off for 64 of its query rows.
struct Piece {
    int request, first, blocks, length, fresh;  // blocks < 0: there is no more; fresh: how many of its tokens are new
    int slot;                                   // where a part of the result goes, < 0: this is all of it
};

__device__ __forceinline__ void write_piece(u32 at, const Piece& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.request), "r"(x.first), "r"(x.blocks), "r"(x.length) : "memory");
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + 16), "r"(x.fresh), "r"(x.slot) : "memory");
}
__device__ __forceinline__ Piece read_piece(u32 at) {
    Piece x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.request), "=r"(x.first), "=r"(x.blocks), "=r"(x.length) : "r"(at) : "memory");
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.fresh), "=r"(x.slot) : "r"(at + 16) : "memory");
    return x;
}

// The batch as the device knows it.
struct Batch {
    const int* lengths;
    const int* q_lengths;  // null: all of q_tokens
    int requests, capacity, q_tokens;
    __device__ __forceinline__ int length(int request) const { return min(max(__ldg(lengths + request), 0), capacity); }
    __device__ __forceinline__ int fresh(int request) const {
        return q_lengths == nullptr ? q_tokens : min(max(__ldg(q_lengths + request), 0), q_tokens);
    }
};

// The share of one of `parts` groups of CTAs, each of which has a CTA for each 64 query rows of a request. A request costs its blocks and, before
// them, BOUNDARY more for what begins and ends with it. The costs of all requests stand in a row, and each part gets as much of it as
// every other: where that cuts a request, its parts are combined later. Where whole requests, as many to a part as to every other, take at
// most WHOLE more than the even share, nothing is cut.
struct Share {
    int even;     // cost of an even share; 0: requests are whole
    int to;       // where the share ends, counted from where it begins
    int request;  // the next to look at
    int begin;    // where that request begins, counted from where the share does

    // The CTA's work. The scratch is 8 bytes a request and then 8 a warp; whoever uses that memory next needs a barrier.
    __device__ __forceinline__ void plan(const Batch& batch, int part, int parts, u32 scratch) {
        const GroupTable table{scratch + 256, batch.requests};
        plan_groups<THREADS, false>(table, scratch, batch.lengths, batch.capacity, [](int length) { return (length + BLOCK - 1) / BLOCK + BOUNDARY; });
        const int total = table.tiles();
        even = (total + parts - 1) / parts;
        // Whole requests: the most that a part gets.
        auto bound = [&](int p) { return (u32)(p * batch.requests) / (u32)parts; };
        int most = 0;
#pragma unroll 1
        for (int p = threadIdx.x % 32; p < parts; p += 32) most = max(most, table.at(bound(p + 1)).y - table.at(bound(p)).y);
        if (__reduce_max_sync(0xffffffffu, most) <= even + WHOLE) {
            even = 0;
            request = bound(part);
            begin = 0;
            to = table.at(bound(part + 1)).y - table.at(request).y;
            return;
        }
        const int from = part * even;
        to = min(even, total - from);
        // The last request that begins at or before `from`.
        int low = 0, high = batch.requests;
#pragma unroll 1
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (table.at(middle).y <= from) low = middle;
            else high = middle;
        }
        request = low;
        begin = table.at(low).y - from;
    }

    // The next piece; `count` says how many parts have the request that begins in it, 0: none does.
    __device__ __forceinline__ Piece next(const Batch& batch, int part, int& count) {
        Piece piece;
        count = 0;
        while (request < batch.requests && begin < to) {
            const int length = batch.length(request), blocks = (length + BLOCK - 1) / BLOCK, first_block = begin + BOUNDARY;
            piece.request = request;
            piece.length = length;
            piece.first = max(-first_block, 0);
            piece.blocks = min(to - first_block, blocks) - piece.first;
            piece.slot = piece.blocks == blocks ? -1 : piece.first > 0 ? 2 * part : 2 * part + 1;
            const bool nothing = blocks == 0 && begin >= 0;
            if (nothing) piece.blocks = 0, piece.slot = -1;
            ++request;
            begin = first_block + blocks;
            if (piece.blocks > 0 || nothing) {
                piece.fresh = batch.fresh(piece.request);
                if (piece.first == 0) count = even == 0 || nothing ? 1 : (begin - 1) / even + 1;
                return piece;
            }
        }
        piece.blocks = -1;
        return piece;
    }
};
