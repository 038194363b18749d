// Wrappers for single PTX instructions of sm_90: barriers in shared memory (mbarrier), named barriers, clusters, the tensor memory accelerator (TMA),
// dependent launches, shared memory, and arithmetic that is independent of compiler flags.
//
// Addresses in shared memory are 32-bit numbers (`smem_addr`). A `phase` is the parity with which a barrier is waited for: a barrier that has just
// been initialised is in its phase 0, so waiting for phase 0 waits for its first completion, and waiting for phase 1 returns at once.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { u64 opaque[16]; };

// Volatile, so that the compiler keeps the result in a register: in a cluster it would compute it again wherever it is used.
__device__ __forceinline__ u32 smem_addr(const void* p) {
    u32 addr;
    asm volatile("{.reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a;}" : "=r"(addr) : "l"(p));
    return addr;
}

// ---- barriers ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ __forceinline__ void barrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrive at the same barrier in CTA `rank` of the cluster. Without `.release.cluster`, which would put a fence of the whole GPU, of 1 us, into every
// step. None is needed: what follows in the other CTA is a TMA copy, which the barrier itself orders.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(barrier), "r"(rank)
        : "memory");
}
// Wait until the barrier's phase of this parity has completed. The hint lets the thread sleep until then (10 ms at most), because polling competes
// with the products for shared memory.
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
    asm volatile(
        "{.reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE: }" ::"r"(barrier),
        "r"(phase)
        : "memory");
}
template <int THREADS> __device__ __forceinline__ void named_sync(int id) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
template <int THREADS> __device__ __forceinline__ void named_arrive(int id) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "n"(THREADS) : "memory");
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
__device__ __forceinline__ u32 cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
template <int COUNT> __device__ __forceinline__ void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// True in one lane of a whole warp, always the same lane. For code that only this lane runs, the compiler then uses uniform registers; after
// `if (lane == 0)` it would put a loop over the lanes around each TMA copy.
__device__ __forceinline__ bool elect_one() {
    u32 elected;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(elected));
    return elected;
}

// ---- tensor memory accelerator -----------------------------------------------------------------------------------

__device__ __forceinline__ void tma_load(u32 dst, const TensorMap* map, u32 barrier, int x, int y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void tma_load(u32 dst, const TensorMap* map, u32 barrier, int x, int y, int z) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
}
// A load whose data is evicted from the L2 first, so that it replaces earlier data of its own kind, and not what others wrote there, which may still
// have to be written back to memory.
__device__ __forceinline__ void tma_load_evict_first(u32 dst, const TensorMap* map, u32 barrier, int x, int y) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], policy;}" ::"r"(
            dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}
