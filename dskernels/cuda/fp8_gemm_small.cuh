// The core of the block-scaled e4m3 products for few rows on sm_90a: C = A @ B.T with A in 1x128 tiles and B in 128x128 blocks, each with an fp32
// scale. B, the weights, is read once, so the number of bytes in flight is all that matters. This is not a kernel: a .cu file includes it, provides
// the order of the tiles (`Tiles`, below), and calls `block_scaled_gemm_small`.
// With HALF, the operands are bf16 or fp16 and have no scales. A block of K is then 64 elements, which are also 128 bytes, and the sum over all of K
// stays in the accumulators of the tensor cores.
//
// The operands are swapped, because a wgmma has 64 rows but as few as 8 columns: TILE rows of B take the place of the rows, and TOKENS rows of A, the
// tokens, are the columns. So the accumulators hold a tile of C transposed. For each block of 128 along K:
//
//     the last warp           one thread loads the block's tiles of B and A and the scales of A's rows, by TMA, to one of `stages` buffers in shared
//           |       ^         memory, the pipeline stages; the first `stages` of them before anything else happens
//      full |       | empty
//           v       |
//     TILE / 64 warpgroups    multiply: part = B @ A.T of this block, by wgmma; then promote: total += part * scale of A * scale of B
//
// A product of 128 along K starts from a zero accumulator, since the tensor cores keep only about 14 bits while they accumulate e4m3; the result is
// promoted into fp32 registers. The scales of B's blocks do not pass through shared memory: each lane loads one of 32 blocks, and they are
// distributed by shuffles.
//
// A CTA computes one tile after another, and its loads run ahead into the next one. Alternatively (SPLIT > 1) it computes a single tile, of which the
// SPLIT CTAs of a cluster each take a part of K. Every CTA then sends each of the others a share of its partial sums, through distributed shared
// memory, and adds up the share it receives in the order of the ranks: the same bits in every call, without a workspace or a second launch.
//
// `Tiles` says which tiles this CTA computes, and in which order. Every thread has its own copy and steps through the same sequence:
//   valid()         whether the current tile exists; next() goes on to the following one
//   row(), c_row()  first row of the tile in A, and in C
//   rows()          number of rows of C, from c_row() on, that may be written
//   b_row()         first row of the tile in B
//   column()        first column of the tile in C
//   b_scales(s, i)  address, in the matrix `s` of B's scales, of the scales of the tile's row i of B; a valid address even if valid() is false
//   block()         first block of K, in units of BLOCK_K elements, of this CTA's part of the sum
//   blocks()        number of blocks of K in this part, the same for all tiles
//
// Before including this file, the kernel defines a constant ANY_ROW: whether tiles may begin at rows of A that are not multiples of 4.
//
// Options (-D):
//   TILE        rows of B in a tile: a multiple of 64, up to 256
//   TOKENS      rows of A in a tile: a power of two, 8 to 128
//   SPLIT       CTAs of a cluster among which K is divided, 1 to 8
//   OUT         dtype of C: 0 bf16, 1 fp16, 2 fp32
//   BIAS        dtype of the bias: 0 no bias, 1 bf16, 2 fp16, 3 fp32
//   ACCUMULATE  1: add to C instead of overwriting it
//   HALF        dtype of A and B: 0 e4m3, 1 bf16, 2 fp16; 0 if not defined
//   PAIRS       1: multiply two blocks of K at a time, for e4m3 and up to 32 tokens; 0 if not defined
#pragma once

#ifndef HALF
#define HALF 0
#endif
#ifndef PAIRS
#define PAIRS 0
#endif

#include "element.cuh"
#include "wgmma.cuh"

