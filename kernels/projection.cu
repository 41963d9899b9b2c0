// How far each slot's value reaches along what the last queries read.
//
//   a[w][t] = softmax over the slots visible to w, as in window_attention.cu, zero where t is not visible; then its maximum over
//             2 * radius + 1 slots
//   y[w][d] = sum over the anchor's t of a[w][t] * v[t][d]
//   out[t]  = sum over the group's and the window's w of a[w][t] * (v[t] . y[w])           NaN unless it is finite
//
// projection_read_*:  parts of y: of a chunk of the anchor, for a block of rows and `Shape::PART` of their columns.
// projection_outputs: chunks added in their order, in f64; divided by the row's length if `normalise`.
// projection_score_*: scores of a chunk of slots, one block of rows after the other.
//
// Rows' statistics are those of window_attention_lse_* and window_attention_rows. Launch: grid (ceil(longest / chunk), segments,
// row blocks * parts) for read, (ceil(longest / chunk), segments) for score, both with the threads of the statistics; (ceil(most
// rows / 4), segments), 128 threads for outputs. Chunks are multiples of 16, the radius is at most 8.
//
// Weights, never in memory as a whole: tensor cores give logits of 16 slots, which leave raw weights in a ring of two such groups in
// shared memory, where each thread pools those of one row. What they multiply, values and outputs, stays f32, as its digits matter: no
// tensor cores there. Everything is added in an order that follows from the shapes alone.
// Source: AnDPro (NeurIPS 2025), its sums over chunks taken apart: out = rowsum(a^T * (V y^T)).
// gates: projection_*_64 HMMA.16816.F32==32 HMMA.16816.F32.BF16==16 FFMA>=128 MUFU.EX2==16
// gates: projection_*_128 HMMA.16816.F32==64 HMMA.16816.F32.BF16==32 FFMA>=128 MUFU.EX2==16
// gates: projection_*_256 HMMA.16816.F32==128 HMMA.16816.F32.BF16==64 FFMA>=64 MUFU.EX2==16
// gates: projection_*_f32 FFMA>=128 MUFU.EX2==16 registers<=168
// gates: projection_read_* LDS.64>=8 LDS.128>=2 LDG.E.128.CONSTANT STG.E.128 registers<=255
// gates: projection_score_* LDS.128>=8 LDG.E.128.CONSTANT registers<=255
// gates: projection_score_64 registers<=168
// gates: projection_outputs DADD DFMA STG.E
#include "window_attention.cuh"

// What the rows of a segment read, and where their outputs are; the twin of `Anchor` in src/backend/cuda/projection.rs.
struct Anchor {
    u32 first, end; // slots
    u64 outputs;    // first float of y: [row][D]
    u64 partials;   // first float of its parts: [chunk][row][D]
};

struct Arguments {
    const Segment* segments;
    const Query* queries;
    const Rows *keys, *values;
    const u32 *pages, *lengths, *ends;
    const float4* stats;
    const Anchor* anchors; // as keys, values and scores: by the segment's row
    float *outputs, *partials;
    float* const* out;
    u32 chunk, radius, flags;
};

// Elements of 16 bytes, and columns that a block has of y: fewer where queries take most registers.
template <class T, u32 D> struct Shape {
    static constexpr u32 COUNT = 8, PART = D > 128 ? 32 : 64;
};
template <u32 D> struct Shape<F32, D> {
    static constexpr u32 COUNT = 4, PART = 64;
};

// Raw weights of a row: two groups of slots, an odd number of floats, so that 32 threads read 32 banks. Pooled ones of a group: rows of
// an odd number of 16-byte chunks, so that eight threads write in eight groups of four banks, and four rows are read in four.
constexpr u32 RAW = 2 * GROUP + 1, POOLED_ROW = GROUP + 4;

