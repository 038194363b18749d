// Attention of new tokens to the paged latent cache on sm_90a. The cache is read once: its rows are the keys, and without their rope part the values.
// docs/mla_decode.md explains how it works, with a picture.
//
// A CTA has three warpgroups. It works on 64 query rows (heads and new tokens of a request, packed) and on runs of blocks of 64 cached positions. The
// 64 x 512 sums take half of all registers, so warpgroup 0 keeps the left 256 columns and warpgroup 1 the right ones. Blocks are processed in pairs:
// warpgroup 0 computes the scores and weights of the first block of a pair, warpgroup 1 those of the second; each passes its weights to the other
// through shared memory, and adds both blocks, multiplied by its half of the values. So one multiplies while the other works on its softmax.
// Warpgroup 2 loads.
//
// Options (-D):
//   OUT         of q, of the result and, without e4m3, of the cache: 0 bf16, 1 fp16
//   LOADER      0 the tensor memory accelerator, 1 row by row, 2 row by row from e4m3
//   WHOLE_BOXES with LOADER 0, 1: pages are multiples of 64 rows, so that a copy takes 64; 0: fewer, as an argument says
//   PREFETCH    with LOADER 2: blocks that are asked for, into the L2, ahead of their load
//   CLUSTER     with LOADER 0: CTAs, of neighbouring query rows, that load for each other, 1 or 2
//   BOUNDARY    what a request costs beside its blocks, in blocks; WHOLE: how many blocks more than its even share a part may get where that
//               spares cutting requests
//   REGISTERS   of a thread that multiplies; one that loads has 504 - 2 * REGISTERS, as a CTA of 384 threads begins with 168 for each

#include "mla_decode_load.cuh"

constexpr float SLACK = 8.f;  // by how many powers of 2 a row's weights may exceed 1 before its sums are scaled to the new maximum
constexpr int FIRST_READY = 1, SECOND_READY = 2, SUMS_READY = 3, OWN = 4;  // named barriers

// ---- a warpgroup's half of the sums --------------------------------------------------------------------------------

// What each thread of a multiplying warpgroup keeps about its two rows, r and r + 8.
struct Rowwise {
    float largest[2];  // maximum that the sums are relative to, in powers of 2; the true one may be larger by SLACK
    float weight[2];   // sum of the weights that this thread made
};

// Scale the sums, and the sum of weights, to another maximum. This is rare, except for the first blocks of a request.
template <bool WEIGHT> __device__ __forceinline__ void move_to(float (&sums)[128], Rowwise& row, const float (&largest)[2]) {
    if (__any_sync(0xffffffffu, largest[0] != row.largest[0] || largest[1] != row.largest[1])) {
        const float a = exp2_fast(row.largest[0] - base_of(largest[0])), b = exp2_fast(row.largest[1] - base_of(largest[1]));
        if (WEIGHT) row.weight[0] *= a, row.weight[1] *= b;
#pragma unroll
        for (int j = 0; j < 32; ++j) sums[4 * j] *= a, sums[4 * j + 1] *= a, sums[4 * j + 2] *= b, sums[4 * j + 3] *= b;
    }
    row.largest[0] = largest[0];
    row.largest[1] = largest[1];
}

