// The way back of sums between GPUs in one kernel: what this one has added up for the others' tokens is written to them, and what comes of them is
// added to the rows that its own experts have made of its own tokens.
//
// -D options: OTHERS, the other GPUs; OUT, see element.cuh, 0 or 1; PIECE, bytes; STAGES, pieces in shared memory; PIECES, the most pieces of a message.
//
// A CTA takes pieces one after the other. One thread of it has the tensor memory accelerator read them into shared memory and write them to the other
// GPU; another, which may wait for what is under way as the first may not, writes a number behind each that has got there; all others add up the pieces
// that the same CTA of the other GPUs has written, which they find in the L2. Who writes waits for nobody: so all end, whatever is resident. Copy
// engines take as long for the bytes, but then the sums of what has come fill the memory's bandwidth while the rest travels, and the last sum begins
// when all has come.

#include "element.cuh"

constexpr int SUMMERS = 512, UNROLL = 4;
typedef unsigned long long u64;

// What experts have made here: of token t the sum over j of weights[t, j] * rows[index[t, j]], or row t.
struct Made {
    const uint4* rows;
    const int* index;
    const float* weights;
    int size, choices, stride_weights;
};

__device__ __forceinline__ uint4 load(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}
// Of memory that another GPU writes while this kernel runs.
__device__ __forceinline__ uint4 load_shared_with_others(const uint4* p) {
    uint4 v;
    asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ void wait_for(const u32* flag, u32 number) {
    u32 found;
    do asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(found) : "l"(flag) : "memory");
    while ((int)(found - number) < 0);
}
__device__ __forceinline__ void tell(u32* flag, u32 number) {
    __threadfence_system();
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(number) : "memory");
}

// Two elements as floats: what is lower in memory first.
__device__ __forceinline__ float2 unpack(u32 both) {
    float2 v;
    if (OUT == 0) v = {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u)};
    else asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(v.x), "=f"(v.y) : "r"(both));
    return v;
}
__device__ __forceinline__ void add(float (&total)[8], uint4 v, float weight) {
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 both = unpack(words[i]);
        // Not fused: the bits are those of the portable sum, which leaves out what has no row in between.
        total[2 * i] = __fadd_rn(total[2 * i], __fmul_rn(both.x, weight));
        total[2 * i + 1] = __fadd_rn(total[2 * i + 1], __fmul_rn(both.y, weight));
    }
}
__device__ __forceinline__ uint4 rounded(const float (&total)[8]) {
    return {pack(total[0], total[1]), pack(total[2], total[3]), pack(total[4], total[5]), pack(total[6], total[7])};
}

// The sums of UNROLL units of 16 bytes, whose tokens are first[i] and whose places in a row column[i]; none where token is negative.
__device__ __forceinline__ void add_made(float (&total)[UNROLL][8], const Made& made, const int (&token)[UNROLL], const int (&column)[UNROLL], int units) {
    for (int j = 0; j < made.choices; ++j) {
        uint4 v[UNROLL];
        float weight[UNROLL];
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            int row = token[i];
            weight[i] = 1.f, v[i] = {0, 0, 0, 0};
            if (row >= 0 && made.index) {
                row = made.index[(u64)token[i] * made.choices + j];
                if (made.weights) weight[i] = made.weights[(u64)token[i] * made.stride_weights + j];
            }
            if (row >= 0 && row < made.size) v[i] = load(made.rows + (u64)row * units + column[i]);
            else weight[i] = 0.f;
        }
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) add(total[i], v[i], weight[i]);
    }
}

