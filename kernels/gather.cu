// Compaction: of each segment the rows at the kept slots, in their order, of keys and values alike.
//
//   gather:          target row i of segment s = source row kept[s][i]; all sectors of source and target fully used
//   gather_in_place: the same where source and target are one buffer; kept slots ascend
//
// A row is `units` times 16 bytes (D * size of an element / 16, at most 256), rows of a segment are packed. Launch: 256
// threads, grid (ceil(longest / (4 * (256 / units))), segments). In place, `states` u32 [segments][grid.x + 1] is zeroed
// before each launch: a ticket, then a state per tile.
//
// In place: row i is overwritten by row kept[i] >= i, so what tile t overwrites was needed by tiles up to t only. Hence
// the one rule: a tile writes after all tiles before it have read. Source: TensorRT-LLM's sparse KV cache compaction
// states the same contract; look-back after Merrill and Garland (NVR-2016-002).
// gates: gather* LDG.E.128==8 STG.E.128==8 !U16 registers<=64
// gates: gather_in_place !LDG.E.128.CONSTANT
#include "device.cuh"

struct Segment {
    i64 source, target; // first row, counted in rows of the buffers
    i64 kept;           // where its kept slots start
    u32 count;
    u32 unused;
};
constexpr u32 PER_THREAD = 4;

// Rows that a thread copies of tile `tile`: every `step`-th from `first`, unit `unit` of each.
struct Share {
    u32 unit, first, step;
    __device__ Share(u32 tile, u32 units) {
        step = blockDim.x / units;
        unit = threadIdx.x % units;
        // What does not fill a row idles: past every end.
        first = threadIdx.x / units < step ? tile * PER_THREAD * step + threadIdx.x / units : 0xffffff00;
    }
};

extern "C" __global__ void __launch_bounds__(256)
    gather(const uint4* __restrict__ keys, const uint4* __restrict__ values, uint4* __restrict__ kept_keys,
           uint4* __restrict__ kept_values, const Segment* __restrict__ segments, const u32* __restrict__ kept,
           i32 units) {
    Segment segment = segments[blockIdx.y];
    Share share(blockIdx.x, units);
    uint4 k[PER_THREAD], v[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        u32 row = share.first + i * share.step;
        if (row >= segment.count) continue;
        i64 from = (segment.source + kept[segment.kept + row]) * units + share.unit;
        k[i] = keys[from], v[i] = values[from];
    }
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        u32 row = share.first + i * share.step;
        if (row >= segment.count) continue;
        i64 to = (segment.target + row) * units + share.unit;
        kept_keys[to] = k[i], kept_values[to] = v[i];
    }
}

constexpr u32 HAS_READ = 1, ALL_HAVE_READ = 2;

extern "C" __global__ void __launch_bounds__(256)
    gather_in_place(uint4* keys, uint4* values, const Segment* __restrict__ segments, const u32* __restrict__ kept,
                    u32* states, i32 units) {
    __shared__ u32 ticket;
    Segment segment = segments[blockIdx.y];
    u32* mine = states + (u64)blockIdx.y * (gridDim.x + 1);
    if (threadIdx.x == 0) ticket = atomicAdd(mine, 1);
    __syncthreads();
    i32 tile = ticket;
    u32* tiles = mine + 1;
    Share share(tile, units);
    if ((u64)tile * PER_THREAD * share.step >= segment.count) return;

    uint4 k[PER_THREAD], v[PER_THREAD];
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        u32 row = share.first + i * share.step;
        if (row >= segment.count) continue;
        i64 from = (segment.source + kept[segment.kept + row]) * units + share.unit;
        k[i] = keys[from], v[i] = values[from];
    }
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
#pragma unroll
    for (u32 i = 0; i < PER_THREAD; ++i) {
        u32 row = share.first + i * share.step;
        if (row >= segment.count) continue;
        i64 to = (segment.target + row) * units + share.unit;
        keys[to] = k[i], values[to] = v[i];
    }
}
