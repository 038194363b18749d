// CUDA C++ on the CPU, for emulating_cuda.py: every thread of a block is a fiber, which runs up to its next collective (a vote, a shuffle, a
// reduction, a barrier) and waits there for the others; which one runs is random. Blocks run one after the other.
#include <ucontext.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <cmath>
#include <vector>
#include <algorithm>
#include <functional>
using std::max; using std::min;
typedef unsigned char u8; typedef unsigned short u16; typedef unsigned int u32; typedef unsigned long long u64;
#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __shared__ static
struct Dim { int x; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
static Dim gridDim, blockIdx, blockDim, threadIdx;
enum Kind { BALLOT, ALL_OF, ANY_OF, MAXIMUM, SUM, SHUFFLE, SHUFFLE_XOR, SYNC_WARP, SYNC_BLOCK };

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    bool done, waiting;
    Kind kind;
    int line;           // of the collective, in the source
    u32 value, result;  // what the lane brings, and what it gets
    int lane;           // of a shuffle: from which, or how far
};
static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static std::function<void()> body;
static int current, faults;
static u32 seed_now;

static void fault(const char* what) {
    if (!faults++) printf("fault: %s\n", what);
}
static u32 random_number() {
    seed_now ^= seed_now << 13, seed_now ^= seed_now >> 17, seed_now ^= seed_now << 5;
    return seed_now;
}
static u32 collective(Kind kind, int line, u32 value = 0, int lane = 0) {
    const int me = current;
    Fiber& f = fibers[me];
    f.waiting = true, f.kind = kind, f.line = line, f.value = value, f.lane = lane;
    swapcontext(&f.context, &scheduler);
    return f.result;
}
// All n fibers from `first` on have come to a collective.
static void resolve(int first, int n) {
    Fiber* const group = &fibers[first];
    u32 votes = 0, sum = 0;
    int largest = (int)group[0].value;
    for (int i = 0; i < n; ++i) {
        if (group[i].kind != group[0].kind || group[i].line != group[0].line) fault("lanes are in different collectives");
        if (n == 32 && group[i].value) votes |= 1u << i;
        largest = max(largest, (int)group[i].value), sum += group[i].value;
    }
    for (int i = 0; i < n; ++i) {
        Fiber& f = group[i];
        switch (f.kind) {
            case BALLOT: f.result = votes; break;
            case ALL_OF: f.result = votes == 0xffffffffu; break;
            case ANY_OF: f.result = votes != 0; break;
            case MAXIMUM: f.result = largest; break;
            case SUM: f.result = sum; break;
            case SHUFFLE: f.result = group[f.lane & 31].value; break;
            case SHUFFLE_XOR: f.result = group[(i ^ f.lane) & 31].value; break;
            default: break;
        }
    }
    for (int i = 0; i < n; ++i) group[i].waiting = false;
}
static void run_fiber() {
    body();
    fibers[current].done = true;
    swapcontext(&fibers[current].context, &scheduler);
}
static void run_block(int threads) {
    fibers.resize(threads);
    for (Fiber& f : fibers) {
        f.done = f.waiting = false;
        f.stack.resize(64 << 10);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data(), f.context.uc_stack.ss_size = f.stack.size(), f.context.uc_link = &scheduler;
        makecontext(&f.context, run_fiber, 0);
    }
    for (;;) {
        std::vector<int> ready;
        int done = 0, at_barrier = 0;
        for (int i = 0; i < threads; ++i) {
            done += fibers[i].done;
            at_barrier += fibers[i].waiting && fibers[i].kind == SYNC_BLOCK;
            if (!fibers[i].done && !fibers[i].waiting) ready.push_back(i);
        }
        if (done == threads) return;
        if (!ready.empty()) {
            current = ready[random_number() % ready.size()];
            threadIdx.x = current;
            swapcontext(&scheduler, &fibers[current].context);
            continue;
        }
        bool any = at_barrier == threads;
        if (any) resolve(0, threads);
        for (int w = 0; !any && w < threads; w += 32) {
            int here = 0;
            for (int i = w; i < w + 32; ++i) here += fibers[i].waiting && fibers[i].kind != SYNC_BLOCK;
            if (here == 32) resolve(w, 32), any = true;
        }
        if (!any) return fault("deadlock");
    }
}
static int emulate(int blocks, int threads, u32 seed, std::function<void()> kernel) {
    seed_now = seed | 1, faults = 0, body = kernel;
    gridDim.x = blocks, blockDim.x = threads;
    for (int b = 0; b < blocks && !faults; ++b) {
        blockIdx.x = b;
        run_block(threads);
    }
    return faults;
}

