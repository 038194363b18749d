// Results of parts of a request, which are to be combined: what the decode kernel over the latent cache writes and what combines them.
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

__device__ __forceinline__ float nothing() { return __int_as_float(0xff800000); }  // -inf: a maximum, or log-sum-exp, of nothing

__device__ __forceinline__ float base_of(float largest) { return largest == nothing() ? 0.f : largest; }

// Where results go that are to be combined: two slots for each part, for the request that it goes on with and the one that it begins.
struct Work {
    float* sums;   // [2 * parts, padded_rows, VALUE]
    float* lse;    // [2 * parts, padded_rows], in powers of 2
    int4* spans;   // [spans(requests, parts)]: a request, the first part that has it, and how many do; what they say of one part or none is not used
    int padded_rows;
    __device__ __forceinline__ Work(float* work, int row_blocks, int parts) {
        padded_rows = row_blocks * BLOCK;
        sums = work;
        lse = work + 2ll * parts * padded_rows * VALUE;
        spans = (int4*)(lse + 2 * parts * padded_rows);
    }
};
// Of several parts are as many requests as there are, at most, and one that begins in each part: so a span is a request's, or a part's.
__device__ __forceinline__ int spans_of(int requests, int parts) { return min(requests, parts); }
