// Grouped block-scaled e4m3 products on sm_90a, for groups whose sizes only the device knows. B_ROWS selects one of two kernels:
//
//   128  `grouped_gemm`: each row of A [T, K] times the matrix of its group, of B [E, N, K]; A in 1x128 tiles, B in 128x128 blocks
//   1    `grouped_wgrad`: for each group, A [N, P] times B [K, P], summed over the columns of the group; both in 1x128 tiles
//
// The warps, the pipeline, the scales and most options are those of cuda/fp8_gemm.cuh. This file adds the groups and the order of the tiles. First,
// all threads of a CTA fill a table in shared memory that says where each group and its tiles begin (cuda/groups.cuh). After that, every thread that
// loads, multiplies or stores steps through the CTA's tiles on its own, and finds the group of each tile in the table.
//
// Further options (-D):
//   MASKED    0: group e has rows offsets[e] to offsets[e + 1]; rows of C after the last group, of the first `cleared` rows, become zero
//             1: group e has the first offsets[e] of the `rows` rows from e * rows on
//   IN_UNITS  1: units of 64 rows without a row of the group are skipped, see cuda/fp8_gemm.cuh; here, it also orders groups by their height

constexpr bool ANY_ROW = B_ROWS == 128;
#include "fp8_gemm.cuh"
#include "groups.cuh"

#if B_ROWS == 128
// ---- rows in groups ----------------------------------------------------------------------------------------------

// The sizes of the product. `b_step` is the number of rows of B from one matrix to the next; `stride_sbe` and `stride_sbn` are the strides of B's
// scales. `wide` and `tall` count clusters' tiles along N and along the rows of a group.
struct Shape {
    int rows, N, K, b_step, stride_sbe, stride_sbn, cleared;
    __device__ __forceinline__ int wide() const { return (N + CLUSTER_N - 1) / CLUSTER_N; }
    __device__ __forceinline__ static int tall(int rows) { return (rows + CLUSTER_M - 1) / CLUSTER_M; }
};

// One tile: its group; its first row; `left`, how many rows the group has from there on (with IN_UNITS, how many rows the tile has); and its number
// along N.
struct Tile {
    Shape shape;
    int group = 0, first, left, n;
    __device__ __forceinline__ int row() const { return first; }
    __device__ __forceinline__ int rows() const { return left; }
    __device__ __forceinline__ int column() const { return n * BLOCK_N; }
    __device__ __forceinline__ int b_row() const { return group * shape.b_step + column(); }
    __device__ __forceinline__ const float* b_scales(const float* scales, int strip) const {
        const int n_128 = min((column() + strip * STRIP_N) / 128, (shape.N - 1) / 128);
        return scales + (long long)group * shape.stride_sbe + (long long)n_128 * shape.stride_sbn;
    }
    __device__ __forceinline__ int block() const { return 0; }
    __device__ __forceinline__ int blocks() const { return (shape.K + BLOCK_K - 1) / BLOCK_K; }
    template <bool ADD> __device__ __forceinline__ void store(const TensorMap* map, u32 buffer, int column, int row) const {
        if (row < left) tma_store_ragged_evict_first(map, buffer, column, first + row, first + left);
    }
    // The spare warps of all CTAs together write zeros to rows from `end` on, which belong to no group.
    __device__ __forceinline__ void clear(const Output& out, int end, int lane) const {
        if (MASKED) return;
        const int bytes = shape.N * (int)sizeof(Element);
        for (int r = end + blockIdx.x; r < shape.cleared; r += gridDim.x) {
            u8* c = (u8*)(out.c + (long long)r * out.stride);
            for (int i = lane * 16; i + 16 <= bytes; i += 32 * 16) *(int4*)(c + i) = make_int4(0, 0, 0, 0);
            for (int i = bytes / 16 * 16 + lane * 2; i < bytes; i += 32 * 2) *(u16*)(c + i) = 0;
        }
    }
};

// Advance `at` to the entry of the table that has tile number `index`: the same entry or, by a binary search, a later one.
__device__ __forceinline__ void find(GroupTable table, int index, int& at) {
    if (table.at(at + 1).y > index) return;
    int high = table.groups - 1;
    ++at;
    while (at < high) {
        const int middle = (at + high) / 2;
        if (table.at(middle + 1).y > index) high = middle;
        else at = middle + 1;
    }
}

#if IN_UNITS
// The tiles of a group have heights that are as equal as units of 64 rows allow, so CTAs have unequal work. Two things make them end at about the
// same time. Groups are computed in the order of their height, the tallest first. And the CTAs take tiles in rounds, each taking one tile per round,
// where a CTA's place within the round (`seat`) moves on by one from round to round; with fixed places, a CTA would always get the same one of a
// group's tiles if their number divides the number of CTAs. With 64 groups of 256 rows, give or take 30%, 4096x7168, computing the groups in their
// original order took 5% longer, with 256 such groups 22%; fixed places took 7 and 18% longer than whole tiles.
//
// Entry i of the table has the group that is computed i-th (.x), and the number of tiles before it (.y). The first row of each group, from
// `plan_groups`, is stored behind the table.
struct Tiles : Tile {
    GroupTable table;
    int index, seat, at = 0;

