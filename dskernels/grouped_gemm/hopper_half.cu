// Grouped products of bf16 and fp16 on sm_90a: one product per group over a ragged batch, whose group sizes only the device knows.
//
// The warps, the pipeline and most options are those of cuda/half_gemm.cuh: a cluster of two CTAs computes a pair of tiles at a time. This file adds
// the groups, the order of the tiles, and the zeros in parts of C that no tile covers. First, all threads of a CTA fill a table in shared memory that
// says where each group and its tiles begin (cuda/groups.cuh); after that, every thread that loads, multiplies or stores steps through the CTA's
// tiles on its own.
//
// Further options (-D):
//   FORM   0: C[r] = B[e] @ A[r] for each row r of group e, A [1, T, K], B [E, N, K]; of the first `height` rows, those of no group become zero
//          1: C[e, m] = B[e] @ A[e, m] for each m below the group's count, A [E, M, K]
//          2: C[e] = A[rows of e].T @ B[rows of e], A [T, M], B [T, N], C [E, M, N]; for a group without rows, C[e] becomes zero or, with
//             ACCUMULATE, is not touched
//   GROUP  number of pairs of tiles that are computed along M before the next column of tiles

#include "groups.cuh"
#include "half_gemm.cuh"

// The sizes from which the tiles follow: C has `columns` columns and, with FORM 2, `height` rows for each group; `depth` is K.
struct Shape {
    int height, columns, depth;
    __device__ __forceinline__ int wide() const { return (columns + BLOCK_N - 1) / BLOCK_N; }
    __device__ __forceinline__ int tall(int rows) const { return ((FORM == 2 ? height : rows) + BLOCK_M - 1) / BLOCK_M; }
    // The number of pairs of tiles of a group with `rows` rows: pairs adjacent along M and, if the number of rows of tiles is odd, pairs adjacent along
    // N in the last of these rows.
    __device__ __forceinline__ int pairs(int rows) const {
        if (rows == 0) return 0;
        return tall(rows) / 2 * wide() + tall(rows) % 2 * ((wide() + 1) / 2);
    }
};

// The tiles of this CTA. The current one is tile (m, n) of `group`, which has rows `first` to `end`; `beside`: the pair is adjacent along N.
struct Tiles {
    Shape shape;
    GroupTable table;
    int index, step, count, group, first, end, m, n;
    bool beside;
    u32 rank;

