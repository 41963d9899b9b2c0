// Compaction out of place: of each segment the rows at the kept slots, in their order, of keys, values and positions.
//
//   target row i of segment s = source row kept[cuts[s].start + i],  i < cuts[s].count;  then lengths[s] = cuts[s].count
//
// Without `cuts`, the first counts[s] rows are kept. Without `positions` (of all segments), a slot is its position.
// Source and target have any layout; all sectors of both are fully used where rows are multiples of 32 bytes. A segment
// that keeps more than its capacity becomes empty, and `refused` counts the rows: nothing is written past a capacity.
// `nan` counts the scores of NaN that the cuts come from.
//
// Rows: copy.cuh. Launch: 256 threads, grid (ceil(most kept / (4 * (256 / units))), segments), at least one column.
// gates: gather LDG.E.128==8 STG.E.128==8 !U16 registers<=64
#include "copy.cuh"

extern "C" __global__ void __launch_bounds__(256, 4)
    gather(const Rows* __restrict__ from_keys, const Rows* __restrict__ from_values,
           const u32* __restrict__ from_pages, const u32* const* __restrict__ from_positions,
           const Rows* __restrict__ to_keys, const Rows* __restrict__ to_values, const u32* __restrict__ to_pages,
           u32* const* __restrict__ to_positions, const Cut* __restrict__ cuts, const u32* __restrict__ kept,
           const u32* __restrict__ counts, const u32* __restrict__ capacities, u32* __restrict__ lengths,
           u32* __restrict__ refused, u32* __restrict__ nan, u32 units) {
    u32 s = blockIdx.y, count = cuts ? cuts[s].count : counts[s];
    bool fits = count <= capacities[s];
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        lengths[s] = fits ? count : 0;
        if (!fits) atomicAdd(refused, count);
        if (cuts && cuts[s].nan > 0) atomicAdd(nan, cuts[s].nan);
    }
    Share share(blockIdx.x, units);
    if (!fits || share.first >= count) return;

    const u32* slots = cuts ? kept + cuts[s].start : nullptr;
    u32 from[PER_THREAD], to[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        bool there = share.row(i) < count;
        to[i] = there ? share.row(i) : NOWHERE;
        from[i] = there && slots ? slots[share.row(i)] : to[i];
    }
    uint4 k[PER_THREAD], v[PER_THREAD];
    Units(from_keys[s], from_pages, share.unit, from).load(k);
    Units(from_values[s], from_pages, share.unit, from).load(v);
    if (share.unit == 0) {
        const u32* positions = from_positions ? from_positions[s] : nullptr;
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i)
            if (to[i] != NOWHERE) to_positions[s][to[i]] = positions ? positions[from[i]] : from[i];
    }
    Units(to_keys[s], to_pages, share.unit, to).store(k);
    Units(to_values[s], to_pages, share.unit, to).store(v);
}
