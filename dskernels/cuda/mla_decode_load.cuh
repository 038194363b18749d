// How blocks of 64 cached rows get into shared memory for the decode kernel, LOADER 0, 1 or 2: by the tensor memory accelerator where a page
// is whole pieces of 8 rows or more; row by row where it is not; and unpacked from e4m3 on the way.
//
// All of them walk the CTA's pieces, announce each to the warpgroups that multiply, with its queries, and fill the two stages in turn: block
// i of a piece goes to stage i % 2, tile by tile, each half as soon as it is free.
#pragma once

#include "mla_decode.cuh"

// ---- instructions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy16_async(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// An arrival, once the copies that this thread has started are done.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ uint4 global_load16(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
// A line, or half of one, into the L2.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void smem_store16(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- the cache -----------------------------------------------------------------------------------------------------

struct Cache {
    const u8* data;
    const int* table;
    long long stride_page, stride_row;  // in bytes
    int stride_table, pages, page;
    // Of a position: its page, as the table has it, and its row there.
    __device__ __forceinline__ int2 ask(int request, int position) const {
        const int index = position / page;
        return make_int2(__ldg(table + (long long)request * stride_table + index), position - index * page);
    }
    // The page made one of those that there are. This waits for the table.
    __device__ __forceinline__ int2 find(int2 place) const { return make_int2(min(max(place.x, 0), pages - 1), place.y); }
    __device__ __forceinline__ const u8* row(int2 place) const {
        const int2 at = find(place);
        return data + at.x * stride_page + at.y * stride_row;
    }
};

// Phases of the barriers that say a half of a stage is empty, and the queries are read; at first they all are.
struct Phases {
    u32 bits = 3;
    __device__ __forceinline__ u32 of(int stage) const { return bits >> stage & 1; }
    __device__ __forceinline__ void advance(int stage) { bits ^= 1 << stage; }
    __device__ __forceinline__ u32 piece() const { return bits >> 2; }  // 0, 1, 0, ...
    __device__ __forceinline__ void next_piece() { bits ^= 4; }
};

// One thread's work: tell the others about a piece, and load its queries when the last ones have been read.
__device__ __forceinline__ void announce(u32 base, const TensorMap* map_q, int row_block, const Piece& piece, u32 slot) {
    barrier_wait(q_empty(base), slot ^ 1);
    write_piece(base + OFFSET_PIECES + slot * 32, piece);
    if (piece.blocks <= 0) {
        barrier_arrive(q_full(base));
        return;
    }
    barrier_expect(q_full(base), ROWS);
#pragma unroll
    for (int t = 0; t < TILES; ++t) tma_load(base + OFFSET_Q + t * TILE, map_q, q_full(base), t * 64, row_block * BLOCK, piece.request);
}

// ---- by the accelerator --------------------------------------------------------------------------------------------

