// Groups of rows, whose sizes only the device knows: a table in shared memory that says where each group begins, in rows and in tiles.
#pragma once

#include "ptx.cuh"

// Integers in shared memory.
__device__ __forceinline__ int load_word(u32 addr) {
    int x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr));
    return x;
}
__device__ __forceinline__ void store_word(u32 addr, int x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"); }

// Entry g says where group g begins: .x is its first row, .y the number of tiles before it. One more entry says where the last group ends. For groups
// that have a buffer each (`plan_groups` with RUNNING false), .x of entry g + 1 is the number of rows of group g.
struct GroupTable {
    u32 addr;
    int groups;
    __device__ __forceinline__ int2 at(int group) const {
        int2 entry;
        asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(entry.x), "=r"(entry.y) : "r"(addr + group * 8));
        return entry;
    }
    __device__ __forceinline__ void set(int group, int row, int tile) const {
        asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(addr + group * 8), "r"(row), "r"(tile) : "memory");
    }
    __device__ __forceinline__ int tiles() const { return at(groups).y; }
    static __host__ __device__ constexpr int bytes(int groups) { return (groups + 1) * 8; }
};

// Inclusive scan over the lanes of a warp.
template <class Step> __device__ __forceinline__ int scan_warp(int x, int lane, Step step) {
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, x, d);
        if (lane >= d) x = step(before, x);
    }
    return x;
}

// Fill the table. The whole CTA calls this; when it returns, all threads see the whole table. With RUNNING, group g ends at row `ends[g]`, and begins
// where the preceding one ended; values are clamped to [0, rows] and replaced by their running maximum. Without, `ends[g]` is the number of rows of
// group g, clamped likewise. `tiles(n)` says how many tiles a group of n rows has. `scratch` is 8 bytes of shared memory per warp.
template <int THREADS, bool RUNNING, class Tiles>
__device__ __forceinline__ void plan_groups(GroupTable table, u32 scratch, const int* ends, int rows, Tiles tiles) {
    constexpr int WARPS = THREADS / 32;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto word = [&](int i) { return load_word(scratch + i * 4); };
    auto set_word = [&](int i, int x) { store_word(scratch + i * 4, x); };
    auto larger = [](int x, int y) { return max(x, y); };
    auto sum = [](int x, int y) { return x + y; };
    int row = 0, tile = 0;  // where the groups of this round begin; a round is one group per thread
    if (threadIdx.x == 0) table.set(0, 0, 0);
    for (int first = 0; first < table.groups; first += THREADS) {
        const int group = first + threadIdx.x;
        int end = group < table.groups ? min(max(__ldg(ends + group), 0), rows) : 0, begin = 0;
        if (RUNNING) {
            end = scan_warp(end, lane, larger);
            if (lane == 31) set_word(warp, end);
            __syncthreads();
            begin = __shfl_up_sync(0xffffffffu, end, 1);
            if (lane == 0) begin = 0;
            int last = row;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                const int theirs = word(w);
                if (w < warp) row = max(row, theirs);
                last = max(last, theirs);
            }
            begin = max(begin, row);
            end = max(end, row);
            row = last;
        }
        const int through = scan_warp(group < table.groups ? tiles(end - begin) : 0, lane, sum);
        if (lane == 31) set_word(WARPS + warp, through);
        __syncthreads();
        int total = 0, before = tile;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const int theirs = word(WARPS + w);
            if (w < warp) before += theirs;
            total += theirs;
        }
        tile += total;
        if (group < table.groups) table.set(group + 1, end, before + through);
        __syncthreads();
    }
}
