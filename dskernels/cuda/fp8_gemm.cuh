// The core of the block-scaled e4m3 products on sm_90a: C = A @ B.T with A in 1x128 tiles and B in 128x128 blocks or 1x128 tiles, each with an fp32
// scale. It is not a kernel: a .cu file includes it, provides the order of the tiles (`Tiles`, below), and calls `block_scaled_gemm`.
// docs/fp8_gemm.md explains it with a picture.
//
// A persistent CTA of three warpgroups (384 threads) computes BLOCK_M x BLOCK_N tiles of C one after another. For each block of 128 along K, the
// length of one scale, the operands pass through one of STAGES buffers, the pipeline stages, in shared memory (see ring.cuh):
//
//     warpgroup 2, warp 2    one thread loads a block's tiles of A and B by TMA, and their scales
//           |  full[stage]           ^  empty[stage]
//           v                        |
//     warpgroups 0 and 1     multiply: part = A @ B.T of this block, by wgmma; then promote: total += part * scale of A * scale of B
//           |  written(group)        ^  free_again(group)
//           v                        |
//     warpgroup 2, warps 0 and 1     each stores the tiles of C of one multiplying warpgroup, from shared memory, by TMA
//     warpgroup 2, warp 3    is spare: `Tiles` may give it something to do
//
// A tile's rows are divided into units of 64, the height of a wgmma. Warpgroup 0 multiplies unit 0 and, with WAVES 2, unit 2; warpgroup 1 multiplies
// unit 1 and unit 3. Each product of 128 along K starts from a zero accumulator, since the tensor cores keep only about 14 bits while they accumulate
// e4m3; the result is promoted into fp32 registers. While one warpgroup promotes, the other one's wgmma keeps the tensor cores busy.
//
// Two CTAs may form a cluster. Their tiles are adjacent along N and share the tile of A (SHARED_A), or adjacent along M and share the tile of B. The
// first CTA loads the shared tile for both, by multicast.
//
// The limit is the bandwidth of shared memory: with 256x128 tiles, a block of K reads 96 KB for the products and writes 48 KB. That takes 1,152
// clocks at 128 bytes per clock, while the tensor cores need 1,024. Measured: 1,165.
//
// Shared memory, in this order: STAGES tiles of A, STAGES tiles of B, the buffers from which C is stored, STAGES sets of scales of A and of B, the
// barriers, and from OFFSET_TABLE on whatever the kernel needs.
//
// `Tiles` says which tiles this CTA computes, and in which order. Every thread that needs this has its own copy and steps through the same sequence:
//   valid()         whether the current tile exists; next() goes on to the following one
//   row()           first row of the tile in A and in A's scales
//   b_row()         first row of the tile in B and, if B is in 1x128 tiles, in B's scales
//   b_scales(s, i)  address, in the matrix `s` of the scales of 128x128 blocks, of the scales of strip i of the tile
//   column()        first column of the tile in C
//   block()         first block of K of the sum, in units of 128; always 0 with B_ROWS 128
//   blocks()        number of blocks of K; 0 for a tile of zeros
//   rows()          number of rows of C, from row() on, that may be written; possibly more than BLOCK_M, possibly none
//   store<ADD>(map, buffer, column, row): store a box of 64 rows of C by TMA, or add it; `row` is relative to the tile's first row
//   advance()       with ANY_ROW: next() for threads that need only valid() and blocks()
//   begin()         with IN_UNITS: go to the first tile
//   spare_warp(out, lane): the work of the spare warp, possibly nothing
//
// Before including this file, the kernel defines a constant ANY_ROW. If it is true, a tile may begin at any row and contain any number of rows, and a
// warpgroup skips its second unit of 64 rows if the tile has no rows there. Otherwise row() is a multiple of 4.
//
// Options (-D):
//   WAVES       units of 64 rows per multiplying warpgroup, 1 or 2: BLOCK_M = 128 * WAVES
//   BLOCK_N     columns of a tile, and of a wgmma; a multiple of 64
//   STAGES      pipeline stages: blocks of K in flight
//   CLUSTER     CTAs that share a tile, 1 or 2: a tile of A with SHARED_A 1, otherwise of B
//   GROUP       width of the strips of clusters in which tiles are ordered, see `Place`
//   UNROLL      unroll factor of the loop over K
//   B_ROWS      rows of B that share one scale: 128, or 1
//   OUT         dtype of C: 0 bf16, 1 fp16, 2 fp32
//   BIAS        dtype of the bias: 0 no bias, 1 bf16, 2 fp16, 3 fp32
//   ACCUMULATE  1: add to C instead of overwriting it
//   REGISTERS   registers of a multiplying thread; those of warpgroup 2 have 504 - 2 * REGISTERS
//   AHEAD       with B_ROWS 1: for how many pairs of its columns a thread reads the scales before a block's products, see KEPT
//   ONE_READER  1: in each warp, only the lanes that release a stage read B's scales from it, and pass them on by shuffle. compute-sanitizer's
//               racecheck credits an arrival only with the reads of the arriving lane; satisfying it costs 1.3%. 0 if not defined.
//   IN_UNITS    1: with ANY_ROW, units of 64 rows without a row of the tile are neither loaded, nor multiplied, nor stored. 0 if not defined.
//   DIRECT      1: C is written by ordinary stores: for rows that are not aligned for TMA, and for adding to bf16 or fp16
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
// With B_ROWS 128, the tile is divided into strips of columns that have one scale of B each per block of K. With B_ROWS 1 every column has its own.
constexpr int STRIP_N = B_ROWS == 1 ? BLOCK_N : BLOCK_N % 128 == 0 ? 128 : 64, STRIPS = BLOCK_N / STRIP_N;
// TMA copies need 16-byte alignment, so scales of A are copied from a multiple of 4 rows on. With ANY_ROW, a tile may begin between two multiples; so
// 132 scales are copied instead of 128, once per 128 rows, each time to a multiple of 128 bytes. In addition, the loading thread then writes one word
// next to B's scales for the multiplying warpgroups: 4 times the number of rows of this tile, plus the first row of the next tile modulo 4.
constexpr int SA_COPIES = ANY_ROW ? WAVES : 1, SA_COPIED = ANY_ROW ? 132 * 4 : BLOCK_M * 4, SA_PITCH = ANY_ROW ? 640 : 512;
constexpr int SA_BYTES = SA_PITCH * WAVES, SB_BYTES = B_ROWS == 1 ? BLOCK_N * 4 : 16;
// The bytes that TMA writes to a stage if it loads `units` units of 64 rows of A.
__device__ __forceinline__ constexpr int loaded_bytes(int units) {
    return units * UNIT_BYTES + B_BYTES + (IN_UNITS ? (units + 1) / 2 : SA_COPIES) * SA_COPIED + (B_ROWS == 1 ? SB_BYTES : 0);
}
static_assert(!ANY_ROW || STRIPS <= 3, "the word that ANY_ROW needs is the fourth of B's scales");
static_assert(!ANY_ROW || !(DIRECT || BIAS), "who multiplies with ANY_ROW does not know where its tile is");
static_assert(!IN_UNITS || (ANY_ROW && CLUSTER == 1), "each CTA loads its own units");
// How many units of 64 rows warpgroup `group` multiplies in a tile of `rows` rows.
__device__ __forceinline__ int waves_of(int rows, int group) {
    if (!ANY_ROW) return WAVES;
    return WAVES > 1 && rows > 128 + group * 64 ? 2 : !IN_UNITS || rows > group * 64;
}
constexpr u16 EVERYONE = (1 << CLUSTER) - 1;  // multicast mask: all CTAs of the cluster
// C passes to the storing warps in boxes of 64 rows and 128 bytes. A handover is BOXES of them, through one of the HALVES of a warpgroup's buffers in
// turn, so that with WAVES 2 one half is filled while the other is stored.
constexpr int BOX_N = 128 / (int)sizeof(Element), BOXES = BLOCK_N / 64, HANDOVERS = WAVES * BLOCK_N / (BOX_N * BOXES), HALVES = WAVES;
constexpr int BOX_BYTES = DIRECT ? 0 : 64 * 128;

