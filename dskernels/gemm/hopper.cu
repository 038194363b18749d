// C[M, N] = A[M, K] @ B[N, K].T for e4m3 A in 1x128 tiles and B in 128x128 blocks (or 1x128 tiles), on sm_90a.
//
// One CTA computes BLOCK_M x 128 tiles of C, one after another. Warpgroup 2 loads: for each 128 of K, the tiles of A and B and the
// scales of A's rows go to one of STAGES buffers in shared memory, by the tensor memory accelerator. Warpgroups 0 and 1 multiply:
// each takes every other 64 rows, WAVES times. A product of 128 along K starts from a fresh accumulator (the tensor cores keep about 14
// bits in e4m3) and is promoted, times both scales, into fp32 registers, while the other warpgroup's product runs.
// Two CTAs side by side along N form a cluster: each loads half of their common A tile and multicasts it to both.
//
// Options (-D): WAVES 1 or 2, STAGES, CLUSTER 1 or 2, B_ROWS 128 or 1, GROUP (tile rows walked before the next column, for L2),
// OUT 0 (bf16), 1 (fp16), 2 (fp32), BIAS 0 (none), 1 (bf16), 2 (fp16), 3 (fp32), DIRECT 1 (C is written, or with ACCUMULATE added to, by
// ordinary stores, for fp32 and for rows that the accelerator cannot address) or 0 (by the accelerator, from C_BUFFERS buffers).

#include "wgmma.cuh"

constexpr int BLOCK_M = 128 * WAVES, BLOCK_N = 128, BLOCK_K = 128;
constexpr int A_BYTES = BLOCK_M * BLOCK_K, B_BYTES = BLOCK_N * BLOCK_K, SA_BYTES = BLOCK_M * 4, SB_BYTES = B_ROWS == 1 ? BLOCK_N * 4 : 0;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES + SA_BYTES + SB_BYTES;
constexpr int C_BYTES = DIRECT ? 0 : 64 * 64 * 2;  // 64 rows, 64 columns
constexpr int OFFSET_A = 0, OFFSET_B = STAGES * A_BYTES, OFFSET_C = OFFSET_B + STAGES * B_BYTES;
constexpr int OFFSET_SA = OFFSET_C + 2 * C_BUFFERS * C_BYTES, OFFSET_SB = OFFSET_SA + STAGES * SA_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_SB + STAGES * SB_BYTES;

#if OUT == 2
typedef float Element;
#else
typedef u16 Element;
#endif

