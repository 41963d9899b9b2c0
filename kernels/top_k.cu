// Exact selection of the best slots of rows (segments) that compete for budgets.
//
// Order: protected first, then score descending (-0 = +0, NaN lowest), then segment, then slot ascending. In each
// contest every segment keeps its `floor` best; the rest of the budget goes to the best of what is left of all. Floors
// and budgets above what the lengths allow mean all there is. The order is total, so the answer is unique; slots are
// emitted ascending.
//
// A radix descent over ordered 32-bit keys, digits of 11, 11 and 10 bits. With c_s(b) the keys of segment s at or above
// bin edge b, total(b) = sum of max(floor_s, c_s(b)) falls as b rises: the digit of the contest's cut is the highest
// edge whose total reaches the budget. A segment's own cut, for its floor, descends beside it for as long as the two
// agree. Where the floor's digit is the lower one, the segment keeps its floor and no more, whatever the contest does;
// where it is the higher one, the floor is met. So one cut per segment is enough, the lower of the two.
// Counts only, so that ties cost nothing and no order of blocks is visible.
//
//   top_k_level_0   reads the scores: counts of first digits, of which the lowest is NaN's alone
//   top_k_pooled_*  reads raw scores and writes them smoothed, bit for bit as pool.cu does, which are the scores then;
//                   slots past those that are pooled are copied
//   top_k_level_1   reads the scores again: counts of second digits, and per tile of 4096 slots two bits a slot, above
//                   the cut's first digit or a candidate, and the keys of the candidates
//   top_k_level_2   reads the candidates: counts of the last digits, then what each segment keeps
//   top_k_emit      reads bits and candidates, never the scores: see top_k_emit.cu
//
// With a share c of N slots as candidates that is 2 N keys (pooled or not: what level 0 writes, level 1 reads), 3/32 N words of bits and 2 c N candidates read. All equal,
// c is 1; uniform, 1/8 where the cut is in the largest quarter of an octave.
//
// Launch: grid (ceil(longest / 4096 / tiles), segments), 256 threads. `tallies`, `contest_tallies`, `steps` and, where a
// segment has more than one block, histogram 0 are zeroed before. Contests hold fewer than 2^32 slots, segments fewer
// than 2^31; segments of a contest are consecutive and at least one; rows start at multiples of 16 bytes; budget >= sum
// of floors. Source: the CPU backend's top_k.rs.
// gates: top_k_level_0 LDG.E.128.CONSTANT>=4 ATOMS.POPC.INC !ATOMS.CAS ATOMG==2 registers<=48
// gates: top_k_pooled_* LDG.E.128>=4 LDS ATOMS.POPC.INC !ATOMS.CAS ATOMG==2 registers<=48
// gates: top_k_level_1 LDG.E.128.CONSTANT>=4 VOTE>=32 ATOMS.POPC.INC !ATOMS.CAS ATOMG==2 registers<=64
// gates: top_k_level_2 REDUX ATOMS.POPC.INC !ATOMS.CAS ATOMG==2 registers<=80
#include "pool.cuh"
#include "top_k.cuh"

constexpr u32 BINS = 2048;

// Written by the host.
struct Contest {
    u64 positions; // where its positions start
    u32 budget, first, end; // segments
    u32 steps; // its tables of steps, if it has several segments
};
// total(b) of a contest of several segments is `least` of no bin at all, and `steps[level][b]` is by how much total(b)
// exceeds total(b + 1): a segment adds to the few bins where it has keys.
struct ContestTally {
    u32 prefix, least[3];
    u32 arrivals;
    u32 unused[3];
};
static_assert(sizeof(Tally) == 32 && sizeof(ContestTally) == 32 && sizeof(Cut) == 24, "as selection.rs has them");

