// How much attention slots get from the last queries, and how much that changes from one to the next.
//
//   P[g][w][t] = softmax over the slots visible to w, as in window_attention.cu; t before the window, which all w see
//   out[t]     = mean over g of (mean over w of P + gamma * variance over w of P), 0 inside the window
//   sums[0]    = sum of -P ln P, sums[1] = sum of the variances over g and t
//
// attention_spread_*:    scores of a chunk of slots, and its part of the sums, in f64.
// attention_spread_sums: parts added in the order of their chunks; zeros for heads without any.
//
// Rows' statistics are those of window_attention_lse_* and window_attention_rows. Launch: grid (ceil(longest / chunk), segments),
// the threads of the longest window's rows, at most 128; (ceil(heads / 128)), 128 threads for sums. Chunks are multiples of 64.
//
// A head's rows lie in warps of their own. A warp has the mean and the squares about it of its 32 rows at once; those of the head's warps,
// and of its rounds of 128 rows, are joined by their means (Chan, Golub and LeVeque): a difference of two sums would lose
// what tells queries apart. The logarithm of a weight is what it is raised from. All in an order that follows from the shapes alone.
// Source: CAKE (arXiv 2503.12491).
// gates: attention_spread_64 HMMA.16816.F32==32 HMMA.16816.F32.BF16==16 LDSM.16.M88.4==16 MUFU.EX2==16 registers<=168
// gates: attention_spread_128 HMMA.16816.F32==64 HMMA.16816.F32.BF16==32 MUFU.EX2==16 registers<=168
// gates: attention_spread_256 HMMA.16816.F32==128 HMMA.16816.F32.BF16==64 MUFU.EX2==16 registers<=255
// gates: attention_spread_f32 FFMA>=64 MUFU.EX2>=16 registers<=168
// gates: attention_spread_sums DADD STG.E
#include "window_attention.cuh"

// Below the logarithm of the least number that a weight is: times 0, still 0.
constexpr float LEAST = -200.0f;
constexpr double WIDE_LN_2 = 0.6931471805599453;

struct Arguments {
    const Segment* segments;
    const Query* queries;
    const Rows* keys;
    const u32 *pages, *lengths, *ends;
    const float4* stats;
    float* const* out;
    double2* parts;  // entropy and variance, [segment][chunk]
    float2* moments; // of windows of more than a block's rows: mean and squares at each slot so far, [segment][slot]
    u32 chunk, stride;
    float gamma;
    u32 flags;
};

// Mean of some numbers, and sum of their squares about it.
struct Moments {
    float count, mean, squares;

    __device__ void join(const Moments& other) {
        float all = count + other.count, part = other.count / all, delta = other.mean - mean;
        squares += other.squares + delta * delta * count * part;
        mean = fmaf(delta, part, mean);
        count = all;
    }
};

// Rows of a warp that are no repetitions.
__device__ inline u32 rows_of(const Block& block, u32 warp) {
    u32 first = block.place(warp, 0);
    return first < block.rows ? min(block.rows - first, ROWS) : 0;
}

