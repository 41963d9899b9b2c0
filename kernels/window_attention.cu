// Attention of the last queries over all keys, reduced to one score per slot.
//
//   P[g][w][t] = exp(q[g][w] . k[t] / sqrt(D)) / sum over the slots visible to w     zero where t is not visible
//   out[t] = over_group_g over_window_w P[g][w][t], means likewise with both means
//
// window_attention_lse_*:  maxima and sums of every row over a chunk of slots: of all it sees (denominator), of those
//                          that are scored (mass), and of those weighted by how many pooling windows cover them (mass
//                          of the pooled row, in closed form: no pass for it).
// window_attention_rows:   chunks merged in order; what a row's exponentials are multiplied with.
// window_attention_sum_*, window_attention_max_*: probabilities, reduced over a unit's rows; max pools each row before.
// window_attention_merge:  planes of partial results merged in order, if a segment has more than a block's rows.
//
// With a log-sum-exp lent and at most 128 rows a single launch of sum or max does everything, in one pass over K.
// Q and K: 16-bit rows of up to D elements, or f32 rows of up to 256. Launch: grid (ceil(longest / chunk), segments, row
// blocks), 32 * ceil(rows / 32) <= 128 threads for the first and the third kind; (ceil(most rows / 128), segments), 128
// threads for rows; (ceil(longest / 256), segments), 256 threads for merge. Chunks are multiples of 64.
//
// A warp holds 32 query rows in registers; tiles of keys stream through a ring in shared memory and are read by all warps.
// Everything is added in an order that follows from the shapes alone.
// Source: FlashAttention-2 (arXiv 2307.08691) for the skeleton; DefensiveKV's code for the pooled rows.
// gates: window_attention_*_64 HMMA.16816.F32==32 HMMA.16816.F32.BF16==16 LDSM.16.M88.4==16 LDGSTS.E.BYPASS.128 registers<=168
// gates: window_attention_*_128 HMMA.16816.F32==64 HMMA.16816.F32.BF16==32 LDSM.16.M88.4==32 LDGSTS.E.BYPASS.128 registers<=168
// gates: window_attention_*_256 HMMA.16816.F32==128 HMMA.16816.F32.BF16==64 LDSM.16.M88.4==64 LDGSTS.E.BYPASS.128 registers<=255
// gates: window_attention_lse_* MUFU.EX2>=20
// gates: window_attention_sum_* MUFU.EX2==16
// gates: window_attention_max_* MUFU.EX2==16
// gates: window_attention_*_f32 FFMA>=64 LDGSTS.E.BYPASS.128 LDG.E.128.CONSTANT>=4 LDS.128>=4 registers<=168
// gates: window_attention_rows MUFU.EX2>=2 STG.E.128
// gates: window_attention_merge LDG.E ST.E
#include "window_attention.cuh"

struct Arguments {
    const Segment* segments;
    const Query* queries;
    const Rows* keys;
    const u32 *pages, *lengths, *ends;
    float4* stats;
    float *const *out, *const *means;
    float* planes;
    u32 chunk, radius, gap, flags;
};

__device__ inline float reduce(bool max, float a, float b) { return max ? Greatest::of(a, b) : a + b; }

// Maximum, and sums relative to it, of a row's exponentials to base two.
__device__ inline void merge(float4& row, const float4& other) {
    float greater = fmaxf(row.x, other.x);
    // Of nothing but infinitely small ones the sums stay zero, or NaN.
    float base = greater == -INFINITE ? 0.0f : greater, mine = exp2_approx(row.x - base), its = exp2_approx(other.x - base);
    row.y = row.y * mine + other.y * its;
    row.z = row.z * mine + other.z * its;
    row.w = row.w * mine + other.w * its;
    row.x = greater;
}