// Start the scores of the block in STAGE.
template <int STAGE> __device__ __forceinline__ void start_scores(float (&scores)[32], u32 base, u32 phase) {
    const u32 here = anew(base), q = operand_k_major(here + OFFSET_Q), k = operand_k_major(here + OFFSET_K + STAGE * ROWS);
    registers_fence(scores);
#pragma unroll
    for (int j = 0; j < TILE_GROUPS; ++j) {
        const int g = group_at(STAGE, j);
        barrier_wait(full(base, STAGE, g), phase);
        if (LOADER != 0) proxy_fence();  // threads wrote it, and did not wait for their copies or loads
        wgmma_begin();
#pragma unroll
        for (int t = 2 * g; t < 2 * g + tiles_of(g); ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                multiply_scores(scores, operand(q + t * (TILE / 16) + 2 * i), operand(k + t * (TILE / 16) + 2 * i), j > 0 || t > 2 * g || i > 0);
    }
    wgmma_commit();
    registers_fence(scores);
}

// Mask positions that this thread's rows do not see; from the beginning of the block on, the request has `left` positions.
__device__ __forceinline__ void hide(float (&scores)[32], const Piece& piece, int left, int row_block, int heads) {
    const int thread = again(threadIdx.x), lane = thread % 32, r = row_block * BLOCK + thread % 128 / 32 * 16 + lane / 4;
    const int first = lane % 4 * 2 + piece.length - left;  // position of the thread's first column
    heads = again(heads);
    const int seen[2] = {end_of(piece, r, heads) - first, end_of(piece, r + 8, heads) - first};
#pragma unroll
    for (int j = 0; j < 32; ++j)
        if (j / 4 * 8 + j % 2 >= seen[j / 2 % 2]) scores[j] = nothing();
}

// Turn scores into weights of 16 bits, relative to the maximum, which is stored in `largest`.
__device__ __forceinline__ void weigh(const float (&scores)[32], u32 (&weights)[16], Rowwise& row, float (&largest)[2], float scale) {
    float top[2] = {nothing(), nothing()};
#pragma unroll
    for (int j = 0; j < 32; ++j) top[j / 2 % 2] = fmaxf(top[j / 2 % 2], scores[j]);
    float base[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 1));
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffffu, top[i], 2)) * scale;
        const float before = largest[i];
        if (top[i] > before + SLACK) largest[i] = top[i];
        base[i] = base_of(largest[i]);
        row.weight[i] *= exp2_fast(before - base[i]);
    }
#pragma unroll
    for (int j = 0; j < 16; ++j) {
        const float a = exp2_fast(fmaf(scores[2 * j], scale, -base[j % 2])), b = exp2_fast(fmaf(scores[2 * j + 1], scale, -base[j % 2]));
        row.weight[j % 2] += a + b;
        weights[j] = pack(a, b);
    }
}

// Keeps the compiler from moving the computation of the weights behind the next wait.
__device__ __forceinline__ void made(u32 (&weights)[16]) {
#pragma unroll
    for (int j = 0; j < 16; ++j) asm volatile("" : "+r"(weights[j])::"memory");
}

// Pass weights, and the maxima that they are relative to, to the other warpgroup.
__device__ __forceinline__ void hand_over(const u32 (&weights)[16], const float (&largest)[2], u32 base, int group, int warp, int lane) {
    const u32 to = chunk(base + OFFSET_P, warp * 16 + lane % 16, lane / 16);
#pragma unroll
    for (int j = 0; j < 4; ++j)
        smem_store_matrix(to ^ j * 32, weights[4 * j], weights[4 * j + 1], weights[4 * j + 2], weights[4 * j + 3]);
    if (lane % 4 == 0) {
        const u32 at = base + OFFSET_MAXIMA + (group * BLOCK + warp * 16 + lane / 4) * 4;
        smem_store(at, largest[0]);
        smem_store(at + 32, largest[1]);
    }
    proxy_fence();
}
__device__ __forceinline__ void take_maxima(float (&largest)[2], u32 base, int group, int warp, int lane) {
    const u32 at = base + OFFSET_MAXIMA + (group * BLOCK + warp * 16 + lane / 4) * 4;
    largest[0] = smem_load(at);
    largest[1] = smem_load(at + 32);
}

// Add the values of the block in STAGE, multiplied by the weights in registers, or by those from the other warpgroup.
__device__ __forceinline__ u32 values(u32 base, int stage, int group) { return operand_mn_major(base + OFFSET_K + stage * ROWS + group * 4 * TILE, TILE); }
template <int STAGE, int GROUP> __device__ __forceinline__ void start_own(float (&sums)[128], const u32 (&weights)[16], u32 base) {
    const u32 v = values(anew(base), STAGE, GROUP);
    registers_fence(sums);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_values(sums, weights + 4 * i, operand(v + i * 128));
    wgmma_commit();
    registers_fence(sums);
}
template <int STAGE, int GROUP> __device__ __forceinline__ void start_other(float (&sums)[128], u32 base) {
    const u32 here = anew(base), p = operand_k_major(here + OFFSET_P), v = values(here, STAGE, GROUP);
    registers_fence(sums);
    wgmma_begin();
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_half<OUT == 1, 0, 1>(sums, operand(p + 2 * i), operand(v + i * 128), 1);
    wgmma_commit();
    registers_fence(sums);
}

