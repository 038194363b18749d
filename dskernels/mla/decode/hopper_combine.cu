// The second kernel of decode over the latent cache on sm_90a: of requests that several parts had, their results combined.
//
// Options (-D):
//   OUT   0 bf16, 1 fp16
//   WIDE  warps that share a query row, each every WIDE-th of its parts: 8 where there are few rows and many parts, or 1

#include "mla_parts.cuh"

constexpr int WARPS = 8;  // of a block
constexpr int DEEP = 4;   // results that a warp loads at once

// A block has WARPS / WIDE query rows. The results of a row's parts are weighed by e^lse and added in a fixed order.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
combine(float* work, Element* out, float* lse, int requests, int q_tokens, int heads, int row_blocks, int parts) {
    __shared__ float4 sums[WIDE == 1 ? 1 : WARPS][VALUE / 4];
    const Work results(work, row_blocks, parts);
    const int rows = heads * q_tokens, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int at = blockIdx.x * (WARPS / WIDE) + warp / WIDE, index = at / rows, r = at - index * rows;
    wait_for_last();
    if (index >= spans_of(requests, parts)) return;
    const int4 span = results.spans[index];
    const int request = span.x, count = span.z;
    if (count <= 1) return;
    // The first part's result stands in its second slot.
    auto row = [&](int i) { return (long long)(2 * (span.y + i) + (i == 0)) * results.padded_rows + r; };
    // The first results are on their way while their weights are found.
    float4 x[DEEP][4];
    auto load = [&](int first) {
#pragma unroll
        for (int d = 0; d < DEEP; ++d) {
            const int i = first + d * WIDE;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                x[d][j] = i < count ? *(const float4*)(results.sums + row(i) * VALUE + j * 128 + lane * 4) : make_float4(0.f, 0.f, 0.f, 0.f);
        }
    };
    load(warp % WIDE);
    float largest = nothing(), weight = 0.f;
    for (int i = lane; i < count; i += 32) {
        const float one = results.lse[row(i)], before = largest;
        largest = fmaxf(largest, one);
        weight = weight * exp2_fast(before - base_of(largest)) + exp2_fast(one - base_of(largest));
    }
    float base = largest;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) base = fmaxf(base, __shfl_xor_sync(0xffffffffu, base, d));
    base = base_of(base);
    weight *= exp2_fast(largest - base);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) weight += __shfl_xor_sync(0xffffffffu, weight, d);
    const float factor = weight == 0.f ? 0.f : 1.f / weight;

    float4 sum[4] = {};  // columns 128 * j + 4 * lane
    for (int first = warp % WIDE; first < count; first += DEEP * WIDE) {
        if (first >= DEEP * WIDE) load(first);
#pragma unroll
        for (int d = 0; d < DEEP; ++d) {
            const int i = first + d * WIDE;
            const float w = i < count ? exp2_fast(results.lse[row(i)] - base) * factor : 0.f;
#pragma unroll
            for (int j = 0; j < 4; ++j)
                sum[j] = make_float4(fmaf(w, x[d][j].x, sum[j].x), fmaf(w, x[d][j].y, sum[j].y), fmaf(w, x[d][j].z, sum[j].z), fmaf(w, x[d][j].w, sum[j].w));
        }
    }
    auto store = [&](int column, float4 y) {
        *(uint2*)(out + ((long long)request * rows + r) * VALUE + column) = make_uint2(pack(y.x, y.y), pack(y.z, y.w));
    };
    if (WIDE == 1) {
#pragma unroll
        for (int j = 0; j < 4; ++j) store(j * 128 + lane * 4, sum[j]);
    } else {  // the block has but this row
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[warp][j * 32 + lane] = sum[j];
        __syncthreads();
        if (threadIdx.x < VALUE / 4) {
            float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
                const float4 z = sums[i][threadIdx.x];
                y = make_float4(y.x + z.x, y.y + z.y, y.z + z.z, y.w + z.w);
            }
            store(threadIdx.x * 4, y);
        }
    }
    if (warp % WIDE == 0 && lane == 0)
        lse[((long long)request * heads + r % heads) * q_tokens + r / heads] = weight == 0.f ? nothing() : (base + log2f(weight)) * LN_2;
}
