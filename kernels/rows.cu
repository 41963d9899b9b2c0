// Operations on rows of scores that read no tensor. Row r has lengths[r] entries.
//
//   count_nan:      counts[r] += NaN in row r                                counts zeroed before
//   weigh:          norms[r][t] *= rows[r][t] + epsilon
//   raise:          rows[r][t] = max(rows[r][t], by[r][t]), a NaN of either stays
//   sum_rows:       sums[r] = sum of row r, f64
//   floor_at_mean:  rows[r][t] = max(rows[r][t], sums[r] / lengths[r]), a NaN stays
//   scale_by_layer: norms[r][t] /= sum of sums[q] over the rows q of r's view; x / 0 is 0
//   scale_by_heads: norms[r][t] /= sum of what the rows of r's view hold at the position of slot t; x / 0 is 0
//   share_heads:    rows[r][t] = sum of rows[q][t] over the rows q of r's view, which are equally long
//   coarsen:        global(out[r])[u] = mean of rows[r][t] over unit u                lengths of `out`
//   pick:           out[r][i] = rows[r][slots[i]]                             lengths of `out`
//
// View v has the rows views[v] .. views[v + 1]. Units and slots of row r start at offsets[r] of their list. Row r's
// positions start at starts[r]; -1: slot = position.
//
// Launch: 256 threads; grid (ceil(longest row / 1024), rows), but for
//   sum_rows       (ceil(longest row / 4096), rows); `partials` f64 [rows][grid x], `arrivals` u32 [rows], zero
//   scale_by_heads (ceil(positions / 1024), views)
//   share_heads    (ceil(longest row / 1024), views)
//   coarsen        (ceil(most units of a row / 256), rows)
// Rows start at multiples of 16 bytes: an access has four entries, the last ones of a row excepted.
//
// Sums are f64, and each has one order: that of the CPU backend where it is one of heads (scale_by_heads,
// share_heads) or of slots of a unit, whose bits are therefore the same; a fixed tree in sum_rows, whose blocks are
// merged in order by the one that ends last (threadFenceReduction of the CUDA programming guide).
// gates: count_nan LDG.E.128 REDUX
// gates: weigh LDG.E.128>=2 STG.E.128 !FFMA
// gates: raise LDG.E.128>=2 STG.E.128
// gates: sum_rows LDG.E.128>=4 DADD ATOMG==1 registers<=40
// gates: floor_at_mean LDG.E.128 STG.E.128
// gates: scale_by_layer LDG.E.128 STG.E.128
// gates: scale_by_heads DADD DMUL ATOMS==0
// gates: share_heads LDG.E.128 STG.E.128 !FFMA
// gates: coarsen DADD
// gates: pick LDG.E STG.E
#include "device.cuh"

constexpr u32 TILE = 1024, SUM_TILE = 4096;

// The four entries from `at` on; zeros past the end.
__device__ inline void load(float (&x)[4], const float* row, u32 at, u32 length) {
    if (at + 4 <= length) {
        float4 four = *reinterpret_cast<const float4*>(row + at);
        x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i) x[i] = at + i < length ? row[at + i] : 0.0f;
}

__device__ inline void store(float* row, u32 at, u32 length, const float (&x)[4]) {
    if (at + 4 <= length) {
        *reinterpret_cast<float4*>(row + at) = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (at + i < length) row[at + i] = x[i];
}

__device__ inline u32 own_four() { return blockIdx.x * TILE + threadIdx.x * 4; }

// Replaces each entry of the block's tile of a row by what `work` makes of it.
template <class Work> __device__ inline void for_each(float* row, u32 length, Work work) {
    u32 at = own_four();
    if (at >= length) return;
    float x[4];
    load(x, row, at, length);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) x[i] = work(x[i]);
    store(row, at, length, x);
}

extern "C" __global__ void __launch_bounds__(256)
    count_nan(const float* const* rows, const u32* lengths, u32* counts) {
    u32 length = lengths[blockIdx.y], at = own_four(), count = 0;
    if (at < length) {
        float x[4];
        load(x, global(rows[blockIdx.y]), at, length);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) count += x[i] != x[i];
    }
    count = __reduce_add_sync(ALL_LANES, count);
    if (lane_id() == 0 && count > 0) atomicAdd(counts + blockIdx.y, count);
}

extern "C" __global__ void __launch_bounds__(256)
    weigh(float* const* norms, const float* const* rows, const u32* lengths, float epsilon) {
    float *norm = global(norms[blockIdx.y]), x[4], scores[4];
    u32 length = lengths[blockIdx.y], at = own_four();
    if (at >= length) return;
    load(x, norm, at, length);
    load(scores, global(rows[blockIdx.y]), at, length);
#pragma unroll
    for (u32 i = 0; i < 4; ++i) x[i] *= scores[i] + epsilon;
    store(norm, at, length, x);
}

extern "C" __global__ void __launch_bounds__(256)
    raise(float* const* rows, const float* const* by, const u32* lengths) {
    float *row = global(rows[blockIdx.y]), x[4], least[4];
    u32 length = lengths[blockIdx.y], at = own_four();
    if (at >= length) return;
    load(x, row, at, length);
    load(least, global(by[blockIdx.y]), at, length);
#pragma unroll
    for (u32 i = 0; i < 4; ++i)
        if (least[i] != least[i] || x[i] < least[i]) x[i] = least[i];
    store(row, at, length, x);
}