    __device__ __forceinline__ Tiles(Shape shape, GroupTable table) : Tile{shape}, table(table) {}
    __device__ __forceinline__ u32 row_addr(int group) const { return table.addr + GroupTable::bytes(table.groups) + group * 4; }
    __device__ __forceinline__ int row_of(int group) const { return load_word(row_addr(group)); }

    // Fill the table; all threads of the CTA take part. The memory of the pipeline stages is used temporarily for the groups in their original order,
    // and from `heights` on for the number of units of each. The position of a group is the number of groups that are taller, or as tall and earlier.
    __device__ __forceinline__ void plan(u32 base, const int* ends) const {
        const GroupTable plain{base, table.groups};
        const u32 heights = base + GroupTable::bytes(table.groups);
        plan_groups<THREADS, !MASKED>(plain, base + OFFSET_C, ends, shape.rows, [&](int size) { return Shape::tall(size) * shape.wide(); });
        for (int g = threadIdx.x; g <= table.groups; g += THREADS) {
            const int begin = plain.at(g).x;
            store_word(row_addr(g), begin);
            if (g < table.groups) store_word(heights + g * 4, (plain.at(g + 1).x - (MASKED ? 0 : begin) + 63) / 64);
        }
        __syncthreads();
        for (int g = threadIdx.x; g < table.groups; g += THREADS) {
            const int units = load_word(heights + g * 4);
            int place = 0, tiles = 0;
#pragma unroll 8
            for (int other = 0; other < table.groups; ++other) {
                const int theirs = load_word(heights + other * 4);
                if (theirs > units || (theirs == units && other < g)) ++place, tiles += (theirs + UNITS - 1) / UNITS;
            }
            table.set(place, g, tiles * shape.wide());
        }
        if (threadIdx.x == 0) table.set(table.groups, 0, plain.tiles());
        proxy_fence();  // TMA will overwrite the temporary tables
        __syncthreads();
    }
    // This is not done in the constructor, because values computed before the warps take different branches would be kept in local memory.
    __device__ __forceinline__ void begin() {
        index = seat = blockIdx.x;
        locate();
    }
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        find(table, index, at);
        const int2 entry = table.at(at);
        group = entry.x;
        const int begin = MASKED ? 0 : row_of(group), size = row_of(group + 1) - begin;
        const int units = (size + 63) / 64, tall = (units + UNITS - 1) / UNITS, least = units / tall, higher = units % tall;
        const Place place(index - entry.y, tall, shape.wide(), 0);
        const int before = (place.m * least + min(place.m, higher)) * 64;
        first = (MASKED ? group * shape.rows : begin) + before;
        left = min(size - before, (least + (place.m < higher)) * 64);
        n = place.n;
    }
    __device__ __forceinline__ bool valid() const { return index < table.tiles(); }
    __device__ __forceinline__ void advance() {
        const int round = index - seat;
        seat = seat + 1 == gridDim.x ? 0 : seat + 1;
        index = round + gridDim.x + seat;
    }
    __device__ __forceinline__ void next() {
        advance();
        locate();
    }
    __device__ __forceinline__ void spare_warp(const Output& out, int lane) const { clear(out, row_of(table.groups), lane); }
};

#else
// Each tile has BLOCK_M rows, and the last one of a group the rest. Groups are computed in their original order. Entry g of the table has the first
// row of group g, and the number of tiles before it.
struct Tiles : Tile {
    GroupTable table;
    int index, step, count;
    u32 rank;

    __device__ __forceinline__ Tiles(Shape shape, GroupTable table) : Tile{shape}, table(table) {}
    __device__ __forceinline__ void plan(u32 base, const int* ends) {
        plan_groups<THREADS, !MASKED>(table, base + OFFSET_C, ends, shape.rows, [&](int size) { return Shape::tall(size) * shape.wide(); });
        rank = CLUSTER > 1 ? cluster_rank() : 0;
        index = blockIdx.x / CLUSTER;
        step = gridDim.x / CLUSTER;
        count = table.tiles();
        locate();
    }
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        find(table, index, group);
        const int2 from = table.at(group), to = table.at(group + 1);
        const int size = MASKED ? to.x : to.x - from.x;
        const Place place(index - from.y, Shape::tall(size), shape.wide(), rank);
        first = (MASKED ? group * shape.rows : from.x) + place.m * BLOCK_M;
        left = size - place.m * BLOCK_M;
        n = place.n;
    }
    __device__ __forceinline__ bool valid() const { return index < count; }
    __device__ __forceinline__ void advance() { index += step; }
    __device__ __forceinline__ void next() {
        advance();
        locate();
    }
    __device__ __forceinline__ void spare_warp(const Output& out, int lane) const { clear(out, table.at(table.groups).x, lane); }
};
#endif

