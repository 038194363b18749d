// How warps hand shared memory on to each other, so that compute-sanitizer can follow it.
//
// One lane arrives at a barrier for its warp, and by named barriers groups of warps take turns. racecheck takes an arrival for what the arriving
// lane did alone, and does not follow memory that goes to and fro by named barriers: it reports kernels of ten lines that are right
// (docs/mla_decode.md, "What sanitizers report"). With RACECHECK 1, which nothing but `make sanitize` asks for, each lane arrives for itself, and
// named barriers are barriers in shared memory. Else these are the plain instructions.
#pragma once

#include "ptx.cuh"

#ifndef RACECHECK
#define RACECHECK 0
#endif

constexpr u32 OF_WARP = RACECHECK ? 32 : 1;  // arrivals of a warp

// The whole warp's work: by then all its lanes have what they read, or a __syncwarp behind what they wrote.
__device__ __forceinline__ void barrier_arrive_warp(u32 barrier, int lane) {
    if (RACECHECK || lane == 0) barrier_arrive(barrier);
}

#if RACECHECK
constexpr int HANDOVERS = 16;  // ids
__device__ __forceinline__ u32 handover(int id) {
    __shared__ u64 barriers[HANDOVERS];
    return smem_addr(barriers) + id * 8;
}
// Which phase of each id comes next for this thread: a bit for each.
__device__ __forceinline__ u16& handover_phases() {
    __shared__ u16 phases[384];
    return phases[threadIdx.x];
}
#endif

// The whole CTA's work, before its first barrier: `threads(id)` is how many come together at a named barrier.
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
// Of warps that come by different instructions. `bar.sync` is short for `barrier.sync.aligned`, of which synccheck asks that it is one instruction
// for all who come; PTX, that it is one for each warp.
template <int THREADS> __device__ __forceinline__ void handover_sync_apart(int id) {
#if RACECHECK
    handover_sync<THREADS>(id);
#else
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
#endif
}
