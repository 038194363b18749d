// The core of the block-scaled e4m3 products on sm_90a: C = A @ B.T with A in 1x128 tiles and B in 128x128 blocks or 1x128 tiles.
// A kernel includes this file and brings its own order of tiles, see below. docs/fp8_gemm.md tells how it works.
//
// One CTA computes BLOCK_M x BLOCK_N tiles of C, one after another, with three warpgroups. Warpgroups 0 and 1 multiply: each takes 64 rows,
// or every other 64 rows with WAVES 2. A product of 128 along K starts from a fresh accumulator (the tensor cores keep about 14 bits in
// e4m3) and is promoted, times both scales, into fp32 registers, while the other warpgroup's runs. Of warpgroup 2, one warp loads: for each
// 128 of K, the tiles of A and B and their scales go to one of STAGES buffers in shared memory. Two others have finished tiles stored. Two
// CTAs with a common tile of A (SHARED_A, side by side along N) or of B (along M) form a cluster: the first loads it for both.
//
// What bounds it is shared memory: of 256x128 tiles, a block of K reads 96 KB for the products and writes 48 KB, 1,152 clocks at 128 bytes a
// clock, where the tensor cores need 1,024. Measured: 1,165.
//
// `Tiles` says which tiles this CTA computes, in which order. Every thread that needs to know walks a copy of its own:
//   valid()         whether there is one more; next() goes on to it
//   row()           of A, and of A's scales, where the tile begins
//   b_row()         of B, and of the scales of 1x128 tiles of B, where it begins
//   b_scales(s, i)  where in the matrix `s` of 128x128 blocks' scales those of strip i of the tile are
//   column()        of C, where it begins
//   block()         of K, 128 wide, where its sum begins, 0 with B_ROWS 128; blocks(): how many there are, none for a tile of zeros
//   rows()          rows of C from row() on that it may write
//   store<ADD>(map, buffer, column, row): have a box of 64 rows stored, or added; `row` counts from the tile's first
//   advance()       next() for who only counts tiles, with ANY_ROW; begin(): go to the first tile, with IN_UNITS
//   spare_warp(out, lane): what the one warp that has nothing to do does meanwhile
//
// Before it includes this file it says, by a constant ANY_ROW, whether tiles begin at any row, and end after any: then a warpgroup leaves out
// its last 64 rows where none of them count. Otherwise row() is a multiple of 4.
//
// Options (-D):
//   WAVES       64-row products of a warpgroup: BLOCK_M = 128 * WAVES
//   BLOCK_N     columns of a tile and of a product, a multiple of 64
//   STAGES      blocks of K in flight
//   CLUSTER     CTAs that share a tile, 1 or 2: one of A with SHARED_A 1, else one of B
//   UNROLL      of the loop over K
//   B_ROWS      height of a tile of B with one scale: 128, or 1
//   OUT         0 bf16, 1 fp16, 2 fp32
//   BIAS        0 none, 1 bf16, 2 fp16, 3 fp32
//   ACCUMULATE  1: add to C instead of overwriting it
//   REGISTERS   of a thread that multiplies; the others have 504 - 2 * REGISTERS
//   AHEAD       with B_ROWS 1: for how many pairs of its columns a thread reads the scales before a block's products, see KEPT
//   ONE_READER  1: of a warp, only the lanes that release a stage read B's scales from it, and hand them on. compute-sanitizer's racecheck
//               takes an arrival for the reads of the arriving lane alone; this costs 1.3%. 0 if not defined.
//   IN_UNITS    1: with ANY_ROW, units of 64 rows of which none count are neither loaded nor multiplied nor handed over. 0 if not defined.
//   DIRECT      1: C is written by ordinary stores: rows that the accelerator cannot address, and adding to bf16 or fp16
#pragma once

#include "element.cuh"
#include "wgmma.cuh"

#ifndef ONE_READER
#define ONE_READER 0
#endif
#ifndef IN_UNITS
#define IN_UNITS 0
#endif

