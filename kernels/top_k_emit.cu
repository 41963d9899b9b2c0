// Slots of a selection, from what top_k.cu has left of it.
//
//   top_k_emit   positions of each segment, ascending: of a tile's slots those above the cut's first digit, and of its
//                candidates those above the threshold and the first that equal it. Places come from the tiles before by
//                look-back. No score is read.
//   top_k_pin    sets rows to infinity at the selected slots
//   top_k_drop   lowers rows to at most 0 there, but where `by` is -infinity or NaN; a NaN stays
//
// Launch: emit grid (ceil(longest / 4096), segments), pin and drop grid (ceil(largest count / 1024), segments), 256 threads.
// `status` is zeroed before. Source: Merrill and Garland, Single-pass parallel prefix scan with decoupled look-back
// (NVR-2016-002).
// gates: top_k_emit VOTE>=32 REDUX ATOMG==1 !ATOMS !MEMBAR registers<=80
// gates: top_k_pin STG.E
// gates: top_k_drop LDG.E>=2 STG.E
#include "top_k.cuh"

// Per tile: how many keys are above the threshold and how many equal it, and whether that is of the tile or of
// everything up to its end. One word, so that relaxed accesses are enough.
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
    top_k_emit(const u32* lengths, const Segment* segments, const Cut* cuts, Tally* tallies, const u32* marks,
               const u32* candidates, u64* status, u32* positions) {
    __shared__ u32 stage[TILE], warps[THREADS / 32], tile, above_before, equal_before;
    u32 segment = blockIdx.y;
    Cut cut = cuts[segment];
    if (threadIdx.x == 0) tile = atomicAdd(&tallies[segment].ticket, 1);
    __syncthreads();
    u32 length = lengths[segment], slot = tile * TILE + warp_id() * OF_WARP;
    if (tile >= tiles_of(length)) return;

    u64 tiles = segments[segment].first_tile;
    u32 lower = (1 << lane_id()) - 1, mine = slot < length ? marks[(tiles + tile) * MARKS + threadIdx.x] : 0;
    const u32* next = candidates + (tiles + tile) * TILE + warp_id() * OF_WARP;
    // Pairs of counts share a word: `above` in the low half, `equal` in the high one.
    u32 ranks[ROUNDS], own_above = 0, own_equal = 0, count = 0;
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
        if (slot + i * 128 >= length) continue;
        u32 candidate[4], at = 0, found = 0;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            candidate[j] = __shfl_sync(ALL_LANES, mine, 16 + i * 4 + j);
            at += __popc(candidate[j] & lower), found += __popc(candidate[j]);
        }
        ranks[i] = count;
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            bool is_above = __shfl_sync(ALL_LANES, mine, i * 4 + j) >> lane_id() & 1, is_equal = false;
            if (candidate[j] >> lane_id() & 1) {
                u32 key = next[at++];
                is_above = key > cut.threshold, is_equal = key == cut.threshold;
            }
            u32 above = __ballot_sync(ALL_LANES, is_above), equal = __ballot_sync(ALL_LANES, is_equal);
            own_above |= is_above << (i * 4 + j), own_equal |= is_equal << (i * 4 + j);
            ranks[i] += __popc(above & lower) | __popc(equal & lower) << 16;
            count += __popc(above) | __popc(equal) << 16;
        }
        next += found;
    }
    if (lane_id() == 0) warps[warp_id()] = count;
    __syncthreads();
    u32 before = 0, all = 0;
    for (u32 warp = 0; warp < THREADS / 32; ++warp) {
        before += warp < warp_id() ? warps[warp] : 0;
        all += warps[warp];
    }

    if (warp_id() == 0) {
        u64* states = status + tiles;
        u32 above, equal;
        if (lane_id() == 0 && tile > 0) store_relaxed(states + tile, status_word(OWN, all & 0xffff, all >> 16));
        look_back(states, tile, above, equal);
        if (lane_id() == 0) {
            store_relaxed(states + tile, status_word(UP_TO_HERE, above + (all & 0xffff), equal + (all >> 16)));
            above_before = above, equal_before = equal;
        }
    }
    __syncthreads();
    u32 start = above_before + min(equal_before, cut.ties);
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
        if (slot + i * 128 >= length) continue;
        u32 above = above_before + ((before + ranks[i]) & 0xffff), equal = equal_before + ((before + ranks[i]) >> 16);
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            bool is_above = own_above >> (i * 4 + j) & 1, is_equal = own_equal >> (i * 4 + j) & 1;
            if (is_above || (is_equal && equal < cut.ties))
                stage[above + min(equal, cut.ties) - start] = slot + i * 128 + lane_id() * 4 + j;
            above += is_above, equal += is_equal;
        }
    }
    __syncthreads();
    u32 end = above_before + (all & 0xffff) + min(equal_before + (all >> 16), cut.ties);
    for (u32 i = threadIdx.x; i < end - start; i += THREADS) positions[cut.start + start + i] = stage[i];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    top_k_pin(float* const* rows, const Cut* cuts, const u32* positions) {
    float* row = rows[blockIdx.y];
    Cut cut = cuts[blockIdx.y];
    u32 stop = min(blockIdx.x * 1024 + 1024, cut.count);
    for (u32 i = blockIdx.x * 1024 + threadIdx.x; i < stop; i += THREADS) row[positions[cut.start + i]] = INFINITE;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    top_k_drop(float* const* rows, const float* const* by, const Cut* cuts, const u32* positions) {
    float* row = global(rows[blockIdx.y]);
    const float* why = global(by[blockIdx.y]);
    Cut cut = cuts[blockIdx.y];
    u32 stop = min(blockIdx.x * 1024 + 1024, cut.count);
    for (u32 i = blockIdx.x * 1024 + threadIdx.x; i < stop; i += THREADS) {
        u32 slot = positions[cut.start + i];
        if (why[slot] > -INFINITE && row[slot] > 0.0f) row[slot] = 0.0f;
    }
}
