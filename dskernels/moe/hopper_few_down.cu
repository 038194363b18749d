// The rest of the expert block for a few tokens (at most 8), on sm_90a, in one launch: silu(gate) * up of what hopper_few_up.cu computed, quantised,
// times each expert's B [N, K], weighted and summed over the experts.
//
// The K dimensions of all experts are concatenated to one long sum: out = sum over e of (w_e * A_e) @ B_e.T, where the routing weight w_e is
// multiplied into the scales of A_e. For TILE rows of B, the SPLIT CTAs of a cluster share the blocks of 128 of this sum, and add up their parts as
// the plain products do (fp8_gemm_small.cuh), in a fixed order. One warp loads B, the others quantise A, CHUNK blocks at a time, and multiply. Every
// CTA quantises all of A that it multiplies, since that is little work; it starts to load B before that, even before the preceding kernel has ended.
//
// Options (-D): those of cuda/fp8_gemm_small.cuh, TOKENS 8, OUT 0 or 1, and UE8M0 0.

constexpr bool ANY_ROW = false;
#include "fp8_gemm_small.cuh"
#include "few_experts.cuh"
#include "quantize.cuh"

constexpr int CHUNK = 16;            // blocks of A that are quantised at a time
constexpr u32 UNCHOSEN = 0x7fa5a5a5;  // stands for the weight, and the scale, of a token that did not choose: a NaN that no arithmetic produces

static_assert(TOKENS == 8 && OUT != 2, "rows of A are one swizzled box of 8");
static_assert(CHUNK * TOKENS == CONSUMERS, "a thread for each token of each block");

// Addresses in shared memory. C overwrites the pipeline stages, which are free by then.
struct Layout {
    u32 rows, a, received, scales, weights, ids, all_received, barriers, chosen;

    __device__ __forceinline__ Layout(u32 base, int stages, int most, int choices)
        : rows(base), a(rows + stages * B_BYTES), received(a + CHUNK * A_BYTES), scales(received + RECEIVED), weights(scales + CHUNK * TOKENS * 4),
          ids(weights + most * TOKENS * 4), all_received(ids + (choices + 1) / 2 * 8), barriers(all_received + 8), chosen(barriers + stages * 16) {}
    __device__ __forceinline__ u32 full(int stage) const { return barriers + stage * 16; }
    __device__ __forceinline__ u32 empty(int stage) const { return barriers + stage * 16 + 8; }
    __device__ __forceinline__ u32 weight(int place, int token) const { return weights + (place * TOKENS + token) * 4; }
};

__device__ __forceinline__ bool is_chosen(float weight) { return __float_as_uint(weight) != UNCHOSEN; }
// 16 bytes, or zeros if not `valid`; from the L2, as the preceding kernel may have written them since this one began.
__device__ __forceinline__ uint4 load_fresh(const u16* p, bool valid) {
    uint4 v = make_uint4(0, 0, 0, 0);
    asm volatile("{.reg .pred p; setp.ne.s32 p, %5, 0; @p ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];}"
                 : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)
                 : "l"(p), "r"((int)valid)
                 : "memory");
    return v;
}
__device__ __forceinline__ float number(const uint4& v, int j) { return widen((u16)(word(v, j / 2) >> j % 2 * 16), OUT); }

// Compute silu(gate) * up of 128 columns of a token, 8 columns in each of 16 lanes, and quantise them. If `stored`, write them to row `token` of the
// tile at `to`, and their scale, times the routing weight, to `scale_to`.
__device__ __forceinline__ void quantize_gated(const uint4& gate, const uint4& up, u32 to, int token, u32 scale_to, float weight, bool stored) {
    const int lane = threadIdx.x % 16;
    float y[8], amax = 0.f;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float x = number(gate, j);
        y[j] = mul(mul(x, sigmoid(x)), number(up, j));
        amax = larger(amax, y[j]);
    }
    u32 bits = __float_as_uint(amax);
#pragma unroll
    for (int m = 8; m; m /= 2) bits = max(bits, __shfl_xor_sync(~0u, bits, m));
    const float scale = scale_of(bits);
    Divisor d;
    prepare(d, scale);
#pragma unroll
    for (int j = 0; j < 8; ++j) y[j] = divided(y[j], d);
    if (!stored) return;
    if (lane == 0) smem_store(scale_to, mul(scale, weight));
    const u32 at = to + token * 128 + ((lane / 2 ^ token) * 16) + lane % 2 * 8;
    smem_store2(at, __uint_as_float(e4m3(y[0], y[1], y[2], y[3])), __uint_as_float(e4m3(y[4], y[5], y[6], y[7])));
}