// 32 query rows of each warp, and what makes weights of their logits.
template <class T, u32 D> struct Weights {
    Queries<T, D> queries;
    float (*raw)[RAW], (*pooled)[POOLED_ROW];
    u32 counted[4];
    float minuses[4], factors[4], scale;
    i32 start, whole; // first slot of the stream; slots that all rows see
    u32 radius;

    template <u32 RING>
    __device__ void load(uint4* ring, const Arguments& arg, const Segment& segment, const Sight& sight, const Block& block,
                         i32 first) {
        queries.template load<RING>(ring, block, segment, arg.queries, arg.pages, arg.flags);
        scale = queries.scale(segment), radius = arg.radius, start = first - (i32)radius;
        // A lane looks after one row and has four in its fragments. Rows too many weigh nothing.
        u32 lane = lane_id(), warp = warp_id(), index = block.index(warp, lane), w = index % segment.window;
        bool real = block.real(warp, lane);
        u32 counts = real ? sight.visible(w) : 0;
        whole = __all_sync(ALL_LANES, real) ? (i32)sight.visible(block.oldest(segment.window)) : 0;
        const Query& query = arg.queries[segment.query + index / segment.window];
        float minus, factor;
        if (query.lse.base) {
            Lent lent(query, w, arg.pages);
            minus = lent.minus, factor = lent.factor;
        } else {
            float4 row = arg.stats[segment.stats + index];
            minus = row.x, factor = row.y;
        }
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            u32 from = lane / 4 + 8 * r;
            counted[r] = __shfl_sync(ALL_LANES, counts, from), minuses[r] = __shfl_sync(ALL_LANES, minus, from);
            factors[r] = __shfl_sync(ALL_LANES, factor, from);
        }
        // Before the first slot there is nothing.
#pragma unroll 1
        for (u32 i = 0; i < RAW; ++i) raw[threadIdx.x][i] = 0.0f;
        __syncwarp();
    }

    __device__ u32 place(i32 slot) const { return (u32)(slot - start) % (2 * GROUP); }

    // Raw weights of 16 slots, to the ring.
    __device__ void put(i32 slot, const float (&c)[2][2][4]) const {
        u32 lane = lane_id(), mine = slot + lane % 4 * 2, to = place(slot) + lane % 4 * 2;
        bool cut = slot < 0 || slot + (i32)GROUP > whole;
#pragma unroll
        for (u32 r = 0; r < 4; ++r)
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u32 key = i / 2 * 8 + i % 2;
                float e = exp2_approx(fmaf(c[r / 2][i / 2][r % 2 * 2 + i % 2], scale, -minuses[r])) * factors[r];
                // Not even NaN where the row sees nothing.
                raw[warp_id() * ROWS + lane / 4 + 8 * r][to + key] = cut && mine + key >= counted[r] ? 0.0f : e;
            }
    }

    // Pooled weights of the thread's row at the 16 slots whose neighbours are in the ring now, zero outside the given ones;
    // the first of them.
    __device__ i32 pool(i32 slot, i32 first, i32 end) const {
        const float* mine = raw[threadIdx.x];
        i32 from = slot - (i32)radius;
        u32 oldest = place(from - (i32)radius);
        float out[GROUP];
#pragma unroll
        for (u32 i = 0; i < GROUP; ++i) out[i] = mine[(oldest + i) % (2 * GROUP)];
#pragma unroll 1
        for (u32 offset = 1; offset <= 2 * radius; ++offset)
#pragma unroll
            for (u32 i = 0; i < GROUP; ++i) out[i] = Greatest::of(out[i], mine[(oldest + offset + i) % (2 * GROUP)]);
#pragma unroll
        for (i32 i = 0; i < (i32)GROUP; ++i)
            if (from + i < first || from + i >= end) out[i] = 0.0f;
#pragma unroll
        for (u32 i = 0; i < GROUP; i += 4)
            *reinterpret_cast<float4*>(pooled[threadIdx.x] + i) = make_float4(out[i], out[i + 1], out[i + 2], out[i + 3]);
        return from;
    }
};

// 16 bytes of a value, widened.
template <class T> struct Widen {
    __device__ static void of(const uint4& words, float (&x)[8], bool half) {
        if (half) F16Chunk::widen(words, x);
        else Bf16Chunk::widen(words, x);
    }
};
template <> struct Widen<F32> {
    __device__ static void of(const uint4& words, float (&x)[4], bool) { F32Chunk::widen(words, x); }
};

