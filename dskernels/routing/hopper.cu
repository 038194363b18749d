// The choice of experts and its gradient, on sm_90a: one warp a token.
//
// A token's experts stand in the registers of a warp, V consecutive ones in each lane. The best TOP_K are found without sorting all:
// 1. the TOP_K-th largest of the lanes' maxima is a bound that at least TOP_K experts reach, and mostly few more (11 of 128 for 8);
// 2. experts that reach it are candidates. They are of TOP_K lanes only, and go to a lane each, in the order of their ids;
// 3. a candidate's place is the number of candidates before it. It depends on no other's place: no chain of TOP_K reductions.
// Where more than TOP_K lanes or 32 experts reach the bound (ties, or large TOP_K), or lanes hold many, the best are taken one by one.
//
// Loads are counted in shared memory, and added up in global memory once a block. What they are added to is zeroed by block 0 of the
// same launch: see `Arrivals`.
//
// Options (-D): E, TOP_K, N_GROUPS (1 where all groups are allowed), TOP_GROUPS, SOFTMAX, NORMALIZE, HAS_BIAS. DTYPE of the logits: 0
// bf16, 1 fp16, 2 fp32. VECTOR, how many of them a load takes. PARTS: logits come as partial sums. REPLICAS: choices are placed.
// MOST_THREADS of a block, BLOCKS to an SM at least. ARRIVALS, words of
// `arrivals`. BACKWARD: the gradient's kernel, which has no use for groups, bias, parts and replicas.

#include "groups.cuh"

#if DTYPE == 2
typedef float Element;
#else
typedef u16 Element;
#endif

constexpr u32 ALL = 0xffffffffu;
constexpr float LARGEST = 0x1p126f, LEAST_SUM = 1e-30f;  // as in the reference: what an infinity counts as, the least sum that normalises
constexpr float MOST_FINITE = 0x1.fffffep127f, STRUCK = -MOST_FINITE;  // STRUCK is below all that may be chosen
constexpr int NOTHING = -0x7fffffff - 1;                                // a key below that of every float

#if !BACKWARD
// Groups are spread over lanes: one over SPREAD lanes with PER experts in each, or, of more than 32 groups, HELD in one lane.
__host__ __device__ constexpr int upper_power_of_two(int n) { return n <= 1 ? 1 : 2 * upper_power_of_two((n + 1) / 2); }
constexpr bool LIMITED = TOP_GROUPS < N_GROUPS;
constexpr int SIZE = E / N_GROUPS, HELD = (N_GROUPS + 31) / 32, SLOTS = HELD > 1 ? 32 : upper_power_of_two(N_GROUPS);
constexpr int SPREAD = 32 / SLOTS, PER = (SIZE + SPREAD - 1) / SPREAD, V = HELD * PER;
// Experts of TOP_K lanes, of which a lane looks at EACH; as many as are worth to go through memory. WORD and SOME are moved at once.
constexpr bool PACKED = TOP_K * V <= 256;
constexpr int EACH = (TOP_K * V + 31) / 32, WORD = V % 4 == 0 ? 4 : V % 2 == 0 ? 2 : 1;
constexpr int SOME = WORD == 4 && EACH % 4 == 0 ? 4 : WORD > 1 && EACH % 2 == 0 ? 2 : 1;
constexpr bool FULL = SLOTS * HELD == N_GROUPS && SPREAD * PER == SIZE;  // no lane has less than V experts
static_assert(PER % VECTOR == 0 && SIZE % VECTOR == 0, "a load takes experts of one lane");
#endif

// ---- elements ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ float number(Element x) {
#if DTYPE == 2
    return x;
#else
    return widen(x, DTYPE);
#endif
}
__device__ __forceinline__ Element element(float x) {
#if DTYPE == 2
    return x;
#else
    u16 bits;
    if (DTYPE == 0) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
#endif
}
// N elements that are aligned to their size, up to 16 bytes.
template <int N, class T> struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vector { T at[N]; };
template <int N, class T> __device__ __forceinline__ Vector<N, T> load(const T* p) { return *reinterpret_cast<const Vector<N, T>*>(p); }

// Element i * n of p, in one instruction, which the compiler would take apart.
template <class T> __device__ __forceinline__ T* element_at(T* p, int i, int n) {
    u64 address;
    asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(address) : "r"(i), "r"(n * (int)sizeof(T)), "l"(p));
    return reinterpret_cast<T*>(address);
}
__device__ __forceinline__ int lane_id() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
}