template <class T, u32 D> __device__ inline void row_sums(const Arguments& arg) {
    constexpr u32 KEYS = Tile<T, D>::KEYS, STRIDE = Tile<T, D>::STRIDE, STAGES = Tile<T, D>::STAGES;
    __shared__ uint4 ring[STAGES * KEYS * STRIDE];
    const Segment segment = arg.segments[blockIdx.y];
    const Sight sight(segment, arg.lengths, arg.ends, arg.gap, arg.flags);
    u32 rows = segment.group * segment.window, first = blockIdx.x * arg.chunk, from = blockIdx.z * WARPS * ROWS;
    bool pooled = arg.flags & POOLED, lent = arg.queries[segment.query].lse.base != 0;
    if (first >= sight.length || from >= rows || sight.scored == 0 || (lent && !pooled)) return;
    const Block block = {1, rows, blockDim.x / ROWS, 0, 1, from};
    Queries<T, D> queries;
    queries.template load<STAGES * KEYS>(ring, block, segment, arg.queries, arg.pages, arg.flags);

    // A lane looks after one row and has four in its fragments.
    u32 lane = lane_id(), warp = warp_id(), index = block.index(warp, lane), visible[4];
    u32 sees = sight.visible(index % segment.window);
    // x: maximum; y, z, w: sums over all slots, over scored ones, over scored ones by their weight in the pooled row.
    float4 row[4];
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
        visible[r] = __shfl_sync(ALL_LANES, sees, lane / 4 + 8 * r);
        row[r] = make_float4(-INFINITE, 0.0f, 0.0f, 0.0f);
    }
    // Slots that all rows see, far enough from the ends of the scored ones to have their full weight.
    u32 scored = sight.scored, radius = arg.radius, kernel = 2 * radius + 1;
    i32 inner = (i32)min(sight.visible(block.oldest(segment.window)), scored) - (i32)radius;
    u32 end = min(min(first + arg.chunk, sight.length), sight.visible(block.newest(segment.window)));
    u32 tiles = end > first ? (end - first + KEYS - 1) / KEYS : 0;
    float scale = queries.scale(segment);

    auto work = [&](i32 slot, u32, float (&c)[2][2][4]) {
        bool whole = slot >= (i32)radius && slot + (i32)GROUP <= inner;
        u32 mine = slot + lane % 4 * 2;
        float mass[4], pooled_mass[4];
        if (!whole) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                u32 t = mine + i / 2 * 8 + i % 2;
                u32 windows = min(t + radius, scored - 1) - (t > radius ? t - radius : 0) + 1;
                mass[i] = t < scored ? 1.0f : 0.0f;
                pooled_mass[i] = t < scored ? (float)windows / (float)kernel : 0.0f;
            }
        }
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            float x[4], greater = -INFINITE;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                x[i] = c[r / 2][i / 2][r % 2 * 2 + i % 2];
                if (!whole && mine + i / 2 * 8 + i % 2 >= visible[r]) x[i] = -INFINITE;
                greater = fmaxf(greater, x[i]);
            }
            greater = fmaxf(greater * scale, row[r].x);
            float base = greater == -INFINITE ? 0.0f : greater, old = exp2_approx(row[r].x - base);
            float all = 0.0f, some = 0.0f, weighted = 0.0f;
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                float e = exp2_approx(fmaf(x[i], scale, -base));
                all += e;
                if (!whole) some = fmaf(e, mass[i], some), weighted = fmaf(e, pooled_mass[i], weighted);
            }
            if (whole) some = all, weighted = all;
            row[r] = make_float4(greater, fmaf(row[r].y, old, all), fmaf(row[r].z, old, some),
                                 fmaf(row[r].w, old, weighted));
        }
    };
    stream<T, D, KEYS>(ring, queries, true, arg.keys[segment.row], arg.pages, segment.chunks, first, end, tiles, work,
                       [](i32) {});

    float4* out = arg.stats + segment.stats + (u64)(1 + blockIdx.x) * rows;
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
#pragma unroll 1
        for (u32 other = 1; other <= 2; other *= 2)
            merge(row[r], make_float4(__shfl_xor_sync(ALL_LANES, row[r].x, other),
                                      __shfl_xor_sync(ALL_LANES, row[r].y, other),
                                      __shfl_xor_sync(ALL_LANES, row[r].z, other),
                                      __shfl_xor_sync(ALL_LANES, row[r].w, other)));
        u32 place = lane / 4 + 8 * r, at = __shfl_sync(ALL_LANES, index, place);
        if (lane % 4 == 0 && block.real(warp, place)) out[at] = row[r];
    }
}