// A warp's work. A box is `box_rows` rows of a page, 8 to 64; each box of a block is a lane's. The boxes that a block comes in are known to the
// compiler where they are one, and then one thread has them.
template <class Meta>
__device__ __forceinline__ void load_boxes(Share share, const Batch& batch, const Cache& cache, u32 base, const TensorMap* map_q, const TensorMap* map_k,
                                           int part, int row_block, int box_rows, Meta begins) {
    if (WHOLE_BOXES) box_rows = BLOCK;
    const int boxes = BLOCK / box_rows, window = 32 / boxes;  // boxes of a block; blocks whose places the lanes hold
    const int lane = threadIdx.x % 32, rank = CLUSTER > 1 ? cluster_rank() : 0;
    const bool elected = elect_one(), loads = WHOLE_BOXES ? elected : lane < boxes;
    Phases phases;
    for (;; phases.next_piece()) {
        int count;
        const Piece piece = share.next(batch, part, count);
        // Of the lane's box, in the block that is its own of a window; a box beyond the request's end is taken from its last rows.
        auto places = [&](int number) {
            const int block = number * window + lane / boxes;
            if (block >= piece.blocks) return make_int2(0, 0);
            const int last = (piece.length - 1) / box_rows * box_rows;
            return cache.find(cache.ask(piece.request, min((piece.first + block) * BLOCK + lane % boxes * box_rows, last)));
        };
        int2 even = places(0), odd = places(1);  // windows
        auto place = [&](int i) {
            const int from = i % window * boxes + lane % boxes;
            const int2 a = make_int2(__shfl_sync(0xffffffffu, even.x, from), __shfl_sync(0xffffffffu, even.y, from));
            const int2 b = make_int2(__shfl_sync(0xffffffffu, odd.x, from), __shfl_sync(0xffffffffu, odd.y, from));
            return i / window % 2 ? b : a;
        };
        if (elected) {
            if (count > 0) begins(piece.request, count);
            announce(base, map_q, row_block, piece, phases.piece());
        }
        __syncwarp();
        if (piece.blocks < 0) return;
#pragma unroll 1
        for (int i = 0; i < piece.blocks; ++i) {
            if (i > 0 && i % window == 0) {
                const int2 more = places(i / window + 1);
                if (i / window % 2) even = more;
                else odd = more;
            }
            const int s = i % 2;
            const u32 stage = base + OFFSET_K + s * ROWS + lane % boxes * box_rows * 128;
            const int2 at = place(i);
            if (loads) {
#pragma unroll
                for (int j = 0; j < TILE_GROUPS; ++j) {
                    const int g = group_at(s, j);
                    if (g == 0) barrier_wait(empty(base, s, 0), phases.of(s));
                    if (g == 2) barrier_wait(empty(base, s, 1), phases.of(s));
                    if (WHOLE_BOXES || lane == 0) barrier_expect(full(base, s, g), tiles_of(g) * TILE);
#pragma unroll
                    for (int k = 0; k < 2; ++k) {
                        const int t = 2 * g + k;
                        if (t >= TILES || CLUSTER > 1 && t % 2 != rank) continue;
                        if (CLUSTER > 1) tma_load_multicast(stage + t * TILE, map_k, full(base, s, g), t * 64, at.y, at.x, (1 << CLUSTER) - 1);
                        else tma_load(stage + t * TILE, map_k, full(base, s, g), t * 64, at.y, at.x);
                    }
                }
            }
            __syncwarp();
            phases.advance(s);
        }
    }
}

// ---- row by row ----------------------------------------------------------------------------------------------------

// A warpgroup's work: rows of any page size, 16 bytes at a time. A warp has 16 rows of a block, a thread two of them, 8 apart; and of each 16
// bytes of the left half of a tile's 128 and 16 of the right one, that of odd rows first: so eight lanes, of two rows, write to all banks.
// Where two CTAs unpack e4m3 for each other, each has half of the rows: a warp eight, a thread one.
constexpr int SHARING = LOADER == 2 ? CLUSTER : 1, OWN_ROWS = 2 / SHARING, ROWS_OF_WARP = 8 * OWN_ROWS;
__device__ __forceinline__ int first_row(int warp) { return (SHARING > 1 ? cluster_rank() * (BLOCK / 2) : 0) + warp * ROWS_OF_WARP; }
struct Rows {
    const u8* at[OWN_ROWS];
    // The places of a warp's rows are asked for by its lanes, one each, before they are needed here.
    __device__ __forceinline__ void find(const Cache& cache, int2 place, int lane) {
#pragma unroll
        for (int h = 0; h < OWN_ROWS; ++h) {
            const int from = h * 8 + lane / 4;
            at[h] = cache.row(make_int2(__shfl_sync(0xffffffffu, place.x, from), __shfl_sync(0xffffffffu, place.y, from)));
        }
    }
};
__device__ __forceinline__ int2 ask_row(const Cache& cache, const Piece& piece, int block, int warp, int lane) {
    return cache.ask(piece.request, min((piece.first + block) * BLOCK + first_row(warp) + lane % ROWS_OF_WARP, piece.length - 1));
}

// 16 bytes of a tile, in the 128-byte swizzle.
__device__ __forceinline__ u32 chunk(u32 tile, int row, int column) { return tile + row * 128 + (column ^ row % 8) * 16; }
// The chunks of a tile that a thread has, in shared memory and in its rows: of each row, h, two, k.
__device__ __forceinline__ u32 own_chunk(u32 tile, int h, int k, int warp, int lane) {
    return (chunk(tile, first_row(warp) + lane / 4, lane / 4 % 2 * 4 + lane % 4) ^ k * 64) + h * 8 * 128;
}
__device__ __forceinline__ const u8* own_bytes(const Rows& rows, int h, int k, int lane) { return rows.at[h] + ((lane / 4 + k) % 2 * 4 + lane % 4) * 16; }

