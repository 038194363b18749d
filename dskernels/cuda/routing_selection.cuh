// One warp selects the TOP_K best of a token's experts.
//
// The keys of the experts are in registers, V consecutive experts in each lane: integers whose order is that of s + b (affinity plus bias). The best
// are found without sorting all of them:
// 1. The TOP_K-th largest of the lanes' maxima is a bound that at least TOP_K experts reach, and usually few more (11 of 128 for TOP_K 8).
// 2. Experts that reach the bound are the candidates. Only TOP_K lanes have some; they are redistributed to one candidate per lane, by ascending id.
// 3. The rank of a candidate is the number of candidates that are better. All lanes compute it at the same time, instead of TOP_K reductions in turn.
// If more than TOP_K lanes or more than 32 experts reach the bound (ties, or a large TOP_K), or if lanes hold many experts, the best are taken one by
// one instead.
//
// Keys are either EXACT, or those of a quick score: then they are the bits of positive floats, each of which may be off by up to `slack`. A decision
// by quick scores counts only if the values differ by more than that; otherwise the caller is told, and decides by exact keys.
//
// Options (-D): E, TOP_K, N_GROUPS (1 if all groups are allowed), TOP_GROUPS, SOFTMAX (see routing.cuh), VECTOR (consecutive experts per load).
#pragma once

#include "routing.cuh"

// How groups are distributed over lanes: each over SPREAD lanes, with PER experts in each lane, or, if there are more than 32 groups, HELD groups in
// each lane.
__host__ __device__ constexpr int upper_power_of_two(int n) { return n <= 1 ? 1 : 2 * upper_power_of_two((n + 1) / 2); }
constexpr bool LIMITED = TOP_GROUPS < N_GROUPS;
constexpr int SIZE = E / N_GROUPS, HELD = (N_GROUPS + 31) / 32, SLOTS = HELD > 1 ? 32 : upper_power_of_two(N_GROUPS);
constexpr int SPREAD = 32 / SLOTS, PER = (SIZE + SPREAD - 1) / SPREAD, V = HELD * PER;
constexpr bool FULL = SLOTS * HELD == N_GROUPS && SPREAD * PER == SIZE;  // every lane has exactly V experts
static_assert(PER % VECTOR == 0 && SIZE % VECTOR == 0, "a load takes experts of one lane");
// The experts of the TOP_K lanes that reach the bound are redistributed through shared memory, EACH to a lane, if they are few enough for this to pay
// (PACKED). WORD of them are written at a time, and SOME read.
constexpr bool PACKED = TOP_K * V <= 256, QUICK = PACKED && HELD == 1 && !SOFTMAX;
constexpr int EACH = (TOP_K * V + 31) / 32, WORD = V % 4 == 0 ? 4 : V % 2 == 0 ? 2 : 1;
constexpr int SOME = WORD == 4 && EACH % 4 == 0 ? 4 : WORD > 1 && EACH % 2 == 0 ? 2 : 1;
constexpr int STRUCK = -0x7fffffff - 1;  // the key of an expert that may not be chosen, below all other keys

// ---- groups ------------------------------------------------------------------------------------------------------

// The largest and the second largest of some keys.
struct BestTwo {
    int first, second;
    // The score of a group as a key: with SOFTMAX its largest, otherwise the sum of the two. If not EXACT, keys are the bits of positive floats.
    template <bool EXACT> __device__ __forceinline__ int score() const {
        if (SOFTMAX || SIZE == 1) return first;
        return EXACT ? key_of(__fadd_rn(float_of(first), float_of(second)))
                     : __float_as_int(__int_as_float(first) + __int_as_float(second));
    }
};
__device__ __forceinline__ BestTwo merged(BestTwo a, BestTwo b) {
    return {max(a.first, b.first), __vimax3_s32(min(a.first, b.first), a.second, b.second)};
}
template <int N> __device__ __forceinline__ BestTwo best_two(const int* key) {
    if constexpr (N == 1) return {key[0], STRUCK};
    else if constexpr (N == 2) return {max(key[0], key[1]), min(key[0], key[1])};
    else return merged(best_two<N / 2>(key), best_two<N - N / 2>(key + N / 2));
}

// The N-th largest of the lanes' keys; STRUCK if there are fewer. Equal keys count only once, so with ties the result is smaller than the N-th
// largest.
template <int N> __device__ __forceinline__ int nth_largest(int key) {
    int found = STRUCK;
#pragma unroll
    for (int n = 0; n < N; ++n) {
        found = __reduce_max_sync(ALL, key);
        if (key == found) key = STRUCK;
    }
    return found;
}
// The key of a quick score lowered by `by`.
__device__ __forceinline__ int less(int key, float by) { return __float_as_int(__int_as_float(key) - by); }

