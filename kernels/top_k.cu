// Exact selection of the best slots of ragged segments that compete for budgets.
//
// Order: protected first, then score descending (-0 = +0, NaN lowest), then segment, then slot ascending. In each
// contest every segment keeps its `floor` best; the rest of the budget goes to the best of what is left of all.
// The order is total, so the answer is unique; slots are emitted ascending.
//
// Launches, same grid.y = segments throughout:
//   top_k_level  x3 (level 0, 1, 2)   grid (blocks, segments), 256 threads, blocks about longest / 8192
//   top_k_emit                        grid (ceil(longest / 4096), segments), 256 threads
// `tallies`, `contest_tallies` and `status` (u64 [segments][grid.x of emit]) are zeroed before level 0. Contests hold
// fewer than 2^32 slots; segments of a contest are consecutive and at least one; each segment's scores start at a
// multiple of 16 bytes; budget >= sum of floors.
//
// A radix descent over ordered 32-bit keys, digits of 11, 11 and 10 bits. With c_s(b) the keys of segment s at or
// above bin edge b, total(b) = sum of max(floor_s, c_s(b)) falls as b rises: the digit of the cut is the highest edge
// whose total reaches the budget. Each segment descends beside it for its own floor. Counts only, so that ties cost
// nothing and no order of blocks is visible. Source: the CPU backend's top_k.rs; look-back as in Merrill and Garland,
// Single-pass parallel prefix scan with decoupled look-back (NVR-2016-002).
// gates: top_k_level LDG.E.128.CONSTANT>=4 ATOMS.POPC.INC !ATOMS.CAS ATOMG==2 registers<=48
// gates: top_k_emit LDG.E.128.CONSTANT==4 VOTE>=32 REDUX ATOMG==1 !ATOMS !MEMBAR registers<=80
#include "device.cuh"

constexpr u32 THREADS = 256, BINS = 2048, PROTECTED = 0xffffffff;

// Written by the host.
struct Segment {
    i64 scores; // where its scores start
    u32 length, floor, contest;
    u32 protected_first, protected_end; // its ranges
    u32 unused;
};
struct Contest {
    i64 positions; // where its positions start
    u32 budget, first, end; // segments
    u32 unused;
};
// State of the descent. `counts[level][0]` is of keys that share the contest's prefix and becomes suffix sums,
// `counts[level][1]` of keys that share the segment's own, where that differs.
struct Tally {
    u32 counts[3][2][BINS];
    u32 above;                    // keys above the contest's prefix
    u32 floor_prefix, floor_above; // the same for the segment's own floor
    u32 arrivals, ticket;
    u32 nans;
    u32 unused[2];
};
// `steps[level][b]` is by how much total(b) exceeds total(b + 1), and `least` total of no bin at all: a segment adds to
// the few bins where it has keys.
struct ContestTally {
    u32 steps[3][BINS];
    u32 least[3];
    u32 prefix, arrivals;
    u32 unused[3];
};
// The answer for a segment: all keys above the threshold and the first `ties` equal to it, `count` in all. And how many
// of its unprotected scores are NaN.
struct Cut {
    i64 positions;
    u32 threshold, ties, count, nans;
};
struct Range {
    u32 start, end;
};

// Scores as keys, four at a time; `valid` of them exist.
struct Row {
    const float* __restrict__ scores;
    const Range* __restrict__ first;
    const Range* __restrict__ end;
    u32 length;

    __device__ Row(const float* all, const Range* ranges, const Segment& segment)
        : scores(all + segment.scores), first(ranges + segment.protected_first), end(ranges + segment.protected_end),
          length(segment.length) {}
    __device__ u32 valid(u32 unit) const { return unit * 4 >= length ? 0 : min(length - unit * 4, 4); }
    __device__ float4 load(u32 unit) const {
        if (valid(unit) == 4) return __ldg(reinterpret_cast<const float4*>(scores) + unit);
        const float* at = scores + unit * 4;
        float4 x = {};
        if (valid(unit) > 0) x.x = at[0];
        if (valid(unit) > 1) x.y = at[1];
        if (valid(unit) > 2) x.z = at[2];
        return x;
    }
    __device__ void keys(u32 (&out)[4], float4 x, u32 unit) const {
        out[0] = ordered(x.x), out[1] = ordered(x.y), out[2] = ordered(x.z), out[3] = ordered(x.w);
#pragma unroll 1
        for (const Range* range = first; range < end; ++range)
            for (u32 i = 0; i < 4; ++i)
                if (unit * 4 + i >= range->start && unit * 4 + i < range->end) out[i] = PROTECTED;
    }
};

