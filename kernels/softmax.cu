// Softmax and log-sum-exp of each row of a ragged f32 matrix [rows][stride].
//
//   lse[r] = ln sum_j exp(scale * in[r][j])      out[r][j] = exp(scale * in[r][j] - lse[r])      j < lengths[r]
//
// A row of nothing but -inf, or of nothing, has lse = -inf and probabilities 0, never NaN. `out` may be `in`.
// Launch: grid (rows), 256 threads. Rows start at multiples of 16 bytes (stride % 4 == 0).
// Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867).
// gates: softmax LDG.E.128 STG.E.128 MUFU.EX2
// gates: log_sum_exp LDG.E.128 MUFU.EX2
#include "device.cuh"

// Maximum and sum of 2^(x - maximum), of what was added so far.
struct Online {
    float maximum = -INFINITE, sum = 0.0f;
    __device__ void add(float x) {
        float greater = fmaxf(maximum, x);
        // -inf - -inf would be NaN: nothing has weight yet.
        if (greater == -INFINITE) return;
        sum = sum * exp2_approx(maximum - greater) + exp2_approx(x - greater);
        maximum = greater;
    }
};

template <bool WRITE>
__device__ inline void softmax_row(const float* in, float* out, float* lse, const i32* lengths, i64 stride, float scale) {
    __shared__ float scratch[32];
    u32 row = blockIdx.x, length = lengths[row], units = length / 4;
    const float* from = in + row * stride;
    scale *= LOG2_E;

    Online mine;
    for (u32 unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float4 four = reinterpret_cast<const float4*>(from)[unit];
        mine.add(four.x * scale), mine.add(four.y * scale), mine.add(four.z * scale), mine.add(four.w * scale);
    }
    u32 rest = units * 4 + threadIdx.x;
    if (rest < length) mine.add(from[rest] * scale);

    float maximum = block_reduce<Max>(mine.maximum, scratch);
    float weight = mine.maximum == -INFINITE ? 0.0f : exp2_approx(mine.maximum - maximum);
    float sum = block_reduce<Sum>(mine.sum * weight, scratch);
    // In base two: what is subtracted below, and 0 with -inf in it would be NaN.
    float total = sum > 0.0f ? maximum + log2f(sum) : -INFINITE;
    if (threadIdx.x == 0) lse[row] = total / LOG2_E;
    if (!WRITE) return;

    float* to = out + row * stride;
    float subtract = sum > 0.0f ? total : 0.0f;
    for (u32 unit = threadIdx.x; unit < units; unit += blockDim.x) {
        float4 four = reinterpret_cast<const float4*>(from)[unit];
        four.x = exp2_approx(four.x * scale - subtract), four.y = exp2_approx(four.y * scale - subtract);
        four.z = exp2_approx(four.z * scale - subtract), four.w = exp2_approx(four.w * scale - subtract);
        reinterpret_cast<float4*>(to)[unit] = four;
    }
    if (rest < length) to[rest] = exp2_approx(from[rest] * scale - subtract);
}

extern "C" __global__ void __launch_bounds__(256)
    softmax(const float* in, float* out, float* lse, const i32* lengths, i64 stride, float scale) {
    softmax_row<true>(in, out, lse, lengths, stride, scale);
}

extern "C" __global__ void __launch_bounds__(256)
    log_sum_exp(const float* in, float* lse, const i32* lengths, i64 stride, float scale) {
    softmax_row<false>(in, nullptr, lse, lengths, stride, scale);
}
