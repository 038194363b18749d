// Hopper's instructions, one wrapper each: barriers in shared memory, the tensor memory accelerator, matrices in shared memory.
// Addresses of shared memory are 32-bit (`smem_addr`); a phase is the parity a barrier is waited for with.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

struct alignas(64) TensorMap { u64 opaque[16]; };

// Volatile, so that the compiler keeps it: in a cluster it would form it anew wherever it is used.
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
// Arrive at the same barrier of CTA `rank` of the cluster. Without `.release.cluster`, which would put a 1 us fence of the
// whole GPU into every step: what follows in the other CTA is a copy by the accelerator, ordered by the barrier itself.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
    asm volatile(
        "{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(barrier), "r"(rank)
        : "memory");
}
// With a hint to sleep until the phase ends (10 ms at most): polling takes turns at the shared memory that the products read.
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

// True in one lane of a whole warp, always the same. What runs in it alone the compiler then keeps in uniform registers; after
// `if (lane == 0)` it puts a loop over the lanes around each copy of the accelerator.
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
// A load that leaves the L2 first: it takes the place of its own kind, not of what others put there and may still have to be written back.
__device__ __forceinline__ void tma_load_evict_first(u32 dst, const TensorMap* map, u32 barrier, int x, int y) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], policy;}" ::"r"(
            dst),
        "l"(map), "r"(barrier), "r"(x), "r"(y)
        : "memory");
}
// The same tile to every CTA of the cluster that `mask` names, at the same place, counted by each CTA's own barrier.
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
// Rows of a group that ends at row `end`, by a map of `ragged_map` in tensor_map.py: those from `end` on are read as zero. The second coordinate
// is out of bounds from RAGGED on; the third turns what it adds to the address into a multiple of 2^64.
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
// The same of one of several matrices, the fifth coordinate of a map that is otherwise a `ragged_map`.
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
// A tile that nobody reads again soon: it leaves the L2 first.
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
// Rows of a group, as `tma_load_ragged` reads them: those from `end` on are not written.
__device__ __forceinline__ void tma_store_ragged_evict_first(const TensorMap* map, u32 src, int x, int row, int end) {
    asm volatile(
        "{.reg .b64 policy; createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
        "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5}], [%1], policy;}" ::"l"(map), "r"(src), "r"(x),
        "r"(RAGGED + row - end), "r"(RAGGED), "r"(end)
        : "memory");
}
// Add to what is there, in the L2.
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
// Wait until the accelerator has read all but PENDING of this thread's groups: their shared memory may be written again.
template <int PENDING> __device__ __forceinline__ void tma_store_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Wait until all but PENDING of them have been written.
template <int PENDING> __device__ __forceinline__ void tma_store_wait() { asm volatile("cp.async.bulk.wait_group %0;" ::"n"(PENDING) : "memory"); }
// Contiguous bytes, without a map: multiples of 16, at such addresses.
__device__ __forceinline__ void bulk_load(u32 dst, const void* src, u32 barrier, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %3, [%2];" ::"r"(dst), "l"(src), "r"(barrier),
                 "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_store(void* dst, u32 src, u32 bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// Add fp32 to what is there, in the L2.
__device__ __forceinline__ void bulk_add(float* dst, u32 src, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes) : "memory");
}
// Orders what a thread has copied by the accelerator, and what it does otherwise, in all memory.
__device__ __forceinline__ void proxy_fence_everywhere() { asm volatile("fence.proxy.async;" ::: "memory"); }
// Makes ordinary writes to shared memory visible to the accelerator and to the tensor cores.
__device__ __forceinline__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- dependent launches ------------------------------------------------------------------------------------------

// Let the kernel behind this one begin, if its launch is programmatic; and wait until the kernel in front has ended and its results are there.
__device__ __forceinline__ void launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
__device__ __forceinline__ void wait_for_dependency() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// Both, as a kernel whose launch is programmatic begins: in this order, so that all in front of it has ended before the one behind it begins,
// which then may read before it waits whatever this one does not write.
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
// The same, transposed: lane i gives the address where column i % 8 of matrix i / 8 becomes a row.
__device__ __forceinline__ void smem_store_transposed(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// ---- clusters: one CTA writes into another's shared memory --------------------------------------------------------

// The two halves of `cluster_sync`: between them a thread may do what needs nothing of the other CTAs. Relaxed: it tells that the CTA
// is there and, after `barrier_init_fence`, its barriers; a release would put a fence of the whole GPU into the prologue.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }
// Where CTA `rank` of the cluster has what lies at `addr` here.
__device__ __forceinline__ u32 cluster_addr(u32 addr, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(addr), "r"(rank));
    return there;
}
// 16 bytes to a CTA of the cluster, counted by a barrier of that CTA (both addresses from `cluster_addr`).
__device__ __forceinline__ void cluster_store(u32 addr, u32 barrier, float4 x) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(addr), "f"(x.x),
                 "f"(x.y), "f"(x.z), "f"(x.w), "r"(barrier)
                 : "memory");
}

// ---- arithmetic --------------------------------------------------------------------------------------------------

// Spelt out, so that denormals count whatever the compiler is told (CuPy tells it to flush them).
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
// bf16 (kind 0) or fp16 to fp32.
__device__ __forceinline__ float widen(u16 x, int kind) {
    float wide;
    if (kind == 0) return __uint_as_float((u32)x << 16);
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x));
    return wide;
}
