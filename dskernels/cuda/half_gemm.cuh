// The core of the bf16 and fp16 products on sm_90a: C = A @ B.T, summed in fp32 by the tensor cores. A kernel includes this file and brings
// its own order of tiles, see below. The block-scaled e4m3 products (fp8_gemm.cuh) are built in the same way.
//
// A pair of CTAs, a cluster, computes two tiles of C of 128 x BLOCK_N at a time, each with three warpgroups. Warpgroups 0 and 1 multiply 64
// rows each, and keep a block's products in flight while they start the next one's. Of warpgroup 2, one warp loads: for each 64 of K, the
// tiles of A and B go to one of STAGES buffers in shared memory. Two others have finished tiles stored, and the last one is the kernel's.
// What both tiles of a pair need, B where they lie one below the other, A where they lie side by side, each CTA loads half of, for both.
//
// In 128x256 tiles shared memory is as busy as the tensor cores: a block of K reads 80 KB for the products and writes 48 KB, 1,024 clocks at
// 128 bytes a clock, and the products take 1,024; in 128x128 tiles it would be 640 for 512. What bounds it seems to be power, as with cuBLAS:
// one H100 did 694 to 698 TFLOP/s in bf16 whatever the shape, the order of the tiles, the unrolling, or how far one warpgroup was set behind
// the other.
//
// `Tiles` says which tiles this CTA computes, in which order, the same blocks of K for both CTAs of a pair. Every thread that needs to know
// walks a copy of its own:
//   valid()         whether there is one more; next() goes on to it
//   side_by_side()  whether the pair lies side by side, with the same rows of A; else it has the same rows of B
//   blocks()        of K, 64 wide: 1 or more
//   rows()          rows of C from the tile's first on that it may write; where they are none, the tile is loaded all the same
//   column()        of C, where it begins
//   load_a<SHARED>(map, buffer, barrier, block, i), load_b: load box i of a block of K, SHARED for both CTAs
//   store<ADD>(map, buffer, column, row): have a box of 64 rows stored, or added; `row` counts from the tile's first
//
// Options (-D):
//   KIND        of A and B: 0 bf16, 1 fp16
//   A_MN, B_MN  1: the operand's rows along M or N are contiguous in memory, not those along K
//   BLOCK_N     columns of a tile: 128, 192 or 256
//   STAGES      blocks of K in flight
//   UNROLL      of the loop over K
//   OUT         0 bf16, 1 fp16, 2 fp32
//   ACCUMULATE  1: add to C instead of overwriting it, with OUT 2
#pragma once

#include "element.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 128, BLOCK_K = 64, CLUSTER = 2;
constexpr u16 EVERYONE = 3;  // of a cluster
// Operands come in boxes: rows of 64 of K, half a tile's; or 64 of K, rows of 64 of M or N.
constexpr int A_BOXES = 2, B_BOXES = B_MN ? BLOCK_N / 64 : 2;
constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, B_BYTES = BLOCK_N * BLOCK_K * 2;
// C is handed over in boxes of 64 rows and 128 bytes, through two buffers for each warpgroup.
constexpr int BOX_N = 128 / (int)sizeof(Element), BOXES = BLOCK_N / BOX_N, BOX_BYTES = 64 * 128, HALVES = 2;

constexpr int OFFSET_A = 0, OFFSET_B = STAGES * A_BYTES, OFFSET_C = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_C + 2 * HALVES * BOX_BYTES, OFFSET_TABLE = OFFSET_BARRIERS + STAGES * 16;  // the kernel's from there on

#include "ring.cuh"

// ---- loading ------------------------------------------------------------------------------------------------------

// One thread's work: fill the ring, block of K by block of K, tile by tile.
template <class Tiles>
__device__ __forceinline__ void load_tiles(Tiles tiles, u32 base, u32 rank, const TensorMap* map_a, const TensorMap* map_b) {
    Stage stage;
    for (; tiles.valid(); tiles.next()) {
        const bool a_shared = tiles.side_by_side();
        const int blocks = tiles.blocks();
#pragma unroll 1
        for (int k = 0; k < blocks; ++k, stage.advance()) {
            const u32 a = base + OFFSET_A + stage.index * A_BYTES, b = base + OFFSET_B + stage.index * B_BYTES;
            const u32 barrier = full(base, stage.index);
            barrier_wait(empty(base, stage.index), stage.phase ^ 1);
#pragma unroll
            for (int i = 0; i < A_BOXES; ++i) {
                if (!a_shared) tiles.template load_a<false>(map_a, a + i * (A_BYTES / A_BOXES), barrier, k, i);
                else if (i == rank) tiles.template load_a<true>(map_a, a + i * (A_BYTES / A_BOXES), barrier, k, i);
            }
#pragma unroll
            for (int i = 0; i < B_BOXES; ++i) {
                if (a_shared) tiles.template load_b<false>(map_b, b + i * (B_BYTES / B_BOXES), barrier, k, i);
                else if (i % 2 == rank) tiles.template load_b<true>(map_b, b + i * (B_BYTES / B_BOXES), barrier, k, i);
            }
            barrier_expect(barrier, A_BYTES + B_BYTES);  // from here and from the other CTA
        }
    }
}

// ---- C -----------------------------------------------------------------------------------------------------------