    __device__ __forceinline__ Tiles(Shape shape, GroupTable table, u32 rank) : shape(shape), table(table), rank(rank) {
        count = table.tiles();
        index = blockIdx.x / CLUSTER;
        step = gridDim.x / CLUSTER;
        group = 0;
        locate();
    }
    // The order of a group's pairs is GROUP pairs along M, then the next column of tiles. Thus the tiles that are computed at the same time cover
    // about as many rows as columns, which minimises what they read.
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        int2 from = table.at(group), to = table.at(group + 1);
        while (index >= to.y) {
            ++group;
            from = to;
            to = table.at(group + 1);
        }
        first = FORM == 1 ? 0 : from.x;
        end = to.x;
        const int wide = shape.wide(), tall = shape.tall(end - first), pairs = tall / 2, inside = index - from.y;
        beside = inside >= pairs * wide;
        if (beside) {
            m = tall - 1;
            n = (inside - pairs * wide) * 2 + rank;
        } else {
            const int strip = inside / (GROUP * wide), top = strip * GROUP, size = min(pairs - top, GROUP);
            const int i = inside - top * wide;
            m = (top + i % size) * 2 + rank;
            n = i / size;
        }
    }
    __device__ __forceinline__ bool valid() const { return index < count; }
    __device__ __forceinline__ void next() {
        index += step;
        locate();
    }
    __device__ __forceinline__ bool side_by_side() const { return beside; }
    __device__ __forceinline__ int column() const { return n * BLOCK_N; }
    __device__ __forceinline__ int blocks() const { return ((FORM == 2 ? end - first : shape.depth) + BLOCK_K - 1) / BLOCK_K; }
    __device__ __forceinline__ int rows() const {
        if (n >= shape.wide()) return 0;  // the second tile of a pair along N, if the number of columns of tiles is odd
        return (FORM == 2 ? shape.height : end - first) - m * BLOCK_M;
    }

    template <bool SHARED> __device__ __forceinline__ void load_a(const TensorMap* map, u32 buffer, u32 barrier, int block, int i) const {
        const int row = m * BLOCK_M + i * 64;
        if (FORM == 2) load_ragged<SHARED>(map, buffer, barrier, row, block);
        else load<SHARED>(map, buffer, barrier, block * BLOCK_K, first + row, FORM == 1 ? group : 0);
    }
    template <bool SHARED> __device__ __forceinline__ void load_b(const TensorMap* map, u32 buffer, u32 barrier, int block, int i) const {
        const int row = n * BLOCK_N + i * (BLOCK_N / B_BOXES);
        if (FORM == 2) load_ragged<SHARED>(map, buffer, barrier, row, block);
        else if (B_MN) load<SHARED>(map, buffer, barrier, row, block * BLOCK_K, group);
        else load<SHARED>(map, buffer, barrier, block * BLOCK_K, row, group);
    }
    template <bool SHARED> static __device__ __forceinline__ void load(const TensorMap* map, u32 buffer, u32 barrier, int x, int y, int z) {
        if (SHARED) tma_load_multicast(buffer, map, barrier, x, y, z, EVERYONE);
        else tma_load(buffer, map, barrier, x, y, z);
    }
    // Load rows of this group; rows of other groups are read as zero, whatever they hold.
    template <bool SHARED> __device__ __forceinline__ void load_ragged(const TensorMap* map, u32 buffer, u32 barrier, int x, int block) const {
        if (SHARED) tma_load_ragged_multicast(buffer, map, barrier, x, first + block * BLOCK_K, end, EVERYONE);
        else tma_load_ragged(buffer, map, barrier, x, first + block * BLOCK_K, end);
    }
    template <bool ADD> __device__ __forceinline__ void store(const TensorMap* map, u32 buffer, int column, int row) const {
        row += m * BLOCK_M;
        if (FORM == 0) tma_store_ragged_evict_first(map, buffer, column, first + row, end);
        else if (ADD) tma_add(map, buffer, column, row, group);
        else tma_store_evict_first(map, buffer, column, row, group);
    }
};

// Write zeros to rows `first` to `end` of a matrix whose rows are aligned to 16 bytes; one warp of each CTA takes part.
__device__ __forceinline__ void clear(u8* c, long long stride, int columns, int first, int end, int lane) {
    const int bytes = columns * (int)sizeof(Element);
    for (int r = first + blockIdx.x; r < end; r += gridDim.x) {
        u8* row = c + r * stride;
        for (int i = lane * 16; i + 16 <= bytes; i += 32 * 16) *(int4*)(row + i) = make_int4(0, 0, 0, 0);
        for (int i = bytes / 16 * 16 + lane * 2; i < bytes; i += 32 * 2) *(u16*)(row + i) = 0;
    }
}

// `sizes` are the ends of the groups, after a 0 (FORM 0 and 2), or their counts (FORM 1); `batch` is what these values are limited to. `stride_e` and
// `stride_r` are the bytes from one matrix and row of C to the next.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS, 1)
grouped_half(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_c,
             const int* __restrict__ sizes, u8* c, long long stride_e, long long stride_r, int groups, int batch, int height, int columns, int depth) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const GroupTable table{base + OFFSET_TABLE, groups};
    const Shape shape{height, columns, depth};
    if (threadIdx.x == 0) make_barriers(base);
    cluster_arrive();
    plan_groups<THREADS, FORM != 1>(table, base + OFFSET_C, FORM == 1 ? sizes : sizes + 1, batch, [&](int rows) { return shape.pairs(rows); });
    cluster_wait();
    half_gemm(Tiles(shape, table, cluster_rank()), base, &map_a, &map_b, &map_c, [&](int lane) {
        if (FORM == 0) clear(c, stride_r, columns, table.at(groups).x, height, lane);
        if (FORM == 2 && !ACCUMULATE) {
            for (int e = 0; e < groups; ++e)
                if (table.at(e).x == table.at(e + 1).x) clear(c + e * stride_e, stride_r, columns, 0, height, lane);
        }
    });
}
