// The epilogue of fp8_gemm.cuh: how finished tiles of C get from the registers of the multiplying warpgroups to memory.
//
// A multiplying warpgroup adds the bias, rounds, and writes its sums to buffers in shared memory (`write_to_shared`); a warp of warpgroup 2 stores
// them from there by TMA (`store_tiles`). For each buffer, two named barriers say that it has been written and that it is free again, see ring.cuh.
// With DIRECT, the multiplying warpgroup writes C itself by ordinary stores (`write_directly`), and those warps and buffers do nothing.
//
// It uses the options and constants of fp8_gemm.cuh, which includes it after defining them.
#pragma once

// Where C is, and what is added to it. C has `columns` columns; `stride` is the number of elements from one row to the next.
struct Output {
    const TensorMap* map;
    Element* c;
    const void* bias;
    int columns, stride;
};

// The bias of a column, or 0 beyond the last. The loads are volatile to keep them at their use: if the compiler moves all of them in front of the
// additions, registers spill.
__device__ __forceinline__ float bias_at(const Output& out, int col) {
    if (BIAS == 0 || col >= out.columns) return 0.f;
    if (BIAS == 3) {
        float x;
        asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(x) : "l"((const float*)out.bias + col));
        return x;
    }
    u16 x;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(x) : "l"((const u16*)out.bias + col));
    return widen(x, BIAS == 1 ? 0 : 1);
}

// Write x to C or, with ACCUMULATE, add it to the existing element.
__device__ __forceinline__ void store(Element* c, float x) {
#if OUT == 2
    *c = ACCUMULATE ? *c + x : x;
#else
    *c = (Element)pack(ACCUMULATE ? widen(*c, OUT) + x : x, 0.f);
#endif
}

// DIRECT: write this thread's sums to C with ordinary stores. `first_row` is the tile's first row in C, `row` this thread's first row in the tile.
__device__ __forceinline__ void write_directly(const float (&total)[WAVES][BLOCK_N / 2], const Output& out, int first_row, int row,
                                               int rows, int col, int lane) {
#pragma unroll
    for (int w = 0; w < WAVES; ++w) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int r = row + w * 128 + i * 8;
            if (r >= rows) continue;
            Element* c_row = out.c + (long long)(first_row + r) * out.stride;
#pragma unroll
            for (int j = 0; j < BLOCK_N / 8; ++j) {
                const int n = col + j * 8 + lane % 4 * 2;
                if (n < out.columns) store(c_row + n, total[w][4 * j + 2 * i] + bias_at(out, n));
                if (n + 1 < out.columns) store(c_row + n + 1, total[w][4 * j + 2 * i + 1] + bias_at(out, n + 1));
            }
        }
    }
}

// A multiplying warpgroup's part of storing C: from registers to shared memory, in the 128-byte swizzle of the tensor map. A warp of warpgroup 2
// stores it from there, because a warpgroup that issues the TMA stores itself waits about 800 clocks for that.
__device__ __forceinline__ void write_to_shared(const float (&total)[WAVES][BLOCK_N / 2], const Output& out, u32 buffers, int group, int warp, int lane,
                                                int col, int waves) {
    // Read again, so that values that depend on them do not occupy registers during the loop over K.
    if (IN_UNITS) asm volatile("mov.u32 %0, %%laneid; mov.u32 %1, %%tid.x; bfe.u32 %1, %1, 5, 2;" : "=r"(lane), "=r"(warp));
#pragma unroll
    for (int h = 0; h < HANDOVERS; ++h) {
        if (IN_UNITS && h / (HANDOVERS / WAVES) >= waves) continue;
        named_sync<160>(free_again(group, h % HALVES));
#pragma unroll
        for (int i = 0; i < BOXES; ++i) {
            const u32 buffer = buffers + (h % HALVES * BOXES + i) * BOX_BYTES;
            const float* x = total[h / (HANDOVERS / WAVES)] + (h % (HANDOVERS / WAVES) * BOXES + i) * (BOX_N / 2);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int n = col + (h % (HANDOVERS / WAVES) * BOXES + i) * BOX_N + j * BOX_N / 4 + lane % 4 * 2;
                const float b0 = bias_at(out, n), b1 = bias_at(out, n + 1);
                if (OUT == 2) {  // 8 columns of 32 bits, two per thread
                    const int r = warp * 16 + lane / 4;
                    const u32 at = buffer + r * 128 + (((j * 2 + lane % 4 / 2) ^ (r % 8)) * 16) + lane % 2 * 8;
                    smem_store2(at, x[4 * j] + b0, x[4 * j + 1] + b1);
                    smem_store2(at + 8 * 128, x[4 * j + 2] + b0, x[4 * j + 3] + b1);
                } else {  // 16 columns of 16 bits, as four 8x8 matrices: rows 0-7 and 8-15 of columns 0-7, then of columns 8-15
                    const int r = warp * 16 + lane % 16;
                    const float* y = x + 8 * j;
                    const float b2 = bias_at(out, n + 8), b3 = bias_at(out, n + 9);
                    smem_store_matrix(buffer + r * 128 + (((j * 2 + lane / 16) ^ (r % 8)) * 16), pack(y[0] + b0, y[1] + b1),
                                      pack(y[2] + b0, y[3] + b1), pack(y[4] + b2, y[5] + b3), pack(y[6] + b2, y[7] + b3));
                }
            }
        }
        proxy_fence();
        named_arrive<160>(written(group, h % HALVES));
    }
}

// A storing warp's work: issue the TMA stores for one multiplying warpgroup's part of every tile. `Tiles` marks them to be evicted from the L2 first,
// which gains 12% at K = 512, where C is nearly all of the memory traffic.
template <class Tiles> __device__ __forceinline__ void store_tiles(Tiles tiles, u32 buffers, int group, const TensorMap* map_c) {
    const bool elected = elect_one();
#pragma unroll
    for (int i = 0; i < HALVES; ++i) named_arrive<160>(free_again(group, i));
    if constexpr (IN_UNITS) tiles.begin();
    for (; tiles.valid(); tiles.next()) {
        const int handovers = IN_UNITS ? HANDOVERS / WAVES * waves_of(tiles.rows(), group) : HANDOVERS;
#pragma unroll
        for (int h = 0; h < HANDOVERS; ++h) {
            if (IN_UNITS && h >= handovers) continue;
            named_sync<160>(written(group, h % HALVES));
            if (elected) {
                const int row = (h / (HANDOVERS / WAVES) * 2 + group) * 64;
#pragma unroll
                for (int i = 0; i < BOXES; ++i) {
                    const int column = tiles.column() + (h % (HANDOVERS / WAVES) * BOXES + i) * BOX_N;
                    const u32 buffer = buffers + (h % HALVES * BOXES + i) * BOX_BYTES;
                    tiles.template store<ACCUMULATE>(map_c, buffer, column, row);
                }
                tma_store_commit();
            }
            // Release the half of the preceding handover: by now TMA has read it.
            if (h > 0 || HALVES == 1) {
                if (elected) tma_store_wait_read<HALVES - 1>();
                __syncwarp();
                named_arrive<160>(free_again(group, (h + HALVES - 1) % HALVES));
            }
        }
        if (HALVES > 1 && handovers > 0) {
            if (elected) tma_store_wait_read<0>();
            __syncwarp();
            named_arrive<160>(free_again(group, (handovers - 1) % HALVES));
        }
    }
}
