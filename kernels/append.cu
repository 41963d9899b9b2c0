// Rows of new tokens, written behind what each segment holds; lengths, positions and the count of tokens grow.
//
//   cache row lengths[s] + t of segment s = new row t of segment s,   t < tokens, keys and values alike
//   positions[s][lengths[s] + t] = counters[SEEN] + t;  then lengths[s] += tokens for all s, counters[SEEN] += tokens
//
// All segments or none: where one has no room nothing changes, but counters[REFUSED] grows by `tokens`. So a cache is
// after a refusal what it was before, as it is after an error of the host's caches. Every block sees for itself whether
// all have room; the lengths change in the last block to arrive, when all others have read them.
//
// New rows lie at fixed strides, told as arguments, so that a launch needs no table; or, with `fresh`, anywhere: its
// first half describes keys, its second values. Rows: copy.cuh. Launch: 256 threads, grid (ceil(tokens / (4 * (256 /
// units))), segments). counters[ARRIVED] is zero before the first launch and after each.
//
// And `lend`, below.
// gates: lend STG.E.64
// gates: append LDG.E.128==8 STG.E.128==8 !U16 registers<=64
#include "copy.cuh"

constexpr u32 SEEN = 0, REFUSED = 1, ARRIVED = 2;
constexpr u32 MOST_TOKENS = 0x7fffffff;

extern "C" __global__ void __launch_bounds__(256)
    append(u64 fresh_keys, u64 fresh_values, i64 key_head_stride, i64 key_row_stride, i64 value_head_stride,
           i64 value_row_stride, const Rows* __restrict__ fresh, const u32* __restrict__ fresh_pages,
           const Rows* __restrict__ all_keys, const Rows* __restrict__ all_values, const u32* __restrict__ pages,
           u32* const* __restrict__ positions, u32* lengths, const u32* __restrict__ capacities, u32* counters,
           u32 tokens, u32 units) {
    u32 s = blockIdx.y, heads = gridDim.y;
    u32 seen = counters[SEEN], length = lengths[s];
    bool full = tokens > MOST_TOKENS - seen;
    for (u32 head = threadIdx.x; head < heads; head += blockDim.x)
        full |= tokens > capacities[head] - lengths[head];
    full = __syncthreads_or(full);

    if (!full) {
        Share share(blockIdx.x, units);
        u32 from[PER_THREAD], to[PER_THREAD];
#pragma unroll
        for (u32 i = 0; i < PER_THREAD; ++i) {
            bool there = share.row(i) < tokens;
            from[i] = there ? share.row(i) : NOWHERE;
            to[i] = there ? length + share.row(i) : NOWHERE;
            if (there && share.unit == 0) positions[s][to[i]] = seen + from[i];
        }
        Rows keys{fresh_keys + s * key_head_stride, key_row_stride, -1, 0, 0, 0, 0};
        Rows values{fresh_values + s * value_head_stride, value_row_stride, -1, 0, 0, 0, 0};
        if (fresh) keys = fresh[s], values = fresh[heads + s];
        uint4 k[PER_THREAD], v[PER_THREAD];
        Units(keys, fresh_pages, share.unit, from).load(k);
        Units(values, fresh_pages, share.unit, from).load(v);
        Units(all_keys[s], pages, share.unit, to).store(k);
        Units(all_values[s], pages, share.unit, to).store(v);
    }
    if (!last_to_arrive(counters + ARRIVED, gridDim.x * gridDim.y)) return;
    for (u32 head = threadIdx.x; head < heads && !full; head += blockDim.x)
        lengths[head] += tokens;
    if (threadIdx.x == 0) {
        if (full) counters[REFUSED] += tokens;
        else counters[SEEN] = seen + tokens;
    }
}

// lend: borrowed rows at fixed strides, described on the device for kernels that take tables: the `Rows` of head h go to
// to + h * pitch, its base is base + h * head_stride. Two tensors of `heads` heads; launch: grid (ceil(heads / 256)).
extern "C" __global__ void __launch_bounds__(256)
    lend(u64 base, i64 head_stride, i64 row_stride, char* to, u32 pitch, u64 other_base, i64 other_head_stride,
         i64 other_row_stride, char* other_to, u32 other_pitch, u32 heads) {
    u32 h = blockIdx.x * 256 + threadIdx.x;
    if (h >= heads) return;
    *reinterpret_cast<Rows*>(to + (u64)h * pitch) = Rows{base + h * head_stride, row_stride, -1, 0, 0, 0, 0};
    if (other_to)
        *reinterpret_cast<Rows*>(other_to + (u64)h * other_pitch) =
            Rows{other_base + h * other_head_stride, other_row_stride, -1, 0, 0, 0, 0};
}
