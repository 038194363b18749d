// Hopper's instructions as the CUDA C++ kernels of warpgroups use them, on the CPU: every thread of a block is a fiber, and the wrappers of
// cuda/*.cuh that are spelt in PTX are done here in C++ instead (see test_mla_decode_emulated.py). Copies and products are done at once, where
// they are started. Faults, which end the process: a barrier that gets more arrivals than it counts, a deadlock, an address that is not aligned or
// not in shared memory.
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
template <class To, class From> To bits(From x) {
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline float __int_as_float(u32 x) { return bits<float>(x); }
template <class T> T __ldg(const T* p) { return *p; }

// ---- a block of fibers ---------------------------------------------------------------------------------------------

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    int index;
    bool done;
};
static std::vector<Fiber> fibers;
static Fiber* current;
static ucontext_t scheduler;
static std::function<void()> body;
static long progress;
struct Index { int x; };
static Index blockIdx, gridDim;
struct Thread { struct { operator int() const { return current->index; } } x; };
#define threadIdx (Thread())

inline void fault(const char* what) {
    fprintf(stderr, "block %d, thread %d: %s\n", blockIdx.x, current->index, what);
    _Exit(3);
}
inline void yield() { swapcontext(&current->context, &scheduler); }
inline int lane() { return current->index % 32; }
inline int warp() { return current->index / 32; }

// A count of arrivals that begins anew when it is full, as named barriers and warps have it.
struct Meeting {
    int arrived = 0;
    long round = 0;
    void arrive(int count, bool wait) {
        const long now = round;
        if (++arrived == count) arrived = 0, ++round, ++progress;
        else if (wait) while (round == now) yield();
    }
};
static Meeting named[16], warps[32];
template <int THREADS> void named_sync(int id) { named[id].arrive(THREADS, true); }
template <int THREADS> void named_arrive(int id) { named[id].arrive(THREADS, false); }
inline void __syncthreads() { named[0].arrive(fibers.size(), true); }
inline void __syncwarp() {}

static u64 exchanged[32][32];
template <class T> std::vector<T> of_warp(T mine) {
    memcpy(&exchanged[warp()][lane()], &mine, sizeof mine);
    warps[warp()].arrive(32, true);
    std::vector<T> all(32);
    for (int i = 0; i < 32; ++i) memcpy(&all[i], &exchanged[warp()][i], sizeof mine);
    warps[warp()].arrive(32, true);
    return all;
}
template <class T> T __shfl_sync(u32, T x, int from) { return of_warp(x)[from % 32]; }
template <class T> T __shfl_xor_sync(u32, T x, int mask) { return of_warp(x)[lane() ^ mask]; }
template <class T> T __shfl_up_sync(u32, T x, int by) { return of_warp(x)[lane() < by ? lane() : lane() - by]; }
inline int __reduce_max_sync(u32, int x) {
    for (int y : of_warp(x)) x = max(x, y);
    return x;
}
inline bool __any_sync(u32, bool x) { return __reduce_max_sync(0, x); }
inline bool elect_one() { return lane() == 0; }

// ---- shared memory -------------------------------------------------------------------------------------------------

constexpr u32 FIRST_ADDRESS = 1024, SHARED_BYTES = 232448;
static u8 memory[FIRST_ADDRESS + SHARED_BYTES];
template <class T> T& shared(u32 addr) {
    if (addr < FIRST_ADDRESS || addr + sizeof(T) > sizeof memory) fault("not an address of shared memory");
    if (addr % sizeof(T)) fault("not aligned");
    return *(T*)(memory + addr);
}
inline u32 smem_addr(const void*) { return FIRST_ADDRESS; }
inline float smem_load(u32 addr) { return shared<float>(addr); }
inline void smem_store(u32 addr, float x) { shared<float>(addr) = x; }
inline void smem_store16(u32 addr, u32 a, u32 b, u32 c, u32 d) { shared<uint4>(addr) = {a, b, c, d}; }
inline void smem_store_matrix(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    const auto rows = of_warp(addr);
    const u32 words[4] = {a, b, c, d};
    for (int i = 0; i < 4; ++i) shared<u32>(rows[i * 8 + lane() / 4] + lane() % 4 * 4) = words[i];
}
// Where the 128-byte swizzle puts an address.
inline u32 swizzled(u32 addr) { return addr ^ (addr >> 7 & 7) << 4; }

