// Attention that normally distributed queries are expected to pay to keys k.
//
//   logits[q][t] = k' A k + b' k                 A = S / (2 D), b = m / sqrt(D) for the mean m and the covariance S of query head q
//   out[s][t]    = 1 / G * sum_g softmax_t(logits[q])             over t >= starts[s], 0 before; G query heads per segment s
//
//   expected_attention_logits_{bf16,f16,f32}_{128,256}: the first; k are rows of D elements up to that, a multiple of 16 bytes; A comes
//                              as fragments from value_gram_terms, b is f32 [q][D]; NaN for what is no finite number
//                              grid (ceil(longest / ROWS), segments), 256 threads; ROWS is 256 for bf16_128, else 128
//   expected_attention_sums:   sums[q] = the largest logit and 1 / the sum of all exponentials less it, {f32, f32}
//                              grid (largest group, segments), 512 threads
//   expected_attention_mean:   out; grid (ceil(longest / 1024), segments), 256 threads
//
// Query heads, logits and sums are numbered by groups[s].first. NaN among the logits makes the sum NaN, and with it all of the head.
// Logits take 2 D * D flops each, on tensor cores (see quadratic.cuh). They stay in memory and are read three times, from L2. One block
// adds up a query head.
// Source: ExpectedAttention (arXiv 2510.00636).
// gates: expected_attention_logits_* HMMA.16816.F32.BF16 LDG.E.128 !LDS !BAR
// gates: expected_attention_sums MUFU.EX2 DADD registers<=64
// gates: expected_attention_mean MUFU.EX2 STG.E registers<=64
#include "quadratic.cuh"

constexpr u32 TILE = 1024;
// Threads of a sum, and what each has in flight.
constexpr u32 THREADS = 512, BATCH = 8;

template <class T, int D>
__device__ inline void expected_logits(const Rows* keys, const u32* pages, const Group* groups, const u32* lengths,
                                       const uint4* terms, const float* vectors, u32 dim, float* const* logits) {
    const Group group = groups[blockIdx.y];
    u32 length = lengths[group.row];
    const uint4* fragments = terms + (u64)group.first * fragments_of(dim);
    auto store = [&](u32 head, u32, u32 slot, float logit) {
        if (lane_id() % 4 == 0 && slot < length)
            global(logits[group.first + head])[slot] = fabsf(logit) < INFINITE ? logit : __int_as_float(0x7fffffff);
    };
    vectors += (u64)group.first * dim;
    quadratic_forms<T, D, true>(keys[blockIdx.y], pages, length, dim, group.heads, fragments, vectors, store);
}

#define EXPECTED_LOGITS(NAME, T, D)                                                                                    \
    extern "C" __global__ void __launch_bounds__(256)                                                                  \
        expected_attention_logits_##NAME##_##D(const Rows* keys, const u32* pages, const Group* groups,                \
                                               const u32* lengths, const uint4* terms, const float* vectors, u32 dim,  \
                                               float* const* logits) {                                                 \
        expected_logits<T, D>(keys, pages, groups, lengths, terms, vectors, dim, logits);                              \
    }
EXPECTED_LOGITS(bf16, OfBf16, 128)
EXPECTED_LOGITS(bf16, OfBf16, 256)
EXPECTED_LOGITS(f16, OfF16, 128)
EXPECTED_LOGITS(f16, OfF16, 256)
EXPECTED_LOGITS(f32, OfF32, 128)
EXPECTED_LOGITS(f32, OfF32, 256)

__device__ inline float weight(float logit, float largest) { return exp2_approx((logit - largest) * LOG2_E); }

extern "C" __global__ void __launch_bounds__(THREADS)
    expected_attention_sums(const float* const* logits, const Group* groups, const u32* lengths, const u32* starts,
                            float2* sums) {
    __shared__ float scratch[32];
    __shared__ double wide[32];
    const Group group = groups[blockIdx.y];
    if (blockIdx.x >= group.heads) return;
    u32 query = group.first + blockIdx.x, length = lengths[group.row], start = starts[group.row];
    const float* row = global(logits[query]);
    float largest = -INFINITE;
    for (u32 slot = start + threadIdx.x; slot < length; slot += BATCH * THREADS) {
        float x[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) x[i] = row[min(slot + i * THREADS, length - 1)];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) largest = fmaxf(largest, x[i]);
    }
    largest = block_reduce<Max>(largest, scratch);
    double sum = 0.0;
    for (u32 slot = start + threadIdx.x; slot < length; slot += BATCH * THREADS) {
        float x[BATCH];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i) x[i] = row[min(slot + i * THREADS, length - 1)];
#pragma unroll
        for (u32 i = 0; i < BATCH; ++i)
            if (slot + i * THREADS < length) sum += (double)weight(x[i], largest);
    }
    sum = block_reduce<WideSum>(sum, wide);
    if (threadIdx.x == 0) sums[query] = make_float2(largest, (float)(1.0 / sum));
}

extern "C" __global__ void __launch_bounds__(256)
    expected_attention_mean(const float* const* logits, const Group* groups, const u32* lengths, const u32* starts,
                            const float2* sums, float* const* out) {
    const Group group = groups[blockIdx.y];
    u32 length = lengths[group.row], start = starts[group.row], first = blockIdx.x * TILE;
    float* row = global(out[group.row]);
    for (u32 slot = first + threadIdx.x; slot < min(length, first + TILE); slot += blockDim.x) {
        float mean = 0.0f;
        if (slot >= start)
            for (u32 query = group.first; query < group.first + group.heads; ++query) {
                float2 sum = sums[query];
                mean += weight(global(logits[query])[slot], sum.x) * sum.y;
            }
        row[slot] = mean / group.heads;
    }
}