constexpr int BLOCK_M = 128 * WAVES, BLOCK_K = 128, UNITS = 2 * WAVES, UNIT_BYTES = 64 * BLOCK_K;
constexpr int A_BYTES = BLOCK_M * BLOCK_K, B_BYTES = BLOCK_N * BLOCK_K;
// With B_ROWS 128 a strip of columns has one scale.
constexpr int STRIP_N = B_ROWS == 1 ? BLOCK_N : BLOCK_N % 128 == 0 ? 128 : 64, STRIPS = BLOCK_N / STRIP_N;
// The accelerator copies scales of A from a multiple of 4 rows on. With ANY_ROW, where a tile may begin between two of these, it takes 132 in
// place of 128, to a multiple of 128 bytes. Beside B's scales the loading thread then writes a word for those that multiply: how many rows
// the tile has, times 4, and how many rows after a multiple of 4 the next tile begins.
constexpr int SA_COPIES = ANY_ROW ? WAVES : 1, SA_COPIED = ANY_ROW ? 132 * 4 : BLOCK_M * 4, SA_PITCH = ANY_ROW ? 640 : 512;
constexpr int SA_BYTES = SA_PITCH * WAVES, SB_BYTES = B_ROWS == 1 ? BLOCK_N * 4 : 16;
// What the accelerator loads for a stage, where it loads so many units of 64 rows.
__device__ __forceinline__ constexpr int loaded_bytes(int units) {
    return units * UNIT_BYTES + B_BYTES + (IN_UNITS ? (units + 1) / 2 : SA_COPIES) * SA_COPIED + (B_ROWS == 1 ? SB_BYTES : 0);
}
static_assert(!ANY_ROW || STRIPS <= 3, "the word that ANY_ROW needs is the fourth of B's scales");
static_assert(!ANY_ROW || !(DIRECT || BIAS), "who multiplies with ANY_ROW does not know where its tile is");
static_assert(!IN_UNITS || (ANY_ROW && CLUSTER == 1), "each CTA loads its own units");
// How many 64-row products a warpgroup has of a tile of so many rows.
__device__ __forceinline__ int waves_of(int rows, int group) {
    if (!ANY_ROW) return WAVES;
    return WAVES > 1 && rows > 128 + group * 64 ? 2 : !IN_UNITS || rows > group * 64;
}
constexpr u16 EVERYONE = (1 << CLUSTER) - 1;  // of a cluster
// C is handed over in boxes of 64 rows and 128 bytes, BOXES of them at once, from the first or the second half of a warpgroup's buffers.
constexpr int BOX_N = 128 / (int)sizeof(Element), BOXES = BLOCK_N / 64, HANDOVERS = WAVES * BLOCK_N / (BOX_N * BOXES), HALVES = WAVES;
constexpr int BOX_BYTES = DIRECT ? 0 : 64 * 128;

constexpr int OFFSET_A = 0, OFFSET_B = STAGES * A_BYTES, OFFSET_C = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_SA = OFFSET_C + 2 * HALVES * BOXES * BOX_BYTES, OFFSET_SB = OFFSET_SA + STAGES * SA_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_SB + STAGES * SB_BYTES, OFFSET_TABLE = OFFSET_BARRIERS + STAGES * 16;  // the kernel's from there on

#include "ring.cuh"

// Rows and columns of a cluster's tiles.
constexpr int CLUSTER_M = SHARED_A ? BLOCK_M : BLOCK_M * CLUSTER, CLUSTER_N = SHARED_A ? BLOCK_N * CLUSTER : BLOCK_N;

// Which tile of a matrix of `tall` by `wide` clusters' tiles is a CTA's part of number `index`: clusters walk GROUP of them in the direction in
// which their tiles lie side by side, then one step in the other. So the tiles that are computed at one time cover about as many rows as
// columns, which is the least to read.
struct Place {
    int m, n;
    __device__ __forceinline__ Place(int index, int tall, int wide, u32 rank) {
        const int along = SHARED_A ? wide : tall, across = SHARED_A ? tall : wide;
        const int group = index / (GROUP * across), first = group * GROUP, size = min(along - first, GROUP);
        const int inside = index - group * GROUP * across;
        const int i = (first + inside % size) * CLUSTER + rank, j = inside / size;
        m = SHARED_A ? j : i;
        n = SHARED_A ? i : j;
    }
};