// Values of 16 slots in some columns: zeros at slots outside `first..end` and beyond the head dim.
template <class T, u32 D>
__device__ inline void load_values(float (&tile)[GROUP][Shape<T, D>::PART], const Rows& values, const u32* pages, i32 from,
                                   i32 first, i32 end, u32 column, u32 chunks, bool half) {
    constexpr u32 COUNT = Shape<T, D>::COUNT, ACROSS = Shape<T, D>::PART / COUNT;
#pragma unroll 1
    for (u32 i = threadIdx.x; i < GROUP * ACROSS; i += blockDim.x) {
        i32 slot = from + (i32)(i / ACROSS);
        u32 chunk = column / COUNT + i % ACROSS;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (slot >= first && slot < end && chunk < chunks)
            words = __ldg(global(reinterpret_cast<const uint4*>(values.at(slot, pages))) + chunk);
        float x[COUNT];
        Widen<T>::of(words, x, half);
#pragma unroll
        for (u32 j = 0; j < COUNT; j += 4)
            *reinterpret_cast<float4*>(&tile[i / ACROSS][i % ACROSS * COUNT + j]) = make_float4(x[j], x[j + 1], x[j + 2], x[j + 3]);
    }
}

__device__ inline void multiply_add(float (&sum)[4], float a, const float4& b) {
    sum[0] = fmaf(a, b.x, sum[0]), sum[1] = fmaf(a, b.y, sum[1]);
    sum[2] = fmaf(a, b.z, sum[2]), sum[3] = fmaf(a, b.w, sum[3]);
}

// What both kernels have in shared memory.
template <class T, u32 D> struct Room {
    static constexpr u32 RING = Tile<T, D>::STAGES * GROUP;
    uint4 ring[RING * Tile<T, D>::STRIDE];
    float raw[WARPS * ROWS][RAW];
    alignas(16) float pooled[WARPS * ROWS][POOLED_ROW];
    alignas(16) float values[GROUP][Shape<T, D>::PART];
};

template <class T, u32 D> __device__ inline void read(const Arguments& arg) {
    constexpr u32 PART = Shape<T, D>::PART, VECTORS = PART / 32;
    __shared__ Room<T, D> room;
    const Segment segment = arg.segments[blockIdx.y];
    const Sight sight(segment, arg.lengths, arg.ends, 0, arg.flags);
    const Anchor anchor = arg.anchors[segment.row];
    u32 rows = segment.group * segment.window, dim = segment.chunks * Shape<T, D>::COUNT, parts = (D + PART - 1) / PART;
    u32 column = blockIdx.z % parts * PART, from = blockIdx.z / parts * blockDim.x;
    i32 first = anchor.first + blockIdx.x * arg.chunk, end = min((u32)first + arg.chunk, anchor.end);
    if (first >= end || from >= rows || column >= dim) return;

    const Block block = {1, rows, blockDim.x / ROWS, 0, 1, from};
    Weights<T, D> weights;
    weights.raw = room.raw, weights.pooled = room.pooled;
    weights.template load<Room<T, D>::RING>(room.ring, arg, segment, sight, block, first);
    const Rows values = arg.values[segment.row];
    // A lane has eight rows, four apart, and every eighth vector of columns.
    u32 lane = lane_id(), row = warp_id() * ROWS + lane / 8, place = lane % 8 * 4;
    float sums[8][VECTORS][4] = {};
    auto done = [&](i32 slot) {
        i32 out = weights.pool(slot, first, end);
        load_values<T, D>(room.values, values, arg.pages, out, first, end, column, segment.chunks, arg.flags & HALF);
        __syncthreads();
#pragma unroll 1
        for (u32 i = 0; i < GROUP; i += 2) {
            float4 v[2][VECTORS];
#pragma unroll
            for (u32 j = 0; j < 2; ++j)
#pragma unroll
                for (u32 n = 0; n < VECTORS; ++n)
                    v[j][n] = *reinterpret_cast<const float4*>(&room.values[i + j][n * 32 + place]);
#pragma unroll
            for (u32 r = 0; r < 8; ++r) {
                float2 a = *reinterpret_cast<const float2*>(&room.pooled[row + 4 * r][i]);
#pragma unroll
                for (u32 n = 0; n < VECTORS; ++n)
                    multiply_add(sums[r][n], a.x, v[0][n]), multiply_add(sums[r][n], a.y, v[1][n]);
            }
        }
    };
    i32 stop = min(end + (i32)arg.radius, (i32)sight.length);
    u32 tiles = (end + arg.radius - weights.start + GROUP - 1) / GROUP;
    stream<T, D, GROUP>(room.ring, weights.queries, true, arg.keys[segment.row], arg.pages, segment.chunks, weights.start, stop,
                        tiles, [&](i32 slot, u32, float (&c)[2][2][4]) { weights.put(slot, c); }, done);

    float* out = arg.partials + anchor.partials + (u64)blockIdx.x * rows * dim;
#pragma unroll
    for (u32 r = 0; r < 8; ++r)
#pragma unroll
        for (u32 n = 0; n < VECTORS; ++n) {
            u32 at = from + row + 4 * r, to = column + n * 32 + place;
            if (at < rows && to < dim)
                *reinterpret_cast<float4*>(out + (u64)at * dim + to) =
                    make_float4(sums[r][n][0], sums[r][n][1], sums[r][n][2], sums[r][n][3]);
        }
}

