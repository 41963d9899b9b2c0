// Scores of slots from their keys, or from their positions alone. Row r of `out` has lengths[r] slots; k is a key of its
// head, D numbers in `chunks` times 16 bytes, D <= 256.
//
//   key_norm_T:      out[r][t] = sign * |k|; of keys with -1, of values with 1
//   unit_keys_T_D:   anchors[r] = mean over t of k / max(|k|, 1e-12), divided by max(its norm, 1e-8)      f32 [r][D]
//   key_cosine_T:    out[r][t] = -k . anchors[r] / max(|k|, 1e-8)
//   recency:         out[r][t] = the float that is position - 2^30 floats above zero
//   random:          out[r][t] = top 24 bits of mix(keys[r] ^ position) / 2^24
//
// T is the type of the keys; unit_keys takes every D up to that of its name. Row r's positions start at starts[r]; -1:
// slot = position.
// Launch: 256 threads; grid (ceil(longest / R), rows) with R = 256 slots for unit_keys, 128 for key_norm and key_cosine,
// 1024 for recency and random. unit_keys: `partials` f64 [rows][grid x][D], `arrivals` u32 [rows], zero before.
//
// Eight lanes own a row: a warp's load is 128 bytes of each of four keys, all of them whole sectors. Every key is read
// once by key_norm, and once by each of unit_keys and key_cosine; what a lane adds up is f32. Where squares leave f32's
// range the key is scaled by a power of two, so that all norms come out that f32 can hold (the CPU backend has f64
// for that). Unit keys are added in f32 over eight slots of a lane and in f64 after; a segment's partial sums are
// merged in order by the block that ends last.
// Source: KNorm (arXiv 2406.11430), KeyDiff (arXiv 2504.15364) as kvpress has them, StreamingLLM (arXiv 2309.17453).
// gates: key_norm_* LDG.E.128>=4 FFMA SHFL STG.E registers<=64 !DFMA
// gates: unit_keys_*_128 LDG.E.128>=4 FFMA MUFU.RSQ SHFL ATOMG==1 registers<=96
// gates: unit_keys_*_256 LDG.E.128>=4 FFMA MUFU.RSQ SHFL ATOMG==1 registers<=128
// gates: key_cosine_* LDG.E.128>=4 LDS.128 FFMA SHFL STG.E registers<=64 !DFMA
// gates: recency STG.E
// gates: random STG.E
#include "device.cuh"

constexpr u32 SCORE_ROWS = 128, SUM_ROWS = 256, TILE = 1024, MOST_DIM = 256;
// Rows of a warp's load.
constexpr u32 GROUP = 4;

__device__ inline const uint4* chunks_of(const Rows& head, u32 slot, const u32* pages) {
    return global(reinterpret_cast<const uint4*>(head.at(slot, pages)));
}