// Where C is, and what is added to it. A tile's columns end at `columns`.
struct Output {
    const TensorMap* map;
    Element* c;
    const void* bias;
    int columns, stride;
};

// Volatile, so that the loads stay where they are used: gathered in front of the sums they spill registers.
__device__ __forceinline__ float bias_at(const Output& out, int col) {
    if (BIAS == 0 || col >= out.columns) return 0.f;
    if (BIAS == 3) {
        float x;
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"((const float*)out.bias + col));
        return x;
    }
    u16 x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"((const u16*)out.bias + col));
    return widen(x, BIAS == 1 ? 0 : 1);
}

// ---- loading ------------------------------------------------------------------------------------------------------

// One thread's work: fill the ring, block of K by block of K, tile by tile. Scales of 128x128 blocks of B, too few for the accelerator, it
// reads itself, a block ahead.
//
// Rows past the end of A are not asked for: the accelerator takes about 4 clocks to write each of them, as zeros, and 129x4096x7168 took 38 us
// in tiles of 128x64, not 22. `map_last`, if there is one, has boxes of as many rows as the last tile has. What lies in shared memory in place of
// the others reaches no row of C.
template <class Tiles>
__device__ __forceinline__ void load_tiles(Tiles tiles, u32 base, u32 rank, const TensorMap* map_a, const TensorMap* map_b,
                                           const TensorMap* map_sa, const TensorMap* map_sb, const float* sb, const TensorMap* map_last) {
    Stage stage;
    if constexpr (IN_UNITS) tiles.begin();
    while (tiles.valid()) {
        const int row = tiles.row(), scale_row = ANY_ROW ? row & ~3 : row, b_row = tiles.b_row(), first = tiles.block(), blocks = tiles.blocks();
        const int rows = min(tiles.rows(), BLOCK_M), missing = ANY_ROW || !map_last ? 0 : BLOCK_M - max(rows, 0);
        const float* scales[STRIPS];
        float next[STRIPS];
#pragma unroll
        for (int i = 0; i < STRIPS; ++i) {
            if (B_ROWS == 1) continue;
            scales[i] = tiles.b_scales(sb, i);
            next[i] = __ldg(scales[i]);
        }
        // Before the wait for the ring, which hides it. Behind a tile's first copies 8 groups of 4,096 rows in units, K 2,048, were 12% slower.
        tiles.next();
        const float word = ANY_ROW ? __int_as_float(rows * 4 + tiles.row() % 4) : 0.f;
#pragma unroll 1
        for (int block = 0; block < blocks; ++block, stage.advance()) {
            const int k = first + block;
            const int i = stage.index;
            const u32 a = base + OFFSET_A + i * A_BYTES, b = base + OFFSET_B + i * B_BYTES;
            const u32 sa = base + OFFSET_SA + i * SA_BYTES, sb = base + OFFSET_SB + i * SB_BYTES;
            barrier_wait(empty(base, i), stage.phase ^ 1);
            if (IN_UNITS) {
#pragma unroll
                for (int u = 0; u < UNITS; ++u)
                    if (u * 64 < rows) tma_load(a + u * UNIT_BYTES, map_a, full(base, i), k * BLOCK_K, row + u * 64);
#pragma unroll
                for (int j = 0; j < SA_COPIES; ++j)
                    if (j * 128 < rows) tma_load(sa + j * SA_PITCH, map_sa, full(base, i), scale_row + j * 128, k);
            } else if (CLUSTER == 1 || !SHARED_A) {
                if (missing == 0) tma_load(a, map_a, full(base, i), k * BLOCK_K, row);
                else if (missing < BLOCK_M) tma_load(a, map_last, full(base, i), k * BLOCK_K, row);
#pragma unroll
                for (int j = 0; j < SA_COPIES; ++j) tma_load(sa + j * SA_PITCH, map_sa, full(base, i), scale_row + j * 128, k);
            } else if (rank == 0) {
                if (missing == 0) tma_load_multicast(a, map_a, full(base, i), k * BLOCK_K, row, EVERYONE);
                else tma_load_multicast(a, map_last, full(base, i), k * BLOCK_K, row, EVERYONE);
#pragma unroll
                for (int j = 0; j < SA_COPIES; ++j) tma_load_multicast(sa + j * SA_PITCH, map_sa, full(base, i), scale_row + j * 128, k, EVERYONE);
            }
            if (CLUSTER == 1 || SHARED_A) {
                tma_load(b, map_b, full(base, i), k * BLOCK_K, b_row);
                if (B_ROWS == 1) tma_load(sb, map_sb, full(base, i), b_row, k);
            } else if (rank == 0) {
                tma_load_multicast(b, map_b, full(base, i), k * BLOCK_K, b_row, EVERYONE);
                if (B_ROWS == 1) tma_load_multicast(sb, map_sb, full(base, i), b_row, k, EVERYONE);
            }
            if (ANY_ROW) smem_store(sb + 12, word);
            if (B_ROWS != 1) {
#pragma unroll
                for (int j = 0; j < STRIPS; ++j) {
                    smem_store(sb + j * 4, next[j]);
                    if (block + 1 < blocks) next[j] = __ldg(scales[j] + block + 1);
                }
            }
            barrier_expect(full(base, i), loaded_bytes(IN_UNITS ? (rows + 63) / 64 : UNITS) - missing * BLOCK_K);
        }
    }
    barrier_wait(empty(base, stage.index), stage.phase ^ 1);
    barrier_arrive(full(base, stage.index));  // for the product that is started after the last tile
}

