// Attention of new tokens to a paged latent cache in e4m3, on sm_90a. Rows of the cache stay in shared memory as they are stored, and the multiplying
// warpgroups read them as fragments, convert them in registers and multiply them from there. docs/mla_decode.md, "Rows of e4m3", has a picture.
//
// A CTA has three warpgroups, and works on up to WIDTH query rows and on runs of blocks of 64 cached positions. Everything is transposed: positions
// (and then columns of the values) are the 64 rows of a product, and the queries are its WIDTH columns, so that few queries cost little. Blocks are
// processed in pairs: warpgroup 0 computes the scores and weights of the first, warpgroup 1 of the second; then each adds both, multiplied by its
// half of the values' columns. A warp of warpgroup 2 loads rows in units of 16, each of which is released as soon as its values have been read.
//
// e4m3 is exact in fp16, and one instruction converts two numbers. The four scales of a position multiply sums of 128 columns each, in fp32. For the
// values they multiply the weights instead, relative to the largest scale of the same 128 columns so far.
//
// Options (-D):
//   OUT         of q and of the result: 0 bf16, 1 fp16
//   WIDTH       query rows of a request, as columns of the products: 16 or 32
//   UNITS       of 16 cached rows that shared memory holds
//   BOUNDARY, WHOLE as in hopper.cu
//   REGISTERS   of a thread that multiplies; one that loads has 504 - 2 * REGISTERS

#include "mla_decode_rows.cuh"

constexpr float SLACK = 8.f;  // by how many powers of 2 a row's weights may exceed 1 before its sums are scaled to the new maximum

// ---- scores and weights --------------------------------------------------------------------------------------------

// Element 4j + 2i + e of a product is position i of the thread's two, and query row 8j + 2 * (lane % 4) + e: number 2j + e of the R / 2 rows that a
// thread has.
__device__ __forceinline__ constexpr int number_of(int r) { return r / 4 * 2 + r % 2; }
__device__ __forceinline__ constexpr int element_of(int number, int i) { return number / 2 * 4 + 2 * i + number % 2; }
__device__ __forceinline__ int row_of_number(int number, int lane) { return number / 2 * 8 + lane % 4 * 2 + number % 2; }

// Lanes with the same rows divide their sums of weights among themselves: the number that each keeps; of 16 rows, two lanes have the same.
__device__ __forceinline__ int own_number(int lane) { return lane / 16 * (R / 4) + lane / 8 % 2 * (R / 8) + (WIDTH == 16 ? 0 : lane / 4 % 2); }

// From twice KEPT sums, a lane keeps half, and adds the same half from the lane at this distance; KEPT 0: both lanes keep the single sum.
template <int KEPT> __device__ __forceinline__ void share_out(float (&sum)[R / 2], int lane, int distance) {
    const bool upper = lane & distance;
#pragma unroll
    for (int n = 0; n < KEPT; ++n) {
        const float low = sum[n], high = sum[n + KEPT];
        sum[n] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
    }
    if (KEPT == 0) sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], distance);
}

// A thread's part of the sums: 64 columns of the values in each of four groups.
struct Sums {
    float values[4][R];
    float weight;  // sum of the warp's weights for row `own_number`
    __device__ __forceinline__ Sums() {
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int r = 0; r < R; ++r) values[x][r] = 0.f;
        weight = 0.f;
    }
    __device__ __forceinline__ void add_weights(const float (&weights)[R], int lane) {
        float sum[R / 2];
#pragma unroll
        for (int n = 0; n < R / 2; ++n) sum[n] = weights[element_of(n, 0)] + weights[element_of(n, 1)];
        share_out<R / 4>(sum, lane, 16);
        share_out<R / 8>(sum, lane, 8);
        share_out<WIDTH == 16 ? 0 : 1>(sum, lane, 4);
        weight += sum[0];
    }
};

// The scales of a thread's two positions.
struct Scales {
    float of[2][4];
    __device__ __forceinline__ void load(u32 row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float4 x = smem_load4(row + i * ROW_BYTES + SCALES);
            of[i][0] = x.x, of[i][1] = x.y, of[i][2] = x.z, of[i][3] = x.w;
        }
    }
    __device__ __forceinline__ float largest(int tile) const { return fmaxf(fabsf(of[0][tile]), fabsf(of[1][tile])); }
    // A scale by which one may divide: if it is negligible next to the largest of its row, it is replaced by a slightly larger one.
    __device__ __forceinline__ float divisor(int i, int tile) const {
        const float most = fmaxf(fmaxf(fabsf(of[i][0]), fabsf(of[i][1])), fmaxf(fabsf(of[i][2]), fabsf(of[i][3])));
        const float least = fmaxf(most * 0x1p-40f, 0x1p-60f);
        return fabsf(of[i][tile]) < least ? least : of[i][tile];
    }
};

