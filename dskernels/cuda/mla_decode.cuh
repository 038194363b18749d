// Shared by the parts of the decode kernel over the latent cache: addresses in shared memory, and the products. mla/decode/hopper.cu explains how the
// kernel works, and its options.
#pragma once

#include "mla_work.cuh"
#include "wgmma.cuh"

// ---- sizes ---------------------------------------------------------------------------------------------------------

constexpr int TILE = BLOCK * 128, TILES = (VALUE + ROPE) / 64, ROWS = TILES * TILE;  // bytes of 64 rows of 64 columns; tiles; bytes of 64 rows
// Tiles are waited for in groups: two tiles each, which are the columns that share one e4m3 scale, and last the rope part.
constexpr int TILE_GROUPS = 5;
__host__ __device__ constexpr int tiles_of(int group) { return group < 4 ? 2 : 1; }

constexpr int OFFSET_Q = 0, OFFSET_K = ROWS, OFFSET_P = OFFSET_K + 2 * ROWS, OFFSET_MAXIMA = OFFSET_P + TILE;
constexpr int OFFSET_SUMS = OFFSET_MAXIMA + 2 * BLOCK * 4, OFFSET_PIECES = OFFSET_SUMS + 4 * BLOCK * 4;
constexpr int OFFSET_BARRIERS = OFFSET_PIECES + 2 * 32;

__device__ __forceinline__ u32 full(u32 base, int stage, int group) { return base + OFFSET_BARRIERS + (stage * TILE_GROUPS + group) * 8; }
// Half 0 of a stage is the left half of the values, half 1 the right one.
__device__ __forceinline__ u32 empty(u32 base, int stage, int half) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + stage * 2 + half) * 8; }
// The rope part, which has no values, is free as soon as the scores have been computed.
__device__ __forceinline__ u32 rope_empty(u32 base, int stage) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 6 + stage) * 8; }
__device__ __forceinline__ u32 q_full(u32 base) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 4) * 8; }
__device__ __forceinline__ u32 q_empty(u32 base) { return base + OFFSET_BARRIERS + (2 * TILE_GROUPS + 5) * 8; }

// The order in which the tiles of a stage are loaded and multiplied: for stage 1 the right half comes first, as it becomes free first; the rope part
// is last.
__device__ __forceinline__ int group_at(int stage, int i) { return i < 4 ? (i + 2 * stage) % 4 : 4; }

// ---- products ------------------------------------------------------------------------------------------------------

// 64 x 64 scores from a tile of queries and a tile of keys, both with 16 columns.
__device__ __forceinline__ void multiply_scores(float (&d)[32], u64 q, u64 k, int keep) {
#define SCORES(TYPE)                                                                                                      \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32." TYPE "." TYPE " {" REGISTERS_32 "}, %32, %33, p, 1, 1, 0, 0;}\n" \
                 : SUMS_32(0)                                                                                             \
                 : "l"(q), "l"(k), "r"(keep))
    if (OUT == 0) SCORES("bf16");
    else SCORES("f16");
}

// 64 x 256 values: 16 weights per row from registers, in the layout in which `multiply_scores` leaves them, times 16 rows of values.
__device__ __forceinline__ void multiply_values(float (&d)[128], const u32* p, u64 v) {
#define VALUES(TYPE)                                                                                                      \
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE " {" REGISTERS_128                          \
                 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;\n"                                                       \
                 : SUMS_128(0)                                                                                            \
                 : "r"(p[0]), "r"(p[1]), "r"(p[2]), "r"(p[3]), "l"(v))
    if (OUT == 0) VALUES("bf16");
    else VALUES("f16");
}
