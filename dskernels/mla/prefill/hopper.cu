// Attention of packed sequences on sm_90a, key 192 and value 128 wide: out = softmax(scale * Q K^T) V and its log-sum-exp.
//
// Two kernels. `plan`, one CTA, finds the tiles of 128 queries in the sequences, and orders them. `attend` takes a tile and a head at a time from
// that list, by a counter, on as many CTAs as there are multiprocessors. One warp loads; two warpgroups of 64 rows each multiply. Queries stay in
// shared memory; keys and values come through two rings, 128 of them at a time, the last ones first, so that only the first blocks have to be masked.
//
// A warpgroup keeps the products of a block's weights and values in flight while it turns the next block's scores into weights. The two warpgroups
// take turns at starting products, so that one computes its softmax while the other's products run. At 128 x 128, a block takes 2,560 clocks of the
// tensor cores, and 2,304 of shared memory: 1,664 for what the products read, 640 for what the copies write.
//
// Options (-D):
//   KIND   of the inputs: 0 bf16, 1 fp16
//   OUT    0 bf16, 1 fp16, 2 fp32
//   MERGE  1: `out` and `lse` hold what attention to other keys gave, and get what attention to those and these gives; with OUT 2

#include "attention.cuh"
#include "handover.cuh"

constexpr bool FP16 = KIND == 1;
constexpr int GROUPS = 2, ROWS = 64 * GROUPS, BLOCK_N = 128, THREADS = 128 * (GROUPS + 1), STAGES = 2;
constexpr int QK_DIM = 192, V_DIM = 128, BOX = 64;  // 64 columns, 128 bytes, are what one copy takes of a row
constexpr int Q_BYTES = 64 * QK_DIM * 2, K_BYTES = BLOCK_N * QK_DIM * 2, V_BYTES = BLOCK_N * V_DIM * 2;

#include "attention_tiles.cuh"

constexpr int OFFSET_Q = 0, OFFSET_K = GROUPS * Q_BYTES, OFFSET_V = OFFSET_K + STAGES * K_BYTES, OFFSET_JOBS = OFFSET_V + STAGES * V_BYTES;
constexpr int OFFSET_BARRIERS = OFFSET_JOBS + STAGES * sizeof(Tile);

#if OUT == 2
typedef float Element;
#else
typedef u16 Element;
#endif

// ---- barriers ----------------------------------------------------------------------------------------------------

// As in stage.cuh, for two buffers, without a comparison.
struct Stage {
    int index = 0;
    u32 phase = 0;
    __device__ __forceinline__ void advance() {
        index ^= 1;
        phase ^= index == 0;
    }
};

// A pair of barriers for everything that is passed on: it is there; all readers have read it.
struct Barriers {
    u32 base;
    __device__ __forceinline__ u32 full(int i) const { return base + i * 16; }
    __device__ __forceinline__ u32 empty(int i) const { return base + i * 16 + 8; }
    static __device__ __forceinline__ int q(int group) { return group; }
    static __device__ __forceinline__ int job(Stage stage) { return GROUPS + stage.index; }
    static __device__ __forceinline__ int k(Stage stage) { return GROUPS + STAGES + stage.index; }
    static __device__ __forceinline__ int v(Stage stage) { return GROUPS + 2 * STAGES + stage.index; }

    __device__ __forceinline__ void make() const {
        for (int i = 0; i < GROUPS + 3 * STAGES; ++i) {
            barrier_init(full(i), 1);
            barrier_init(empty(i), (i < GROUPS ? 4 : 4 * GROUPS) * OF_WARP);  // each warp that reads
        }
        barrier_init_fence();
    }
};

// ---- loading -----------------------------------------------------------------------------------------------------

struct Heads {
    int count, group, together;  // query heads; how many share a key; how many are computed at one time
    int of_row;                  // elements from one row of `out` to the next: of all heads, even if only some of them are computed
};