// C goes from registers to shared memory, in the accelerator's 128-byte swizzle, and from there a warp of its own has it stored.
__device__ __forceinline__ void write_to_shared(const float (&sums)[BLOCK_N / 2], u32 buffers, int group, int warp, int lane) {
#pragma unroll
    for (int box = 0; box < BOXES; ++box) {
        const u32 buffer = buffers + box % HALVES * BOX_BYTES;
        named_sync<160>(free_again(group, box % HALVES));
#pragma unroll
        for (int j = 0; j < BOX_N / 16; ++j) {  // 16 columns
            const float* y = sums + box * (BOX_N / 2) + 8 * j;
            const int r = warp * 16 + (OUT == 2 ? lane / 4 : lane % 16);
            auto at = [&](int column) { return buffer + r * 128 + ((column * (int)sizeof(Element) / 16) ^ (r % 8)) * 16 + column * (int)sizeof(Element) % 16; };
            if (OUT == 2) {
                const int c = 16 * j + lane % 4 * 2;
                smem_store2(at(c), y[0], y[1]);
                smem_store2(at(c) + 8 * 128, y[2], y[3]);
                smem_store2(at(c + 8), y[4], y[5]);
                smem_store2(at(c + 8) + 8 * 128, y[6], y[7]);
            } else {  // four 8x8 matrices, rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
                smem_store_matrix(at(16 * j + lane / 16 * 8), pack(y[0], y[1]), pack(y[2], y[3]), pack(y[4], y[5]), pack(y[6], y[7]));
            }
        }
        proxy_fence();
        named_arrive<160>(written(group, box % HALVES));
    }
}

// A warp's work: have the tiles of one warpgroup stored.
template <class Tiles> __device__ __forceinline__ void store_tiles(Tiles tiles, u32 buffers, int group, const TensorMap* map_c) {
    const bool elected = elect_one();
#pragma unroll
    for (int i = 0; i < HALVES; ++i) named_arrive<160>(free_again(group, i));
    for (; tiles.valid(); tiles.next()) {
        if (tiles.rows() <= group * 64) continue;
#pragma unroll
        for (int box = 0; box < BOXES; ++box) {
            named_sync<160>(written(group, box % HALVES));
            if (elected) {
                tiles.template store<ACCUMULATE>(map_c, buffers + box % HALVES * BOX_BYTES, tiles.column() + box * BOX_N, group * 64);
                tma_store_commit();
                // The buffer that was handed over before this one: by now the accelerator has read it.
                if (box > 0) tma_store_wait_read<1>();
            }
            __syncwarp();
            if (box > 0) named_arrive<160>(free_again(group, (box - 1) % HALVES));
        }
        if (elected) tma_store_wait_read<0>();
        __syncwarp();
        named_arrive<160>(free_again(group, (BOXES - 1) % HALVES));
    }
}

// ---- products ----------------------------------------------------------------------------------------------------

// A warpgroup's work: multiply what the ring holds, and write C. A stage is released when the products after its own have been started.
template <class Tiles>
__device__ __forceinline__ void multiply_tiles(Tiles tiles, u32 base, int group, int warp, int lane) {
    constexpr int STEP_A = A_MN ? 128 : 2, STEP_B = B_MN ? 128 : 2;  // 16 of K, in a descriptor
    const u32 addr_a = base + OFFSET_A + group * (A_BYTES / A_BOXES), addr_b = base + OFFSET_B;
    // The lower halves of descriptors, through a shuffle, so that the compiler knows them to be the same in all lanes.
    const u32 first_a = __shfl_sync(0xffffffffu, (u32)(A_MN ? operand_mn_major(addr_a, BOX_BYTES) : operand_k_major(addr_a)), 0);
    const u32 first_b = __shfl_sync(0xffffffffu, (u32)(B_MN ? operand_mn_major(addr_b, BOX_BYTES) : operand_k_major(addr_b)), 0);
    Stage stage;
    float sums[BLOCK_N / 2];
    auto start = [&](bool keep) {
        const u32 a = first_a + stage.index * (A_BYTES / 16), b = first_b + stage.index * (B_BYTES / 16);
        barrier_wait(full(base, stage.index), stage.phase);
        registers_fence(sums);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < BLOCK_K / 16; ++j)
            multiply_half<KIND == 1, A_MN, B_MN>(sums, operand(a + j * STEP_A), operand(b + j * STEP_B), keep || j > 0);
        wgmma_commit();
        registers_fence(sums);
    };
    for (; tiles.valid(); tiles.next()) {
        const int blocks = tiles.blocks();
        if (tiles.rows() <= group * 64) {
            for (int k = 0; k < blocks; ++k, stage.advance()) {
                barrier_wait(full(base, stage.index), stage.phase);
                release(base, stage.index, lane);
            }
            continue;
        }
        start(false);
#pragma unroll UNROLL
        for (int k = 1; k < blocks; ++k) {
            const int before = stage.index;
            stage.advance();
            start(true);
            wgmma_wait<1>();
            release(base, before, lane);
        }
        wgmma_wait<0>();
        registers_fence(sums);
        release(base, stage.index, lane);
        stage.advance();
        write_to_shared(sums, base + OFFSET_C + group * HALVES * BOX_BYTES, group, warp, lane);
    }
}

// The whole kernel but for the barriers, see `make_barriers`, and what the last warp does, `rest`; for a grid of as many clusters as the GPU
// holds.
template <class Tiles, class Rest>
__device__ __forceinline__ void half_gemm(Tiles tiles, u32 base, const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_c, Rest rest) {
    // Through a shuffle, so that the compiler knows them to be the same in all lanes.
    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4;
    const int lane = threadIdx.x % 32;
    if (group == 2) {
        registers_shrink<40>();
        if (warp < 2) store_tiles(tiles, base + OFFSET_C + warp * HALVES * BOX_BYTES, warp, map_c);
        if (warp == 2 && elect_one()) load_tiles(tiles, base, cluster_rank(), map_a, map_b);
        if (warp == 3) rest(lane);
    } else {
        registers_grow<232>();
        multiply_tiles(tiles, base, group, warp, lane);
    }
    cluster_sync();  // a CTA must not end while the other may still arrive at its barriers, or load for it
}