// Sum over the threads before this one, and over all. `scratch` may be used again at once.
__device__ inline u32 block_scan(u32 x, u32& total, u32* scratch) {
    u32 sum = x;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        u32 below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane_id() >= distance) sum += below;
    }
    __syncthreads();
    if (lane_id() == 31) scratch[warp_id()] = sum;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 warp = 0; warp < THREADS / 32; ++warp) {
        before += warp < warp_id() ? scratch[warp] : 0;
        total += scratch[warp];
    }
    return before + sum - x;
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

// What the contest's cut leaves each of its segments; ties are granted in the order of the segments.
__device__ inline void cut_segments(const Contest& contest, const Segment* segments, const Tally* tallies, Cut* cuts,
                                    u32 budget, u32 threshold, u32* scratch) {
    u32 digit = threshold % (BINS / 2);
    auto taken = [&](u32 s, u32& above, u32& equal) -> u32 {
        const u32* at = tallies[s].counts[2][0] + digit;
        above = tallies[s].above + at[1], equal = at[0] - at[1];
        return max(min(segments[s].floor, segments[s].length), above);
    };
    u32 granted = 0, above, equal;
    for (u32 s = contest.first + threadIdx.x; s < contest.end; s += THREADS) granted += taken(s, above, equal);
    u32 sure, ties_before = 0, kept_before = 0, all;
    block_scan(granted, sure, scratch);
    u32 rest = budget > sure ? budget - sure : 0;

    for (u32 s0 = contest.first; s0 < contest.end; s0 += THREADS) {
        u32 s = s0 + threadIdx.x, count = 0, available = 0;
        bool exists = s < contest.end;
        if (exists) {
            count = taken(s, above, equal);
            available = above + equal > count ? above + equal - count : 0;
        }
        u32 before = ties_before + block_scan(available, all, scratch);
        ties_before += all;
        if (before < rest) count += min(available, rest - before);
        u32 start = kept_before + block_scan(count, all, scratch);
        kept_before += all;
        if (exists) {
            // Fewer than `count` above the cut, or the segment's own floor reaches below it.
            bool own = count > above + equal;
            cuts[s].positions = contest.positions + start;
            cuts[s].threshold = own ? tallies[s].floor_prefix : threshold;
            cuts[s].ties = count - (own ? tallies[s].floor_above : above);
            cuts[s].count = count;
            cuts[s].nans = tallies[s].nans;
        }
    }
}