constexpr int K_BYTES = 128, BLOCK_K = HALF ? 64 : 128, CONSUMERS = 2 * TILE, WARPS = CONSUMERS / 32;
constexpr int B_BYTES = TILE * K_BYTES, A_BYTES = TOKENS * K_BYTES;
// TMA reads from multiples of 16 bytes, so with ANY_ROW the copy of scales begins up to 3 rows early; and it writes to multiples of 128 bytes.
constexpr int SA_BYTES = HALF ? 0 : (ANY_ROW ? TOKENS + 4 : TOKENS) * 4, SA_PITCH = (SA_BYTES + 127) / 128 * 128;
constexpr int GROUPS = TOKENS / 8, SHARE = (GROUPS + SPLIT - 1) / SPLIT;  // groups of 8 rows of C in a tile; groups that one CTA of a cluster adds up
constexpr int PART = TOKENS < 64 ? TOKENS : 64, PARTS = TOKENS / PART;  // 128 tokens are two products, so that one runs while the other is promoted
constexpr int C_ROWS = SHARE < 8 ? SHARE * 8 : 64;  // rows of C that are in shared memory at a time
constexpr int RECEIVED = (SPLIT - 1) * SHARE * CONSUMERS * 16;  // bytes of partial sums that a CTA receives from the others
constexpr int PITCH = TILE + 4;  // distance of rows of C in shared memory, in floats: writes and reads have no bank conflicts
constexpr int C_BYTES = C_ROWS * PITCH * 4;

#include "fp8_gemm_small_epilogue.cuh"

// The addresses of what is in shared memory: the stages' tiles of B (`rows`) and A (`tokens`) and scales of A, partial sums from the other CTAs, a
// tile of C, and barriers. If a CTA has only one tile (`only`), C overwrites the stages, which are free by then.
struct Memory {
    u32 rows, tokens, scales, received, c, all_received, barriers, end;

    __device__ __forceinline__ Memory(u32 base, int stages, bool only) {
        rows = base;
        tokens = rows + stages * B_BYTES;
        scales = tokens + stages * A_BYTES;
        received = scales + stages * SA_PITCH;
        c = only ? base : received;
        all_received = received + (only ? RECEIVED : C_BYTES);
        barriers = all_received + 8;
        end = barriers + stages * 16;
    }
    __device__ __forceinline__ u32 full(int stage) const { return barriers + stage * 16; }
    __device__ __forceinline__ u32 empty(int stage) const { return barriers + stage * 16 + 8; }
};

// The loading thread's work: fill the stages in turn, for all blocks of K of all tiles.
template <class Tiles> struct Loader {
    Tiles tiles;
    const Memory& memory;
    const int stages, blocks;
    const TensorMap *map_a, *map_b, *map_sa;
    const int rows_a;  // rows of a box of A
    int at = 0, into = 0;  // the next load: block `at` of the tile, into stage `into`

    __device__ __forceinline__ bool done() const { return !tiles.valid() || blocks == 0; }
    __device__ __forceinline__ void load() {
        const int k = tiles.block() + at;
        const u32 full = memory.full(into);
        barrier_expect(full, B_BYTES + rows_a * K_BYTES + SA_BYTES);
        tma_load_evict_first(memory.rows + into * B_BYTES, map_b, full, k * BLOCK_K, tiles.b_row());
        tma_load(memory.tokens + into * A_BYTES, map_a, full, k * BLOCK_K, tiles.row());
        if (!HALF) tma_load(memory.scales + into * SA_PITCH, map_sa, full, ANY_ROW ? tiles.row() & ~3 : tiles.row(), k);
        if (++into == stages) into = 0;
        if (++at == blocks) {
            at = 0;
            tiles.next();
        }
    }
    // Initialise each stage's barriers and start its first load at once, so that the first bytes are requested as early as possible.
    __device__ __forceinline__ void begin() {
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            barrier_init(memory.full(i), 1);
            barrier_init(memory.empty(i), WARPS);
            barrier_init_fence();
            if (!done()) load();
        }
    }
    __device__ __forceinline__ void go_on() {
        for (u32 phase = 0; !done(); phase ^= into == 0) {
            barrier_wait(memory.empty(into), phase);
            load();
        }
    }
};

// The distance of two PARTs of tokens in a descriptor: the next 8 rows of an operand are at + 64.
constexpr int PART_STEP = PART / 8 * 64;

