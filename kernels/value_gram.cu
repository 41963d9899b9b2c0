// The L2 norm of what a value writes into the layer's output, through Gram matrices.
//
//   norms[s][t] = 1 / G * sum_g |v w_g|_2 = 1 / G * sum_g sqrt(v' (w_g' w_g) v)        f32; v = v[s][t]
//
// v[s] are rows of D elements (`Rows`); w_g are the D columns of a query head in the output projection: `hidden` rows,
// `stride` bytes apart, 16-byte aligned. A square below 0, which only rounding makes, counts as 0; one that is no finite
// number gives NaN.
//
//   value_gram_sums_{bf16,f16,f32}: [z][y][W][W] = w' w over the z-th part of the channels, f32; of the tiles on and above
//                                   the diagonal. W is D rounded up to 64
//                                   grid (pairs of tiles, query heads, parts), 64 threads
//   value_gram_terms:               their sum in three bf16 terms, as fragments; grid (ceil(blocks / 8), query heads), 256
//   value_gram_{bf16,f16,f32}_{128,256}: the norms; D up to that, a multiple of 16 bytes
//                                   grid (ceil(longest / ROWS), segments), 256 threads; ROWS is 256 for bf16_128, else 128
//
// Every query head's matrix is made once per launch, whatever the number of sequences: hidden * D * D flops, on CUDA cores,
// for 2 * T * hidden * D of the L1 norm's. The square is then D * D flops in place of 2 * hidden * D: see quadratic.cuh.
//
// Predicted for H100, not measured: Llama-8B at T = 32768 in bf16, one layer: 58 Gflop on tensor cores and as much time in
// L1, 0.06 ms at the peaks and 0.12 expected; 3.2 Gflop on CUDA cores for the matrices, 0.05 ms at the peak and 0.1 expected;
// the L1 norm takes 1.1 ms at the peak. From T = 2000 down the matrices cost what is saved.
// gates: value_gram_sums_* FFMA>=128 LDS.128>=8 LDG.E.128
// gates: value_gram_terms DADD STG.E.128==3
// gates: value_gram_*16_* HMMA.16816.F32.BF16 LDG.E.128 !LDS !BAR
// gates: value_gram_f32_* HMMA.16816.F32.BF16 LDG.E.128 !LDS !BAR
#include "quadratic.cuh"

// The twin of `Columns` in src/backend/cuda/value_gram.rs.
struct Columns {
    u64 weights; // first column of a query head
    i64 stride;  // bytes from a channel to the next
    u32 hidden;
    u32 unused;
};

// A thread has 8 x 8 products, of rows and columns in two quads 32 apart.
template <class Chunk> __device__ inline void sums(const Columns* heads, u32 dim, float* out) {
    constexpr u32 TILE = 64, SLAB = 16, WIDE = TILE / Chunk::COUNT, THREADS = 64;
    __shared__ __align__(16) float tiles[2][SLAB][TILE];
    const Columns w = heads[blockIdx.y];
    // Pairs (0, 0), (0, 1), (1, 1), (0, 2), ...
    u32 of[2] = {blockIdx.x, 0};
    while (of[0] > of[1]) of[0] -= ++of[1];
    u32 width = (dim + TILE - 1) / TILE * TILE;
    u32 share = (w.hidden + gridDim.z - 1) / gridDim.z;
    u32 from = min(w.hidden, blockIdx.z * share), end = min(w.hidden, from + share);
    u32 x = threadIdx.x % 8, y = threadIdx.x / 8;
    float c[8][8] = {};
#pragma unroll 1
    for (; from < end; from += SLAB) {
        __syncthreads();
#pragma unroll
        for (u32 side = 0; side < 2; ++side)
#pragma unroll
            for (u32 i = threadIdx.x; i < SLAB * WIDE; i += THREADS) {
                u32 channel = i / WIDE, at = i % WIDE * Chunk::COUNT, column = of[side] * TILE + at;
                float wide[Chunk::COUNT] = {};
                if (from + channel < end && column < dim) {
                    const char* row = reinterpret_cast<const char*>(w.weights) + (from + channel) * w.stride;
                    Chunk::widen(global(reinterpret_cast<const uint4*>(row))[column / Chunk::COUNT], wide);
                }
#pragma unroll
                for (u32 e = 0; e < Chunk::COUNT; e += 4)
                    *reinterpret_cast<float4*>(&tiles[side][channel][at + e]) =
                        make_float4(wide[e], wide[e + 1], wide[e + 2], wide[e + 3]);
            }
        __syncthreads();
#pragma unroll 2
        for (u32 k = 0; k < SLAB; ++k) {
            float a[8], b[8];
#pragma unroll
            for (u32 half = 0; half < 2; ++half) {
                *reinterpret_cast<float4*>(a + half * 4) = *reinterpret_cast<const float4*>(&tiles[0][k][half * 32 + y * 4]);
                *reinterpret_cast<float4*>(b + half * 4) = *reinterpret_cast<const float4*>(&tiles[1][k][half * 32 + x * 4]);
            }
#pragma unroll
            for (u32 i = 0; i < 8; ++i)
#pragma unroll
                for (u32 j = 0; j < 8; ++j) c[i][j] += a[i] * b[j];
        }
    }
    out += ((u64)blockIdx.z * gridDim.y + blockIdx.y) * width * width;
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        u32 row = of[0] * TILE + i / 4 * 32 + y * 4 + i % 4;
#pragma unroll
        for (u32 j = 0; j < 8; j += 4)
            *reinterpret_cast<float4*>(out + (u64)row * width + of[1] * TILE + j * 8 + x * 4) =
                make_float4(c[i][j], c[i][j + 1], c[i][j + 2], c[i][j + 3]);
    }
}

