// Each GPU adds up the rows that its experts have made of the others' tokens, writes the sums into their memory, and adds
// up those of its own tokens with what the others write here: all of a combine in one kernel.
//
// -D options: OTHERS, the other GPUs; OUT, see element.cuh, 0 or 1; ROWS, the tokens of a piece; PIECES, the most pieces.
//
// A CTA takes pieces, so many tokens, one after the other: those of the others' tokens it writes to them, with a number
// behind each piece; those of its own tokens it takes LAG pieces later, when the same CTA of the other GPUs has written
// as much, and finds them in the L2. It waits for that CTA alone, which waits for none before it has written that piece:
// so all end, whatever is resident. Copy engines take as long for the bytes, but then sums of what has come fill the
// memory's bandwidth while the rest travels, and the last one begins when all has come.

#include "element.cuh"

constexpr int THREADS_OF_CTA = 256, UNROLL = 4, LAG = 2;
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

// Of each rank there are `capacity` tokens, those of rank r from r * capacity on, of this one `tokens`. `peers` are the addresses of the other ranks'
// memory, in their order, `here` is this one's. In all of them, `slot` bytes behind the beginning, lie the sums that each rank has written for whose
// memory it is, [ranks, capacity, units of 16 bytes], and `flags` bytes behind it the numbers of their pieces, [ranks, PIECES].
extern "C" __global__ void __launch_bounds__(THREADS_OF_CTA) push_and_sum(
    const uint4* rows, const int* index, const float* weights, const uint4* residual, uint4* out, const u64* peers, u64 here, u64 slot, u64 flags,
    u64 number, int size, int choices, int stride_weights, int tokens, int capacity, int units, int rank) {
    const Made made = {rows, index, weights, size, choices, stride_weights};
    const int pieces = (capacity + ROWS - 1) / ROWS, of_piece = ROWS * units, grid = gridDim.x;
    auto rank_of = [&](int other) { return other + (other >= rank); };
    auto sums_at = [&](u64 memory, int of_rank) { return (uint4*)(memory + slot) + (u64)of_rank * capacity * units; };
    auto flag_at = [&](u64 memory, int of_rank, int piece) { return (u32*)(memory + flags) + of_rank * PIECES + piece; };
    int token[UNROLL], column[UNROLL];
    // Which token and unit each place of a piece is; -1 behind its end.
    auto take = [&](int piece, int begin, int first, int end) {
#pragma unroll
        for (int i = 0; i < UNROLL; ++i) {
            const int place = begin + i * THREADS_OF_CTA + threadIdx.x, row = place / units;
            column[i] = place - row * units;
            token[i] = place < of_piece && piece * ROWS + row < end ? first + piece * ROWS + row : -1;
        }
    };
    for (int piece = blockIdx.x, mine = piece - LAG * grid; mine < pieces; piece += grid, mine += grid) {
        if (piece < pieces) {
#pragma unroll
            for (int other = 0; other < OTHERS; ++other) {
                const int first = rank_of(other) * capacity;
                uint4* const there = sums_at(peers[other], rank);
                for (int begin = 0; begin < of_piece; begin += UNROLL * THREADS_OF_CTA) {
                    take(piece, begin, first, capacity);
                    float total[UNROLL][8] = {};
                    add_made(total, made, token, column, units);
#pragma unroll
                    for (int i = 0; i < UNROLL; ++i)
                        if (token[i] >= 0) there[(u64)(token[i] - first) * units + column[i]] = rounded(total[i]);
                }
            }
            __syncthreads();
            if (threadIdx.x < OTHERS) tell(flag_at(peers[threadIdx.x], rank, piece), (u32)number);
        }
        if (mine >= 0) {
            if (threadIdx.x < OTHERS) wait_for(flag_at(here, rank_of(threadIdx.x), mine), (u32)number);
            __syncthreads();
            for (int begin = 0; begin < of_piece; begin += UNROLL * THREADS_OF_CTA) {
                take(mine, begin, rank * capacity, tokens);
                float total[UNROLL][8] = {};
                add_made(total, made, token, column, units);
#pragma unroll
                for (int i = 0; i < UNROLL; ++i) {
                    if (token[i] < 0) continue;
                    const u64 at = (u64)(token[i] - rank * capacity) * units + column[i];
                    for (int other = 0; other < OTHERS; ++other) add(total[i], load_shared_with_others(sums_at(here, rank_of(other)) + at), 1.f);
                    if (residual) add(total[i], load(residual + at), 1.f);
                    out[at] = rounded(total[i]);
                }
            }
        }
    }
}