// ---- C -----------------------------------------------------------------------------------------------------------

// Write x to C, or add it to what is there.
__device__ __forceinline__ void store(Element* c, float x) {
#if OUT == 2
    *c = ACCUMULATE ? *c + x : x;
#else
    *c = (Element)pack(ACCUMULATE ? widen(*c, OUT) + x : x, 0.f);
#endif
}

__device__ __forceinline__ void write_directly(const float (&total)[WAVES][BLOCK_N / 2], const Output& out, int first_row, int row,
                                               int rows, int col, int lane) {
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = row + w * 128 + i * 8;
            if (r >= rows) continue;
            Element* c_row = out.c + (long long)(first_row + r) * out.stride;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                const int n = col + j * 8 + lane % 4 * 2;
                if (n < out.columns) store(c_row + n, total[w][4 * j + 2 * i] + bias_at(out, n));
                if (n + 1 < out.columns) store(c_row + n + 1, total[w][4 * j + 2 * i + 1] + bias_at(out, n + 1));
            }
        }
    }
}

// C goes from registers to shared memory, in the accelerator's 128-byte swizzle, and from there a warp of its own has it stored: a
// warpgroup that hands it to the accelerator itself waits about 800 clocks for that.
__device__ __forceinline__ void write_to_shared(const float (&total)[WAVES][BLOCK_N / 2], const Output& out, u32 buffers, int group, int warp, int lane,
                                                int col, int waves) {
    // Anew, so that what depends on them is not kept in registers through the loop over K.
    if (IN_UNITS) asm volatile("mov.u32 %0, %%laneid; mov.u32 %1, %%tid.x; bfe.u32 %1, %1, 5, 2;" : "=r"(lane), "=r"(warp));
#pragma unroll
    for (int h = 0; h < HANDOVERS; ++h) {
        if (IN_UNITS && h / (HANDOVERS / WAVES) >= waves) continue;
        named_sync<160>(free_again(group, h % HALVES));
#pragma unroll
        for (int i = 0; i < BOXES; ++i) {
            const u32 buffer = buffers + (h % HALVES * BOXES + i) * BOX_BYTES;
            const float* x = total[h / (HANDOVERS / WAVES)] + (h % (HANDOVERS / WAVES) * BOXES + i) * (BOX_N / 2);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int n = col + (h % (HANDOVERS / WAVES) * BOXES + i) * BOX_N + j * BOX_N / 4 + lane % 4 * 2;
                const float b0 = bias_at(out, n), b1 = bias_at(out, n + 1);
                if (OUT == 2) {  // 8 columns of 32 bits
                    const int r = warp * 16 + lane / 4;
                    const u32 at = buffer + r * 128 + (((j * 2 + lane % 4 / 2) ^ (r % 8)) * 16) + lane % 2 * 8;
                    smem_store2(at, x[4 * j] + b0, x[4 * j + 1] + b1);
                    smem_store2(at + 8 * 128, x[4 * j + 2] + b0, x[4 * j + 3] + b1);
                } else {  // 16 columns: four 8x8 matrices, rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
                    const int r = warp * 16 + lane % 16;
                    const float* y = x + 8 * j;
                    const float b2 = bias_at(out, n + 8), b3 = bias_at(out, n + 9);
                    smem_store_matrix(buffer + r * 128 + (((j * 2 + lane / 16) ^ (r % 8)) * 16), pack(y[0] + b0, y[1] + b1),
                                      pack(y[2] + b0, y[3] + b1), pack(y[4] + b2, y[5] + b3), pack(y[6] + b2, y[7] + b3));
                }
            }
        }
        proxy_fence();
        named_arrive<160>(written(group, h % HALVES));
    }
}

