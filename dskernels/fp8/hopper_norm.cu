// RMSNorm, quantised to e4m3 in 1x128 tiles, on sm_90a.
//
// A CTA takes a row and reads it once, into registers: a thread has PER chunks of 8 columns, every CTA-th of them, and 16 lanes have a tile. Many
// CTAs per multiprocessor keep memory busy while others reduce.
//
// Options (-D): RESIDUAL, whether a second row is added first; NORMED, whether the norm is also stored in bf16; WARPS, PER, BLOCKS to an SM, UE8M0.

#include "quantize.cuh"
#include "rms_norm.cuh"

constexpr int CTA = 32 * WARPS;

__device__ __forceinline__ u32 rounded_sum(u32 x, u32 y) { return narrowed(add(low(x), low(y)), add(high(x), high(y))); }

// `x` and `residual` are bf16 [rows, cols]; q, total and normed are contiguous; stride_s is the stride of scales from one tile of a row to the next.
extern "C" __global__ void __launch_bounds__(CTA, BLOCKS)
rmsnorm_quantize(const u16* __restrict__ x, const u16* __restrict__ residual, const u16* __restrict__ weight, u16* __restrict__ total,
                 u16* __restrict__ normed, u8* __restrict__ q, float* __restrict__ s, long long stride_x, long long stride_r, int cols, int stride_s, float eps, double inverse_cols) {
    __shared__ double sums[WARPS];
    const int lane = threadIdx.x % 32, chunks = cols / 8;
    const long long row = blockIdx.x;
    begin_dependent();

    uint4 a[PER];
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int chunk = threadIdx.x + i * CTA;
        a[i] = load(x + row * stride_x + chunk * 8, chunk < chunks);
    }
    if (RESIDUAL) {
        uint4 b[PER];
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int chunk = threadIdx.x + i * CTA;
            b[i] = load(residual + row * stride_r + chunk * 8, chunk < chunks);
        }
#pragma unroll
        for (int i = 0; i < PER; ++i) {
            const int chunk = threadIdx.x + i * CTA;
            a[i] = make_uint4(rounded_sum(a[i].x, b[i].x), rounded_sum(a[i].y, b[i].y), rounded_sum(a[i].z, b[i].z), rounded_sum(a[i].w, b[i].w));
            store(total + row * cols + chunk * 8, a[i], chunk < chunks);
        }
    }
    // In fp64, so that the factor has the reference's bits whatever the order of summation: one ulp of it could be up to five of a scale.
    double sum = 0.;
    u32 largest = 0;  // magnitudes, packed in pairs
#pragma unroll
    for (int i = 0; i < PER; ++i) {
#pragma unroll
        for (int w = 0; w < 4; ++w) largest = larger(largest, word(a[i], w) & 0x7fff7fffu);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const double y = widened(element(a[i], j));
            sum = __fma_rn(y, y, sum);
        }
    }
    if ((largest & 0xffffu) > 0x7f80u || largest >> 16 > 0x7f80u) sum = __hiloint2double(0x7ff80000, 0);  // NaN
#pragma unroll
    for (int m = 16; m; m /= 2) sum += __shfl_xor_sync(~0u, sum, m);
    if (lane == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = sums[0];
#pragma unroll
    for (int w = 1; w < WARPS; ++w) sum += sums[w];
    const float factor = factor_of(sum * inverse_cols, eps);

#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int chunk = threadIdx.x + i * CTA;
        const uint4 weights = load(weight + chunk * 8, chunk < chunks);
        float y[8], amax = 0.f;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            y[j] = mul(mul(element(a[i], j), factor), element(weights, j));
            amax = larger(amax, y[j]);
        }
        if (NORMED)
            store(normed + row * cols + chunk * 8, make_uint4(narrowed(y[0], y[1]), narrowed(y[2], y[3]), narrowed(y[4], y[5]), narrowed(y[6], y[7])),
                  chunk < chunks);
        u32 bits = __float_as_uint(amax);
#pragma unroll
        for (int m = 8; m; m /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, m));
        const float scale = scale_of(bits);
        Divisor d;
        prepare(d, scale);
#pragma unroll
        for (int j = 0; j < 8; ++j) y[j] = divided(y[j], d);
        store(q + row * cols + chunk * 8, make_uint2(e4m3(y[0], y[1], y[2], y[3]), e4m3(y[4], y[5], y[6], y[7])), chunk < chunks);
        if (lane % 16 == 0 && chunk < chunks) s[(long long)(chunk / 16) * stride_s + row] = scale;
    }
}
