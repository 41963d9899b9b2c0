// What is left of keys outside subspaces, and the keys that subspaces are made of. k: a key of the row's head, D numbers in
// `chunks` times 16 bytes, D <= 256.
//
//   keys_T:             out f32 [slots of all rows][D]: key begin + i of row r at place places[r] + i
//   residual_norms_T_D: out[r][t] = -|k - sum of (b . k) b| for slots t of row r's ranges, -infinity for the others
//
// T is the type of the keys; residual_norms takes every D up to that of its name. Row r reads the slots ranges[r]; or is
// measured at those of the ranges firsts[r] .. firsts[r + 1], against the orthonormal b: ranks[r] times D numbers, from
// bases + starts[r] on. Row r of `out` has lengths[r] slots.
// Launch: 256 threads; grid (ceil(most slots of a row / 128), rows).
//
// Eight lanes own a row, as in key_scores.cu. The key stays in registers, and each b takes its part out of what the ones
// before have left, which is all parts at once for orthogonal b. The residual is formed, since |k|^2 - |Bk|^2 cancels where
// it matters. 32 of the b at a time are in shared memory, laid out so that eight lanes read 128 bytes in a row. The last
// sum is f64: squares stay in its range.
// Source: GUI-KV (arXiv 2510.00536).
// gates: keys_* LDG.E.128 STG.E.128 registers<=40
// gates: residual_norms_*_128 LDG.E.128>=2 LDS.128>=4 FFMA SHFL STG.E registers<=96
// gates: residual_norms_*_256 LDG.E.128>=2 LDS.128>=8 FFMA SHFL STG.E registers<=128
#include "device.cuh"

constexpr u32 SLOTS = 128;
// Rows of a warp's load, vectors in shared memory.
constexpr u32 GROUP = 4, VECTORS = 32;

__device__ inline const uint4* chunks_of(const Rows& head, u32 slot, const u32* pages) {
    return global(reinterpret_cast<const uint4*>(head.at(slot, pages)));
}

// Sum over the eight lanes of a row.
template <class T> __device__ inline T row_sum(T x) {
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
    return x;
}

template <class Chunk>
__device__ inline void widen_keys(float* out, const u64* places, const uint2* ranges, const Rows* heads,
                                  const u32* pages, u32 chunks) {
    constexpr int COUNT = Chunk::COUNT;
    uint2 range = ranges[blockIdx.y];
    Rows head = heads[blockIdx.y];
    u32 end = min(range.x + (blockIdx.x + 1) * SLOTS, range.y);
    for (u32 slot = range.x + blockIdx.x * SLOTS + threadIdx.x / 8; slot < end; slot += blockDim.x / 8) {
        const uint4* key = chunks_of(head, slot, pages);
        float* to = out + (places[blockIdx.y] + (slot - range.x)) * chunks * COUNT;
        for (u32 chunk = threadIdx.x % 8; chunk < chunks; chunk += 8) {
            float x[COUNT];
            Chunk::widen(__ldg(key + chunk), x);
#pragma unroll
            for (int i = 0; i < COUNT; i += 4)
                *reinterpret_cast<float4*>(to + chunk * COUNT + i) = make_float4(x[i], x[i + 1], x[i + 2], x[i + 3]);
        }
    }
}

