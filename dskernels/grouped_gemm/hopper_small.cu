// The grouped block-scaled e4m3 product on sm_90a for groups of few rows: C[m] = A[m, K] @ B[e, N, K].T for each row m of group e, with A in 1x128
// tiles and B in 128x128 blocks. Only the device knows the sizes of the groups.
//
// The warps, the pipeline, the scales and most options are those of cuda/fp8_gemm_small.cuh. This file adds the groups and the order of the tiles:
// first, all threads of a CTA fill a table in shared memory that says where each group and its tiles begin (cuda/groups.cuh). After that, the loading
// thread and the multiplying threads each step through the CTA's tiles and find the group of each in the table.
//
// Further option (-D):
//   MASKED  0: groups follow each other in M rows; group e ends at row sizes[e + 1], and rows of C that belong to no group become zero
//           1: group e has the first sizes[e] of rows e * M to (e + 1) * M of A and C

constexpr bool ANY_ROW = true;
#include "fp8_gemm_small.cuh"
#include "groups.cuh"

// The tiles of this CTA: every gridDim.x-th of all tiles. These are ordered by group, then along N, and then along the rows of the group, so that
// tiles with the same rows of B load them at about the same time.
struct Tiles {
    GroupTable table;
    int M, N, stride_sb, highest, all_blocks, all_tiles, tile, m = 0, left = 0, n = 0, group = 0;
    long long stride_sb_group;

    __device__ __forceinline__ Tiles(GroupTable table, int M, int N, int K, long long stride_sb_group, int stride_sb)
        : table(table), M(M), N(N), stride_sb(stride_sb), highest(table.groups > 1 ? 1 << (31 - __clz(table.groups - 1)) : 0),
          all_blocks((K + BLOCK_K - 1) / BLOCK_K), all_tiles(table.tiles()), tile(blockIdx.x), stride_sb_group(stride_sb_group) {
        locate();
    }
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        group = 0;  // becomes the last group that begins at or before this tile; an empty group begins where the next one does, which is then taken
        for (int step = highest; step; step /= 2)
            if (group + step < table.groups && table.at(group + step).y <= tile) group += step;
        const int2 begin = table.at(group), end = table.at(group + 1);
        const int first = MASKED ? group * M : begin.x, rows = MASKED ? end.x : end.x - begin.x;
        const int tall = (rows + TOKENS - 1) / TOKENS, inside = tile - begin.y, down = inside % tall * TOKENS;
        m = first + down;
        left = rows - down;
        n = inside / tall * TILE;
    }
    __device__ __forceinline__ bool valid() const { return tile < all_tiles; }
    __device__ __forceinline__ void next() {
        tile += gridDim.x;
        locate();
    }
    __device__ __forceinline__ int row() const { return m; }
    __device__ __forceinline__ int c_row() const { return m; }
    __device__ __forceinline__ int rows() const { return left; }
    __device__ __forceinline__ int b_row() const { return group * N + n; }
    __device__ __forceinline__ int column() const { return n; }
    __device__ __forceinline__ const float* b_scales(const float* scales, int row) const {
        return scales + group * stride_sb_group + (long long)min((n + row) / 128, (N - 1) / 128) * stride_sb;
    }
    __device__ __forceinline__ int block() const { return 0; }
    __device__ __forceinline__ int blocks() const { return all_blocks; }
};

// Write zeros to rows `first` to `end` of C; all CTAs take part.
__device__ __forceinline__ void clear(const Output& out, int first, int end) {
    const bool aligned = (((u64)out.c | (u64)out.stride * sizeof(Element)) & 15) == 0;
    const int vectors = aligned ? out.columns / VECTOR : 0;
    for (int row = first + blockIdx.x; row < end; row += gridDim.x) {
        Element* c = out.c + (long long)row * out.stride;
        for (int i = threadIdx.x; i < vectors; i += blockDim.x) ((uint4*)c)[i] = make_uint4(0, 0, 0, 0);
        for (int i = vectors * VECTOR + threadIdx.x; i < out.columns; i += blockDim.x) c[i] = 0;
    }
}

// `M` is the number of rows of A or, with MASKED, of each group's buffer. `stride_sb_group` and `stride_sb` are the strides of B's scales from one
// group, and from one row of blocks, to the next.
extern "C" __global__ void __launch_bounds__(CONSUMERS + 32)
grouped_gemm_small(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
                   const float* __restrict__ sb, const int* __restrict__ sizes, Element* c, int groups, int M, int N, int K,
                   long long stride_sb_group, int stride_sb, int stride_c, int stages) {
    extern __shared__ __align__(1024) u8 smem[];
    const Memory memory(smem_addr(smem), stages, false);
    const GroupTable table{memory.end, groups};
    const int tiles_n = (N + TILE - 1) / TILE;
    plan_groups<CONSUMERS + 32, !MASKED>(table, memory.end + GroupTable::bytes(groups), MASKED ? sizes : sizes + 1, M,
                                         [&](int rows) { return (rows + TOKENS - 1) / TOKENS * tiles_n; });
    const Tiles tiles(table, M, N, K, stride_sb_group, stride_sb);
    const Output out{c, nullptr, N, stride_c};
    block_scaled_gemm_small(tiles, memory, stages, &map_a, &map_b, &map_sa, sb, out);
    if (!MASKED) clear(out, table.at(groups).x, M);
}
