// Gradient of attention of packed sequences on sm_90a, key 192 and value 128 wide. With p = exp(scale * q.k - lse), ds = p * (dout.v - delta):
//
//     dv = p^T dout,   dk = scale * ds^T q,   dq = scale * ds k,   delta = dout.out - dlse
//
// Three kernels. `prepare` computes delta. `differentiate` takes work by a counter: a tile of 128 keys of a head, for which it loops over the
// queries, 64 at a time, the last ones first. Two of its three warpgroups multiply, 64 keys each, and hold dk and dv, 160 registers a thread; of the
// third, one warp loads, and two add a block's dq to a workspace in fp32. `finish` scales and rounds that.
//
// Sums are made in a fixed order. For dq this means taking turns: the tiles of a sequence's keys add to a block of queries one after another, the
// first keys first, controlled by a counter for each block. As all tiles loop over the queries in the same order, and begin one after another, its
// turn has usually come when a tile asks for it. Work is taken in the order of these turns, so nobody waits for a tile that has not begun.
//
// Clocks for a block of 64 queries by 128 keys: products 3,328 (each warpgroup: scores 384, dout.v 256, dv 256, dk 384, dq 384). Shared memory at 128
// bytes a clock: 2,688 for the products, 320 for loading, 128 for ds, 768 for dq, which is written there and read by TMA. Registers: in addition to
// dk and dv, 64 x 64 scores take 32 a thread, dout.v as many, half of dq 48. Of 240 only 56 are left for these. So p is rounded before dout.v begins,
// ds is multiplied into dk from shared memory although it was in registers, and dv ends before dq begins.
//
// Options (-D):
//   KIND   of the inputs: 0 bf16, 1 fp16

#include "attention_backward.cuh"
#include "handover.cuh"

constexpr int ROPE_DIM = 64, THREADS = 384, STAGES = 2;
constexpr int Q_BYTES = ROWS * QK_DIM * 2, DOUT_BYTES = ROWS * V_DIM * 2, K_BYTES = KEYS * QK_DIM * 2, V_BYTES = KEYS * V_DIM * 2;
// Columns of 128 bytes; those of k of 64 bytes: a warpgroup multiplies with 96 of its 192 columns, three of these.
constexpr int Q_BOX = ROWS * 128, K_BOX = KEYS * 64, V_BOX = KEYS * 128;
constexpr int DS_BYTES = KEYS * ROWS * 2, STATS_BYTES = 2 * ROWS * 4;
constexpr int OFFSET_K = 0, OFFSET_V = OFFSET_K + K_BYTES, OFFSET_Q = OFFSET_V + V_BYTES, OFFSET_DOUT = OFFSET_Q + STAGES * Q_BYTES;
constexpr int OFFSET_DS = OFFSET_DOUT + STAGES * DOUT_BYTES, OFFSET_DQ = OFFSET_DS + DS_BYTES, OFFSET_STATS = OFFSET_DQ + DQ_BYTES;
constexpr int OFFSET_JOB = OFFSET_STATS + STAGES * STATS_BYTES, OFFSET_BARRIERS = OFFSET_JOB + 64;

#include "stage.cuh"

// ---- work --------------------------------------------------------------------------------------------------------

// What the loading warp tells the others about a tile of keys, through shared memory.
struct Job {
    int key, keys;         // its first key, and how many there are up to the sequence's end: 0 where there is no more work
    int place;             // number of tiles of the sequence before it
    int head;              // of k and v
    int query, block;      // the sequence's first query, and the number of its first block
    int first, blocks;     // of the queries that see any of these keys, and that many: they are walked from the last to the first
    int shift;             // query i of the sequence sees key j of the tile if j <= i + shift

