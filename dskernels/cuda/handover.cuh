// How warps hand shared memory over to each other, in a way that compute-sanitizer's racecheck can be made to understand.
//
// Normally one lane arrives at a barrier for its whole warp, and groups of warps take turns by named barriers. racecheck credits an arrival only with
// the accesses of the arriving lane, and does not follow memory that is handed back and forth by named barriers: it reports races in correct kernels
// of ten lines (docs/mla_decode.md, "What sanitizers report"). With RACECHECK 1, which only `make sanitize` sets, each lane arrives for itself, and
// named barriers are replaced by barriers in shared memory. Otherwise these functions are the plain instructions.
#pragma once

#include "ptx.cuh"

#ifndef RACECHECK
#define RACECHECK 0
#endif

constexpr u32 OF_WARP = RACECHECK ? 32 : 1;  // arrivals per warp

// Called by the whole warp, when all of its lanes have received what they read, or have passed a __syncwarp after what they wrote.
__device__ __forceinline__ void barrier_arrive_warp(u32 barrier, int lane) {
    if (RACECHECK || lane == 0) barrier_arrive(barrier);
}

#if RACECHECK
constexpr int HANDOVERS = 16;  // number of ids, as of named barriers
__device__ __forceinline__ u32 handover(int id) {
    __shared__ u64 barriers[HANDOVERS];
    return smem_addr(barriers) + id * 8;
}
// The phase in which this thread will wait next at each id, one bit per id.
__device__ __forceinline__ u16& handover_phases() {
    __shared__ u16 phases[384];
    return phases[threadIdx.x];
}
#endif

// Called by the whole CTA, before its first barrier. `threads(id)` says how many threads meet at the named barrier `id`.
template <class Threads> __device__ __forceinline__ void handovers_init(Threads threads) {
#if RACECHECK
    handover_phases() = 0;
    if (threadIdx.x == 0)
        for (int id = 1; id < HANDOVERS; ++id) barrier_init(handover(id), threads(id));
#endif
}
template <int THREADS> __device__ __forceinline__ void handover_arrive(int id) {
#if RACECHECK
    handover_phases() ^= 1 << id;
    barrier_arrive(handover(id));
#else
    named_arrive<THREADS>(id);
#endif
}
template <int THREADS> __device__ __forceinline__ void handover_sync(int id) {
#if RACECHECK
    const u32 phase = handover_phases() >> id & 1;
    handover_arrive<THREADS>(id);
    barrier_wait(handover(id), phase);
#else
    named_sync<THREADS>(id);
#endif
}
// For warps that reach the barrier by different instructions. `bar.sync` is short for `barrier.sync.aligned`: PTX only requires that all lanes of a
// warp execute the same one, but synccheck requires that all threads do.
template <int THREADS> __device__ __forceinline__ void handover_sync_apart(int id) {
#if RACECHECK
    handover_sync<THREADS>(id);
#else
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
#endif
}