// total += the product of the block of B at `rows` and the block of A at `a`, times the scales of both. `columns` is where the scales of this
// thread's two tokens are. A token that did not choose the expert gets nothing, even if the expert's weights are NaN or infinite.
__device__ __forceinline__ void multiply_chosen(float (&total)[4], u32 rows, u32 a, u32 columns, float scale) {
    const u64 left = operand_k_major(rows), right = operand_k_major(a);
    float part[4];
    registers_fence(part);
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 4; ++j) multiply(part, left + 2 * j, right + 2 * j, j != 0);
    wgmma_commit();
    const float2 s = smem_load2(columns);
    wgmma_wait<0>();
    registers_fence(part);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float of_token = e % 2 ? s.y : s.x;
        total[e] = is_chosen(of_token) ? fma(part[e], mul(of_token, scale), total[e]) : total[e];
    }
}

// `gate_up` [experts that run, tokens, 2 * K] is what hopper_few_up.cu wrote. `most` is how many experts the list has room for.
extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(CONSUMERS + 32)
few_experts_down(const __grid_constant__ TensorMap map_b, const float* __restrict__ sb, const u16* gate_up, const int* weights,
                 const int* ids, Element* out, int tokens, int top_k, int routed, int shared, int most, int N, int K, int stride_weights,
                 long long stride_sb_expert, int stride_sb, int stages) {
    extern __shared__ __align__(1024) u8 smem[];
    const Layout memory(smem_addr(smem), stages, most, tokens * top_k);
    const Chosen chosen{memory.chosen};
    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rank = SPLIT > 1 ? cluster_rank() : 0;
    const int n = blockIdx.x / SPLIT * TILE, of_expert = (K + BLOCK_K - 1) / BLOCK_K;

    // hopper_few_up.cu may still be running. What is read before `begin_dependent` below (ids, routing weights, B and its scales) had been written
    // before it began, as `begin_dependent` in ptx.cuh explains.
    chosen.clear();
    for (int i = threadIdx.x; i < CHUNK * A_BYTES / 16; i += blockDim.x) smem_store4(memory.a + i * 16, 0.f, 0.f, 0.f, 0.f);
    proxy_fence();
    if (warp == WARPS && elect_one()) {
#pragma unroll 1
        for (int i = 0; i < stages; ++i) {
            barrier_init(memory.full(i), 1);
            barrier_init(memory.empty(i), WARPS);
        }
        if (SPLIT > 1) barrier_init(memory.all_received, 1);
        barrier_init_fence();
        if (SPLIT > 1) barrier_expect(memory.all_received, rank == 0 ? (SPLIT - 1) * CONSUMERS * 16 : 0);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < tokens * top_k; i += blockDim.x) {
        const int id = load_fresh(ids + i);
        smem_set_word(memory.ids + i * 4, id);
        chosen.add(id, routed);
    }
    chosen.list(routed, shared);
    if (SPLIT > 1) cluster_arrive();  // a CTA that has waited for this may write to `received` of the others
    const int all = chosen.count() * of_expert;
    const Share share(all, rank, SPLIT);
    const int first = share.first, count = share.count;

    if (warp == WARPS) {
        if (elect_one()) {
            Walk at(first, of_expert);
            int stage = 0;
            u32 phase = 1;  // the first round finds all stages empty
#pragma unroll 1
            for (int i = 0; i < count; ++i, at.next()) {
                barrier_wait(memory.empty(stage), phase);
                barrier_expect(memory.full(stage), B_BYTES);
                tma_load_evict_first(memory.rows + stage * B_BYTES, &map_b, memory.full(stage), at.block * BLOCK_K, chosen.expert(at.place) * N + n);
                if (++stage == stages) stage = 0, phase ^= 1;
            }
        }
        __syncwarp();
        if (SPLIT > 1) cluster_wait();
        return;
    }

    // The routing weight of each token for each expert. If a token chose an expert twice, the thread of its first choice adds up the weights.
    for (int i = threadIdx.x; i < chosen.count() * TOKENS; i += CONSUMERS)
        smem_set_word(memory.weights + i * 4, i < shared * TOKENS && i % TOKENS < tokens ? __float_as_uint(1.f) : UNCHOSEN);
    named_sync<CONSUMERS>(1);
    for (int i = threadIdx.x; i < tokens * top_k; i += CONSUMERS) {
        const int token = i / top_k, begin = token * top_k, id = smem_word(memory.ids + i * 4);
        bool repeated = (u32)id >= (u32)routed;
#pragma unroll 1
        for (int j = begin; j < i; ++j) repeated |= smem_word(memory.ids + j * 4) == id;
        if (repeated) continue;
        const int* row = weights + (long long)token * stride_weights - begin;
        float weight = __int_as_float(load_fresh(row + i));
#pragma unroll 1
        for (int j = i + 1; j < begin + top_k; ++j)
            if (smem_word(memory.ids + j * 4) == id) weight = add(weight, __int_as_float(load_fresh(row + j)));
        smem_store(memory.weight(chosen.place_of(id), token), weight);
    }
    // B's scales for a chunk of blocks, one block in each lane.
    auto scale_from = [&](int i) {
        if (i + lane >= count || lane >= CHUNK) return 0.f;
        const Walk at(first + i + lane, of_expert);
        return __ldg(sb + chosen.expert(at.place) * stride_sb_expert + (long long)(n / 128) * stride_sb + at.block);
    };
    float scales_next = scale_from(0), total[4] = {};
    int stage = 0;
    u32 phase = 0;
    begin_dependent();

    for (int begin = 0; begin < count; begin += CHUNK) {
        const float scales_now = scales_next;
        scales_next = scale_from(begin + CHUNK);
        const int blocks = min(count - begin, CHUNK);
        named_sync<CONSUMERS>(1);  // the routing weights are in shared memory, and the preceding chunk has been multiplied
        // Each warp quantises four blocks of the chunk. A lane stands for one token in one of these, and knows whether it chose the block's expert.
        const int own = threadIdx.x / TOKENS;
        float own_weight = __uint_as_float(UNCHOSEN);
        if (own < blocks) own_weight = smem_load(memory.weight(Walk(first + begin + own, of_expert).place, threadIdx.x % TOKENS));
        if (!is_chosen(own_weight)) smem_set_word(memory.scales + threadIdx.x * 4, UNCHOSEN);
        for (u32 left = __ballot_sync(~0u, is_chosen(own_weight)); left;) {
            // Four pairs of a block and a token that chose its expert are quantised at a time, two by each half of the warp.
            uint4 gate[2], up[2];
            int pair[2];
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int one = __ffs(left) - 1;  // -1 if there are no more
                left &= left - 1;
                const int other = __ffs(left) - 1;
                left &= left - 1;
                pair[u] = lane < 16 ? one : other;
                const Walk at(first + begin + warp * 4 + max(pair[u], 0) / TOKENS, of_expert);
                const int column = at.block * BLOCK_K + lane % 16 * 8;
                const u16* row = gate_up + ((long long)at.place * tokens + max(pair[u], 0) % TOKENS) * 2 * K + column;
                const bool valid = pair[u] >= 0 && column < K;
                gate[u] = load_fresh(row, valid), up[u] = load_fresh(row + K, valid);
            }
#pragma unroll
            for (int u = 0; u < 2; ++u) {
                const int at = warp * 32 + max(pair[u], 0);
                const float weight = __shfl_sync(~0u, own_weight, at);
                quantize_gated(gate[u], up[u], memory.a + at / TOKENS * A_BYTES, at % TOKENS, memory.scales + at * 4, weight, pair[u] >= 0);
            }
        }
        proxy_fence();
        named_sync<CONSUMERS>(1);
#pragma unroll 1
        for (int i = 0; i < blocks; ++i) {
            barrier_wait(memory.full(stage), phase);
            multiply_chosen(total, memory.rows + stage * B_BYTES, memory.a + i * A_BYTES, memory.scales + (i * TOKENS + lane % 4 * 2) * 4,
                            __shfl_sync(~0u, scales_now, i));
            if (lane == 0) barrier_arrive(memory.empty(stage));
            if (++stage == stages) stage = 0, phase ^= 1;
        }
    }
    const Output to{out, nullptr, N, N};
    if (SPLIT == 1) {
        write(total, to, memory.rows, 0, 0, tokens, n);
    } else {
        float sum[SHARE * 4];
        add_up(sum, total, memory.received, memory.all_received, rank);
        write(sum, to, memory.rows, 0, rank * SHARE * 8, tokens, n);
    }
}
