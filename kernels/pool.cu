// Smoothing of f32 rows over neighbouring slots: of row r, the first lengths[r].
//
//   pool_avg: out[r][t] = sum of in[r][t - radius ..= t + radius] / (2 * radius + 1), zeros outside the row
//   pool_max: out[r][t] = max of the same, over what lies inside the row; a NaN spreads to every window it is in
//
// The sum runs from left to right: bit for bit what the CPU backend computes.
// Launch: grid (ceil(longest row / 1024), rows), 256 threads; radius <= 64, `out` is not `in`. Rows start at multiples
// of 16 bytes. A block reads its tile and the halo once, into shared memory (pool.cuh); a thread owns every
// 256th output, so that lanes read neighbouring banks.
// Source: torch.nn.functional.avg_pool1d (count_include_pad) and max_pool1d.
// gates: pool_* LDG.E.128 LDS
#include "pool.cuh"

constexpr u32 TILE = 1024, THREADS = 256;

template <class Kind>
__device__ inline void pool_rows(const float* const* __restrict__ in, float* const* __restrict__ out,
                                 const u32* __restrict__ lengths, u32 radius) {
    __shared__ __align__(16) Windows<Kind, TILE, THREADS> windows;
    u32 row = blockIdx.y, length = lengths[row], first = blockIdx.x * TILE;
    if (first >= length) return;
    float* __restrict__ to = global(out[row]);
    windows.load(global(in[row]), length, first, radius);
    __syncthreads();
    for (u32 i = threadIdx.x; i < TILE && first + i < length; i += THREADS) to[first + i] = windows.at(i, radius);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    pool_avg(const float* const* in, float* const* out, const u32* lengths, u32 radius) {
    pool_rows<Average>(in, out, lengths, radius);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    pool_max(const float* const* in, float* const* out, const u32* lengths, u32 radius) {
    pool_rows<Maximum>(in, out, lengths, radius);
}