template <class Meta>
__device__ __forceinline__ void load_rows(Share share, const Batch& batch, const Cache& cache, u32 base, const TensorMap* map_q, int part, int row_block,
                                          Meta begins) {
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    Phases phases;
    for (;; phases.next_piece()) {
        int count;
        const Piece piece = share.next(batch, part, count);
        if (threadIdx.x == 256) {
            if (count > 0) begins(piece.request, count);
            announce(base, map_q, row_block, piece, phases.piece());
        }
        if (piece.blocks < 0) return;
        if (piece.blocks == 0) continue;
        Rows rows;
        int2 next = ask_row(cache, piece, 0, warp, lane);
#pragma unroll 1
        for (int i = 0; i < piece.blocks; ++i) {
            const int s = i % 2;
            rows.find(cache, next, lane);
            next = ask_row(cache, piece, min(i + 1, piece.blocks - 1), warp, lane);
#pragma unroll 1
            for (int j = 0; j < TILE_GROUPS; ++j) {
                const int g = group_at(s, j);
                if (g == 0) barrier_wait(empty(base, s, 0), phases.of(s));
                if (g == 2) barrier_wait(empty(base, s, 1), phases.of(s));
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    if (t >= tiles_of(g)) continue;
#pragma unroll
                    for (int n = 0; n < 2 * OWN_ROWS; ++n)
                        copy16_async(own_chunk(base + OFFSET_K + s * ROWS + (2 * g + t) * TILE, n / 2, n % 2, warp, lane),
                                     own_bytes(rows, n / 2, n % 2, lane) + (2 * g + t) * 128);
                }
                barrier_arrive_after_copies(full(base, s, g));
            }
            phases.advance(s);
        }
    }
}

// ---- from e4m3 -----------------------------------------------------------------------------------------------------

// Two e4m3 times a scale, rounded once to 16 bits.
__device__ __forceinline__ u32 unpack_pair(u16 pair, float scale) {
    u32 halves;
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(pair));
    return pack(widen((u16)halves, 1) * scale, widen((u16)(halves >> 16), 1) * scale);
}

// Where unpacked rows go: into this CTA's shared memory, and with SHARING into the other's, `there` bytes on, where the barrier counts them.
struct Target {
    u32 there;
    __device__ __forceinline__ void store(u32 at, u32 barrier, u32 a, u32 b, u32 c, u32 d) const {
        smem_store16(at, a, b, c, d);
        if (SHARING > 1)
            cluster_store(at + there, barrier + there, make_float4(__uint_as_float(a), __uint_as_float(b), __uint_as_float(c), __uint_as_float(d)));
    }
};

// A group of two tiles of a thread's rows, on its way from memory: 16 columns of each tile, which become two chunks.
struct Loaded {
    uint4 bytes[OWN_ROWS][2];
    float scale[OWN_ROWS];
    __device__ __forceinline__ void load(const Rows& rows, int group, int lane) {
#pragma unroll
        for (int h = 0; h < OWN_ROWS; ++h) {
#pragma unroll
            for (int t = 0; t < 2; ++t) bytes[h][t] = global_load16(rows.at[h] + group * 128 + t * 64 + lane % 4 * 16);
            scale[h] = __ldg((const float*)(rows.at[h] + VALUE) + group);
        }
    }
    __device__ __forceinline__ void unpack(const Target& target, u32 tiles, u32 barrier, int warp, int lane) const {
        const u32 to = chunk(tiles, first_row(warp) + lane / 4, lane % 4 * 2);
#pragma unroll
        for (int n = 0; n < 2 * OWN_ROWS; ++n) {
            const int h = n / 2, t = n % 2;
            const u32 words[4] = {bytes[h][t].x, bytes[h][t].y, bytes[h][t].z, bytes[h][t].w}, at = to + t * TILE + h * 8 * 128;
            u32 x[8];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                x[2 * w] = unpack_pair((u16)words[w], scale[h]);
                x[2 * w + 1] = unpack_pair((u16)(words[w] >> 16), scale[h]);
            }
            target.store(at, barrier, x[0], x[1], x[2], x[3]);
            target.store(at ^ 16, barrier, x[4], x[5], x[6], x[7]);
        }
    }
};

