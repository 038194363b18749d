// C[m] = A[m, K] @ B[e, N, K].T for the rows m of each group e, where they are few; e4m3 A in 1x128 tiles and B in 128x128 blocks, on sm_90a. The
// core, with its options, is in cuda/fp8_gemm_small.cuh; here are the groups, whose sizes only the device knows, and the order of the tiles.
//
// One more option (-D): MASKED 1: group e has rows e * M to (e + 1) * M of A and C, of which the first sizes[e] count. MASKED 0: groups follow each
// other in M rows, sizes[e + 1] is where group e ends, and rows of C that belong to none become zero.

constexpr bool ANY_ROW = true;
#include "fp8_gemm_small.cuh"
#include "groups.cuh"

// The tiles of this CTA, every gridDim.x-th: they go group by group, in a group along N, and there along its rows, so that who needs the same
// rows of B asks for them at about the same time.
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
        group = 0;  // the last that has no more tiles in front of it: empty ones have as many as the next
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

// All CTAs' work: zeros in rows `first` to `end` of C.
__device__ __forceinline__ void clear(const Output& out, int first, int end) {
    const bool aligned = (((u64)out.c | (u64)out.stride * sizeof(Element)) & 15) == 0;
    const int vectors = aligned ? out.columns / VECTOR : 0;
    for (int row = first + blockIdx.x; row < end; row += gridDim.x) {
        Element* c = out.c + (long long)row * out.stride;
        for (int i = threadIdx.x; i < vectors; i += blockDim.x) ((uint4*)c)[i] = make_uint4(0, 0, 0, 0);
        for (int i = vectors * VECTOR + threadIdx.x; i < out.columns; i += blockDim.x) c[i] = 0;
    }
}

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
