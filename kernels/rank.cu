// Ranks: the n-th slot of a row, protected slots first, then score descending (-0 = +0, NaN lowest), then slot
// ascending, gets weights[r] / n, a correctly rounded quotient. Infinity and NaN stay what they are.
//
// A stable radix sort per row, last digit first, of 64-bit elements: 33 bits by which smaller is better, the slot below
// them. Four digits of 9 bits, two launches each:
//
//   rank_count   digits of each tile of 2048 elements; the row's last block turns them into where each tile's elements
//                of each digit go
//   rank_place   puts elements there in the order in which they are; after the last digit their places are the ranks
//
// Pass 0 reads scores, others what the pass before has put. Launch: grid (ceil(longest / 2048), rows), 256 threads.
// `arrivals` are zeroed before pass 0. Rows start at multiples of 4 bytes, have fewer than 2^31 slots.
// Moved per slot: 84 bytes, and 20 of tables. Source: Satish, Harris and Garland, Designing efficient sorting
// algorithms for manycore GPUs (IPDPS 2009); ranks within a warp by match, as in CUB.
// gates: rank_count ATOMS.POPC.INC !ATOMS.CAS ATOMG==1 registers<=48
// gates: rank_place MATCH.ANY>=8 !ATOMS !ATOMG MUFU.RCP registers<=80
#include "scores.cuh"

constexpr u32 THREADS = 256, DIGITS = 512, TILE = 2048, ROUNDS = TILE / THREADS, SLOT_BITS = 31, PASSES = 4;

// Written by the host, the twin of `Ranked` in src/backend/cuda/rank.rs.
struct Ranked {
    u64 first_tile; // of its tiles among those of all
    u32 protected_first, protected_end; // its spans
    float weight;
    u32 unused;
};

// Elements of one pass.
struct Elements {
    Row row;
    const u64* put; // by the pass before
    u32 pass;

    __device__ Elements(const float* const* rows, const u32* lengths, const Ranked& ranked, const Span* spans,
                        const u64* from, u32 pass)
        : row{rows[blockIdx.y], lengths[blockIdx.y], spans + ranked.protected_first, spans + ranked.protected_end},
          put(from + ranked.first_tile * TILE), pass(pass) {
        row.narrow(blockIdx.x * TILE, blockIdx.x * TILE + TILE);
    }
    __device__ u64 at(u32 i) const {
        if (pass > 0) return put[i];
        u64 better = ordered(__ldg(row.scores + i));
        for (const Span* span = row.first; span < row.end; ++span)
            if (i >= row.resolve(span->start) && i < row.resolve(span->end)) better |= 1ull << 32;
        return ((1ull << 33) - 1 - better) << SLOT_BITS | i;
    }
    __device__ u32 digit(u64 element) const { return (u32)(element >> (SLOT_BITS + 9 * pass)) % DIGITS; }
};

__device__ inline u32 tiles_of(u32 length) { return length / TILE + (length % TILE > 0); }

// `counts` are [tiles][DIGITS], of all rows.
extern "C" __global__ void __launch_bounds__(THREADS)
    rank_count(const float* const* rows, const u32* lengths, const Ranked* ranked, const Span* spans, const u64* from,
               u32* counts, u32* arrivals, u32 pass) {
    __shared__ u32 histogram[DIGITS], scratch[THREADS / 32];
    u32 length = lengths[blockIdx.y], tiles = tiles_of(length), first = blockIdx.x * TILE;
    if (blockIdx.x >= tiles) return;
    Elements elements(rows, lengths, ranked[blockIdx.y], spans, from, pass);
    for (u32 digit = threadIdx.x; digit < DIGITS; digit += THREADS) histogram[digit] = 0;
    __syncthreads();
    for (u32 i = threadIdx.x; i < TILE && first + i < length; i += THREADS)
        atomicAdd(&histogram[elements.digit(elements.at(first + i))], 1);
    __syncthreads();
    uint2* of_row = reinterpret_cast<uint2*>(counts + ranked[blockIdx.y].first_tile * DIGITS) + threadIdx.x;
    constexpr u32 STEP = DIGITS / 2; // two digits a thread
    of_row[blockIdx.x * STEP] = make_uint2(histogram[2 * threadIdx.x], histogram[2 * threadIdx.x + 1]);
    if (!last_to_arrive(arrivals + blockIdx.y, tiles)) return;

    uint2 all = make_uint2(0, 0);
    for (u32 tile = 0; tile < tiles; ++tile) {
        uint2 own = of_row[tile * STEP];
        all.x += own.x, all.y += own.y;
    }
    u32 total;
    uint2 next;
    next.x = block_scan(all.x + all.y, total, scratch), next.y = next.x + all.x;
    for (u32 tile = 0; tile < tiles; ++tile) {
        uint2 own = of_row[tile * STEP];
        of_row[tile * STEP] = next;
        next.x += own.x, next.y += own.y;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 4)
    rank_place(float* const* rows, const u32* lengths, const Ranked* ranked, const Span* spans, const u64* from,
               u64* to, const u32* counts, u32 pass) {
    __shared__ u32 places[THREADS / 32][DIGITS];
    u32 length = lengths[blockIdx.y];
    if (blockIdx.x >= tiles_of(length)) return;
    Elements elements(rows, lengths, ranked[blockIdx.y], spans, from, pass);
    for (u32 digit = lane_id(); digit < DIGITS; digit += 32) places[warp_id()][digit] = 0;
    __syncwarp();

    // A warp owns consecutive elements, so that (warp, round, lane) is their order.
    u32 first = blockIdx.x * TILE + warp_id() * ROUNDS * 32 + lane_id();
    u64 element[ROUNDS];
    u32 rank[ROUNDS];
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) element[i] = first + i * 32 < length ? elements.at(first + i * 32) : 0;
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
        bool exists = first + i * 32 < length;
        u32 digit = elements.digit(element[i]);
        u32 peers = __match_any_sync(ALL_LANES, exists ? digit : DIGITS), lower = (1 << lane_id()) - 1;
        u32 before = __popc(peers & lower);
        if (exists) rank[i] = places[warp_id()][digit] + before;
        __syncwarp();
        if (exists && before == 0) places[warp_id()][digit] = rank[i] + __popc(peers);
        __syncwarp();
    }
    __syncthreads();
    // Where each warp's elements of a digit go.
    const u32* starts = counts + (ranked[blockIdx.y].first_tile + blockIdx.x) * DIGITS;
    for (u32 digit = threadIdx.x; digit < DIGITS; digit += THREADS) {
        u32 next = starts[digit];
        for (u32 warp = 0; warp < THREADS / 32; ++warp) {
            u32 own = places[warp][digit];
            places[warp][digit] = next;
            next += own;
        }
    }
    __syncthreads();

    float* row = rows[blockIdx.y];
    u64* put = to + ranked[blockIdx.y].first_tile * TILE;
#pragma unroll
    for (u32 i = 0; i < ROUNDS; ++i) {
        if (first + i * 32 >= length) continue;
        u32 place = places[warp_id()][elements.digit(element[i])] + rank[i];
        if (pass + 1 < PASSES) {
            put[place] = element[i];
            continue;
        }
        u32 key = ~(u32)(element[i] >> SLOT_BITS), slot = (u32)element[i] & 0x7fffffff;
        if (key != 0 && key != ordered(INFINITE))
            row[slot] = __fdiv_rn(ranked[blockIdx.y].weight, __uint2float_rn(place + 1));
    }
}