// N: chunks of a lane.
template <class Chunk, int N>
__device__ inline void measure(float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks,
                               const float* bases, const u64* starts, const u32* ranks, const uint2* ranges,
                               const u32* firsts) {
    constexpr int COUNT = Chunk::COUNT, WIDTH = 8 * N * COUNT;
    __shared__ __align__(16) float vectors[VECTORS][WIDTH];
    u32 r = blockIdx.y, length = lengths[r], rank = ranks[r], dim = chunks * COUNT;
    if (blockIdx.x * SLOTS >= length) return;
    const float* basis = bases + starts[r];
    Rows head = heads[r];
    u32 part = lane_id() % 8;

#pragma unroll 1
    for (u32 step = 0; step < SLOTS; step += 8 * GROUP) {
        u32 slot = blockIdx.x * SLOTS + step + threadIdx.x / 8;
        bool measured = false;
        for (u32 i = firsts[r]; i < firsts[r + 1]; ++i) measured |= slot >= ranges[i].x && slot < ranges[i].y;
        float x[N][COUNT];
        const uint4* key = chunks_of(head, min(slot, length - 1), pages);
#pragma unroll
        for (int n = 0; n < N; ++n) {
            uint4 words = make_uint4(0, 0, 0, 0);
            if (measured && n * 8 + part < chunks) words = __ldg(key + n * 8 + part);
            Chunk::widen(words, x[n]);
        }
#pragma unroll 1
        for (u32 first = 0; first < rank; first += VECTORS) {
            u32 count = min(rank - first, VECTORS);
            // A basis that fits stays.
            if (step == 0 || rank > VECTORS) {
                __syncthreads();
                for (u32 i = threadIdx.x; i < VECTORS * WIDTH; i += blockDim.x) {
                    u32 v = i / WIDTH, d = i % WIDTH, in_chunk = d % COUNT;
                    u32 place = in_chunk / 4 * (8 * N * 4) + d / COUNT * 4 + in_chunk % 4;
                    vectors[v][place] = v < count && d < dim ? basis[(u64)(first + v) * dim + d] : 0.0f;
                }
                __syncthreads();
            }
#pragma unroll 1
            for (u32 v = 0; v < count; ++v) {
                float b[N][COUNT], along = 0.0f;
#pragma unroll
                for (int n = 0; n < N; ++n) {
#pragma unroll
                    for (int i = 0; i < COUNT; i += 4) {
                        float4 four =
                            *reinterpret_cast<const float4*>(&vectors[v][i * (8 * N) + (n * 8 + part) * 4]);
                        b[n][i] = four.x, b[n][i + 1] = four.y, b[n][i + 2] = four.z, b[n][i + 3] = four.w;
                    }
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) along = fmaf(x[n][i], b[n][i], along);
                }
                along = row_sum(along);
#pragma unroll
                for (int n = 0; n < N; ++n)
#pragma unroll
                    for (int i = 0; i < COUNT; ++i) x[n][i] = fmaf(-along, b[n][i], x[n][i]);
            }
        }
        double square = 0.0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < COUNT; ++i) square = fma((double)x[n][i], (double)x[n][i], square);
        square = row_sum(square);
        if (part == 0 && slot < length) global(out[r])[slot] = measured ? -(float)sqrt(square) : -INFINITE;
    }
}

#define KEYS(T, CHUNK)                                                                                                 \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        keys_##T(float* out, const u64* places, const uint2* ranges, const Rows* heads, const u32* pages,              \
                 u32 chunks) {                                                                                         \
        widen_keys<CHUNK>(out, places, ranges, heads, pages, chunks);                                                  \
    }
KEYS(f32, F32Chunk)
KEYS(f16, F16Chunk)
KEYS(bf16, Bf16Chunk)

#define RESIDUAL_NORMS(T, DIM, CHUNK)                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) residual_norms_##T##_##DIM(                                      \
        float* const* out, const u32* lengths, const Rows* heads, const u32* pages, u32 chunks, const float* bases,    \
        const u64* starts, const u32* ranks, const uint2* ranges, const u32* firsts) {                                 \
        measure<CHUNK, DIM / 8 / CHUNK::COUNT>(out, lengths, heads, pages, chunks, bases, starts, ranks, ranges,       \
                                               firsts);                                                                \
    }
RESIDUAL_NORMS(f32, 128, F32Chunk)
RESIDUAL_NORMS(f32, 256, F32Chunk)
RESIDUAL_NORMS(f16, 128, F16Chunk)
RESIDUAL_NORMS(f16, 256, F16Chunk)
RESIDUAL_NORMS(bf16, 128, Bf16Chunk)
RESIDUAL_NORMS(bf16, 256, Bf16Chunk)