// Item `item` of the work: first the tiles of the first heads, then those of the next. An item beyond the last has no rows.
__device__ __forceinline__ Tile find_item(const Work* work, int tiles, Heads heads, int item) {
    Tile tile{};
    if (item >= tiles * heads.count) return tile;
    const int first = item / (tiles * heads.together) * heads.together, inside = item - first * tiles;
    const int together = min(heads.together, heads.count - first);
    const int4* entry = (const int4*)(work->list + inside / together);
    const int4 a = __ldcg(entry), b = __ldcg(entry + 1);
    return {a.x, a.y, a.z, a.w, b.x, b.y, first + inside % together, 0};
}

// One thread's work: take items, tell the other warps which, and fill the rings.
__device__ __forceinline__ void load(u32 base, Barriers barriers, const TensorMap* map_q, const TensorMap* map_k, const TensorMap* map_rope,
                                     const TensorMap* map_v, Work* work, Heads heads, bool shared_rope) {
    Stage job, k, v;
    u32 q_phase = 0;
    const int tiles = __ldcg(&work->tiles);
    Tile tile = find_item(work, tiles, heads, blockIdx.x);
    while (true) {
        const u32 slot = base + OFFSET_JOBS + job.index * sizeof(Tile);
        barrier_wait(barriers.empty(Barriers::job(job)), job.phase ^ 1);
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(slot), "r"(tile.row), "r"(tile.rows), "r"(tile.key), "r"(tile.key_end) : "memory");
        asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %3};" ::"r"(slot + 16), "r"(tile.seen), "r"(tile.blocks), "r"(tile.head) : "memory");
        barrier_arrive(barriers.full(Barriers::job(job)));
        job.advance();
        if (tile.rows == 0) return;
        const int next_item = gridDim.x + atomicAdd(&work->next, 1), key_head = tile.head / heads.group;

        auto load_k = [&](int block) {
            const u32 to = base + OFFSET_K + k.index * K_BYTES, full = barriers.full(Barriers::k(k));
            const int row = tile.key + block * BLOCK_N;
            barrier_wait(barriers.empty(Barriers::k(k)), k.phase ^ 1);
            barrier_expect(full, K_BYTES);
            tma_load(to, map_k, full, 0, key_head, row);
            tma_load(to + K_BYTES / 3, map_k, full, BOX, key_head, row);
            if (shared_rope) tma_load(to + K_BYTES / 3 * 2, map_rope, full, 0, row);
            else tma_load(to + K_BYTES / 3 * 2, map_k, full, 2 * BOX, key_head, row);
            k.advance();
        };
        // Values beyond the sequence's end are read as zero: a weight of 0 would not help against a NaN there.
        auto load_v = [&](int block) {
            const u32 to = base + OFFSET_V + v.index * V_BYTES, full = barriers.full(Barriers::v(v));
            const int row = tile.key + block * BLOCK_N;
            barrier_wait(barriers.empty(Barriers::v(v)), v.phase ^ 1);
            barrier_expect(full, V_BYTES);
            tma_load_ragged(to, map_v, full, 0, row, tile.key_end, key_head);
            tma_load_ragged(to + V_BYTES / 2, map_v, full, BOX, row, tile.key_end, key_head);
            v.advance();
        };
        if (tile.blocks > 0) {
            load_k(tile.blocks - 1);
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                barrier_wait(barriers.empty(Barriers::q(g)), q_phase ^ 1);
                barrier_expect(barriers.full(Barriers::q(g)), Q_BYTES);
#pragma unroll
                for (int i = 0; i < 3; ++i)
                    tma_load(base + OFFSET_Q + g * Q_BYTES + i * (Q_BYTES / 3), map_q, barriers.full(Barriers::q(g)), i * BOX, tile.head, tile.row + g * 64);
            }
            q_phase ^= 1;
#pragma unroll 1
            for (int block = tile.blocks - 2; block >= 0; --block) {
                load_k(block);
                load_v(block + 1);
            }
        }
        const Tile next = find_item(work, tiles, heads, next_item);
        if (tile.blocks > 0) load_v(0);
        tile = next;
    }
}

// ---- output ------------------------------------------------------------------------------------------------------