// Zero the values from row `valid` on: their weight is 0, but 0 * NaN would be NaN. Done by the whole warpgroup.
__device__ __forceinline__ void clear_rows(u32 stage, int valid) {
#pragma unroll 1
    for (int i = valid * 64 + again(threadIdx.x) % 128; i < BLOCK * 64; i += 128) smem_store16(stage + i % 64 / 8 * TILE + i / 64 * 128 + i % 8 * 16, 0, 0, 0, 0);
    proxy_fence();
    handover_sync<128>(OWN + threadIdx.x / 128);
}

__device__ __forceinline__ void release(u32 barrier, int lane) {
    if (CLUSTER == 1) barrier_arrive_warp(barrier, lane);
    else if (RACECHECK) {
        for (int i = 0; i < CLUSTER; ++i) barrier_arrive_at(barrier, i);
    } else if (lane < CLUSTER) barrier_arrive_at(barrier, lane);
}

// ---- results -------------------------------------------------------------------------------------------------------

// All stores use this address with offsets in the instruction: separate addresses would spill.
__device__ __forceinline__ void keep(Element*& p) { asm volatile("" : "+l"(p)); }

// Lanes exchange halves, so that four of them write 32 bytes of a row.
__device__ __forceinline__ void store_sums(const float (&sums)[128], const float (&factor)[2], Element* row0, Element* row8, bool write0, bool write8, int lane) {
    const bool odd = lane % 2;
    row0 += odd * 8 + lane % 4 / 2 * 4;
    row8 += odd * 8 + lane % 4 / 2 * 4;
    keep(row0);
    keep(row8);
#pragma unroll
    for (int j = 0; j < 32; j += 2) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const bool dead = factor[i] == 0.f;  // nothing was seen, whatever the sums are
            auto two = [&](int j) { return dead ? 0u : pack(sums[4 * j + 2 * i] * factor[i], sums[4 * j + 2 * i + 1] * factor[i]); };
            const u32 a = two(j), b = two(j + 1), mine = odd ? b : a, theirs = __shfl_xor_sync(0xffffffffu, odd ? a : b, 1);
            if (i == 0 ? write0 : write8)
                *(uint2*)((i == 0 ? row0 : row8) + j * 8) = odd ? make_uint2(theirs, mine) : make_uint2(mine, theirs);
        }
    }
}

template <int GROUP>
__device__ __forceinline__ void finish(float (&sums)[128], Rowwise& row, const Piece& piece, const Results& results, u32 base, int row_block, int warp,
                                       int lane, u32 turn) {
    warp = again(warp);
    lane = again(lane);
    const int r = warp * 16 + lane / 4, heads = again(results.heads);
    float factor[2], lse[2];
    // Two places in turn: if pieces are one block long, nothing makes warpgroup 0 wait for 1 between this and what it writes for the next piece.
    const u32 place = base + OFFSET_SUMS + turn * (2 * BLOCK * 4) + r * 4, mine = place + GROUP * (BLOCK * 4), other = place + (1 - GROUP) * (BLOCK * 4);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float& weight = row.weight[i];
        weight += __shfl_xor_sync(0xffffffffu, weight, 1);
        weight += __shfl_xor_sync(0xffffffffu, weight, 2);
        if (lane % 4 == 0) smem_store(mine + i * 32, weight);
    }
    handover_sync_apart<256>(SUMS_READY);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float theirs = smem_load(other + i * 32), weight = GROUP == 0 ? row.weight[i] + theirs : theirs + row.weight[i];
        const bool dead = weight == 0.f || end_of(piece, row_block * BLOCK + r + 8 * i, heads) <= 0;
        factor[i] = dead ? 0.f : 1.f / weight;
        lse[i] = dead ? nothing() : row.largest[i] + log2f(weight);
    }
    const int rows = heads * results.q_tokens, first = row_block * BLOCK + r;
    if (piece.slot < 0) {
        Element* out = results.out + ((long long)piece.request * rows + first) * VALUE + GROUP * (VALUE / 2);
        store_sums(sums, factor, out, out + 8 * VALUE, first < rows, first + 8 < rows, lane);
        if (GROUP == 0 && lane % 4 == 0) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = first + 8 * i;
                if (n < rows) results.lse[((long long)piece.request * heads + n % heads) * results.q_tokens + n / heads] = lse[i] * LN_2;
            }
        }
    } else {
        const long long n = (long long)piece.slot * results.work.padded_rows + first;
        uint4* part = results.work.of(piece.slot, row_block, GROUP * 16, warp, lane);
        auto two = [&](int j, int i) { return factor[i] == 0.f ? 0u : pack(sums[4 * j + 2 * i] * factor[i], sums[4 * j + 2 * i + 1] * factor[i]); };
#pragma unroll
        for (int j = 0; j < 32; j += 2) part[j / 2 * 128] = make_uint4(two(j, 0), two(j, 1), two(j + 1, 0), two(j + 1, 1));
        if (GROUP == 0 && lane % 4 == 0) {
            results.work.lse[n] = lse[0];
            results.work.lse[n + 8] = lse[1];
        }
    }
}