    template <class Each> __device__ __forceinline__ void each(Each each) {
        each(0, key), each(1, keys), each(2, place), each(3, head), each(4, query), each(5, block), each(6, first), each(7, blocks), each(8, shift);
    }
    __device__ __forceinline__ void write(u32 at) {
        each([&](int i, int x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(at + 4 * i), "r"(x) : "memory"); });
    }
    // The same value in all lanes of a warp, in a form that the compiler recognises.
    __device__ __forceinline__ void read(u32 at) {
        each([&](int i, int& x) {
            asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(at + 4 * i));
            x = __shfl_sync(0xffffffffu, x, 0);
        });
    }
};

struct Barriers {
    u32 base;
    __device__ __forceinline__ u32 k_full() const { return base; }
    __device__ __forceinline__ u32 k_empty() const { return base + 8; }
    __device__ __forceinline__ u32 v_full() const { return base + 80; }
    __device__ __forceinline__ u32 q_full(int i) const { return base + 16 + i * 8; }
    __device__ __forceinline__ u32 q_empty(int i) const { return base + 32 + i * 8; }
    __device__ __forceinline__ u32 dout_full(int i) const { return base + 48 + i * 8; }
    __device__ __forceinline__ u32 dout_empty(int i) const { return base + 64 + i * 8; }
    __device__ __forceinline__ void make() const {
        barrier_init(k_full(), 1);
        barrier_init(v_full(), 1);
        barrier_init(k_empty(), (8 + 2) * OF_WARP);  // each multiplying warp, and those that add dq
        for (int i = 0; i < STAGES; ++i) {
            barrier_init(q_full(i), 1);
            barrier_init(q_empty(i), 8 * OF_WARP);
            barrier_init(dout_full(i), 1);
            barrier_init(dout_empty(i), 8 * OF_WARP);
        }
        barrier_init_fence();
    }
};
// Named barriers. Of both multiplying warpgroups: ds is written; the other one has read ds. Of both and one of the two warps that take turns at
// adding dq: dq is written; that warp has read it.
constexpr int DS_WRITTEN = 1;
__device__ __forceinline__ constexpr int ds_read_by(int group) { return 2 + group; }
__device__ __forceinline__ constexpr int dq_written(int parity) { return 4 + parity; }
__device__ __forceinline__ constexpr int dq_read(int parity) { return 6 + parity; }

// ---- loading -----------------------------------------------------------------------------------------------------

struct Maps {
    const TensorMap *q, *k, *rope, *v, *dout;
};

