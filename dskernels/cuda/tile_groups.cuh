// Groups of rows, whose sizes only the device knows, and their tiles of 128 rows. The first tile of a group begins at the group's first row, so a
// tile has rows of only one group. (groups.cuh does the same for tiles of other sizes.)
#pragma once

#include "ptx.cuh"

// Exclusive scan with `f` over the lanes of a warp; the first lane gets `first`.
template <class F> __device__ __forceinline__ int scanned(int x, int first, F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, x, step);
        if (lane >= step) x = f(x, other);
    }
    x = __shfl_up_sync(~0u, x, 1);
    return lane == 0 ? first : x;
}

// Find the first row and the first tile of each group; the entry after the last group says where it ends. Offsets are clamped to [0, rows], replaced
// by their running maximum, and the first one by 0: so whatever values they have, groups are disjoint and inside the tensors.
template <int THREADS> __device__ __forceinline__ void find_groups(const int* offsets, int rows, int groups, int* first_row, int* first_tile) {
#pragma unroll 1
    for (int g = threadIdx.x; g <= groups; g += THREADS) first_row[g] = g == 0 ? 0 : min(max(offsets[g], 0), rows);
    __syncthreads();
    if (threadIdx.x < 32) {
        // Each lane has several consecutive groups. Their number is odd, so that the lanes read from different banks.
        const int each = (groups + 32) / 32 | 1, begin = min((int)threadIdx.x * each, groups + 1), end = min(begin + each, groups + 1);
        int row = 0, tile = 0;
#pragma unroll 1
        for (int g = begin; g < end; ++g) row = max(row, first_row[g]);
        row = scanned(row, 0, [](int a, int b) { return max(a, b); });
#pragma unroll 1
        for (int g = begin; g < end; ++g) {
            const int before = row;
            row = max(row, first_row[g]);
            tile += (row - before + 127) / 128;
            first_row[g] = row, first_tile[g] = tile;
        }
        const int earlier = scanned(tile, 0, [](int a, int b) { return a + b; });
#pragma unroll 1
        for (int g = begin; g < end; ++g) first_tile[g] += earlier;
    }
    __syncthreads();
}

// The group that a tile belongs to: the last one whose first tile is not after it. For a tile after all groups, it is `groups`.
__device__ __forceinline__ int group_of(int tile, int groups, const int* first_tile) {
    int group = 0;
    for (int beyond = groups + 1; beyond - group > 1;) {
        const int middle = (group + beyond) / 2;
        (first_tile[middle] <= tile ? group : beyond) = middle;
    }
    return group;
}