// `leaving_0` and on are the sums of `capacity` tokens of each other rank, in their order; `rows` and what follows are of this rank's `tokens`
// tokens. `peers` are the addresses of the other ranks' memory, `here` is this one's: in all of them, `slot` bytes
// behind the beginning, lies what each rank has written there, [ranks, bytes], and `flags` bytes behind it the numbers of its pieces, [ranks, PIECES].
extern "C" __global__ void __launch_bounds__(SUMMERS + 64) push_and_sum(
    const char* leaving_0, const char* leaving_1, const char* leaving_2, const uint4* rows, const int* index, const float* weights,
    const uint4* residual, uint4* out, const u64* peers, u64 here, u64 slot, u64 flags, u64 number, int size, int choices, int stride_weights,
    int tokens, int capacity, int units, int rank) {
    extern __shared__ __align__(128) unsigned char ring[];
    __shared__ __align__(8) u64 full[STAGES];
    __shared__ volatile int arrived;  // how many pieces of this CTA have got where they go
    const u64 bytes = (u64)capacity * units * 16;
    const int pieces = (int)((bytes + PIECE - 1) / PIECE), of_cta = (pieces - (int)blockIdx.x + (int)gridDim.x - 1) / (int)gridDim.x * OTHERS;
    auto rank_of = [&](int other) { return other + (other >= rank); };
    auto flag_at = [&](u64 memory, int of_rank, int piece) { return (u32*)(memory + flags) + of_rank * PIECES + piece; };
    auto piece_of = [&](int k) { return (int)blockIdx.x + k / OTHERS * (int)gridDim.x; };
    if (threadIdx.x == 0) arrived = 0;
    if (threadIdx.x == SUMMERS) {
        for (int i = 0; i < STAGES; ++i) barrier_init(smem_addr(full + i), 1);
        barrier_init_fence();
    }
    __syncthreads();

    if (threadIdx.x == SUMMERS) {  // writes
        auto begin_of = [&](int k) { return (u64)piece_of(k) * PIECE; };
        auto size_of = [&](int k) { return (u32)min((u64)PIECE, bytes - begin_of(k)); };
        auto read = [&](int k) {
            if (k >= of_cta) return;
            const int other = k % OTHERS;
            const char* leaving = other == 0 ? leaving_0 : other == 1 ? leaving_1 : leaving_2;
            barrier_expect(smem_addr(full + k % STAGES), size_of(k));
            bulk_load(smem_addr(ring) + k % STAGES * PIECE, leaving + begin_of(k), smem_addr(full + k % STAGES), size_of(k));
        };
        for (int k = 0; k < STAGES - 1; ++k) read(k);
        for (int k = 0; k < of_cta; ++k) {
            barrier_wait(smem_addr(full + k % STAGES), k / STAGES & 1);
            char* there = (char*)(peers[k % OTHERS] + slot) + rank * bytes + begin_of(k);
            bulk_store(there, smem_addr(ring) + k % STAGES * PIECE, size_of(k));
            tma_store_commit();
            tma_store_wait_read<1>();
            read(k + STAGES - 1);
            tma_store_wait<2>();
            __threadfence_block();
            arrived = k - 1;
        }
        tma_store_wait<1>();
        arrived = of_cta - 1;
        tma_store_wait<0>();
        arrived = of_cta;
    } else if (threadIdx.x == SUMMERS + 32) {  // tells
        for (int k = 0; k < of_cta; ++k) {
            while (arrived <= k) __nanosleep(100);
            tell(flag_at(peers[k % OTHERS], rank, piece_of(k)), (u32)number);
        }
    } else if (threadIdx.x < SUMMERS) {
        const Made made = {rows, index, weights, size, choices, stride_weights};
        const u64 last = (u64)tokens * units;
        for (int piece = blockIdx.x; piece < pieces; piece += gridDim.x) {
            if (threadIdx.x < OTHERS) wait_for(flag_at(here, rank_of(threadIdx.x), piece), (u32)number);
            asm volatile("bar.sync 1, %0;" ::"n"(SUMMERS) : "memory");
            const u64 end = min(last, (u64)(piece + 1) * (PIECE / 16));
            for (u64 begin = (u64)piece * (PIECE / 16) + threadIdx.x; begin < end; begin += UNROLL * SUMMERS) {
                int token[UNROLL], column[UNROLL];
#pragma unroll
                for (int i = 0; i < UNROLL; ++i) {
                    const u64 at = begin + i * SUMMERS;
                    const int row = (int)(at / units);
                    token[i] = at < end ? row : -1;
                    column[i] = (int)(at - (u64)row * units);
                }
                float total[UNROLL][8] = {};
                add_made(total, made, token, column, units);
                for (int other = 0; other < OTHERS; ++other) {
                    const uint4* came = (const uint4*)(here + slot + rank_of(other) * bytes) + begin;
                    uint4 v[UNROLL];
#pragma unroll
                    for (int i = 0; i < UNROLL; ++i)
                        if (token[i] >= 0) v[i] = load_shared_with_others(came + i * SUMMERS);
#pragma unroll
                    for (int i = 0; i < UNROLL; ++i)
                        if (token[i] >= 0) add(total[i], v[i], 1.f);
                }
#pragma unroll
                for (int i = 0; i < UNROLL; ++i) {
                    if (token[i] < 0) continue;
                    if (residual) add(total[i], load(residual + begin + i * SUMMERS), 1.f);
                    out[begin + i * SUMMERS] = rounded(total[i]);
                }
            }
        }
    }
}