__device__ __forceinline__ void multiply_by(float (&scores)[R], float first, float second) {
    wgmma_wait<0>();
    registers_fence(scores);
#pragma unroll
    for (int r = 0; r < R; ++r) scores[r] *= r / 2 % 2 ? second : first;
    registers_fence(scores);
}

// Scores of a warp's 16 positions, in powers of 2. Sums are always relative to the scale of the last 128 columns, so they need no registers other
// than the scores'; the rope part comes last.
__device__ __forceinline__ void make_scores(float (&scores)[R], const Scales& scales, u32 base, u32 row, int lane) {
    constexpr int PARTS = 4 / STEP, ROPE_STRIP = VALUE / 64;
    const u32 queries = (u32)operand_k_major(anew(base) + AT_Q), keys = row + lane % 4 * 16;
    u32 a[2][4 * STEP];
    uint4 next[2] = {smem_words4(keys), smem_words4(keys + ROW_BYTES)};
    registers_fence(scores);
#pragma unroll
    for (int x = 0; x <= ROPE_STRIP; ++x) {  // 64 columns
        const u32 now[2][4] = {{next[0].x, next[0].y, next[0].z, next[0].w}, {next[1].x, next[1].y, next[1].z, next[1].w}};
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            u32(&to)[4 * STEP] = a[(x * PARTS + part) % 2];
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                if (x < ROPE_STRIP) latent_keys(to + 4 * i, now[0][part * STEP + i], now[1][part * STEP + i]);
                else if (i % 2 == 0) rope_keys(to + 4 * i, keys + ROPE_PART + (part * STEP + i) * 32);
            }
            if (part == 0 && x == ROPE_STRIP) multiply_by(scores, scales.divisor(0, 3), scales.divisor(1, 3));
            else if (part == 0 && x % 2 == 0 && x > 0)
                multiply_by(scores, __fdividef(scales.divisor(0, x / 2 - 1), scales.divisor(0, x / 2)),
                            __fdividef(scales.divisor(1, x / 2 - 1), scales.divisor(1, x / 2)));
            wgmma_begin();
#pragma unroll
            for (int i = 0; i < STEP; ++i) {
                const u64 b = operand(queries + x * (STRIP / 16) + 2 * (part * STEP + i));
                if (x < ROPE_STRIP) multiply_rows<1>(scores, to + 4 * i, b, x > 0 || part > 0 || i > 0);
                else multiply_rows<OUT>(scores, to + 4 * i, b, 1);
            }
            wgmma_commit();
            // Placed before the products, these loads would be waited for.
            if (part == PARTS - 1 && x < ROPE_STRIP - 1) next[0] = smem_words4(keys + (x + 1) * 64), next[1] = smem_words4(keys + ROW_BYTES + (x + 1) * 64);
            wgmma_wait<1>();  // the operands before these may be written again
        }
    }
    wgmma_wait<0>();
    registers_fence(scores);
#pragma unroll
    for (int j = 0; j < WIDTH / 8; ++j) {
        const float2 factor = smem_load2(base + AT_FACTORS + row_of_number(2 * j, lane) * 4);
#pragma unroll
        for (int r = 0; r < 4; ++r) scores[4 * j + r] *= r % 2 ? factor.y : factor.x;
    }
}

// Mask what the rows do not see of the request's positions from `first` on.
__device__ __forceinline__ void hide(float (&scores)[R], const Piece& piece, int first, int row_block, int heads, int lane) {
    heads = again(heads);
#pragma unroll
    for (int n = 0; n < R / 2; ++n) {
        const int seen = end_of(piece, row_block * BLOCK + row_of_number(n, lane), heads) - first;
        if (seen <= 0) scores[element_of(n, 0)] = nothing();
        if (seen <= 1) scores[element_of(n, 1)] = nothing();
    }
}