template <class T> static u32 bits_of(T x) { u32 b; memcpy(&b, &x, 4); return b; }
template <class T> static T from_bits(u32 b) { T x; memcpy(&x, &b, 4); return x; }
template <class T> static T shuffled(Kind kind, int line, T x, int lane) { return from_bits<T>(collective(kind, line, bits_of(x), lane)); }
#define __ballot_sync(mask, x) collective(BALLOT, __LINE__, (x) ? 1 : 0)
#define __all_sync(mask, x) (collective(ALL_OF, __LINE__, (x) ? 1 : 0) != 0)
#define __any_sync(mask, x) (collective(ANY_OF, __LINE__, (x) ? 1 : 0) != 0)
#define __reduce_max_sync(mask, x) (int)collective(MAXIMUM, __LINE__, (u32)(x))
#define __reduce_add_sync(mask, x) (int)collective(SUM, __LINE__, (u32)(x))
#define __shfl_sync(mask, x, lane) shuffled(SHUFFLE, __LINE__, x, lane)
#define __shfl_xor_sync(mask, x, distance) shuffled(SHUFFLE_XOR, __LINE__, x, distance)
#define __syncwarp() collective(SYNC_WARP, __LINE__)
#define __syncthreads() collective(SYNC_BLOCK, __LINE__)
static inline int __vimax3_s32(int a, int b, int c) { return max(a, max(b, c)); }
static inline int __ffs(u32 x) { return __builtin_ffs(x); }
static inline int __popc(u32 x) { return __builtin_popcount(x); }
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
static inline float __frcp_rn(float a) { return 1.f / a; }
static inline float __fdividef(float a, float b) { return a / b; }
static inline float __int_as_float(int x) { return from_bits<float>((u32)x); }
static inline int __float_as_int(float x) { return (int)bits_of(x); }
template <class T> static T __ldg(const T* p) { return *p; }
static inline int atomicAdd(int* p, int v) { int o = *p; *p += v; return o; }
// Shared memory by 32-bit addresses: aligned, and inside.
static char* smem_base; static u32 smem_size;
template <class T> static u32 smem_addr_(T* p, u32 bytes) { smem_base = (char*)p; smem_size = bytes; return 0; }
#define smem_addr(p) smem_addr_(p, sizeof(p))
template <class T> static T& smem_at(u32 a) { if (a % sizeof(T) || a + sizeof(T) > smem_size) { fault("shared memory address"); a = 0; } return *(T*)(smem_base + a); }
static float smem_load(u32 a) { return smem_at<float>(a); }
static float2 smem_load2(u32 a) { struct alignas(8) P { float x, y; }; P p = smem_at<P>(a); return {p.x, p.y}; }
static float4 smem_load4(u32 a) { return smem_at<float4>(a); }
static void smem_store(u32 a, float x) { smem_at<float>(a) = x; }
static void smem_store2(u32 a, float x, float y) { struct alignas(8) P { float x, y; }; smem_at<P>(a) = {x, y}; }
static void smem_store4(u32 a, float x, float y, float z, float w) { smem_at<float4>(a) = {x, y, z, w}; }
static float widen(u16, int) { return 0; }