#define SUMS(NAME, CHUNK)                                                                                              \
    extern "C" __global__ void __launch_bounds__(64)                                                                   \
        value_gram_sums_##NAME(const Columns* heads, u32 dim, float* out) {                                            \
        sums<CHUNK>(heads, dim, out);                                                                                  \
    }
SUMS(bf16, Bf16Chunk)
SUMS(f16, F16Chunk)
SUMS(f32, F32Chunk)

// Blocks (k, n) of 16 x 16, k <= n, in the order (0, 0), (0, 1), (1, 1), (0, 2), ...: a warp each. Terms [head][block][term][lane].
extern "C" __global__ void __launch_bounds__(256)
    value_gram_terms(const float* sums, u32 parts, u32 dim, uint4* terms) {
    u32 block = blockIdx.x * 8 + warp_id(), lane = lane_id(), blocks = blocks_of(dim), width = (dim + 63) / 64 * 64;
    if (block >= blocks) return;
    u32 k = block, n = 0;
    while (k > n) k -= ++n;
    float g[2][2][2];
#pragma unroll
    for (u32 i = 0; i < 8; ++i) {
        u32 p = i / 4, r = i / 2 % 2, e = i % 2;
        u32 row = channel_of(k, lane % 4, r, e), column = channel_of(n, lane / 8, p, lane / 4 % 2);
        if (row / 64 > column / 64) {
            u32 other = row;
            row = column;
            column = other;
        }
        double sum = 0.0;
#pragma unroll 1
        for (u32 part = 0; part < parts; ++part)
            sum += sums[(((u64)part * gridDim.y + blockIdx.y) * width + row) * width + column];
        g[p][r][e] = (float)(k < n ? 2.0 * sum : sum);
    }
    terms += (u64)blockIdx.y * fragments_of(dim) + block * MATRIX_TERMS * 32 + lane;
#pragma unroll
    for (u32 term = 0; term < MATRIX_TERMS; ++term) {
        u32 words[2][2];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) words[i / 2][i % 2] = next_term(g[i / 2][i % 2][0], g[i / 2][i % 2][1]);
        terms[term * 32] = make_uint4(words[0][0], words[0][1], words[1][0], words[1][1]);
    }
}

template <class T, int D>
__device__ inline void value_gram(const Rows* values, const u32* pages, const Group* groups, const u32* lengths,
                                  const uint4* terms, u32 dim, float* const* norms) {
    const Group group = groups[blockIdx.y];
    u32 length = lengths[group.row];
    const uint4* fragments = terms + (u64)group.first * fragments_of(dim);
    float norm[2 * Shape<T, D>::M] = {};
    auto add = [&](u32 head, u32 i, u32 slot, float square) {
        norm[i] += fabsf(square) < INFINITE ? sqrtf(fmaxf(square, 0.0f)) : __int_as_float(0x7fffffff);
        if (head + 1 == group.heads && lane_id() % 4 == 0 && slot < length)
            global(norms[group.row])[slot] = norm[i] / group.heads;
    };
    quadratic_forms<T, D, false>(values[blockIdx.y], pages, length, dim, group.heads, fragments, nullptr, add);
}

#define VALUE_GRAM(NAME, T, D)                                                                                         \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        value_gram_##NAME##_##D(const Rows* values, const u32* pages, const Group* groups, const u32* lengths,         \
                                const uint4* terms, u32 dim, float* const* norms) {                                    \
        value_gram<T, D>(values, pages, groups, lengths, terms, dim, norms);                                           \
    }
VALUE_GRAM(bf16, OfBf16, 128)
VALUE_GRAM(bf16, OfBf16, 256)
VALUE_GRAM(f16, OfF16, 128)
VALUE_GRAM(f16, OfF16, 256)
VALUE_GRAM(f32, OfF32, 128)
VALUE_GRAM(f32, OfF32, 256)
