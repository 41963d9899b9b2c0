// Rows of scores as selection reads them: four at a time, as ordered keys, protected slots in front; and sums over a
// block in the order of its threads.
#pragma once
#include "device.cuh"

constexpr u32 PROTECTED = 0xffffffff; // the key of no float

// A range of slots. Below zero it counts from the row's end: x stands for length + 1 + x. The twin of `Span` in
// src/backend/cuda/selection.rs.
struct Span {
    i64 start, end;
};

struct Row {
    const float* __restrict__ scores;
    u32 length;
    const Span* first; // spans that may meet what is read next
    const Span* end;

    __device__ u32 resolve(i64 x) const {
        i64 at = x < 0 ? (i64)length + 1 + x : x;
        return at < 0 ? 0 : at < length ? at : length;
    }
    // Drops spans at both ends that do not meet the slots from `begin` to `stop`.
    __device__ void narrow(u32 begin, u32 stop) {
        auto apart = [&](const Span& span) { return resolve(span.end) <= begin || resolve(span.start) >= stop; };
        while (first < end && apart(*first)) ++first;
        while (first < end && apart(end[-1])) --end;
    }
    __device__ u32 valid(u32 unit) const { return unit * 4 >= length ? 0 : min(length - unit * 4, 4); }
    // Slots 4 * unit and on, `valid` of them.
    __device__ float4 load(u32 unit) const {
        if (valid(unit) == 4) return __ldg(reinterpret_cast<const float4*>(scores) + unit);
        const float* at = scores + unit * 4;
        float4 x = {};
        if (valid(unit) > 0) x.x = __ldg(at);
        if (valid(unit) > 1) x.y = __ldg(at + 1);
        if (valid(unit) > 2) x.z = __ldg(at + 2);
        return x;
    }
    __device__ u32 key(float x, u32 slot) const {
        u32 key = ordered(x);
#pragma unroll 1
        for (const Span* span = first; span < end; ++span)
            if (slot >= resolve(span->start) && slot < resolve(span->end)) key = PROTECTED;
        return key;
    }
    __device__ void keys(u32 (&out)[4], float4 x, u32 unit) const {
        out[0] = ordered(x.x), out[1] = ordered(x.y), out[2] = ordered(x.z), out[3] = ordered(x.w);
#pragma unroll 1
        for (const Span* span = first; span < end; ++span) {
            u32 from = resolve(span->start), to = resolve(span->end);
            for (u32 i = 0; i < 4; ++i)
                if (unit * 4 + i >= from && unit * 4 + i < to) out[i] = PROTECTED;
        }
    }
};

// Sum over the threads of the block before this one, and over all. `scratch` holds one number per warp, and may be used
// again at once.
template <class T> __device__ inline T block_scan(T x, T& total, T* scratch) {
    T sum = x;
    for (u32 distance = 1; distance < 32; distance *= 2) {
        T below = __shfl_up_sync(ALL_LANES, sum, distance);
        if (lane_id() >= distance) sum += below;
    }
    __syncthreads();
    if (lane_id() == 31) scratch[warp_id()] = sum;
    __syncthreads();
    T before = 0;
    total = 0;
    for (u32 warp = 0; warp < blockDim.x / 32; ++warp) {
        before += warp < warp_id() ? scratch[warp] : 0;
        total += scratch[warp];
    }
    return before + sum - x;
}
