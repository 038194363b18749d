// Loading blocks of 64 cached rows into shared memory for the decode kernel, for LOADER 0, 1 or 2: by TMA if a page consists of whole pieces of 8
// rows or more; otherwise row by row; and, for e4m3, unpacked on the way.
//
// All of them walk through the CTA's pieces, announce each, with its queries, to the multiplying warpgroups, and fill the two stages in turn: block i
// of a piece goes to stage i % 2, tile by tile, each half as soon as it is free.
#pragma once

#include "mla_decode.cuh"

// ---- instructions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ void copy16_async(u32 dst, const void* src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst), "l"(src) : "memory");
}
// An arrival that happens once the copies that this thread has started are done.
__device__ __forceinline__ void barrier_arrive_after_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ uint4 global_load16(const void* p) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(p));
    return x;
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }
// Prefetch a line, or half of one, into the L2.
__device__ __forceinline__ void prefetch_line(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
__device__ __forceinline__ void smem_store16(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// ---- the cache -----------------------------------------------------------------------------------------------------

// Prefetch what the first loads would otherwise wait for one after another: tensor maps, and the table if it is small.
__device__ __forceinline__ void prefetch(const Batch& batch, const int* table, int stride_table, const TensorMap* map_q, const TensorMap* map_k) {
    constexpr int LINE = 128 / 4, MOST = 1024;
    const int line = threadIdx.x * gridDim.x + blockIdx.x;
    if (line < MOST && line * LINE < batch.requests * stride_table) prefetch_line(table + line * LINE);
    if (threadIdx.x == 64) prefetch_map(map_q);
    if (LOADER == 0 && threadIdx.x == 96) prefetch_map(map_k);
}

// Phases of the barriers for "a half of a stage is empty" and "the queries have been read"; at first all are.
struct Phases {
    u32 bits = 3;
    __device__ __forceinline__ u32 of(int stage) const { return bits >> stage & 1; }
    __device__ __forceinline__ void advance(int stage) { bits ^= 1 << stage; }
    __device__ __forceinline__ u32 piece() const { return bits >> 2; }  // 0, 1, 0, ...
    __device__ __forceinline__ void next_piece() { bits ^= 4; }
};

// One thread's work: announce a piece to the others, and load its queries when the last ones have been read.
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

// A warp's work. A box is `box_rows` rows of a page, 8 to 64; each lane has a box of a block. If a block is a single box, this is known at compile
// time, and one thread has them all.
template <class Meta>
__device__ __forceinline__ void load_boxes(Share share, const Batch& batch, const Cache& cache, u32 base, const TensorMap* map_q, const TensorMap* map_k,
                                           int part, int row_block, int box_rows, Meta begins) {
    if (WHOLE_BOXES) box_rows = BLOCK;
    const int boxes = BLOCK / box_rows, window = 32 / boxes;  // boxes of a block; blocks whose addresses the lanes hold
    const int lane = threadIdx.x % 32, rank = CLUSTER > 1 ? cluster_rank() : 0;
    const bool elected = elect_one(), loads = WHOLE_BOXES ? elected : lane < boxes;
    Phases phases;
    for (;; phases.next_piece()) {
        int count;
        const Piece piece = share.next(batch, part, count);
        // The address of the lane's box, in the lane's own block of a window; a box beyond the request's end is replaced by one with its last rows.
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
                    if (g == 4) barrier_wait(rope_empty(base, s), phases.of(s));
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

// A warpgroup's work: rows of any page size, 16 bytes at a time. A warp has 16 rows of a block, a thread four of them, 4 apart, and of each 128 of
// their bytes the same 16. Eight lanes have half of a row and the other half of the next: so their writes cover all banks, unchanged or unpacked to
// twice the size, and a warp reads whole rows.
constexpr int OWN_ROWS = 4, ROWS_OF_WARP = 16;
__device__ __forceinline__ int own_row(int lane) { return lane / 16 * 2 + (lane / 8 + lane / 4) % 2; }
struct Rows {
    const u8* mine;          // the row whose number, among the warp's rows, is that of the lane
    const u8* at[OWN_ROWS];  // the thread's 16 bytes of its rows
    // The addresses of a warp's rows are loaded by its lanes, one each, before they are needed here.
    __device__ __forceinline__ void find(const Cache& cache, int2 place, int lane) {
        mine = cache.row(place);
#pragma unroll
        for (int n = 0; n < OWN_ROWS; ++n) at[n] = (const u8*)__shfl_sync(0xffffffffu, (u64)mine, own_row(lane) + 4 * n) + lane % 8 * 16;
    }
};
__device__ __forceinline__ int2 ask_row(const Cache& cache, const Piece& piece, int block, int warp, int lane) {
    return cache.ask(piece.request, min((piece.first + block) * BLOCK + warp * ROWS_OF_WARP + lane % ROWS_OF_WARP, piece.length - 1));
}

// The address of 16 bytes of a tile, in the 128-byte swizzle.
__device__ __forceinline__ u32 chunk(u32 tile, int row, int column) { return tile + row * 128 + (column ^ row % 8) * 16; }
// From a thread's chunk in its first row, that of its n-th row.
__device__ __forceinline__ u32 below(u32 at, int n) { return (at ^ n % 2 * 64) + n * 512; }

// Copy the thread's part of a tile, which begins `offset` bytes into its rows.
__device__ __forceinline__ void copy_tile(u32 tile, const Rows& rows, int offset, int warp, int lane) {
    const u32 to = chunk(tile, warp * ROWS_OF_WARP + own_row(lane), lane % 8);
#pragma unroll
    for (int n = 0; n < OWN_ROWS; ++n) copy16_async(below(to, n), rows.at[n] + offset);
}

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
                if (j % 2 == 0) barrier_wait(g < 4 ? empty(base, s, g / 2) : rope_empty(base, s), phases.of(s));
#pragma unroll
                for (int t = 0; t < 2; ++t)
                    if (t < tiles_of(g)) copy_tile(base + OFFSET_K + s * ROWS + (2 * g + t) * TILE, rows, (2 * g + t) * 128, warp, lane);
                barrier_arrive_after_copies(full(base, s, g));
            }
            phases.advance(s);
        }
    }
}

