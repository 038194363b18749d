// How the warps of a CTA that multiplies many rows pass data to each other, in fp8_gemm.cuh and half_gemm.cuh. Operands pass through a ring of STAGES
// buffers, each with one barrier for "full" and one for "empty". C passes through buffers in shared memory, from which separate warps store it.
//
// A file that includes this one first defines these constants: CLUSTER, the number of CTAs that load for each other; OFFSET_BARRIERS, the offset of
// the ring's barriers in shared memory; HALVES, how many buffers for C each multiplying warpgroup has.
#pragma once

#include "stage.cuh"

constexpr int THREADS = 384;  // three warpgroups: two multiply, the third loads operands and stores C

// ---- operands ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 full(u32 base, int stage) { return base + OFFSET_BARRIERS + stage * 8; }
__device__ __forceinline__ u32 empty(u32 base, int stage) { return base + OFFSET_BARRIERS + (STAGES + stage) * 8; }

// One thread initialises the barriers. Before they are used, all CTAs of the cluster have to synchronise.
__device__ __forceinline__ void make_barriers(u32 base) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(full(base, i), 1);
        barrier_init(empty(base, i), 8 * CLUSTER);  // one lane of each multiplying warp of each CTA that shares the stage
    }
    barrier_init_fence();
}

// A warp has read a stage, and tells every CTA that loads into this stage.
__device__ __forceinline__ void release(u32 base, int stage, int lane) {
    if (lane < CLUSTER) barrier_arrive_at(empty(base, stage), lane);
}

// ---- C -------------------------------------------------------------------------------------------------------------

// Ids of named barriers of 160 threads: the 128 of a warpgroup that write a buffer for C, and the 32 of the warp that stores it. `written`: the
// buffer has been filled. `free_again`: TMA has read it.
__device__ __forceinline__ constexpr int written(int group, int half) { return 1 + group * HALVES + half; }
__device__ __forceinline__ constexpr int free_again(int group, int half) { return 1 + (2 + group) * HALVES + half; }