// Store rows of the output from registers. In fp32, the stores of a quad write 32 bytes of a row at a time. In 16 bits they would write 16, so the
// quad first transposes: each lane gets 8 columns, 16 bytes, and their stores write 64. With MERGE, the existing values are multiplied by `theirs`.
__device__ __forceinline__ void store(Element* out, long long stride, const float (&x)[V_DIM / 2], const float (&theirs)[2], int rows, int warp, int lane) {
    const int row = warp * 16 + lane / 4, quarter = lane % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        Element* to = out + (row + 8 * i) * stride;
        const bool inside = row + 8 * i < rows;
#if OUT == 2
        float2* at = (float2*)(to + 2 * quarter);  // 8 columns on: at[4]
        float2 before[V_DIM / 8];                  // all are read before any is written, or each would wait for the preceding one
#pragma unroll
        for (int j = 0; j < V_DIM / 8; ++j) before[j] = MERGE && inside ? at[4 * j] : make_float2(0, 0);
#pragma unroll
        for (int j = 0; j < V_DIM / 8; ++j) {
            const float a = x[4 * j + 2 * i], b = x[4 * j + 2 * i + 1];
            if (inside) at[4 * j] = MERGE ? make_float2(fmaf(before[j].x, theirs[i], a), fmaf(before[j].y, theirs[i], b)) : make_float2(a, b);
        }
#else
#pragma unroll
        for (int j = 0; j < V_DIM / 32; ++j) {
            u32 y[4];  // columns 32j + 8t + 2 * quarter of y[t]; after both exchanges 32j + 8 * quarter + 2t
#pragma unroll
            for (int t = 0; t < 4; ++t) y[t] = pack_half<OUT == 1>(x[16 * j + 4 * t + 2 * i], x[16 * j + 4 * t + 2 * i + 1]);
#pragma unroll
            for (int d = 1; d < 4; d *= 2)
#pragma unroll
                for (int t = 0; t < 4; ++t)
                    if (!(t & d)) {
                        const bool upper = quarter & d;
                        const u32 other = __shfl_xor_sync(0xffffffffu, upper ? y[t] : y[t + d], d);
                        if (upper) y[t] = other;
                        else y[t + d] = other;
                    }
            if (inside) *(uint4*)(to + 32 * j + 8 * quarter) = make_uint4(y[0], y[1], y[2], y[3]);
        }
#endif
    }
}

// ---- products ----------------------------------------------------------------------------------------------------

// A warpgroup's part of an item.
struct Part {
    int row, head, keys;
    int rows;    // rows of the tile from the first of this warpgroup on: possibly none, possibly more than its 64
    int seen;    // by its first row, not clamped
    int blocks;  // that its rows see
    int all_blocks;
    bool end;  // not an item, but the end of the work
};
__device__ __forceinline__ Part part_of(const Tile& tile, int group, int causal) {
    const int rows = tile.rows - group * 64, keys = tile.key_end - tile.key, seen = tile.seen + (causal ? group * 64 : 0);
    const int most = rows > 0 ? min(causal ? seen + min(rows, 64) - 1 : seen, keys) : 0;
    return {tile.row + group * 64, tile.head, keys, rows, seen, (max(most, 0) + BLOCK_N - 1) / BLOCK_N, tile.blocks, tile.rows == 0};
}