// A warp's work: have the tiles of one warpgroup stored. They leave the L2 first: 12% at K = 512, where C is nearly all that moves.
template <class Tiles> __device__ __forceinline__ void store_tiles(Tiles tiles, u32 buffers, int group, const TensorMap* map_c) {
    const bool elected = elect_one();
#pragma unroll
    for (int i = 0; i < HALVES; ++i) named_arrive<160>(free_again(group, i));
    if constexpr (IN_UNITS) tiles.begin();
    for (; tiles.valid(); tiles.next()) {
        const int handovers = IN_UNITS ? HANDOVERS / WAVES * waves_of(tiles.rows(), group) : HANDOVERS;
#pragma unroll
        for (int h = 0; h < HANDOVERS; ++h) {
            if (IN_UNITS && h >= handovers) continue;
            named_sync<160>(written(group, h % HALVES));
            if (elected) {
                const int row = (h / (HANDOVERS / WAVES) * 2 + group) * 64;
#pragma unroll
                for (int i = 0; i < BOXES; ++i) {
                    const int column = tiles.column() + (h % (HANDOVERS / WAVES) * BOXES + i) * BOX_N;
                    const u32 buffer = buffers + (h % HALVES * BOXES + i) * BOX_BYTES;
                    tiles.template store<ACCUMULATE>(map_c, buffer, column, row);
                }
                tma_store_commit();
            }
            // The half that was handed over before this one: by now the accelerator has read it.
            if (h > 0 || HALVES == 1) {
                if (elected) tma_store_wait_read<HALVES - 1>();
                __syncwarp();
                named_arrive<160>(free_again(group, (h + HALVES - 1) % HALVES));
            }
        }
        if (HALVES > 1 && handovers > 0) {
            if (elected) tma_store_wait_read<0>();
            __syncwarp();
            named_arrive<160>(free_again(group, (handovers - 1) % HALVES));
        }
    }
}

// ---- products ----------------------------------------------------------------------------------------------------

// Scales of the tile's columns that a thread holds: x and y of pair j belong to accumulators 4j to 4j + 3, or both to strip j.
constexpr int PAIRS = B_ROWS == 1 ? BLOCK_N / 8 : STRIPS;
// So many of them are read before a block's first product and kept for both; the others are read when they are used, for each product anew.
// Each thread's copy of a scale takes its 4 bytes of what shared memory can deliver, so this is what counts: of 256x128 tiles and a block of K,
// 512 clocks with none kept, 384 with half of them, beside 1,152 for the products.
constexpr int KEPT = B_ROWS == 1 && AHEAD < PAIRS ? AHEAD : PAIRS;
constexpr bool ALL_KEPT = KEPT == PAIRS;

