// The choice of experts, on sm_90a: one warp per token, with the selection in routing_selection.cuh.
//
// QUICK: an exact sigmoid takes 13 instructions, and only candidates need it. Candidates are found with an approximation of 4 instructions, off
// by less than `slack`. If this leaves open which groups or candidates they are, the row is scored exactly: 7 of 10,000 rows of normal logits,
// 80 of 10,000 if the logits are so small (0.01) that all experts score nearly the same.
//
// Loads are counted in shared memory, and each block adds its counts to global memory once. Block 0 of the same launch zeroes that memory
// before: see `Arrivals`.
//
// Options (-D): E, TOP_K, N_GROUPS (1 where all groups are allowed), TOP_GROUPS, SOFTMAX, NORMALIZE, HAS_BIAS. DTYPE of the logits: 0
// bf16, 1 fp16, 2 fp32. VECTOR, how many of them a load takes. PARTS: logits come as partial sums. REPLICAS: choices are placed.
// MOST_THREADS of a block, BLOCKS to an SM at least. ARRIVALS, words of `arrivals`.

#include "routing_selection.cuh"

__device__ __forceinline__ int lane_id() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}
__device__ __forceinline__ void smem_count(u32 addr) { asm volatile("red.shared.add.u32 [%0], 1;" ::"r"(addr) : "memory"); }
// x, in a form that keeps nvcc from computing or loading it again at each use.
template <class T> __device__ __forceinline__ T kept_in_a_register(T x) {
    if constexpr (sizeof(T) == 8) asm volatile("" : "+l"(x));
    else asm volatile("" : "+r"(reinterpret_cast<u32&>(x)));
    return x;
}

// ---- loads -------------------------------------------------------------------------------------------------------

// How far the blocks of a launch have got: a word for each launch that may be running. Block 0 zeroes what all blocks add to, and arrives; each
// block waits for this before it adds, and then arrives too. The last to arrive wraps the word around to 0, as the next launch expects it.
// Blocks start in the order of their numbers, so nobody waits for a block that cannot start.
__device__ u32 arrivals[ARRIVALS];

struct Arrivals {
    u32* word;
    __device__ __forceinline__ void announce() const {
        asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(word), "r"(gridDim.x) : "memory");
    }
    __device__ __forceinline__ void wait() const {
        u32 seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(word) : "memory");
        while (seen == 0);
        // Relaxed: it announces nothing that this block wrote, and needs no fence, which would delay the end of a launch.
        asm volatile("red.relaxed.gpu.global.inc.u32 [%0], %1;" ::"l"(word), "r"(gridDim.x) : "memory");
    }
};

// Where this token finds an expert: the places before the first -1 take turns from token to token.
__device__ __forceinline__ int replica_of(const int* physical, int replicas, int id, int token) {
    const int* places = physical + (long long)id * replicas;
    int n = 0;
    while (n < replicas && __ldg(places + n) >= 0) ++n;
    return n ? __ldg(places + token % n) : -1;
}

// ---- the kernel --------------------------------------------------------------------------------------------------

// s + b with the approximate score, as the bits of a positive number; `b` is made large enough for that. Off by less than 3 ulp of s and one of
// the sum.
__device__ __forceinline__ int quick_key(float x, float b) {
    float power, s;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(x, -1.442695041f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(__fadd_rn(power, 1.f)));
    return __float_as_int(HAS_BIAS ? __fadd_rn(s, b) : s);
}