// Load the same tile into every CTA of the cluster whose bit is set in `mask`, to the same address; each CTA's own barrier counts the bytes.
__device__ __forceinline__ void tma_load_multicast(u32 dst, const TensorMap* map, u32 barrier, int x, int y, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], "
        "[%2], %5;" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(mask)
        : "memory");
}
__device__ __forceinline__ void tma_load_multicast(u32 dst, const TensorMap* map, u32 barrier, int x, int y, int z, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5}], "
        "[%2], %6;" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(mask)
        : "memory");
}
// Load rows of a group that ends at row `end`; rows from `end` on are read as zero. The map is one of `ragged_map` in tensor_map.py. A row at or
// after `end` has a second coordinate of at least RAGGED, which is out of bounds. The third coordinate makes what RAGGED adds to the address a
// multiple of 2^64, that is, nothing.
constexpr int RAGGED = 1 << 30;
__device__ __forceinline__ void tma_load_ragged(u32 dst, const TensorMap* map, u32 barrier, int x, int row, int end) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(dst), "l"(map),
        "r"(barrier), "r"(x), "r"(RAGGED + row - end), "r"(RAGGED), "r"(end)
        : "memory");
}
__device__ __forceinline__ void tma_load_ragged_multicast(u32 dst, const TensorMap* map, u32 barrier, int x, int row, int end, u16 mask) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, %6}], "
        "[%2], %7;" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(RAGGED + row - end), "r"(RAGGED), "r"(end), "h"(mask)
        : "memory");
}
// The same for one of several matrices; its number is the fifth coordinate of a map that is otherwise a `ragged_map`.
__device__ __forceinline__ void tma_load_ragged(u32 dst, const TensorMap* map, u32 barrier, int x, int row, int end, int matrix) {
    asm volatile(
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
        "l"(map), "r"(barrier), "r"(x), "r"(RAGGED + row - end), "r"(RAGGED), "r"(end), "r"(matrix)
        : "memory");
}
__device__ __forceinline__ void tma_store(const TensorMap* map, u32 src, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y), "r"(z)
                 : "memory");
}
// Store a tile that is not read again soon: it is evicted from the L2 first.
__device__ __forceinline__ void tma_store_evict_first(const TensorMap* map, u32 src, int x, int y) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3}], [%1], policy;}" ::"l"(map), "r"(src), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void tma_store_evict_first(const TensorMap* map, u32 src, int x, int y, int z) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4}], [%1], policy;}" ::"l"(map), "r"(src), "r"(x),
        "r"(y), "r"(z)
        : "memory");
}
// Store rows of a group, with coordinates as in `tma_load_ragged`: rows from `end` on are not written.
__device__ __forceinline__ void tma_store_ragged_evict_first(const TensorMap* map, u32 src, int x, int row, int end) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], policy;}" ::"l"(map), "r"(src), "r"(x),
        "r"(RAGGED + row - end), "r"(RAGGED), "r"(end)
        : "memory");
}
// Add a tile to what is in memory; the L2 does the additions.
__device__ __forceinline__ void tma_add(const TensorMap* map, u32 src, int x, int y) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y)
        : "memory");
}
__device__ __forceinline__ void tma_add(const TensorMap* map, u32 src, int x, int y, int z) {
    asm volatile(
        "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y),
        "r"(z)
        : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Wait until TMA has read all but the last PENDING of this thread's committed groups: their shared memory may then be overwritten.
template <int PENDING> __device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Wait until all but the last PENDING of them have been written to memory.
template <int PENDING> __device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory"); }
// Copies of contiguous bytes, without a tensor map. Sizes and addresses have to be multiples of 16.
__device__ __forceinline__ void bulk_load(u32 dst, const void* src, u32 barrier, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(dst), "l"(src), "r"(barrier),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, u32 src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// Add fp32 numbers to what is in memory; the L2 does the additions.
__device__ __forceinline__ void bulk_add(float* dst, u32 src, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// Orders a thread's TMA copies and its ordinary reads and writes, for all of memory.
__device__ __forceinline__ void proxy_fence_everywhere() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Makes a thread's ordinary writes to shared memory visible to TMA and to the tensor cores.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- dependent launches ------------------------------------------------------------------------------------------

// Let the next kernel begin, if its launch is programmatic; and wait until the preceding kernel has ended and its results are in memory.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_dependency() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Both, for the beginning of a kernel whose launch is programmatic. The order matters: when the next kernel begins, everything before this one has
// ended. So the next kernel may read, before it waits, whatever this one does not write.
__device__ __forceinline__ void begin_dependent() {
    wait_for_dependency();
    launch_dependents();
}

// ---- shared memory -----------------------------------------------------------------------------------------------

__device__ __forceinline__ float smem_load(u32 addr) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(addr));
    return x;
}
__device__ __forceinline__ float2 smem_load2(u32 addr) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(addr));
    return x;
}
__device__ __forceinline__ float4 smem_load4(u32 addr) {
    float4 x;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(addr));
    return x;
}
__device__ __forceinline__ void smem_store2(u32 addr, float x, float y) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(addr), "f"(x), "f"(y) : "memory");
}
__device__ __forceinline__ void smem_store(u32 addr, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(addr), "f"(x) : "memory"); }
__device__ __forceinline__ void smem_store4(u32 addr, float x, float y, float z, float w) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}
// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void smem_store_matrix(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}
// The same, transposed: lane i gives the address to which column i % 8 of matrix i / 8 is written, as a row.
__device__ __forceinline__ void smem_store_transposed(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- clusters: one CTA writes into another's shared memory --------------------------------------------------------

// The two halves of `cluster_sync`: between them a thread may do work for which it needs nothing from the other CTAs. The arrival is relaxed: it says
// that the CTA has started and, after `barrier_init_fence`, that its barriers exist. A release would put a fence of the whole GPU into the prologue.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// The address in CTA `rank` of the cluster that corresponds to `addr` in this CTA.
__device__ __forceinline__ u32 cluster_addr(u32 addr, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(addr), "r"(rank));
    return there;
}
// Write 16 bytes to another CTA of the cluster; a barrier of that CTA counts them (both addresses are from `cluster_addr`).
__device__ __forceinline__ void cluster_store(u32 addr, u32 barrier, float4 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr), "f"(x.x),
                 "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
                 : "memory");
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// In PTX, so that denormals are not flushed to zero whatever the compiler's flags are (CuPy compiles with -ftz=true).
__device__ __forceinline__ float mul(float x, float y) {
    float z;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ float add(float x, float y) {
    float z;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
    return z;
}
__device__ __forceinline__ float fma(float x, float y, float z) {
    float w;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(w) : "f"(x), "f"(y), "f"(z));
    return w;
}
// Convert bf16 (kind 0) or fp16 (kind 1) to fp32.
__device__ __forceinline__ float widen(u16 x, int kind) {
    float wide;
    if (kind == 0) return __uint_as_float((u32)x << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
