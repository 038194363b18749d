// The core of the bf16 and fp16 products on sm_90a: C = A @ B.T, summed in fp32 by the tensor cores. It is not a kernel: a .cu file includes it,
// provides the order of the tiles (`Tiles`, below), and calls `half_gemm`. The block-scaled e4m3 products (fp8_gemm.cuh) are built in the same way.
//
// Two persistent CTAs form a cluster and compute two adjacent tiles of C, of 128 x BLOCK_N, at a time. Each has three warpgroups (384 threads):
//
//     warpgroup 2, warp 2    one thread loads, for each 64 along K, the tiles of A and B by TMA into one of STAGES buffers (see ring.cuh)
//           |  full[stage]           ^  empty[stage]
//           v                        |
//     warpgroups 0 and 1     multiply 64 rows each by wgmma; the products of one stage are in flight while those of the next are issued
//           |  written(group)        ^  free_again(group)
//           v                        |
//     warpgroup 2, warps 0 and 1     each stores the tiles of C of one multiplying warpgroup, from shared memory, by TMA
//     warpgroup 2, warp 3    runs what the kernel passes as `rest`
//
// The two tiles of a pair share an operand: the tile of B if one lies below the other, the tile of A if they lie side by side. Each CTA loads half of
// the shared tile, for both, by multicast.
//
// With 128x256 tiles, shared memory is as busy as the tensor cores: a block of K reads 80 KB for the products and writes 48 KB, which takes 1,024
// clocks at 128 bytes per clock, and the products take 1,024 too; with 128x128 tiles it would be 640 clocks for products of 512. The limit seems to
// be power, as it is for cuBLAS: one H100 reached 694 to 698 TFLOP/s in bf16, whatever the shape, the order of the tiles, the unrolling, or how far
// one warpgroup was set behind the other.
//
// `Tiles` says which tiles this CTA computes, and in which order; both CTAs of a pair have the same blocks of K. Every thread that needs this has its
// own copy and steps through the same sequence:
//   valid()         whether the current tile exists; next() goes on to the following one
//   side_by_side()  whether the tiles of the pair are adjacent along N, with the same rows of A; otherwise they have the same rows of B
//   blocks()        number of blocks of K, 64 wide; at least 1
//   rows()          number of rows of C, from the tile's first, that may be written; even if there are none, the tile's operands are loaded
//   column()        first column of the tile in C
//   load_a<SHARED>(map, buffer, barrier, block, i), load_b<SHARED>(...): load box i of a block of K, with SHARED for both CTAs
//   store<ADD>(map, buffer, column, row): store a box of 64 rows of C by TMA, or add it; `row` is relative to the tile's first row
//
// Options (-D):
//   KIND        dtype of A and B: 0 bf16, 1 fp16
//   A_MN, B_MN  1: the operand is contiguous along M or N in memory, 0: along K
//   BLOCK_N     columns of a tile: 128, 192 or 256
//   STAGES      pipeline stages: blocks of K in flight
//   UNROLL      unroll factor of the loop over K
//   OUT         dtype of C: 0 bf16, 1 fp16, 2 fp32
//   ACCUMULATE  1: add to C instead of overwriting it; requires OUT 2
#pragma once

#include "element.cuh"
#include "wgmma.cuh"

constexpr int BLOCK_M = 128, BLOCK_K = 64, CLUSTER = 2;
constexpr u16 EVERYONE = 3;  // multicast mask: both CTAs of the cluster
// TMA loads operands in boxes of 128-byte rows. If rows run along K, a box has 64 of K and half of the tile's rows; if they run along M or N, it has
// 64 of M or N and 64 of K.
constexpr int A_BOXES = 2, B_BOXES = B_MN ? BLOCK_N / 64 : 2;
constexpr int A_BYTES = BLOCK_M * BLOCK_K * 2, B_BYTES = BLOCK_N * BLOCK_K * 2;
// C passes to the storing warps in boxes of 64 rows and 128 bytes, through two buffers for each multiplying warpgroup.
constexpr int BOX_N = 128 / (int)sizeof(Element), BOXES = BLOCK_N / BOX_N, BOX_BYTES = 64 * 128, HALVES = 2;

constexpr int OFFSET_A = 0, OFFSET_B = STAGES * A_BYTES, OFFSET_C = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_C + 2 * HALVES * BOX_BYTES, OFFSET_TABLE = OFFSET_BARRIERS + STAGES * 16;  // from there on the kernel's own

#include "ring.cuh"

// ---- loading ------------------------------------------------------------------------------------------------------

// The loading thread's work: fill the stages in turn, for all blocks of K of all tiles.
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
            barrier_expect(barrier, A_BYTES + B_BYTES);  // loaded by this CTA and by the other one
        }
    }
}

// ---- C -----------------------------------------------------------------------------------------------------------

// A multiplying warpgroup's part of storing C: from registers to shared memory, in the 128-byte swizzle of the tensor map. A warp of warpgroup 2
// stores it from there.
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

// A storing warp's work: issue the TMA stores for one multiplying warpgroup's part of every tile.
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
                // Wait until TMA has read the buffer of the preceding box, which is then released.
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

// A multiplying warpgroup's work: multiply what the ring holds, and write C. A stage is released when the products of the next stage have been issued
// and its own have ended.
template <class Tiles>
__device__ __forceinline__ void multiply_tiles(Tiles tiles, u32 base, int group, int warp, int lane) {
    constexpr int STEP_A = A_MN ? 128 : 2, STEP_B = B_MN ? 128 : 2;  // what 16 along K add to a descriptor
    const u32 addr_a = base + OFFSET_A + group * (A_BYTES / A_BOXES), addr_b = base + OFFSET_B;
    // The lower halves of the wgmma descriptors. The shuffle tells the compiler that they are the same in all lanes.
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

// The body of the kernel, for a grid of at most as many clusters as the GPU holds at once. The kernel itself initialises the barriers before
// (`make_barriers`), and says what the last warp does (`rest`).
template <class Tiles, class Rest>
__device__ __forceinline__ void half_gemm(Tiles tiles, u32 base, const TensorMap* map_a, const TensorMap* map_b, const TensorMap* map_c, Rest rest) {
    // The shuffle tells the compiler that these are the same in all lanes.
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
    cluster_sync();  // a CTA must not end while the other may still arrive at its barriers or load into its shared memory
}
