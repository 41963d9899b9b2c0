// Attention of the last queries over all keys: scores, their log-sum-exp, and the sum of probabilities per key.
//
//   x[s][r][j] = scale * q[s][r] . k[s][j], -inf where key j comes after query r: j > lengths[s] - window + r % window
//   window_attention_scores_*: scores[s][r][j] = x                          f32 [segments][rows][stride]
//   window_attention_lse_*:    lse[s][r] = ln sum_j exp(x)                  f32 [segments][rows]
//   window_attention_sum_*:    sums[s][j] = weight * sum_r exp(x - lse)     f32 [segments][stride]
//
// q is 16-bit [segments][rows][128], rows = group * window <= 128; keys are rows of 128 elements, `row_stride` elements
// apart, 16-byte aligned. Launch: grid (ceil(longest / chunk), segments), 32 * ceil(rows / 32) threads; chunk % 64 == 0.
// scores: stride % 8 == 0, so that a quad writes a whole sector. lse: `partials` f32x2 [segments][grid.x][rows],
// `arrivals` u32 [segments], zero before the first launch and after each.
//
// A warp holds 32 query rows in registers; tiles of 64 keys stream through a ring of two in shared memory, swizzled, and
// are read by all warps. Chunks are merged in their order by the block that ends last, warps in theirs: the result
// depends on `chunk`, not on the schedule. Source: FlashAttention-2 (arXiv 2307.08691) for the skeleton.
// gates: window_attention_* HMMA.16816.F32==128 LDSM.16.M88.4==48 LDGSTS.E.BYPASS.128 !U16 registers<=215
// gates: window_attention_lse_* MUFU.EX2
// gates: window_attention_sum_* MUFU.EX2==64
#include "device.cuh"

struct Segment {
    i64 keys; // first element
    u32 length;
    u32 unused;
};
constexpr u32 KEYS = 64, MAX_WARPS = 4;
enum Mode { SCORES, LSE, SUM };

struct Arguments {
    const u16 *queries, *keys;
    const Segment* segments;
    float* out;
    const float* lse;
    float2* partials;
    u32* arrivals;
    i64 row_stride, stride;
    i32 rows, window, chunk;
    float scale, weight;
};

// Sum and maximum of 2^x of one query row; two of them merge.
__device__ inline void merge(float& maximum, float& sum, float other_maximum, float other_sum) {
    float greater = fmaxf(maximum, other_maximum);
    if (greater == -INFINITE) return;
    sum = sum * exp2_approx(maximum - greater) + other_sum * exp2_approx(other_maximum - greater);
    maximum = greater;
}

// Adds the halves of pairs of lanes: lanes with bit 2 * HALF keep the upper HALF of the columns, their partners the lower.
template <u32 HALF> __device__ inline void keep_half(float (&p)[16]) {
    bool upper = lane_id() & (2 * HALF);
#pragma unroll
    for (u32 i = 0; i < HALF; ++i) {
        float other = __shfl_xor_sync(ALL_LANES, upper ? p[i] : p[i + HALF], 2 * HALF);
        p[i] = (upper ? p[i + HALF] : p[i]) + other;
    }
}