// Maxima that the sums are relative to: of the thread's rows, and (as an inverse and a power of 2) of the scales of each 128 columns. They are kept
// in shared memory from one pair of blocks to the next.
struct State {
    float top[R / 2], inverse[4];
    __device__ __forceinline__ void load(u32 base, int lane) {
#pragma unroll
        for (int n = 0; n < R / 2; n += 2) {
            const float2 x = smem_load2(base + AT_STATE + row_of_number(n, lane) * 4);
            top[n] = x.x, top[n + 1] = x.y;
        }
        const float4 x = smem_load4(base + AT_STATE + WIDTH * 4);
        inverse[0] = x.x, inverse[1] = x.y, inverse[2] = x.z, inverse[3] = x.w;
    }
    __device__ __forceinline__ void store(u32 base, int lane) const {
        if (lane >= 4) return;
#pragma unroll
        for (int n = 0; n < R / 2; ++n) smem_store(base + AT_STATE + row_of_number(n, lane) * 4, top[n]);
        if (lane == 0) smem_store4(base + AT_STATE + WIDTH * 4, inverse[0], inverse[1], inverse[2], inverse[3]);
    }
    __device__ __forceinline__ bool exceeded(const float (&scores)[R], const Scales& scales) const {
        bool over = false;
#pragma unroll
        for (int r = 0; r < R; ++r) over |= scores[r] > top[number_of(r)] + SLACK;
#pragma unroll
        for (int tile = 0; tile < 4; ++tile) over |= scales.largest(tile) * inverse[tile] > MOST;
        return over;
    }
};

__device__ __forceinline__ float largest_of_lanes(float x) {  // of those with the same rows
#pragma unroll
    for (int d = 4; d < 32; d *= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, d));
    return x;
}

// Find new maxima, and scale the sums to them. Both warpgroups do this, whether a block is theirs (`mine`) or not. It is rare.
__device__ __forceinline__ void raise(State& state, Sums& sums, const float (&scores)[R], const Scales& scales, bool mine, u32 base, int group, int warp, int lane) {
    const u32 tops = base + AT_TOPS + warp * TOP;
#pragma unroll
    for (int n = 0; n < R / 2; ++n) {
        const float most = largest_of_lanes(mine ? fmaxf(scores[element_of(n, 0)], scores[element_of(n, 1)]) : nothing());
        if (lane < 4) smem_store(tops + row_of_number(n, lane) * 4, most);
    }
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        const float most = largest_of_lanes(mine ? scales.largest(tile) : 0.f);
        if (lane == 0) smem_store(tops + (WIDTH + tile) * 4, most);
    }
    handover_sync<256>(ALL);
    auto largest_of_warps = [&](int i) {
        float most = nothing();
#pragma unroll
        for (int w = 0; w < 8; ++w) most = fmaxf(most, smem_load(base + AT_TOPS + w * TOP + i * 4));
        return most;
    };
    float down[4];
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        const float most = largest_of_warps(WIDTH + tile);
        down[tile] = 1.f;
        if (most * state.inverse[tile] > MOST) {  // the scales become 2^4 to 2^5
            const int exponent = min(max((int)(__float_as_uint(most) >> 23), 6), 254);
            const float inverse = __uint_as_float((258 - exponent) << 23);
            down[tile] = inverse * (1.f / state.inverse[tile]);
            state.inverse[tile] = inverse;
        }
    }
    const float own[2] = {group == 0 ? down[0] : down[2], group == 0 ? down[1] : down[3]};
#pragma unroll
    for (int n = 0; n < R / 2; ++n) {
        const float most = largest_of_warps(row_of_number(n, lane));
        float factor = 1.f;
        if (most > state.top[n] + SLACK) factor = exp2_fast(state.top[n] - most), state.top[n] = most;
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int i = 0; i < 2; ++i) sums.values[x][element_of(n, i)] *= factor * own[x / 2];
    }
    const int own_row = row_of_number(own_number(lane), lane);
    const float before = smem_load(base + AT_STATE + own_row * 4), most = largest_of_warps(own_row);
    if (most > before + SLACK) sums.weight *= exp2_fast(before - most);
    handover_sync<256>(ALL);  // all have read the state, and the maxima
    if (warp == 0) state.store(base, lane);
}