// Whether the lane's group is among the TOP_GROUPS best, given the best two keys of that group, the same in all of its lanes (HELD is 1). For quick
// scores, `sure` says whether no other group comes so near that exact scores might decide otherwise.
template <bool EXACT> __device__ __forceinline__ bool among_best_groups(BestTwo best, float slack, int lane, bool& sure) {
    const int group = lane / SPREAD, key = SLOTS == N_GROUPS || group < N_GROUPS ? best.score<EXACT>() : STRUCK;
    const int least = nth_largest<TOP_GROUPS>(key);
    const bool kept = key >= (EXACT ? least : less(least, 8 * slack)) && (!EXACT || key > STRUCK);
    sure = __popc(__ballot_sync(ALL, kept)) == TOP_GROUPS * SPREAD;
    if (!EXACT || sure) return kept;
    sure = true;
    int before = 0;  // there are ties, in which the group with the smaller number wins
#pragma unroll 1
    for (int other = 0; other < N_GROUPS; ++other) {
        const int theirs = __shfl_sync(ALL, key, other * SPREAD);
        before += theirs > key || (theirs == key && other < group);
    }
    return before < TOP_GROUPS && group < N_GROUPS;
}

// The largest key in the lane among experts whose group is one of the TOP_GROUPS best (with ties, the group with the smaller number); STRUCK if there
// is none. In a lane that has some, the experts of other groups are struck out of `choice`.
template <bool EXACT> __device__ __forceinline__ int keep_best_groups(int (&choice)[V], float slack, int lane, bool& sure) {
    BestTwo best[HELD];
#pragma unroll
    for (int h = 0; h < HELD; ++h) best[h] = best_two<PER>(choice + h * PER);
    sure = true;
    if (!LIMITED) return best[0].first;

    if (HELD == 1) {
        const int largest = best[0].first;
#pragma unroll
        for (int d = 1; d < SPREAD; d *= 2)
            best[0] = merged(best[0], {__shfl_xor_sync(ALL, best[0].first, d), __shfl_xor_sync(ALL, best[0].second, d)});
        return among_best_groups<EXACT>(best[0], slack, lane, sure) ? largest : STRUCK;
    }
    u32 kept = 0;  // a bit for each group of the lane: whether it is one of the best
#pragma unroll 1
    for (int i = 0; i < TOP_GROUPS; ++i) {
        int head = STRUCK;
#pragma unroll
        for (int h = 0; h < HELD; ++h)
            if (!(kept >> h & 1) && lane * HELD + h < N_GROUPS) head = max(head, best[h].template score<EXACT>());
        const int winner = __reduce_max_sync(ALL, head);
        if (__ffs(__ballot_sync(ALL, head == winner)) - 1 == lane) {
            u32 found = 0;
#pragma unroll
            for (int h = HELD - 1; h >= 0; --h)
                if (!(kept >> h & 1) && best[h].template score<EXACT>() == winner) found = 1u << h;
            kept |= found;
        }
    }
    int largest = STRUCK;
#pragma unroll
    for (int h = 0; h < HELD; ++h) largest = kept >> h & 1 ? max(largest, best[h].first) : largest;
#pragma unroll
    for (int v = 0; v < V; ++v) choice[v] = kept >> (v / PER) & 1 ? choice[v] : STRUCK;
    return largest;
}

// ---- candidates --------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 lanes_below() {
    u32 mask;
    asm("mov.u32 %0, %%lanemask_lt;" : "=r"(mask));
    return mask;
}

// A warp's part of shared memory: the keys of the lanes that reach the bound, lane by lane, and the id of the first expert of each such lane; then
// the ids of the candidates, and their s + b.
struct Shared {
    static constexpr int KEYS = PACKED ? 32 * EACH : 0, LANES = PACKED ? (KEYS - 1) / V + 1 : 0;
    static constexpr int FIRST_ID = KEYS * 4, ID = FIRST_ID + LANES * 4, VALUE = (ID + 32 * 4 + 15) / 16 * 16, BYTES = VALUE + 32 * 4;
    u32 addr;

    __device__ __forceinline__ int word(int offset, int i) const { return __float_as_int(smem_load(addr + offset + i * 4)); }
    __device__ __forceinline__ void set(int offset, int i, int x) const { smem_store(addr + offset + i * 4, __int_as_float(x)); }
};
template <int N> __device__ __forceinline__ void store(u32 to, const int* x) {
    auto as_float = [&](int i) { return __int_as_float(x[i]); };
    if constexpr (N == 4) smem_store4(to, as_float(0), as_float(1), as_float(2), as_float(3));
    else if constexpr (N == 2) smem_store2(to, as_float(0), as_float(1));
    else smem_store(to, as_float(0));
}
template <int N> __device__ __forceinline__ void fetch(u32 from, int* x) {
    if constexpr (N == 4) {
        const float4 four = smem_load4(from);
        x[0] = __float_as_int(four.x), x[1] = __float_as_int(four.y), x[2] = __float_as_int(four.z), x[3] = __float_as_int(four.w);
    } else if constexpr (N == 2) {
        const float2 two = smem_load2(from);
        x[0] = __float_as_int(two.x), x[1] = __float_as_int(two.y);
    } else x[0] = __float_as_int(smem_load(from));
}