// ---- the two warpgroups that multiply -------------------------------------------------------------------------------

// Warpgroup 1 adds the first block's values while it works on its softmax. With e4m3, whose loading warps wait for each half to become free, it does
// so before its own scores: 128 requests of 4,096 take 383.9 us instead of 389.4 with 128 heads, 210.7 instead of 216.3 with 64.
constexpr bool FIRST_ALONE = LOADER == 2;

template <int GROUP> __device__ __forceinline__ void attend(const Results& results, u32 base, int row_block, int warp, int lane, float scale) {
    // Bit 0: phase of the stage whose scores this warpgroup computes; bit 1: of the work item.
    for (u32 phase = 0;; phase ^= 2) {
        barrier_wait(q_full(base), phase >> 1);
        const u32 at = base + OFFSET_PIECES + (phase >> 1) * 32;  // remains valid while this warpgroup works on it
        const Piece piece = read_piece(at);
        if (piece.blocks < 0) return;
        if (piece.blocks == 0) {
            write_nothing(piece, results, row_block);
            barrier_arrive_warp(q_empty(base), lane);
            continue;
        }
        Rowwise row = {{nothing(), nothing()}, {0.f, 0.f}};
        int todo = piece.blocks;                                        // of the whole piece, not only of the first blocks of its pairs
        int left = piece.length - (piece.first + GROUP) * BLOCK;  // positions from the block on whose scores this warpgroup computes
        float sums[128], scores[32], largest[2];
        u32 weights[16];
#pragma unroll
        for (int i = 0; i < 128; ++i) sums[i] = 0.f;
        if (GROUP == 0) {
#pragma unroll 1
            for (;; todo -= 2, left -= 2 * BLOCK) {
                start_scores<0>(scores, base, phase & 1);
                wgmma_wait<0>();
                registers_fence(scores);
                release(rope_empty(base, 0), lane);
                if (left < BLOCK) clear_rows(base + OFFSET_K, left);
                phase ^= 1;
                if (todo <= 2) barrier_arrive_warp(q_empty(base), lane);
                if (left < BLOCK - 1 + results.q_tokens) hide(scores, read_piece(at), left, row_block, results.heads);
                largest[0] = row.largest[0];
                largest[1] = row.largest[1];
                weigh(scores, weights, row, largest, scale);
                move_to<false>(sums, row, largest);
                start_own<0, GROUP>(sums, weights, base);
                handover_sync<128>(OWN);  // all have read what was passed before
                hand_over(weights, largest, base, 0, warp, lane);
                handover_arrive<256>(FIRST_READY);
                wgmma_wait<0>();
                registers_fence(sums);
                release(empty(base, 0, 0), lane);
                if (todo == 1) break;
                handover_sync<256>(SECOND_READY);
                take_maxima(largest, base, 1, warp, lane);
                move_to<true>(sums, row, largest);
                start_other<1, GROUP>(sums, base);
                wgmma_wait<0>();
                registers_fence(sums);
                release(empty(base, 1, 0), lane);
                if (todo == 2) break;
            }
        } else {
            auto start_first = [&] {
                handover_sync<256>(FIRST_READY);
                take_maxima(largest, base, 0, warp, lane);
                move_to<true>(sums, row, largest);
                start_other<0, GROUP>(sums, base);
            };
            auto end_first = [&] {
                wgmma_wait<0>();
                registers_fence(sums);
                release(empty(base, 0, 1), lane);
            };
            if (todo == 1) barrier_arrive_warp(q_empty(base), lane);
#pragma unroll 1
            for (; todo >= 2; todo -= 2, left -= 2 * BLOCK) {
                if (FIRST_ALONE) start_first(), end_first();
                start_scores<1>(scores, base, phase & 1);
                wgmma_wait<0>();
                registers_fence(scores);
                release(rope_empty(base, 1), lane);
                if (left < BLOCK) clear_rows(base + OFFSET_K + ROWS, left);
                phase ^= 1;
                if (todo <= 3) barrier_arrive_warp(q_empty(base), lane);
                if (!FIRST_ALONE) start_first();
                if (left < BLOCK - 1 + results.q_tokens) hide(scores, read_piece(at), left, row_block, results.heads);
                weigh(scores, weights, row, largest, scale);
                made(weights);
                if (!FIRST_ALONE) end_first();
                move_to<false>(sums, row, largest);
                start_own<1, GROUP>(sums, weights, base);
                handover_sync<128>(OWN + 1);
                hand_over(weights, largest, base, 1, warp, lane);
                handover_arrive<256>(SECOND_READY);
                wgmma_wait<0>();
                registers_fence(sums);
                release(empty(base, 1, 1), lane);
            }
            if (todo == 1) start_first(), end_first();
        }
        finish<GROUP>(sums, row, read_piece(at), results, base, row_block, warp, lane, phase >> 1);
    }
}

