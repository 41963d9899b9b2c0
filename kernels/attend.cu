// Decode attention of the newest tokens over ragged segments, causal among themselves.
//
//   out[s][g][m] = softmax_j(scale * q[s][g][m] . k[s][j]) . v[s][j]  over j < lengths[s] - (queries - 1 - m)
//   lse[s][g][m] = ln sum_j exp(scale * q[s][g][m] . k[s][j]); zeros and -inf for a query that sees nothing
//
// Three launches, fixed whatever the lengths, so that a captured graph stays right while they grow:
//   attend_plan: cuts segments into items of `chunk` slots (a multiple of 64).          1 block of 1024 threads
//   attend_f32, or attend_mma_* of attend_mma.cu: an online softmax per item and row.   grid (any, row blocks)
//   attend_combine: merges the items of a row in their order.                           grid (rows), 128 threads
// Workspace: offsets u32 [segments + 1], items u32x2, stats f32x2 [items][group * queries], partials f32
// [items][group * queries][dim]. Blocks stride over the items; a result depends on `chunk`, not on the schedule.
//
// Cost: one read of K and V, and at 16 bits an intensity of `group` flop per byte, far below what any unit can do:
// a layer of 8 heads of 128 dims that keeps a fifth of 131 072 tokens has 107 MB, 32 us at an H100's bandwidth. Hence
// chunks of total / (4 * multiprocessors): every multiprocessor has work until nearly the end.
//
// attend_f32: a warp takes 8 keys of each tile and has a ring of its own, as in attend_mma.cu. A lane has the scores of
// one key and two rows, then four or eight dims of all 8 rows. Any dim that is a multiple of 4 up to 256; 128 threads,
// 64 beyond 128 dims; grid.y = ceil(group * queries / 8); 16 * (dim / 4 | 1) * (8 + 32 * warps) bytes of dynamic shared
// memory. Source: Flash-Decoding (FlashAttention's split-KV kernels); the plan is FlashMLA's.
// gates: attend_plan STG.E.64 SHFL.UP>=5
// gates: attend_f32 LDGSTS.E.BYPASS.128 LDS.128>=5 FFMA>=72 registers<=168
// gates: attend_combine LDG.E.128 MUFU.EX2 F2FP>=4
#include "attend.cuh"

// What the lanes up to this one hold, summed.
__device__ inline u32 warp_sums(u32 x) {
#pragma unroll
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 before = __shfl_up_sync(ALL_LANES, x, distance);
        if (lane_id() >= distance) x += before;
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(1024)
    attend_plan(const u32* lengths, u32* offsets, uint2* items, u32 segments, u32 chunk) {
    __shared__ u32 sums[32];
    u32 lane = lane_id(), warp = warp_id(), before = 0;
    for (u32 base = 0; base < segments; base += blockDim.x) {
        u32 segment = base + threadIdx.x;
        u32 mine = segment < segments ? (lengths[segment] + chunk - 1) / chunk : 0;
        u32 upto = warp_sums(mine);
        __syncthreads();
        if (lane == 31) sums[warp] = upto;
        __syncthreads();
        u32 warps = warp_sums(sums[lane]), earlier = __shfl_sync(ALL_LANES, warps, (warp + 31) % 32);
        u32 item = before + upto - mine + (warp > 0 ? earlier : 0);
        before += __shfl_sync(ALL_LANES, warps, 31);
        if (segment < segments) offsets[segment] = item;
#pragma unroll 1
        for (u32 i = 0; i < mine; ++i) items[item + i] = make_uint2(segment, i * chunk);
    }
    if (threadIdx.x == 0) offsets[segments] = before;
}

constexpr u32 KEYS = 8, ROWS = 8, QUADS = 256 / 4, COMBINE_THREADS = 128;

// Four f32 in shared memory. Rows are an odd number of quads long: neighbours begin in different groups of four banks.
__device__ inline float dot(float x, float4 a, float4 b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, x))));
}
__device__ inline void add(float4& o, float4 more, float weight) {
    o.x = fmaf(more.x, weight, o.x), o.y = fmaf(more.y, weight, o.y);
    o.z = fmaf(more.z, weight, o.z), o.w = fmaf(more.w, weight, o.w);
}
__device__ inline float4 scaled(float4 o, float factor) {
    return make_float4(o.x * factor, o.y * factor, o.z * factor, o.w * factor);
}

