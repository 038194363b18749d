// The lower level of the decode kernel over e4m3 rows (mla/decode/hopper_rows.cu, which explains the options): addresses in shared memory, the
// products, and how queries, keys and values become operands.
#pragma once

#include "mla_work.cuh"
#include "wgmma.cuh"

// Scales are relative to a power of 2, such that the largest so far is 2^4 to 2^5; one above MOST scales the sums to a new maximum. So the products
// of scales and weights, which are up to 2^SLACK, are in fp16's range, and as exact as it allows if they are small.
constexpr float MOST = 128.f;
constexpr float NEXT_TO_NOTHING = 0x1p126f;  // inverse of the largest scale before there is one

constexpr int R = WIDTH / 2;                // registers of a 64 x WIDTH product
constexpr int STEP = 4;                     // products that are started together, while the operands of the next four are prepared
constexpr int ALL = 1;                      // named barrier of the two warpgroups that multiply

// ---- shared memory -------------------------------------------------------------------------------------------------

constexpr int SCALES = VALUE, ROPE_PART = SCALES + VALUE / 128 * 4, ROW_BYTES = ROPE_PART + ROPE * 2;
constexpr int UNIT = 16, UNIT_BYTES = UNIT * ROW_BYTES, UNITS_OF_BLOCK = BLOCK / UNIT;
constexpr int STRIP = WIDTH * 128;     // 64 columns of the queries, or weights of a block's 64 positions, for each query row
constexpr int TOP = (WIDTH + 4) * 4;   // a maximum for each query row, and for the scales of each 128 columns
constexpr int AT_Q = (UNITS * UNIT_BYTES + 1023) / 1024 * 1024, AT_WEIGHTS = AT_Q + (VALUE + ROPE) / 64 * STRIP;
constexpr int AT_FACTORS = AT_WEIGHTS + 2 * 4 * STRIP, AT_STATE = AT_FACTORS + WIDTH * 4;
constexpr int AT_TOPS = AT_STATE + TOP, AT_TOTALS = AT_TOPS;  // for each warp; the sums of its weights are here at the end
constexpr int AT_PIECES = AT_TOPS + 8 * TOP, AT_BARRIERS = AT_PIECES + 2 * 32;

__device__ __forceinline__ u32 unit_full(u32 base, int unit) { return base + AT_BARRIERS + unit * 8; }
__device__ __forceinline__ u32 unit_empty(u32 base, int unit) { return base + AT_BARRIERS + (UNITS + unit) * 8; }
__device__ __forceinline__ u32 piece_full(u32 base) { return base + AT_BARRIERS + 2 * UNITS * 8; }
__device__ __forceinline__ u32 piece_empty(u32 base) { return base + AT_BARRIERS + (2 * UNITS + 1) * 8; }

// The n-th unit of a CTA's work.
struct Unit {
    u32 at, full, empty, phase;
    __device__ __forceinline__ Unit(u32 base, u32 n) {
        const u32 index = n % UNITS;
        at = base + index * UNIT_BYTES, full = unit_full(base, index), empty = unit_empty(base, index), phase = n / UNITS & 1;
    }
};

// The row of a unit that is row g of a product, for g below 8; row g + 8 is the next one. This avoids bank conflicts both where a warp reads 16 bytes
// of columns of 8 rows and where it reads 4 of columns of 4 rows: rows are 16 bytes apart from a multiple of 128.
__device__ __forceinline__ int place_of(int g) { return g % 2 ? g + 3 : g + (g >= 4 ? 8 : 0); }