// ---- from e4m3 -----------------------------------------------------------------------------------------------------

// Four e4m3 numbers times a scale, rounded once to 16 bits.
__device__ __forceinline__ void unpack(u32 (&to)[2], u32 four, float scale) {
    u32 low, high;
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}" : "=r"(low), "=r"(high) : "r"(four));
    to[0] = pack(widen((u16)low, 1) * scale, widen((u16)(low >> 16), 1) * scale);
    to[1] = pack(widen((u16)high, 1) * scale, widen((u16)(high >> 16), 1) * scale);
}

// The thread's part of a group of two tiles, loaded from memory: 16 columns of each of its rows, which become two chunks.
struct Loaded {
    uint4 bytes[OWN_ROWS];
    __device__ __forceinline__ void load(const Rows& rows, int offset) {
#pragma unroll
        for (int n = 0; n < OWN_ROWS; ++n) bytes[n] = global_load16(rows.at[n] + offset);
    }
    // `to` is the first chunk of the first row; `scale` belongs to the row with the lane's number.
    __device__ __forceinline__ void store(u32 to, float scale, int lane) const {
#pragma unroll
        for (int n = 0; n < OWN_ROWS; ++n) {
            const float factor = __shfl_sync(0xffffffffu, scale, own_row(lane) + 4 * n);
            u32 a[2], b[2];
            unpack(a, bytes[n].x, factor);
            unpack(b, bytes[n].y, factor);
            smem_store16(below(to, n), a[0], a[1], b[0], b[1]);
            unpack(a, bytes[n].z, factor);
            unpack(b, bytes[n].w, factor);
            smem_store16(below(to ^ 16, n), a[0], a[1], b[0], b[1]);
        }
    }
};