struct Descent {
    const float* const* rows;
    const u32* lengths;
    const Segment* segments;
    const Span* spans;
    const Contest* contests;
    Tally* tallies;
    ContestTally* contest_tallies;
    u32* steps;      // [contests of several segments][levels][BINS]
    u32* histograms; // [2][segments][BINS], by parity of the level
    u32* marks;      // [tiles][MARKS]
    u32* candidates; // [tiles][TILE], those of a warp from its first slot on
    Cut* cuts;

    __device__ u32* histogram(int level, u32 segment) const {
        return histograms + ((u64)(level % 2) * gridDim.y + segment) * BINS;
    }
    __device__ Row row(u32 s) const {
        const Segment& segment = segments[s];
        return {rows[s], lengths[s], spans + segment.protected_first, spans + segment.protected_end};
    }
};

// Rows that are smoothed on the way: raw, smoothed, how many slots of each take part.
struct Smoothing {
    const float* const* from;
    float* const* to;
    const u32* lengths;
    u32 radius;
};

template <int LEVEL> struct Digit {
    static constexpr u32 SHIFT = LEVEL == 0 ? 21 : LEVEL == 1 ? 10 : 0, COUNT = LEVEL == 2 ? BINS / 2 : BINS;
    __device__ static u32 of(u32 key) { return (key >> SHIFT) % COUNT; }
};

// Counts digits of one tile, of keys that share the prefix.
template <int LEVEL>
__device__ inline void count_tile(const Descent& d, Row row, u32 tile, u64 first_tile, u32 prefix, u32* counts) {
    u32 start = tile * TILE + warp_id() * OF_WARP, unit = start / 4 + lane_id();
    if (start >= row.length) return;
    row.narrow(start, start + OF_WARP);
    float4 loaded[ROUNDS];
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) loaded[i] = row.load(unit + i * 32);
    u32* candidates = d.candidates + (first_tile + tile) * TILE + warp_id() * OF_WARP;
    u32 marks = 0, found = 0, lower = (1 << lane_id()) - 1;
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
        u32 keys[4], valid = row.valid(unit + i * 32);
        row.keys(keys, loaded[i], unit + i * 32);
        if (LEVEL == 0) {
            // The hardware merges equal addresses of a warp: ties cost no more than anything else.
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
                if (j < valid) atomicAdd(&counts[Digit<0>::of(keys[j])], 1);
            continue;
        }
        u32 candidate[4], at = found;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            u32 digit = Digit<0>::of(keys[j]), cut = Digit<0>::of(prefix);
            u32 above = __ballot_sync(ALL_LANES, j < valid && digit > cut);
            candidate[j] = __ballot_sync(ALL_LANES, j < valid && digit == cut);
            if (lane_id() == i * 4 + j) marks = above;
            if (lane_id() == 16 + i * 4 + j) marks = candidate[j];
            at += __popc(candidate[j] & lower), found += __popc(candidate[j]);
        }
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            if (~candidate[j] >> lane_id() & 1) continue;
            candidates[at++] = keys[j];
            atomicAdd(&counts[Digit<1>::of(keys[j])], 1);
        }
    }
    if (LEVEL == 1) d.marks[(first_tile + tile) * MARKS + threadIdx.x] = marks;
}
template <>
__device__ inline void count_tile<2>(const Descent& d, Row row, u32 tile, u64 first_tile, u32 prefix, u32* counts) {
    if (tile * TILE + warp_id() * OF_WARP >= row.length) return;
    u32 marks = d.marks[(first_tile + tile) * MARKS + threadIdx.x];
    u32 found = __reduce_add_sync(ALL_LANES, lane_id() < 16 ? 0 : __popc(marks));
    const u32* candidates = d.candidates + (first_tile + tile) * TILE + warp_id() * OF_WARP;
    for (u32 i = lane_id(); i < found; i += 32) {
        u32 key = candidates[i];
        if (key >> Digit<1>::SHIFT == prefix >> Digit<1>::SHIFT) atomicAdd(&counts[Digit<2>::of(key)], 1);
    }
}