// One thread's work: take tiles, tell the other warps which, and load. `together` heads are computed at one time.
__device__ __forceinline__ void load(u32 base, Barriers barriers, Maps maps, const int* cu_q, const int* cu_k, const float* stats, int* next,
                                     const Sizes& sizes, int together, bool shared_rope) {
    Stage stage;
    u32 k_phase = 0;
    const int tiles = sizes.tiles_k();
    while (true) {
        const int item = atomicAdd(next, 1);
        if (item >= tiles * sizes.heads_k) break;
        const int round = item / (tiles * together), inside = item - round * tiles * together, size = min(together, sizes.heads_k - round * together);
        const Tile<KEYS> tile(cu_k, inside / size, sizes.sequences, sizes.tokens_k);
        if (tile.first >= tile.length) continue;
        Job job;
        const int queries = length_of(cu_q, tile.span, sizes.sequences, sizes.tokens_q);
        job.key = tile.start + tile.first;
        job.keys = tile.length - tile.first;
        job.place = tile.first / KEYS;
        job.head = round * together + inside % size;
        job.query = edge(cu_q, tile.span, sizes.sequences, sizes.tokens_q);
        job.block = job.query / ROWS + tile.span;
        job.shift = keys_ahead(queries, tile.length, sizes.causal) - tile.first;
        job.first = min(max(-job.shift, 0), queries) / ROWS;
        job.blocks = (queries + ROWS - 1) / ROWS - job.first;

        const int group = sizes.heads / sizes.heads_k, query_end = job.query + queries, end = job.key + job.keys;
        auto load_block = [&](int head, int block) {
            const int row = job.query + block * ROWS;
            const u32 q = base + OFFSET_Q + stage.index * Q_BYTES, dout = base + OFFSET_DOUT + stage.index * DOUT_BYTES;
            barrier_wait(barriers.q_empty(stage.index), stage.phase ^ 1);
            barrier_expect(barriers.q_full(stage.index), Q_BYTES + STATS_BYTES);
#pragma unroll
            for (int i = 0; i < 3; ++i) tma_load_ragged(q + i * Q_BOX, maps.q, barriers.q_full(stage.index), i * 64, row, query_end, head);
            bulk_load(base + OFFSET_STATS + stage.index * STATS_BYTES, stats + ((long long)head * sizes.blocks_q() + job.block + block) * (2 * ROWS),
                      barriers.q_full(stage.index), STATS_BYTES);
            barrier_wait(barriers.dout_empty(stage.index), stage.phase ^ 1);
            barrier_expect(barriers.dout_full(stage.index), DOUT_BYTES);
#pragma unroll
            for (int i = 0; i < 2; ++i) tma_load_ragged(dout + i * Q_BOX, maps.dout, barriers.dout_full(stage.index), i * 64, row, query_end, head);
            stage.advance();
        };
        // The first queries are loaded while the multiplying warps still work on the preceding tile.
        int head = job.head * group, block = job.first + job.blocks - 1;
        if (job.blocks > 0) load_block(head, block--);

        barrier_wait(barriers.k_empty(), k_phase ^ 1);
        k_phase ^= 1;
        job.write(base + OFFSET_JOB);
        barrier_expect(barriers.k_full(), K_BYTES);
#pragma unroll
        for (int i = 0; i < 4; ++i) tma_load_ragged(base + OFFSET_K + i * K_BOX, maps.k, barriers.k_full(), i * 32, job.key, end, job.head);
#pragma unroll
        for (int i = 4; i < 6; ++i) {
            if (shared_rope) tma_load_ragged(base + OFFSET_K + i * K_BOX, maps.rope, barriers.k_full(), i * 32 - V_DIM, job.key, end, 0);
            else tma_load_ragged(base + OFFSET_K + i * K_BOX, maps.k, barriers.k_full(), i * 32, job.key, end, job.head);
        }
        barrier_expect(barriers.v_full(), V_BYTES);
#pragma unroll
        for (int i = 0; i < 2; ++i) tma_load_ragged(base + OFFSET_V + i * V_BOX, maps.v, barriers.v_full(), i * 64, job.key, end, job.head);

#pragma unroll 1
        for (; head < (job.head + 1) * group; ++head, block = job.first + job.blocks - 1)
#pragma unroll 1
            for (; block >= job.first; --block) load_block(head, block);
    }
    barrier_wait(barriers.k_empty(), k_phase ^ 1);
    Job nothing{};
    nothing.write(base + OFFSET_JOB);
    barrier_arrive(barriers.k_full());
}

// ---- dq ----------------------------------------------------------------------------------------------------------

// A warp's work: add every other block's dq to the workspace, in the order of the registers that it was in. Two warps share this, since one alone
// takes as long as a block: about 1 us to read dq, 1 to add it, and 1 to announce it and to see that its next turn has come.
__device__ __forceinline__ void add_dq(u32 base, Barriers barriers, float* dq, int* turns, const Sizes& sizes, int parity, int lane) {
    const bool elected = elect_one();
    u32 k_phase = 0;
    int step = 0;
    if (parity == 1) handover_arrive<288>(dq_read(1));
    while (true) {
        Job job;
        barrier_wait(barriers.k_full(), k_phase);
        k_phase ^= 1;
        job.read(base + OFFSET_JOB);
        __syncwarp();
        barrier_arrive_warp(barriers.k_empty(), lane);
        if (job.keys == 0) return;
        const int group = sizes.heads / sizes.heads_k;
#pragma unroll 1
        for (int head = job.head * group; head < (job.head + 1) * group; ++head) {
#pragma unroll 1
            for (int block = job.first + job.blocks - 1; block >= job.first; --block, step ^= 1) {
                if (step != parity) continue;
                const long long at = (long long)head * sizes.blocks_q() + job.block + block;
                if (elected) {
                    int turn;
                    do asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(turn) : "l"(turns + at) : "memory");
                    while (turn < job.place);
                    proxy_fence_everywhere();
                }
                __syncwarp();
                handover_sync<288>(dq_written(parity));
                if (elected) {
                    // The first tile of keys stores, the others add.
                    if (job.place == 0) bulk_store(dq + at * (DQ_BYTES / 4), base + OFFSET_DQ, DQ_BYTES);
                    else bulk_add(dq + at * (DQ_BYTES / 4), base + OFFSET_DQ, DQ_BYTES);
                    tma_store_commit();
                    tma_store_wait_read<0>();
                }
                __syncwarp();
                handover_arrive<288>(dq_read(parity));
                if (elected) {
                    tma_store_wait<0>();
                    proxy_fence_everywhere();
                    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turns + at) : "memory");
                }
                __syncwarp();
            }
        }
    }
}

