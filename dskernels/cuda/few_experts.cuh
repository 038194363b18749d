// Which experts a few tokens chose, each once, in shared memory: routed ones in the order of their numbers, then the shared ones.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ u32 smem_word(u32 addr) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr));
    return x;
}
__device__ __forceinline__ void smem_set_word(u32 addr, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"); }

// From the L2, as another kernel may have written it since this one began.
__device__ __forceinline__ int load_fresh(const int* p) {
    int x;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// A set of bits, one a routed expert; how many experts stand before those of each word; how many there are at all; and the list. Every thread of a
// CTA calls `clear`; `add` for the choices that are its own, a barrier after that; and `list`.
struct Chosen {
    static constexpr int WORDS = 32, BEFORE = 128, COUNT = 256, LIST = 272;
    u32 addr;

    __device__ __forceinline__ void clear() const {
        if (threadIdx.x < WORDS) smem_set_word(addr + threadIdx.x * 4, 0);
    }
    __device__ __forceinline__ void add(int id, int routed) const {
        if ((u32)id < (u32)routed) asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(addr + id / 32 * 4), "r"(1u << id % 32) : "memory");
    }
    __device__ __forceinline__ void list(int routed, int shared) const {
        __syncthreads();
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            u32 bits = smem_word(addr + lane * 4);
            int end = __popc(bits);
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const int before = __shfl_up_sync(~0u, end, d);
                if (lane >= d) end += before;
            }
            int place = end - __popc(bits);
            smem_set_word(addr + BEFORE + lane * 4, place);
            for (; bits; bits &= bits - 1) smem_set_word(addr + LIST + place++ * 4, lane * 32 + __ffs(bits) - 1);
            const int found = __shfl_sync(~0u, end, 31);
            for (int i = lane; i < shared; i += 32) smem_set_word(addr + LIST + (found + i) * 4, routed + i);
            if (lane == 0) smem_set_word(addr + COUNT, found + shared);
        }
        __syncthreads();
    }
    __device__ __forceinline__ int count() const { return smem_word(addr + COUNT); }
    __device__ __forceinline__ int expert(int place) const { return smem_word(addr + LIST + place * 4); }
    // Where a routed expert that was chosen stands in the list.
    __device__ __forceinline__ int place_of(int id) const {
        return smem_word(addr + BEFORE + id / 32 * 4) + __popc(smem_word(addr + id / 32 * 4) & ((1u << id % 32) - 1));
    }
};
