// Smoothing of a tile of a row in shared memory: what pool.cu writes, and what top_k.cu writes and counts.
#pragma once
#include "device.cuh"

constexpr u32 HALO = 64; // the largest radius

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

// SLOTS neighbouring slots of a row and a halo to either side, for a block of THREADS threads; one at most 2 * HALO wide.
template <class Kind, u32 SLOTS, u32 THREADS> struct Windows {
    // The tile starts at HALO, 16-byte aligned.
    float tile[HALO + SLOTS + HALO];

    // Slots `first` and on of the `length` there are; the caller waits for all threads before and after.
    __device__ void load(const float* __restrict__ from, u32 length, u32 first, u32 radius) {
        static_assert(2 * HALO <= THREADS, "a thread loads one slot of the halo");
        if (first + SLOTS <= length) {
#pragma unroll
            for (u32 i = 0; i < SLOTS; i += 4 * THREADS) {
                u32 own = i + threadIdx.x * 4;
                *reinterpret_cast<float4*>(tile + HALO + own) = *reinterpret_cast<const float4*>(from + first + own);
            }
        } else {
            for (u32 i = threadIdx.x; i < SLOTS; i += THREADS)
                tile[HALO + i] = first + i < length ? from[first + i] : Kind::outside();
        }
        if (threadIdx.x < 2 * radius) {
            // Left of the tile, then right of it; unsigned, so that what lies before the row is past its end.
            u32 i = threadIdx.x < radius ? HALO - radius + threadIdx.x : HALO + SLOTS + threadIdx.x - radius;
            u32 slot = first + i - HALO;
            tile[i] = slot < length ? from[slot] : Kind::outside();
        }
    }

    // The i-th slot of the tile, smoothed.
    __device__ float at(u32 i, u32 radius) const {
        const float* window = tile + HALO + i - radius;
        float x = window[0];
        for (u32 j = 1; j <= 2 * radius; ++j) x = Kind::of(x, window[j]);
        return Kind::end(x, 2 * radius + 1);
    }
};