#if HALF
// total += the product of a stage, whose tiles of B and A are at `rows` and `tokens`. Then release the stage, by its barrier `empty`.
__device__ __forceinline__ void multiply_block(float (&total)[TOKENS / 2], u32 rows, u32 tokens, u32 empty, int lane) {
    const u64 b = operand_k_major(rows), a = operand_k_major(tokens);
    registers_fence(total);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply_half<HALF == 2, 0, 0>(total, b + 2 * j, a + 2 * j, 1);
    wgmma_commit();
    registers_fence(total);
    wgmma_wait<0>();
    registers_fence(total);
    if (lane == 0) barrier_arrive(empty);
}
#else
// total += the product of a stage, times its scales. Its tiles of B and A are at `rows` and `tokens`; A's scales for this thread's first two tokens
// are at `columns`, and `scale` is that of B's block. Release the stage, by its barrier `empty`, once the tensor cores have read it.
__device__ __forceinline__ void multiply_block(float (&total)[TOKENS / 2], u32 rows, u32 tokens, u32 columns, float scale, u32 empty, int lane) {
    const u64 b = operand_k_major(rows), a = operand_k_major(tokens);
    float part[PARTS][PART / 2];
#pragma unroll
    for (int h = 0; h < PARTS; ++h) registers_fence(part[h]);
    wgmma_begin();
#pragma unroll
    for (int h = 0; h < PARTS; ++h) {
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(part[h], b + 2 * j, a + h * PART_STEP + 2 * j, j != 0);
        wgmma_commit();
    }
#pragma unroll
    for (int h = 0; h < PARTS; ++h) {
        // While the product runs, read the scales of this thread's columns, two of every eight tokens.
        float2 s[PART / 8];
#pragma unroll
        for (int j = 0; j < PART / 8; ++j) {
            const u32 two = columns + (h * PART / 8 + j) * 32;
            s[j] = ANY_ROW ? make_float2(smem_load(two), smem_load(two + 4)) : smem_load2(two);
        }
#pragma unroll
        for (int g = h; g < PARTS; ++g) registers_fence(part[g]);
        if (h + 1 < PARTS) wgmma_wait<1>();
        else wgmma_wait<0>();
        registers_fence(part[h]);
        if (h + 1 == PARTS && lane == 0) barrier_arrive(empty);
#pragma unroll
        for (int j = 0; j < PART / 8; ++j) {
            float* sum = total + h * PART / 2 + 4 * j;
            const float low = mul(s[j].x, scale), high = mul(s[j].y, scale);
            sum[0] = fma(part[h][4 * j], low, sum[0]);
            sum[1] = fma(part[h][4 * j + 1], high, sum[1]);
            sum[2] = fma(part[h][4 * j + 2], low, sum[2]);
            sum[3] = fma(part[h][4 * j + 3], high, sum[3]);
        }
    }
}
#endif

#if PAIRS
static_assert(!HALF && TOKENS <= 32, "registers for two products");
// The same for two stages: the second product runs while the first is promoted. This is 1.6% faster on average over 44 products of 1 to 32 rows, 6%
// at most, and gives the same bits.
__device__ __forceinline__ void multiply_blocks(float (&total)[TOKENS / 2], const u32 (&rows)[2], const u32 (&tokens)[2], const u32 (&columns)[2],
                                                const float (&scale)[2], const u32 (&empty)[2], int lane) {
    float part[2][TOKENS / 2];
#pragma unroll
    for (int p = 0; p < 2; ++p) registers_fence(part[p]);
    wgmma_begin();
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        const u64 b = operand_k_major(rows[p]), a = operand_k_major(tokens[p]);
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply(part[p], b + 2 * j, a + 2 * j, j != 0);
        wgmma_commit();
    }
#pragma unroll
    for (int p = 0; p < 2; ++p) {
        float2 s[TOKENS / 8];
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const u32 two = columns[p] + j * 32;
            s[j] = ANY_ROW ? make_float2(smem_load(two), smem_load(two + 4)) : smem_load2(two);
        }
#pragma unroll
        for (int g = p; g < 2; ++g) registers_fence(part[g]);
        if (p == 0) wgmma_wait<1>();
        else wgmma_wait<0>();
        registers_fence(part[p]);
        if (lane == 0) barrier_arrive(empty[p]);
#pragma unroll
        for (int j = 0; j < TOKENS / 8; ++j) {
            const float low = mul(s[j].x, scale[p]), high = mul(s[j].y, scale[p]);
            total[4 * j] = fma(part[p][4 * j], low, total[4 * j]);
            total[4 * j + 1] = fma(part[p][4 * j + 1], high, total[4 * j + 1]);
            total[4 * j + 2] = fma(part[p][4 * j + 2], low, total[4 * j + 2]);
            total[4 * j + 3] = fma(part[p][4 * j + 3], high, total[4 * j + 3]);
        }
    }
}
#endif

