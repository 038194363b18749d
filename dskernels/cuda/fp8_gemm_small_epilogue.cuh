// The epilogue of fp8_gemm_small.cuh: from the sums in registers to C. With SPLIT > 1, the CTAs of a cluster first exchange their partial sums, and
// each adds up a share of the tile (`add_up`). Rows are then transposed through shared memory, since the accumulators hold C transposed, and written
// with the bias by ordinary stores (`write`).
//
// It uses the options and constants of fp8_gemm_small.cuh, which includes it after defining them.
#pragma once

constexpr int VECTOR = 16 / sizeof(Element);  // elements of C in 16 bytes

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
// An element of C, from its sum and, with ACCUMULATE, the existing element.
__device__ __forceinline__ Element finished(float x, const void* bias, int n, Element before) {
    if (BIAS == 3) x = add(x, __ldg((const float*)bias + n));
    else if (BIAS) x = add(x, widen(__ldg((const u16*)bias + n), BIAS - 1));
    return rounded(ACCUMULATE ? add(x, read(before)) : x);
}

// Where C is, and what is added to it. C has `columns` columns; `stride` is the number of elements from one row to the next.
struct Output {
    Element* c;
    const void* bias;
    int columns, stride;
};

// Add up this CTA's share of the cluster's tile of C, its rows 8 * SHARE * rank to 8 * SHARE * (rank + 1). Each thread first sends its partial sums of
// the other CTAs' shares to the thread with the same number there, which has the same elements. Those CTAs' barrier `all_received` counts the bytes.
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

// Write SHARE * 8 rows of the tile, from its row `of_tile` on, to C, in which the tile begins at row `first_row` and has `rows` rows. They are
// transposed through shared memory, so that a thread writes 16 bytes.
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
