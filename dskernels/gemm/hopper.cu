// The dense block-scaled product on sm_90a: C[M, N] = A[M, K] @ B[N, K].T, with e4m3 A in 1x128 tiles and B in 128x128 blocks or 1x128 tiles.
//
// The warps, the pipeline, the scales and the options are those of cuda/fp8_gemm.cuh. This file adds the order of the tiles. The grid is as many
// clusters as the GPU holds at once, or fewer if there are fewer tiles; cluster i computes the clusters' tiles i, i + grid, i + 2 * grid, ... in the
// order of `Place`.

constexpr bool ANY_ROW = false;
#include "fp8_gemm.cuh"

// The tiles of this CTA. `index` is the number of its cluster's current tiles; `m` and `n` are the position of its own tile, counted in tiles.
struct Tiles {
    int M, N, K, stride_sb, index, step, count, tall, wide, m, n;
    u32 rank;

    __device__ __forceinline__ Tiles(int M, int N, int K, int stride_sb, u32 rank) : M(M), N(N), K(K), stride_sb(stride_sb), rank(rank) {
        tall = (M + CLUSTER_M - 1) / CLUSTER_M;
        wide = (N + CLUSTER_N - 1) / CLUSTER_N;
        count = tall * wide;
        index = blockIdx.x / CLUSTER;
        step = gridDim.x / CLUSTER;
        locate();
    }
    __device__ __forceinline__ void locate() {
        const Place place(index, tall, wide, rank);
        m = place.m;
        n = place.n;
    }
    __device__ __forceinline__ bool valid() const { return index < count; }
    __device__ __forceinline__ void next() {
        index += step;
        locate();
    }
    __device__ __forceinline__ int row() const { return m * BLOCK_M; }
    __device__ __forceinline__ int column() const { return n * BLOCK_N; }
    __device__ __forceinline__ int b_row() const { return column(); }
    __device__ __forceinline__ const float* b_scales(const float* scales, int strip) const {
        return scales + (long long)min((column() + strip * STRIP_N) / 128, (N - 1) / 128) * stride_sb;
    }
    __device__ __forceinline__ int block() const { return 0; }
    __device__ __forceinline__ int blocks() const { return (K + BLOCK_K - 1) / BLOCK_K; }
    __device__ __forceinline__ int rows() const { return M - row(); }
    template <bool ADD> __device__ __forceinline__ void store(const TensorMap* map, u32 buffer, int column, int row) const {
        if (ADD) tma_add(map, buffer, column, this->row() + row);
        else tma_store_evict_first(map, buffer, column, this->row() + row);
    }
    __device__ __forceinline__ void spare_warp(const Output&, int) const {}
};

// `map_a` has boxes of BLOCK_M rows, `map_last` boxes of as many rows as the last tile along M has. `map_sa` and, with B_ROWS 1, `map_sb` are for
// scales; with B_ROWS 128, the scales of B are read from `sb`, in which `stride_sb` is the distance of rows. With DIRECT, C is written at `c`,
// otherwise through `map_c`.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, 1)
fp8_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_last, const __grid_constant__ TensorMap map_b,
         const __grid_constant__ TensorMap map_sa, const __grid_constant__ TensorMap map_sb, const __grid_constant__ TensorMap map_c,
         const float* __restrict__ sb, const void* __restrict__ bias, Element* c, int M, int N, int K, int stride_sb, int stride_c) {
    extern __shared__ __align__(1024) u8 smem[];
    const Tiles tiles(M, N, K, stride_sb, CLUSTER > 1 ? cluster_rank() : 0);
    const Output out{&map_c, c, bias, N, stride_c};
    block_scaled_gemm(tiles, smem_addr(smem), &map_a, &map_b, &map_sa, &map_sb, sb, out, B_ROWS == 1 ? nullptr : &map_last);
}
