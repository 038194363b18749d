// Where groups of rows begin, and their tiles of 128 rows, the first of each at its group's first row.
#pragma once

#include "ptx.cuh"

// The exclusive scan over the lanes of a warp, the first of which gets `first`.
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

// First row and first tile of each group, and the end of all as those of one more. Offsets count as their running maximum, clamped into
// [0, rows], the first as 0: whatever they hold, groups are disjoint and inside the tensors.
template <int THREADS> __device__ __forceinline__ void find_groups(const int* offsets, int rows, int groups, int* first_row, int* first_tile) {
#pragma unroll 1
    for (int g = threadIdx.x; g <= groups; g += THREADS) first_row[g] = g == 0 ? 0 : min(max(offsets[g], 0), rows);
    __syncthreads();
    if (threadIdx.x < 32) {
        // A lane has consecutive groups: of an odd number, so that lanes read different banks.
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

// The group that a tile belongs to, the last whose first tile is not after it; `groups` for a tile that no group fills.
__device__ __forceinline__ int group_of(int tile, int groups, const int* first_tile) {
    int group = 0;
    for (int beyond = groups + 1; beyond - group > 1;) {
        const int middle = (group + beyond) / 2;
        (first_tile[middle] <= tile ? group : beyond) = middle;
    }
    return group;
}