constexpr int OFFSET_A = 0, OFFSET_B = STAGES * A_BYTES, OFFSET_C = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_SA = OFFSET_C + 2 * HALVES * BOXES * BOX_BYTES, OFFSET_SB = OFFSET_SA + STAGES * SA_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_SB + STAGES * SB_BYTES, OFFSET_TABLE = OFFSET_BARRIERS + STAGES * 16;

#include "ring.cuh"
#include "fp8_gemm_epilogue.cuh"

// Rows and columns that a cluster's tiles cover together.
constexpr int CLUSTER_M = SHARED_A ? BLOCK_M : BLOCK_M * CLUSTER, CLUSTER_N = SHARED_A ? BLOCK_N * CLUSTER : BLOCK_N;

// The position (m, n), in tiles, of this CTA's tile of cluster number `index`, in a matrix of `tall` by `wide` clusters. The order is GROUP clusters
// in the direction in which a cluster's tiles are adjacent, then one step in the other direction, and so on. Thus the tiles that are computed at the
// same time cover about as many rows as columns, which minimises what they read.
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

// ---- loading ------------------------------------------------------------------------------------------------------

// The loading thread's work: fill the stages in turn, for all blocks of K of all tiles. The scales of 128x128 blocks of B are too few for TMA; the
// thread loads them into registers, one block ahead, and stores them to the stage itself.
//
// Rows past the end of A are not requested: TMA takes about 4 clocks to write each of them as zeros, and 129x4096x7168 took 38 us in tiles of 128x64
// instead of 22. `map_last`, unless it is null, has boxes with as many rows as the last tile has. Whatever shared memory then holds for the other
// rows does not reach any row of C.
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
        // Finding the next tile here lets the wait for the ring hide it. Placed after a tile's first copies, it made 8 groups of 4,096 rows in units,
        // K 2,048, 12% slower.
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
    barrier_arrive(full(base, stage.index));  // for the product that the multiplying warpgroups start after the last tile, see `multiply_tiles`
}

