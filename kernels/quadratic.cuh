// Quadratic forms x' A x + b' x of rows x and symmetric matrices A, on tensor cores, with products as exact as f32's.
//
// A matrix is three bf16 terms, 24 bits, in fragments of its blocks of 16 x 16 on and above the diagonal (the others are those
// mirrored: what is above counts twice); `value_gram_terms` makes them. A row is one term (bf16), two (f16) or three (f32), and
// products below 2^-24 of the largest are left out, so that 3, 5 or 6 mma make one. A warp holds 16 or 32 rows as fragments; those of the
// matrices come from L1, one 16-byte access per lane and term, in an order of channels in which a lane's channels of the
// accumulator are those that it has of the rows: nothing passes through shared memory, and no warp waits for another.
#pragma once
#include "device.cuh"

// The query heads of a segment: the twin of `Group` in src/backend/cuda/value_gram.rs.
struct Group {
    u32 first, heads; // of the matrices
    u32 row;          // of the results and lengths
};

// Terms of a row, and how a chunk of 16 bytes is widened.
struct OfBf16 {
    using Chunk = Bf16Chunk;
    static constexpr u32 TERMS = 1;
};
struct OfF16 {
    using Chunk = F16Chunk;
    static constexpr u32 TERMS = 2;
};
struct OfF32 {
    using Chunk = F32Chunk;
    static constexpr u32 TERMS = 3;
};
constexpr u32 MATRIX_TERMS = 3;

// The channel of element `pair * 2 + e` that lane `quad` of four has of a block of 16: each lane has eight consecutive ones
// of two blocks.
__device__ inline u32 channel_of(u32 block, u32 quad, u32 pair, u32 e) {
    return block / 2 * 32 + quad * 8 + block % 2 * 4 + pair * 2 + e;
}

// Blocks of 16 x 16 of a matrix on and above its diagonal; a lane's channels come from two at a time.
__device__ inline u32 blocks_of(u32 dim) {
    u32 side = (dim + 31) / 32 * 2;
    return side * (side + 1) / 2;
}
// Fragments of a matrix: [block][term][lane].
__device__ inline u32 fragments_of(u32 dim) { return blocks_of(dim) * MATRIX_TERMS * 32; }

// x as a sum of bf16: takes the next term off.
__device__ inline u32 next_term(float& low, float& high) {
    u32 pair = Bf16::pack(low, high);
    low -= __uint_as_float(pair << 16);
    high -= __uint_as_float(pair & 0xffff0000);
    return pair;
}

// Four elements of a row from `column` on, a multiple of 4.
template <class Chunk> __device__ inline void load_four(const char* row, u32 column, float (&x)[4]) {
    if constexpr (Chunk::COUNT == 4) {
        Chunk::widen(*reinterpret_cast<const uint4*>(row + column * 4), x);
    } else {
        uint2 words = *reinterpret_cast<const uint2*>(row + column * 2);
        float wide[8];
        Chunk::widen(make_uint4(words.x, words.y, 0, 0), wide);
        for (u32 e = 0; e < 4; ++e) x[e] = wide[e];
    }
}

// Rows of a block: 8 warps of 16 M.
template <class T, int D> struct Shape {
    static constexpr u32 M = T::TERMS * D <= 128 ? 2 : 1, ROWS = 8 * 16 * M;
};