// Orders as floats do; its own inverse on the bits. (There are no negative zeros to tell apart: s + b has none.)
__device__ __forceinline__ int key_of(float x) {
    const int bits = __float_as_int(x);
    return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float float_of(int key) { return __int_as_float(key ^ (key >> 31 & 0x7fffffff)); }
__device__ __forceinline__ float bounded(float x) { return fminf(fmaxf(x, -LARGEST), LARGEST); }

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = __fadd_rn(x, __shfl_xor_sync(ALL, x, d));
    return x;
}
__device__ __forceinline__ float warp_max(float x) { return float_of(__reduce_max_sync(ALL, key_of(x))); }

// ---- affinities --------------------------------------------------------------------------------------------------

// 1 / (1 + exp(-x)) to the bit of torch's, so that near ties fall as in the reference; 0 below -87.3, where that is denormal. The steps are
// those of CUDA's expf, with the sign in the constants: nvcc would spend an instruction on it.
__device__ __forceinline__ float sigmoid(float x) {
    float step, exponent, power, guess;
    asm("fma.rn.ftz.sat.f32 %0, %1, 0fBBBB989D, 0f3F000000;" : "=f"(step) : "f"(x));
    asm("fma.rm.ftz.f32 %0, %1, 0f437C0000, 0f4B400001;" : "=f"(exponent) : "f"(step));
    const float whole = __fadd_rn(exponent, -12583039.f);
    const float rest = __fmaf_rn(x, -1.925963033500011079e-08f, __fmaf_rn(x, -1.4426950216293334961f, -whole));
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(rest));
    const float y = 1.f + fminf(__fmul_rn(__int_as_float(__float_as_int(exponent) << 23), power), 0x1p127f);
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(y));
    return __fmaf_rn(__fmaf_rn(-y, guess, 1.f), guess, guess);  // a step of Newton's leaves the nearest float
}

// Affinities of a row: of SOFTMAX, given the largest logit and one over the sum of exponentials.
struct Affinity {
    float top, inverse;
    __device__ __forceinline__ float operator()(float x) const {
        return SOFTMAX ? __fmul_rn(expf(__fsub_rn(x, top)), inverse) : sigmoid(x);
    }
};
// Of the row's finite logits `x`, those that `counts` says.
template <int N, class Counts> __device__ __forceinline__ Affinity affinity_of(const float (&x)[N], Counts counts) {
    Affinity row = {0.f, 1.f};
    if (SOFTMAX) {
        float top = STRUCK, mass = 0.f;
#pragma unroll
        for (int v = 0; v < N; ++v) top = counts(v) ? fmaxf(top, x[v]) : top;
        row.top = warp_max(top);
#pragma unroll
        for (int v = 0; v < N; ++v) mass += counts(v) ? row(x[v]) : 0.f;
        row.inverse = __frcp_rn(warp_sum(mass));
    }
    return row;
}

#if !BACKWARD
// ---- selection ---------------------------------------------------------------------------------------------------

// The largest and the second largest, among more and more values.
struct BestTwo {
    float first, second;
    __device__ __forceinline__ void add(float x) {
        second = fmaxf(second, fminf(first, x));
        first = fmaxf(first, x);
    }
    __device__ __forceinline__ void merge(float other_first, float other_second) {
        second = fmaxf(fmaxf(second, other_second), fminf(first, other_first));
        first = fmaxf(first, other_first);
    }
    __device__ __forceinline__ float score() const { return SOFTMAX || SIZE == 1 ? first : __fadd_rn(first, second); }
};

// The N-th largest key of the lanes; NOTHING where there are fewer. Of equal ones all count at once: then it is smaller than that.
template <int N> __device__ __forceinline__ int nth_largest(int key) {
    int found = NOTHING;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        found = __reduce_max_sync(ALL, key);
        if (key == found) key = NOTHING;
    }
    return found;
}

// Whether the lane's group is among the best, given the score that it has in all its lanes, and nowhere else (HELD is 1).
__device__ __forceinline__ bool among_best_groups(float score, int lane) {
    const int group = lane / SPREAD, key = group < N_GROUPS ? key_of(score) : NOTHING;
    const bool kept = key >= nth_largest<TOP_GROUPS>(key) && group < N_GROUPS;
    if (__popc(__ballot_sync(ALL, kept)) == TOP_GROUPS * SPREAD) return kept;
    int before = 0;  // there are ties, and the smaller group comes first
#pragma unroll 1
    for (int other = 0; other < N_GROUPS; ++other) {
        const int theirs = __shfl_sync(ALL, key, other * SPREAD);
        before += theirs > key || (theirs == key && other < group);
    }
    return before < TOP_GROUPS && group < N_GROUPS;
}