// ---- products ----------------------------------------------------------------------------------------------------

// Scales of B that a thread needs. With B_ROWS 1, pair j holds those of the two columns of accumulators 4j to 4j + 3; otherwise both numbers of pair
// j are the scale of strip j.
constexpr int PAIRS = B_ROWS == 1 ? BLOCK_N / 8 : STRIPS;
// KEPT pairs are read before a block's first product and kept in registers for all of its products. The others are read when they are used, anew for
// each product. This matters because every thread's copy of a scale takes 4 bytes of shared memory's bandwidth: for 256x128 tiles and a block of K,
// 512 clocks if none are kept and 384 if half of them are, in addition to 1,152 for the products.
constexpr int KEPT = B_ROWS == 1 && AHEAD < PAIRS ? AHEAD : PAIRS;
constexpr bool ALL_KEPT = KEPT == PAIRS;

// total += part times both scales. `scale_0` and `scale_1` are the scales of A of this thread's two rows, r and r + 8. Scales of B come from `kept`,
// or from shared memory at `scales`.
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

// A multiplying warpgroup's work: multiply what the ring holds, and write C. The loop over K is simple and unrolled, so that the compiler interleaves
// waiting for the next stage and computing descriptors with the promotion. A product is started as soon as the registers of `part` are free: the
// first one of the next tile therefore starts before C is written, and after the last tile one more product runs, of whatever is in shared memory,
// whose result is discarded.
template <class Tiles>
__device__ __forceinline__ void multiply_tiles(Tiles tiles, u32 base, int group, int warp, int lane, const Output& out) {
    if constexpr (IN_UNITS) tiles.begin();
    if (!tiles.valid()) return;
    const int row = group * 64 + warp * 16 + lane / 4, column = lane % 4 * 2;  // position of this thread's first accumulator in the tile
    // The lower halves of the wgmma descriptors. The shuffle tells the compiler that they are the same in all lanes.
    const u32 first_a = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_A + group * 64 * BLOCK_K), 0);
    const u32 first_b = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_B), 0);
    Stage stage;
    float part[BLOCK_N / 2], scale_0[WAVES], scale_1[WAVES];
    float2 columns[KEPT];
    u32 at = (row + (ANY_ROW ? tiles.row() % 4 : 0)) * 4;  // offset of this thread's first scale of A in a stage's scales
    // Start the product of unit w with the current stage; for the first unit, also read the stage's scales.
    auto start = [&](int w) {
        const u32 i = stage.index, scales_a = base + OFFSET_SA + i * SA_BYTES + at, scales_b = base + OFFSET_SB + i * SB_BYTES;
        const u32 a = first_a + i * (A_BYTES / 16) + w * (128 * BLOCK_K / 16), b = first_b + i * (B_BYTES / 16);
        // Scales are read before the products are issued: after them, the reads would wait until the tensor cores have read their operands.
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
            // The shuffle tells the compiler that the value, and so the branches below, are the same for the whole warp.
            const int word = __shfl_sync(0xffffffffu, lane < CLUSTER ? __float_as_int(smem_load(base + OFFSET_SB + stage.index * SB_BYTES + 12)) : 0, 0);
            next_at = (row + word % 4) * 4;
            waves = waves_of(word / 4, group);
        }
        // One copy of the loop over K for each number of units that this warpgroup may have in a tile, a compile-time constant in each.
#pragma unroll
        for (int used = IN_UNITS ? 0 : ANY_ROW && WAVES > 1 ? WAVES - 1 : WAVES; used <= WAVES; ++used) {
            if (used != waves) continue;
            if (used == 0) {  // no unit: discard the product that was started before this was known, and release the tile's stages
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
        if (BIAS) wgmma_wait<0>();  // adding the bias needs the registers of the next tile's product, which is therefore started again below
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

// The body of the kernel, for a grid of at most as many clusters as the GPU holds at once.
template <class Tiles>
__device__ __forceinline__ void block_scaled_gemm(Tiles tiles, u32 base, const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_sa,
                                                  const TensorMap* map_sb, const float* sb, const Output& out, const TensorMap* map_last = nullptr) {
    // The shuffle tells the compiler that these are the same in all lanes.
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