// A warpgroup's work: its 64 rows of each tile. The products of a block's weights and values are in flight while the next block's scores are computed
// and become weights; the last ones while the next item's first scores are computed, and the output is written.
__device__ __forceinline__ void multiply(u32 base, Barriers barriers, Element* out, float* lse, long long tokens, Heads heads, float factor,
                                         int causal, int group, int warp, int lane) {
    // The lower halves of descriptors, through a shuffle, so that the compiler knows them to be the same in all lanes.
    const u32 q_first = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_Q + group * Q_BYTES), 0);
    const u32 k_first = __shfl_sync(0xffffffffu, (u32)operand_k_major(base + OFFSET_K), 0);
    const u32 v_first = __shfl_sync(0xffffffffu, (u32)operand_mn_major(base + OFFSET_V, V_BYTES / 2), 0);
    Stage job, k, v;
    u32 q_phase = 0;
    float scores[BLOCK_N / 2], sums[V_DIM / 2];
    u32 weights[BLOCK_N / 4];

    auto arrive = [&](u32 barrier) { barrier_arrive_warp(barrier, lane); };
    auto start_scores = [&] {
        barrier_wait(barriers.full(Barriers::k(k)), k.phase);
        registers_fence(scores);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < QK_DIM / 16; ++i) {
            const u32 q = q_first + i / 4 * (Q_BYTES / 3 / 16) + i % 4 * 2, at = k_first + k.index * (K_BYTES / 16) + i / 4 * (K_BYTES / 3 / 16) + i % 4 * 2;
            multiply_half<FP16, 0, 0>(scores, operand(q), operand(at), i > 0);
        }
        wgmma_commit();
        registers_fence(scores);
    };
    auto start_sums = [&](bool keep) {
        barrier_wait(barriers.full(Barriers::v(v)), v.phase);
        registers_fence(sums);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < BLOCK_N / 16; ++i)
            multiply_registers<FP16, 1>(sums, weights + 4 * i, operand(v_first + v.index * (V_BYTES / 16) + i * 128), keep || i > 0);
        wgmma_commit();
        registers_fence(sums);
    };
    auto end_scores = [&] {
        registers_fence(scores);
        arrive(barriers.empty(Barriers::k(k)));
        k.advance();
    };
    auto end_sums = [&] {
        registers_fence(sums);
        arrive(barriers.empty(Barriers::v(v)));
        v.advance();
    };

    // Both warpgroups take a turn for every block of every item.
    auto wait_turn = [&] { named_sync<256>(1 + group); };
    auto pass_turn = [&] { named_arrive<256>(2 - group); };
    auto take = [&] {
        const u32 slot = base + OFFSET_JOBS + job.index * sizeof(Tile);
        barrier_wait(barriers.full(Barriers::job(job)), job.phase);
        Tile tile;
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(tile.row), "=r"(tile.rows), "=r"(tile.key), "=r"(tile.key_end) : "r"(slot));
        asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(tile.seen), "=r"(tile.blocks), "=r"(tile.head), "=r"(tile.unused) : "r"(slot + 16));
        for (int* x : {&tile.row, &tile.rows, &tile.key, &tile.key_end, &tile.seen, &tile.blocks, &tile.head}) *x = __shfl_sync(0xffffffffu, *x, 0);
        arrive(barriers.empty(Barriers::job(job)));
        job.advance();
        return part_of(tile, group, causal);
    };
    // The first scores of an item; before them come blocks that only later rows, of the other warpgroup, see.
    auto begin = [&](const Part& part) {
        if (part.all_blocks == 0) return;
        barrier_wait(barriers.full(Barriers::q(group)), q_phase);
        q_phase ^= 1;
#pragma unroll 1
        for (int block = part.all_blocks; block > part.blocks; --block) {
            wait_turn();
            pass_turn();
            barrier_wait(barriers.full(Barriers::k(k)), k.phase);
            arrive(barriers.empty(Barriers::k(k)));
            k.advance();
            barrier_wait(barriers.full(Barriers::v(v)), v.phase);
            arrive(barriers.empty(Barriers::v(v)));
            v.advance();
        }
        if (part.blocks == 0) {
            arrive(barriers.empty(Barriers::q(group)));
            return;
        }
        wait_turn();
        start_scores();
        pass_turn();
        wgmma_wait<0>();
        end_scores();
    };
    auto write = [&](const Part& part, const Softmax& softmax) {
        float* to = lse + part.head * tokens + part.row;
        float ours[2], theirs[2];  // factors of our sums, and of the existing values
        float before[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = warp * 16 + lane / 4 + 8 * i;
            before[i] = MERGE && row < part.rows ? to[row] * (1 / LN_2) : MINUS_INFINITY;
        }
        if (MERGE) __syncwarp();  // all four lanes of a row have read it
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = warp * 16 + lane / 4 + 8 * i;
            const float weight = quad_sum(softmax.weight[i]);
            // Nothing seen: 0 and -inf. A NaN is not 0 and passes through.
            ours[i] = weight == 0 ? 0.0f : 1.0f / weight;
            float total = weight == 0 ? MINUS_INFINITY : softmax.largest[i] * factor + log2_fast(weight);
            if (MERGE) {
                const float largest = fmaxf(before[i], total), base = largest == MINUS_INFINITY ? 0.0f : largest;
                const float a = exp2_fast(before[i] - base), b = exp2_fast(total - base);
                const float share = a + b == 0 ? 0.0f : 1.0f / (a + b);
                theirs[i] = a * share;
                ours[i] *= b * share;
                total = base + log2_fast(a + b);
            }
            if (lane % 4 == 0 && row < part.rows) to[row] = total * LN_2;
        }
        scale_rows(sums, ours);
        store(out + ((long long)part.row * heads.of_row + part.head) * V_DIM, (long long)heads.of_row * V_DIM, sums, theirs, part.rows, warp, lane);
    };

    if (group == 1) pass_turn();
    Part part = take();
    if (part.end) return;
    begin(part);
    while (true) {
        int limit[2];  // what this thread's rows see, counted from its first column of block 0
#pragma unroll
        for (int i = 0; i < 2; ++i) limit[i] = min(causal ? part.seen + warp * 16 + lane / 4 + 8 * i : part.seen, part.keys) - lane % 4 * 2;
        auto hide_block = [&](int block) {
            if (block * BLOCK_N + BLOCK_N > min(part.seen, part.keys)) {
                const int left[2] = {limit[0] - block * BLOCK_N, limit[1] - block * BLOCK_N};
                hide(scores, left);
            }
        };
        Softmax softmax;
        float shrink[2];
        Part next;
        if (part.blocks > 0) {
            if (part.blocks == 1) arrive(barriers.empty(Barriers::q(group)));
            hide_block(part.blocks - 1);
            softmax.step(scores, factor, shrink);
            pack_operand<FP16>(weights, scores);
            bool keep = false;
#pragma unroll 1
            for (int block = part.blocks - 2; block >= 0; --block) {
                wait_turn();
                start_scores();
                start_sums(keep);
                pass_turn();
                keep = true;
                wgmma_wait<1>();
                end_scores();
                if (block == 0) arrive(barriers.empty(Barriers::q(group)));
                hide_block(block);
                softmax.step(scores, factor, shrink);
                finish(softmax, base + OFFSET_JOBS);
                wgmma_wait<0>();
                end_sums();
                scale_rows(sums, shrink);
                pack_operand<FP16>(weights, scores);
            }
            start_sums(keep);
            next = take();
            // Not if the next item begins with blocks to skip: their values may belong where the last ones still are. The products in flight begin
            // and end in one branch: otherwise ptxas would wait for each of them.
            if (next.blocks > 0 && next.blocks == next.all_blocks) {
                barrier_wait(barriers.full(Barriers::q(group)), q_phase);
                q_phase ^= 1;
                wait_turn();
                start_scores();
                pass_turn();
                wgmma_wait<1>();
                end_sums();
                write(part, softmax);
                wgmma_wait<0>();
                end_scores();
                part = next;
                continue;
            }
            wgmma_wait<0>();
            end_sums();
        } else {
#pragma unroll
            for (int i = 0; i < V_DIM / 2; ++i) sums[i] = 0;
            next = take();
        }
        if (!MERGE || part.blocks > 0) write(part, softmax);
        if (next.end) return;
        begin(next);
        part = next;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
attend(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_rope,
       const __grid_constant__ TensorMap map_v, Work* work, Element* out, float* lse, int tokens, Heads heads, float factor, int causal,
       int shared_rope) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const Barriers barriers{base + OFFSET_BARRIERS};
    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4;
    if (threadIdx.x == 0) barriers.make();
    __syncthreads();
    if (group == GROUPS) {
        registers_shrink<40>();
        if (warp == 0 && elect_one()) {
            wait_for_dependency();  // the list; for what the other warps read from earlier kernels they rely on this thread's wait
            load(base, barriers, &map_q, &map_k, &map_rope, &map_v, work, heads, shared_rope);
        }
    } else {
        registers_grow<232>();
        multiply(base, barriers, out, lse, tokens, heads, factor, causal, group, warp, threadIdx.x % 32);
    }
}