extern "C" __global__ void __launch_bounds__(256) sum_rows(const float* const* rows, const u32* lengths, double* sums,
                                                           double* partials, u32* arrivals) {
    __shared__ double scratch[32];
    u32 r = blockIdx.y, length = lengths[r];
    // An empty row has a sum as well.
    u32 blocks = max(1, (length + SUM_TILE - 1) / SUM_TILE);
    if (blockIdx.x >= blocks) return;

    double sum = 0.0;
#pragma unroll
    for (u32 i = 0; i < SUM_TILE / TILE; ++i) {
        float x[4];
        load(x, global(rows[r]), blockIdx.x * SUM_TILE + i * TILE + threadIdx.x * 4, length);
        sum += ((double)x[0] + (double)x[1]) + ((double)x[2] + (double)x[3]);
    }
    sum = block_reduce<WideSum>(sum, scratch);
    double* mine = partials + (u64)r * gridDim.x;
    if (threadIdx.x == 0) mine[blockIdx.x] = sum;
    if (!last_to_arrive(arrivals + r, blocks)) return;
    sum = 0.0;
    for (u32 block = threadIdx.x; block < blocks; block += blockDim.x) sum += mine[block];
    sum = block_reduce<WideSum>(sum, scratch);
    if (threadIdx.x == 0) sums[r] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
    floor_at_mean(float* const* rows, const u32* lengths, const double* sums) {
    u32 length = lengths[blockIdx.y];
    float mean = (float)(sums[blockIdx.y] / (double)length);
    for_each(global(rows[blockIdx.y]), length, [&](float x) { return x < mean ? mean : x; });
}

// A head without values has no norm to share out.
__device__ inline double reciprocal(double x) { return x == 0.0 ? 0.0 : 1.0 / x; }
__device__ inline float scaled(float x, double factor) { return (float)((double)x * factor); }

// `view_of[r]`: the view of row r.
extern "C" __global__ void __launch_bounds__(256) scale_by_layer(float* const* norms, const u32* lengths,
                                                                 const u32* views, const u32* view_of,
                                                                 const double* sums) {
    u32 view = view_of[blockIdx.y];
    double sum = 0.0;
    for (u32 r = views[view]; r < views[view + 1]; ++r) sum += sums[r];
    double factor = reciprocal(sum);
    for_each(global(norms[blockIdx.y]), lengths[blockIdx.y], [&](float x) { return scaled(x, factor); });
}

// Calls `work(entry, position - begin)` for what the rows of a view hold at the positions begin .. begin + TILE,
// row after row: positions of a row ascend, so its entries there are consecutive, and no two threads have the same.
template <class Work>
__device__ inline void for_each_held(u32 begin, float* const* norms, const u32* lengths, const u32* views,
                                     const i64* starts, const u32* positions, Work work) {
    for (u32 r = views[blockIdx.y]; r < views[blockIdx.y + 1]; ++r) {
        u32 length = lengths[r];
        i64 start = starts[r];
        u32 low = 0, high = length;
        if (start < 0) low = min(begin, length);
        while (start >= 0 && low < high) {
            u32 middle = low + (high - low) / 2;
            if (positions[start + middle] < begin) low = middle + 1;
            else high = middle;
        }
        for (u32 slot = low + threadIdx.x; slot < length; slot += blockDim.x) {
            u32 position = start < 0 ? slot : positions[start + slot];
            if (position - begin >= TILE) break;
            work(global(norms[r])[slot], position - begin);
        }
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(256)
    scale_by_heads(float* const* norms, const u32* lengths, const u32* views, const i64* starts, const u32* positions) {
    __shared__ double sums[TILE];
    u32 begin = blockIdx.x * TILE;
    for (u32 i = threadIdx.x; i < TILE; i += blockDim.x) sums[i] = 0.0;
    __syncthreads();
    for_each_held(begin, norms, lengths, views, starts, positions,
                  [&](float& x, u32 i) { sums[i] += (double)x; });
    for_each_held(begin, norms, lengths, views, starts, positions,
                  [&](float& x, u32 i) { x = scaled(x, reciprocal(sums[i])); });
}

extern "C" __global__ void __launch_bounds__(256)
    share_heads(float* const* rows, const u32* lengths, const u32* views) {
    u32 first = views[blockIdx.y], end = views[blockIdx.y + 1], at = own_four();
    if (first == end || at >= lengths[first]) return;
    u32 length = lengths[first];
    float sum[4] = {};
    for (u32 r = first; r < end; ++r) {
        float x[4];
        load(x, global(rows[r]), at, length);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) sum[i] += x[i];
    }
    for (u32 r = first; r < end; ++r) store(global(rows[r]), at, length, sum);
}

extern "C" __global__ void __launch_bounds__(256) coarsen(float* const* out, const u32* lengths,
                                                          const float* const* __restrict__ rows,
                                                          const uint2* __restrict__ units, const u64* offsets) {
    u32 r = blockIdx.y, u = blockIdx.x * blockDim.x + threadIdx.x;
    if (u >= lengths[r]) return;
    const float* __restrict__ row = global(rows[r]);
    uint2 unit = units[offsets[r] + u];
    // What the sum of nothing is in Rust: a unit of -0 has the mean -0.
    double sum = -0.0;
#pragma unroll 8
    for (u32 t = unit.x; t < unit.y; ++t) sum += (double)row[t];
    global(out[r])[u] = (float)(sum / (double)(unit.y - unit.x));
}

extern "C" __global__ void __launch_bounds__(256) pick(float* const* out, const u32* lengths,
                                                       const float* const* __restrict__ rows,
                                                       const u32* __restrict__ slots, const u64* offsets) {
    u32 r = blockIdx.y, length = lengths[r];
    const u32* __restrict__ mine = slots + offsets[r];
    const float* __restrict__ row = global(rows[r]);
    float* to = global(out[r]);
    for (u32 i = blockIdx.x * TILE + threadIdx.x; i < min(length, (blockIdx.x + 1) * TILE); i += blockDim.x)
        to[i] = row[mine[i]];
}