// `logits` is [T, E], with `stride` from one row to the next; with PARTS fp32 [parts, T, E], whose sum goes to `sums` [T, E]. `physical` is [E,
// replicas]: the places of each expert, padded with -1; the token's number selects one. `weights`, `experts` and `placed` are [T, TOP_K].
// `slot` is the launch's word of `arrivals`, which a launch of one block does not use. A block takes `rows` tokens.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, BLOCKS)
route(const Element* __restrict__ logits, const float* __restrict__ bias, const int* __restrict__ physical, float* __restrict__ weights,
      int* __restrict__ experts, int* __restrict__ placed, float* __restrict__ sums, int* __restrict__ loads, int* __restrict__ nonfinite,
      u64 slot, long long stride, u32 tokens, u32 rows, int parts, int replicas, float scale) {
    __shared__ int counts[E + 1];  // for each expert, and for tokens without a choice
    __shared__ float4 for_warps[MOST_THREADS / 32 * Shared::BYTES / 16];
    const u32 warps = blockDim.x / 32, warp = __shfl_sync(ALL, threadIdx.x / 32, 0);  // nvcc then knows that it is the same in all lanes
    const int lane = lane_id();
    const Shared shared = {smem_addr(for_warps) + warp * Shared::BYTES};
    const u32 counts_addr = kept_in_a_register(smem_addr(counts));
    const Arrivals blocks = {arrivals + slot};

    // This lane has the experts first_id to first_id + held - 1.
    const int first_id = lane / SPREAD * HELD * SIZE + lane % SPREAD * PER;
    const int held = FULL ? V : HELD == 1 ? (lane / SPREAD < N_GROUPS ? max(0, min(PER, SIZE - lane % SPREAD * PER)) : 0)
                                          : max(0, min(HELD, N_GROUPS - lane * HELD)) * SIZE;
    auto here = [&](int v) { return FULL || v < held; };

    u32 row = blockIdx.x * rows + warp;
    const u32 end = blockIdx.x * rows + min(rows, tokens - blockIdx.x * rows);
    const Element* mine = logits + row * stride + first_id;  // this lane's part of the row
    const long long step = kept_in_a_register(warps * stride * (long long)sizeof(Element));
    auto next = [&](const Element* p) { return reinterpret_cast<const Element*>(reinterpret_cast<const char*>(p) + step); };

    using Raw = Vector<VECTOR, Element>[V / VECTOR];
    auto ask = [&](Raw& raw, const Element* p) {
#pragma unroll
        for (int v = 0; v < V; v += VECTOR) {
            raw[v / VECTOR] = {};
            if (here(v)) raw[v / VECTOR] = load<VECTOR>(p + v);
        }
    };
    // The logits of a row: this lane's numbers, and with PARTS those of all other parts.
    auto logits_of = [&](const Raw& raw, float(&x)[V]) {
#pragma unroll
        for (int v = 0; v < V; v += VECTOR) {
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) x[v + i] = number(raw[v / VECTOR].at[i]);
            if (PARTS && here(v)) {
                Vector<VECTOR, float> sum;
                for (int p = 1; p < parts; ++p) {
                    const auto part = load<VECTOR>(mine + (long long)p * tokens * E + v);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) x[v + i] = __fadd_rn(x[v + i], number(part.at[i]));
                }
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) sum.at[i] = x[v + i];
                *reinterpret_cast<Vector<VECTOR, float>*>(sums + (long long)row * E + first_id + v) = sum;
            }
        }
    };
    auto load_bias = [&](const float* p, float(&b)[V]) {
#pragma unroll
        for (int v = 0; v < V; v += VECTOR) {
            Vector<VECTOR, float> part = {};
            if (HAS_BIAS && here(v)) part = load<VECTOR>(p + first_id + v);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) b[v + i] = part.at[i];
        }
    };

    // For a programmatic launch: up to here the preceding kernel may still run.
    for (int e = threadIdx.x; e <= E; e += blockDim.x) counts[e] = 0;
    wait_for_dependency();
    launch_dependents();
    Raw asked;
    float quick_bias[V], slack = 0.f, most_size = LARGEST;
    auto advance = [&] {
        mine = next(mine);
        if (row + warps < end) ask(asked, mine);
    };
    if (row < end) ask(asked, mine);
    if (QUICK) load_bias(bias, quick_bias);
    if (gridDim.x > 1 && blockIdx.x == 0)
        for (int e = threadIdx.x; e <= E; e += blockDim.x) (e < E ? loads + e : nonfinite)[0] = 0;
    __syncthreads();
    if (gridDim.x > 1 && blockIdx.x == 0 && threadIdx.x == blockDim.x - 32) blocks.announce();

    if (QUICK && HAS_BIAS) {
        float most = 0.f;  // of |b|; a NaN if there is one
#pragma unroll
        for (int v = 0; v < V; ++v) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(fabsf(quick_bias[v])));
        most = __int_as_float(__reduce_max_sync(ALL, __float_as_int(most)));
        if (!(most < 1e6f)) most_size = -1.f;  // then no row is scored quickly
        slack = most * 0x1p-21f;
