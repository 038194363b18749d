// The list, in shared memory, of the experts that a few tokens chose, each of them once: first the shared experts, then the routed ones by ascending
// id. The two kernels of moe/hopper_few.py both make it, instead of passing it on.
#pragma once

#include "ptx.cuh"

__device__ __forceinline__ u32 smem_word(u32 addr) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr));
    return x;
}
__device__ __forceinline__ void smem_set_word(u32 addr, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"); }

__device__ __forceinline__ void smem_or(u32 addr, u32 bits) { asm volatile("red.shared.or.b32 [%0], %1;" ::"r"(addr), "r"(bits) : "memory"); }
// A load from the L2, as the preceding kernel may have written the word since this one began.
__device__ __forceinline__ int load_fresh(const int* p) {
    int x;
    asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    return x;
}

// At `addr`: a set of bits, one for each routed expert; for each of its words, the position in the list of its first expert; the number of experts in
// the list; and the list. Every thread of the CTA calls `clear`; then, after a barrier, `add` for its own choices; then `list`, which begins and ends
// with a barrier.
struct Chosen {
    static constexpr int WORDS = 32, BEFORE = 128, COUNT = 256, LIST = 272;
    u32 addr;

    __device__ __forceinline__ void clear() const {
        if (threadIdx.x < WORDS) smem_set_word(addr + threadIdx.x * 4, 0);
    }
    __device__ __forceinline__ void add(int id, int routed) const {
        if ((u32)id < (u32)routed) smem_or(addr + id / 32 * 4, 1u << id % 32);
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
            int place = shared + end - __popc(bits);
            smem_set_word(addr + BEFORE + lane * 4, place);
            for (; bits; bits &= bits - 1) smem_set_word(addr + LIST + place++ * 4, lane * 32 + __ffs(bits) - 1);
            for (int i = lane; i < shared; i += 32) smem_set_word(addr + LIST + i * 4, routed + i);
            if (lane == 31) smem_set_word(addr + COUNT, shared + end);
        }
        __syncthreads();
    }
    __device__ __forceinline__ int count() const { return smem_word(addr + COUNT); }
    __device__ __forceinline__ int expert(int place) const { return smem_word(addr + LIST + place * 4); }
    // The position in the list of a routed expert that was chosen.
    __device__ __forceinline__ int place_of(int id) const {
        return smem_word(addr + BEFORE + id / 32 * 4) + __popc(smem_word(addr + id / 32 * 4) & ((1u << id % 32) - 1));
    }
};

// Steps through the blocks of K of all experts in the list, `of_expert` blocks for each: `place` is the expert's position in the list, `block` the
// block within the expert.
struct Walk {
    int of_expert, place, block;
    __device__ __forceinline__ Walk(int at, int of_expert) : of_expert(of_expert), place(at / of_expert), block(at - place * of_expert) {}
    __device__ __forceinline__ void next() {
        if (++block == of_expert) block = 0, ++place;
    }
};
// The range of those blocks that CTA `rank` of `split` has.
struct Share {
    int first, count;
    __device__ __forceinline__ Share(int all, int rank, int split) : first(all * rank / split), count(all * (rank + 1) / split - first) {}
};
