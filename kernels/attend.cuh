// What the kernels of decode attention share: the work list, its items, and how the warps of a block become one.
#pragma once
#include "device.cuh"

// Arguments of a kernel that takes items of a work list. A row is a query of a group: row r is query r / group of the
// group's head r % group, so that neighbours see nearly the same slots.
struct Work {
    const Rows *q, *k, *v; // [segments * group], [segments], [segments]
    const u32 *pages, *lengths;
    const u32* offsets; // first item of each segment, then the number of items
    const uint2* items; // segment, first slot
    float* partials;    // [items][group * queries][dim]
    float2* stats;      // [items][group * queries]: maximum in units of ln 2, sum
    u32 segments, group, queries, dim, chunk;
    float scale;

    // Slots that a row sees.
    __device__ u32 seen(u32 length, u32 row) const {
        u32 hidden = queries - 1 - row / group;
        return length > hidden ? length - hidden : 0;
    }
};

// A chunk of a segment, and a block's rows of it.
struct Item {
    u32 segment, length, first, end, row, rows;
    u64 output; // of the block's first row

    // Without slots (end <= first) if no row sees any of the chunk.
    __device__ Item(const Work& work, u32 index, u32 most_rows) {
        uint2 at = work.items[index];
        u32 all = work.group * work.queries;
        segment = at.x, first = at.y, length = work.lengths[segment];
        row = blockIdx.y * most_rows, rows = min(most_rows, all - row);
        end = min(first + work.chunk, work.seen(length, row + rows - 1));
        output = (u64)index * all + row;
    }
    // First slot of the chunk that row `r` does not see.
    __device__ u32 bound(const Work& work, u32 r) const { return min(end, work.seen(length, row + min(r, rows - 1))); }
    __device__ const char* query(const Work& work, u32 r) const {
        u32 of = row + min(r, rows - 1);
        return work.q[segment * work.group + of % work.group].at(of / work.group, work.pages);
    }
};

// Warp after warp `rows` rows of a block, `pitch` floats apart, become the item's. Sums are multiplied by `factor`.
__device__ inline void merge_warps(const Work& work, const Item& item, const float* outputs, const float2* stats,
                                   u32 rows, u32 pitch, float factor) {
    u32 warps = blockDim.x / 32;
#pragma unroll 1
    for (u32 row = 0; row < item.rows; ++row) {
        float greatest = -INFINITE;
        for (u32 w = 0; w < warps; ++w) greatest = fmaxf(greatest, stats[w * rows + row].x);
        // Nothing but -inf: subtracting it would be NaN.
        float subtract = greatest == -INFINITE ? 0.0f : greatest;
        float* to = work.partials + (item.output + row) * work.dim;
#pragma unroll 1
        for (u32 d = threadIdx.x; d < work.dim; d += blockDim.x) {
            float out = 0.0f, sum = 0.0f;
#pragma unroll 1
            for (u32 w = 0; w < warps; ++w) {
                float2 part = stats[w * rows + row];
                float weight = exp2_approx(part.x - subtract);
                out += outputs[(w * rows + row) * pitch + d] * weight, sum += part.y * weight;
            }
            to[d] = out * factor;
            if (d == 0) work.stats[item.output + row] = make_float2(greatest, sum * factor);
        }
    }
}

#define WORK_PARAMETERS                                                                                                \
    const Rows *q, const Rows *k, const Rows *v, const u32 *pages, const u32 *lengths, const u32 *offsets,             \
        const uint2 *items, float *partials, float2 *stats, u32 segments, u32 group, u32 queries, u32 dim, u32 chunk,  \
        float scale
#define WORK                                                                                                           \
    Work { q, k, v, pages, lengths, offsets, items, partials, stats, segments, group, queries, dim, chunk, scale }