__device__ inline void all_rows(float (&x)[ROWS], const float4* from) {
    float4 low = from[0], high = from[1];
    x[0] = low.x, x[1] = low.y, x[2] = low.z, x[3] = low.w, x[4] = high.x, x[5] = high.y, x[6] = high.z, x[7] = high.w;
}

extern "C" __global__ void __launch_bounds__(128) attend_f32(WORK_PARAMETERS) {
    Work work = WORK;
    scale *= LOG2_E;
    // Queries, then for each warp two stages of 8 keys and 8 values, then weights of 8 keys and factors of the rows.
    extern __shared__ float4 shared[];
    __shared__ __align__(16) float weights[4][(KEYS + 1) * ROWS];
    u32 lane = lane_id(), warp = warp_id(), warps = blockDim.x / 32;
    u32 quads = dim / 4, pitch = quads | 1, stage_size = 2 * KEYS * pitch, tile_keys = KEYS * warps;
    float4 *ring = shared + ROWS * pitch, *mine = ring + warp * 2 * stage_size;
    u32 items_end = offsets[segments];

    for (u32 index = blockIdx.x; index < items_end; index += gridDim.x) {
        Item item(work, index, ROWS);
        if (item.end <= item.first) continue;
        // The last item's partial outputs have been read.
        __syncthreads();
        for (u32 r = warp; r < ROWS; r += warps) {
            const char* query = item.query(work, r);
            for (u32 c = lane; c < quads; c += 32) copy_async(shared + r * pitch + c, query + c * 16, r < item.rows);
        }
        auto fetch = [&](u32 tile) {
            float4* stage = mine + tile % 2 * stage_size;
            u32 first = item.first + tile * tile_keys + warp * KEYS;
            const Rows* rows = lane % 16 < KEYS ? k : v;
            u64 row = reinterpret_cast<u64>(rows[item.segment].at(min(first + lane % KEYS, item.end - 1), pages));
            for (u32 r = 0; r < 2 * KEYS; ++r) {
                const char* from = reinterpret_cast<const char*>(__shfl_sync(ALL_LANES, row, r));
                // Zeros past the end: 0 * NaN would be NaN.
                for (u32 c = lane; c - lane < quads; c += 32)
                    if (c < quads) copy_async(stage + r * pitch + c, from + c * 16, first + r % KEYS < item.end);
            }
        };
        u32 tiles = (item.end - item.first + tile_keys - 1) / tile_keys;
        for (u32 tile = 0; tile < 2; ++tile) {
            if (tile < tiles) fetch(tile);
            commit_copies();
        }
        // All queries are there.
        wait_copies<1>();
        __syncthreads();
        // A lane has the scores of one key and two rows, lane / 8 and four below it; later two quads of all rows.
        u32 key = lane % KEYS, row = lane / KEYS;
        u32 bound[2] = {item.bound(work, row), item.bound(work, row + 4)};
        float maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {};
        float4 o[ROWS][2] = {};
        float* mine_weights = weights[warp];
        for (u32 tile = 0; tile < tiles; ++tile) {
            const float4* stage = mine + tile % 2 * stage_size;
            wait_copies<1>();
            __syncwarp();
            float x[2] = {};
#pragma unroll 2
            for (u32 c = 0; c < quads; ++c) {
                float4 k4 = stage[key * pitch + c];
                x[0] = dot(x[0], shared[row * pitch + c], k4);
                x[1] = dot(x[1], shared[(row + 4) * pitch + c], k4);
            }
            u32 slot = item.first + tile * tile_keys + warp * KEYS + key;
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                float score = slot < bound[r] ? x[r] * scale : -INFINITE, greater = score;
#pragma unroll
                for (u32 distance = 1; distance < KEYS; distance *= 2)
                    greater = fmaxf(greater, __shfl_xor_sync(ALL_LANES, greater, distance));
                greater = fmaxf(greater, maximum[r]);
                // Nothing but -inf so far: subtracting it would be NaN.
                float subtract = greater == -INFINITE ? 0.0f : greater;
                float shrink = exp2_approx(maximum[r] - subtract), weight = exp2_approx(score - subtract);
                maximum[r] = greater;
                sum[r] = sum[r] * shrink + weight;
                mine_weights[key * ROWS + row + r * 4] = weight;
                if (key == 0) mine_weights[KEYS * ROWS + row + r * 4] = shrink;
            }
            __syncwarp();
            const float4* of = reinterpret_cast<const float4*>(mine_weights);
            float factors[ROWS];
            all_rows(factors, of + KEYS * 2);
#pragma unroll
            for (u32 r = 0; r < ROWS; ++r) {
                o[r][0] = scaled(o[r][0], factors[r]);
                o[r][1] = scaled(o[r][1], factors[r]);
            }
#pragma unroll 2
            for (u32 k = 0; k < KEYS; ++k) {
                const float4* value = stage + (KEYS + k) * pitch;
                float4 v0 = {}, v1 = {};
                if (lane < quads) v0 = value[lane];
                if (lane + 32 < quads) v1 = value[lane + 32];
                all_rows(factors, of + k * 2);
#pragma unroll
                for (u32 r = 0; r < ROWS; ++r) add(o[r][0], v0, factors[r]), add(o[r][1], v1, factors[r]);
            }
            // All lanes have read before any refills.
            __syncwarp();
            if (tile + 2 < tiles) fetch(tile + 2);
            commit_copies();
        }
        wait_copies<0>();
        __syncthreads();

        float2* row_stats = reinterpret_cast<float2*>(ring + warps * ROWS * pitch);
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
#pragma unroll
            for (u32 distance = 1; distance < KEYS; distance *= 2)
                sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], distance);
            if (key == 0) row_stats[warp * ROWS + row + r * 4] = make_float2(maximum[r], sum[r]);
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; ++r)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                if (lane + i * 32 < quads) ring[(warp * ROWS + r) * pitch + lane + i * 32] = o[r][i];
        __syncthreads();
        merge_warps(work, item, reinterpret_cast<const float*>(ring), row_stats, ROWS, pitch * 4, 1.0f);
    }
}

