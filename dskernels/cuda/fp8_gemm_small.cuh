// The core of the block-scaled e4m3 products for few rows on sm_90a: C = A @ B.T with A in 1x128 tiles and B in 128x128 blocks. B is
// streamed once, and bytes in flight are all that counts. A kernel includes this file and brings its own order of tiles, see below.
// With HALF the operands are bf16 or fp16 and have no scales: a block of K is 128 bytes all the same, 64 elements, and sums stay in the
// tensor cores' registers.
//
// The operands are swapped: a CTA takes TILE rows of B as the 64-row operand of the tensor cores, and TOKENS rows of A as the narrow
// one. One warp loads: for each 128 of K the tiles of B and A and the scales of A's rows go to one of `stages` buffers in shared memory,
// by the tensor memory accelerator; the first `stages` of them are asked for before anything else happens. TILE / 64 warpgroups multiply.
// A product of 128 along K starts from a fresh accumulator (the tensor cores keep about 14 bits in e4m3) and is promoted, times both
// scales, into fp32 registers.
// A CTA takes one tile after another, and the loads run ahead into the next one. Or it takes one, and SPLIT CTAs of a cluster share the K
// of it: every one sends each other one its share of the tile's rows of C, through shared memory, and adds up what it gets in the order
// of the ranks: the same bits every time, with no workspace and no second launch.
//
// `Tiles` says which tiles this CTA computes, in which order. Every thread walks a copy of its own:
//   valid()         whether there is one more; next() goes on to it
//   row()           of A, where the tile begins; c_row(): of C; rows(): how many of C it may write from there on
//   b_row()         of B, where it begins
//   column()        of C, where it begins
//   b_scales(s, i)  where in the matrix `s` of scales those of the tile's row i of B are, or of any row of B where valid() is false
//   block()         of K, BLOCK_K elements wide, where this CTA's share of the sum begins; blocks(): how many, the same for all tiles
//
// Before it includes this file it says, by a constant ANY_ROW, whether tiles may begin at rows of A that are not multiples of 4.
//
// Options (-D): TILE 64 to 256, TOKENS 8 to 128 (a power of two), SPLIT 1 to 8, OUT 0 (bf16), 1 (fp16), 2 (fp32), BIAS 0 (none), 1 (bf16),
// 2 (fp16), 3 (fp32), ACCUMULATE 0 or 1, HALF 0 (e4m3, which it is where nothing is said), 1 (bf16), 2 (fp16), PAIRS 1: two
// blocks of K at a time, e4m3 and up to 32 tokens (0 where nothing is said).
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
// The accelerator reads from multiples of 16 bytes and writes to multiples of 128.
constexpr int SA_BYTES = HALF ? 0 : (ANY_ROW ? TOKENS + 4 : TOKENS) * 4, SA_PITCH = (SA_BYTES + 127) / 128 * 128;
constexpr int GROUPS = TOKENS / 8, SHARE = (GROUPS + SPLIT - 1) / SPLIT;  // 8 rows of C each; those that one CTA adds up
constexpr int PART = TOKENS < 64 ? TOKENS : 64, PARTS = TOKENS / PART;  // two products, so that one runs while the other is promoted
constexpr int C_ROWS = SHARE < 8 ? SHARE * 8 : 64;  // of C in shared memory at a time
constexpr int RECEIVED = (SPLIT - 1) * SHARE * CONSUMERS * 16;
constexpr int PITCH = TILE + 4;  // of a row of C in shared memory, so that writes and reads meet no bank conflicts
constexpr int C_BYTES = C_ROWS * PITCH * 4;

constexpr int VECTOR = 16 / sizeof(Element);

__device__ __forceinline__ float read(float x) { return x; }
__device__ __forceinline__ float read(u16 x) { return widen(x, OUT); }
__device__ __forceinline__ Element rounded(float x) {
#if OUT == 2
    return x;
#else
    Element narrow;
    if (OUT == 0) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(narrow) : "f"(x));
    return narrow;
#endif
}
// An element of C, from its sum and, with ACCUMULATE, what was there.
__device__ __forceinline__ Element finished(float x, const void* bias, int n, Element before) {
    if (BIAS == 3) x = add(x, __ldg((const float*)bias + n));
    else if (BIAS) x = add(x, widen(__ldg((const u16*)bias + n), BIAS - 1));
    return rounded(ACCUMULATE ? add(x, read(before)) : x);
}

// Where C is, and what is added to it.
struct Output {
    Element* c;
    const void* bias;
    int columns, stride;
};

// What lies where in shared memory. C of a CTA's `only` tile is written over the stages, which by then are free.
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

