// The dense product for few rows M on sm_90a: C[M, N] = A[M, K] @ B[N, K].T, with e4m3 A in 1x128 tiles and B in 128x128 blocks, or both of them bf16
// or fp16 (HALF).
//
// The warps, the pipeline, the scales and the options are those of cuda/fp8_gemm_small.cuh. This file adds the order of the tiles.

constexpr bool ANY_ROW = false;
#include "fp8_gemm_small.cuh"

// The tiles of this CTA, at row `m` of C and column `n`. If all of A's rows fit one tile, tiles are numbered along N, and a CTA takes every
// gridDim.x-th of them. With several tiles along M, or with SPLIT > 1, there are as many CTAs, or clusters, as tiles, and each takes one. With SPLIT,
// a CTA has `count` blocks of K from block `first` on.
struct Tiles {
    int M, N, stride_sb, m, n, step, first, count;

    __device__ __forceinline__ Tiles(int M, int N, int K, int stride_sb) : M(M), N(N), stride_sb(stride_sb) {
        const int tiles_m = (M + TOKENS - 1) / TOKENS, tile = blockIdx.x / SPLIT, tile_n = tiles_m == 1 ? tile : tile / tiles_m;
        m = (tile - tile_n * tiles_m) * TOKENS;
        n = tile_n * TILE;
        step = tiles_m == 1 ? gridDim.x / SPLIT * TILE : N;
        const int rank = SPLIT > 1 ? cluster_rank() : 0, all = (K + BLOCK_K - 1) / BLOCK_K;
        first = (u32)(all * rank) / SPLIT;
        count = (u32)(all * (rank + 1)) / SPLIT - first;
    }
    __device__ __forceinline__ bool valid() const { return n < N; }
    __device__ __forceinline__ void next() { n += step; }
    __device__ __forceinline__ int row() const { return m; }
    __device__ __forceinline__ int c_row() const { return m; }
    __device__ __forceinline__ int rows() const { return M - m; }
    __device__ __forceinline__ int b_row() const { return n; }
    __device__ __forceinline__ int column() const { return n; }
    __device__ __forceinline__ const float* b_scales(const float* scales, int row) const {
        return scales + (long long)min((n + row) / 128, (N - 1) / 128) * stride_sb;
    }
    __device__ __forceinline__ int block() const { return first; }
    __device__ __forceinline__ int blocks() const { return count; }
};

// `map_a` has boxes of TOKENS rows, or of all rows if A has fewer; `map_last` has boxes of as many rows as the last tile along M has. `map_sa` and
// `sb`, the scales, are used for e4m3 only. The launch is programmatic: it waits for the preceding kernel, then lets the next one begin.
extern "C" __global__ void
#if SPLIT > 1
__cluster_dims__(SPLIT, 1, 1)
#endif
__launch_bounds__(CONSUMERS + 32)
fp8_gemm_small(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_last, const __grid_constant__ TensorMap map_b,
               const __grid_constant__ TensorMap map_sa, const float* __restrict__ sb, const void* __restrict__ bias, Element* c, int M, int N, int K,
               int stride_sb, int stride_c, int stages) {
    extern __shared__ __align__(1024) u8 smem[];
    const bool only = SPLIT > 1 || (N + TILE - 1) / TILE * ((M + TOKENS - 1) / TOKENS) <= gridDim.x;
    const Tiles tiles(M, N, K, stride_sb);
    begin_dependent();
    const Output out{c, bias, N, stride_c};
    const bool last = tiles.rows() < TOKENS;
    block_scaled_gemm_small(tiles, Memory(smem_addr(smem), stages, only), stages, last ? &map_last : &map_a, &map_b, &map_sa, sb, out,
                            last ? tiles.rows() : TOKENS);
}