// Smooths a tile and counts its first digits. All threads of the block.
template <class Kind>
__device__ inline void pool_tile(const Smoothing& smoothing, Row row, u32 tile, u32* counts) {
    __shared__ __align__(16) Windows<Kind, TILE, THREADS> windows;
    const float* __restrict__ from = global(smoothing.from[blockIdx.y]);
    float* __restrict__ to = global(smoothing.to[blockIdx.y]);
    u32 pooled = min(smoothing.lengths[blockIdx.y], row.length), radius = smoothing.radius;
    u32 first = tile * TILE, start = warp_id() * OF_WARP;
    windows.load(from, pooled, first, radius);
    __syncthreads();
    row.narrow(first + start, first + start + OF_WARP);
#pragma unroll 1
    for (u32 i = start + lane_id(); i < start + OF_WARP && first + i < row.length; i += 32) {
        float x = first + i < pooled ? windows.at(i, radius) : from[first + i];
        to[first + i] = x;
        atomicAdd(&counts[Digit<0>::of(row.key(x, first + i))], 1);
    }
    __syncthreads();
}

// sums[i] = counts at and above bin 8 * thread + i; returns the sum of all.
__device__ inline u32 suffix_sums(u32 (&sums)[9], const u32* counts, u32* scratch) {
    const uint4* eight = reinterpret_cast<const uint4*>(counts) + 2 * threadIdx.x;
    uint4 a = eight[0], b = eight[1];
    u32 own = a.x + a.y + a.z + a.w + b.x + b.y + b.z + b.w, total;
    u32 before = block_scan(own, total, scratch);
    sums[8] = total - before - own;
    sums[7] = sums[8] + b.w, sums[6] = sums[7] + b.z, sums[5] = sums[6] + b.y, sums[4] = sums[5] + b.x;
    sums[3] = sums[4] + a.w, sums[2] = sums[3] + a.z, sums[1] = sums[2] + a.y, sums[0] = sums[1] + a.x;
    return total;
}

// Whether the highest bin at which falling totals still reach what is needed is one of the thread's eight, and which. A
// level's highest bin is always one that does, for lack of a next one.
template <int LEVEL> __device__ inline bool crossing(const u32 (&totals)[9], u32 needed, u32& bin) {
    u32 first = 8 * threadIdx.x, next = first + 8;
    if (first >= Digit<LEVEL>::COUNT || totals[0] < needed || (next < Digit<LEVEL>::COUNT && totals[8] >= needed))
        return false;
    bin = first;
    for (u32 i = 1; i < 8; ++i) bin += totals[i] >= needed;
    return true;
}

// A segment at the contest's cut so far. `sums` are its counts at and above each bin of the last digit.
template <int LEVEL> struct Standing {
    u32 cut, above, equal; // digits of the segment's own cut, keys above them, keys that share them

    __device__ Standing(const Tally& tally, const u32* sums, u32 contest_cut) {
        cut = min(contest_cut, tally.floor_prefix);
        u32 digit = Digit<LEVEL>::of(cut), beyond = digit + 1 < Digit<LEVEL>::COUNT ? sums[digit + 1] : 0;
        above = tally.above + beyond, equal = sums[digit] - beyond;
    }
};

