// Decode attention of the newest token over ragged segments.
//
//   out[s][g] = softmax_j(scale * q[s][g] . k[s][j]) . v[s][j], zeros for an empty segment
//
// q and out are 16-bit [segments][group][128], group <= 16; keys and values are rows of 128 elements, `row_stride`
// elements apart, 16-byte aligned. Launches: attend_* on grid (ceil(longest / chunk), segments), 128 threads, 65 536
// bytes of dynamic shared memory, chunk % 64 == 0; then attend_combine_* on grid (group, segments), 64 threads.
// `partials` f32 [segments][grid.x][group][128], `stats` f32x2 [segments][grid.x][group].
//
// A warp takes 16 keys of each tile of 64 and shares nothing with the others until the end: its ring is its own, so the
// loop has no block barrier. Queries are padded to the 16 rows of an mma. Splits are of fixed size and merged in order:
// the result depends on `chunk`, not on the schedule. Source: Flash-Decoding (FlashAttention's split-KV kernels).
// gates: attend_bf16 HMMA.16816.F32.BF16==32 LDSM.16.M88.4==16 LDSM.16.MT88.4==8 LDGSTS.E.BYPASS.128 registers<=168
// gates: attend_combine_* LDG.E.64 STG.E
// gates: attend_f16 HMMA.16816.F32==32 LDSM.16.M88.4==16 LDSM.16.MT88.4==8 LDGSTS.E.BYPASS.128 registers<=168
#include "device.cuh"

struct Segment {
    i64 rows; // first element of its keys, and of its values
    u32 length;
    u32 unused;
};
constexpr u32 KEYS = 16, WARPS = 4, TILE = KEYS * WARPS;
// A row of partial outputs in shared memory, padded so that the rows of a quad fall into different banks.
constexpr u32 PADDED = DIM + 8;

template <class T>
__device__ inline void attend(const u16* queries, const u16* keys, const u16* values, const Segment* segments,
                              float* partials, float2* stats, i64 row_stride, i32 group, i32 chunk, float scale) {
    extern __shared__ uint4 ring[];
    Segment segment = segments[blockIdx.y];
    u32 first = blockIdx.x * chunk, end = min(first + chunk, segment.length);
    if (first >= segment.length) return;
    u32 lane = lane_id(), warp = warp_id();
    // Two stages of 16 keys and 16 values.
    uint4* mine = ring + warp * 4 * KEYS * CHUNKS;
    scale *= LOG2_E;

    const u16* query = queries + (i64)blockIdx.y * group * DIM;
    for (u32 i = lane; i < KEYS * CHUNKS; i += 32)
        copy_async(chunk_at(mine, i / CHUNKS, i % CHUNKS), query + i * 8, i / CHUNKS < group);
    commit_copies();
    wait_copies<0>();
    __syncwarp();
    u32 q[8][4];
#pragma unroll
    for (u32 k = 0; k < 8; ++k) load_matrices(q[k], chunk_at(mine, lane % 16, k * 2 + lane / 16));
    __syncwarp();

    keys += segment.rows, values += segment.rows;
    auto fetch = [&](u32 tile) {
        uint4* stage = mine + tile % 2 * 2 * KEYS * CHUNKS;
        for (u32 i = lane; i < KEYS * CHUNKS; i += 32) {
            u32 row = i / CHUNKS, key = first + tile * TILE + warp * KEYS + row;
            i64 from = key * row_stride + i % CHUNKS * 8;
            // Zeros past the end: 0 * NaN would be NaN.
            copy_async(chunk_at(stage, row, i % CHUNKS), keys + from, key < end);
            copy_async(chunk_at(stage + KEYS * CHUNKS, row, i % CHUNKS), values + from, key < end);
        }
    };
    // Of the thread's two rows, lane / 4 and eight below it.
    float maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {}, o[16][4] = {};
    u32 tiles = (end - first + TILE - 1) / TILE;
    fetch(0);
    commit_copies();
    if (tiles > 1) fetch(1);
    commit_copies();
    for (u32 tile = 0; tile < tiles; ++tile) {
        uint4* stage = mine + tile % 2 * 2 * KEYS * CHUNKS;
        wait_copies<1>();
        __syncwarp();
        float x[2][4] = {};
#pragma unroll
        for (u32 k = 0; k < 8; ++k) {
            u32 b[4];
            load_matrices(b, chunk_at(stage, lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
            T::multiply_add(x[0], q[k], b[0], b[1]);
            T::multiply_add(x[1], q[k], b[2], b[3]);
        }
        u32 key0 = first + tile * TILE + warp * KEYS + lane % 4 * 2;
        float shrink[2];
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            float greater = maximum[r];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float& score = x[i / 2][2 * r + i % 2];
                score = key0 + i / 2 * 8 + i % 2 < end ? score * scale : -INFINITE;
                greater = fmaxf(greater, score);
            }
            greater = fmaxf(greater, __shfl_xor_sync(ALL_LANES, greater, 1));
            greater = fmaxf(greater, __shfl_xor_sync(ALL_LANES, greater, 2));
            // Nothing but -inf so far: subtracting it would be NaN.
            float subtract = greater == -INFINITE ? 0.0f : greater;
            shrink[r] = exp2_approx(maximum[r] - subtract);
            maximum[r] = greater;
            sum[r] *= shrink[r];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float& score = x[i / 2][2 * r + i % 2];
                score = exp2_approx(score - subtract);
                sum[r] += score;
            }
        }
        // Sums of two key groups are laid out as the left operand of the next product.
        u32 p[4] = {T::pack(x[0][0], x[0][1]), T::pack(x[0][2], x[0][3]), T::pack(x[1][0], x[1][1]),
                    T::pack(x[1][2], x[1][3])};
#pragma unroll
        for (u32 n = 0; n < 16; n += 2) {
            u32 b[4];
            load_matrices_transposed(b, chunk_at(stage + KEYS * CHUNKS, lane % 16, n + lane / 16));
#pragma unroll
            for (u32 e = 0; e < 4; ++e) o[n][e] *= shrink[e / 2], o[n + 1][e] *= shrink[e / 2];
            T::multiply_add(o[n], p, b[0], b[1]);
            T::multiply_add(o[n + 1], p, b[2], b[3]);
        }
        // All lanes have read before any refills.
        __syncwarp();
        if (tile + 2 < tiles) fetch(tile + 2);
        commit_copies();
    }
    wait_copies<0>();
    __syncthreads();

    // The four warps become one, in order.
    float* rows = reinterpret_cast<float*>(ring);
    float2* row_stats = reinterpret_cast<float2*>(rows + WARPS * 16 * PADDED);