// Turn scores into weights, which go to shared memory multiplied by the scales of their positions, relative to the state.
__device__ __forceinline__ void weigh(float (&scores)[R], Sums& sums, const State& state, const Scales& scales, u32 base, int group, int warp, int lane) {
#pragma unroll
    for (int r = 0; r < R; ++r) scores[r] = exp2_fast(scores[r] - base_of(state.top[number_of(r)]));
    sums.add_weights(scores, lane);
    // Rows become columns: 8 positions of a query row are adjacent.
    const u32 to = base + AT_WEIGHTS + group * 4 * STRIP + (lane / 16 * 8 + lane % 8) * 128 + ((2 * warp + lane / 8 % 2) ^ lane % 8) * 16;
#pragma unroll
    for (int tile = 0; tile < 4; ++tile) {
        const float a = scales.of[0][tile] * state.inverse[tile], b = scales.of[1][tile] * state.inverse[tile];
#pragma unroll
        for (int j = 0; j < WIDTH / 16; ++j) {
            const float* p = scores + 8 * j;
            smem_store_transposed(to + tile * STRIP + j * 16 * 128, pack_half(p[0] * a, p[1] * a), pack_half(p[2] * b, p[3] * b), pack_half(p[4] * a, p[5] * a),
                                  pack_half(p[6] * b, p[7] * b));
        }
    }
    proxy_fence();
}

// ---- values --------------------------------------------------------------------------------------------------------

// Add a block's values (this warpgroup's half of the columns) times the weights that `from` computed; units are released.
__device__ __forceinline__ void add_values(Sums& sums, u32 base, u32 first_unit, int from, int group, int warp, int lane) {
    constexpr int TILES_OF_STEP = STEP / 2;
    const u32 weights = (u32)operand_k_major(anew(base) + AT_WEIGHTS + (from * 4 + 2 * group) * STRIP);
    const u32 column = group * 256 + warp * 32 + lane / 4 * 4, even = place_of(lane % 4 * 2) * ROW_BYTES + column, odd = place_of(lane % 4 * 2 + 1) * ROW_BYTES + column;
    Values raw[TILES_OF_STEP];
    auto load = [&](const Unit& unit, int i, int tile) {  // positions 16i and on
#pragma unroll
        for (int t = 0; t < TILES_OF_STEP; ++t)
            raw[t].load(unit.at + even + (tile + t) * 128, unit.at + odd + (tile + t) * 128);
    };
    u32 a[2][4 * STEP];
    Unit unit(base, first_unit);
    barrier_wait(unit.full, unit.phase);
    load(unit, 0, 0);
#pragma unroll
    for (int y = 0; y < 2 * UNITS_OF_BLOCK; y += TILES_OF_STEP) {
        u32(&to)[4 * STEP] = a[y / TILES_OF_STEP % 2];
#pragma unroll
        for (int t = 0; t < TILES_OF_STEP; ++t) raw[t].unpack(to + 8 * t);
        const int next = y + TILES_OF_STEP;
        if (next % 2 == 0) {
            __syncwarp();
            barrier_arrive_warp(unit.empty, lane);
            if (next < 2 * UNITS_OF_BLOCK) {
                unit = Unit(base, first_unit + next / 2);
                barrier_wait(unit.full, unit.phase);
            }
        }
#pragma unroll
        for (int x = 0; x < STEP; ++x) registers_fence(sums.values[y % 2 * 2 + x]);
        wgmma_begin();
#pragma unroll
        for (int x = 0; x < STEP; ++x) {
            const int tile = y % 2 + x / 2;
            multiply_rows<1>(sums.values[y % 2 * 2 + x], to + 4 * x, operand(weights + tile * (STRIP / 16) + y / 2 * 2), 1);
        }
        wgmma_commit();
        if (next < 2 * UNITS_OF_BLOCK) load(unit, next / 2, next % 2);
        wgmma_wait<1>();
    }
    wgmma_wait<0>();
#pragma unroll
    for (int x = 0; x < 4; ++x) registers_fence(sums.values[x]);
}

// ---- results -------------------------------------------------------------------------------------------------------

// A thread has four adjacent columns of each 128. Both warpgroups run the same instructions, which halves the instructions to fetch.
__device__ __forceinline__ void finish(Sums& sums, u32 base, const Piece& piece, const Results& results, int row_block, int group, int warp, int lane) {
    const int heads = results.heads, rows = heads * results.q_tokens;
    float back[2];
#pragma unroll
    for (int x = 0; x < 2; ++x) back[x] = 1.f / smem_load(base + AT_STATE + (WIDTH + 2 * group + x) * 4);
#pragma unroll
    for (int n = 0; n < R / 2; ++n) {
        const int r = row_of_number(n, lane), row = row_block * BLOCK + r;
        float weight = 0.f;
#pragma unroll
        for (int w = 0; w < 8; ++w) weight += smem_load(base + AT_TOTALS + w * TOP + r * 4);
        const bool dead = weight == 0.f || end_of(piece, row, heads) <= 0;
        if (group == 0 && warp == 0 && lane < 4) {
            const float lse = dead ? nothing() : smem_load(base + AT_STATE + r * 4) + log2f(weight);
            if (piece.slot >= 0) results.work.lse[(long long)piece.slot * results.work.padded_rows + row] = lse;
            else if (row < rows) results.lse[((long long)piece.request * heads + row % heads) * results.q_tokens + row / heads] = lse * LN_2;
        }
        const float factor = 1.f / weight;
#pragma unroll
        for (int x = 0; x < 4; ++x)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& y = sums.values[x][element_of(n, i)];
                y = dead ? 0.f : y * factor * back[x / 2];
            }
    }