// The largest value in the lane of an expert whose group is among the TOP_GROUPS best, ties to the smaller; STRUCK where there is none. In a
// lane that has some, experts of other groups are struck out.
__device__ __forceinline__ float keep_best_groups(float (&choice)[V], int lane) {
    BestTwo best[HELD];
#pragma unroll
    for (int v = 0; v < V; ++v)
        if (v % PER == 0) best[v / PER] = {choice[v], STRUCK};
        else best[v / PER].add(choice[v]);
    if (!LIMITED) return best[0].first;

    if (HELD == 1) {
        const float largest = best[0].first;
#pragma unroll
        for (int d = 1; d < SPREAD; d *= 2)
            best[0].merge(__shfl_xor_sync(ALL, best[0].first, d), __shfl_xor_sync(ALL, best[0].second, d));
        return among_best_groups(best[0].score(), lane) ? largest : STRUCK;
    }
    u32 kept = 0;  // a bit for each group of the lane
#pragma unroll 1
    for (int i = 0; i < TOP_GROUPS; ++i) {
        int head = NOTHING;
#pragma unroll
        for (int h = 0; h < HELD; ++h)
            if (!(kept >> h & 1) && lane * HELD + h < N_GROUPS) head = max(head, key_of(best[h].score()));
        const int winner = __reduce_max_sync(ALL, head);
        if (__ffs(__ballot_sync(ALL, head == winner)) - 1 == lane) {
            u32 found = 0;
#pragma unroll
            for (int h = HELD - 1; h >= 0; --h)
                if (!(kept >> h & 1) && key_of(best[h].score()) == winner) found = 1u << h;
            kept |= found;
        }
    }
    float largest = STRUCK;
#pragma unroll
    for (int h = 0; h < HELD; ++h) largest = kept >> h & 1 ? fmaxf(largest, best[h].first) : largest;
#pragma unroll
    for (int v = 0; v < V; ++v) choice[v] = kept >> (v / PER) & 1 ? choice[v] : STRUCK;
    return largest;
}

// What a warp shares of a token, at an address that it forms once: the experts of lanes that reach the bound, lane by lane, and the first
// id of each lane; of each candidate its value, and which of those experts it is. There is one more candidate, which nobody reads.
struct Shared {
    static constexpr int LANES = PACKED ? TOP_K : 0;
    static constexpr int FIRST_ID = LANES * V * 4, VALUE = (FIRST_ID + LANES * 4 + 15) / 16 * 16, WHICH = VALUE + 36 * 4;
    static constexpr int BYTES = WHICH + 36 * 4;
    u32 addr;

    __device__ __forceinline__ float value(int slot) const { return smem_load(addr + VALUE + slot * 4); }
    __device__ __forceinline__ int id(int slot) const {
        const int which = __float_as_int(smem_load(addr + WHICH + slot * 4));
        return __float_as_int(smem_load(addr + FIRST_ID + which / V * 4)) + which % V;
    }
};
template <int N> __device__ __forceinline__ void store(u32 to, const float* x) {
    if (N == 4) smem_store4(to, x[0], x[1], x[2], x[3]);
    else if (N == 2) smem_store2(to, x[0], x[1]);
    else smem_store(to, x[0]);
}
template <int N> __device__ __forceinline__ void fetch(u32 from, float* x) {
    if (N == 4) reinterpret_cast<float4&>(*x) = smem_load4(from);
    else if (N == 2) reinterpret_cast<float2&>(*x) = smem_load2(from);
    else *x = smem_load(from);
}

