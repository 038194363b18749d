// The first product of the expert block for a few tokens (at most TOKENS), on sm_90a: C = A @ B[e].T of all tokens, for every expert e that at least
// one of them chose, and for the shared experts. The tensor cores take at least 8 tokens, so multiplying the tokens that did not choose an expert too
// costs nothing but writing their rows; in return no token has to be sorted or copied. C has `tokens` rows for each expert, in the order in which
// `Chosen` lists the experts. The core and its options are in cuda/fp8_gemm_small.cuh.

constexpr bool ANY_ROW = false;
#include "fp8_gemm_small.cuh"
#include "few_experts.cuh"

// The tiles of this CTA: every gridDim.x-th of all tiles, which are ordered by expert, and for each expert along N.
struct Tiles {
    Chosen chosen;
    int tokens, N, stride_sb, all_blocks, tiles_n, count, tile, place = 0, n = 0, expert = 0;
    long long stride_sb_expert;

    __device__ __forceinline__ Tiles(Chosen chosen, int tokens, int N, int K, long long stride_sb_expert, int stride_sb)
        : chosen(chosen), tokens(tokens), N(N), stride_sb(stride_sb), all_blocks((K + BLOCK_K - 1) / BLOCK_K), tiles_n((N + TILE - 1) / TILE),
          count(chosen.count() * tiles_n), tile(blockIdx.x), stride_sb_expert(stride_sb_expert) {
        locate();
    }
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        place = tile / tiles_n;
        n = (tile - place * tiles_n) * TILE;
        expert = chosen.expert(place);
    }
    __device__ __forceinline__ bool valid() const { return tile < count; }
    __device__ __forceinline__ void next() {
        tile += gridDim.x;
        locate();
    }
    __device__ __forceinline__ int row() const { return 0; }
    __device__ __forceinline__ int c_row() const { return place * tokens; }
    __device__ __forceinline__ int rows() const { return tokens; }
    __device__ __forceinline__ int b_row() const { return expert * N + n; }
    __device__ __forceinline__ int column() const { return n; }
    __device__ __forceinline__ const float* b_scales(const float* scales, int row) const {
        return scales + expert * stride_sb_expert + (long long)min((n + row) / 128, (N - 1) / 128) * stride_sb;
    }
    __device__ __forceinline__ int block() const { return 0; }
    __device__ __forceinline__ int blocks() const { return all_blocks; }
};

// `ids` are the choices of all tokens, `choices` of them altogether. B has `routed` experts, of which those that were chosen run, and after them
// `shared` ones, which all run.
extern "C" __global__ void __launch_bounds__(CONSUMERS + 32)
few_experts_up(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
               const float* __restrict__ sb, const int* ids, Element* c, int tokens, int choices, int routed, int shared, int N, int K,
               long long stride_sb_expert, int stride_sb, int stages) {
    extern __shared__ __align__(1024) u8 smem[];
    const Memory memory(smem_addr(smem), stages, false);
    const Chosen chosen{memory.end};
    chosen.clear();
    __syncthreads();
    // The launch is programmatic: the preceding kernel may still run until here, and may have yet to write what is read below.
    begin_dependent();
    for (int i = threadIdx.x; i < choices; i += blockDim.x) chosen.add(load_fresh(ids + i), routed);
    chosen.list(routed, shared);
    const Tiles tiles(chosen, tokens, N, K, stride_sb_expert, stride_sb);
    block_scaled_gemm_small(tiles, memory, stages, &map_a, &map_b, &map_sa, sb, Output{c, nullptr, N, N});
}
