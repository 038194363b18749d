// How compute-sanitizer's racecheck and synccheck read ten-line kernels that are right by PTX, and ones that are wrong: what
// docs/mla_decode.md, "What sanitizers report", has in a table. Not a test; by hand:
//
//     nvcc -std=c++17 -O3 -lineinfo -gencode=arch=compute_90a,code=sm_90a -o patterns tests/sanitizer_patterns.cu
//     for name in $(./patterns); do compute-sanitizer --tool racecheck --racecheck-report all ./patterns $name; done
//
// A CTA has two warpgroups. A thread writes a word, or only those of warpgroup 0 do, and reads the one that a thread of another warp of the
// other warpgroup wrote; some do so ROUNDS times.
#include <cstdio>
#include <cstring>

typedef unsigned int u32;
constexpr int ROUNDS = 4;

__device__ __forceinline__ u32 addr_of(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void init(u32 barrier, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals)); }
__device__ __forceinline__ void arrive(u32 barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void wait(u32 barrier, u32 phase) {
    asm volatile(
        "{.reg .pred done;\n"
        "WAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, 0x989680;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE: }" ::"r"(barrier),
        "r"(phase)
        : "memory");
}
__device__ __forceinline__ void named_sync(int id) { asm volatile("bar.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void named_sync_unaligned(int id) { asm volatile("barrier.sync %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void named_arrive(int id) { asm volatile("bar.arrive %0, 256;" ::"r"(id) : "memory"); }
__device__ __forceinline__ void store(u32 at, float x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
__device__ __forceinline__ float load(u32 at) {
    float x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
    return x;
}

// `wrong` becomes 0 where all that was read is what was to be.
#define KERNEL(NAME, ...)                                                                                             \
    __global__ void __launch_bounds__(256) NAME(float* out) {                                                         \
        __shared__ float words[2][256];                                                                               \
        __shared__ __align__(8) unsigned long long barriers[2];                                                       \
        const int t = threadIdx.x, lane = t % 32, group = t / 128, read_from = t ^ 128 ^ 97;                          \
        const u32 mine = addr_of(&words[0][t]), other = addr_of(&words[0][read_from]), forth = addr_of(barriers), back = forth + 8; \
        float wrong = 0;                                                                                              \
        __VA_ARGS__                                                                                                   \
        out[t] = wrong + 0 * (lane + group + mine + other + back + read_from);                                        \
    }
#define BARRIERS(COUNT)                                  \
    if (t == 0) init(forth, COUNT), init(back, COUNT);   \
    __syncthreads();

// ---- both groups wait for each other ----
KERNEL(one_instruction, store(mine, t); named_sync(1); wrong = load(other) - read_from;)
KERNEL(an_instruction_each, store(mine, t); if (group == 0) { named_sync(1); wrong = load(other) - read_from; asm volatile("// 0"); } else {
    named_sync(1); wrong = read_from - load(other); asm volatile("// 1"); })
KERNEL(an_instruction_each_unaligned, store(mine, t); if (group == 0) { named_sync_unaligned(1); wrong = load(other) - read_from; asm volatile("// 0"); } else {
    named_sync_unaligned(1); wrong = read_from - load(other); asm volatile("// 1"); })
KERNEL(two_barriers_crosswise, store(mine, t); if (group == 0) { named_arrive(1); named_sync(2); wrong = load(other) - read_from; asm volatile("// 0"); } else {
    named_arrive(2); named_sync(1); wrong = read_from - load(other); asm volatile("// 1"); })

// ---- warpgroup 0 hands over to 1 ----
KERNEL(arrive_to_sync, if (group == 0) { store(mine, t); named_arrive(1); } else { named_sync(1); wrong = load(other) - read_from; })
KERNEL(arrive_to_sync_to_and_fro, for (int r = 0; r < ROUNDS; ++r) {
    if (group == 0) { if (r > 0) named_sync(2); store(mine, t + r); named_arrive(1); }
    else { named_sync(1); wrong += load(other) - r - read_from; if (r + 1 < ROUNDS) named_arrive(2); } })
KERNEL(one_lane_forth, BARRIERS(4) if (group == 0) { store(mine, t); __syncwarp(); if (lane == 0) arrive(forth); } else {
    wait(forth, 0); wrong = load(other) - read_from; })
KERNEL(all_lanes_forth, BARRIERS(128) if (group == 0) { store(mine, t); arrive(forth); } else { wait(forth, 0); wrong = load(other) - read_from; })
KERNEL(one_lane_back, BARRIERS(4) for (int r = 0; r < ROUNDS; ++r) {
    if (group == 0) { if (r > 0) wait(back, (r - 1) & 1); store(mine, t + r); named_arrive(1); }
    else { named_sync(1); wrong += load(other) - r - read_from; __syncwarp(); if (lane == 0) arrive(back); } })
KERNEL(all_lanes_back, BARRIERS(128) for (int r = 0; r < ROUNDS; ++r) {
    if (group == 0) { if (r > 0) wait(back, (r - 1) & 1); store(mine, t + r); named_arrive(1); }
    else { named_sync(1); wrong += load(other) - r - read_from; arrive(back); } })
KERNEL(all_lanes_to_and_fro, BARRIERS(128) for (int r = 0; r < ROUNDS; ++r) {
    if (group == 0) { if (r > 0) wait(back, (r - 1) & 1); store(mine, t + r); arrive(forth); }
    else { wait(forth, r & 1); wrong += load(other) - r - read_from; arrive(back); } })

// ---- wrong: no barrier between a read and the next write; none at all; half of each warp at a barrier ----
KERNEL(wrong_next_write, for (int r = 0; r < ROUNDS; ++r) { store(mine, t + r); named_sync(1); wrong += load(other) - r - read_from; })
// Right: before the write of round r + 2 all have passed the barrier of round r + 1, behind their read of round r.
KERNEL(next_write_elsewhere, for (int r = 0; r < ROUNDS; ++r) { store(mine + r % 2 * 1024, t + r); named_sync(1); wrong += load(other + r % 2 * 1024) - r - read_from; })
KERNEL(wrong_no_barrier, store(mine, t); wrong = load(other) - read_from;)
KERNEL(wrong_half_of_a_warp, store(mine, t); if (lane < 16) asm volatile("bar.sync 1, 128;" ::: "memory");)

// ---- all lanes of a warp write the same place: the same number, one or four words at once, as Triton's changes of layout do; other numbers ----
KERNEL(all_lanes_one_word, store(addr_of(&words[0][t / 32 * 4]), t / 32); __syncthreads(); wrong = load(addr_of(&words[0][(t / 32 ^ 5) * 4])) - (t / 32 ^ 5);)
KERNEL(all_lanes_four_words, asm volatile("st.shared.v4.f32 [%0], {%1, %1, %1, %1};" ::"r"(addr_of(&words[0][t / 32 * 4])), "f"((float)(t / 32)) : "memory");
    __syncthreads(); wrong = load(addr_of(&words[0][(t / 32 ^ 5) * 4 + t % 4])) - (t / 32 ^ 5);)
KERNEL(wrong_lanes_other_numbers, store(addr_of(&words[0][t / 32 * 4]), t); __syncthreads(); wrong = load(addr_of(&words[0][(t / 32 ^ 5) * 4])) - (t / 32 ^ 5) * 32;)

struct Named {
    const char* name;
    void (*run)(float*);
};
#define NAMED(x) {#x, x}
const Named kernels[] = {NAMED(one_instruction), NAMED(an_instruction_each), NAMED(an_instruction_each_unaligned), NAMED(two_barriers_crosswise), NAMED(arrive_to_sync),
                         NAMED(arrive_to_sync_to_and_fro), NAMED(one_lane_forth), NAMED(all_lanes_forth), NAMED(one_lane_back), NAMED(all_lanes_back),
                         NAMED(all_lanes_to_and_fro), NAMED(wrong_next_write), NAMED(next_write_elsewhere), NAMED(wrong_no_barrier), NAMED(wrong_half_of_a_warp),
                         NAMED(all_lanes_one_word), NAMED(all_lanes_four_words), NAMED(wrong_lanes_other_numbers)};

int main(int argc, char** argv) {
    for (const Named& kernel : kernels) {
        if (argc < 2) {
            printf("%s\n", kernel.name);
            continue;
        }
        if (strcmp(kernel.name, argv[1])) continue;
        float *out, host[256];
        cudaMalloc(&out, sizeof host);
        kernel.run<<<2, 256>>>(out);
        const cudaError_t error = cudaDeviceSynchronize();
        cudaMemcpy(host, out, sizeof host, cudaMemcpyDeviceToHost);
        int wrong = 0;
        for (float x : host) wrong += x != 0;
        printf("%s: %s, %d of 256 threads wrong\n", kernel.name, cudaGetErrorString(error), wrong);
    }
}