// Candidates, in the order of their ids, to `shared`. How many there are; more than 32 where that is not known.
__device__ __forceinline__ int gather(const float (&choice)[V], float largest, int first_id, int lane, Shared shared) {
    // At least TOP_K experts reach this, if there are so many: as many lanes have one. What is struck out does not.
    const float bound = fmaxf(float_of(nth_largest<TOP_K>(key_of(largest))), -LARGEST);
    const u32 below = (1u << lane) - 1, lanes = __ballot_sync(ALL, largest >= bound);
    const int n_lanes = __popc(lanes);
    if (!PACKED || n_lanes > TOP_K) return 33;

    smem_store(shared.addr + Shared::VALUE + lane * 4, STRUCK);
    if (largest >= bound) {
        const int i = __popc(lanes & below);
        smem_store(shared.addr + Shared::FIRST_ID + i * 4, __int_as_float(first_id));
#pragma unroll
        for (int v = 0; v < V; v += WORD) store<WORD>(shared.addr + (i * V + v) * 4, choice + v);
    }
    if (n_lanes < TOP_K)
        for (int i = n_lanes * V + lane; i < TOP_K * V; i += 32) smem_store(shared.addr + i * 4, STRUCK);
    __syncwarp();

    float x[EACH];
    u32 reached[EACH];
    int slot = 0, candidates = 0;
#pragma unroll
    for (int j = 0; j < EACH; j += SOME) fetch<SOME>(shared.addr + (lane * EACH + j) * 4, x + j);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        if (TOP_K * V < 32 * EACH && lane * EACH + j >= TOP_K * V) x[j] = STRUCK;
        reached[j] = __ballot_sync(ALL, x[j] >= bound);
        slot += __popc(reached[j] & below);
        candidates += __popc(reached[j]);
    }
    if (candidates > 32) return candidates;
    u32 to = shared.addr + Shared::VALUE + slot * 4;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const bool is_one = x[j] >= bound;
        const u32 here = is_one ? to : shared.addr + Shared::VALUE + 32 * 4;
        smem_store(here, x[j]);
        smem_store(here + Shared::WHICH - Shared::VALUE, __int_as_float(lane * EACH + j));
        if (is_one) to += 4;
    }
    __syncwarp();
    return candidates;
}

// How many candidates come before one of this value; those of equal value are in the order of their lanes.
__device__ __forceinline__ int place_of(Shared shared, float value, int candidates, int lane) {
    int place = 0;
    auto count = [&](float theirs) { asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p add.s32 %0, %0, 1;}" : "+r"(place) : "f"(theirs), "f"(value)); };
#pragma unroll 1
    for (int c = 0; c < candidates; c += 4) {
        const float4 theirs = smem_load4(shared.addr + Shared::VALUE + c * 4);
        count(theirs.x), count(theirs.y), count(theirs.z), count(theirs.w);
    }
    // Different places add up to this; equal values have equal ones so far, which add up to less.
    if (__reduce_add_sync(ALL, lane < candidates ? place : 0) < candidates * (candidates - 1) / 2)
#pragma unroll 1
        for (int c = 0; c < lane; ++c) place += shared.value(c) == value;
    return place;
}

// The best one by one: lane i gets the id of the i-th.
__device__ __forceinline__ int take_one_by_one(float (&choice)[V], float largest, int first_id, int lane) {
    int id = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) choice[v] = largest == STRUCK ? STRUCK : choice[v];
#pragma unroll 1
    for (int k = 0; k < TOP_K; ++k) {
        float head = STRUCK;
        int at = 0;
#pragma unroll
        for (int v = V - 1; v >= 0; --v)
            if (choice[v] >= head) head = choice[v], at = v;  // the smallest of equal ones is the last to be seen
        const int winner = __reduce_max_sync(ALL, key_of(head)), from = __ffs(__ballot_sync(ALL, key_of(head) == winner)) - 1;
        const int best = __shfl_sync(ALL, first_id + at, from);
        if (lane == k) id = best;
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (lane == from && v == at) choice[v] = STRUCK;
    }
    return id;
}

// ---- loads -------------------------------------------------------------------------------------------------------

// How far the blocks of a launch are, a word for each launch that may be under way. Block 0 zeroes what all add to, and arrives; the others
// wait for that before they add, and then arrive too. The last to arrive wraps the word around to 0, as the next launch wants to find it.
// Blocks start in the order of their numbers, so nobody waits for a block that cannot start.
__device__ u32 arrivals[ARRIVALS];

struct Arrivals {
    u32* word;
    __device__ __forceinline__ void arrive() const {
        asm volatile("red.release.gpu.global.inc.u32 [%0], %1;" ::"l"(word), "r"(gridDim.x) : "memory");
    }
    __device__ __forceinline__ void wait() const {
        u32 seen;
        do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(word) : "memory");
        while (seen == 0);
    }
};