// What a contest's cut leaves each of its segments; ties are granted in the order of the segments. `sums_of` gives a
// segment's counts at and above each last digit.
template <class Sums>
__device__ inline void cut_segments(const Descent& d, const Contest& contest, u32 budget, u32 threshold, u32* scratch,
                                    Sums sums_of) {
    auto sure = [&](u32 s, const Standing<2>& at) {
        return max(min(d.segments[s].floor, d.lengths[s]), at.above);
    };
    u32 granted = 0, all;
    for (u32 s = contest.first + threadIdx.x; s < contest.end; s += THREADS)
        granted += sure(s, Standing<2>(d.tallies[s], sums_of(s), threshold));
    block_scan(granted, all, scratch);
    u32 rest = budget - all, ties_before = 0, kept_before = 0;

    for (u32 s0 = contest.first; s0 < contest.end; s0 += THREADS) {
        u32 s = s0 + threadIdx.x, count = 0, available = 0;
        Cut cut = {};
        if (s < contest.end) {
            Standing<2> at(d.tallies[s], sums_of(s), threshold);
            count = sure(s, at);
            // Below the contest's cut there is the floor and nothing else.
            available = at.cut < threshold ? 0 : at.above + at.equal - count;
            cut.threshold = at.cut, cut.ties = at.above, cut.nan = d.tallies[s].nan;
        }
        u32 before = ties_before + block_scan(available, all, scratch);
        ties_before += all;
        if (before < rest) count += min(available, rest - before);
        cut.start = contest.positions + kept_before + block_scan(count, all, scratch);
        kept_before += all;
        cut.count = count, cut.ties = count - cut.ties;
        if (s < contest.end) d.cuts[s] = cut;
    }
}

// `count` counts digits of a tile of a row.
template <int LEVEL, class Count> __device__ inline void descend(const Descent& d, u32 tiles, Count count) {
    constexpr u32 COUNT = Digit<LEVEL>::COUNT;
    __shared__ __align__(16) u32 counts[BINS];
    __shared__ u32 scratch[THREADS / 32], picked;
    u32 segment = blockIdx.y, length = d.lengths[segment], end = tiles_of(length);
    u32 blocks = max((end + tiles - 1) / tiles, 1);
    // What leaves here is not waited for below.
    if (blockIdx.x >= blocks) return;
    Tally& tally = d.tallies[segment];
    u32 prefix = tally.prefix;

    uint4* eight = reinterpret_cast<uint4*>(counts) + 2 * threadIdx.x;
    eight[0] = eight[1] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (u32 tile = blockIdx.x * tiles; tile < min((blockIdx.x + 1) * tiles, end); ++tile)
        count(d.row(segment), tile, prefix, counts);
    __syncthreads();

    u32* histogram = d.histogram(LEVEL, segment);
    if (blocks > 1) {
        for (u32 bin = threadIdx.x; bin < COUNT; bin += THREADS)
            if (counts[bin] > 0) atomicAdd(histogram + bin, counts[bin]);
        if (!last_to_arrive(&tally.arrivals, blocks)) return;
        for (u32 bin = threadIdx.x; bin < COUNT; bin += THREADS) {
            counts[bin] = histogram[bin];
            if (LEVEL < 2) d.histogram(LEVEL + 1, segment)[bin] = 0;
        }
        __syncthreads();
    }

    // The segment's last block: the digit of its floor.
    Contest contest = d.contests[d.segments[segment].contest];
    ContestTally& contest_tally = d.contest_tallies[d.segments[segment].contest];
    u32 floor = min(d.segments[segment].floor, length), above = tally.above;
    u32 contest_prefix = contest_tally.prefix, floor_prefix = tally.floor_prefix;
    u32 sums[9], bin, total = suffix_sums(sums, counts, scratch);
    if (LEVEL == 0 && threadIdx.x == 0) tally.nan = sums[0] - sums[1];
    if (prefix == floor_prefix && crossing<LEVEL>(sums, floor > above ? floor - above : 0, bin))
        tally.floor_prefix = prefix | bin << Digit<LEVEL>::SHIFT;
    eight[0] = make_uint4(sums[0], sums[1], sums[2], sums[3]);
    eight[1] = make_uint4(sums[4], sums[5], sums[6], sums[7]);
    __syncthreads();

    // What the segment takes when `count` keys of the prefix are above the cut.
    bool contested = prefix == contest_prefix, alone = contest.end - contest.first == 1;
    auto taken = [&](u32 count) { return contested ? max(floor, above + count) : floor; };
    if (alone) {
        for (u32 i = 0; i < 9; ++i) sums[i] = taken(sums[i]);
        total = taken(total);
    } else {
        u32* steps = d.steps + ((u64)contest.steps * 3 + LEVEL) * BINS;
        for (bin = threadIdx.x; bin < COUNT; bin += THREADS) {
            u32 here = counts[bin], next = bin + 1 < COUNT ? counts[bin + 1] : 0;
            histogram[bin] = here;
            u32 step = taken(here) - taken(next);
            if (step > 0) atomicAdd(steps + bin, step);
        }
        if (threadIdx.x == 0) atomicAdd(&contest_tally.least[LEVEL], taken(0));
        if (!last_to_arrive(&contest_tally.arrivals, contest.end - contest.first)) return;
        u32 least = contest_tally.least[LEVEL];
        total = least + suffix_sums(sums, steps, scratch);
        for (u32 i = 0; i < 9; ++i) sums[i] += least;
    }

    // The contest's last block: the digit of its cut, and where that leaves each segment.
    u32 budget = min(contest.budget, total);
    if (crossing<LEVEL>(sums, budget, bin)) picked = contest_prefix | bin << Digit<LEVEL>::SHIFT;
    __syncthreads();
    u32 cut = picked;
    auto sums_of = [&](u32 s) -> const u32* { return alone ? counts : d.histogram(LEVEL, s); };
    if (LEVEL == 2) return cut_segments(d, contest, budget, cut, scratch, sums_of);
    if (threadIdx.x == 0) contest_tally.prefix = cut;
    for (u32 s = contest.first + threadIdx.x; s < contest.end; s += THREADS) {
        Standing<LEVEL> at(d.tallies[s], sums_of(s), cut);
        d.tallies[s].prefix = at.cut, d.tallies[s].above = at.above;
    }
}