// ---- barriers ------------------------------------------------------------------------------------------------------

struct Barrier {
    int count, missing;
    long bytes;
    u32 phase;
    void settle() {
        if (missing == 0 && bytes == 0) phase ^= 1, missing = count, ++progress;
    }
};
static std::map<u32, Barrier> barriers;
inline void barrier_init(u32 addr, int count) { barriers[addr] = {count, count, 0, 0}; }
inline void barrier_init_fence() {}
inline Barrier& barrier_at(u32 addr) {
    if (!barriers.count(addr)) fault("no barrier there");
    return barriers[addr];
}
inline void barrier_arrive(u32 addr) {
    Barrier& barrier = barrier_at(addr);
    if (barrier.missing-- == 0) fault("one arrival too many");
    barrier.settle();
}
inline void barrier_expect(u32 addr, u32 bytes) {
    barrier_at(addr).bytes += bytes;
    barrier_arrive(addr);
}
inline void barrier_wait(u32 addr, u32 phase) {
    if (phase > 1) fault("a phase is 0 or 1");
    while (barrier_at(addr).phase == phase) yield();
}
// A block alone: no cluster.
inline u32 cluster_rank() { return 0; }
inline void cluster_arrive() {}
inline void cluster_wait() {}
inline void cluster_sync() {}
inline void barrier_arrive_at(u32, u32) { fault("no cluster"); }
inline u32 cluster_addr(u32, u32) { fault("no cluster"); }
inline void cluster_store(u32, u32, float4) { fault("no cluster"); }

// ---- numbers of 16 and 8 bits --------------------------------------------------------------------------------------

inline float widen(u16 x, int kind) { return kind == 0 ? bits<float>((u32)x << 16) : (float)bits<_Float16>(x); }
inline u16 narrow(float x) {
    if (OUT == 1) return bits<u16>((_Float16)x);
    const u32 word = bits<u32>(x);
    return std::isnan(x) ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
}
inline u32 pack(float low, float high) { return narrow(low) | (u32)narrow(high) << 16; }
inline float e4m3(u8 x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    const float size = exponent == 15 && mantissa == 7 ? NAN : exponent ? ldexpf(8 + mantissa, exponent - 10) : ldexpf(mantissa, -9);
    return x >> 7 ? -size : size;
}
inline void unpack(u32 (&to)[2], u32 four, float scale) {
    for (int i = 0; i < 2; ++i) to[i] = pack(e4m3(four >> 16 * i & 255) * scale, e4m3(four >> (16 * i + 8) & 255) * scale);
}
inline float exp2_fast(float x) { return exp2f(x); }

// ---- copies --------------------------------------------------------------------------------------------------------

// What the test gives for a CUtensorMap of three dimensions: rows of 64 elements of 16 bits in a box.
struct TensorMap {
    u8* data;
    long long matrices, rows, stride_matrix, stride_row, box_rows, unused[10];
};
inline void tma_load(u32 dst, const TensorMap* map, u32 barrier, int x, int y, int z) {
    for (int r = 0; r < map->box_rows; ++r)
        for (int i = 0; i < 8; ++i) {
            const bool inside = z >= 0 && z < map->matrices && y + r >= 0 && y + r < map->rows;
            const u8* from = map->data + z * map->stride_matrix + (y + r) * map->stride_row + x * 2 + i * 16;
            shared<uint4>(swizzled(dst + r * 128 + i * 16)) = inside ? *(const uint4*)from : uint4{};
        }
    barrier_at(barrier).bytes -= map->box_rows * 128;
    barrier_at(barrier).settle();
}
inline void tma_load_multicast(u32, const TensorMap*, u32, int, int, int, u16) { fault("no cluster"); }
inline uint4 global_load16(const void* p) {
    if ((u64)p % 16) fault("not aligned");
    return *(const uint4*)p;
}
inline void copy16_async(u32 dst, const void* src) { shared<uint4>(dst) = global_load16(src); }
inline void barrier_arrive_after_copies(u32 barrier) { barrier_arrive(barrier); }
inline void prefetch_line(const void*) {}
inline void proxy_fence() {}

// ---- products ------------------------------------------------------------------------------------------------------

