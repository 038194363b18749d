// Grouped products of bf16 and fp16 on sm_90a, one per group over a ragged batch whose group sizes only the device knows. The core, with its
// options, is in cuda/half_gemm.cuh; here is the order of the tiles, and what of C has no tile.
//
// Further options (-D):
//   FORM   0 C[r] = B[e] @ A[r] for row r of group e, A [1, T, K], B [E, N, K]; rows of no group become zero, of the first `height`
//          1 C[e, m] = B[e] @ A[e, m] for m below the group's count, A [E, M, K]
//          2 C[e] = A[rows of e].T @ B[rows of e], A [T, M], B [T, N], C [E, M, N]; of a group without rows, zero, or untouched
//   GROUP  pairs of tiles, one below the other, that are walked before the next columns

#include "groups.cuh"
#include "half_gemm.cuh"

// What the tiles follow from: C is `height` x `columns` for each group with FORM 2, else `columns` wide; `depth` is K.
struct Shape {
    int height, columns, depth;
    __device__ __forceinline__ int wide() const { return (columns + BLOCK_N - 1) / BLOCK_N; }
    __device__ __forceinline__ int tall(int rows) const { return ((FORM == 2 ? height : rows) + BLOCK_M - 1) / BLOCK_M; }
    // Pairs of tiles of a group of so many rows: one below the other, and of a last, odd row of tiles side by side.
    __device__ __forceinline__ int pairs(int rows) const {
        if (rows == 0) return 0;
        return tall(rows) / 2 * wide() + tall(rows) % 2 * ((wide() + 1) / 2);
    }
};

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
    // Clusters walk GROUP pairs down, then one column of tiles on: what is computed at one time covers about as many rows as columns, which
    // is the least to read.
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
        if (n >= shape.wide()) return 0;  // the second of a pair side by side, of an odd number of columns
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
    // Rows of other groups count as zero, whatever they hold.
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

// A warp's work, one of as many as there are CTAs: zeros to rows `first` to `end` of a matrix, whose rows begin at multiples of 16 bytes.
__device__ __forceinline__ void clear(u8* c, long long stride, int columns, int first, int end, int lane) {
    const int bytes = columns * (int)sizeof(Element);
    for (int r = first + blockIdx.x; r < end; r += gridDim.x) {
        u8* row = c + r * stride;
        for (int i = lane * 16; i + 16 <= bytes; i += 32 * 16) *(int4*)(row + i) = make_int4(0, 0, 0, 0);
        for (int i = bytes / 16 * 16 + lane * 2; i < bytes; i += 32 * 2) *(u16*)(row + i) = 0;
    }
}

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