// A warpgroup's work. Rows are asked for two blocks ahead, into the L2, and loaded two groups ahead, into registers, or four where half of the rows
// are the other CTA's; their places a while before. No fence stands here, which would wait for all that: whoever multiplies has one.
template <class Meta>
__device__ __forceinline__ void load_e4m3(Share share, const Batch& batch, const Cache& cache, u32 base, const TensorMap* map_q, int part, int row_block,
                                          Meta begins) {
    constexpr int ROW_BYTES = VALUE + VALUE / 128 * 4 + ROPE * 2, AHEAD = 4 / OWN_ROWS, LANES = 32 / ROWS_OF_WARP;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const Target target{SHARING > 1 ? cluster_addr(base, cluster_rank() ^ 1) - base : 0};
    // A warp has stored its rows of a group; the first one also says how many bytes come from the other CTA.
    auto arrive = [&](u32 barrier, int group) {
        __syncwarp();
        if (SHARING > 1 && threadIdx.x == 256) barrier_expect(barrier, tiles_of(group) * TILE / 2);
        else if (lane == 0) barrier_arrive(barrier);
    };
    Phases phases;
    for (;; phases.next_piece()) {
        int count;
        const Piece piece = share.next(batch, part, count);
        // LANES have a row, and ask for half a line each: every 128 bytes alone, it is 2% slower, every 32, 8%.
        auto prefetch = [&](int block, int2 place) {
            if (block >= piece.blocks) return;
            const u8* row = cache.row(place) + lane / ROWS_OF_WARP * 64;
            for (int i = 0; i < ROW_BYTES; i += LANES * 64) prefetch_line(row + i);
        };
        Rows rows;
        Loaded loaded[AHEAD];
        int2 next, ahead;
        if (piece.blocks > 0) {
            next = ask_row(cache, piece, 0, warp, lane);
            for (int i = 1; i < 1 + PREFETCH; ++i) prefetch(i, ask_row(cache, piece, i, warp, lane));
            ahead = ask_row(cache, piece, 1 + PREFETCH, warp, lane);
            rows.find(cache, next, lane);
            if (AHEAD == 4) next = ask_row(cache, piece, min(1, piece.blocks - 1), warp, lane);
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) loaded[j].load(rows, j, lane);
        }
        if (threadIdx.x == 256) {
            if (count > 0) begins(piece.request, count);
            announce(base, map_q, row_block, piece, phases.piece());
        }
        __syncwarp();
        if (piece.blocks < 0) return;
#pragma unroll 1
        for (int i = 0; i < piece.blocks; ++i) {
            const int s = i % 2;
            const u32 stage = base + OFFSET_K + s * ROWS;
            if (PREFETCH > 0) {
                prefetch(i + 1 + PREFETCH, ahead);
                ahead = ask_row(cache, piece, i + 2 + PREFETCH, warp, lane);
            }
            if (AHEAD == 2) next = ask_row(cache, piece, min(i + 1, piece.blocks - 1), warp, lane);
            uint4 rope[2 * OWN_ROWS];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int g = group_at(s, j);
                if (j == 4 - AHEAD) {  // what is loaded from here on is the next block's
#pragma unroll
                    for (int k = 0; k < 2 * OWN_ROWS; ++k) rope[k] = global_load16(own_bytes(rows, k / 2, k % 2, lane) + ROW_BYTES - ROPE * 2);
                    rows.find(cache, next, lane);
                    if (AHEAD == 4) next = ask_row(cache, piece, min(i + 2, piece.blocks - 1), warp, lane);
                }
                // Of a half's second group this has been waited for; but the assembler moves the loads below no branch, as it else does.
                barrier_wait(empty(base, s, g / 2), phases.of(s));
                loaded[j % AHEAD].unpack(target, stage + 2 * g * TILE, full(base, s, g), warp, lane);
                arrive(full(base, s, g), g);
                const int to = j + AHEAD;
                loaded[j % AHEAD].load(rows, to < 4 ? group_at(s, to) : group_at(1 - s, to - 4), lane);
            }
#pragma unroll
            for (int k = 0; k < 2 * OWN_ROWS; ++k) {
                uint4 x = rope[k];
                if (OUT == 1) {
                    auto half = [](u32 two) { return pack(widen((u16)two, 0), widen((u16)(two >> 16), 0)); };
                    x = make_uint4(half(x.x), half(x.y), half(x.z), half(x.w));
                }
                target.store(own_chunk(stage + 8 * TILE, k / 2, k % 2, warp, lane), full(base, s, 4), x.x, x.y, x.z, x.w);
            }
            arrive(full(base, s, 4), 4);
            phases.advance(s);
        }
    }
}
