// Partial results of a request that are to be combined: written by the decode kernels over the latent cache, and read by the one that combines them.
#pragma once

#include "element.cuh"

constexpr int VALUE = 512, ROPE = 64, BLOCK = 64;  // columns of a latent and of its rope part; query rows, or positions, of a tile
constexpr float LN_2 = 0.6931471805599453f;

// Programmatic dependent launch: the next kernel may begin; it waits until this one has ended.
__device__ __forceinline__ void let_next_begin() { asm volatile("griddepcontrol.launch_dependents;"); }
__device__ __forceinline__ void wait_for_last() { asm volatile("griddepcontrol.wait;" ::: "memory"); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }  // -inf: the maximum, or log-sum-exp, of nothing

__device__ __forceinline__ float base_of(float largest) { return largest == nothing() ? 0.f : largest; }

// A flag of a CTA of the decode kernel, in memory: 0 from before `let_next_begin` on, 1 when it has written everything.
__device__ __forceinline__ void clear_flag(int* flag) { asm volatile("st.relaxed.gpu.global.s32 [%0], 0; fence.acq_rel.gpu;" ::"l"(flag) : "memory"); }
__device__ __forceinline__ void raise_flag(int* flag) { asm volatile("fence.acq_rel.gpu; st.relaxed.gpu.global.s32 [%0], 1;" ::"l"(flag) : "memory"); }
__device__ __forceinline__ bool raised(const int* flag) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(flag) : "memory");
    return x != 0;
}

// Where results that are to be combined go: two slots for each part, one for the request that it continues and one for the request that it begins.
// They are rounded to 16 bits: half the bytes to write and to read, 4 of 126 us for 16 requests of 16,384 and 4 of 32 for one of 32,768; the square
// error of the result, which is rounded to 16 bits too, is then 2.1e-6 of its square instead of 1.6e-6.
struct Work {
    uint4* sums;   // [2 * parts, row_blocks, columns / 16, 4 warps, 32 lanes]: as the products leave them, see wgmma.cuh; rows r and r + 8 of two columns, and the same 8 columns on
    float* lse;    // [2 * parts, padded_rows], in powers of 2
    // [min(requests, parts)], since at most one request with several parts begins in each part: a request, its first part, and its number of parts;
    // entries for no or one part are not used.
    int4* spans;
    int* flags;  // [parts * row_blocks]
    int padded_rows, row_blocks;
    __device__ __forceinline__ Work(float* work, int row_blocks, int parts) {
        padded_rows = row_blocks * BLOCK;
        this->row_blocks = row_blocks;
        sums = (uint4*)work;
        lse = work + 1ll * parts * padded_rows * VALUE;
        flags = (int*)(lse + 2 * parts * padded_rows);
        spans = (int4*)(flags + (parts * row_blocks + 3) / 4 * 4);
    }
    // Of a slot and 64 rows, the sums of a warp's lane from column 16 * j on.
    __device__ __forceinline__ uint4* of(int slot, int row_block, int j, int warp, int lane) const {
        return sums + (((long long)slot * row_blocks + row_block) * (VALUE / 16) + j) * 128 + warp * 32 + lane;
    }
};
