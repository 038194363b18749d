// How the warps of a CTA that multiplies many rows hand data to each other. Operands: through a ring of STAGES buffers, each with a barrier
// that says when it is full and one that says when it is empty. C: through buffers from which warps of their own have it stored.
//
// Before a core includes this file it says, by constants, CLUSTER, the CTAs that load for each other; OFFSET_BARRIERS, where in shared memory
// the ring's barriers are; and HALVES, how many buffers for C each multiplying warpgroup has.
#pragma once

#include "stage.cuh"

constexpr int THREADS = 384;  // three warpgroups: two multiply, the third loads and has C stored

// ---- operands ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 full(u32 base, int stage) { return base + OFFSET_BARRIERS + stage * 8; }
__device__ __forceinline__ u32 empty(u32 base, int stage) { return base + OFFSET_BARRIERS + (STAGES + stage) * 8; }

// One thread makes the barriers; before they are used, all CTAs of the cluster are to meet.
__device__ __forceinline__ void make_barriers(u32 base) {
    for (int i = 0; i < STAGES; ++i) {
        barrier_init(full(base, i), 1);
        barrier_init(empty(base, i), 8 * CLUSTER);  // one lane of each multiplying warp of each CTA that shares the stage
    }
    barrier_init_fence();
}

// A warp has read a stage: it says so to every CTA that loads into it.
__device__ __forceinline__ void release(u32 base, int stage, int lane) {
    if (lane < CLUSTER) barrier_arrive_at(empty(base, stage), lane);
}

// ---- C -------------------------------------------------------------------------------------------------------------

// Named barriers of 160 threads, the 128 of a warpgroup that write a buffer and the 32 that have it stored: it is written; the tensor memory
// accelerator has read it.
__device__ __forceinline__ constexpr int written(int group, int half) { return 1 + group * HALVES + half; }
__device__ __forceinline__ constexpr int free_again(int group, int half) { return 1 + (2 + group) * HALVES + half; }