#pragma unroll
        for (int v = 0; v < V; ++v) quick_bias[v] = kept_in_a_register(quick_bias[v] + (most + 1.f));
    }
    slack += 3 * 0x1p-21f;

    for (; row < end; row += warps) {
        int choice[V], candidates = 33;
        bool sure;
        Affinity affinity = {0.f, 1.f};
        float x[V], size = 0.f;
        logits_of(asked, x);
#pragma unroll
        for (int v = 0; v < V; ++v) size += fabsf(x[v]);
        // Nearly always all logits are finite and small, which one sum reveals: a NaN or an infinity persists in it.
        if (QUICK && __all_sync(ALL, size <= most_size)) {
#pragma unroll
            for (int v = 0; v < V; ++v) choice[v] = here(v) ? quick_key(x[v], quick_bias[v]) : STRUCK;
            const int largest = keep_best_groups<false>(choice, slack, lane, sure);
            if (sure) candidates = gather<false>(choice, largest, first_id, slack, lane, shared);
        }
        if (candidates > 32) {
            __syncwarp();  // what a quick attempt has read is overwritten
            float b[V];
            load_bias(kept_in_a_register(bias), b);
#pragma unroll
            for (int v = 0; v < V; ++v) size += fabsf(b[v]);
            if (!__all_sync(ALL, size <= LARGEST)) {
                bool nan = false, finite = false;
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    nan |= here(v) && (x[v] != x[v] || b[v] != b[v]);
                    finite |= here(v) && fabsf(x[v]) <= MOST_FINITE;
                    x[v] = bounded(x[v]), b[v] = bounded(b[v]);
                }
                if (__any_sync(ALL, nan) || !__any_sync(ALL, finite)) {
                    if (lane < TOP_K) {
                        weights[(long long)row * TOP_K + lane] = 0.f;
                        experts[(long long)row * TOP_K + lane] = lane;
                        if (REPLICAS) placed[(long long)row * TOP_K + lane] = replica_of(physical, replicas, lane, row);
                    }
                    if (lane == 0) atomicAdd(counts + E, 1);
                    advance();
                    continue;
                }
            }
            affinity = affinity_of(x, here);
#pragma unroll
            for (int v = 0; v < V; ++v) choice[v] = here(v) ? key_of(__fadd_rn(affinity(x[v]), b[v])) : STRUCK;
            const int largest = keep_best_groups<true>(choice, 0.f, lane, sure);
            candidates = gather<true>(choice, largest, first_id, 0.f, lane, shared);
            if (candidates > 32) {
                shared.set(Shared::ID, lane, take_one_by_one(choice, largest, first_id, lane));
                candidates = TOP_K;
            }
        }

        // Fetching a candidate's s from the registers of another lane would take longer than computing it again, with the same bits.
        const int id = lane < candidates ? shared.word(Shared::ID, lane) : 0;
        float x_id = number(mine[id - first_id]);
        if (PARTS)
            for (int p = 1; p < parts; ++p) x_id = __fadd_rn(x_id, number(mine[(long long)p * tokens * E + id - first_id]));
        const float b_id = HAS_BIAS ? bias[id] : 0.f;
        advance();
        const float s = affinity(bounded(x_id));
        const int place = place_of(shared, bounded(__fadd_rn(s, b_id)), candidates, lane);
        float weight = s;
        if (NORMALIZE) {
            const float sum = warp_sum(place < TOP_K ? s : 0.f);
            weight = sum < LEAST_SUM ? 0.f : __fdividef(s, sum);
        }
        if (place < TOP_K) {
            const long long to = (long long)row * TOP_K + place;
            weights[to] = weight * scale;
            experts[to] = id;
            if (REPLICAS) placed[to] = replica_of(physical, replicas, id, row);
            smem_count(counts_addr + id * 4);
        }
        __syncwarp();  // `shared` is read before it is written for the next token
    }

    // The last warp has the fewest tokens, and waits while the others work.
    if (gridDim.x > 1 && threadIdx.x == blockDim.x - 32) blocks.wait();
    __syncthreads();
    for (int e = threadIdx.x; e <= E; e += blockDim.x) {
        int* total = e < E ? loads + e : nonfinite;
        if (gridDim.x == 1) *total = counts[e];
        else if (counts[e]) atomicAdd(total, counts[e]);  // integers: any order gives the same sum
    }
}