// ---- products ----------------------------------------------------------------------------------------------------

struct Gradients {
    u16 *dk, *dv;
    float* rope;  // of each head: where the rope part is shared
    long long stride_kt, stride_kh, stride_vt, stride_vh;
};

// Turn scores into p; for queries that do not see key j, and for keys beyond the end, p becomes 0. `from` is a thread's first column; row i is seen
// from column first[i] on.
template <bool MASKED> __device__ __forceinline__ void weigh(u32 (&p)[16], const float (&s)[32], u32 lse, float factor, const int (&first)[2]) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const float2 from = smem_load2(lse + j * 32);
        float x[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            x[e] = exp2_fast(fmaf(s[4 * j + e], factor, e % 2 ? -from.y : -from.x));
            if (MASKED && 8 * j + e % 2 < first[e / 2]) x[e] = 0;
        }
        p[2 * j] = pack_half<FP16>(x[0], x[1]);
        p[2 * j + 1] = pack_half<FP16>(x[2], x[3]);
    }
}

// A warpgroup's work: 64 keys of each tile.
__device__ __forceinline__ void multiply(u32 base, Barriers barriers, Gradients out, const Sizes& sizes, float scale, bool shared_rope, int group,
                                         int warp, int lane) {
    // The lower halves of descriptors, through a shuffle, so that the compiler knows them to be the same in all lanes.
    auto uniform = [](u64 descriptor) { return __shfl_sync(0xffffffffu, (u32)descriptor, 0); };
    const u32 k_rows = uniform(operand_narrow_k_major(base + OFFSET_K + group * 64 * 64));
    const u32 k_columns = uniform(operand_narrow_mn_major(base + OFFSET_K + group * 3 * K_BOX, K_BOX));
    const u32 v_rows = uniform(operand_k_major(base + OFFSET_V + group * 64 * 128));
    const u32 q_rows = uniform(operand_k_major(base + OFFSET_Q)), q_columns = uniform(operand_mn_major(base + OFFSET_Q, Q_BOX));
    const u32 dout_rows = uniform(operand_k_major(base + OFFSET_DOUT)), dout_columns = uniform(operand_mn_major(base + OFFSET_DOUT, Q_BOX));
    const u32 ds_columns = uniform(operand_mn_major(base + OFFSET_DS, Q_BOX));
    const u32 ds_rows = uniform(operand_k_major(base + OFFSET_DS + group * 8192));
    const int thread = warp * 32 + lane, row = warp * 16 + lane / 4, column = lane % 4 * 2;
    // Where a lane writes 8 of its warp's columns of ds: the address of the row, and what the swizzle changes in it.
    const u32 ds_row = base + OFFSET_DS + (group * 64 + warp * 16 + lane % 16) * 128;
    Stage stage;
    u32 k_phase = 0;
    float dk[96], dv[64], s[32], dp[32];
    u32 p[16];

    auto arrive = [&](u32 barrier) { barrier_arrive_warp(barrier, lane); };
    auto start_scores = [&] {
        barrier_wait(barriers.q_full(stage.index), stage.phase);
        registers_fence(s);
        wgmma_begin();
#pragma unroll
        for (int i = 0; i < QK_DIM / 16; ++i)
            multiply_half<FP16, 0, 0>(s, operand_narrow(k_rows + i / 2 * (K_BOX / 16) + i % 2 * 2),
                                      operand(q_rows + stage.index * (Q_BYTES / 16) + i / 4 * (Q_BOX / 16) + i % 4 * 2), i > 0);
        wgmma_commit();
        registers_fence(s);
    };

    handover_arrive<256>(ds_read_by(group));
    while (true) {
        Job job;
        barrier_wait(barriers.k_full(), k_phase);
        k_phase ^= 1;
        job.read(base + OFFSET_JOB);
        if (job.keys == 0) return;
        const u32 v_phase = k_phase ^ 1;
        const int heads = sizes.heads / sizes.heads_k;
        const int steps = heads * job.blocks;
        int block = job.first + job.blocks;
#pragma unroll
        for (int i = 0; i < 96; ++i) dk[i] = 0;
#pragma unroll
        for (int i = 0; i < 64; ++i) dv[i] = 0;

#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            if (--block < job.first) block = job.first + job.blocks - 1;
            const u32 stats = base + OFFSET_STATS + stage.index * STATS_BYTES + column * 4;
            start_scores();
            wgmma_wait<1>();
            registers_fence(dk);
            if (step > 0) arrive(barriers.q_empty(stage.index ^ 1));
            wgmma_wait<0>();
            registers_fence(s);
            if (block * ROWS + job.shift < KEYS - 1 || job.keys < KEYS) {
                int first[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int key = group * 64 + row + 8 * i;
                    first[i] = key < job.keys ? key - job.shift - block * ROWS - column : ROWS;
                }
                weigh<true>(p, s, stats, scale * LOG2_E, first);
            } else {
                const int first[2] = {0, 0};
                weigh<false>(p, s, stats, scale * LOG2_E, first);
            }
            // dp = v dout^T. By then the preceding product, dk, no longer needs its q.
            if (step == 0) barrier_wait(barriers.v_full(), v_phase);
            barrier_wait(barriers.dout_full(stage.index), stage.phase);
            registers_fence(dp);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < V_DIM / 16; ++i)
                multiply_half<FP16, 0, 0>(dp, operand(v_rows + i / 4 * (V_BOX / 16) + i % 4 * 2),
                                          operand(dout_rows + stage.index * (DOUT_BYTES / 16) + i / 4 * (Q_BOX / 16) + i % 4 * 2), i > 0);
            wgmma_commit();
            registers_fence(dp);

            registers_fence(dv);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i)
                multiply_registers<FP16, 1>(dv, p + 4 * i, operand(dout_columns + stage.index * (DOUT_BYTES / 16) + i * 128), 1);
            wgmma_commit();
            registers_fence(dv);

            // ds, from the rounded p: keeping p and dp in fp32 together would need all registers.
            wgmma_wait<1>();
            registers_fence(dp);
            handover_sync<256>(ds_read_by(group ^ 1));
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i) {
                u32 ds[4];
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const float2 delta = smem_load2(stats + ROWS * 4 + (2 * i + j / 2) * 32);
#pragma unroll
                    for (int e = j; e < j + 2; ++e) {
                        const float low = widen((u16)p[4 * i + e], KIND) * (dp[8 * i + 2 * e] - delta.x);
                        const float high = widen((u16)(p[4 * i + e] >> 16), KIND) * (dp[8 * i + 2 * e + 1] - delta.y);
                        ds[e] = pack_half<FP16>(low, high);
                    }
                }
                smem_store_matrix(ds_row + ((2 * i + lane / 16) ^ lane % 8) * 16, ds[0], ds[1], ds[2], ds[3]);
            }
            proxy_fence();
            handover_sync<256>(DS_WRITTEN);

            wgmma_wait<0>();
            registers_fence(dv);
            float dq[48];
            registers_fence(dq);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < KEYS / 16; ++i)
                multiply_half<FP16, 1, 1>(dq, operand(ds_columns + i * 128), operand_narrow(k_columns + i * 64), i > 0);
            wgmma_commit();
            registers_fence(dq);
            registers_fence(dk);
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < ROWS / 16; ++i)
                multiply_half<FP16, 0, 1>(dk, operand(ds_rows + i * 2), operand(q_columns + stage.index * (Q_BYTES / 16) + i * 128), 1);
            wgmma_commit();
            registers_fence(dk);

            wgmma_wait<1>();
            registers_fence(dq);
            registers_fence(dv);
            handover_arrive<256>(ds_read_by(group));
            arrive(barriers.dout_empty(stage.index));
            if (step + 1 == steps) arrive(barriers.k_empty());
            handover_sync<288>(dq_read(stage.index ^ 1));
