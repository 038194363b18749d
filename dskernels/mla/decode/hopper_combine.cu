// The second kernel of decode over the latent cache on sm_90a: combines the results of requests that several parts had.
//
// Options (-D):
//   OUT   0 bf16, 1 fp16
//   WIDE  warps that share columns, each every WIDE-th of the parts: 8 where there are few rows and many parts, or 1

#include "mla_parts.cuh"

constexpr int WARPS = 8;         // of a block
constexpr int DEEP = 8;          // results that a warp loads at a time
constexpr int STEPS = 2;         // steps of 16 columns that a warp has
constexpr int ROWS = 16;         // rows of a block: those of one warp of the decode kernel
constexpr int MOST_PARTS = 256;  // of a request: a part is at least one multiprocessor
constexpr int SLICES = VALUE / 16 / STEPS / (WARPS / WIDE);  // blocks for 16 rows

// A block has 16 query rows and some columns. The parts' results are weighted by e^lse and added in a fixed order. It may begin as soon as the first
// CTA of the decode kernel has ended, and waits for their flags, not for the end of that kernel, which comes a microsecond later.
extern "C" __global__ void __launch_bounds__(WARPS * 32)
combine(float* work, Element* out, float* lse, int requests, int q_tokens, int heads, int row_blocks, int parts) {
    __shared__ float4 sums[WIDE == 1 ? 1 : WARPS][2 * STEPS][32];
    __shared__ float weights[MOST_PARTS][ROWS], largest[WARPS * 2][ROWS], factors[ROWS];
    const Work results(work, row_blocks, parts);
    const int rows = heads * q_tokens, thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const int slice = blockIdx.x % SLICES, sixteen = blockIdx.x / SLICES % (row_blocks * 4), index = blockIdx.x / SLICES / (row_blocks * 4);
    for (int i = thread; i < parts * row_blocks; i += WARPS * 32)
        while (!raised(results.flags + i)) {}
    __syncthreads();
    const int4 span = results.spans[index];
    const int request = span.x, count = span.z;
    if (count <= 1 || sixteen * ROWS >= rows) {
        wait_for_last();  // whoever waits for this kernel also waits for that one
        return;
    }
    // The first part's result is in its second slot.
    auto slot = [&](int i) { return 2 * (span.y + i) + (i == 0); };
    const int first_step = (slice * (WARPS / WIDE) + warp / WIDE) * STEPS;
    // The first results are loaded while their weights are computed.
    uint4 x[DEEP][STEPS];
    auto load = [&](int first) {
#pragma unroll
        for (int d = 0; d < DEEP; ++d) {
            const int i = first + d * WIDE;
#pragma unroll
            for (int j = 0; j < STEPS; ++j)
                x[d][j] = i < count ? *results.of(slot(i), sixteen / 4, first_step + j, sixteen % 4, lane) : make_uint4(0, 0, 0, 0);
        }
    };
    load(warp % WIDE);

    // A thread has a row and every 16th part.
    const int row = thread % ROWS, own = thread / ROWS;
    constexpr int EVERY = WARPS * 32 / ROWS;
    float top = nothing();
    for (int i = own; i < count; i += EVERY) {
        const float one = results.lse[(long long)slot(i) * results.padded_rows + sixteen * ROWS + row];
        weights[i][row] = one;
        top = fmaxf(top, one);
    }
    largest[own][row] = top;
    __syncthreads();
    for (int i = 0; i < EVERY; ++i) top = fmaxf(top, largest[i][row]);
    const float base = base_of(top);
    __syncthreads();
    float weight = 0.f;
    for (int i = own; i < count; i += EVERY) {
        const float one = exp2_fast(weights[i][row] - base);
        weights[i][row] = one;
        weight += one;
    }
    largest[own][row] = weight;
    __syncthreads();
    weight = 0.f;
    for (int i = 0; i < EVERY; ++i) weight += largest[i][row];
    if (own == 0) {
        factors[row] = weight == 0.f ? 0.f : 1.f / weight;
        const int r = sixteen * ROWS + row;
        if (slice == 0 && r < rows) lse[((long long)request * heads + r % heads) * q_tokens + r / heads] = weight == 0.f ? nothing() : (base + log2f(weight)) * LN_2;
    }
    __syncthreads();

    float4 sum[2 * STEPS] = {};  // of 8 columns each
    for (int first = warp % WIDE; first < count; first += DEEP * WIDE) {
        if (first >= DEEP * WIDE) load(first);
#pragma unroll
        for (int d = 0; d < DEEP; ++d) {
            const int i = first + d * WIDE;
            const float a = i < count ? weights[i][lane / 4] : 0.f, b = i < count ? weights[i][lane / 4 + 8] : 0.f;
#pragma unroll
            for (int j = 0; j < 2 * STEPS; ++j) {
                const uint4 y = x[d][j / 2];
                const u32 above = j % 2 ? y.z : y.x, below = j % 2 ? y.w : y.y;
                sum[j] = make_float4(fmaf(a, widen((u16)above, OUT), sum[j].x), fmaf(a, widen((u16)(above >> 16), OUT), sum[j].y),
                                     fmaf(b, widen((u16)below, OUT), sum[j].z), fmaf(b, widen((u16)(below >> 16), OUT), sum[j].w));
            }
        }
    }
    auto store = [&](int j, float4 y) {
        const int r = sixteen * ROWS + lane / 4;
        const float a = factors[lane / 4], b = factors[lane / 4 + 8];
        Element* to = out + ((long long)request * rows + r) * VALUE + first_step * 16 + j * 8 + lane % 4 * 2;
        if (r < rows) *(u32*)to = pack(y.x * a, y.y * a);
        if (r + 8 < rows) *(u32*)(to + 8 * VALUE) = pack(y.z * b, y.w * b);
    };
    if (WIDE == 1) {
#pragma unroll
        for (int j = 0; j < 2 * STEPS; ++j) store(j, sum[j]);
    } else {
#pragma unroll
        for (int j = 0; j < 2 * STEPS; ++j) sums[warp][j][lane] = sum[j];
        __syncthreads();
        if (warp < 2 * STEPS) {
            float4 y = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
            for (int i = 0; i < WIDE; ++i) {
                const float4 z = sums[i][warp][lane];
                y = make_float4(y.x + z.x, y.y + z.y, y.z + z.z, y.w + z.w);
            }
            store(warp, y);
        }
    }
    wait_for_last();
}