#pragma unroll
    for (int x = 0; x < 4; x += 2) {
        const int column = (group * 4 + x) * 64 + warp * 32 + lane / 4 * 4;
        auto two = [&](int x, int n) { return pack(sums.values[x][element_of(n, 0)], sums.values[x][element_of(n, 1)]); };
#pragma unroll
        for (int n = 0; n < R / 2; ++n) {
            const int r = row_of_number(n, lane), row = row_block * BLOCK + r;
            if (piece.slot < 0) {
                if (row < rows) *(uint2*)(results.out + ((long long)piece.request * rows + row) * VALUE + column) = make_uint2(two(x, n), two(x + 1, n));
            } else if (n % 4 < 2) {  // number n + 2 is 8 rows further
                uint2* part = (uint2*)results.work.of(piece.slot, row_block, column / 16, r / 16, r % 8 * 4 + column % 8 / 2) + column / 8 % 2;
                part[0] = make_uint2(two(x, n), two(x, n + 2));
                part[2] = make_uint2(two(x + 1, n), two(x + 1, n + 2));
            }
        }
    }
}

// ---- the two warpgroups that multiply -------------------------------------------------------------------------------

__device__ __forceinline__ void attend(const Results& results, const Queries& queries, u32 base, int row_block, int group, int warp, int lane) {
    u32 done = 0;  // blocks
    for (u32 phase = 0;; phase ^= 1) {
        barrier_wait(piece_full(base), phase);
        const Piece piece = read_piece(base + AT_PIECES + phase * 32);
        if (piece.blocks < 0) return;
        if (piece.blocks == 0) {
            write_nothing(piece, results, row_block);
            barrier_arrive_warp(piece_empty(base), lane);
            continue;
        }
        queries.prepare(base, piece.request, row_block, warp, lane);
        if (warp == 0) {
            State state;
#pragma unroll
            for (int n = 0; n < R / 2; ++n) state.top[n] = nothing();
            state.inverse[0] = state.inverse[1] = state.inverse[2] = state.inverse[3] = NEXT_TO_NOTHING;
            state.store(base, lane);
        }
        handover_sync<256>(ALL);
        Sums sums;
#pragma unroll 1
        for (int pair = 0; pair < piece.blocks; pair += 2) {
            const bool mine = pair + group < piece.blocks;
            const u32 first_unit = (done + pair) * UNITS_OF_BLOCK;
            float scores[R];
            Scales scales;
            if (mine) {
                const Unit unit(base, first_unit + warp);
                const u32 row = unit.at + place_of(lane / 4) * ROW_BYTES;
                barrier_wait(unit.full, unit.phase);
                scales.load(row);
                make_scores(scores, scales, base, row, lane);
                const int first = (piece.first + pair) * BLOCK + warp * UNIT + place_of(lane / 4);
                if (piece.length - first + place_of(lane / 4) < 2 * BLOCK + results.q_tokens) hide(scores, piece, first, row_block, results.heads, lane);
            }
            State state;
            state.load(base, lane);
            if (any_of_all(mine && state.exceeded(scores, scales))) raise(state, sums, scores, scales, mine, base, group, warp, lane);
            if (mine) weigh(scores, sums, state, scales, base, group, warp % 4, lane);
            handover_sync<256>(ALL);
#pragma unroll 1
            for (int i = 0; i < min(2, piece.blocks - pair); ++i) add_values(sums, base, first_unit + i * UNITS_OF_BLOCK, i, group, warp % 4, lane);
        }
        done += piece.blocks;
        smem_store(base + AT_TOTALS + warp * TOP + row_of_number(own_number(lane), lane) * 4, sums.weight);
        handover_sync<256>(ALL);
        finish(sums, base, piece, results, row_block, group, warp % 4, lane);
        barrier_arrive_warp(piece_empty(base), lane);
        handover_sync<256>(ALL);  // all have read the totals
    }
}