// Where this token finds an expert: its places, of which there are as many as entries before the first -1, take turns from token to token.
__device__ __forceinline__ int replica_of(const int* physical, int replicas, int id, int token) {
    const int* places = physical + (long long)id * replicas;
    int n = 0;
    while (n < replicas && __ldg(places + n) >= 0) ++n;
    return n ? __ldg(places + token % n) : -1;
}

// ---- forward -----------------------------------------------------------------------------------------------------

// `logits` is [T, E], its rows `stride` apart; with PARTS fp32 [parts, T, E], the sum of which goes to `sums` [T, E]. `physical` is
// [E, replicas]: where each expert stands, -1 after the last of fewer places; the token's number says which place. `weights`, `experts` and
// `placed` are [T, TOP_K]. `slot` is the launch's word of `arrivals`, which a launch of one block leaves alone.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, BLOCKS)
route(const Element* __restrict__ logits, const float* __restrict__ bias, const int* __restrict__ physical, float* __restrict__ weights,
      int* __restrict__ experts, int* __restrict__ placed, float* __restrict__ sums, int* __restrict__ loads, int* __restrict__ nonfinite,
      u64 slot, long long stride, int tokens, int parts, int replicas, float scale) {
    __shared__ int counts[E + 1];  // of the experts, and of tokens without a choice
    __shared__ float4 for_warps[MOST_THREADS / 32 * Shared::BYTES / 16];
    const int lane = lane_id(), warp = threadIdx.x / 32, warps = blockDim.x / 32;
    const Shared shared = {smem_addr(for_warps) + warp * Shared::BYTES};
    const Arrivals blocks = {arrivals + slot};

    for (int e = threadIdx.x; e <= E; e += blockDim.x) {
        counts[e] = 0;
        if (gridDim.x > 1 && blockIdx.x == 0) (e < E ? loads + e : nonfinite)[0] = 0;
    }
    __syncthreads();
    if (gridDim.x > 1 && blockIdx.x == 0 && threadIdx.x == 0) blocks.arrive();

    // Experts first_id to first_id + held - 1 are this lane's.
    const int first_id = lane / SPREAD * HELD * SIZE + lane % SPREAD * PER;
    const int held = FULL ? V : HELD == 1 ? (lane / SPREAD < N_GROUPS ? max(0, min(PER, SIZE - lane % SPREAD * PER)) : 0)
                                          : max(0, min(HELD, N_GROUPS - lane * HELD)) * SIZE;
    auto here = [&](int v) { return FULL || v < held; };

    const Element* p_row = logits + (blockIdx.x * warps + warp) * stride;
    const long long step = gridDim.x * warps * stride;
    for (int row = blockIdx.x * warps + warp; row < tokens; row += gridDim.x * warps, p_row += step) {
        // One logit, from all its parts.
        auto logit = [&](int id) {
            float x = number(*element_at(p_row, id, 1));
            if (PARTS)
                for (int p = 1; p < parts; ++p) x = __fadd_rn(x, number(p_row[(long long)p * tokens * E + id]));
            return x;
        };
        float x[V], b[V];
#pragma unroll
        for (int v = 0; v < V; v += VECTOR) {
            Vector<VECTOR, Element> part = {};
            Vector<VECTOR, float> part_b = {};
            if (here(v)) part = load<VECTOR>(p_row + first_id + v);
            if (HAS_BIAS && here(v)) part_b = load<VECTOR>(bias + first_id + v);
#pragma unroll
            for (int i = 0; i < VECTOR; ++i) x[v + i] = number(part.at[i]), b[v + i] = part_b.at[i];
            if (PARTS && here(v)) {
                Vector<VECTOR, float> sum;
                for (int p = 1; p < parts; ++p) {
                    part = load<VECTOR>(p_row + (long long)p * tokens * E + first_id + v);
#pragma unroll
                    for (int i = 0; i < VECTOR; ++i) x[v + i] = __fadd_rn(x[v + i], number(part.at[i]));
                }
#pragma unroll
                for (int i = 0; i < VECTOR; ++i) sum.at[i] = x[v + i];
                *reinterpret_cast<Vector<VECTOR, float>*>(sums + (long long)row * E + first_id + v) = sum;
            }
        }

        float choice[V];
        Affinity affinity;
        auto score = [&](bool limit) {
            affinity = affinity_of(x, here);
#pragma unroll
            for (int v = 0; v < V; ++v) choice[v] = here(v) ? __fadd_rn(affinity(x[v]), limit ? bounded(b[v]) : b[v]) : STRUCK;
        };
        // Nearly always all is finite and small, which one sum tells: a NaN or an infinity stays in it.
        float size = 0.f;
#pragma unroll
        for (int v = 0; v < V; ++v) size += fabsf(b[v]);
#pragma unroll
        for (int v = 0; v < V; ++v) size += fabsf(x[v]);
        const bool plain = __all_sync(ALL, size <= LARGEST);
        if (plain) {
            score(false);
        } else {
            bool nan = false, finite = false;
#pragma unroll
            for (int v = 0; v < V; ++v) {
                nan |= here(v) && (x[v] != x[v] || b[v] != b[v]);
                finite |= here(v) && fabsf(x[v]) <= MOST_FINITE;
                x[v] = bounded(x[v]);
            }
            if (__any_sync(ALL, nan) || !__any_sync(ALL, finite)) {
                if (lane < TOP_K) {
                    weights[(long long)row * TOP_K + lane] = 0.f;
                    experts[(long long)row * TOP_K + lane] = lane;
                    if (REPLICAS) placed[(long long)row * TOP_K + lane] = replica_of(physical, replicas, lane, row);
                }
                if (lane == 0) atomicAdd(counts + E, 1);
                continue;
            }
            score(true);
        }

        const float largest = keep_best_groups(choice, lane);
        const int candidates = gather(choice, largest, first_id, lane, shared);
        int id = 0, place = lane;
        bool chosen;
        if (candidates <= 32) {
            chosen = lane < candidates;
            if (chosen) id = shared.id(lane);
            place = place_of(shared, shared.value(lane), candidates, lane);
            chosen = chosen && place < TOP_K;
        } else {
            id = take_one_by_one(choice, largest, first_id, lane);
            chosen = lane < TOP_K;
        }
        // To pick s out of the registers of another lane would take longer than to compute it again, to the same bits.
        const float x_id = logit(id), s = affinity(plain ? x_id : bounded(x_id));
        float weight = s;
        if (NORMALIZE) {
            const float sum = warp_sum(chosen ? s : 0.f);
            weight = sum < LEAST_SUM ? 0.f : __fdividef(s, sum);
        }
        if (chosen) {
            *element_at(element_at(weights, row, TOP_K), place, 1) = weight * scale;
            *element_at(element_at(experts, row, TOP_K), place, 1) = id;
            if (REPLICAS) *element_at(element_at(placed, row, TOP_K), place, 1) = replica_of(physical, replicas, id, row);
            atomicAdd(counts + id, 1);
        }
        __syncwarp();  // `shared` is read before the next token's is written
    }

    if (gridDim.x > 1 && threadIdx.x == 0) blocks.wait();
    __syncthreads();
    for (int e = threadIdx.x; e <= E; e += blockDim.x) {
        int* total = e < E ? loads + e : nonfinite;
        if (gridDim.x == 1) *total = counts[e];
        else if (counts[e]) atomicAdd(total, counts[e]);  // integers: any order gives the same sum
    }
    if (gridDim.x > 1 && threadIdx.x == 0) blocks.arrive();
}

#else
// ---- backward ----------------------------------------------------------------------------------------------------

// Gradient of the weights w to the logits, `grad` being that to the weights. With u = w * (grad - sum(grad * w) / scale), or w * grad where
// weights are not normalised, at the chosen experts and 0 elsewhere: sigmoid gives u * (1 - s), softmax u - s * sum(u). Nothing is divided by
// s, which may be as good as 0. With sigmoid only the chosen logits are read.
extern "C" __global__ void __launch_bounds__(MOST_THREADS, BLOCKS)
route_backward(const float* __restrict__ grad, const Element* __restrict__ logits, const float* __restrict__ weights,
               const int* __restrict__ experts, Element* __restrict__ dlogits, long long stride, int tokens, float scale) {
    constexpr int STEP = 32 * VECTOR, CHUNKS = (E + STEP - 1) / STEP, V = CHUNKS * VECTOR;
    static_assert(E % VECTOR == 0, "a load takes experts of one row");
    const int lane = threadIdx.x % 32, row = blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
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

    // Where the weight is 0 the gradient may be anything, even NaN: it is left out, not multiplied.
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
    // The row as if none of it had been chosen, then what was.
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
#endif
