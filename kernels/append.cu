// Rows of new tokens, written behind what each segment holds; lengths grow.
//
//   cache[s][lengths[s] + t] = new[s][t] for t < tokens, keys and values alike; then lengths[s] += tokens
//
// A segment without room is left as it was, and `refused` counts it: nothing is written past a capacity. A row is
// `units` times 16 bytes, at most 256. Launch: grid (segments), 256 threads. One block a segment, so that the length
// has one reader and writer.
// gates: append LDG.E.128==2 STG.E.128==2 !U16 registers<=32
#include "device.cuh"

struct Segment {
    i64 fresh, fresh_stride; // first new row and distance to the next token's, in rows
    i64 cache;               // first row
    u32 capacity;
    u32 unused;
};

extern "C" __global__ void __launch_bounds__(256)
    append(const uint4* __restrict__ fresh_keys, const uint4* __restrict__ fresh_values, uint4* __restrict__ keys,
           uint4* __restrict__ values, const Segment* __restrict__ segments, u32* lengths, u32* refused, i32 tokens,
           i32 units) {
    Segment segment = segments[blockIdx.x];
    u32 length = lengths[blockIdx.x];
    bool fits = length <= segment.capacity && tokens <= segment.capacity - length;
    // All have read the length before it changes.
    __syncthreads();
    if (threadIdx.x == 0) {
        if (fits) lengths[blockIdx.x] = length + tokens;
        else atomicAdd(refused, 1);
    }
    u32 step = blockDim.x / units, unit = threadIdx.x % units, first = threadIdx.x / units;
    if (!fits || first >= step) return;
    for (u32 token = first; token < tokens; token += step) {
        i64 from = (segment.fresh + token * segment.fresh_stride) * units + unit;
        i64 to = (segment.cache + length + token) * units + unit;
        keys[to] = fresh_keys[from], values[to] = fresh_values[from];
    }
}