// ---- instructions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint4 smem_words4(u32 addr) {
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(addr) : "memory");
    return x;
}
__device__ __forceinline__ u32 smem_word(u32 addr) {
    u32 x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(addr) : "memory");
    return x;
}
__device__ __forceinline__ void smem_store_word(u32 addr, u32 x) { asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(x) : "memory"); }
// Four e4m3 numbers, the first two and the last two, as fp16.
__device__ __forceinline__ void to_half(u32& first, u32& last, u32 four) {
    asm("{.reg .b16 a, b; mov.b32 {a, b}, %2; cvt.rn.f16x2.e4m3x2 %0, a; cvt.rn.f16x2.e4m3x2 %1, b;}" : "=r"(first), "=r"(last) : "r"(four));
}
__device__ __forceinline__ u32 pack_half(float low, float high) {
    u32 both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
// Whether the condition holds in any thread of the two warpgroups; all of them take part.
__device__ __forceinline__ bool any_of_all(bool x) {
    u32 y;
    asm volatile("{.reg .pred p, q; setp.ne.b32 p, %2, 0; barrier.cta.red.or.aligned.pred q, %1, 256, p; selp.u32 %0, 1, 0, q;}"
                 : "=r"(y)
                 : "n"(ALL), "r"((u32)x)
                 : "memory");
    return y;
}
// 64 x WIDTH sums: 64 x 16 from registers times 16 x WIDTH from shared memory, fp16 or (KIND 0) bf16.
#define PRODUCT(TYPE, COLUMNS, R, A0, A1, A2, A3, B, KEEP)                                                                       \
    asm volatile("{.reg .pred p; setp.ne.b32 p, %" #KEEP ", 0;\n"                                                                \
                 "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k16.f32." TYPE "." TYPE " {" REGISTERS_##R "}, {%" #A0 ", %" #A1   \
                 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 0;}\n"                                                                 \
                 : SUMS_##R(0)                                                                                                   \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep))
#define DEFINE_PRODUCT(COLUMNS, R, ...)                                                                                          \
    template <int KIND> __device__ __forceinline__ void multiply_rows(float (&d)[R], const u32* a, u64 b, int keep) {            \
        if (KIND == 0) PRODUCT("bf16", COLUMNS, R, __VA_ARGS__);                                                                 \
        else PRODUCT("f16", COLUMNS, R, __VA_ARGS__);                                                                            \
    }
DEFINE_PRODUCT(16, 8, 8, 9, 10, 11, 12, 13)
DEFINE_PRODUCT(32, 16, 16, 17, 18, 19, 20, 21)

// ---- queries -------------------------------------------------------------------------------------------------------

// A lane's part of a row of the queries: 16 columns, and in the first 8 lanes 8 of the rope part.
struct Query {
    u32 words[12];
    __device__ __forceinline__ void load(const Element* row, bool valid, int lane) {
        auto put = [&](int i, const Element* from, bool reads) {
            const uint4 x = reads ? __ldg((const uint4*)from) : make_uint4(0, 0, 0, 0);
            words[i] = x.x, words[i + 1] = x.y, words[i + 2] = x.z, words[i + 3] = x.w;
        };
        put(0, row + lane * 16, valid);
        put(4, row + lane * 16 + 8, valid);
        put(8, row + VALUE + lane * 8, valid && lane < 8);
    }
    // In the order of the keys' fragments: fp16 (the rope part unchanged), times a power of two that makes the largest at least 2^14; its inverse
    // times `scale` is kept.
    __device__ __forceinline__ void store(u32 base, int row, int lane, float scale) const {
        auto low = [&](int i) { return widen((u16)words[i], OUT); };
        auto high = [&](int i) { return widen((u16)(words[i] >> 16), OUT); };
        float largest = 0.f;
#pragma unroll
        for (int i = 0; i < 12; ++i) largest = fmaxf(largest, fmaxf(fabsf(low(i)), fabsf(high(i))));
#pragma unroll
        for (int d = 1; d < 32; d *= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, d));
        const int exponent = min(max((int)(__float_as_uint(largest) >> 23), 15), 240);
        const float up = __uint_as_float((254 + 14 - exponent) << 23);
        const u32 at = base + AT_Q + row * 128 + lane % 4 * 4;
#pragma unroll
        for (int i = 0; i < 8; ++i) smem_store_word(at + lane / 4 * STRIP + (i ^ row % 8) * 16, pack_half(low(i) * up, high(i) * up));
        if (lane < 8) {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                smem_store_word(at + VALUE / 64 * STRIP + ((lane / 4 * 4 + i) ^ row % 8) * 16, pack(low(8 + i) * up, high(8 + i) * up));
        }
        if (lane == 0) smem_store(base + AT_FACTORS + row * 4, scale * __uint_as_float((exponent - 14) << 23));
    }
};

// ---- fragments -----------------------------------------------------------------------------------------------------

// For 16 columns of the keys: 4 bytes of a thread's row g, and of its row g + 8.
__device__ __forceinline__ void latent_keys(u32* a, u32 x, u32 y) {
    to_half(a[0], a[2], x);
    to_half(a[1], a[3], y);
}
// For 32 columns of the rope part.
__device__ __forceinline__ void rope_keys(u32* a, u32 at) {
    auto part = [](u32 two) { return OUT == 0 ? two : pack(widen((u16)two, 0), widen((u16)(two >> 16), 0)); };
    const uint4 x = smem_words4(at), y = smem_words4(at + ROW_BYTES);
    a[0] = part(x.x), a[2] = part(x.y), a[4] = part(x.z), a[6] = part(x.w);
    a[1] = part(y.x), a[3] = part(y.y), a[5] = part(y.z), a[7] = part(y.w);
}
// For 16 positions and 128 columns of the values, of which a warp has 32 and a thread 4: two products.
struct Values {
    u32 word[4];
    __device__ __forceinline__ void load(u32 even, u32 odd) {
        word[0] = smem_word(even), word[1] = smem_word(odd);
        word[2] = smem_word(even + ROW_BYTES), word[3] = smem_word(odd + ROW_BYTES);
    }
    // Columns become rows: bytes of one column and two adjacent positions.
    __device__ __forceinline__ void unpack(u32* a) const {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            to_half(a[2 * h], a[2 * h + 1], __byte_perm(word[2 * h], word[2 * h + 1], 0x5140));
            to_half(a[4 + 2 * h], a[5 + 2 * h], __byte_perm(word[2 * h], word[2 * h + 1], 0x7362));
        }
    }
};

// ---- the queries of a batch ----------------------------------------------------------------------------------------

struct Queries {
    const Element* data;
    long long stride_request, stride_row;
    int rows;  // of a request
    float scale;
    // The queries of a piece, loaded by 8 warps. Up to four rows at a time, since each time waits for memory.
    __device__ __forceinline__ void prepare(u32 base, int request, int row_block, int warp, int lane) const {
        constexpr int ROWS = WIDTH == 16 ? 2 : 4;
#pragma unroll 1
        for (int r = warp; r < WIDTH; r += 8 * ROWS) {
            Query query[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const int row = row_block * BLOCK + r + i * 8;
                query[i].load(data + request * stride_request + row * stride_row, row < rows, lane);
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i) query[i].store(base, r + i * 8, lane, scale);
        }
        proxy_fence();
    }
};