#pragma unroll
    for (u32 r = 0; r < 2; ++r) {
        u32 row = warp * 16 + r * 8 + lane / 4;
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 1);
        sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 2);
        if (lane % 4 == 0) row_stats[row] = make_float2(maximum[r], sum[r]);
#pragma unroll
        for (u32 n = 0; n < 16; ++n)
            *reinterpret_cast<float2*>(rows + row * PADDED + n * 8 + lane % 4 * 2) =
                make_float2(o[n][2 * r], o[n][2 * r + 1]);
    }
    __syncthreads();
    i64 item = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * group;
    for (u32 row = 0; row < group; ++row) {
        float greatest = -INFINITE, total = 0.0f, out = 0.0f;
        for (u32 w = 0; w < WARPS; ++w) greatest = fmaxf(greatest, row_stats[w * 16 + row].x);
        for (u32 w = 0; w < WARPS; ++w) {
            float2 part = row_stats[w * 16 + row];
            float weight = part.x == -INFINITE ? 0.0f : exp2_approx(part.x - greatest);
            total += part.y * weight;
            out += rows[(w * 16 + row) * PADDED + threadIdx.x] * weight;
        }
        partials[(item + row) * DIM + threadIdx.x] = out;
        if (threadIdx.x == 0) stats[item + row] = make_float2(greatest, total);
    }
}

// A thread owns two neighbouring elements of one output row.
template <class T>
__device__ inline void combine(const float* partials, const float2* stats, const Segment* segments, u32* out,
                               i32 splits, i32 chunk) {
    u32 group = gridDim.x, row = blockIdx.x, length = segments[blockIdx.y].length;
    u32 live = (length + chunk - 1) / chunk;
    i64 item = (i64)blockIdx.y * splits * group + row;
    float greatest = -INFINITE, total = 0.0f;
    float2 sum = make_float2(0.0f, 0.0f);
    for (u32 split = 0; split < live; ++split) greatest = fmaxf(greatest, stats[item + split * group].x);
    for (u32 split = 0; split < live; ++split) {
        float2 part = stats[item + split * group];
        float weight = part.x == -INFINITE ? 0.0f : exp2_approx(part.x - greatest);
        float2 o = reinterpret_cast<const float2*>(partials + (item + split * group) * DIM)[threadIdx.x];
        total += part.y * weight, sum.x += o.x * weight, sum.y += o.y * weight;
    }
    float norm = total > 0.0f ? 1.0f / total : 0.0f;
    out[((i64)blockIdx.y * group + row) * (DIM / 2) + threadIdx.x] = T::pack(sum.x * norm, sum.y * norm);
}

#define ATTEND(NAME, TYPE)                                                                                             \
    extern "C" __global__ void __launch_bounds__(128)                                                                  \
        attend_##NAME(const u16* queries, const u16* keys, const u16* values, const Segment* segments,                 \
                      float* partials, float2* stats, i64 row_stride, i32 group, i32 chunk, float scale) {             \
        attend<TYPE>(queries, keys, values, segments, partials, stats, row_stride, group, chunk, scale);               \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(64)                                                                   \
        attend_combine_##NAME(const float* partials, const float2* stats, const Segment* segments, u32* out,           \
                              i32 splits, i32 chunk) {                                                                 \
        combine<TYPE>(partials, stats, segments, out, splits, chunk);                                                  \
    }

ATTEND(bf16, Bf16)
ATTEND(f16, F16)