// Of each row: what is subtracted from its logits, the factor from exponential to probability, and the factor from a sum
// of 2 * radius + 1 exponentials to the pooled row at its former mass. NaN of a row must reach what it sees and nothing
// else, but all of a pooled row: it is in the first and in the last.
extern "C" __global__ void __launch_bounds__(128)
    window_attention_rows(const Segment* segments, const Query* queries, const u32* lengths, const u32* ends,
                          float4* stats, u32 chunk, u32 radius, u32 flags) {
    const Segment segment = segments[blockIdx.y];
    const Sight sight(segment, lengths, ends, 0, flags);
    u32 rows = segment.group * segment.window, row = blockIdx.x * blockDim.x + threadIdx.x;
    bool lent = queries[segment.query].lse.base != 0;
    if (row >= rows || sight.scored == 0 || (lent && !(flags & POOLED))) return;
    float4* mine = stats + segment.stats + row;
    float4 sums = make_float4(-INFINITE, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (u32 first = 0, i = 1; first < sight.length; first += chunk, ++i) merge(sums, mine[(u64)i * rows]);
    float nan = __int_as_float(0x7fffffff), inverse = 0.0f, pooled = 0.0f;
    if (sums.y > 0.0f) {
        inverse = 1.0f / sums.y;
        if (sums.w > 0.0f) pooled = sums.z / sums.w * inverse / (float)(2 * radius + 1);
    } else if (sums.y != sums.y || sight.visible(row % segment.window) > 0) {
        sums.x = nan, inverse = 1.0f, pooled = nan;
    }
    *mine = make_float4(sums.x, inverse, pooled, 0.0f);
}

// Probabilities of a warp's rows on the last 48 slots, to be pooled: 16 and twice a radius of at most 15. Rows start so that the eight rows and four columns
// that lanes read at once lie in 32 banks.
constexpr u32 COLUMNS = 3 * GROUP, POOL = ROWS * COLUMNS + ROWS / 2;
__device__ inline u32 pool_row(u32 row) { return row * COLUMNS + row / 2; }

// The largest window sum of a lane's rows at four columns. Place `oldest` of the ring is the first that counts, for the
// first column.
__device__ inline void pool_rows(const float* pool, u32 oldest, u32 radius, float (&p)[4]) {
    const float* mine = pool + pool_row(lane_id() / 4);
    auto at = [&](u32 i) { return min(oldest + i, oldest + i - COLUMNS); };
    // What all four windows share, then what is left of the ends of three.
    float shared[4] = {};
#pragma unroll 1
    for (u32 i = 3; i <= 2 * radius; ++i)
#pragma unroll
        for (u32 r = 0; r < 4; ++r) shared[r] += mine[pool_row(8 * r) + at(i)];
    u32 left[3], right[3];
#pragma unroll
    for (u32 i = 0; i < 3; ++i) left[i] = at(i), right[i] = at(2 * radius + 1 + i);
#pragma unroll
    for (u32 r = 0; r < 4; ++r) {
        const float* row = mine + pool_row(8 * r);
        float l0 = row[left[0]], l1 = row[left[1]], l2 = row[left[2]];
        float r0 = row[right[0]], r1 = row[right[1]], r2 = row[right[2]];
        p[0] = Greatest::of(p[0], l0 + l1 + l2 + shared[r]);
        p[1] = Greatest::of(p[1], l1 + l2 + shared[r] + r0);
        p[2] = Greatest::of(p[2], l2 + shared[r] + r0 + r1);
        p[3] = Greatest::of(p[3], shared[r] + r0 + r1 + r2);
    }
}

template <class T, u32 D, bool MAX> __device__ inline void scores(const Arguments& arg) {
    // Pooling needs its shared memory.
    constexpr u32 KEYS = Tile<T, D>::KEYS / (MAX && Tile<T, D>::KEYS > GROUP ? 2 : 1);
    constexpr u32 STRIDE = Tile<T, D>::STRIDE, STAGES = Tile<T, D>::STAGES;
    __shared__ uint4 ring[STAGES * KEYS * STRIDE];
    __shared__ float columns[MAX ? 2 : 1][WARPS][KEYS];
    __shared__ float pools[MAX ? WARPS * POOL : 1];
    const Segment segment = arg.segments[blockIdx.y];
    const Sight sight(segment, arg.lengths, arg.ends, arg.gap, arg.flags);
    i32 first = blockIdx.x * arg.chunk, limit = min((u32)first + arg.chunk, sight.length);
    if (first >= limit) return;

    // The block's units, and of a large unit every `splits`-th block of rows.
    bool window_max = arg.flags & WINDOW_MAX, group_max = arg.flags & GROUP_MAX, pooled = arg.flags & POOLED;
    bool means = MAX && arg.flags & MEANS, direct = segment.planes == ~0ull;
    u32 lane = lane_id(), warp = warp_id(), all = segment.group * segment.window;
    Block block;
    block.units = window_max == group_max ? 1 : segment.group;
    block.rows = all / block.units;
    block.warps = min((block.rows + ROWS - 1) / ROWS, blockDim.x / ROWS);
    bool large = block.rows > WARPS * ROWS;
    u32 room = blockDim.x / ROWS / block.warps;
    block.unit = large ? blockIdx.z / segment.splits : blockIdx.z * room;
    if (block.unit >= block.units) return;
    block.mine = min(room, block.units - block.unit);
    u32 split = large ? blockIdx.z % segment.splits : 0;

    i32 radius = MAX ? arg.radius : 0, end = min(limit, (i32)sight.scored), start = first - radius;
    float* out = arg.out[segment.row];
    float* mean = arg.flags & MEANS ? arg.means[segment.row] : nullptr;
    u64 mean_planes = (u64)block.units * segment.splits * segment.stride;
    float* planes = arg.planes + segment.planes + (u64)(block.unit * segment.splits + split) * segment.stride;
    if (arg.flags & ONLY_MEANS) planes += mean_planes;
    Queries<T, D> queries;
    float scale = queries.scale(segment), per_unit = window_max ? 1.0f : 1.0f / block.rows;
    float per_group = group_max ? 1.0f : 1.0f / block.units, per_row = 1.0f / all;

#pragma unroll 1
    for (block.first = split * WARPS * ROWS; block.first < block.rows && first < end;
         block.first += segment.splits * WARPS * ROWS) {
        bool fresh = block.first == split * WARPS * ROWS;
        queries.template load<STAGES * KEYS>(ring, block, segment, arg.queries, arg.pages, arg.flags);
        if (MAX && radius > 0) {
#pragma unroll 1
            for (u32 i = threadIdx.x; i < blockDim.x / ROWS * POOL; i += blockDim.x) pools[i] = 0.0f;
        }

        // Of a row: slots that it gives scores to, what is subtracted from logits, factors. A lane looks after one.
        bool there = block.has(warp);
        u32 index = there ? block.index(warp, lane) : 0, w = index % segment.window, counts = sight.counted(w);
        const Query& query = arg.queries[segment.query + index / segment.window];
        float minus, factor, inverse;
        if (query.lse.base && !pooled) {
            Lent lent(query, w, arg.pages);
            minus = lent.minus, factor = inverse = lent.factor;
        } else {
            float4 row = sight.scored > 0 ? arg.stats[segment.stats + index] : make_float4(0, 0, 0, 0);
            minus = row.x, inverse = row.y, factor = pooled ? row.z : row.y;
        }
        if (!there || !block.real(warp, lane)) inverse = factor = 0.0f;
        u32 counted[4];
        float minuses[4], factors[4], inverses[4];
#pragma unroll
        for (u32 r = 0; r < 4; ++r) {
            u32 from = lane / 4 + 8 * r;
            counted[r] = __shfl_sync(ALL_LANES, counts, from), minuses[r] = __shfl_sync(ALL_LANES, minus, from);
            factors[r] = __shfl_sync(ALL_LANES, factor, from), inverses[r] = __shfl_sync(ALL_LANES, inverse, from);
        }
        // Slots that all rows reach, and that some do. A NaN row that is pooled is NaN everywhere.
        i32 whole = sight.counted(block.oldest(segment.window));
        i32 stop = pooled ? end : min(end, (i32)sight.counted(block.newest(segment.window)));
        u32 tiles = stop > first ? (stop + radius - start + KEYS - 1) / KEYS : 0;

        auto work = [&](i32 slot, u32 group, float (&c)[2][2][4]) {
            u32 mine = slot + lane % 4 * 2;
            bool cut = slot < 0 || slot + (i32)GROUP > whole;
            // Probabilities but for a factor; element i of row r is key 8 * (i / 2) + i % 2 of the lane's.
            float e[4][4], p[4] = {};
#pragma unroll
            for (u32 r = 0; r < 4; ++r)
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    e[r][i] = exp2_approx(fmaf(c[r / 2][i / 2][r % 2 * 2 + i % 2], scale, -minuses[r]));
            if (cut) {
#pragma unroll
                for (u32 r = 0; r < 4; ++r)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i)
                        if (mine + i / 2 * 8 + i % 2 >= counted[r]) e[r][i] = 0.0f;
            }
            u32 value = lane / 16 * 2 + lane / 8 % 2, column = value / 2 * 8 + lane % 4 * 2 + value % 2;
            if (means) {
                float sums[4] = {};
#pragma unroll
                for (u32 r = 0; r < 4; ++r)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i) sums[i] = fmaf(e[r][i], inverses[r], sums[i]);
                float sum = across_rows<Sum>(sums);
                if (!(lane & 4)) columns[MAX][warp][group * GROUP + column] = sum;
            }
            if (MAX && radius > 0) {
                u32 newest = (u32)(slot - start) / GROUP % 3 * GROUP;
                float* pool = pools + warp * POOL;
#pragma unroll
                for (u32 r = 0; r < 4; ++r)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i)
                        pool[pool_row(lane / 4) + pool_row(8 * r) + newest + lane % 4 * 2 + i / 2 * 8 + i % 2] =
                            e[r][i] * factors[r];
                __syncwarp();
                u32 oldest = newest + lane % 4 * 4 + COLUMNS - 2 * radius;
                pool_rows(pool, min(oldest, oldest - COLUMNS), radius, p);
                __syncwarp();
                column = lane % 4 * 4 + value;
            } else {
#pragma unroll
                for (u32 r = 0; r < 4; ++r)
#pragma unroll
                    for (u32 i = 0; i < 4; ++i)
                        p[i] = MAX ? Greatest::of(p[i], e[r][i] * factors[r]) : fmaf(e[r][i], factors[r], p[i]);
            }
            float reduced = MAX ? across_rows<Greatest>(p) : across_rows<Sum>(p);
            if (!(lane & 4)) columns[0][warp][group * GROUP + column] = reduced;
        };
        // A tile's columns, over the warps of each unit, and what becomes of them.
        auto done = [&](i32 slot) {
#pragma unroll 1
            for (u32 i = threadIdx.x; i < KEYS; i += blockDim.x) {
                // Pooled columns come `radius` slots late.
                i32 t = slot + (i32)i - radius, u = slot + (i32)i;
                bool scored = t >= first && t < end, averaged = means && u >= first && u < end;
                float score = 0.0f, sum = 0.0f;
#pragma unroll 1
                for (u32 unit = 0; unit < block.mine; ++unit) {
                    float x = columns[0][unit * block.warps][i], y = 0.0f;
#pragma unroll 1
                    for (u32 w = 1; w < block.warps; ++w)
                        x = reduce(MAX, x, columns[0][unit * block.warps + w][i]);
                    if (means) {
#pragma unroll 1
                        for (u32 w = 0; w < block.warps; ++w) y += columns[MAX][unit * block.warps + w][i];
                    }
                    if (direct) {
                        score = reduce(group_max, score, x * per_unit), sum += MAX ? y : x;
                    } else {
                        float* plane = planes + (u64)unit * segment.splits * segment.stride;
                        if (scored) plane[t] = fresh ? x : reduce(MAX, plane[t], x);
                        if (averaged) plane[mean_planes + u] = fresh ? y : plane[mean_planes + u] + y;
                    }
                }
                if (direct && scored) out[t] = score * per_group;
                if (direct && mean && (MAX ? averaged : scored)) mean[u] = u < (i32)sight.past ? sum * per_row : 0.0f;
            }
        };
        stream<T, D, KEYS>(ring, queries, there, arg.keys[segment.row], arg.pages, segment.chunks, start,
                           min((i32)sight.scored, end + radius), tiles, work, done);

        // What no row reaches.
        i32 rest = tiles == 0 ? first : min(end, start + (i32)(tiles * KEYS) - radius);
        i32 mean_rest = tiles == 0 ? first : min(end, start + (i32)(tiles * KEYS));