// total += part times both scales.
__device__ __forceinline__ void promote(float (&total)[BLOCK_N / 2], const float (&part)[BLOCK_N / 2], float scale_0, float scale_1,
                                        const float2 (&kept)[KEPT], u32 scales) {
#pragma unroll
    for (int j = 0; j < BLOCK_N / 8; ++j) {
        const float2 s = B_ROWS != 1 ? kept[j * 8 / STRIP_N] : j < KEPT ? kept[min(j, KEPT - 1)] : smem_load2(scales + j * 32);
        total[4 * j] = fma(part[4 * j], mul(scale_0, s.x), total[4 * j]);
        total[4 * j + 1] = fma(part[4 * j + 1], mul(scale_0, s.y), total[4 * j + 1]);
        total[4 * j + 2] = fma(part[4 * j + 2], mul(scale_1, s.x), total[4 * j + 2]);
        total[4 * j + 3] = fma(part[4 * j + 3], mul(scale_1, s.y), total[4 * j + 3]);
    }
}

// A warpgroup's work: multiply what the ring holds, and write C. The loop over K is plain and unrolled, so that the compiler spreads waiting
// for the next stage and the descriptors over the sums. A product is started as soon as its registers are free, the next tile's first one
// before C is written; after the last tile, one of whatever lies in shared memory.
template <class Tiles>
__device__ __forceinline__ void multiply_tiles(Tiles tiles, u32 base, int group, int warp, int lane, const Output& out) {
    if constexpr (IN_UNITS) tiles.begin();
    if (!tiles.valid()) return;
    const int row = group * 64 + warp * 16 + lane / 4, column = lane % 4 * 2;  // of this thread's first accumulator, in the tile
    // The lower halves of descriptors, through a shuffle, so that the compiler knows them to be the same in all lanes.
    const u32 first_a = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_A + group * 64 * BLOCK_K), 0);
    const u32 first_b = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_B), 0);
    Stage stage;
    float part[BLOCK_N / 2], scale_0[WAVES], scale_1[WAVES];
    float2 columns[KEPT];
    u32 at = (row + (ANY_ROW ? tiles.row() % 4 : 0)) * 4;  // where this thread's first scale of A is
    auto start = [&](int w) {
        const u32 i = stage.index, scales_a = base + OFFSET_SA + i * SA_BYTES + at, scales_b = base + OFFSET_SB + i * SB_BYTES;
        const u32 a = first_a + i * (A_BYTES / 16) + w * (128 * BLOCK_K / 16), b = first_b + i * (B_BYTES / 16);
        // The block's scales before its products: behind them, reads wait until the tensor cores have read their operands.
        if (w == 0) {
#pragma unroll
            for (int j = 0; j < KEPT; ++j) {
                if (B_ROWS == 1) columns[j] = smem_load2(scales_b + column * 4 + j * 32);
                else columns[j].x = columns[j].y = !ONE_READER || lane < CLUSTER ? smem_load(scales_b + j * 4) : 0.f;
            }
        }
#pragma unroll
        for (int j = 0; j < WAVES; ++j)
            if (ALL_KEPT ? w == 0 : j == w) scale_0[j] = smem_load(scales_a + j * SA_PITCH), scale_1[j] = smem_load(scales_a + j * SA_PITCH + 32);
        registers_fence(part);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(part, operand(a + j * 2), operand(b + j * 2), j != 0);
        wgmma_commit();
        registers_fence(part);
        if (ONE_READER && w == 0 && B_ROWS != 1) {
#pragma unroll
            for (int j = 0; j < STRIPS; ++j) columns[j].x = columns[j].y = __shfl_sync(0xffffffffu, columns[j].x, 0);
        }
    };
    barrier_wait(full(base, 0), 0);
    start(0);
    while (tiles.valid()) {
        float total[WAVES][BLOCK_N / 2];
#pragma unroll
        for (int w = 0; w < WAVES; ++w)
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; ++i) total[w][i] = 0.f;
        int waves = WAVES;
        u32 next_at = at;
        if (ANY_ROW) {
            // Through a shuffle, so that the compiler knows that the whole warp goes one way.
            const int word = __shfl_sync(0xffffffffu, lane < CLUSTER ? __float_as_int(smem_load(base + OFFSET_SB + stage.index * SB_BYTES + 12)) : 0, 0);
            next_at = (row + word % 4) * 4;
            waves = waves_of(word / 4, group);
        }