// A warpgroup's work. Rows are loaded into registers two groups ahead, and prefetched into the L2 before; their addresses before that. Loading a
// block ahead, for which the multiplying warpgroups could spare registers, is within 1%. There is no fence here, which would wait for all of it: the
// multiplying warpgroups have one.
template <class Meta>
__device__ __forceinline__ void load_e4m3(Share share, const Batch& batch, const Cache& cache, u32 base, const TensorMap* map_q, int part, int row_block,
                                          Meta begins) {
    constexpr int AHEAD = 2, SCALES = VALUE, ROPE_PART = SCALES + VALUE / 128 * 4, ROW_BYTES = ROPE_PART + ROPE * 2;
    const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
    const u32 own = base + OFFSET_K + chunk(lane / 4 % 2 * TILE, warp * ROWS_OF_WARP + own_row(lane), lane % 4 * 2);
    auto arrive = [&](u32 barrier) {
        __syncwarp();
        if (RACECHECK || elect_one()) barrier_arrive(barrier);
    };
    // For stage 1 the right half comes first.
    auto offset = [](int stage, int j) { return (j / 2 ^ stage) * 256 + j % 2 * 128; };
    Phases phases;
    for (;; phases.next_piece()) {
        int count;
        const Piece piece = share.next(batch, part, count);
        auto ask = [&](int block) { return ask_row(cache, piece, min(block, piece.blocks - 1), warp, lane); };
        // Two lanes have a row, and prefetch half a line each: prefetching 128 bytes each is 9% slower.
        auto prefetch = [&](int block, int2 place) {
            if (PREFETCH == 0 || block >= piece.blocks) return;
            const u8* row = cache.row(place) + lane / ROWS_OF_WARP * 64;
#pragma unroll
            for (int i = 0; i < ROW_BYTES; i += 128) prefetch_line(row + i);
        };
        Rows rows;
        Loaded loaded[AHEAD];
        float4 scales;  // of the row with the lane's number
        int2 next, ahead;
        if (piece.blocks > 0) {
            rows.find(cache, ask(0), lane);
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) loaded[j].load(rows, offset(0, j));
            scales = __ldg((const float4*)(rows.mine + SCALES));
            next = ask(1);
            for (int i = 1; i <= PREFETCH; ++i) prefetch(i, ask(i));
            ahead = ask(1 + PREFETCH);
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
            const u32 rope = base + OFFSET_K + s * ROWS + 8 * TILE;
            barrier_wait(rope_empty(base, s), phases.of(s));
            if (OUT == 0) {
                copy_tile(rope, rows, ROPE_PART, warp, lane);
                barrier_arrive_after_copies(full(base, s, 4));
            } else {
                const u32 to = chunk(rope, warp * ROWS_OF_WARP + own_row(lane), lane % 8);
#pragma unroll
                for (int n = 0; n < OWN_ROWS; ++n) {
                    const uint4 x = global_load16(rows.at[n] + ROPE_PART);
                    auto half = [](u32 two) { return pack(widen((u16)two, 0), widen((u16)(two >> 16), 0)); };
                    smem_store16(below(to, n), half(x.x), half(x.y), half(x.z), half(x.w));
                }
                arrive(full(base, s, 4));
            }
            const float factor[4] = {s ? scales.z : scales.x, s ? scales.w : scales.y, s ? scales.x : scales.z, s ? scales.y : scales.w};
            prefetch(i + 1 + PREFETCH, ahead);
            ahead = ask(i + 2 + PREFETCH);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (j == 4 - AHEAD) {  // from here on, loads are for the next block
                    rows.find(cache, next, lane);
                    next = ask(i + 2);
                    scales = __ldg((const float4*)(rows.mine + SCALES));
                }
                // For a half's second group this has been waited for already, but its branch keeps the assembler from moving the loads further down.
                barrier_wait(empty(base, s, j / 2 ^ s), phases.of(s));
                loaded[j % AHEAD].store(own + s * ROWS + offset(s, j) * (TILE / 64), factor[j], lane);
                arrive(full(base, s, group_at(s, j)));
                loaded[j % AHEAD].load(rows, j + AHEAD < 4 ? offset(s, j + AHEAD) : offset(1 - s, j + AHEAD - 4));
            }
            phases.advance(s);
        }
    }
}