#pragma unroll 1
        for (i32 t = min(rest, mean_rest) + threadIdx.x; t < end && (direct || fresh); t += blockDim.x) {
#pragma unroll 1
            for (u32 unit = 0; unit < block.mine && !direct; ++unit) {
                float* plane = planes + (u64)unit * segment.splits * segment.stride;
                if (t >= rest) plane[t] = 0.0f;
                if (means && t >= mean_rest) plane[mean_planes + t] = 0.0f;
            }
            if (direct && t >= rest) out[t] = 0.0f;
            if (direct && mean && t >= mean_rest) mean[t] = 0.0f;
        }
    }
    // What is not scored.
#pragma unroll 1
    for (i32 t = max(first, end) + threadIdx.x; t < limit && direct; t += blockDim.x) {
        out[t] = 0.0f;
        if (mean) mean[t] = 0.0f;
    }
}


// Partial results of a segment at its slots: planes [unit][split], then as many for the means.
extern "C" __global__ void __launch_bounds__(256)
    window_attention_merge(const Segment* segments, const u32* lengths, const u32* ends, const float* planes,
                           float* const* out, float* const* means, u32 radius, u32 gap, u32 flags) {
    const Segment segment = segments[blockIdx.y];
    const Sight sight(segment, lengths, ends, gap, flags);
    u32 t = blockIdx.x * blockDim.x + threadIdx.x;
    if (segment.planes == ~0ull || t >= sight.length) return;
    bool window_max = flags & WINDOW_MAX, group_max = flags & GROUP_MAX, pooled = flags & POOLED;
    u32 all = segment.group * segment.window, units = window_max == group_max ? 1 : segment.group;
    const float* mine = planes + segment.planes;
    auto of_unit = [&](u32 unit, u32 slot, bool max) {
        const float* plane = mine + (u64)unit * segment.splits * segment.stride + slot;
        float x = plane[0];
#pragma unroll 1
        for (u32 split = 1; split < segment.splits; ++split) x = reduce(max, x, plane[(u64)split * segment.stride]);
        return x;
    };

    float score = 0.0f, per_unit = window_max ? 1.0f : (float)units / all, per_group = group_max ? 1.0f : 1.0f / units;
#pragma unroll 1
    for (u32 unit = 0; unit < units && t < sight.scored; ++unit) {
        float x = 0.0f;
        // A mean of pooled rows is the pooled mean; maxima come from pooled rows.
        u32 reach = pooled && !window_max ? radius : 0;
#pragma unroll 1
        for (u32 slot = t > reach ? t - reach : 0; slot < min(sight.scored, t + reach + 1); ++slot)
            x += of_unit(unit, slot, window_max);
        score = reduce(group_max, score, x * per_unit);
    }
    out[segment.row][t] = score * per_group;

    if (flags & MEANS) {
        float sum = 0.0f;
        // Maxima and pooled rows have planes of sums beside them; plain sums are what is wanted.
        u32 first = window_max || pooled ? units : 0;
#pragma unroll 1
        for (u32 unit = first; unit < first + units && t < sight.past; ++unit) sum += of_unit(unit, t, false);
        means[segment.row][t] = sum / all;
    }
}

