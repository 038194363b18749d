// Steps that the attention kernels on sm_90a share: wgmma products of bf16 and fp16 for more widths than wgmma.cuh has, and with A from registers;
// and the running softmax of scores that such a product leaves in registers.
//
// A thread has two rows of a 64 x N product, see wgmma.cuh: s[4j + 2i + e] is in row 16 * warp + lane / 4 + 8i, column 8j + 2 * (lane % 4) + e. The
// four lanes of a quad share their two rows. The results of one product, packed in pairs by `pack_operand`, have the layout in which the next product
// takes its operand A from registers: so the weights of a softmax need not pass through shared memory.
#pragma once

#include "wgmma.cuh"

// ---- products ----------------------------------------------------------------------------------------------------

#define REGISTERS_40 REGISTERS_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define REGISTERS_48 REGISTERS_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define REGISTERS_56 REGISTERS_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define SUMS_40(i) SUMS_32(i), SUMS_8(i + 32)
#define SUMS_48(i) SUMS_32(i), SUMS_16(i + 32)
#define SUMS_56(i) SUMS_48(i), SUMS_8(i + 48)

// multiply_half<FP16, FLIP_A, FLIP_B>(d, a, b, keep) for widths that wgmma.cuh does not have; both operands are in shared memory.
DEFINE_HALF_PRODUCTS(80, 40, 40, 41, 42, 43, 44)
DEFINE_HALF_PRODUCTS(96, 48, 48, 49, 50, 51, 52)
DEFINE_HALF_PRODUCTS(112, 56, 56, 57, 58, 59, 60)

// The same with A, 64 x 16, in four registers per thread. They must not be overwritten before the product has been waited for.
#define REGISTER_PRODUCT(TYPE, N, R, A0, A1, A2, A3, B, KEEP, G)                                                          \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #KEEP ", 0;\n"                                                         \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" REGISTERS_##R "}, {%" #A0 ", %" #A1 \
                 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, %" #G ";}\n"                                                   \
                 : SUMS_##R(0)                                                                                            \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(FLIP_B))
#define DEFINE_REGISTER_PRODUCTS(N, R, A0, A1, A2, A3, B, KEEP, G)                                                        \
    template <bool FP16, int FLIP_B>                                                                                      \
    __device__ __forceinline__ void multiply_registers(float (&d)[R], const u32* a, u64 b, int keep) {                    \
        if (FP16) REGISTER_PRODUCT("f16", N, R, A0, A1, A2, A3, B, KEEP, G);                                              \
        else REGISTER_PRODUCT("bf16", N, R, A0, A1, A2, A3, B, KEEP, G);                                                  \
    }

DEFINE_REGISTER_PRODUCTS(64, 32, 32, 33, 34, 35, 36, 37, 38)
DEFINE_REGISTER_PRODUCTS(96, 48, 48, 49, 50, 51, 52, 53, 54)
DEFINE_REGISTER_PRODUCTS(128, 64, 64, 65, 66, 67, 68, 69, 70)
DEFINE_REGISTER_PRODUCTS(192, 96, 96, 97, 98, 99, 100, 101, 102)

// Two numbers rounded to 16-bit elements and packed into a word, `low` at the lower address.
template <bool FP16> __device__ __forceinline__ u32 pack_half(float low, float high) {
    u32 both;
    if (FP16) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// Convert a product's results to an operand A: columns 16k to 16k + 15 of `s` become p[4k] to p[4k + 3].
template <bool FP16, int N> __device__ __forceinline__ void pack_operand(u32 (&p)[N / 2], const float (&s)[N]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) p[i] = pack_half<FP16>(s[2 * i], s[2 * i + 1]);
}

// ---- softmax -----------------------------------------------------------------------------------------------------

constexpr float LN_2 = 0.6931471805599453f;
#define MINUS_INFINITY __int_as_float(0xFF800000)

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ float log2_fast(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// The maximum and the sum over the four lanes that share a row.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Mask scores: in row i, those from column `seen[i]` on become -inf. Columns count from this thread's first one, that is, without 2 * (lane % 4).
template <int N> __device__ __forceinline__ void hide(float (&s)[N], const int (&seen)[2]) {
#pragma unroll
    for (int j = 0; j < N / 4; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
            if (8 * j + e % 2 >= seen[e / 2]) s[4 * j + e] = MINUS_INFINITY;
}

// The running softmax of a thread's two rows. `largest` is the largest raw score so far. `weight` is this lane's part of the sum of the weights,
// exp2(factor * (s - largest)); the parts of the quad's four lanes have to be added up at the end.
struct Softmax {
    float largest[2] = {MINUS_INFINITY, MINUS_INFINITY}, weight[2] = {0, 0};

    // Replace the scores of a block by exp2(factor * (s - largest)), with the updated `largest`, for a positive factor. What was summed before has to
    // be multiplied by `shrink`.
    template <int N> __device__ __forceinline__ void step(float (&s)[N], float factor, float (&shrink)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float even = fmaxf(s[2 * i], s[2 * i + 4]), odd = fmaxf(s[2 * i + 1], s[2 * i + 5]);
#pragma unroll
            for (int j = 2; j < N / 4; ++j) {
                even = fmaxf(even, s[4 * j + 2 * i]);
                odd = fmaxf(odd, s[4 * j + 2 * i + 1]);
            }
            const float before = largest[i];
            largest[i] = fmaxf(before, quad_max(fmaxf(even, odd)));
            // A row that has not seen any key yet has no largest score, and -inf - -inf would be NaN.
            const float base = largest[i] == MINUS_INFINITY ? 0.0f : largest[i] * factor;
            shrink[i] = exp2_fast(fmaf(before, factor, -base));
            even = odd = 0;
#pragma unroll
            for (int j = 0; j < N / 4; ++j) {
                float &x = s[4 * j + 2 * i], &y = s[4 * j + 2 * i + 1];
                even += x = exp2_fast(fmaf(x, factor, -base));
                odd += y = exp2_fast(fmaf(y, factor, -base));
            }
            weight[i] = fmaf(weight[i], shrink[i], even + odd);
        }
    }
};

// Make the assembler complete all of `step` before the wait that follows. Otherwise it moves instructions that do not depend on the wait behind it,
// where no product runs at the same time. The store to shared memory at `anywhere` never happens, as no sum of weights is -1, but the assembler
// cannot know that.
__device__ __forceinline__ void finish(const Softmax& softmax, u32 anywhere) {
    asm volatile("{.reg .pred p; setp.eq.f32 p, %0, 0fBF800000; @p st.shared.f32 [%1], %0;}" ::"f"(softmax.weight[0] + softmax.weight[1]), "r"(anywhere)
                 : "memory");
}

// Multiply a thread's two rows by `by`.
template <int N> __device__ __forceinline__ void scale_rows(float (&x)[N], const float (&by)[2]) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] *= by[i / 2 % 2];
}
