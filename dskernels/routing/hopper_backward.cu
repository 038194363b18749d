// The gradient of the choice of experts, on sm_90a: one warp per token.
//
// Options (-D): E, TOP_K, SOFTMAX, NORMALIZE, DTYPE of the logits: 0 bf16, 1 fp16, 2 fp32. VECTOR, how many of them a load takes. MOST_THREADS of
// a block, BLOCKS to an SM at least.

#include "routing.cuh"

// The gradient of the weights w with respect to the logits; `grad` is the gradient with respect to the weights. With u = w * (grad - sum(grad *
// w) / scale), or w * grad if weights are not normalised, at the chosen experts and 0 elsewhere: sigmoid gives u * (1 - s), softmax u - s *
// sum(u). Nothing is divided by s, which may be nearly 0. With sigmoid only the chosen logits are read.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, BLOCKS)
route_backward(const float* __restrict__ grad, const Element* __restrict__ logits, const float* __restrict__ weights,
               const int* __restrict__ experts, Element* __restrict__ dlogits, long long stride, int tokens, float scale) {
    constexpr int STEP = 32 * VECTOR, CHUNKS = (E + STEP - 1) / STEP, V = CHUNKS * VECTOR;
    static_assert(E % VECTOR == 0, "a load takes experts of one row");
    const int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    wait_for_dependency();
    launch_dependents();
    if (row >= tokens) return;
    const Element* p_row = logits + row * stride;
    Element* p_drow = dlogits + (long long)row * E;
    auto here = [&](int v) { return E % STEP == 0 || v / VECTOR * STEP + lane * VECTOR < E; };

    float g = 0.f, w = 0.f, x_chosen = 0.f;
    int id = -1;
    if (lane < TOP_K) {
        const long long at = (long long)row * TOP_K + lane;
        g = grad[at], w = weights[at], id = experts[at];
        if ((u32)id < E) x_chosen = number(p_row[id]);
        else id = -1;
    }
    float x[SOFTMAX ? V : 1];
    if (SOFTMAX)
#pragma unroll
        for (int v = 0; v < V; v += VECTOR) {
            Vector<VECTOR, Element> part = {};
            if (here(v)) part = load<VECTOR>(p_row + v / VECTOR * STEP + lane * VECTOR);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) x[v + i] = number(part.at[i]);
        }

    // If the weight is 0, the gradient may be anything, even NaN: it is left out, not multiplied.
    const float mean = NORMALIZE ? warp_sum(w != 0.f ? g * w : 0.f) / (scale == 0.f ? 1.f : scale) : 0.f;
    const float u = w != 0.f ? w * (g - mean) : 0.f;
    const float sum_u = SOFTMAX ? warp_sum(u) : 0.f;
    float bounds[SOFTMAX ? V : 1];
    Affinity affinity = {0.f, 1.f};
    if (SOFTMAX) {
#pragma unroll
        for (int v = 0; v < V; ++v) bounds[v] = bounded(x[v]);
        affinity = affinity_of(bounds, here);
    }
    // The row as if no expert had been chosen, then the chosen ones.
#pragma unroll
    for (int v = 0; v < V; v += VECTOR) {
        Vector<VECTOR, Element> part;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
            // A token without a choice has no u, and perhaps no s.
            const bool none = !SOFTMAX || sum_u == 0.f || !(fabsf(x[SOFTMAX ? v + i : 0]) <= LARGEST);
            part.at[i] = element(none ? 0.f : -affinity(bounds[SOFTMAX ? v + i : 0]) * sum_u);
        }
        if (here(v)) *reinterpret_cast<Vector<VECTOR, Element>*>(p_drow + v / VECTOR * STEP + lane * VECTOR) = part;
    }
    __syncwarp();
    const float s = affinity(bounded(x_chosen));
    const float dx = SOFTMAX ? u - s * sum_u : u * (1.f - s);
    if (id >= 0 && w != 0.f) p_drow[id] = element(fabsf(x_chosen) <= LARGEST ? dx : 0.f);
}