// One thread's work: fill the stages, block of K by block of K, tile by tile.
template <class Tiles> struct Loader {
    Tiles tiles;
    const Memory& memory;
    const int stages, blocks;
    const TensorMap *map_a, *map_b, *map_sa;
    const int rows_a;  // of a box of A
    int at = 0, into = 0;  // the next load: this block of the tile, into this stage

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
    // Each barrier and at once the load that it counts: the first bytes are asked for as early as can be.
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

// The next 8 rows of an operand lie at + 64 of its descriptor.
constexpr int PART_STEP = PART / 8 * 64;

#if HALF
// total += the product of the stage at `rows` and `tokens`.
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
// total += the product of the stage at `rows`, `tokens` and `columns` (the scales of this thread's first columns), times `scale` and those.
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
        // While the product runs: the scales of this thread's columns, two of every eight tokens.
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
// The same for two stages: the second product runs while the first is promoted. 1.6% faster in the mean of 44 products of 1 to 32 rows, 6% at
// most, and the same bits.
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

// The share of this CTA of the cluster's tile, added up: rows 8 * SHARE * rank to 8 * SHARE * (rank + 1) of the tile of C. The same thread
// of every CTA holds the same elements.
__device__ __forceinline__ void add_up(float (&sum)[SHARE * 4], const float (&total)[TOKENS / 2], u32 received, u32 all_received, int rank) {
    const u32 mine = received + threadIdx.x * 16;
    cluster_wait();
#pragma unroll
    for (int to = 0; to < SPLIT; ++to) {
        const u32 slot = (rank < to ? rank : rank - 1) * SHARE * CONSUMERS * 16;
        const u32 there = cluster_addr(mine + slot, to), counted = cluster_addr(all_received, to);
#pragma unroll
        for (int j = 0; j < SHARE; ++j) {
            if (to * SHARE + j >= GROUPS) break;
            const float* x = total + 4 * (to * SHARE + j);
            if (to == rank) {
#pragma unroll
                for (int e = 0; e < 4; ++e) sum[4 * j + e] = x[e];
            } else {
                cluster_store(there + j * CONSUMERS * 16, counted, make_float4(x[0], x[1], x[2], x[3]));
            }
        }
    }
    barrier_wait(all_received, 0);
#pragma unroll
    for (int j = 0; j < SHARE; ++j) {
        const float own[4] = {sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]};
#pragma unroll
        for (int from = 0; from < SPLIT; ++from) {
            float4 x = make_float4(own[0], own[1], own[2], own[3]);
            if (from != rank) x = smem_load4(mine + ((from < rank ? from : from - 1) * SHARE + j) * CONSUMERS * 16);
            sum[4 * j] = from ? add(sum[4 * j], x.x) : x.x;
            sum[4 * j + 1] = from ? add(sum[4 * j + 1], x.y) : x.y;
            sum[4 * j + 2] = from ? add(sum[4 * j + 2], x.z) : x.z;
            sum[4 * j + 3] = from ? add(sum[4 * j + 3], x.w) : x.w;
        }
    }
}

// Rows of the tile from its row `of_tile` on, SHARE * 8 of them, to C, where the tile begins at row `first_row` and has `rows` rows: transposed
// through shared memory, so that a thread writes 16 bytes.
__device__ __forceinline__ void write(const float* sum, const Output& out, u32 buffer, int first_row, int of_tile, int rows, int column) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 to = buffer + ((lane % 4) * 2 * PITCH + warp * 16 + lane / 4) * 4;
    const bool aligned = (((u64)out.c | (u64)out.stride * sizeof(Element)) & 15) == 0;
#pragma unroll
    for (int h = 0; h < SHARE * 8; h += C_ROWS) {
        named_sync<CONSUMERS>(1);
#pragma unroll
        for (int j = 0; j < C_ROWS / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 4; ++e) smem_store(to + ((8 * j + e % 2) * PITCH + e / 2 * 8) * 4, sum[h / 2 + 4 * j + e]);
        }
        named_sync<CONSUMERS>(1);
        const int first = of_tile + h, count = min(min(C_ROWS, TOKENS - first), rows - first);
        for (int i = threadIdx.x; i < count * (TILE / VECTOR); i += CONSUMERS) {
            const int row = i / (TILE / VECTOR), in_row = i % (TILE / VECTOR) * VECTOR, col = column + in_row;
            if (col >= out.columns) continue;
            float x[VECTOR];
#pragma unroll
            for (int e = 0; e < VECTOR; e += 4) *(float4*)(x + e) = smem_load4(buffer + (row * PITCH + in_row + e) * 4);
            Element* to = out.c + (long long)(first_row + first + row) * out.stride + col;
            alignas(16) Element y[VECTOR];
            if (aligned && col + VECTOR <= out.columns) {
                if (ACCUMULATE) *(uint4*)y = *(const uint4*)to;
#pragma unroll
                for (int e = 0; e < VECTOR; ++e) y[e] = finished(x[e], out.bias, col + e, y[e]);
                *(uint4*)to = *(const uint4*)y;
            } else {
#pragma unroll
                for (int e = 0; e < VECTOR; ++e)
                    if (col + e < out.columns) to[e] = finished(x[e], out.bias, col + e, to[e]);
            }
        }
    }
}

// The whole kernel, for CONSUMERS + 32 threads. Boxes of A have `rows_a` rows: where A has fewer than TOKENS, none past its end, each of which
// the accelerator would take about 4 clocks to write, as zeros.
template <class Tiles>
__device__ __forceinline__ void block_scaled_gemm_small(Tiles tiles, const Memory& memory, int stages, const TensorMap* map_a,
                                                        const TensorMap* map_b, const TensorMap* map_sa, const float* sb, const Output& out,
                                                        int rows_a = TOKENS) {
    // Through a shuffle, so that the compiler knows it to be the same in all lanes.
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
    if (SPLIT > 1) cluster_arrive();  // whoever waits for all of the cluster knows that it may send to `received`

    if (warp == WARPS) {
        if (elect_one()) loader.go_on();
        __syncwarp();
        if (SPLIT > 1) cluster_wait();
        return;
    }
    if (SPLIT == 1 && !tiles.valid()) return;

    const int group = warp / 4;
    // B's scales of 32 blocks of a tile, one a lane.
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