inline void wgmma_begin() {}
inline void wgmma_commit() {}
template <int PENDING> void wgmma_wait() {}
template <int N> void registers_fence(float (&)[N]) {}
template <int COUNT> void registers_grow() {}
template <int COUNT> void registers_shrink() {}
inline u32 anew(u32 base) { return base; }
inline int again(int x) { return x; }
inline void made(u32 (&)[16]) {}
inline void keep(void*) {}
inline void let_next_begin() {}
inline void launch_dependents() {}
inline void wait_for_dependency() {}
inline void wait_for_last() {}

inline u32 first_of(u64 operand) { return (operand & 0x3fff) << 4; }
inline float element(u32 addr) { return widen(shared<u16>(swizzled(addr)), OUT); }
inline int row_of(int i) { return warp() % 4 * 16 + lane() / 4 + 8 * i; }  // of element 4j + 2i + e of a thread

inline void multiply_scores(float (&d)[32], u64 q, u64 k, int keep) {
    for (int n = 0; n < 32; ++n) {
        const u32 row = first_of(q) + row_of(n / 2 % 2) * 128, column = first_of(k) + (n / 4 * 8 + lane() % 4 * 2 + n % 2) * 128;
        float sum = keep ? d[n] : 0.f;
        for (int x = 0; x < 16; ++x) sum += element(row + x * 2) * element(column + x * 2);
        d[n] = sum;
    }
}
inline void add_values(float (&d)[128], const float (&weights)[2][16], u64 v) {
    const u32 strip = (v >> 16 & 0x3fff) * 16;  // from 64 columns to the next
    for (int n = 0; n < 128; n += n % 2 ? 3 : 1) {
        const int column = n / 4 * 8 + lane() % 4 * 2 + n % 2;
        for (int x = 0; x < 16; ++x) {
            const float value = element(first_of(v) + column / 64 * strip + x * 128 + column % 64 * 2);
            d[n] += weights[0][x] * value;
            d[n + 2] += weights[1][x] * value;
        }
    }
}
inline void multiply_values(float (&d)[128], const u32* p, u64 v) {
    float weights[2][16];
    for (int i = 0; i < 4; ++i) {  // rows r and r + 8 of columns 0-7, then of columns 8-15
        const auto words = of_warp(p[i]);
        for (int x = 0; x < 8; ++x) weights[i % 2][i / 2 * 8 + x] = widen(words[lane() / 4 * 4 + x / 2] >> x % 2 * 16, OUT);
    }
    add_values(d, weights, v);
}
template <bool FP16, int FLIP_A, int FLIP_B> void multiply_half(float (&d)[128], u64 p, u64 v, int) {
    float weights[2][16];
    for (int i = 0; i < 2; ++i)
        for (int x = 0; x < 16; ++x) weights[i][x] = element(first_of(p) + row_of(i) * 128 + x * 2);
    add_values(d, weights, v);
}

// ---- launch --------------------------------------------------------------------------------------------------------

inline void enter() {
    body();
    current->done = true;
    ++progress;
    yield();
}
// Blocks one after another; fibers in turn, each until it has to wait.
inline void launch(int blocks, int threads, std::function<void()> kernel) {
    body = kernel;
    gridDim.x = blocks;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        barriers.clear();
        for (auto& meeting : named) meeting = Meeting();
        memset(memory, 0xff, sizeof memory);
        fibers = std::vector<Fiber>(threads);
        for (int i = 0; i < threads; ++i) {
            Fiber& fiber = fibers[i];
            fiber.index = i;
            fiber.done = false;
            fiber.stack.resize(96 << 10);
            getcontext(&fiber.context);
            fiber.context.uc_stack.ss_sp = fiber.stack.data();
            fiber.context.uc_stack.ss_size = fiber.stack.size();
            makecontext(&fiber.context, enter, 0);
        }
        long before = -1;
        for (int idle = 0, left = threads; left > 0;) {
            left = 0;
            for (auto& fiber : fibers) {
                if (fiber.done) continue;
                ++left;
                current = &fiber;
                swapcontext(&scheduler, &fiber.context);
            }
            idle = progress == before ? idle + 1 : 0;
            if (idle > 100) fault("deadlock");
            before = progress;
        }
    }
}