// Calls each(head, i, slot, form) for the forms of a thread's rows with each of `heads` matrices, whose fragments lie one after the
// other, and, where AFFINE, with vectors b [heads][dim]. Row i of 2 M is that of `slot`, which may lie past the last; the four lanes of a
// quad have the same.
template <class T, int D, bool AFFINE, class Each>
__device__ inline void quadratic_forms(const Rows& rows, const u32* pages, u32 length, u32 dim, u32 heads,
                                       const uint4* fragments, const float* vectors, Each each) {
    using Chunk = typename T::Chunk;
    constexpr u32 M = Shape<T, D>::M;
    u32 lane = lane_id(), quad = lane % 4;
    u32 first = blockIdx.x * Shape<T, D>::ROWS + warp_id() * 16 * M + lane / 4;
    if (first - lane / 4 >= length) return;

    const char* row[M][2];
    u32 a[M][T::TERMS][D / 16][4];
#pragma unroll
    for (u32 m = 0; m < M; ++m)
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            u32 slot = first + m * 16 + r * 8;
            row[m][r] = global(rows.at(min(slot, length - 1), pages));
#pragma unroll
            for (u32 b = 0; b < D / 32; ++b) {
                u32 column = b * 32 + quad * 8;
                if constexpr (T::TERMS == 1) {
                    const uint4* from = reinterpret_cast<const uint4*>(row[m][r]) + column / 8;
                    uint4 words = column < dim ? *from : make_uint4(0, 0, 0, 0);
                    a[m][0][b * 2][r] = words.x, a[m][0][b * 2][2 + r] = words.y;
                    a[m][0][b * 2 + 1][r] = words.z, a[m][0][b * 2 + 1][2 + r] = words.w;
                    continue;
                }
                float x[8] = {};
#pragma unroll
                for (u32 e = 0; e < 8; e += Chunk::COUNT)
                    if (column + e < dim) {
                        float wide[Chunk::COUNT];
                        Chunk::widen(reinterpret_cast<const uint4*>(row[m][r])[(column + e) / Chunk::COUNT], wide);
#pragma unroll
                        for (u32 i = 0; i < Chunk::COUNT; ++i) x[e + i] = wide[i];
                    }
#pragma unroll
                for (u32 term = 0; term < T::TERMS; ++term)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i)
                        a[m][term][b * 2 + i / 2][i % 2 * 2 + r] = next_term(x[i * 2], x[i * 2 + 1]);
            }
        }

    fragments += lane;
#pragma unroll 1
    for (u32 head = 0; head < heads; ++head) {
        float form[M][2] = {};
#pragma unroll 1
        for (u32 n = 0; n < (dim + 31) / 32 * 2; ++n) {
            // The largest products, and the others: their roundings are not those of large sums.
            float c[2][M][2][4] = {};
#pragma unroll
            for (u32 k = 0; k < D / 16; ++k) {
                if (k > n) break;
#pragma unroll
                for (u32 j = 0; j < MATRIX_TERMS; ++j, fragments += 32) {
                    uint4 b = *fragments;
#pragma unroll
                    for (u32 i = 0; i < T::TERMS && i + j < 3; ++i)
#pragma unroll
                        for (u32 m = 0; m < M; ++m) {
                            Bf16::multiply_add(c[i + j > 0][m][0], a[m][i][k], b.x, b.y);
                            Bf16::multiply_add(c[i + j > 0][m][1], a[m][i][k], b.z, b.w);
                        }
                }
            }
            u32 column = channel_of(n, quad, 0, 0);
            if (column >= dim) continue;
            float b[4];
            if constexpr (AFFINE) F32Chunk::widen(*reinterpret_cast<const uint4*>(vectors + head * dim + column), b);
#pragma unroll
            for (u32 i = 0; i < 2 * M; ++i) {
                u32 m = i / 2, r = i % 2;
                float x[4];
                load_four<Chunk>(row[m][r], column, x);
                float sum[2] = {};
#pragma unroll
                for (u32 e = 0; e < 4; ++e) {
                    float product = c[0][m][e / 2][r * 2 + e % 2] + c[1][m][e / 2][r * 2 + e % 2];
                    if constexpr (AFFINE) product += b[e];
                    sum[e / 2] += product * x[e];
                }
                form[m][r] += sum[0] + sum[1];
            }
        }
#pragma unroll
        for (u32 i = 0; i < 2 * M; ++i) {
            float sum = form[i / 2][i % 2];
            for (u32 other = 1; other <= 2; other *= 2) sum += __shfl_xor_sync(ALL_LANES, sum, other);
            each(head, i, first + i / 2 * 16 + i % 2 * 8, sum);
        }
    }
}