#pragma unroll
            for (int i = 0; i < 12; ++i)
                smem_store4(base + OFFSET_DQ + group * (DQ_BYTES / 2) + i * 2048 + thread * 16, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2],
                            dq[4 * i + 3]);
            proxy_fence();
            handover_arrive<288>(dq_written(stage.index));
            stage.advance();
        }
        wgmma_wait<0>();
        registers_fence(dk);
        if (steps > 0) arrive(barriers.q_empty(stage.index ^ 1));
        if (steps == 0) {
            barrier_wait(barriers.v_full(), v_phase);
            arrive(barriers.k_empty());
        }

        const int first = group * 64 + row;
        store_columns<0, V_DIM>(out.dv + job.key * out.stride_vt + job.head * out.stride_vh, out.stride_vt, dv, 1, first, job.keys, lane % 4);
        u16* to = out.dk + job.key * out.stride_kt + job.head * out.stride_kh;
        store_columns<0, V_DIM>(to, out.stride_kt, dk, scale, first, job.keys, lane % 4);
        if (!shared_rope) {
            store_columns<V_DIM, QK_DIM>(to, out.stride_kt, dk, scale, first, job.keys, lane % 4);
        } else {
            float* sums = out.rope + ((long long)(job.key + first) * sizes.heads_k + job.head) * ROPE_DIM + column;
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < ROPE_DIM / 8; ++j)
                    if (first + 8 * i < job.keys)
                        *(float2*)(sums + 8ll * i * sizes.heads_k * ROPE_DIM + 8 * j) =
                            make_float2(scale * dk[64 + 4 * j + 2 * i], scale * dk[64 + 4 * j + 2 * i + 1]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
differentiate(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const __grid_constant__ TensorMap map_rope,
              const __grid_constant__ TensorMap map_v, const __grid_constant__ TensorMap map_dout, const int* cu_q,
              const float* stats, float* dq, int* turns, u16* dk, u16* dv, float* rope, long long stride_kt, long long stride_kh,
              long long stride_vt, long long stride_vh, Sizes sizes, float scale, int together, int shared_rope) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const Barriers barriers{base + OFFSET_BARRIERS};
    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4, lane = threadIdx.x % 32;
    handovers_init([](int id) { return id < dq_written(0) ? 256 : 288; });
    if (threadIdx.x == 0) barriers.make();
    __syncthreads();
    if (group == 2) {
        registers_shrink<24>();
        if (warp < 2) add_dq(base, barriers, dq, turns, sizes, warp, lane);
        if (warp == 2 && elect_one())
            load(base, barriers, {&map_q, &map_k, &map_rope, &map_v, &map_dout}, cu_q, ascending_of(turns, sizes), stats, counter_of(turns, sizes),
                 sizes, together, shared_rope);
    } else {
        registers_grow<240>();
        multiply(base, barriers, {dk, dv, rope, stride_kt, stride_kh, stride_vt, stride_vh}, sizes, scale, shared_rope, group, warp, lane);
    }
}
