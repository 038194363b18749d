// Steps that the choice of experts and its gradient share: reading elements of a row of logits, and the affinity of a token to an expert.
//
// Options (-D): DTYPE of the logits, 0 bf16, 1 fp16, 2 fp32; SOFTMAX 1: affinities are a softmax over the experts, 0: sigmoids.
#pragma once

#include "ptx.cuh"

#if DTYPE == 2
typedef float Element;
#else
typedef u16 Element;
#endif

constexpr u32 ALL = 0xffffffffu;
constexpr float LARGEST = 0x1p126f, LEAST_SUM = 1e-30f;  // as in the reference: the value that stands for infinity, the least sum to divide by
constexpr float MOST_FINITE = 0x1.fffffep127f;

// ---- elements ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float number(Element x) {
#if DTYPE == 2
    return x;
#else
    return widen(x, DTYPE);
#endif
}
__device__ __forceinline__ Element element(float x) {
#if DTYPE == 2
    return x;
#else
    u16 bits;
    if (DTYPE == 0) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}
// N elements as one value, aligned to their total size, up to 16 bytes.
template <int N, class T> struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vector { T at[N]; };
template <int N, class T> __device__ __forceinline__ Vector<N, T> load(const T* p) { return *reinterpret_cast<const Vector<N, T>*>(p); }

// An integer key whose order is that of the floats; applied to its own bits, the function is its own inverse. (It distinguishes negative zero, but
// s + b is never that.)
__device__ __forceinline__ int key_of(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float float_of(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }
__device__ __forceinline__ float bounded(float x) { return fminf(fmaxf(x, -LARGEST), LARGEST); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, d));
    return x;
}
__device__ __forceinline__ float warp_max(float x) { return float_of(__reduce_max_sync(ALL, key_of(x))); }

// ---- affinities --------------------------------------------------------------------------------------------------

// 1 / (1 + exp(-x)) with the same bits as torch's, so that near ties are decided as in the reference; 0 below -87.3, where the result is denormal.
// The steps are those of CUDA's expf, with the sign of x moved into the constants: nvcc would spend an instruction on it.
__device__ __forceinline__ float sigmoid(float x) {
    float step, exponent, power, guess;
    asm("fma.rn.ftz.sat.f32 %0, %1, 0fBBBB989D, 0f3F000000;" : "=f"(step) : "f"(x));
    asm("fma.rm.ftz.f32 %0, %1, 0f437C0000, 0f4B400001;" : "=f"(exponent) : "f"(step));
    const float whole = __fadd_rn(exponent, -12583039.f);
    const float rest = __fmaf_rn(x, -1.925963033500011079e-08f, __fmaf_rn(x, -1.4426950216293334961f, -whole));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(rest));
    const float y = 1.f + fminf(__fmul_rn(__int_as_float(__float_as_int(exponent) << 23), power), 0x1p127f);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(y));
    return __fmaf_rn(__fmaf_rn(-y, guess, 1.f), guess, guess);  // a Newton step leaves the nearest float
}

// The affinities of a row, from its logits. SOFTMAX needs the largest logit, `top`, and one over the sum of the exponentials, `inverse`.
struct Affinity {
    float top, inverse;
    __device__ __forceinline__ float operator()(float x) const {
        return SOFTMAX ? __fmul_rn(expf(__fsub_rn(x, top)), inverse) : sigmoid(x);
    }
};
// `Affinity` of a row whose finite logits are spread over the lanes of a warp, N in each; `counts(v)` says which of a lane's `x` belong to the row.
template <int N, class Counts> __device__ __forceinline__ Affinity affinity_of(const float (&x)[N], Counts counts) {
    Affinity row = {0.f, 1.f};
    if (SOFTMAX) {
        float top = -MOST_FINITE, mass = 0.f;
#pragma unroll
        for (int v = 0; v < N; ++v) top = counts(v) ? fmaxf(top, x[v]) : top;
        row.top = warp_max(top);
#pragma unroll
        for (int v = 0; v < N; ++v) mass += counts(v) ? row(x[v]) : 0.f;
        row.inverse = __frcp_rn(warp_sum(mass));
    }
    return row;
}
