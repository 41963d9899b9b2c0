// Compaction in place: of each segment the rows at the kept slots move to its first rows, with keys, values and
// positions; then lengths[s] = cuts[s].count, their number. Kept slots ascend; kept[i] stands for the i-th of them. What
// follows is about slots: pages change nothing, since no table lists a page twice.
//
//   slide: row i = row kept[i], order stays. Row i is overwritten by row kept[i] >= i, so what tile t overwrites was
//          needed by tiles up to t only. Hence the one rule: a tile writes after all tiles before it have read.
//          Tickets order the tiles by their start, look-back tells when all before have read.
//   fill:  of the k kept rows, those from slot k on move into the holes below k: as many, by counting. Sources (>= k)
//          and targets (< k) are disjoint, so no block waits for another, and only k - m rows move, where m kept ones
//          lie below k; but the order is lost. Hole j follows the kept slots i with kept[i] - i <= j, which do not
//          descend: it is slot j + i for the first i without, found by bisection, and takes row kept[m + j].
//
// `nan` counts the scores of NaN that the cuts come from.
//
// Rows: copy.cuh. Launch: 256 threads, grid (ceil(most kept / (4 * (256 / units))), segments), at least one column.
// `states` of slide, u32 [segments][grid.x + 1], is zeroed before each launch: a ticket, then a state per tile.
// Sources: TensorRT-LLM's sparse KV cache compaction states the contract of slide; look-back after Merrill and Garland
// (NVR-2016-002).
// gates: slide LDG.E.128==8 STG.E.128==8 !LDG.E.128.CONSTANT !U16 registers<=64
// gates: fill LDG.E.128==8 STG.E.128==8 !LDG.E.128.CONSTANT !U16 registers<=64
#include "copy.cuh"

constexpr u32 HAS_READ = 1, ALL_HAVE_READ = 2;

// Returns when every tile before this one has read, as all threads of this block have.
__device__ inline void wait_for_readers(u32* tiles, i32 tile) {
    __syncthreads();
    if (warp_id() == 0) {
        if (lane_id() == 0) store_release(tiles + tile, HAS_READ);
        for (i32 nearest = tile - 1; nearest >= 0; nearest -= 32) {
            i32 at = nearest - (i32)lane_id();
            u32 state;
            do {
                state = at >= 0 ? load_acquire(tiles + at) : ALL_HAVE_READ;
            } while (__any_sync(ALL_LANES, state == 0));
            if (__any_sync(ALL_LANES, state == ALL_HAVE_READ)) break;
        }
        // What one lane acquired, another publishes: a vote orders no memory, this does.
        __syncwarp();
        if (lane_id() == 0) store_release(tiles + tile, ALL_HAVE_READ);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(256, 4)
    slide(const Rows* __restrict__ all_keys, const Rows* __restrict__ all_values, const u32* __restrict__ pages,
          u32* const* __restrict__ all_positions, const Cut* __restrict__ cuts,
          const u32* __restrict__ kept, u32* __restrict__ lengths, u32* __restrict__ nan, u32* states,
          u32 units) {
    __shared__ u32 ticket;
    u32 s = blockIdx.y, count = cuts[s].count;
    u32* mine = states + (u64)s * (gridDim.x + 1);
    if (threadIdx.x == 0) {
        ticket = atomicAdd(mine, 1);
        if (ticket == 0) {
            lengths[s] = count;
            if (cuts[s].nan > 0) atomicAdd(nan, cuts[s].nan);
        }
    }
    __syncthreads();
    Share share(ticket, units);
    if ((u64)ticket * PER_THREAD * share.step >= count) return;

    const u32* slots = kept + cuts[s].start;
    u32 from[PER_THREAD], to[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        u32 row = share.row(i);
        from[i] = row < count ? slots[row] : row;
        // A row that is there already, like one past the end, is left alone.
        to[i] = from[i] != row ? row : NOWHERE;
        if (to[i] == NOWHERE) from[i] = NOWHERE;
    }
    u32* positions = all_positions[s];
    uint4 k[PER_THREAD], v[PER_THREAD];
    u32 position[PER_THREAD];
    Units(all_keys[s], pages, share.unit, from).load(k);
    Units(all_values[s], pages, share.unit, from).load(v);
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i)
        if (share.unit == 0 && from[i] != NOWHERE) position[i] = positions[from[i]];
    wait_for_readers(mine + 1, ticket);
    Units(all_keys[s], pages, share.unit, to).store(k);
    Units(all_values[s], pages, share.unit, to).store(v);
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i)
        if (share.unit == 0 && to[i] != NOWHERE) positions[to[i]] = position[i];
}

// The first i < n for which `is_past` holds, which it does from there on; n if for none.
template <class Test> __device__ inline u32 bisect(u32 n, Test is_past) {
    u32 low = 0;
    while (low < n) {
        u32 middle = low + (n - low) / 2;
        if (is_past(middle)) n = middle;
        else low = middle + 1;
    }
    return low;
}

extern "C" __global__ void __launch_bounds__(256, 4)
    fill(const Rows* __restrict__ all_keys, const Rows* __restrict__ all_values, const u32* __restrict__ pages,
         u32* const* __restrict__ all_positions, const Cut* __restrict__ cuts, const u32* __restrict__ kept,
         u32* __restrict__ lengths, u32* __restrict__ nan, u32 units) {
    __shared__ u32 sources[PER_THREAD * 256], holes[PER_THREAD * 256];
    u32 s = blockIdx.y, count = cuts[s].count;
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        lengths[s] = count;
        if (cuts[s].nan > 0) atomicAdd(nan, cuts[s].nan);
    }
    const u32* slots = kept + cuts[s].start;
    u32 below = bisect(count, [&](u32 i) { return slots[i] >= count; });
    u32 moves = count - below;
    Share share(0, units);
    u32 rows = PER_THREAD * share.step, start = blockIdx.x * rows;
    if (start >= moves) return;
    rows = min(rows, moves - start);

    for (u32 row = threadIdx.x; row < rows; row += blockDim.x) {
        u32 hole = start + row;
        holes[row] = hole + bisect(below, [&](u32 i) { return slots[i] - i > hole; });
        sources[row] = slots[below + hole];
    }
    __syncthreads();
    u32* positions = all_positions[s];
    u32 from[PER_THREAD], to[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        bool there = share.row(i) < rows;
        from[i] = there ? sources[share.row(i)] : NOWHERE;
        to[i] = there ? holes[share.row(i)] : NOWHERE;
        if (there && share.unit == 0) positions[to[i]] = positions[from[i]];
    }
    uint4 k[PER_THREAD], v[PER_THREAD];
    Units(all_keys[s], pages, share.unit, from).load(k);
    Units(all_values[s], pages, share.unit, from).load(v);
    Units(all_keys[s], pages, share.unit, to).store(k);
    Units(all_values[s], pages, share.unit, to).store(v);
}
