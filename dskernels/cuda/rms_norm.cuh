// The factor of RMSNorm, 1 / sqrt(mean of squares + eps), with the same bits as the reference's. The squares of bf16 numbers are added in fp64, where
// no order of addition changes the sum by an ulp of fp32.
#pragma once

#include "ptx.cuh"

// |x| in fp64, for an fp32 number x that was bf16. It takes two integer instructions instead of a conversion, of which a multiprocessor does 16 per
// clock. A number below 2^-126 becomes about 2^-127, whose square makes no difference to a mean in fp32; infinity becomes 2^128, whose square is
// infinite in fp32.
__device__ __forceinline__ double widened(float x) { return __hiloint2double(((__float_as_uint(x) & ~(1u << 31)) >> 3) + (896u << 20), 0); }

// Add the squares of a pair of bf16, each widened as above. The masks are in PTX, because the compiler would shift first, which takes one more
// instruction.
__device__ __forceinline__ void add_squares(double& sum, u32 pair) {
    u32 x, y;
    asm("and.b32 %0, %1, 0x7fff;" : "=r"(x) : "r"(pair));
    asm("and.b32 %0, %1, 0x7fff0000;" : "=r"(y) : "r"(pair));
    const double a = __hiloint2double((x << 13) + (896u << 20), 0), b = __hiloint2double((y >> 3) + (896u << 20), 0);
    sum = __fma_rn(a, a, sum);
    sum = __fma_rn(b, b, sum);
}
// The larger magnitudes of two pairs of bf16, NaN if one of the two is NaN (the signs of the results mean nothing); and whether a pair contains NaN.
__device__ __forceinline__ u32 larger_or_nan(u32 a, u32 b) {
    u32 c;
    asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(c) : "r"(a), "r"(b));
    return c;
}
__device__ __forceinline__ bool has_nan(u32 pair) { return (pair & 0x7fffu) > 0x7f80u || (pair & 0x7fff0000u) > 0x7f800000u; }

// 1 / sqrt(mean + eps), each operation rounded to nearest.
__device__ __forceinline__ float factor_of(double mean, float eps) {
    float x;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(x) : "d"(mean));
    x = add(x, eps);
    asm("sqrt.rn.f32 %0, %0;" : "+f"(x));
    asm("rcp.rn.f32 %0, %0;" : "+f"(x));
    return x;
}

// Two numbers rounded to bf16 in a word, the first in the lower half.
__device__ __forceinline__ u32 narrowed(float x, float y) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(y), "f"(x));
    return pair;
}