#define WINDOW_ATTENTION(KIND, NAME, BLOCKS, BODY)                                                                     \
    extern "C" __global__ void __launch_bounds__(128, BLOCKS) window_attention_##KIND##_##NAME(                        \
        const Segment* segments, const Query* queries, const Rows* keys, const u32* pages, const u32* lengths,         \
        const u32* ends, float4* stats, float* const* out, float* const* means, float* planes, u32 chunk, u32 radius,  \
        u32 gap, u32 flags) {                                                                                          \
        BODY({segments, queries, keys, pages, lengths, ends, stats, out, means, planes, chunk, radius, gap, flags});   \
    }
#define ALL_KINDS(NAME, BLOCKS, TYPE, DIM)                                                                             \
    WINDOW_ATTENTION(lse, NAME, BLOCKS, (row_sums<TYPE, DIM>))                                                         \
    WINDOW_ATTENTION(sum, NAME, BLOCKS, (scores<TYPE, DIM, false>))                                                    \
    WINDOW_ATTENTION(max, NAME, BLOCKS, (scores<TYPE, DIM, true>))

ALL_KINDS(64, 3, Bits16, 64)
ALL_KINDS(128, 3, Bits16, 128)
ALL_KINDS(256, 2, Bits16, 256)
ALL_KINDS(f32, 3, F32, 256)
