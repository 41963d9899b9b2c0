// Elementwise operations on rows of scores, and counts over them. Row r has lengths[r] entries.
//
//   count_nan: counts[r] += NaN in row r                                   counts zeroed before
//   weigh:     norms[r][t] *= rows[r][t] + epsilon
//   raise:     rows[r][t] = max(rows[r][t], by[r][t]), a NaN of either stays
//
// Launch: grid (ceil(longest row / 1024), rows), 256 threads.
// gates: count_nan RED==1
// gates: weigh STG.E
// gates: raise STG.E
#include "device.cuh"

constexpr u32 TILE = 1024;

// Calls `work` for each entry of the block's tile.
template <class Work> __device__ inline void for_each(const u32* lengths, Work work) {
    u32 length = lengths[blockIdx.y], first = blockIdx.x * TILE;
    for (u32 i = threadIdx.x; i < TILE; i += blockDim.x)
        if (first + i < length) work(first + i);
}

extern "C" __global__ void __launch_bounds__(256)
    count_nan(const float* const* rows, const u32* lengths, u32* counts) {
    const float* row = rows[blockIdx.y];
    u32 count = 0;
    for_each(lengths, [&](u32 i) { count += row[i] != row[i]; });
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0 && count > 0) atomicAdd(counts + blockIdx.y, count);
}

extern "C" __global__ void __launch_bounds__(256)
    weigh(float* const* norms, const float* const* rows, const u32* lengths, float epsilon) {
    float* norm = norms[blockIdx.y];
    const float* row = rows[blockIdx.y];
    for_each(lengths, [&](u32 i) { norm[i] *= row[i] + epsilon; });
}

extern "C" __global__ void __launch_bounds__(256)
    raise(float* const* rows, const float* const* by, const u32* lengths) {
    float* row = rows[blockIdx.y];
    const float* least = by[blockIdx.y];
    for_each(lengths, [&](u32 i) {
        if (least[i] != least[i] || row[i] < least[i]) row[i] = least[i];
    });
}
