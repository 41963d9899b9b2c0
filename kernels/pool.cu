// Smoothing of f32 rows over neighbouring slots: of row r, the first lengths[r].
//
//   pool_avg: out[r][t] = sum of in[r][t - radius ..= t + radius] / (2 * radius + 1), zeros outside the row
//   pool_max: out[r][t] = max of the same, over what lies inside the row; a NaN spreads to every window it is in
//
// The sum runs from left to right: bit for bit what the CPU backend computes.
// Launch: grid (ceil(longest row / 1024), rows), 256 threads; radius <= 64, `out` is not `in`. Rows start at multiples
// of 16 bytes. A block reads its tile and the halo once, into shared memory; a thread owns every
// 256th output, so that lanes read neighbouring banks.
// Source: torch.nn.functional.avg_pool1d (count_include_pad) and max_pool1d.
// gates: pool_* LDG.E.128 LDS
#include "device.cuh"

constexpr u32 TILE = 1024, HALO = 64;

struct Average {
    __device__ static float outside() { return 0.0f; }
    __device__ static float of(float a, float b) { return a + b; }
    __device__ static float end(float x, u32 kernel) { return x / kernel; }
};
struct Maximum {
    __device__ static float outside() { return -INFINITE; }
    __device__ static float of(float a, float b) {
        float greater;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
        return greater;
    }
    __device__ static float end(float x, u32) { return x; }
};

template <class Kind>
__device__ inline void pool_rows(const float* const* __restrict__ in, float* const* __restrict__ out,
                                 const u32* __restrict__ lengths, i32 radius) {
    // The tile starts at HALO, 16-byte aligned.
    __shared__ __align__(16) float tile[HALO + TILE + HALO];
    u32 row = blockIdx.y, length = lengths[row], first = blockIdx.x * TILE;
    if (first >= length) return;
    const float* __restrict__ from = global(in[row]);
    float* __restrict__ to = global(out[row]);

    if (first + TILE <= length) {
        u32 own = threadIdx.x * 4;
        *reinterpret_cast<float4*>(tile + HALO + own) = *reinterpret_cast<const float4*>(from + first + own);
    } else {
        for (u32 i = threadIdx.x; i < TILE; i += blockDim.x)
            tile[HALO + i] = first + i < length ? from[first + i] : Kind::outside();
    }
    if (threadIdx.x < 2 * radius) {
        // Left of the tile, then right of it; unsigned, so that what lies before the row is past its end.
        u32 i = threadIdx.x < radius ? HALO - radius + threadIdx.x : HALO + TILE + threadIdx.x - radius;
        u32 slot = first + i - HALO;
        tile[i] = slot < length ? from[slot] : Kind::outside();
    }
    __syncthreads();

    u32 kernel = 2 * radius + 1;
    for (u32 i = threadIdx.x; i < TILE && first + i < length; i += blockDim.x) {
        const float* window = tile + HALO + i - radius;
        float x = window[0];
        for (u32 j = 1; j < kernel; ++j) x = Kind::of(x, window[j]);
        to[first + i] = Kind::end(x, kernel);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    pool_avg(const float* const* in, float* const* out, const u32* lengths, i32 radius) {
    pool_rows<Average>(in, out, lengths, radius);
}

extern "C" __global__ void __launch_bounds__(256)
    pool_max(const float* const* in, float* const* out, const u32* lengths, i32 radius) {
    pool_rows<Maximum>(in, out, lengths, radius);
}