// ---- kernels -------------------------------------------------------------------------------------------------------

// The grid is (part, 64 query rows).
extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_k, const u8* cache, const int* __restrict__ table,
           const int* __restrict__ lengths, const int* __restrict__ q_lengths, Element* out, float* lse, float* work,
           long long stride_page, long long stride_row, int stride_table, int pages, int page, int requests, int capacity, int q_tokens, int heads,
           int row_blocks, int box_rows, float scale) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const int index = blockIdx.x / row_blocks, parts = gridDim.x / row_blocks, row_block = blockIdx.x % row_blocks;
    const Batch batch{lengths, q_lengths, requests, capacity, q_tokens};
    int* flag = Work(work, row_blocks, parts).flags + blockIdx.x;
    Share share;
    prefetch(batch, table, stride_table, &map_q, &map_k);
    if (threadIdx.x == 32) {
        clear_flag(flag);
        let_next_begin();
    }
    handovers_init([](int id) { return id < OWN ? 256 : 128; });
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; ++s) {
            // Copies arrive thread by thread, unpacked rows warp by warp.
            for (int g = 0; g < TILE_GROUPS; ++g) barrier_init(full(base, s, g), LOADER == 0 ? 1 : LOADER == 2 && (g < 4 || OUT == 1) ? 4 * OF_WARP : 128);
            for (int half = 0; half < 2; ++half) barrier_init(empty(base, s, half), 4 * OF_WARP * CLUSTER);
            barrier_init(rope_empty(base, s), 4 * OF_WARP * CLUSTER);
        }
        barrier_init(q_full(base), 1);
        barrier_init(q_empty(base), 8 * OF_WARP);
        barrier_init_fence();
        if (requests > parts && row_block == 0) Work(work, row_blocks, parts).spans[index] = make_int4(0, 0, 0, 0);
    }
    share.plan(batch, index, parts, base + OFFSET_K);
    proxy_fence();
    __syncthreads();
    if (CLUSTER > 1) {  // only now may the other CTA load into what was used as scratch
        cluster_arrive();
        cluster_wait();
    }

    const int global_warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = global_warp / 4, warp = global_warp % 4, lane = threadIdx.x % 32;
    if (group == 2) {
        registers_shrink<504 - 2 * REGISTERS>();
        const Cache rows{cache, table, stride_page, stride_row, stride_table, pages, page};
        const Work results(work, row_blocks, parts);
        auto begins = [&](int request, int count) {
            if (row_block == 0 && (count > 1 || requests <= parts)) results.spans[requests > parts ? index : request] = make_int4(request, index, count, 0);
        };
        if (LOADER == 0 && warp == 0) load_boxes(share, batch, rows, base, &map_q, &map_k, index, row_block, box_rows, begins);
        if (LOADER == 1) load_rows(share, batch, rows, base, &map_q, index, row_block, begins);
        if (LOADER == 2) load_e4m3(share, batch, rows, base, &map_q, index, row_block, begins);
    } else {
        registers_grow<REGISTERS>();
        const Results results{out, lse, Work(work, row_blocks, parts), heads, q_tokens};
        if (group == 0) attend<0>(results, base, row_block, warp, lane, scale);
        else attend<1>(results, base, row_block, warp, lane, scale);
    }
    __syncthreads();
    if (threadIdx.x == 0) raise_flag(flag);
    if (CLUSTER > 1) cluster_sync();  // a CTA must not end while the other may still arrive at its barriers, or load for it
}
