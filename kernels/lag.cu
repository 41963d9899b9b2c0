// LagKV: how much a slot's key and value vary over their channels, scaled by the range of the partition that follows.
//
//   low, range[d] = least of x[s][d], greatest minus least, over the slots s of partition p + 1
//   z[t][d]       = (x[t][d] - low[d]) / range[d], a channel without range counts as 0          slots t of partition p
//   v[t]          = softmax over t of the unbiased standard deviation of z[t] over d            for keys and for values
//   score[t]      = (v of the key + v of the value) / 2;   rank of it in the partition / lag, unless `cross`
//   out[r][t]     = score[t];   1 for sinks and from the last full partition on
//
// Row r of `out` has lengths[r] slots; partitions of `lag` slots start after the sinks. A row too short for the sinks and
// two partitions has 1 for the sinks, and after them a ramp from 0 towards 1. Heads: those of the keys, then as many of
// the values; x has D numbers in `chunks` times 16 bytes, D <= 256.
//
// Launch: grid (most scored partitions of a row + 1, rows), 256 threads, 4 (2 D + max(16 D, 32 (W + 8))) bytes of dynamic
// shared memory with W = D rounded up to 32. `scratch` f64: of row r at starts[r], twice the slots of its scored
// partitions. Block x scores partition x; the one after the last scored writes what is not scored.
//
// A block reads the next partition, then its own, which the block before reads at about the same time: one read of
// memory, two of the L2. Eight lanes own a row, as in key_scores.cu. Deviations, softmaxes and ranks are f64, since
// ranks make near ties visible, and each row's sums run as in the CPU backend: lane l adds the channels l, l + 8, ... in
// order, then the lanes are added in theirs. Nothing is fused. Equal rows thus tie on both, and the earlier slot wins.
// Source: LagKV (arXiv 2504.04704) as kvpress has it.
// gates: lag_* LDG.E.128>=2 DADD DMUL LDS STS.128 FMNMX.NAN registers<=80
#include "device.cuh"

// Rows of a warp's load.
constexpr u32 GROUP = 4, WARPS = 8;

// NaN stays.
__device__ inline float least(float a, float b) {
    float x;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}
__device__ inline float greatest(float a, float b) {
    float x;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(x) : "f"(a), "f"(b));
    return x;
}

template <class Chunk> struct Partition {
    static constexpr int COUNT = Chunk::COUNT;
    u32 chunks, dim, width;
    // Extremes by warp [WARPS][2][dim]; then, in their place, rows of each warp [GROUP][width].
    float *lows, *ranges, *room;

    __device__ Partition(u32 chunks, float* shared)
        : chunks(chunks), dim(chunks * COUNT), width((dim + 31) / 32 * 32 + 8), lows(shared), ranges(shared + dim),
          room(shared + 2 * dim) {}

    __device__ static void row(float (&x)[COUNT], const Rows& head, u32 slot, const u32* pages, u32 chunk) {
        Chunk::widen(__ldg(global(reinterpret_cast<const uint4*>(head.at(slot, pages))) + chunk), x);
    }

    // Lows and ranges of the channels of `lag` rows.
    __device__ void measure(const Rows& head, u32 first, u32 lag, const u32* pages) {
        u32 part = lane_id() % 8;
        for (u32 chunk = part; chunk - part < chunks; chunk += 8) {
            float low[COUNT], high[COUNT];
#pragma unroll
            for (int i = 0; i < COUNT; ++i) low[i] = INFINITE, high[i] = -INFINITE;
            if (chunk < chunks) {
#pragma unroll 2
                for (u32 i = threadIdx.x / 8; i < lag; i += WARPS * GROUP) {
                    float x[COUNT];
                    row(x, head, first + i, pages, chunk);
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) low[i] = least(low[i], x[i]), high[i] = greatest(high[i], x[i]);
                }
            }
#pragma unroll
            for (int i = 0; i < COUNT; ++i) {
#pragma unroll
                for (int distance = 8; distance < 32; distance *= 2) {
                    low[i] = least(low[i], __shfl_xor_sync(ALL_LANES, low[i], distance));
                    high[i] = greatest(high[i], __shfl_xor_sync(ALL_LANES, high[i], distance));
                }
                if (lane_id() < 8 && chunk < chunks) {
                    room[warp_id() * 2 * dim + chunk * COUNT + i] = low[i];
                    room[(warp_id() * 2 + 1) * dim + chunk * COUNT + i] = high[i];
                }
            }
        }
        __syncthreads();
        if (threadIdx.x < dim) {
            float low = INFINITE, high = -INFINITE;
            for (u32 warp = 0; warp < WARPS; ++warp) {
                low = least(low, room[warp * 2 * dim + threadIdx.x]);
                high = greatest(high, room[(warp * 2 + 1) * dim + threadIdx.x]);
            }
            lows[threadIdx.x] = low;
            ranges[threadIdx.x] = high - low;
        }
        __syncthreads();
    }

    // Sum of `of(z)` over a row that the warp has in shared memory: eight lanes to a row, and all of them get it.
    template <class Of> __device__ double sum(const float* z, Of of) const {
        u32 part = lane_id() % 8, whole = dim / 8 * 8;
        double mine = 0.0;
#pragma unroll 4
        for (u32 d = part; d < whole; d += 8) mine = __dadd_rn(mine, of(z[d]));
        double total = 0.0, rest = 0.0;
        for (u32 lane = 0; lane < 8; ++lane)
            total = __dadd_rn(total, __shfl_sync(ALL_LANES, mine, (lane_id() & ~7) + lane));
        for (u32 d = whole; d < dim; ++d) rest = __dadd_rn(rest, of(z[d]));
        return __dadd_rn(total, rest);
    }

    // Squared deviations of `lag` rows, summed over the channels, from the lows and ranges of the next.
    __device__ void deviations(const Rows& head, u32 first, u32 lag, const u32* pages, double* out) {
        u32 part = lane_id() % 8;
        float* z = room + (threadIdx.x / 8) * width;
        for (u32 base = warp_id() * GROUP; base < lag; base += WARPS * GROUP) {
            u32 i = base + lane_id() / 8;
#pragma unroll 1
            for (u32 chunk = part; chunk < chunks; chunk += 8) {
                float x[COUNT];
                // Past the end: the last row once more.
                row(x, head, first + min(i, lag - 1), pages, chunk);
#pragma unroll
                for (int j = 0; j < COUNT; j += 4) {
                    float4 low = *reinterpret_cast<const float4*>(lows + chunk * COUNT + j);
                    float4 range = *reinterpret_cast<const float4*>(ranges + chunk * COUNT + j);
                    *reinterpret_cast<float4*>(z + chunk * COUNT + j) =
                        make_float4(relative(x[j], low.x, range.x), relative(x[j + 1], low.y, range.y),
                                    relative(x[j + 2], low.z, range.z), relative(x[j + 3], low.w, range.w));
                }
            }
            __syncwarp();
            double mean = sum(z, [](float z) { return (double)z; }) / (double)dim;
            double squares = sum(z, [=](float z) {
                double away = __dadd_rn((double)z, -mean);
                return __dmul_rn(away, away);
            });
            if (part == 0 && i < lag) out[i] = squares;
            __syncwarp();
        }
        __syncthreads();
    }

    // A channel without range is 0, but NaN stays NaN.
    __device__ static float relative(float x, float low, float range) {
        return range == 0.0f ? (x - low) * 0.0f : (x - low) / range;
    }
};