#pragma unroll
        for (int used = IN_UNITS ? 0 : ANY_ROW && WAVES > 1 ? WAVES - 1 : WAVES; used <= WAVES; ++used) {
            if (used != waves) continue;
            if (used == 0) {  // only the product that was started before it was known
                wgmma_wait<0>();
#pragma unroll 1
                for (int k = tiles.blocks(); k > 0; --k) {
                    release(base, stage.index, lane);
                    stage.advance();
                    barrier_wait(full(base, stage.index), stage.phase);
                }
                at = next_at;
                start(0);
                continue;
            }
#pragma unroll UNROLL
            for (int k = tiles.blocks(); k > 0; --k) {
#pragma unroll
                for (int w = 0; w < used; ++w) {
                    const bool last = w == used - 1;
                    wgmma_wait<0>();
                    registers_fence(part);
                    if (ALL_KEPT && last) release(base, stage.index, lane);
                    promote(total[w], part, scale_0[w], scale_1[w], columns, base + OFFSET_SB + stage.index * SB_BYTES + column * 4);
                    if (!ALL_KEPT && last) release(base, stage.index, lane);
                    if (last) {
                        stage.advance();
                        barrier_wait(full(base, stage.index), stage.phase);
                        if (ANY_ROW && k == 1) at = next_at;
                    }
                    start((w + 1) % used);
                }
            }
        }
        if (BIAS) wgmma_wait<0>();  // adding it takes the registers of the product that was started: it is started again
        if (DIRECT) {
            write_directly(total, out, tiles.row(), row, tiles.rows(), tiles.column(), lane);
        } else {
            write_to_shared(total, out, base + OFFSET_C + group * HALVES * BOXES * BOX_BYTES, group, warp, lane, tiles.column(), waves);
        }
        if (BIAS) start(0);
        if constexpr (ANY_ROW) tiles.advance();
        else tiles.next();
    }
    wgmma_wait<0>();
}

// The whole kernel, for a grid of as many clusters as the GPU holds.
template <class Tiles>
__device__ __forceinline__ void block_scaled_gemm(Tiles tiles, u32 base, const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_sa,
                                                  const TensorMap* map_sb, const float* sb, const Output& out, const TensorMap* map_last = nullptr) {
    // Through a shuffle, so that the compiler knows them to be the same in all lanes.
    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4;
    const int lane = threadIdx.x % 32;
    if (threadIdx.x == 0) make_barriers(base);
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();
    if (group == 2) {
        registers_shrink<504 - 2 * REGISTERS>();
        if (!DIRECT && warp < 2) store_tiles(tiles, base + OFFSET_C + warp * HALVES * BOXES * BOX_BYTES, warp, out.map);
        if (warp == 3) tiles.spare_warp(out, lane);
        if (warp == 2 && elect_one())
            load_tiles(tiles, base, CLUSTER > 1 ? cluster_rank() : 0, map_a, map_b, map_sa, map_sb, sb, map_last);
    } else {
        registers_grow<REGISTERS>();
        multiply_tiles(tiles, base, group, warp, lane, out);
    }
    if (CLUSTER > 1) cluster_sync();  // a CTA must not end while the other may still arrive at its barriers
}