// ---- the warp that loads -------------------------------------------------------------------------------------------

// Rows that are adjacent in memory are copied `box` at a time, 1 to 16. The last unit of a request is copied row by row, with its last row in place
// of all rows beyond it: what has weight 0 must be a finite number.
template <class Begins>
__device__ __forceinline__ void load(Share share, const Batch& batch, const Cache& cache, u32 base, int part, int box, Begins begins) {
    const int lane = threadIdx.x % 32;
    u32 done = 0;  // units
    for (u32 phase = 0;; phase ^= 1) {
        int count;
        const Piece piece = share.next(batch, part, count);
        if (lane == 0) {
            if (count > 0) begins(piece.request, count);
            barrier_wait(piece_empty(base), phase ^ 1);
            write_piece(base + AT_PIECES + phase * 32, piece);
            barrier_arrive(piece_full(base));
        }
        __syncwarp();
        if (piece.blocks < 0) return;
        const int begin = piece.first * BLOCK, units = piece.blocks * UNITS_OF_BLOCK;
        auto rows_of = [&](int unit) { return piece.length - begin >= (unit + 1) * UNIT ? box : 1; };
        auto ask = [&](int unit) { return cache.ask(piece.request, min(begin + unit * UNIT + min(lane * rows_of(unit), UNIT - 1), piece.length - 1)); };
        int2 next = units > 0 ? ask(0) : make_int2(0, 0);
#pragma unroll 1
        for (int i = 0; i < units; ++i) {
            const Unit unit(base, done + i);
            const u8* from = cache.row(next);
            const int rows = rows_of(i);
            next = ask(min(i + 1, units - 1));
            barrier_wait(unit.empty, unit.phase ^ 1);
            if (lane == 0) barrier_expect(unit.full, UNIT_BYTES);
            __syncwarp();
            if (lane * rows < UNIT) bulk_load(unit.at + lane * rows * ROW_BYTES, from, unit.full, rows * ROW_BYTES);
        }
        done += units;
    }
}

// ---- kernel --------------------------------------------------------------------------------------------------------

extern "C" __global__ void __launch_bounds__(THREADS, 1)
mla_decode(const Element* q, const u8* cache, const int* __restrict__ table, const int* __restrict__ lengths, const int* __restrict__ q_lengths, Element* out,
           float* lse, float* work, long long stride_request, long long stride_query, long long stride_page, long long stride_row, int stride_table, int pages,
           int page, int requests, int capacity, int q_tokens, int heads, int row_blocks, int box, float scale) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const int index = blockIdx.x / row_blocks, parts = gridDim.x / row_blocks, row_block = blockIdx.x % row_blocks;
    const Batch batch{lengths, q_lengths, requests, capacity, q_tokens};
    const Work parts_work(work, row_blocks, parts);
    int* flag = parts_work.flags + blockIdx.x;
    Share share;
    if (threadIdx.x == 32) {
        clear_flag(flag);
        let_next_begin();
    }
    if (threadIdx.x == 0) {
        for (int i = 0; i < UNITS; ++i) {
            barrier_init(unit_full(base, i), 1);
            barrier_init(unit_empty(base, i), 8 * OF_WARP);
        }
        barrier_init(piece_full(base), 1);
        barrier_init(piece_empty(base), 8 * OF_WARP);
        barrier_init_fence();
        if (requests > parts && row_block == 0) parts_work.spans[index] = make_int4(0, 0, 0, 0);
    }
    handovers_init([](int) { return 256; });
    share.plan(batch, index, parts, base);
    proxy_fence();
    __syncthreads();

    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / 32, 0), group = warp / 4, lane = threadIdx.x % 32;
    if (group == 2) {
        registers_shrink<504 - 2 * REGISTERS>();
        const Cache rows{cache, table, stride_page, stride_row, stride_table, pages, page};
        auto begins = [&](int request, int count) {
            if (row_block == 0 && (count > 1 || requests <= parts)) parts_work.spans[requests > parts ? index : request] = make_int4(request, index, count, 0);
        };
        if (warp == 8) load(share, batch, rows, base, index, box, begins);
    } else {
        registers_grow<REGISTERS>();
        const Results results{out, lse, parts_work, heads, q_tokens};
        const Queries queries{q, stride_request, stride_query, heads * q_tokens, scale};
        attend(results, queries, base, row_block, group, warp, lane);
    }
    __syncthreads();
    if (threadIdx.x == 0) raise_flag(flag);
}
