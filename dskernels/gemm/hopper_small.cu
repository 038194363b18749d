// C[M, N] = A[M, K] @ B[N, K].T for few rows M, e4m3 A in 1x128 tiles and B in 128x128 blocks, on sm_90a: B is streamed once.
//
// The operands are swapped: a CTA takes TILE rows of B as the 64-row operand of the tensor cores, and TOKENS rows of A as the narrow
// one. One warp loads: for each 128 of K the tiles of B and A and the scales of A's rows go to one of `stages` buffers in shared memory,
// by the tensor memory accelerator; the first `stages` of them are asked for before anything else happens, since bytes in flight are
// all that counts. TILE / 64 warpgroups multiply. A product of 128 along K starts from a fresh accumulator (the tensor cores keep about
// 14 bits in e4m3) and is promoted, times both scales, into fp32 registers.
// Where there are more tiles than CTAs fit, each CTA takes several, one after another, and the loads run ahead into the next one. Where
// there are few, SPLIT CTAs of a cluster share the K of one: every one sends each other one its share of the tile's rows of C, through
// shared memory, and adds up what it gets in the order of the ranks: the same bits every time, with no workspace and no second launch.
//
// Options (-D): TILE 64 to 256, TOKENS 8 to 128 (a power of two), SPLIT 1 to 8, OUT 0 (bf16), 1 (fp16), 2 (fp32), BIAS 0 (none), 1 (bf16), 2 (fp16),
// 3 (fp32), ACCUMULATE 0 or 1.

#include "wgmma.cuh"

constexpr int BLOCK_K = 128, CONSUMERS = 2 * TILE, WARPS = CONSUMERS / 32;
constexpr int B_BYTES = TILE * BLOCK_K, A_BYTES = TOKENS * BLOCK_K, SA_BYTES = TOKENS * 4;
constexpr int SA_PITCH = SA_BYTES < 128 ? 128 : SA_BYTES;  // the accelerator writes to multiples of 128
constexpr int GROUPS = TOKENS / 8, SHARE = (GROUPS + SPLIT - 1) / SPLIT;  // 8 rows of C each; those that one CTA adds up
constexpr int PART = TOKENS < 64 ? TOKENS : 64, PARTS = TOKENS / PART;  // two products, so that one runs while the other is promoted
constexpr int C_ROWS = SHARE < 8 ? SHARE * 8 : 64;  // of C in shared memory at a time
constexpr int RECEIVED = (SPLIT - 1) * SHARE * CONSUMERS * 16;
constexpr int PITCH = TILE + 4;  // of a row of C in shared memory, so that writes and reads meet no bank conflicts
constexpr int C_BYTES = C_ROWS * PITCH * 4;

#if OUT == 2
typedef float Element;
#else
typedef u16 Element;
#endif
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

extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(CONSUMERS + 32)
fp8_gemm_small(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
               const float* __restrict__ sb, const void* __restrict__ bias, Element* c, int M, int N, int K, int stride_sb, int stride_c,
               int stages) {
    extern __shared__ __align__(1024) u8 smem[];
    // Through a shuffle, so that the compiler knows it to be the same in all lanes.
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const int rank = SPLIT > 1 ? cluster_rank() : 0, all_blocks = (K + BLOCK_K - 1) / BLOCK_K;
    const int first_block = (u32)(all_blocks * rank) / SPLIT, blocks = (u32)(all_blocks * (rank + 1)) / SPLIT - first_block;
    // Tiles lie along N; only where there is one for each CTA may they also lie along M.
    const int tiles_m = (M + TOKENS - 1) / TOKENS, tile = blockIdx.x / SPLIT, tile_n = tiles_m == 1 ? tile : tile / tiles_m;
    const int m = (tile - tile_n * tiles_m) * TOKENS, first_n = tile_n * TILE, step = tiles_m == 1 ? gridDim.x / SPLIT * TILE : N;

    const u32 base = smem_addr(smem), tokens = base + stages * B_BYTES, scales = tokens + stages * A_BYTES;
    // The only tile of a CTA leaves in place of the stages, which by then are free.
    const bool only = SPLIT > 1 || (N + TILE - 1) / TILE * tiles_m <= gridDim.x;
    const u32 received = scales + stages * SA_PITCH, c_buffer = only ? base : received;
    const u32 all_received = received + (only ? RECEIVED : C_BYTES), barriers = all_received + 8;
    auto full = [&](int stage) { return barriers + stage * 16; };
    auto empty = [&](int stage) { return barriers + stage * 16 + 8; };

    // The next load: block `at` of the tile at row `next_n` of B, into stage `into`.
    int next_n = first_n, at = 0, into = 0;
    auto load = [&] {
        const int k = first_block + at;
        barrier_expect(full(into), B_BYTES + A_BYTES + SA_BYTES);
        tma_load_evict_first(base + into * B_BYTES, &map_b, full(into), k * BLOCK_K, next_n);
        tma_load(tokens + into * A_BYTES, &map_a, full(into), k * BLOCK_K, m);
        tma_load(scales + into * SA_PITCH, &map_sa, full(into), m, k);
        if (++into == stages) into = 0;
        if (++at == blocks) {
            at = 0;
            next_n += step;
        }
    };
    if (warp == WARPS && elect_one()) {
        // Each barrier and at once the load that it counts: the first bytes are asked for as early as can be.
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), WARPS);
            barrier_init_fence();
            if (next_n < N && blocks) load();
        }
        if (SPLIT > 1) {
            barrier_init(all_received, 1);
            barrier_init_fence();
            barrier_expect(all_received, max(min(SHARE, GROUPS - rank * SHARE), 0) * (SPLIT - 1) * CONSUMERS * 16);
        }
    }
    __syncthreads();
    if (SPLIT > 1) cluster_arrive();  // whoever waits for all of the cluster knows that it may send to `received`

    if (warp == WARPS) {
        if (elect_one() && blocks) {
            for (u32 phase = 0; next_n < N; phase ^= into == 0) {
                barrier_wait(empty(into), phase);
                load();
            }
        }
        __syncwarp();
        if (SPLIT > 1) cluster_wait();
        return;
    }

    const int group = warp / 4, last_block = (N - 1) / 128;
    // B's scales of 32 blocks of a tile, one a lane.
    auto scales_from = [&](int n, int block) {
        const float* row = sb + (long long)min((n + group * 64) / 128, last_block) * stride_sb;
        return __ldg(row + first_block + max(min(block + lane, blocks - 1), 0));
    };
    float scales_next = scales_from(first_n, 0);
    int stage = 0;
    u32 phase = 0;
    for (int n = first_n; n < N; n += step) {
        float total[TOKENS / 2];
#pragma unroll
        for (int i = 0; i < TOKENS / 2; ++i) total[i] = 0.f;
        for (int first = 0; first < blocks; first += 32) {
            const float scales_now = scales_next;
            const bool last = first + 32 >= blocks;
            scales_next = scales_from(last ? n + step : n, last ? 0 : first + 32);
            const int count = min(blocks - first, 32);
            for (int i = 0; i < count; ++i) {
                const u64 b = operand_k_major(base + stage * B_BYTES + group * 64 * BLOCK_K), a = operand_k_major(tokens + stage * A_BYTES);
                const u32 columns = scales + stage * SA_PITCH + lane % 4 * 8;
                barrier_wait(full(stage), phase);
                float part[PARTS][PART / 2];
#pragma unroll
                for (int h = 0; h < PARTS; ++h) registers_fence(part[h]);
                wgmma_begin();
#pragma unroll
                for (int h = 0; h < PARTS; ++h) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply(part[h], b + 2 * j, a + h * (PART * BLOCK_K / 16) + 2 * j, j != 0);
                    wgmma_commit();
                }
                const float scale = __shfl_sync(0xffffffffu, scales_now, i);
#pragma unroll
                for (int h = 0; h < PARTS; ++h) {
                    // While the product runs: the scales of this thread's columns, two of every eight tokens.
                    float2 s[PART / 8];
#pragma unroll
                    for (int j = 0; j < PART / 8; ++j) s[j] = smem_load2(columns + (h * PART / 8 + j) * 32);
#pragma unroll
                    for (int g = h; g < PARTS; ++g) registers_fence(part[g]);
                    if (h + 1 < PARTS) wgmma_wait<1>();
                    else wgmma_wait<0>();
                    registers_fence(part[h]);
                    if (h + 1 == PARTS && lane == 0) barrier_arrive(empty(stage));
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
                if (++stage == stages) {
                    stage = 0;
                    phase ^= 1;
                }
            }
        }

        // The share of this CTA: rows 8 * SHARE * rank to 8 * SHARE * (rank + 1) of the tile of C. The same thread of every CTA holds
        // the same elements.
        float sum[SHARE * 4];
        if (SPLIT == 1) {
#pragma unroll
            for (int i = 0; i < SHARE * 4; ++i) sum[i] = total[i];
        } else {
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

        // Transposed through shared memory, so that rows of C are written in 16 bytes a thread.
        const u32 to = c_buffer + ((lane % 4) * 2 * PITCH + warp * 16 + lane / 4) * 4;
        const bool aligned = (((u64)c | (u64)stride_c * sizeof(Element)) & 15) == 0;
#pragma unroll
        for (int h = 0; h < SHARE * 8; h += C_ROWS) {
            named_sync<CONSUMERS>(1);
#pragma unroll
            for (int j = 0; j < C_ROWS / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) smem_store(to + ((8 * j + e % 2) * PITCH + e / 2 * 8) * 4, sum[h / 2 + 4 * j + e]);
            }
            named_sync<CONSUMERS>(1);
            const int of_tile = rank * SHARE * 8 + h, first_row = m + of_tile, rows = min(min(C_ROWS, TOKENS - of_tile), M - first_row);
            for (int i = threadIdx.x; i < rows * (TILE / VECTOR); i += CONSUMERS) {
                const int row = i / (TILE / VECTOR), in_row = i % (TILE / VECTOR) * VECTOR, col = n + in_row;
                if (col >= N) continue;
                float x[VECTOR];
#pragma unroll
                for (int e = 0; e < VECTOR; e += 4) *(float4*)(x + e) = smem_load4(c_buffer + (row * PITCH + in_row + e) * 4);
                Element* to = c + (long long)(first_row + row) * stride_c + col;
                alignas(16) Element y[VECTOR];
                if (aligned && col + VECTOR <= N) {
                    if (ACCUMULATE) *(uint4*)y = *(const uint4*)to;
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e) y[e] = finished(x[e], bias, col + e, y[e]);
                    *(uint4*)to = *(const uint4*)y;
                } else {
#pragma unroll
                    for (int e = 0; e < VECTOR; ++e)
                        if (col + e < N) to[e] = finished(x[e], bias, col + e, to[e]);
                }
            }
        }
        if (SPLIT > 1) break;  // the launch has a cluster for each tile
    }
}