template <class T, u32 D> __device__ inline void spread(const Arguments& arg) {
    constexpr u32 KEYS = Tile<T, D>::KEYS, STRIDE = Tile<T, D>::STRIDE, STAGES = Tile<T, D>::STAGES;
    __shared__ uint4 ring[STAGES * KEYS * STRIDE];
    __shared__ float means[WARPS][KEYS], squares[WARPS][KEYS];
    __shared__ double scratch[WARPS];
    const Segment segment = arg.segments[blockIdx.y];
    const Sight sight(segment, arg.lengths, arg.ends, 0, arg.flags);
    i32 first = blockIdx.x * arg.chunk, limit = min((u32)first + arg.chunk, sight.length);
    if (first >= limit) return;

    u32 lane = lane_id(), warp = warp_id(), rows = segment.window;
    i32 end = min(limit, (i32)sight.past);
    u32 tiles = end > first ? (end - first + KEYS - 1) / KEYS : 0;
    float* out = global(arg.out[segment.row]);
    float2* moments = arg.moments + (u64)blockIdx.y * arg.stride;
    float scale = Queries<T, D>::scale(segment);
    double information = 0.0, variances = 0.0;
    // Heads of the group that the block's warps have rows of at once; or 128 rows of one after the other.
    Block block;
    block.units = segment.group, block.rows = rows;
    block.warps = min((rows + ROWS - 1) / ROWS, blockDim.x / ROWS);
    u32 heads = blockDim.x / ROWS / block.warps, at_once = block.warps * ROWS, rounds = (rows + at_once - 1) / at_once;
#pragma unroll 1
    for (u32 round = 0; tiles > 0 && round / rounds * heads < segment.group; ++round) {
        block.unit = round / rounds * heads, block.first = round % rounds * at_once;
        block.mine = min(heads, segment.group - block.unit);
        bool last = block.first + at_once >= rows, whole = block.unit + heads >= segment.group;
        Queries<T, D> queries;
        queries.template load<STAGES * KEYS>(ring, block, segment, arg.queries, arg.pages, arg.flags);

        // A lane looks after one row and has four in its fragments. Rows too many weigh nothing.
        bool there = block.has(warp);
        u32 index = there ? block.index(warp, lane) : 0, count = there ? rows_of(block, warp) : 0;
        const Query& query = arg.queries[segment.query + index / segment.window];
        float minus, factor;
        if (query.lse.base) {
            Lent lent(query, index % segment.window, arg.pages);
            minus = lent.minus, factor = lent.factor;
        } else {
            float4 row = arg.stats[segment.stats + index];
            minus = row.x, factor = row.y;
        }
        if (lane >= count) factor = 0.0f;
        float minuses[4], factors[4], logarithms[4], log = log2f(factor);
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            u32 from = lane / 4 + 8 * r;
            minuses[r] = __shfl_sync(ALL_LANES, minus, from), factors[r] = __shfl_sync(ALL_LANES, factor, from);
            logarithms[r] = __shfl_sync(ALL_LANES, log, from);
        }

        auto work = [&](i32 slot, u32 group, float (&c)[2][2][4]) {
            i32 mine = slot + lane % 4 * 2;
            bool cut = slot + (i32)GROUP > end;
            // Element i of row r is key 8 * (i / 2) + i % 2 of the lane's.
            float p[4][4], sums[4] = {}, entropy = 0.0f;
#pragma unroll
            for (u32 r = 0; r < 4; ++r)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float x = fmaf(c[r / 2][i / 2][r % 2 * 2 + i % 2], scale, -minuses[r]);
                    p[r][i] = exp2_approx(x) * factors[r];
                    if (cut && mine + (i32)(i / 2 * 8 + i % 2) >= end) p[r][i] = 0.0f;
                    entropy = fmaf(p[r][i], fmaxf(x + logarithms[r], LEAST), entropy);
                    sums[i] += p[r][i];
                }
            information += entropy;
            u32 value = lane / 16 * 2 + lane / 8 % 2, column = group * GROUP + value / 2 * 8 + lane % 4 * 2 + value % 2;
            float mean = across_rows<Sum>(sums) / count, about[4] = {};
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float of = __shfl_sync(ALL_LANES, mean, i / 2 * 16 + i % 2 * 8 + lane % 4);
#pragma unroll
                for (u32 r = 0; r < 4; ++r) {
                    float distance = lane / 4 + 8 * r < count ? p[r][i] - of : 0.0f;
                    about[i] = fmaf(distance, distance, about[i]);
                }
            }
            float square = across_rows<Sum>(about);
            if (!(lane & 4)) means[warp][column] = mean, squares[warp][column] = square;
        };
        // A tile's columns, over the warps of each head.
        auto done = [&](i32 slot) {
#pragma unroll 1
            for (u32 i = threadIdx.x; i < KEYS; i += blockDim.x) {
                i32 t = slot + (i32)i;
                if (t >= end) continue;
                float score = block.unit == 0 ? 0.0f : out[t];
#pragma unroll 1
                for (u32 unit = 0; unit < block.mine; ++unit) {
                    Moments all = {0.0f, 0.0f, 0.0f};
                    if (block.first > 0) all = {(float)block.first, moments[t].x, moments[t].y};
#pragma unroll 1
                    for (u32 w = unit * block.warps; w < (unit + 1) * block.warps && rows_of(block, w) > 0; ++w)
                        all.join({(float)rows_of(block, w), means[w][i], squares[w][i]});
                    if (!last) {
                        moments[t] = make_float2(all.mean, all.squares);
                        continue;
                    }
                    float variance = rows > 1 ? all.squares / (rows - 1) : 0.0f;
                    score += fmaf(arg.gamma, variance, all.mean);
                    variances += variance;
                }
                if (last) out[t] = whole ? score / segment.group : score;
            }
        };
        stream<T, D, KEYS>(ring, queries, there, arg.keys[segment.row], arg.pages, segment.chunks, first, end, tiles, work,
                           done);
    }
    // What is not scored.
#pragma unroll 1
    for (i32 t = max(first, end) + threadIdx.x; t < limit; t += blockDim.x) out[t] = 0.0f;
    double entropy = block_reduce<WideSum>(information, scratch) * -WIDE_LN_2;
    double variance = block_reduce<WideSum>(variances, scratch);
    if (threadIdx.x == 0) arg.parts[(u64)blockIdx.y * gridDim.x + blockIdx.x] = make_double2(entropy, variance);
}

// Where the parts of a head are; the twin of `Parts` in src/backend/cuda/attention_spread.rs.
struct Parts {
    u64 first;
    u32 count;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(128)
    attention_spread_sums(const Parts* heads, const double2* parts, float* const* sums, u32 count) {
    u32 head = blockIdx.x * blockDim.x + threadIdx.x;
    if (head >= count) return;
    double entropy = 0.0, variance = 0.0;
#pragma unroll 1
    for (u32 i = 0; i < heads[head].count; ++i) {
        double2 part = parts[heads[head].first + i];
        entropy += part.x, variance += part.y;
    }
    float* out = global(sums[head]);
    out[0] = (float)entropy, out[1] = (float)variance;
}

#define ATTENTION_SPREAD(NAME, BLOCKS, TYPE, DIM)                                                                      \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) attention_spread_##NAME(                                 \
        const Segment* segments, const Query* queries, const Rows* keys, const u32* pages, const u32* lengths,         \
        const u32* ends, const float4* stats, float* const* out, double2* parts, float2* moments, u32 chunk,           \
        u32 stride, float gamma, u32 flags) {                                                                          \
        spread<TYPE, DIM>({segments, queries, keys, pages, lengths, ends, stats, out, parts, moments, chunk, stride,   \
                           gamma, flags});                                                                             \
    }

ATTENTION_SPREAD(64, 3, Bits16, 64)
ATTENTION_SPREAD(128, 3, Bits16, 128)
ATTENTION_SPREAD(256, 2, Bits16, 256)
ATTENTION_SPREAD(f32, 3, F32, 256)