// Softmax of standard deviations over `dim` channels, from the sums of their squares, in place; a thread has the same
// numbers before and after.
__device__ inline void softmax(double* x, u32 count, u32 dim, double* scratch) {
    double most = WideMax::none(), sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) {
        x[i] = sqrt(x[i] / (double)(dim - 1));
        most = fmax(most, x[i]);
    }
    most = block_reduce<WideMax>(most, scratch);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) sum += x[i] = exp(x[i] - most);
    sum = block_reduce<WideSum>(sum, scratch);
    for (u32 i = threadIdx.x; i < count; i += blockDim.x) x[i] /= sum;
}

template <class Chunk>
__device__ inline void score_partition(float* const* out, const u32* lengths, const Rows* heads, const u32* pages,
                                       u32 chunks, double* scratch, const u64* starts, u32 sinks, u32 lag, u32 cross) {
    extern __shared__ __align__(16) float shared[];
    __shared__ double wide[32];
    u32 r = blockIdx.y, p = blockIdx.x, length = lengths[r];
    float* scores = global(out[r]);
    if ((u64)length < sinks + 2 * (u64)lag) {
        float rest = (float)(length - min(length, sinks));
        for (u32 t = threadIdx.x; t < length && p == 0; t += blockDim.x)
            scores[t] = t < sinks ? 1.0f : (float)(t - sinks) / rest;
        return;
    }
    u32 scored = (length - sinks) / lag - 1, first = sinks + p * lag;
    if (p == scored) {
        for (u32 t = threadIdx.x; t < sinks; t += blockDim.x) scores[t] = 1.0f;
        for (u32 t = first + threadIdx.x; t < length; t += blockDim.x) scores[t] = 1.0f;
    }
    if (p >= scored) return;

    // Of the partition's keys, and of its values.
    double* of_keys = scratch + starts[r] + (u64)p * lag;
    double* of_values = of_keys + (u64)scored * lag;
    Partition<Chunk> partition(chunks, shared);
#pragma unroll 1
    for (u32 which = 0; which < 2; ++which) {
        Rows head = heads[which * gridDim.y + r];
        partition.measure(head, first + lag, lag, pages);
        partition.deviations(head, first, lag, pages, which == 0 ? of_keys : of_values);
        softmax(which == 0 ? of_keys : of_values, lag, partition.dim, wide);
    }
    for (u32 i = threadIdx.x; i < lag; i += blockDim.x) {
        of_keys[i] = (of_keys[i] + of_values[i]) / 2.0;
        scores[first + i] = (float)of_keys[i];
    }
    if (cross) return;
    __syncthreads();
    // None is negative: they order as their bits do.
    const u64* order = reinterpret_cast<const u64*>(of_keys);
    for (u32 i = threadIdx.x; i < lag; i += blockDim.x) {
        // A NaN has no rank; hiding it would hide a broken cache.
        if (of_keys[i] != of_keys[i]) continue;
        u32 rank = 0;
#pragma unroll 4
        for (u32 j = 0; j < lag; ++j) rank += order[j] < order[i] + (j < i);
        scores[first + i] = (float)rank / (float)lag;
    }
}

#define LAG(T, CHUNK)                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        lag_##T(float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks,                \
                double* scratch, const u64* starts, u32 sinks, u32 lag, u32 cross) {                                   \
        score_partition<CHUNK>(out, lengths, heads, pages, chunks, scratch, starts, sinks, lag, cross);                \
    }
LAG(f32, F32Chunk)
LAG(f16, F16Chunk)
LAG(bf16, Bf16Chunk)