__device__ __forceinline__ float widen(u16 x, int kind) {
    float wide;
    if (kind == 0) return __uint_as_float((u32)x << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    if (OUT == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Write x to C, or add it to what is there.
__device__ __forceinline__ void store(Element* c, float x) {
#if OUT == 2
    *c = ACCUMULATE ? *c + x : x;
#else
    *c = (Element)pack(ACCUMULATE ? widen(*c, OUT) + x : x, 0.f);
#endif
}

// Volatile, so that the loads stay where they are used: gathered in front of the sums they spill registers.
__device__ __forceinline__ float bias_at(const void* bias, int col) {
    if (BIAS == 3) {
        float x;
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"((const float*)bias + col));
        return x;
    }
    u16 x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"((const u16*)bias + col));
    return widen(x, BIAS == 1 ? 0 : 1);
}

// (row, column) of a tile: down GROUP rows before the next column.
__device__ __forceinline__ void tile_of(int i, int tiles_m, int tiles_n, int& m, int& n) {
    const int group = i / (GROUP * tiles_n), first = group * GROUP, height = min(tiles_m - first, GROUP);
    const int inside = i - group * GROUP * tiles_n;
    m = first + inside % height;
    n = inside / height;
}

extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(384, 1)
fp8_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
         const __grid_constant__ TensorMap map_sb, const __grid_constant__ TensorMap map_c, const float* __restrict__ sb, const void* __restrict__ bias, Element* c,
         int M, int N, int K, int stride_sb, int stride_c) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    // Through a shuffle, so that the compiler knows them to be the same in all lanes.
    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4;
    const int lane = threadIdx.x % 32;
    const u32 rank = CLUSTER > 1 ? cluster_rank() : 0;
    auto full = [&](int stage) { return base + OFFSET_BARRIERS + stage * 8; };
    auto empty = [&](int stage) { return base + OFFSET_BARRIERS + (STAGES + stage) * 8; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), 8 * CLUSTER);  // one lane of each consumer warp of each CTA that shares the stage
        }
        barrier_init_fence();
    }
    if (CLUSTER > 1) cluster_sync();
    else __syncthreads();

    const int tiles_m = (M + BLOCK_M - 1) / BLOCK_M, tiles_n = ((N + BLOCK_N - 1) / BLOCK_N + CLUSTER - 1) / CLUSTER;
    const int tiles = tiles_m * tiles_n, blocks_k = (K + BLOCK_K - 1) / BLOCK_K, step = gridDim.x / CLUSTER;
    int stage = 0;
    u32 phase = 0;
    auto advance = [&] {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    };

    if (group == 2) {
        registers_shrink<40>();
        if (warp == 0 && lane == 0) {
            for (int t = blockIdx.x / CLUSTER; t < tiles; t += step) {
                int m, n;
                tile_of(t, tiles_m, tiles_n, m, n);
                n = n * CLUSTER + rank;
                for (int k = 0; k < blocks_k; ++k, advance()) {
                    barrier_wait(empty(stage), phase ^ 1);
                    barrier_expect(full(stage), STAGE_BYTES);
                    const u32 a = base + OFFSET_A + stage * A_BYTES;
                    if (CLUSTER > 1) {
                        tma_load_multicast(a + rank * (A_BYTES / 2), &map_a, full(stage), k * BLOCK_K, m * BLOCK_M + rank * (BLOCK_M / 2), 3);
                    } else {
                        for (int half = 0; half < 2; ++half)
                            tma_load(a + half * (A_BYTES / 2), &map_a, full(stage), k * BLOCK_K, m * BLOCK_M + half * (BLOCK_M / 2));
                    }
                    tma_load(base + OFFSET_SA + stage * SA_BYTES, &map_sa, full(stage), m * BLOCK_M, k);
                    tma_load(base + OFFSET_B + stage * B_BYTES, &map_b, full(stage), k * BLOCK_K, n * BLOCK_N);
                    if (B_ROWS == 1) tma_load(base + OFFSET_SB + stage * SB_BYTES, &map_sb, full(stage), n * BLOCK_N, k);
                }
            }
        }
    } else {
        registers_grow<232>();
        const int last_block = (N + 127) / 128 - 1;
        const int row = warp * 16 + lane / 4;  // of this thread's first accumulator, in the 64 rows of a wave
        const u64 first_a = operand_k_major(base + OFFSET_A + group * 64 * BLOCK_K), first_b = operand_k_major(base + OFFSET_B);
        const u32 first_sa = base + OFFSET_SA + (group * 64 + row) * 4;
        for (int t = blockIdx.x / CLUSTER; t < tiles; t += step) {
            int m, n;
            tile_of(t, tiles_m, tiles_n, m, n);
            n = n * CLUSTER + rank;
            const float* scales_b = sb + (long long)min(n, last_block) * stride_sb;
            float next_scale = B_ROWS == 1 ? 1.f : __ldg(scales_b);
            float total[WAVES][64];
#pragma unroll
            for (int w = 0; w < WAVES; ++w)
#pragma unroll
                for (int i = 0; i < 64; ++i) total[w][i] = 0.f;
            for (int k = 0; k < blocks_k; ++k, advance()) {
                const float scale = next_scale;
                if (B_ROWS != 1) next_scale = __ldg(scales_b + min(k + 1, blocks_k - 1));
                barrier_wait(full(stage), phase);
                const u64 b = first_b + stage * (B_BYTES / 16);
#pragma unroll
                for (int w = 0; w < WAVES; ++w) {
                    const u64 a = first_a + (stage * A_BYTES + w * 128 * BLOCK_K) / 16;
                    float part[64];
                    registers_fence(part);
                    wgmma_begin();
#pragma unroll
                    for (int j = 0; j < 4; ++j) multiply(part, a + 2 * j, b + 2 * j, j != 0);
                    wgmma_commit();
                    // While the product runs: the scales of this thread's two rows.
                    const u32 at = first_sa + stage * SA_BYTES + w * 512;
                    const float scale_0 = smem_load(at) * scale, scale_1 = smem_load(at + 32) * scale;
                    registers_fence(part);
                    wgmma_wait<0>();
                    if (B_ROWS == 1) {
                        const u32 columns = base + OFFSET_SB + stage * SB_BYTES + (lane % 4) * 8;
#pragma unroll
                        for (int j = 0; j < 16; ++j) {
                            const float2 s = smem_load2(columns + j * 32);
                            total[w][4 * j] += part[4 * j] * (scale_0 * s.x);
                            total[w][4 * j + 1] += part[4 * j + 1] * (scale_0 * s.y);
                            total[w][4 * j + 2] += part[4 * j + 2] * (scale_1 * s.x);
                            total[w][4 * j + 3] += part[4 * j + 3] * (scale_1 * s.y);
                        }
                    }
                    if (w == WAVES - 1 && lane < CLUSTER) barrier_arrive_at(empty(stage), lane);
                    if (B_ROWS != 1) {
#pragma unroll
                        for (int j = 0; j < 16; ++j) {
                            total[w][4 * j] += part[4 * j] * scale_0;
                            total[w][4 * j + 1] += part[4 * j + 1] * scale_0;
                            total[w][4 * j + 2] += part[4 * j + 2] * scale_1;
                            total[w][4 * j + 3] += part[4 * j + 3] * scale_1;
                        }
                    }
                }
            }
            if (BIAS && !DIRECT) {
#pragma unroll
                for (int j = 0; j < 16; ++j) {
                    const int col = n * BLOCK_N + j * 8 + (lane % 4) * 2;
                    const float low = col < N ? bias_at(bias, col) : 0.f, high = col + 1 < N ? bias_at(bias, col + 1) : 0.f;
#pragma unroll
                    for (int w = 0; w < WAVES; ++w) {
                        total[w][4 * j] += low;
                        total[w][4 * j + 1] += high;
                        total[w][4 * j + 2] += low;
                        total[w][4 * j + 3] += high;
                    }
                }
            }
            if (DIRECT) {
#pragma unroll
                for (int w = 0; w < WAVES; ++w) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const int r = m * BLOCK_M + (w * 2 + group) * 64 + row + i * 8;
                        if (r >= M) continue;
                        Element* c_row = c + (long long)r * stride_c;
#pragma unroll
                        for (int j = 0; j < 16; ++j) {
                            const int col = n * BLOCK_N + j * 8 + (lane % 4) * 2;
                            float low = total[w][4 * j + 2 * i], high = total[w][4 * j + 2 * i + 1];
                            if (BIAS && col < N) low += bias_at(bias, col);
                            if (BIAS && col + 1 < N) high += bias_at(bias, col + 1);
#if OUT == 2 && !ACCUMULATE
                            if (PAIRS && col + 1 < N) {
                                *(float2*)(c_row + col) = make_float2(low, high);
                                continue;
                            }
#endif
                            if (col < N) store(c_row + col, low);
                            if (col + 1 < N) store(c_row + col + 1, high);
                        }
                    }
                }
            } else {
                // Registers -> shared memory, in the accelerator's 128-byte swizzle -> global memory, 64 columns at a time.
                const int r = warp * 16 + lane % 16;
#pragma unroll
                for (int i = 0; i < 2 * WAVES; ++i) {
                    const int w = i / 2, half = i % 2;
                    const u32 buffer = base + OFFSET_C + (group * C_BUFFERS + i % C_BUFFERS) * C_BYTES;
                    if (warp == 0 && lane == 0) tma_store_wait_read<C_BUFFERS - 1>();
                    named_sync<128>(group + 1);
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        // 16 columns: four 8x8 matrices, rows 0-7 and 8-15 of columns 0-7, then of columns 8-15.
                        const float* x = total[w] + half * 32 + j * 8;
                        smem_store_matrix(buffer + r * 128 + (((j * 2 + lane / 16) ^ (r % 8)) * 16), pack(x[0], x[1]),
                                          pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
                    }
                    proxy_fence();
                    named_sync<128>(group + 1);
                    if (warp == 0 && lane == 0) {
                        tma_store(&map_c, buffer, n * BLOCK_N + half * 64, m * BLOCK_M + (w * 2 + group) * 64);
                        tma_store_commit();
                    }
                }
            }
        }
        if (!DIRECT && warp == 0 && lane == 0) tma_store_wait();
    }
    if (CLUSTER > 1) cluster_sync();  // a CTA must not end while the other may still arrive at its barriers
}
