// Rows of keys and values on the move, 16 bytes a thread: what gather, compaction and append share.
//
// A row is `units` times 16 bytes, at most 256 of them; 256 / units rows go side by side through a block of 256
// threads, and each thread copies PER_THREAD of them, so that loads are in flight together before the first store.
#pragma once
#include "device.cuh"

constexpr u32 PER_THREAD = 4;
constexpr u32 NOWHERE = 0xffffffff;

// Rows that a thread copies of tile `tile`: every `step`-th from `first`, unit `unit` of each.
struct Share {
    u32 unit, first, step;
    __device__ Share(u32 tile, u32 units) {
        step = blockDim.x / units;
        unit = threadIdx.x % units;
        // What does not fill a row idles: past every end.
        first = threadIdx.x / units < step ? tile * PER_THREAD * step + threadIdx.x / units : 0xffffff00;
    }
    __device__ u32 row(u32 i) const { return first + i * step; }
};

// A thread's units of up to PER_THREAD rows of one tensor, slots of NOWHERE left out. Places first, then accesses back
// to back. No `const`: where rows move in place, nothing may be cached as if it were constant.
struct Units {
    uint4* at[PER_THREAD];

    __device__ Units(const Rows& rows, const u32* __restrict__ pages, u32 unit, const u32 (&slots)[PER_THREAD]) {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            // In global memory, which the compiler cannot know of an address that was a number.
            at[i] = nullptr;
            if (slots[i] == NOWHERE) continue;
            size_t row = reinterpret_cast<size_t>(rows.at(slots[i], pages));
            at[i] = reinterpret_cast<uint4*>(__cvta_global_to_generic(row)) + unit;
        }
    }
    __device__ void load(uint4 (&data)[PER_THREAD]) const {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i)
            if (at[i]) data[i] = *at[i];
    }
    __device__ void store(const uint4 (&data)[PER_THREAD]) const {
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i)
            if (at[i]) *at[i] = data[i];
    }
};