template <class T, Mode MODE> __device__ inline void window_attention(const Arguments& arg) {
    __shared__ uint4 ring[2][KEYS * CHUNKS];
    __shared__ float columns[MAX_WARPS][KEYS];
    Segment segment = arg.segments[blockIdx.y];
    u32 first = blockIdx.x * arg.chunk, end = min(first + arg.chunk, segment.length), rows = arg.rows;
    if (first >= segment.length) return;
    u32 lane = lane_id(), warp = warp_id();

    // The queries pass through the ring once, to become fragments.
    const u16* queries = arg.queries + (i64)blockIdx.y * rows * DIM;
    for (u32 i = threadIdx.x; i < blockDim.x * CHUNKS; i += blockDim.x) {
        u32 row = i / CHUNKS, chunk = i % CHUNKS;
        copy_async(chunk_at(ring[0], row, chunk), queries + row * DIM + chunk * 8, row < rows);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    u32 a[2][8][4];
#pragma unroll
    for (u32 m = 0; m < 2; ++m)
#pragma unroll
        for (u32 k = 0; k < 8; ++k)
            load_matrices(a[m][k], chunk_at(ring[0], warp * 32 + m * 16 + lane % 16, k * 2 + lane / 16));
    __syncthreads();

    // Of a thread's four rows (lane / 4 and every eighth from there): the last key each sees, and its statistics.
    u32 last[4];
    float maximum[4], sum[4];
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
        u32 row = warp * 32 + r * 8 + lane / 4;
        last[r] = segment.length - arg.window + row % arg.window;
        if (MODE == SUM) maximum[r] = row < rows ? arg.lse[(i64)blockIdx.y * rows + row] * LOG2_E : INFINITE;
        else maximum[r] = -INFINITE, sum[r] = 0.0f;
    }
    float scale = MODE == SCORES ? arg.scale : arg.scale * LOG2_E;

    const u16* keys = arg.keys + segment.keys;
    auto fetch = [&](u32 tile) {
        u32 chunk = threadIdx.x % CHUNKS, key0 = first + tile * KEYS;
#pragma unroll 4
        for (u32 row = threadIdx.x / CHUNKS; row < KEYS; row += blockDim.x / CHUNKS)
            copy_async(chunk_at(ring[tile % 2], row, chunk), keys + (key0 + row) * arg.row_stride + chunk * 8,
                       key0 + row < end);
    };
    u32 tiles = (end - first + KEYS - 1) / KEYS;
    fetch(0);
    commit_copies();
    if (tiles > 1) fetch(1);
    commit_copies();
    for (u32 tile = 0; tile < tiles; ++tile) {
        wait_copies<1>();
        __syncthreads();
        float c[2][8][4] = {};
#pragma unroll
        for (u32 k = 0; k < 8; ++k) {
#pragma unroll
            for (u32 n = 0; n < 8; n += 2) {
                u32 b[4];
                load_matrices(b, chunk_at(ring[tile % 2], n * 8 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
#pragma unroll
                for (u32 m = 0; m < 2; ++m) {
                    T::multiply_add(c[m][n], a[m][k], b[0], b[1]);
                    T::multiply_add(c[m][n + 1], a[m][k], b[2], b[3]);
                }
            }
        }
        // Element e of fragment (m, n): row r = 2 * m + e / 2 of the thread's four, key n * 8 + 2 * (lane % 4) + e % 2.
        u32 key0 = first + tile * KEYS + lane % 4 * 2;
#pragma unroll
        for (u32 m = 0; m < 2; ++m)
#pragma unroll
            for (u32 n = 0; n < 8; ++n)
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    u32 key = key0 + n * 8 + e % 2, r = 2 * m + e / 2;
                    c[m][n][e] = key < end && key <= last[r] ? c[m][n][e] * scale : -INFINITE;
                }

        if (MODE == SCORES) {
            bool whole = first + (tile + 1) * KEYS <= end;
#pragma unroll
            for (u32 r = 0; r < 4; ++r) {
                u32 row = warp * 32 + r * 8 + lane / 4;
                float* out = arg.out + ((i64)blockIdx.y * rows + row) * arg.stride;
                if (row >= rows) continue;
#pragma unroll
                for (u32 n = 0; n < 8; ++n) {
                    float x = c[r / 2][n][r % 2 * 2], y = c[r / 2][n][r % 2 * 2 + 1];
                    u32 key = key0 + n * 8;
                    if (whole) {
                        *reinterpret_cast<float2*>(out + key) = make_float2(x, y);
                    } else {
                        if (key < end) out[key] = x;
                        if (key + 1 < end) out[key + 1] = y;
                    }
                }
            }
        }
        if (MODE == LSE) {
#pragma unroll
            for (u32 r = 0; r < 4; ++r) {
                float greater = -INFINITE, more = 0.0f;
#pragma unroll
                for (u32 i = 0; i < 16; ++i) greater = fmaxf(greater, c[r / 2][i / 2][r % 2 * 2 + i % 2]);
                if (greater == -INFINITE) continue;
                greater = fmaxf(greater, maximum[r]);
#pragma unroll
                for (u32 i = 0; i < 16; ++i) more += exp2_approx(c[r / 2][i / 2][r % 2 * 2 + i % 2] - greater);
                sum[r] = sum[r] * exp2_approx(maximum[r] - greater) + more;
                maximum[r] = greater;
            }
        }
        if (MODE == SUM) {
            // Over the thread's four rows, then over the eight lanes that share its columns: each step halves the
            // columns that a lane keeps, 14 shuffles instead of 48.
            float p[16];
#pragma unroll
            for (u32 i = 0; i < 16; ++i) {
                p[i] = 0.0f;
#pragma unroll
                for (u32 r = 0; r < 4; ++r) p[i] += exp2_approx(c[r / 2][i / 2][r % 2 * 2 + i % 2] - maximum[r]);
            }
            keep_half<8>(p), keep_half<4>(p), keep_half<2>(p);
            // Lane bits 4, 3 and 2 chose bits 3, 2 and 1 of the column's index i.
            *reinterpret_cast<float2*>(&columns[warp][lane / 4 * 8 + lane % 4 * 2]) = make_float2(p[0], p[1]);
        }
        __syncthreads();
        if (MODE == SUM) {
            for (u32 i = threadIdx.x; i < KEYS && first + tile * KEYS + i < end; i += blockDim.x) {
                float total = 0.0f;
                for (u32 w = 0; w < blockDim.x / 32; ++w) total += columns[w][i];
                arg.out[blockIdx.y * arg.stride + first + tile * KEYS + i] = total * arg.weight;
            }
        }
        if (tile + 2 < tiles) fetch(tile + 2);
        commit_copies();
    }

    if (MODE == LSE) {
        u32 chunks = (segment.length + arg.chunk - 1) / arg.chunk;
        float2* partials = arg.partials + (i64)blockIdx.y * gridDim.x * rows;
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            for (u32 other = 1; other <= 2; other *= 2)
                merge(maximum[r], sum[r], __shfl_xor_sync(ALL_LANES, maximum[r], other),
                      __shfl_xor_sync(ALL_LANES, sum[r], other));
            u32 row = warp * 32 + r * 8 + lane / 4;
            if (lane % 4 == 0 && row < rows) partials[blockIdx.x * rows + row] = make_float2(maximum[r], sum[r]);
        }
        if (!last_to_arrive(arg.arrivals + blockIdx.y, chunks)) return;
        if (threadIdx.x < rows) {
            float all = -INFINITE, total = 0.0f;
            for (u32 chunk = 0; chunk < chunks; ++chunk) {
                float2 part = partials[chunk * rows + threadIdx.x];
                merge(all, total, part.x, part.y);
            }
            arg.out[(i64)blockIdx.y * rows + threadIdx.x] = (all + log2f(total)) / LOG2_E;
        }
    }
}