__device__ inline float reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// An element of a row of whatever type.
__device__ inline float element(const char* row, u32 d, u32 dtype) {
    if (dtype == 0) return reinterpret_cast<const float*>(row)[d];
    u32 bits = reinterpret_cast<const u16*>(row)[d];
    if (dtype == 2) return __uint_as_float(bits << 16);
    float x;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(x) : "r"(bits));
    return x;
}

// Maximum, sum and weighted values of a row: of a chunk, of some slots, of all.
struct Part {
    float maximum, sum;
};

// The row once more, from the slots that it sees and no others: small code for what is rare.
__device__ inline Part attend_exactly(const Work& work, u32 segment, const char* query, u32 seen, u32 dtype,
                                      float* out) {
    __shared__ float scratch[32], weights[COMBINE_THREADS];
    Part all = {-INFINITE, 0.0f};
#pragma unroll 1
    for (u32 d = threadIdx.x; d < work.dim; d += COMBINE_THREADS) out[d] = 0.0f;
    for (u32 base = 0; base < seen; base += COMBINE_THREADS) {
        u32 slot = base + threadIdx.x, slots = min(COMBINE_THREADS, seen - base);
        float x = -INFINITE;
        if (slot < seen) {
            const char* key = work.k[segment].at(slot, work.pages);
            x = 0.0f;
#pragma unroll 1
            for (u32 d = 0; d < work.dim; ++d) x = fmaf(element(query, d, dtype), element(key, d, dtype), x);
            x *= work.scale;
        }
        float greater = fmaxf(all.maximum, block_reduce<Max>(x, scratch));
        float subtract = greater == -INFINITE ? 0.0f : greater;
        float shrink = exp2_approx(all.maximum - subtract), weight = slot < seen ? exp2_approx(x - subtract) : 0.0f;
        all.maximum = greater, all.sum = all.sum * shrink + block_reduce<Sum>(weight, scratch);
        weights[threadIdx.x] = weight;
        __syncthreads();
#pragma unroll 1
        for (u32 d = threadIdx.x; d < work.dim; d += COMBINE_THREADS) {
            float o = out[d] * shrink;
#pragma unroll 1
            for (u32 i = 0; i < slots; ++i)
                o = fmaf(weights[i], element(work.v[segment].at(base + i, work.pages), d, dtype), o);
            out[d] = o;
        }
    }
    __syncthreads();
    return all;
}