// A warp adds the parts of a row: `count` elements of 16 bytes in each of its chunks.
extern "C" __global__ void __launch_bounds__(128)
    projection_outputs(const Segment* segments, const Anchor* anchors, const float* partials, float* outputs, u32 chunk,
                       u32 count, u32 normalise) {
    const Segment segment = segments[blockIdx.y];
    const Anchor anchor = anchors[segment.row];
    u32 rows = segment.group * segment.window, dim = segment.chunks * count, row = blockIdx.x * WARPS + warp_id();
    if (row >= rows) return;
    const float* part = partials + anchor.partials + (u64)row * dim;
    float* out = outputs + anchor.outputs + (u64)row * dim;
    auto sum = [&](u32 d) {
        double y = 0.0;
#pragma unroll 1
        for (u64 first = anchor.first, c = 0; first < anchor.end; first += chunk, ++c) y += (double)part[c * rows * dim + d];
        return y;
    };
    double factor = 1.0;
    if (normalise) {
        double squares = 0.0;
#pragma unroll 1
        for (u32 d = lane_id(); d < dim; d += 32) {
            double y = sum(d);
            squares = fma(y, y, squares);
        }
        double norm = sqrt(warp_reduce<WideSum>(squares));
        // Of zeros there is no direction.
        if (norm != 0.0) factor = 1.0 / norm;
    }
#pragma unroll 1
    for (u32 d = lane_id(); d < dim; d += 32) out[d] = (float)(sum(d) * factor);
}

