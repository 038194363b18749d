// Products of a warpgroup (wgmma) with fp32 accumulators in registers: of e4m3 tiles, m64nNk32, or of bf16 or fp16 tiles, m64nNk16. A and B (64 and N
// rows of 128 bytes) are in shared memory, and are named by descriptors. With `keep` 0 the accumulators start from zero, with 1 the product is added.
//
// d[4j + 2i + e] of a thread is the element in row 16 * warp + lane / 4 + 8i and column 8j + 2 * (lane % 4) + e of the 64 x N product.
#pragma once

#include "ptx.cuh"

// ---- operand lists, which the assembler requires in full ----------------------------------------------------------

#define REGISTERS_4 "%0, %1, %2, %3"
#define REGISTERS_8 REGISTERS_4 ", %4, %5, %6, %7"
#define REGISTERS_16 REGISTERS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define REGISTERS_32 REGISTERS_16 \
    ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define REGISTERS_64 REGISTERS_32 \
    ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
    ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define REGISTERS_96 REGISTERS_64 \
    ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
    ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define REGISTERS_128 REGISTERS_96 \
    ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
    ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"

#define SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define SUMS_32(i) SUMS_16(i), SUMS_16(i + 16)
#define SUMS_64(i) SUMS_32(i), SUMS_32(i + 32)
#define SUMS_96(i) SUMS_64(i), SUMS_32(i + 64)
#define SUMS_128(i) SUMS_64(i), SUMS_64(i + 64)

// Defines multiply(d, a, b, keep) for N columns, which are R = N / 2 registers per thread. A, B and KEEP are the numbers of the operands after these.
#define DEFINE_PRODUCTS(N, R, A, B, KEEP)                                                                                 \
    __device__ __forceinline__ void multiply(float (&d)[R], u64 a, u64 b, int keep) {                                     \
        asm volatile("{.reg .pred p; setp.ne.b32 p, %" #KEEP ", 0;\n"                                                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGISTERS_##R "}, %" #A ", %" #B        \
                     ", p, 1, 1;}\n"                                                                                      \
                     : SUMS_##R(0)                                                                                        \
                     : "l"(a), "l"(b), "r"(keep));                                                                        \
    }

DEFINE_PRODUCTS(8, 4, 4, 5, 6)
DEFINE_PRODUCTS(16, 8, 8, 9, 10)
DEFINE_PRODUCTS(32, 16, 16, 17, 18)
DEFINE_PRODUCTS(64, 32, 32, 33, 34)
DEFINE_PRODUCTS(128, 64, 64, 65, 66)
DEFINE_PRODUCTS(192, 96, 96, 97, 98)

// The same for bf16 or fp16 tiles, m64nNk16. FLIP_A, FLIP_B: 1 if the operand's rows of 128 bytes run along M or N instead of K.
#define HALF_PRODUCT(TYPE, N, R, A, B, KEEP, F, G)                                                                        \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #KEEP ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS_##R "}, %" #A ", %" #B    \
                 ", p, 1, 1, %" #F ", %" #G ";}\n"                                                                        \
                 : SUMS_##R(0)                                                                                            \
                 : "l"(a), "l"(b), "r"(keep), "n"(FLIP_A), "n"(FLIP_B))
#define DEFINE_HALF_PRODUCTS(N, R, A, B, KEEP, F, G)                                                                      \
    template <bool FP16, int FLIP_A, int FLIP_B>                                                                          \
    __device__ __forceinline__ void multiply_half(float (&d)[R], u64 a, u64 b, int keep) {                                \
        if (FP16) HALF_PRODUCT("f16", N, R, A, B, KEEP, F, G);                                                            \
        else HALF_PRODUCT("bf16", N, R, A, B, KEEP, F, G);                                                                \
    }

DEFINE_HALF_PRODUCTS(8, 4, 4, 5, 6, 7, 8)
DEFINE_HALF_PRODUCTS(16, 8, 8, 9, 10, 11, 12)
DEFINE_HALF_PRODUCTS(32, 16, 16, 17, 18, 19, 20)
DEFINE_HALF_PRODUCTS(64, 32, 32, 33, 34, 35, 36)
DEFINE_HALF_PRODUCTS(128, 64, 64, 65, 66, 67, 68)
DEFINE_HALF_PRODUCTS(192, 96, 96, 97, 98, 99, 100)
DEFINE_HALF_PRODUCTS(256, 128, 128, 129, 130, 131, 132)

// ---- around a product ---------------------------------------------------------------------------------------------

// A descriptor from its lower half. The upper half is always the same: 8 rows every 1,024 bytes, the 128-byte swizzle.
__device__ __forceinline__ u64 operand(u32 low) { return (u64)low | ((u64)64 << 32) | ((u64)1 << 62); }
// Descriptor of an operand tile whose rows run along K: 128 bytes each, with the 128-byte swizzle, 8 rows every 1,024 bytes. Adding 2 to the
// descriptor moves on by 32 bytes along K (32 elements of e4m3, 16 of bf16), adding 64 by 8 rows.
__device__ __forceinline__ u64 operand_k_major(u32 addr) {
    return operand(((addr & 0x3FFFF) >> 4) | (1 << 16));
}
// Descriptor of an operand tile whose rows run along M or N: 128 bytes each, 64 elements of 16 bits; 8 steps of K every 1,024 bytes, and the next 64
// elements of M or N `stride` bytes further on. Adding 128 moves on by 16 along K.
__device__ __forceinline__ u64 operand_mn_major(u32 addr, u32 stride) {
    return operand(((addr & 0x3FFFF) >> 4) | (stride / 16 << 16));
}
// The same with the 64-byte swizzle: rows of 64 bytes, 32 elements of 16 bits, 8 rows every 512 bytes. If rows run along K, adding 2 moves on by 16
// along K, and a tile ends after 32. If they run along M or N, the next 32 elements are `stride` bytes further on, and adding 64 moves on by 16 along
// K.
__device__ __forceinline__ u64 operand_narrow(u32 low) { return (u64)low | ((u64)32 << 32) | ((u64)2 << 62); }
__device__ __forceinline__ u64 operand_narrow_k_major(u32 addr) { return operand_narrow(((addr & 0x3FFFF) >> 4) | (1 << 16)); }
__device__ __forceinline__ u64 operand_narrow_mn_major(u32 addr, u32 stride) {
    return operand_narrow(((addr & 0x3FFFF) >> 4) | (stride / 16 << 16));
}
__device__ __forceinline__ void wgmma_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Tells the compiler that an asynchronous product may read or write these registers here, so that it does not move accesses to them across this
// point.
template <int N> __device__ __forceinline__ void registers_fence(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