// Write the ids of the candidates, in ascending order, to `shared`. Returns how many there are; more than 32 if they could not be gathered.
template <bool EXACT>
__device__ __forceinline__ int gather(const int (&choice)[V], int largest, int first_id, float slack, int lane, Shared shared) {
    // At least TOP_K experts reach this bound (if so many may be chosen), since TOP_K lanes have one each. Struck-out experts do not reach it.
    const int least = nth_largest<TOP_K>(largest), bound = EXACT ? max(least, STRUCK + 1) : less(least, 2 * slack);
    const u32 below = lanes_below(), lanes = __ballot_sync(ALL, largest >= bound);
    const int n_lanes = __popc(lanes);
    if (!PACKED || n_lanes > TOP_K) return 33;

    if (largest >= bound) {
        const int i = __popc(lanes & below);
        shared.set(Shared::FIRST_ID, i, first_id);
#pragma unroll
        for (int v = 0; v < V; v += WORD) store<WORD>(shared.addr + (i * V + v) * 4, choice + v);
    }
    __syncwarp();

    int key[EACH], id[EACH], slot = 0, candidates = 0;
    bool reaches[EACH];
#pragma unroll
    for (int j = 0; j < EACH; j += SOME) fetch<SOME>(shared.addr + (lane * EACH + j) * 4, key + j);
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const int i = lane * EACH + j;
        id[j] = j > 0 && V % EACH == 0 ? id[0] + j : shared.word(Shared::FIRST_ID, i / V) + i % V;
        reaches[j] = key[j] >= bound && i < n_lanes * V;  // words after those of these lanes are left over from another token
        const u32 votes = __ballot_sync(ALL, reaches[j]);
        slot += __popc(votes & below);
        candidates += __popc(votes);
    }
    if (candidates > 32) return candidates;
    u32 to = shared.addr + Shared::ID + slot * 4;
#pragma unroll
    for (int j = 0; j < EACH; ++j)
        if (reaches[j]) {
            smem_store(to, __int_as_float(id[j]));
            to += 4;
        }
    __syncwarp();
    return candidates;
}

// The rank of the lane's candidate: how many candidates have a larger s + b, or an equal one and a smaller lane. TOP_K for lanes without a candidate.
__device__ __forceinline__ int place_of(Shared shared, float value, int candidates, int lane) {
    const bool is_one = lane < candidates;
    if (!is_one) value = -MOST_FINITE;
    smem_store(shared.addr + Shared::VALUE + lane * 4, value);
    __syncwarp();
    int place = 0;
    auto count = [&](float theirs) { asm("{.reg .pred p; setp.gt.f32 p, %1, %2; @p add.s32 %0, %0, 1;}" : "+r"(place) : "f"(theirs), "f"(value)); };
    auto count_four = [&](int c) {
        const float4 theirs = smem_load4(shared.addr + Shared::VALUE + c * 4);
        count(theirs.x), count(theirs.y), count(theirs.z), count(theirs.w);
    };
    constexpr int SURE = TOP_K / 4 * 4;  // there are at least TOP_K candidates, so this part of the loop needs no condition
#pragma unroll
    for (int c = 0; c < SURE; c += 4) count_four(c);
#pragma unroll 1
    for (int c = SURE; c < candidates; c += 4) count_four(c);
    // If all ranks are different, twice their sum is this. Equal values have got equal ranks so far, and the sum is smaller.
    if (2 * __reduce_add_sync(ALL, is_one ? place : 0) < candidates * (candidates - 1))
#pragma unroll 1
        for (int c = 0; c < lane; ++c) place += smem_load(shared.addr + Shared::VALUE + c * 4) == value;
    return is_one ? place : TOP_K;
}

// Take the best experts one by one; lane i gets the id of the i-th best.
__device__ __forceinline__ int take_one_by_one(int (&choice)[V], int largest, int first_id, int lane) {
    int id = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) choice[v] = largest == STRUCK ? STRUCK : choice[v];
#pragma unroll 1
    for (int k = 0; k < TOP_K; ++k) {
        int head = STRUCK, at = 0;
#pragma unroll
        for (int v = V - 1; v >= 0; --v)
            if (choice[v] >= head) head = choice[v], at = v;  // of equal keys, the smallest id is seen last and kept
        const int winner = __reduce_max_sync(ALL, head), from = __ffs(__ballot_sync(ALL, head == winner)) - 1;
        const int best = __shfl_sync(ALL, first_id + at, from);
        if (lane == k) id = best;
#pragma unroll
        for (int v = 0; v < V; ++v)
            if (lane == from && v == at) choice[v] = STRUCK;
    }
    return id;
}