// Sum over the eight lanes of a row.
__device__ inline float row_sum(float x) {
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

// Whether a sum of squares is right: none was too large, and those too small do not matter.
__device__ inline bool in_range(float square) { return square >= 0x1p-90f && square < INFINITE; }
// What to multiply a key with so that the sum is right.
__device__ inline float scale_for(float square) {
    return in_range(square) ? 1.0f : square < 1.0f ? 0x1p100f : 0x1p-70f;
}
// At least `least`; NaN stays.
__device__ inline float clamp(float x, float least) { return x < least ? least : x; }

template <class Chunk, bool COSINE>
__device__ inline void score_keys(float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks,
                                  const float* anchors, float sign) {
    constexpr int GROUPS = 4, COUNT = Chunk::COUNT;
    __shared__ __align__(16) float anchor[COSINE ? MOST_DIM : 4];
    u32 segment = blockIdx.y, length = lengths[segment];
    u32 first = blockIdx.x * SCORE_ROWS + warp_id() * (GROUPS * GROUP);
    if (blockIdx.x * SCORE_ROWS >= length) return;
    if (COSINE) {
        u32 dim = chunks * COUNT;
        if (threadIdx.x < dim) anchor[threadIdx.x] = anchors[(u64)segment * dim + threadIdx.x];
        __syncthreads();
    }
    if (first >= length) return;

    u32 row = lane_id() / 8, part = lane_id() % 8;
    Rows head = heads[segment];
    const uint4* keys[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) keys[g] = chunks_of(head, min(first + g * GROUP + row, length - 1), pages);

    float scale[GROUPS], square[GROUPS], dot[GROUPS];
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) scale[g] = 1.0f;
    // Once, and again where a scale is needed.
#pragma unroll 1
    for (bool again = false;; again = true) {
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) square[g] = dot[g] = 0.0f;
#pragma unroll 1
        for (u32 chunk = part; chunk < chunks; chunk += 8) {
            uint4 words[GROUPS];
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) words[g] = __ldg(keys[g] + chunk);
            float a[COUNT] = {};
            if (COSINE) {
#pragma unroll
                for (int i = 0; i < COUNT; i += 4) {
                    float4 four = *reinterpret_cast<const float4*>(anchor + chunk * COUNT + i);
                    a[i] = four.x, a[i + 1] = four.y, a[i + 2] = four.z, a[i + 3] = four.w;
                }
            }
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) {
                float x[COUNT];
                Chunk::widen(words[g], x);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) {
                    x[i] *= scale[g];
                    square[g] = fmaf(x[i], x[i], square[g]);
                    if (COSINE) dot[g] = fmaf(x[i], a[i], dot[g]);
                }
            }
        }
        bool right = true;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            square[g] = row_sum(square[g]);
            right = right && in_range(square[g]);
        }
        if (again || __all_sync(ALL_LANES, right)) break;
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) scale[g] = scale_for(square[g]);
    }

    // Lane `part` of a row has the score of group `part`.
    float score = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; ++g) {
        float norm = sqrtf(square[g]), of_group = sign * (norm / scale[g]);
        if (COSINE) of_group = sign * (row_sum(dot[g]) / clamp(norm, 1e-8f * scale[g]));
        if (part == g) score = of_group;
    }
    u32 slot = first + part * GROUP + row;
    if (part < GROUPS && slot < length) global(out[segment])[slot] = score;
}

// N: chunks of a lane.
template <class Chunk, int N>
__device__ inline void sum_unit_keys(const u32* lengths, const Rows* heads, const u32* pages, u32 chunks,
                                     double* partials, u32* arrivals, float* anchors) {
    // Loads in flight: GROUPS * N.
    constexpr int COUNT = Chunk::COUNT, WIDTH = 8 * N * COUNT, GROUPS = N < 4 ? 4 / N : 1;
    static_assert(WIDTH <= MOST_DIM, "a thread per column");
    __shared__ float sums[8][WIDTH];
    __shared__ double scratch[32];
    u32 segment = blockIdx.y, length = lengths[segment], blocks = (length + SUM_ROWS - 1) / SUM_ROWS;
    if (blockIdx.x >= blocks) return;
    u32 row = lane_id() / 8, part = lane_id() % 8, dim = chunks * COUNT;

    Rows head = heads[segment];
    float total[N][COUNT] = {};
#pragma unroll 1
    for (u32 step = 0; step < SUM_ROWS; step += 8 * GROUPS * GROUP) {
        u32 first = blockIdx.x * SUM_ROWS + step + warp_id() * (GROUPS * GROUP);
        if (first >= length) break;
        uint4 words[GROUPS][N];
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            u32 slot = first + g * GROUP + row;
            const uint4* key = chunks_of(head, min(slot, length - 1), pages);
#pragma unroll
            for (int n = 0; n < N; ++n) {
                u32 chunk = n * 8 + part;
                // A key past the end is zero, and so is its unit key.
                words[g][n] = make_uint4(0, 0, 0, 0);
                if (chunk < chunks && slot < length) words[g][n] = __ldg(key + chunk);
            }
        }
#pragma unroll
        for (int g = 0; g < GROUPS; ++g) {
            bool there = first + g * GROUP + row < length;
            float scale = 1.0f, square;
#pragma unroll 1
            for (bool again = false;; again = true) {
                square = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
                    float x[COUNT];
                    Chunk::widen(words[g][n], x);
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) square = fmaf(x[i] * scale, x[i] * scale, square);
                }
                square = row_sum(square);
                if (again || __all_sync(ALL_LANES, in_range(square) || !there)) break;
                scale = scale_for(square);
            }
            // Written so that NaN stays NaN.
            float factor = rsqrtf(square), most = 1e12f / scale;
            factor = factor > most ? most : factor;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                float x[COUNT];
                Chunk::widen(words[g][n], x);
