// The type of C's elements, by the option OUT: 0 bf16, 1 fp16 (both as 16-bit integers), 2 fp32.
#pragma once

#include "ptx.cuh"

#if OUT == 2
typedef float Element;
#else
typedef u16 Element;
#endif

// Two numbers rounded to 16-bit elements and packed into a word, `low` at the lower address.
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    if (OUT == 0) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