// partials and stats are those of `work`; a block has a row.
extern "C" __global__ void __launch_bounds__(COMBINE_THREADS)
    attend_combine(WORK_PARAMETERS, const Rows* out, float* const* lse, u32 dtype, u32 out_dtype) {
    constexpr u32 WARPS = COMBINE_THREADS / 32;
    __shared__ __align__(16) float sums[WARPS][QUADS * 4];
    Work work = WORK;
    work.scale *= LOG2_E;
    u32 rows = group * queries, segment = blockIdx.x / rows, row = blockIdx.x % rows;
    u32 head = segment * group + row % group, query = row / group;
    u32 lane = lane_id(), warp = warp_id(), quads = dim / 4;
    u32 seen = work.seen(lengths[segment], row), splits = (seen + chunk - 1) / chunk;
    u64 first = (u64)offsets[segment] * rows + row;

    Part all = {-INFINITE, 0.0f};
    for (u32 s = lane; s - lane < splits; s += 32)
        if (s < splits) all.maximum = fmaxf(all.maximum, stats[first + (u64)s * rows].x);
    all.maximum = warp_reduce<Max>(all.maximum);
    // Nothing but -inf: subtracting it would be NaN.
    float subtract = all.maximum == -INFINITE ? 0.0f : all.maximum;
    for (u32 s = lane; s - lane < splits; s += 32) {
        float2 part = s < splits ? stats[first + (u64)s * rows] : make_float2(-INFINITE, 0.0f);
        all.sum += part.y * exp2_approx(part.x - subtract);
    }
    all.sum = warp_reduce<Sum>(all.sum);
    float4 sum[2] = {};
    for (u32 s = warp; s < splits; s += WARPS) {
        u64 split = first + (u64)s * rows;
        float weight = exp2_approx(stats[split].x - subtract);
        const float4* from = reinterpret_cast<const float4*>(partials + split * dim);
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            if (lane + i * 32 < quads) add(sum[i], from[lane + i * 32], weight);
    }
    float4(*merged)[QUADS] = reinterpret_cast<float4(*)[QUADS]>(sums);
    bool finite = true;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        float4 x = scaled(sum[i], 0.0f);
        finite &= x.x + x.y + x.z + x.w == 0.0f;
        merged[warp][lane + i * 32] = sum[i];
    }
    // A NaN or an infinity in a value that the row does not see has met a weight of zero, and one that it sees may have
    // met the terms of a weight, one of them zero.
    u32 parts = WARPS;
    if (!__syncthreads_and(finite)) {
        all = attend_exactly(work, segment, q[head].at(query, pages), seen, dtype, sums[0]);
        parts = 1;
    }

    if (threadIdx.x < quads) {
        float norm = seen > 0 ? reciprocal(all.sum) : 0.0f;
        float4 o = {};
        for (u32 w = 0; w < parts; ++w) add(o, merged[w][threadIdx.x], 1.0f);
        o = scaled(o, norm);
        char* to = const_cast<char*>(out[head].at(query, pages));
        uint2* words = reinterpret_cast<uint2*>(to) + threadIdx.x;
        if (out_dtype == 0) reinterpret_cast<float4*>(to)[threadIdx.x] = o;
        if (out_dtype == 1) *words = make_uint2(F16::pack(o.x, o.y), F16::pack(o.z, o.w));
        if (out_dtype == 2) *words = make_uint2(Bf16::pack(o.x, o.y), Bf16::pack(o.z, o.w));
    }
    if (lse != nullptr && threadIdx.x == 0) {
        float total = all.maximum * (1.0f / LOG2_E) + logf(all.sum);
        // Nothing seen; logits that all are -inf have no distribution.
        if (all.sum == 0.0f) total = seen > 0 ? __int_as_float(0x7fc00000) : -INFINITE;
        lse[head][query] = total;
    }
}
