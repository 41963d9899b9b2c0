// What a value can move in the layer's output, at most: norms through the output projection.
//
//   norms[s][t] = 1 / G * sum_g sum_c |v[s][t] . w[s][c][g * D ..]|        f32
//
// v[s] are rows of D elements (`Rows`); w[s] are the columns of the segment's query heads in the output projection:
// `hidden` rows, `stride` bytes apart, each with G * D elements of the same type, 16-byte aligned.
//
//   value_norm_{bf16,f16}_{64,96,128,256}: D up to that, a multiple of 8; tensor cores
//   value_norm_f32:                        D up to 256, a multiple of 4; none
//
// Launch: grid (ceil(longest / ROWS), segments, splits), 256 threads; ROWS is 256, for f32 128. Splits share out the
// blocks of 256 channels; with more than one, `partials` f64 [segments][grid.x][splits][ROWS] and `arrivals` u32
// [segments][grid.x], zero before the launch and after.
//
// A product whose result is summed and dropped: one projection's arithmetic, and no [slots, Hq, hidden] in memory. A warp
// holds 32 values in registers; tiles of weights stream through a ring of two in shared memory, swizzled, and are read by
// all eight warps, so that 256 slots share each read of the weights. Blocks of 256 channels are summed in f32, and the
// blocks in f64: with 24 bits each, that sum is exact but for blocks 2^20 times smaller than others, so that it depends on
// no order. Source: CriticalKV (arXiv 2502.03805), "vwl1norm"; the skeleton is that of window_attention.cu.
// gates: value_norm_*_64 HMMA.16816.F32==16 LDSM.16.M88.4==12 registers<=128
// gates: value_norm_*_96 HMMA.16816.F32==24 LDSM.16.M88.4==18 registers<=128
// gates: value_norm_*_128 HMMA.16816.F32==32 LDSM.16.M88.4==24 registers<=128
// gates: value_norm_*_256 HMMA.16816.F32==64 LDSM.16.M88.4==48
// gates: value_norm_*16_* LDGSTS.E.BYPASS.128 FADD>=16 !U16 STG.E.64==1
// gates: value_norm_f32 FFMA>=256 LDS.128>=16 LDGSTS.E.BYPASS.128
#include "device.cuh"

// The twin of `Projection` in src/backend/cuda/value_norm.rs.
struct Projection {
    u64 weights; // first column of the segment's first query head
    i64 stride;  // bytes from a channel to the next
    u32 hidden, group, dim;
    u32 row; // of the norms and lengths
};
struct Arguments {
    const Rows* values;
    const u32* pages;
    const Projection* projections;
    const u32* lengths;
    float* const* norms;
    double* partials;
    u32* arrivals;
};

// Threads, and channels that are summed in f32.
constexpr u32 THREADS = 256, BLOCK = 256;

// What a block does, in shared memory, where it takes no registers: of the tiles of `TILE` channels of all query heads of
// its segment, one head after the other, the first that its split takes, and their number.
struct Share {
    Projection w;
    u32 head, channel, tiles;

    template <u32 TILE> __device__ void take(const Projection& projection) {
        w = projection;
        u32 per_head = (w.hidden + BLOCK - 1) / BLOCK, blocks = w.group * per_head;
        auto tile = [&](u32 block) {
            return block / per_head * ((w.hidden + TILE - 1) / TILE) + block % per_head * (BLOCK / TILE);
        };
        head = channel = tiles = 0;
        if (blocks == 0) return;
        u32 share = (blocks + gridDim.z - 1) / gridDim.z;
        u32 first = min(blocks, blockIdx.z * share), end = min(blocks, first + share);
        head = first / per_head;
        channel = first % per_head * BLOCK;
        tiles = tile(end) - tile(first);
    }
};

// Adds the sums of all splits in their order; the last split writes the norms.
template <u32 ROWS> __device__ inline void finish(const Arguments& arg, const Projection& w, const double* sums, u32 first) {
    u32 row = threadIdx.x;
    __syncthreads();
    double sum = row < ROWS ? sums[row] : 0.0;
    if (gridDim.z > 1) {
        u64 tile = (u64)blockIdx.y * gridDim.x + blockIdx.x;
        double* partials = arg.partials + tile * gridDim.z * ROWS;
        if (row < ROWS) partials[blockIdx.z * ROWS + row] = sum;
        if (!last_to_arrive(arg.arrivals + tile, gridDim.z)) return;
        sum = 0.0;
        if (row < ROWS)
            for (u32 split = 0; split < gridDim.z; ++split) sum += partials[split * ROWS + row];
    }
    if (row < ROWS && first + row < arg.lengths[w.row]) arg.norms[w.row][first + row] = (float)sum / w.group;
}

