// The second kernel of decode over the latent cache on sm_90a: of requests that several parts had, their results combined.
//
// Options (-D):
//   OUT   0 bf16, 1 fp16
//   WIDE  warps that share a query row, each a run of its parts: 8 where there are few rows and many parts, or 1

#include "mla_parts.cuh"

constexpr int WARPS = 8;  // of a block

// A block has `share` * WARPS / WIDE query rows, one after another. The results of a row's parts are weighed by e^lse and added in a fixed order.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
combine(float* work, Element* out, float* lse, int requests, int q_tokens, int heads, int row_blocks, int parts, int share) {
    __shared__ float4 sums[WIDE == 1 ? 1 : WARPS][VALUE / 4];
    wait_for_last();
    const Work results(work, row_blocks, parts);
    const int rows = heads * q_tokens, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int n = 0; n < share; ++n) {
        const int at = (blockIdx.x * share + n) * (WARPS / WIDE) + warp / WIDE, request = at / rows, r = at - request * rows;
        if (request >= requests) return;
        const int2 from = results.begins[request];
        if (from.y <= 1) continue;
        // The first part's result stands in its second slot.
        auto row = [&](int i) { return (long long)(2 * (from.x + i) + (i == 0)) * results.padded_rows + r; };
        float largest = nothing(), weight = 0.f;
        for (int i = lane; i < from.y; i += 32) largest = fmaxf(largest, results.lse[row(i)]);
#pragma unroll
        for (int d = 16; d > 0; d /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
        const float base = base_of(largest);
        for (int i = lane; i < from.y; i += 32) weight += exp2_fast(results.lse[row(i)] - base);
#pragma unroll
        for (int d = 16; d > 0; d /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, d);
        const float factor = weight == 0.f ? 0.f : 1.f / weight;

        float4 sum[4] = {};  // columns 128 * j + 4 * lane
#pragma unroll 4
        for (int i = warp % WIDE; i < from.y; i += WIDE) {
            const float w = exp2_fast(results.lse[row(i)] - base) * factor;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float4 x = *(const float4*)(results.sums + row(i) * VALUE + j * 128 + lane * 4);
                sum[j] = make_float4(fmaf(w, x.x, sum[j].x), fmaf(w, x.y, sum[j].y), fmaf(w, x.z, sum[j].z), fmaf(w, x.w, sum[j].w));
            }
        }
        auto store = [&](int column, float4 x) {
            *(uint2*)(out + ((long long)request * rows + r) * VALUE + column) = make_uint2(pack(x.x, x.y), pack(x.z, x.w));
        };
        if (WIDE == 1) {
#pragma unroll
            for (int j = 0; j < 4; ++j) store(j * 128 + lane * 4, sum[j]);
        } else {  // the block has but this row
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[warp][j * 32 + lane] = sum[j];
            __syncthreads();
            if (threadIdx.x < VALUE / 4) {
                float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
                for (int i = 0; i < WIDE; ++i) {
                    const float4 y = sums[i][threadIdx.x];
                    x = make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
                }
                store(threadIdx.x * 4, x);
            }
            __syncthreads();
        }
        if (warp % WIDE == 0 && lane == 0)
            lse[((long long)request * heads + r % heads) * q_tokens + r / heads] = weight == 0.f ? nothing() : (base + log2f(weight)) * LN_2;
    }
}