// Five blocks a multiprocessor: enough loads in flight.
extern "C" __global__ void __launch_bounds__(THREADS, 5)
    top_k_level(const float* scores, const Segment* segments, const Range* ranges, const Contest* contests,
                Tally* tallies, ContestTally* contest_tallies, Cut* cuts, i32 level) {
    __shared__ __align__(16) u32 counts[2][BINS];
    __shared__ u32 scratch[THREADS / 32], picked;
    Segment segment = segments[blockIdx.y];
    Contest contest = contests[segment.contest];
    Tally& tally = tallies[blockIdx.y];
    ContestTally& contest_tally = contest_tallies[segment.contest];
    u32 shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level == 2 ? BINS / 2 : BINS;
    u32 decided = level == 0 ? 0 : 0xffffffff << (level == 1 ? 21 : 10);
    u32 prefix = contest_tally.prefix, floor_prefix = tally.floor_prefix;
    bool apart = ((prefix ^ floor_prefix) & decided) != 0;

    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) counts[0][bin] = counts[1][bin] = 0;
    __syncthreads();
    Row row(scores, ranges, segment);
    u32 units = (segment.length + 3) / 4, step = gridDim.x * THREADS, nans = 0;
    for (u32 unit = blockIdx.x * THREADS + threadIdx.x; unit < units; unit += 4 * step) {
        float4 loaded[4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) loaded[i] = row.load(unit + i * step);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            u32 keys[4], valid = row.valid(unit + i * step);
            row.keys(keys, loaded[i], unit + i * step);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                if (j >= valid) continue;
                u32 digit = (keys[j] >> shift) % bins;
                nans += keys[j] == 0;
                // The hardware merges equal addresses of a warp: ties cost no more than anything else.
                if (((keys[j] ^ prefix) & decided) == 0) atomicAdd(&counts[0][digit], 1);
                if (apart && ((keys[j] ^ floor_prefix) & decided) == 0) atomicAdd(&counts[1][digit], 1);
            }
        }
    }
    if (level == 0 && nans > 0) atomicAdd(&tally.nans, nans);
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < bins; bin += THREADS) {
        if (counts[0][bin] > 0) atomicAdd(&tally.counts[level][0][bin], counts[0][bin]);
        if (counts[1][bin] > 0) atomicAdd(&tally.counts[level][1][bin], counts[1][bin]);
    }

    if (!last_to_arrive(&tally.arrivals, gridDim.x)) return;
    u32 floor = min(segment.floor, segment.length), floor_above = tally.floor_above, above = tally.above;
    if (level > 0) {
        u32 digit = level == 1 ? prefix >> 21 : (prefix >> 10) % BINS;
        if (digit + 1 < BINS) above += tally.counts[level - 1][0][digit + 1];
    }
    u32 sums[9];
    suffix_sums(sums, tally.counts[level][apart], scratch);
    for (u32 i = 0; i < 8; ++i) {
        // Of all bins just one, if the floor is not zero.
        if (floor_above + sums[i] >= floor && floor_above + sums[i + 1] < floor) {
            tally.floor_prefix = floor_prefix | (8 * threadIdx.x + i) << shift;
            tally.floor_above = floor_above + sums[i + 1];
        }
    }
    if (apart) suffix_sums(sums, tally.counts[level][0], scratch);
    if (threadIdx.x == 0) tally.above = above;
    // Through shared memory, so that lanes write neighbouring bins.
    uint4* eight = reinterpret_cast<uint4*>(counts[0]) + 2 * threadIdx.x;
    eight[0] = make_uint4(sums[0], sums[1], sums[2], sums[3]);
    eight[1] = make_uint4(sums[4], sums[5], sums[6], sums[7]);
    __syncthreads();
    for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS) {
        u32 here = counts[0][bin], next = bin + 1 < BINS ? counts[0][bin + 1] : 0;
        tally.counts[level][0][bin] = here;
        u32 step = max(floor, above + here) - max(floor, above + next);
        if (step > 0) atomicAdd(&contest_tally.steps[level][bin], step);
    }
    if (threadIdx.x == 0) atomicAdd(&contest_tally.least[level], max(floor, above));

    if (!last_to_arrive(&contest_tally.arrivals, contest.end - contest.first)) return;
    u32 least = contest_tally.least[level];
    u32 budget = min(contest.budget, least + suffix_sums(sums, contest_tally.steps[level], scratch));
    for (u32 i = 0; i < 8; ++i) {
        u32 bin = 8 * threadIdx.x + i;
        if (bin < bins && least + sums[i] >= budget && (bin + 1 == bins || least + sums[i + 1] < budget))
            picked = prefix | bin << shift;
    }
    __syncthreads();
    if (threadIdx.x == 0) contest_tally.prefix = picked;
    if (level == 2) cut_segments(contest, segments, tallies, cuts, budget, picked, scratch);
}

// Per tile of 4096 keys: how many are above the threshold and how many equal it, and whether that is of the tile or of
// everything up to its end. One word, so that relaxed accesses are enough.
constexpr u32 TILE = 4096;
constexpr u64 OWN = 1, UP_TO_HERE = 2;
__device__ inline u64 status_word(u64 flag, u32 above, u32 equal) { return flag << 62 | (u64)above << 31 | equal; }

