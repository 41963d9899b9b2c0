// How tokens of a stretch stand out by the norms of their hidden rows: added to the scores of the slots that hold them.
//
//   z[p]        = (n[p] - mean n) / (s + 1e-8)       norms n[p] of the stretch's positions p, s their sample deviation
//   rows[r][t] += weight * softmax(z / temperature)[position of slot t]
//
// Stretch r: row r's positions begin .. begin + count, and the slots first .. first + slots that hold any of them. A
// stretch without slots is skipped. Norms: one f32 a row of heads[view], in the sequence's order. Row r's positions start
// at starts[r]; -1: slot = position.
//
// Launch: grid (rows), 256 threads. A block takes a row: it reads the stretch's norms four times, from the L2 but for the
// first, and the heads of a view do the same sums in the same order, which is cheaper than a launch between. Sums are f64.
// A norm that is not finite makes the whole stretch NaN.
// Source: GUI-KV (arXiv 2510.00536).
// gates: saliency DADD DFMA FMNMX registers<=64
#include "device.cuh"

// The twin of `Stretch` in src/backend/cuda/saliency.rs.
struct Stretch {
    u32 view, begin, count, first, slots;
};

extern "C" __global__ void __launch_bounds__(256)
    saliency(float* const* rows, const Stretch* stretches, const Rows* heads, const u32* pages, const i64* starts,
             const u32* positions, float weight, float temperature) {
    __shared__ float narrow[32];
    __shared__ double wide[32];
    Stretch stretch = stretches[blockIdx.x];
    if (stretch.slots == 0) return;
    Rows norms = heads[stretch.view];
    auto norm = [&](u32 i) { return *global(reinterpret_cast<const float*>(norms.at(stretch.begin + i, pages))); };

    double sum = 0.0;
    float most = Max::none();
    for (u32 i = threadIdx.x; i < stretch.count; i += blockDim.x) {
        float x = norm(i);
        sum += (double)x;
        most = fmaxf(most, x);
    }
    double mean = block_reduce<WideSum>(sum, wide) / (double)stretch.count;
    double top = (double)block_reduce<Max>(most, narrow);
    sum = 0.0;
    for (u32 i = threadIdx.x; i < stretch.count; i += blockDim.x) {
        double away = (double)norm(i) - mean;
        sum += away * away;
    }
    double squares = block_reduce<WideSum>(sum, wide);
    double deviation = sqrt(squares / (double)max(stretch.count - 1, 1)) + 1e-8;
    auto share = [&](u32 i) { return exp(((double)norm(i) - top) / deviation / (double)temperature); };
    sum = 0.0;
    for (u32 i = threadIdx.x; i < stretch.count; i += blockDim.x) sum += share(i);
    sum = block_reduce<WideSum>(sum, wide);

    float* row = global(rows[blockIdx.x]);
    i64 start = starts[blockIdx.x];
    for (u32 i = threadIdx.x; i < stretch.slots; i += blockDim.x) {
        u32 slot = stretch.first + i, position = start < 0 ? slot : positions[start + slot];
        row[slot] += (float)((double)weight * (share(position - stretch.begin) / sum));
    }
}