#define WINDOW_ATTENTION(NAME, TYPE)                                                                                   \
    extern "C" __global__ void __launch_bounds__(128) window_attention_scores_##NAME(                                  \
        const u16* queries, const u16* keys, const Segment* segments, float* scores, i64 row_stride, i64 stride,       \
        i32 rows, i32 window, i32 chunk, float scale) {                                                                \
        window_attention<TYPE, SCORES>({queries, keys, segments, scores, nullptr, nullptr, nullptr, row_stride,        \
                                        stride, rows, window, chunk, scale, 1.0f});                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) window_attention_lse_##NAME(                                     \
        const u16* queries, const u16* keys, const Segment* segments, float* lse, float2* partials, u32* arrivals,     \
        i64 row_stride, i32 rows, i32 window, i32 chunk, float scale) {                                                \
        window_attention<TYPE, LSE>({queries, keys, segments, lse, nullptr, partials, arrivals, row_stride, 0, rows,   \
                                     window, chunk, scale, 1.0f});                                                     \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(128) window_attention_sum_##NAME(                                     \
        const u16* queries, const u16* keys, const Segment* segments, float* sums, const float* lse, i64 row_stride,   \
        i64 stride, i32 rows, i32 window, i32 chunk, float scale, float weight) {                                      \
        window_attention<TYPE, SUM>({queries, keys, segments, sums, lse, nullptr, nullptr, row_stride, stride, rows,   \
                                     window, chunk, scale, weight});                                                   \
    }

WINDOW_ATTENTION(bf16, Bf16)
WINDOW_ATTENTION(f16, F16)