#pragma unroll
                for (int i = 0; i < COUNT; ++i) total[n][i] = fmaf(x[i] * scale, factor, total[n][i]);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < N; ++n) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            float x = total[n][i];
            x += __shfl_xor_sync(ALL_LANES, x, 8);
            x += __shfl_xor_sync(ALL_LANES, x, 16);
            if (row == 0) sums[warp_id()][(n * 8 + part) * COUNT + i] = x;
        }
    }
    __syncthreads();

    u32 column = threadIdx.x;
    double* mine = partials + (u64)segment * gridDim.x * dim;
    if (column < dim) {
        double sum = 0.0;
        for (u32 warp = 0; warp < 8; ++warp) sum += (double)sums[warp][column];
        mine[(u64)blockIdx.x * dim + column] = sum;
    }
    if (!last_to_arrive(arrivals + segment, blocks)) return;
    double sum = 0.0;
    if (column < dim)
#pragma unroll 4
        for (u32 block = 0; block < blocks; ++block) sum += mine[(u64)block * dim + column];
    double mean = sum / (double)length, norm = sqrt(block_reduce<WideSum>(mean * mean, scratch));
    if (column < dim) anchors[(u64)segment * dim + column] = (float)(mean / (norm < 1e-8 ? 1e-8 : norm));
}

#define KEY_KERNELS(T, CHUNK)                                                                                          \
    extern "C" __global__ void __launch_bounds__(256) key_norm_##T(                                                    \
        float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks, float sign) {          \
        score_keys<CHUNK, false>(out, lengths, heads, pages, chunks, nullptr, sign);                                   \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        key_cosine_##T(float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks,         \
                       const float* anchors) {                                                                         \
        score_keys<CHUNK, true>(out, lengths, heads, pages, chunks, anchors, -1.0f);                                   \
    }
KEY_KERNELS(f32, F32Chunk)
KEY_KERNELS(f16, F16Chunk)
KEY_KERNELS(bf16, Bf16Chunk)

#define UNIT_KEYS(T, DIM, CHUNK)                                                                                       \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        unit_keys_##T##_##DIM(const u32* lengths, const Rows* heads, const u32* pages, u32 chunks, double* partials,   \
                              u32* arrivals, float* anchors) {                                                         \
        sum_unit_keys<CHUNK, DIM / 8 / CHUNK::COUNT>(lengths, heads, pages, chunks, partials, arrivals, anchors);      \
    }
UNIT_KEYS(f32, 128, F32Chunk)
UNIT_KEYS(f32, 256, F32Chunk)
UNIT_KEYS(f16, 128, F16Chunk)
UNIT_KEYS(f16, 256, F16Chunk)
UNIT_KEYS(bf16, 128, Bf16Chunk)
UNIT_KEYS(bf16, 256, Bf16Chunk)

// Calls `score(position)` for each slot of the block's tile.
template <class Score>
__device__ inline void score_positions(float* const* out, const u32* lengths, const i64* starts, const u32* positions,
                                       Score score) {
    u32 segment = blockIdx.y, length = lengths[segment], first = blockIdx.x * TILE;
    i64 start = starts[segment];
    float* row = global(out[segment]);
    for (u32 slot = first + threadIdx.x; slot < min(length, first + TILE); slot += blockDim.x)
        row[slot] = score(start < 0 ? slot : positions[start + slot]);
}

// Floats of one sign order as their bits do: strictly increasing where position as f32 would make ties above 2^24.
extern "C" __global__ void __launch_bounds__(256)
    recency(float* const* out, const u32* lengths, const i64* starts, const u32* positions) {
    constexpr u32 ZERO = 1u << 30;
    score_positions(out, lengths, starts, positions, [](u32 position) {
        return position >= ZERO ? __uint_as_float(position - ZERO) : -__uint_as_float(ZERO - position);
    });
}

// One step of SplitMix64; its twin is in src/backend/cuda/key_scores.rs.
__device__ inline u64 mix(u64 x) {
    x += 0x9e3779b97f4a7c15;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
}

extern "C" __global__ void __launch_bounds__(256) random(float* const* out, const u32* lengths, const i64* starts,
                                                         const u32* positions, const u64* keys) {
    u64 key = keys[blockIdx.y];
    score_positions(out, lengths, starts, positions,
                    [=](u32 position) { return (float)(u32)(mix(key ^ position) >> 40) * 0x1p-24f; });
}
