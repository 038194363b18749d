// Absorbed queries on sm_90a: [q^C W^UK, RoPE(q^R)] for each head, in one launch.
//
// A CTA has SPAN columns of the latent of one head, for TOKENS tokens. It requests all of its operands at once, up to 128 KB of weights and 32 KB of
// queries, since memory is the limit: 16.8 MB of weights with 128 heads, and with many tokens the result. Products are transposed: 64 columns of the
// latent are the rows of a product, which must have 64, and the tokens, as few as 8, its columns. So the same instruction adds the same terms in the
// same order for any number of tokens: a token's result has the same bits in any batch.
//
// Each warpgroup takes 64 columns at a time, once their weights have arrived, and overwrites these with the product, which TMA stores from there.
// Meanwhile the CTAs of a head divide the rotation of its tokens among themselves, by warps, with a pair of columns per lane.
//
// Options (-D): OUT, the dtype (0 bf16, 1 fp16); TOKENS, a multiple of 8; SPAN, a multiple of 64.

#include "element.cuh"
#include "wgmma.cuh"

constexpr int NOPE = 128, ROPE = 64, LATENT = 512;  // columns
constexpr int BOXES = SPAN / 64, SPANS = LATENT / SPAN, GROUPS = BOXES < 4 ? BOXES : 4, WARPS = 4 * GROUPS;
constexpr int BOX_BYTES = NOPE * 128, HALF_BYTES = TOKENS * 128;  // 64 columns of weights; of queries
constexpr int OFFSET_Q = BOXES * BOX_BYTES, OFFSET_BARRIERS = OFFSET_Q + 2 * HALF_BYTES;
constexpr int ROTATED = (TOKENS / SPANS + WARPS - 1) / WARPS;  // tokens that a warp rotates

static_assert(BOX_BYTES >= HALF_BYTES, "a product lies where its weights were");

extern "C" __global__ void __launch_bounds__(128 * GROUPS)
mla_decode_queries(const __grid_constant__ TensorMap map_q, const __grid_constant__ TensorMap map_w, const __grid_constant__ TensorMap map_out,
                   const u16* __restrict__ q, const float* __restrict__ cos, const float* __restrict__ sin, u16* __restrict__ out,
                   long long stride_token, long long stride_head, long long stride_cos, long long stride_sin, int tokens, int heads) {
    extern __shared__ u8 shared[];
    const u32 base = (smem_addr(shared) + 1023) & ~1023u;
    const u32 barrier_q = base + OFFSET_BARRIERS, barriers_w = barrier_q + 8;
    const int head = blockIdx.x / SPANS, span = blockIdx.x % SPANS, first = blockIdx.y * TOKENS;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;

    begin_dependent();
    if (threadIdx.x == 0) {
        for (int i = 0; i <= BOXES; ++i) barrier_init(barrier_q + i * 8, 1);
        barrier_init_fence();
        barrier_expect(barrier_q, 2 * HALF_BYTES);
        for (int i = 0; i < 2; ++i) tma_load(base + OFFSET_Q + i * HALF_BYTES, &map_q, barrier_q, i * 64, head, first);
#pragma unroll 1
        for (int i = 0; i < BOXES; ++i) {
            barrier_expect(barriers_w + i * 8, BOX_BYTES);
            tma_load(base + i * BOX_BYTES, &map_w, barriers_w + i * 8, span * SPAN + i * 64, 0, head);
        }
    }
    __syncthreads();

    u32 pairs[ROTATED];
    float c[ROTATED], s[ROTATED];
#pragma unroll
    for (int i = 0; i < ROTATED; ++i) {
        const int t = first + (i * WARPS + warp) * SPANS + span;
        if ((i * WARPS + warp) * SPANS < TOKENS && t < tokens) {
            pairs[i] = *reinterpret_cast<const u32*>(q + t * stride_token + head * stride_head + NOPE + lane * 2);
            c[i] = cos[t * stride_cos + lane];
            s[i] = sin[t * stride_sin + lane];
        }
    }
#pragma unroll
    for (int i = 0; i < ROTATED; ++i) {
        const int t = first + (i * WARPS + warp) * SPANS + span;
        if ((i * WARPS + warp) * SPANS < TOKENS && t < tokens) {
            const float even = widen(pairs[i], OUT), odd = widen(pairs[i] >> 16, OUT);
            u32* const row = reinterpret_cast<u32*>(out + ((long long)t * heads + head) * (LATENT + ROPE) + LATENT);
            row[lane] = pack(even * c[i] - odd * s[i], even * s[i] + odd * c[i]);
        }
    }

    barrier_wait(barrier_q, 0);
#pragma unroll 1
    for (int box = group; box < BOXES; box += GROUPS) {
        const u32 weights = base + box * BOX_BYTES;
        barrier_wait(barriers_w + box * 8, 0);
        float d[TOKENS / 2];
        const u64 a = operand_mn_major(weights, BOX_BYTES), b = operand_k_major(base + OFFSET_Q);
        wgmma_begin();
#pragma unroll
        for (int k = 0; k < NOPE / 16; ++k) multiply_half<OUT == 1, 1, 0>(d, a + k * 128, b + (k / 4 * HALF_BYTES >> 4) + k % 4 * 2, k > 0);
        wgmma_commit();
        wgmma_wait<0>();
        registers_fence(d);
        named_sync<128>(1 + group);  // the whole warpgroup has read the weights

        // Two matrices of 8 tokens, 8 columns of the latent each: lane i points to the destination of token i % 8's row. Rows of 128 bytes, swizzled.
        const int row = lane / 16 * 8 + lane % 8, chunk = warp % 4 * 2 + lane / 8 % 2;
        const u32 to = weights + row * 128 + ((chunk ^ lane % 8) * 16);
#pragma unroll
        for (int j = 0; j + 1 < TOKENS / 8; j += 2)
            smem_store_transposed(to + j * 1024, pack(d[4 * j], d[4 * j + 1]), pack(d[4 * j + 2], d[4 * j + 3]), pack(d[4 * j + 4], d[4 * j + 5]),
                                  pack(d[4 * j + 6], d[4 * j + 7]));
        proxy_fence();
        named_sync<128>(1 + group);
        if (warp % 4 == 0 && elect_one()) {
            tma_store(&map_out, weights, span * SPAN + box * 64, head, first);
            tma_store_commit();
        }
    }
    tma_store_wait_read<0>();
}