// `offsets` are the ends of the groups, after a 0 (MASKED 0), or the sizes of the groups (MASKED 1). `rows` is the number of rows of A, or of each
// group's buffer. `map_c` is a ragged map, by which TMA does not write rows beyond the end of a group.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, 1)
grouped_gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
             const __grid_constant__ TensorMap map_c, const float* __restrict__ sb, const int* __restrict__ offsets, Element* c, int groups, int rows, int N,
             int K, int b_step, int stride_sbe, int stride_sbn, int stride_c, int cleared) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    Tiles tiles({rows, N, K, b_step, stride_sbe, stride_sbn, cleared}, {base + OFFSET_TABLE, groups});
    tiles.plan(base, MASKED ? offsets : offsets + 1);
    const Output out{&map_c, c, nullptr, N, stride_c};
    block_scaled_gemm(tiles, base, &map_a, &map_b, &map_sa, &map_sa, sb, out);
}

#else
// ---- sums over the columns of groups -----------------------------------------------------------------------------

// All groups have the same tiles, those of C [N, K], and tiles are numbered group by group. Values that follow from the kernel's arguments are
// computed where they are used, because the multiplying threads have no registers to keep them.
struct Tiles {
    GroupTable table;  // its "tiles" are the blocks of 128 columns
    int columns, N, K, index, group, m, n;
    u32 rank;

    __device__ __forceinline__ Tiles(GroupTable table, int columns, int N, int K, u32 rank) : table(table), columns(columns), N(N), K(K), rank(rank) {
        index = blockIdx.x / CLUSTER;
        locate();
    }
    __device__ __forceinline__ int tall() const { return (N + CLUSTER_M - 1) / CLUSTER_M; }
    __device__ __forceinline__ int wide() const { return (K + CLUSTER_N - 1) / CLUSTER_N; }
    __device__ __forceinline__ int step() const { return gridDim.x / CLUSTER; }
    // Number of blocks before a group. It is limited to those that exist, for offsets that do not belong to these columns.
    __device__ __forceinline__ int blocks_before(int group) const { return min(table.at(group).y, columns / BLOCK_K); }
    __device__ __forceinline__ void locate() {
        if (!valid()) return;
        const int size = tall() * wide();
        group = index / size;
        while (ACCUMULATE && blocks() == 0) {  // an empty group adds nothing: skip to this CTA's first tile of the next group that is not empty
            const int here = block();
            for (int high = table.groups; group < high;) {
                const int middle = (group + high) / 2;
                if (blocks_before(middle + 1) > here) high = middle;
                else group = middle + 1;
            }
            index += (group * size - index + step() - 1) / step() * step();
            if (!valid()) return;
            group = index / size;
        }
        const Place place(index - group * size, tall(), wide(), rank);
        m = place.m;
        n = place.n;
    }
    __device__ __forceinline__ bool valid() const { return index < table.groups * tall() * wide(); }
    __device__ __forceinline__ void next() {
        index += step();
        locate();
    }
    __device__ __forceinline__ int row() const { return m * BLOCK_M; }
    __device__ __forceinline__ int rows() const { return N - row(); }
    __device__ __forceinline__ int column() const { return n * BLOCK_N; }
    __device__ __forceinline__ int b_row() const { return column(); }
    __device__ __forceinline__ const float* b_scales(const float*, int) const { return nullptr; }
    __device__ __forceinline__ int block() const { return blocks_before(group); }
    __device__ __forceinline__ int blocks() const { return blocks_before(group + 1) - block(); }
    template <bool ADD> __device__ __forceinline__ void store(const TensorMap* map, u32 buffer, int column, int row) const {
        if (ADD) tma_add(map, buffer, column, this->row() + row, group);
        else tma_store_evict_first(map, buffer, column, this->row() + row, group);
    }
    __device__ __forceinline__ void spare_warp(const Output&, int) const {}
};

// `columns` is the number of padded tokens P; `offsets` are the ends of the groups in tokens, after a 0.
extern "C" __global__ void
#if CLUSTER > 1
__cluster_dims__(CLUSTER, 1, 1)
#endif
__launch_bounds__(THREADS, 1)
grouped_wgrad(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b, const __grid_constant__ TensorMap map_sa,
              const __grid_constant__ TensorMap map_sb, const __grid_constant__ TensorMap map_c, const int* __restrict__ offsets, int groups, int columns, int N,
              int K) {
    extern __shared__ __align__(1024) u8 smem[];
    const u32 base = smem_addr(smem);
    const GroupTable table{base + OFFSET_TABLE, groups};
    plan_groups<THREADS, true>(table, base + OFFSET_C, offsets + 1, columns, [](int size) { return (size + BLOCK_K - 1) / BLOCK_K; });
    const Output out{&map_c, nullptr, nullptr, K, 0};
    block_scaled_gemm(Tiles(table, columns, N, K, CLUSTER > 1 ? cluster_rank() : 0), base, &map_a, &map_b, &map_sa, &map_sb, nullptr, out);
}
#endif