// The body of the kernel, for CONSUMERS + 32 threads. Boxes of A have `rows_a` rows. If the tile has fewer rows than TOKENS, `rows_a` should be that
// number: TMA takes about 4 clocks to write each row past the end of A as zeros.
template <class Tiles>
__device__ __forceinline__ void block_scaled_gemm_small(Tiles tiles, const Memory& memory, int stages, const TensorMap* map_a,
                                                        const TensorMap* map_b, const TensorMap* map_sa, const float* sb, const Output& out,
                                                        int rows_a = TOKENS) {
    // The shuffle tells the compiler that `warp` is the same in all lanes.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rank = SPLIT > 1 ? cluster_rank() : 0;
    const int blocks = tiles.blocks();
    Loader<Tiles> loader{tiles, memory, stages, blocks, map_a, map_b, map_sa, rows_a};
    if (warp == WARPS && elect_one()) {
        loader.begin();
        if (SPLIT > 1) {
            barrier_init(memory.all_received, 1);
            barrier_init_fence();
            barrier_expect(memory.all_received, max(min(SHARE, GROUPS - rank * SHARE), 0) * (SPLIT - 1) * CONSUMERS * 16);
        }
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();  // the other CTAs may send to `received` once they have waited for this

    if (warp == WARPS) {
        if (elect_one()) loader.go_on();
        __syncwarp();
        if (SPLIT > 1) cluster_wait();
        return;
    }
    if (SPLIT == 1 && !tiles.valid()) return;

    const int group = warp / 4;
    // The scales of B for 32 blocks of a tile from `block` on, one per lane. They are loaded while the 32 blocks before are multiplied.
    auto scales_from = [&](const Tiles& of, int block) {
        return __ldg(of.b_scales(sb, group * 64) + of.block() + max(min(block + lane, blocks - 1), 0));
    };
    float scales_next = HALF ? 0.f : scales_from(tiles, 0);
    int stage = 0;
    u32 phase = 0;
    do {
        Tiles following = tiles;
        following.next();
        const u32 columns = memory.scales + (lane % 4 * 2 + (ANY_ROW ? tiles.row() & 3 : 0)) * 4;
        float total[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) total[i] = 0.f;
        for (int first = 0; first < blocks; first += 32) {
            [[maybe_unused]] const float scales_now = scales_next;
            const bool last = first + 32 >= blocks;
            if (!HALF) scales_next = last ? scales_from(following, 0) : scales_from(tiles, first + 32);
            const int count = min(blocks - first, 32);
            int i = 0;
#if PAIRS
            for (; i + 1 < count; i += 2) {
                u32 rows[2], tokens[2], scales_a[2], empty[2];
                float scale[2];
#pragma unroll
                for (int p = 0; p < 2; ++p) {
                    barrier_wait(memory.full(stage), phase);
                    rows[p] = memory.rows + stage * B_BYTES + group * 64 * K_BYTES, tokens[p] = memory.tokens + stage * A_BYTES;
                    scales_a[p] = columns + stage * SA_PITCH, scale[p] = __shfl_sync(0xffffffffu, scales_now, i + p), empty[p] = memory.empty(stage);
                    if (++stage == stages) stage = 0, phase ^= 1;
                }
                multiply_blocks(total, rows, tokens, scales_a, scale, empty, lane);
            }
#endif
            for (; i < count; ++i) {
                barrier_wait(memory.full(stage), phase);
                const u32 rows = memory.rows + stage * B_BYTES + group * 64 * K_BYTES, tokens = memory.tokens + stage * A_BYTES;
#if HALF
                multiply_block(total, rows, tokens, memory.empty(stage), lane);
#else
                multiply_block(total, rows, tokens, columns + stage * SA_PITCH, __shfl_sync(0xffffffffu, scales_now, i), memory.empty(stage), lane);
#endif
                if (++stage == stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }
        if (SPLIT == 1) {
            write(total, out, memory.c, tiles.c_row(), 0, tiles.rows(), tiles.column());
        } else {
            float sum[SHARE * 4];
            add_up(sum, total, memory.received, memory.all_received, rank);
            write(sum, out, memory.c, tiles.c_row(), rank * SHARE * 8, tiles.rows(), tiles.column());
        }
        tiles = following;
    } while (SPLIT == 1 && tiles.valid());
}