// What all levels take.
#define TOP_K_DESCENT                                                                                                  \
    const u32 *lengths, const Segment *segments, const Span *spans, const Contest *contests, Tally *tallies,           \
        ContestTally *contest_tallies, u32 *steps, u32 *histograms, u32 *marks, u32 *candidates, Cut *cuts, u32 tiles
#define DESCENT                                                                                                        \
    Descent{rows,  lengths,    segments, spans,      contests, tallies, contest_tallies,                               \
            steps, histograms, marks,    candidates, cuts}

// Blocks a multiprocessor: enough loads in flight. Level 1 needs more registers; level 2 more still, and loads little.
#define TOP_K_LEVEL(LEVEL)                                                                                             \
    extern "C" __global__ void __launch_bounds__(THREADS, 5 - LEVEL)                                                   \
        top_k_level_##LEVEL(const float* const* rows, TOP_K_DESCENT) {                                                 \
        Descent d = DESCENT;                                                                                           \
        u64 first_tile = d.segments[blockIdx.y].first_tile;                                                            \
        descend<LEVEL>(d, tiles, [&](Row row, u32 tile, u32 prefix, u32* counts) {                                     \
            count_tile<LEVEL>(d, row, tile, first_tile, prefix, counts);                                               \
        });                                                                                                            \
    }
TOP_K_LEVEL(0)
TOP_K_LEVEL(1)
TOP_K_LEVEL(2)

#define TOP_K_POOLED(NAME, KIND)                                                                                       \
    extern "C" __global__ void __launch_bounds__(THREADS, 5)                                                           \
        top_k_pooled_##NAME(const float* const* from, const u32* pooled, u32 radius, float* const* rows,              \
                             TOP_K_DESCENT) {                                                                          \
        Smoothing smoothing = {from, rows, pooled, radius};                                                            \
        descend<0>(DESCENT, tiles, [&](Row row, u32 tile, u32, u32* counts) {                                          \
            pool_tile<KIND>(smoothing, row, tile, counts);                                                             \
        });                                                                                                            \
    }
TOP_K_POOLED(avg, Average)
TOP_K_POOLED(max, Maximum)
