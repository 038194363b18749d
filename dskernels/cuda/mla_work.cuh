// Shared by the two decode kernels over the latent cache (mla/decode/hopper.cu and, for e4m3 rows, hopper_rows.cu): how the cached positions of a
// batch are divided over the GPU, where rows are, and where results go.
#pragma once

#include "groups.cuh"
#include "handover.cuh"
#include "mla_parts.cuh"

constexpr int THREADS = 384;  // three warpgroups: two multiply, the third loads

// ---- hiding values from the compiler ----------------------------------------------------------------------------------

// A number that the compiler does not recognise from one use to the next: it would keep everything derived from it in registers.
__device__ __forceinline__ int again(int x) {
    int y;
    asm volatile("mov.b32 %0, %1;" : "=r"(y) : "r"(x));
    return y;
}
// The address of shared memory in a form that the compiler knows to be the same in all lanes (through a shuffle), but not from one block to the next:
// it would keep all descriptors derived from it in registers.
__device__ __forceinline__ u32 anew(u32 base) {
    u32 x;
    asm volatile("mov.b32 %0, %1;" : "=r"(x) : "r"(base));
    return __shfl_sync(0xffffffffu, x, 0);
}

// ---- how the work is shared out ------------------------------------------------------------------------------------

// A run of blocks of 64 positions of one request, which one CTA processes for 64 of its query rows.
struct Piece {
    int request, first, blocks, length, fresh;  // blocks < 0: there is no more work; fresh: how many of its tokens are new
    int slot;                                   // where a partial result goes, < 0: this is the whole result
};

__device__ __forceinline__ void write_piece(u32 at, const Piece& x) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x.request), "r"(x.first), "r"(x.blocks), "r"(x.length) : "memory");
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at + 16), "r"(x.fresh), "r"(x.slot) : "memory");
}
__device__ __forceinline__ Piece read_piece(u32 at) {
    Piece x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.request), "=r"(x.first), "=r"(x.blocks), "=r"(x.length) : "r"(at) : "memory");
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(x.fresh), "=r"(x.slot) : "r"(at + 16) : "memory");
    return x;
}

// The batch, in device memory.
struct Batch {
    const int* lengths;
    const int* q_lengths;  // null: all q_tokens of each request
    int requests, capacity, q_tokens;
    __device__ __forceinline__ int length(int request) const { return min(max(__ldg(lengths + request), 0), capacity); }
    __device__ __forceinline__ int fresh(int request) const {
        return q_lengths == nullptr ? q_tokens : min(max(__ldg(q_lengths + request), 0), q_tokens);
    }
};

// The share of one of `parts` groups of CTAs; a group has a CTA for each 64 query rows of a request. The cost of a request is its number of blocks,
// preceded by BOUNDARY more for what begins and ends with it. The costs of all requests are placed in a row, which is divided evenly among the parts:
// if this cuts a request, its partial results are combined later. If whole requests, equally many for every part, exceed the even share by at most
// WHOLE, no request is cut.
struct Share {
    int even;     // cost of an even share; 0: requests are whole
    int to;       // end of the share, relative to its beginning
    int request;  // the next to look at
    int begin;    // beginning of that request, relative to that of the share

    // The CTA's work. The scratch is 8 bytes per request and then 8 per warp; whoever uses that memory next needs a barrier.
    __device__ __forceinline__ void plan(const Batch& batch, int part, int parts, u32 scratch) {
        const GroupTable table{scratch + 256, batch.requests};
        plan_groups<THREADS, false>(table, scratch, batch.lengths, batch.capacity, [](int length) { return (length + BLOCK - 1) / BLOCK + BOUNDARY; });
        const int total = table.tiles();
        even = (total + parts - 1) / parts;
        // Whole requests: the most that one part gets.
        auto bound = [&](int p) { return (u32)(p * batch.requests) / (u32)parts; };
        int most = 0;
#pragma unroll 1
        for (int p = threadIdx.x % 32; p < parts; p += 32) most = max(most, table.at(bound(p + 1)).y - table.at(bound(p)).y);
        if (__reduce_max_sync(0xffffffffu, most) <= even + WHOLE) {
            even = 0;
            request = bound(part);
            begin = 0;
            to = table.at(bound(part + 1)).y - table.at(request).y;
            return;
        }
        const int from = part * even;
        to = min(even, total - from);
        // The last request that begins at or before `from`.
        int low = 0, high = batch.requests;
#pragma unroll 1
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (table.at(middle).y <= from) low = middle;
            else high = middle;
        }
        request = low;
        begin = table.at(low).y - from;
    }

    // The next piece; `count` returns how many parts have the request that begins in it, 0 if none begins.
    __device__ __forceinline__ Piece next(const Batch& batch, int part, int& count) {
        Piece piece;
        count = 0;
        while (request < batch.requests && begin < to) {
            const int length = batch.length(request), blocks = (length + BLOCK - 1) / BLOCK, first_block = begin + BOUNDARY;
            piece.request = request;
            piece.length = length;
            piece.first = max(-first_block, 0);
            piece.blocks = min(to - first_block, blocks) - piece.first;
            piece.slot = piece.blocks == blocks ? -1 : piece.first > 0 ? 2 * part : 2 * part + 1;
            const bool nothing = blocks == 0 && begin >= 0;
            if (nothing) piece.blocks = 0, piece.slot = -1;
            ++request;
            begin = first_block + blocks;
            if (piece.blocks > 0 || nothing) {
                piece.fresh = batch.fresh(piece.request);
                if (piece.first == 0) count = even == 0 || nothing ? 1 : (begin - 1) / even + 1;
                return piece;
            }
        }
        piece.blocks = -1;
        return piece;
    }
};

// ---- the cache -----------------------------------------------------------------------------------------------------

struct Cache {
    const u8* data;
    const int* table;
    long long stride_page, stride_row;  // in bytes
    int stride_table, pages, page;
    // For a position: its page, according to the table, and its row there.
    __device__ __forceinline__ int2 ask(int request, int position) const {
        const int index = position / page;
        return make_int2(__ldg(table + (long long)request * stride_table + index), position - index * page);
    }
    // The page, clamped to those that exist. This waits for the table.
    __device__ __forceinline__ int2 find(int2 place) const { return make_int2(min(max(place.x, 0), pages - 1), place.y); }
    __device__ __forceinline__ const u8* row(int2 place) const {
        const int2 at = find(place);
        return data + at.x * stride_page + at.y * stride_row;
    }
};

// ---- results -------------------------------------------------------------------------------------------------------

struct Results {
    Element* out;
    float* lse;
    Work work;
    int heads, q_tokens;
};

// A query row sees the positions below this.
__device__ __forceinline__ int end_of(const Piece& piece, int row, int heads) {
    const int j = row / heads;
    return j < piece.fresh ? piece.length - piece.fresh + 1 + j : 0;
}

// A request without positions.
__device__ __forceinline__ void write_nothing(const Piece& piece, const Results& results, int row_block) {
    const int thread = again(threadIdx.x), heads = again(results.heads), rows = heads * results.q_tokens, first = row_block * BLOCK, count = min(BLOCK, rows - first);
    uint4* out = (uint4*)(results.out + ((long long)piece.request * rows + first) * VALUE);
#pragma unroll 1
    for (int i = thread; i < count * (VALUE / 8); i += 256) out[i] = make_uint4(0, 0, 0, 0);
    if (thread < count) {
        const int n = first + thread;
        results.lse[((long long)piece.request * heads + n % heads) * results.q_tokens + n / heads] = nothing();
    }
}