template <class T, u32 D> __device__ inline void score(const Arguments& arg) {
    constexpr u32 PART = Shape<T, D>::PART, ACROSS = PART / 4, SLOTS = GROUP * ACROSS / 32;
    __shared__ Room<T, D> room;
    __shared__ float columns[WARPS][GROUP];
    const Segment segment = arg.segments[blockIdx.y];
    const Sight sight(segment, arg.lengths, arg.ends, 0, arg.flags);
    i32 first = blockIdx.x * arg.chunk, end = min((u32)first + arg.chunk, sight.length);
    if (first >= end) return;

    u32 rows = segment.group * segment.window, dim = segment.chunks * Shape<T, D>::COUNT;
    const Rows values = arg.values[segment.row];
    const float* outputs = arg.outputs + arg.anchors[segment.row].outputs;
    float* out = global(arg.out[segment.row]);
    Weights<T, D> weights;
    weights.raw = room.raw, weights.pooled = room.pooled;
    // A lane has four columns of some slots.
    u32 lane = lane_id(), warp = warp_id(), place = lane % ACROSS * 4, mine = lane / ACROSS * SLOTS;
#pragma unroll 1
    for (u32 from = 0; from < rows; from += blockDim.x) {
        const Block block = {1, rows, blockDim.x / ROWS, 0, 1, from};
        weights.template load<Room<T, D>::RING>(room.ring, arg, segment, sight, block, first);
        bool last = from + blockDim.x >= rows;
        auto done = [&](i32 slot) {
            i32 to = weights.pool(slot, first, end);
            float sums[SLOTS] = {};
#pragma unroll 1
            for (u32 column = 0; column < dim; column += PART) {
                __syncthreads();
                load_values<T, D>(room.values, values, arg.pages, to, first, end, column, segment.chunks, arg.flags & HALF);
                __syncthreads();
                // What the warp's rows read, each by its weight at a slot.
                float read[SLOTS][4] = {};
#pragma unroll 4
                for (u32 row = 0; row < ROWS && column + place < dim; ++row) {
                    const float* y = outputs + (u64)block.index(warp, row) * dim + column + place;
                    float4 of_row = __ldg(reinterpret_cast<const float4*>(y));
                    const float* a = &room.pooled[warp * ROWS + row][mine];
#pragma unroll
                    for (u32 i = 0; i < SLOTS; i += 4) {
                        float4 by = *reinterpret_cast<const float4*>(a + i);
                        multiply_add(read[i], by.x, of_row), multiply_add(read[i + 1], by.y, of_row);
                        multiply_add(read[i + 2], by.z, of_row), multiply_add(read[i + 3], by.w, of_row);
                    }
                }
#pragma unroll
                for (u32 i = 0; i < SLOTS; ++i) {
                    float4 v = *reinterpret_cast<const float4*>(&room.values[mine + i][place]);
                    sums[i] = fmaf(read[i][0], v.x, sums[i]), sums[i] = fmaf(read[i][1], v.y, sums[i]);
                    sums[i] = fmaf(read[i][2], v.z, sums[i]), sums[i] = fmaf(read[i][3], v.w, sums[i]);
                }
            }
#pragma unroll
            for (u32 i = 0; i < SLOTS; ++i) {
#pragma unroll
                for (u32 distance = ACROSS / 2; distance > 0; distance /= 2)
                    sums[i] += __shfl_xor_sync(ALL_LANES, sums[i], distance);
                if (place == 0) columns[warp][mine + i] = sums[i];
            }
            __syncthreads();
            i32 t = to + (i32)threadIdx.x;
            if (threadIdx.x < GROUP && t >= first && t < end) {
                float sum = from == 0 ? 0.0f : out[t];
#pragma unroll 1
                for (u32 w = 0; w < blockDim.x / ROWS; ++w) sum += columns[w][threadIdx.x];
                out[t] = !last || fabsf(sum) < INFINITE ? sum : __int_as_float(0x7fffffff);
            }
        };
        i32 stop = min(end + (i32)arg.radius, (i32)sight.length);
        u32 tiles = (end + arg.radius - weights.start + GROUP - 1) / GROUP;
        stream<T, D, GROUP>(room.ring, weights.queries, true, arg.keys[segment.row], arg.pages, segment.chunks, weights.start,
                            stop, tiles, [&](i32 slot, u32, float (&c)[2][2][4]) { weights.put(slot, c); }, done);
    }
}

#define PROJECTION(KIND, NAME, BLOCKS, TYPE, DIM)                                                                      \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) projection_##KIND##_##NAME(                              \
        const Segment* segments, const Query* queries, const Rows* keys, const Rows* values, const u32* pages,         \
        const u32* lengths, const u32* ends, const float4* stats, const Anchor* anchors, float* outputs,               \
        float* partials, float* const* out, u32 chunk, u32 radius, u32 flags) {                                        \
        KIND<TYPE, DIM>({segments, queries, keys, values, pages, lengths, ends, stats, anchors, outputs, partials,     \
                         out, chunk, radius, flags});                                                                  \
    }

PROJECTION(read, 64, 2, Bits16, 64)
PROJECTION(read, 128, 2, Bits16, 128)
PROJECTION(read, 256, 2, Bits16, 256)
PROJECTION(read, f32, 3, F32, 256)
PROJECTION(score, 64, 3, Bits16, 64)
PROJECTION(score, 128, 2, Bits16, 128)
PROJECTION(score, 256, 2, Bits16, 256)
PROJECTION(score, f32, 3, F32, 256)