// Sums over all tiles before this one; a whole warp. Waits only for tiles whose blocks run already: they took their
// tickets earlier.
__device__ inline void look_back(const u64* status, u32 tile, u32& above, u32& equal) {
    above = equal = 0;
    for (i32 nearest = tile - 1; nearest >= 0; nearest -= 32) {
        i32 at = nearest - (i32)lane_id();
        u64 word;
        do {
            word = at >= 0 ? load_relaxed(status + at) : status_word(UP_TO_HERE, 0, 0);
        } while (__any_sync(ALL_LANES, word >> 62 == 0));
        u32 complete = __ballot_sync(ALL_LANES, word >> 62 == UP_TO_HERE);
        bool counts = complete == 0 || lane_id() < __ffs(complete);
        above += __reduce_add_sync(ALL_LANES, counts ? (u32)(word >> 31) & 0x7fffffff : 0);
        equal += __reduce_add_sync(ALL_LANES, counts ? (u32)word & 0x7fffffff : 0);
        if (complete != 0) break;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    top_k_emit(const float* scores, const Segment* segments, const Range* ranges, const Cut* cuts, Tally* tallies,
               u64* status, u32* positions) {
    __shared__ u32 stage[TILE], warps[THREADS / 32], tile, above_before, equal_before;
    Segment segment = segments[blockIdx.y];
    Cut cut = cuts[blockIdx.y];
    u64* tiles = status + (u64)blockIdx.y * gridDim.x;
    if (threadIdx.x == 0) tile = atomicAdd(&tallies[blockIdx.y].ticket, 1);
    __syncthreads();
    if ((u64)tile * TILE >= segment.length) return;

    // A warp owns 512 keys, so that (warp, round, lane, component) is the order of slots.
    Row row(scores, ranges, segment);
    u32 unit = tile * (TILE / 4) + warp_id() * 128 + lane_id(), lower = (1 << lane_id()) - 1;
    float4 loaded[4];
#pragma unroll
    for (u32 i = 0; i < 4; ++i) loaded[i] = row.load(unit + i * 32);
    // Pairs of counts share a word: `above` in the low half, `equal` in the high one.
    u32 ranks[4], own_above = 0, own_equal = 0, count = 0;
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 keys[4], valid = row.valid(unit + i * 32);
        row.keys(keys, loaded[i], unit + i * 32);
        ranks[i] = count;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            bool is_above = j < valid && keys[j] > cut.threshold, is_equal = j < valid && keys[j] == cut.threshold;
            u32 above = __ballot_sync(ALL_LANES, is_above), equal = __ballot_sync(ALL_LANES, is_equal);
            own_above |= is_above << (i * 4 + j), own_equal |= is_equal << (i * 4 + j);
            ranks[i] += __popc(above & lower) | __popc(equal & lower) << 16;
            count += __popc(above) | __popc(equal) << 16;
        }
    }
    if (lane_id() == 0) warps[warp_id()] = count;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 warp = 0; warp < THREADS / 32; ++warp) {
        before += warp < warp_id() ? warps[warp] : 0;
        all += warps[warp];
    }

    if (warp_id() == 0) {
        u32 above, equal;
        if (lane_id() == 0 && tile > 0) store_relaxed(tiles + tile, status_word(OWN, all & 0xffff, all >> 16));
        look_back(tiles, tile, above, equal);
        if (lane_id() == 0) {
            store_relaxed(tiles + tile, status_word(UP_TO_HERE, above + (all & 0xffff), equal + (all >> 16)));
            above_before = above, equal_before = equal;
        }
    }
    __syncthreads();
    u32 start = above_before + min(equal_before, cut.ties);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        u32 above = above_before + ((before + ranks[i]) & 0xffff), equal = equal_before + ((before + ranks[i]) >> 16);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            bool is_above = own_above >> (i * 4 + j) & 1, is_equal = own_equal >> (i * 4 + j) & 1;
            if (is_above || (is_equal && equal < cut.ties))
                stage[above + min(equal, cut.ties) - start] = (unit + i * 32) * 4 + j;
            above += is_above, equal += is_equal;
        }
    }
    __syncthreads();
    u32 end = above_before + (all & 0xffff) + min(equal_before + (all >> 16), cut.ties);
    for (u32 i = threadIdx.x; i < end - start; i += THREADS) positions[cut.positions + start + i] = stage[i];
}