template <class T, int D> __device__ inline void value_norm(const Arguments& arg) {
    // Chunks of 16 bytes in a row of shared memory, a power of two for the swizzle; a tile has 1024 of them.
    constexpr u32 ROW = D <= 64 ? 8 : D <= 128 ? 16 : 32, TILE = 1024 / ROW, ROWS = 256;
    __shared__ uint4 ring[2][1024];
    __shared__ double sums[ROWS];
    __shared__ Share share;
    if (threadIdx.x == 0) share.take<TILE>(arg.projections[blockIdx.y]);
    __syncthreads();
    const Projection& w = share.w;
    u32 length = arg.lengths[w.row], first = blockIdx.x * ROWS;
    if (first >= length) return;
    u32 lane = lane_id(), warp = warp_id(), row0 = first + warp * 32, chunks = w.dim / 8;

    // The values pass through the warp's eighth of the ring, 16 rows of up to 128 elements at a time, to become fragments.
    u32 a[2][D / 16][4];
    const Rows values = arg.values[blockIdx.y];
    uint4* stage = ring[0] + warp * 256;
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
        for (u32 k0 = 0; k0 < D / 16; k0 += 8) {
            constexpr u32 WIDE = D < 128 ? D / 8 : 16;
#pragma unroll 1
            for (u32 i = lane; i < 16 * WIDE; i += 32) {
                u32 slot = row0 + m * 16 + i / WIDE, chunk = k0 * 2 + i % WIDE;
                bool there = slot < length && chunk < chunks;
                const char* from = there ? values.at(slot, arg.pages) + chunk * 16 : nullptr;
                copy_async(chunk_at(stage, i / WIDE, i % WIDE), from, there);
            }
            commit_copies();
            wait_copies<0>();
            __syncwarp();
#pragma unroll
            for (u32 k = k0; k < D / 16 && k < k0 + 8; ++k)
                load_matrices(a[m][k], chunk_at(stage, lane % 16, (k - k0) * 2 + lane / 16));
            __syncwarp();
        }

    // Of a thread's four rows, lane / 4 and every eighth from there: the sums of its columns in a block of channels.
    float block[4] = {};
    double* totals = sums + warp * 32 + lane / 4;
    if (lane % 4 == 0)
        for (u32 r = 0; r < 4; ++r) totals[r * 8] = 0.0;
    auto place = [&](u32 tile, u32 row, u32 chunk) { return ring[tile % 2] + row * ROW + (chunk ^ row % 8); };
    u32 head = share.head, channel = share.channel, before = 0;
    // Each step copies a tile and uses the one before.
    for (u32 step = 0; step <= share.tiles; ++step) {
        wait_copies<0>();
        __syncthreads();
        if (step < share.tiles) {
            constexpr u32 AT_ONCE = THREADS / ROW;
            u32 chunk = threadIdx.x % ROW, row = threadIdx.x / ROW;
            const char* from = reinterpret_cast<const char*>(w.weights) + (channel + row) * w.stride +
                               (head * chunks + chunk) * 16;
#pragma unroll
            for (u32 i = 0; i < TILE / AT_ONCE; ++i)
                if (chunk < D / 8)
                    copy_async(place(step, row + i * AT_ONCE, chunk), from + i * AT_ONCE * w.stride,
                               chunk < chunks && channel + row + i * AT_ONCE < w.hidden);
        }
        commit_copies();
        if (step > 0 && row0 < length) {
#pragma unroll 1
            for (u32 n0 = 0; n0 < TILE; n0 += 16) {
                float c[2][2][4] = {};
#pragma unroll
                for (u32 k = 0; k < D / 16; ++k) {
                    u32 b[4];
                    load_matrices(b, place(step - 1, n0 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
                    for (u32 m = 0; m < 2; ++m) {
                        T::multiply_add(c[m][0], a[m][k], b[0], b[1]);
                        T::multiply_add(c[m][1], a[m][k], b[2], b[3]);
                    }
                }
                // Past the last channel are zeros, which an infinite value would turn into NaN.
                if (before + n0 + 16 > w.hidden) {
#pragma unroll
                    for (u32 i = 0; i < 16; ++i)
                        if (before + n0 + i / 4 % 2 * 8 + lane % 4 * 2 + i % 2 >= w.hidden)
                            c[i / 8][i / 4 % 2][i % 4] = 0.0f;
                }
#pragma unroll
                for (u32 r = 0; r < 4; ++r) {
                    const float (&row)[2][4] = c[r / 2];
                    u32 e = r % 2 * 2;
                    block[r] += (fabsf(row[0][e]) + fabsf(row[0][e + 1])) + (fabsf(row[1][e]) + fabsf(row[1][e + 1]));
                }
            }
        }
        before = channel;
        channel += TILE;
        if (channel >= w.hidden) channel = 0, ++head;
        // The tile used was the last of its block: the one copied begins another.
        if (before % BLOCK == 0) {
#pragma unroll
            for (u32 r = 0; r < 4; ++r) {
                for (u32 other = 1; other <= 2; other *= 2) block[r] += __shfl_xor_sync(ALL_LANES, block[r], other);
                if (lane % 4 == 0) totals[r * 8] += block[r];
                block[r] = 0.0f;
            }
        }
    }
    finish<ROWS>(arg, w, sums, first);
}

// A thread has 8 x 8 products, rows and columns 16 apart; slabs of 16 columns stream through a ring of two, in rows of 20
// floats, so that eight rows at one place lie in different groups of four banks.
__device__ inline void value_norm_scalar(const Arguments& arg) {
    constexpr u32 ROWS = 128, SLAB = 16, ROW = SLAB + 4;
    __shared__ __align__(16) float ring[2][2][ROWS * ROW];
    __shared__ double sums[ROWS];
    __shared__ Share share;
    if (threadIdx.x == 0) share.take<ROWS>(arg.projections[blockIdx.y]);
    __syncthreads();
    const Projection& w = share.w;
    u32 length = arg.lengths[w.row], first = blockIdx.x * ROWS;
    if (first >= length) return;
    u32 column = threadIdx.x % 16, row = threadIdx.x / 16;
    const Rows values = arg.values[blockIdx.y];

    if (threadIdx.x < ROWS) sums[threadIdx.x] = 0.0;
    u32 head = share.head, channel = share.channel, before = 0;
    u32 slabs = (w.dim + SLAB - 1) / SLAB, slab = 0, steps = share.tiles * slabs;
    float c[8][8] = {};
    // Each step copies a slab and uses the one before.
    for (u32 step = 0; step <= steps; ++step) {
        wait_copies<0>();
        __syncthreads();
        if (step < steps) {
            u32 chunk = threadIdx.x % 4, at = slab * SLAB + chunk * 4;
#pragma unroll
            for (u32 i = threadIdx.x / 4; i < ROWS; i += THREADS / 4) {
                bool value = first + i < length && at < w.dim, weight = channel + i < w.hidden && at < w.dim;
                const char* from = value ? values.at(first + i, arg.pages) + at * 4 : nullptr;
                copy_async(&ring[step % 2][0][i * ROW + chunk * 4], from, value);
                from = reinterpret_cast<const char*>(w.weights) + (channel + i) * w.stride + (head * w.dim + at) * 4;
                copy_async(&ring[step % 2][1][i * ROW + chunk * 4], from, weight);
            }
        }
        commit_copies();
        if (step > 0) {
            const float (&used)[2][ROWS * ROW] = ring[(step - 1) % 2];
#pragma unroll 1
            for (u32 k = 0; k < SLAB; k += 4) {
                float4 a[8];
#pragma unroll
                for (u32 i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const float4*>(&used[0][(row + i * 16) * ROW + k]);
#pragma unroll
                for (u32 j = 0; j < 8; ++j) {
                    float4 b = *reinterpret_cast<const float4*>(&used[1][(column + j * 16) * ROW + k]);
#pragma unroll
                    for (u32 i = 0; i < 8; ++i) {
                        c[i][j] += a[i].x * b.x, c[i][j] += a[i].y * b.y;
                        c[i][j] += a[i].z * b.z, c[i][j] += a[i].w * b.w;
                    }
                }
            }
            // The slab used was the last of its tile: the one copied begins another.
            if (slab == 0) {
#pragma unroll
                for (u32 i = 0; i < 8; ++i) {
                    float sum = 0.0f;
#pragma unroll
                    for (u32 j = 0; j < 8; ++j) {
                        // Past the last channel are zeros, which an infinite value would turn into NaN.
                        sum += before + column + j * 16 < w.hidden ? fabsf(c[i][j]) : 0.0f;
                        c[i][j] = 0.0f;
                    }
                    for (u32 other = 1; other <= 8; other *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
                    if (column == 0) sums[row + i * 16] += sum;
                }
            }
        }
        if (++slab < slabs) continue;
        slab = 0;
        before = channel;
        channel += ROWS;
        if (channel >= w.hidden) channel = 0, ++head;
    }
    finish<ROWS>(arg, w, sums, first);
}

#define VALUE_NORM(NAME, BLOCKS, ...)                                                                                  \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)                                                      \
        value_norm_##NAME(const Rows* values, const u32* pages, const Projection* projections, const u32* lengths,     \
                          float* const* norms, double* partials, u32* arrivals) {                                      \
        __VA_ARGS__({values, pages, projections, lengths, norms, partials, arrivals});                                 \
    }

VALUE_NORM(bf16_64, 2, value_norm<Bf16, 64>)
VALUE_NORM(bf16_96, 2, value_norm<Bf16, 96>)
VALUE_NORM(bf16_128, 2, value_norm<Bf16, 128>)
VALUE_NORM(bf16_256, 1, value_norm<Bf16, 256>)
VALUE_NORM(f16_64, 2, value_norm<F16, 64>)
VALUE_NORM(f16_96, 2, value_norm<F16, 96>)
VALUE_NORM(f16_128, 2, value_norm<F16, 128>)
VALUE_NORM(f16_256, 1, value_norm<F16, 256>)
VALUE_NORM(f32, 1, value_norm_scalar)
