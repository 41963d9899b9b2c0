// For each row of attention mass, the smallest number of its largest entries that sums to what is needed:
// thresholds[r] - max(0, 1 - sum), at most caps[r]; all entries if their sum falls short of it.
//
// Masses are integers of 2^-40, rounded half up; thresholds come so from the host. Sums of integers have no order.
// A radix descent over ordered keys, digits of 11, 11 and 10 bits, that counts masses and entries by digit.
//
// free_mass: out[r] = sum of the masses outside row r's spans, spans[firsts[r]] .. spans[firsts[r + 1]], at most 2^64 - 1.
//
// Launch: grid (1, rows), 1024 threads. A row is read three times (once) by one multiprocessor: it is no longer than a head's
// cache, and every head has one. Source: the CPU backend's top_k.rs.
// gates: mass_count LDG.E.128.CONSTANT>=1 ATOMS.POPC.INC !ATOMS.CAS !ATOMG registers<=64
// gates: free_mass LDG.E.128.CONSTANT>=1 !ATOMS !ATOMG registers<=64
#include "scores.cuh"

constexpr u32 THREADS = 1024, BINS = 2048;
constexpr i64 ONE = 1ll << 40;

// The CPU's `(f64::from(mass) * 2^40).round() as u64`: NaN and what is below zero become 0, what is too large the
// largest.
__device__ inline u64 fixed(float mass) {
    u32 bits = __float_as_uint(mass), exponent = bits >> 23;
    if (!(mass > 0.0f)) return 0;
    u64 digits = (bits & 0x7fffff) | (exponent > 0 ? 0x800000 : 0);
    // mass = digits * 2^(exponent - 150), subnormals as if their exponent were 1.
    i32 shift = (i32)max(exponent, 1) - 110;
    if (shift > 40) return ~0ull;
    if (shift >= 0) return digits << shift;
    return shift < -24 ? 0 : (digits + (1ull << (-shift - 1))) >> -shift;
}

// Masses of bins are sums of 64 bits in two words: shared memory adds words. Whoever makes the low one wrap carries.
struct Histogram {
    u32 low[BINS], high[BINS], counts[BINS];

    __device__ void add(u32 bin, u64 mass) {
        u32 low_part = (u32)mass, high_part = (u32)(mass >> 32);
        atomicAdd(&counts[bin], 1);
        if (low_part > 0) high_part += atomicAdd(&low[bin], low_part) + low_part < low_part;
        if (high_part > 0) atomicAdd(&high[bin], high_part);
    }
    __device__ u64 mass(u32 bin) const { return (u64)high[bin] << 32 | low[bin]; }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    mass_count(const float* const* rows, const u32* lengths, const i64* thresholds, const u32* caps, u32* out) {
    __shared__ Histogram histogram;
    __shared__ u64 masses[THREADS / 32], cut_above;
    __shared__ u32 counts[THREADS / 32], cut_count, cut_digit;
    u32 length = lengths[blockIdx.y], cap = caps[blockIdx.y], units = (length + 3) / 4;
    Row row = {rows[blockIdx.y], length, nullptr, nullptr};
    u32 prefix = 0, count = 0;
    u64 above = 0, needed = 0;
#pragma unroll 1
    for (u32 level = 0; level < 3; ++level) {
        u32 shift = level == 0 ? 21 : level == 1 ? 10 : 0, bins = level == 2 ? BINS / 2 : BINS;
        u32 decided = level == 0 ? 0 : 0xffffffff << (level == 1 ? 21 : 10);
        for (u32 bin = threadIdx.x; bin < BINS; bin += THREADS)
            histogram.low[bin] = histogram.high[bin] = histogram.counts[bin] = 0;
        __syncthreads();
        for (u32 unit = threadIdx.x; unit < units; unit += THREADS) {
            float4 x = row.load(unit);
            float entries[4] = {x.x, x.y, x.z, x.w};
            for (u32 i = 0; i < row.valid(unit); ++i) {
                u32 key = ordered(entries[i]);
                if (((key ^ prefix) & decided) == 0) histogram.add((key >> shift) % bins, fixed(entries[i]));
            }
        }
        __syncthreads();

        // Two bins a thread; mass and entries in higher bins.
        u32 bin = 2 * threadIdx.x, low_count = histogram.counts[bin], high_count = histogram.counts[bin + 1], entries;
        u64 low = histogram.mass(bin), high = histogram.mass(bin + 1), sum;
        u64 below = block_scan(low + high, sum, masses), beyond = above + sum - below - low - high;
        u32 fewer = block_scan(low_count + high_count, entries, counts);
        u32 better = count + entries - fewer - low_count - high_count;
        if (level == 0) {
            i64 outside = ONE - (i64)sum, wanted = thresholds[blockIdx.y] - (outside > 0 ? outside : 0);
            needed = wanted;
            if (wanted <= 0 || sum < needed) {
                if (threadIdx.x == 0) out[blockIdx.y] = wanted <= 0 ? 0 : min(length, cap);
                return;
            }
        }
        // In one bin of all the sum from above reaches what is needed.
        if (beyond < needed && beyond + high >= needed)
            cut_digit = bin + 1, cut_above = beyond, cut_count = better;
        else if (beyond + high < needed && beyond + high + low >= needed)
            cut_digit = bin, cut_above = beyond + high, cut_count = better + high_count;
        __syncthreads();
        prefix |= cut_digit << shift, above = cut_above, count = cut_count;
    }
    if (threadIdx.x > 0) return;
    // All entries at the cut are equal.
    u64 each = fixed(__uint_as_float(prefix ^ (prefix >> 31 ? 0x80000000 : 0xffffffff)));
    u64 more = count + (needed - above + each - 1) / each;
    out[blockIdx.y] = more < cap ? more : cap;
}

// A sum that stops at the largest number: as any sum of such, in whatever order.
__device__ inline u64 capped(u64 a, u64 b) { return a + b < a ? ~0ull : a + b; }

extern "C" __global__ void __launch_bounds__(THREADS)
    free_mass(const float* const* rows, const u32* lengths, const Span* spans, const u32* firsts, u64* out) {
    __shared__ u64 masses[THREADS / 32];
    u32 length = lengths[blockIdx.y], units = (length + 3) / 4;
    Row row = {rows[blockIdx.y], length, spans + firsts[blockIdx.y], spans + firsts[blockIdx.y + 1]};
    u64 sum = 0;
    for (u32 unit = threadIdx.x; unit < units; unit += THREADS) {
        float4 x = row.load(unit);
        float entries[4] = {x.x, x.y, x.z, x.w};
        u32 keys[4];
        row.keys(keys, x, unit);
        for (u32 i = 0; i < row.valid(unit); ++i)
            if (keys[i] != PROTECTED) sum = capped(sum, fixed(entries[i]));
    }
    for (u32 distance = 16; distance > 0; distance /= 2) sum = capped(sum, __shfl_xor_sync(ALL_LANES, sum, distance));
    if (lane_id() == 0) masses[warp_id()] = sum;
    __syncthreads();
    if (threadIdx.x > 0) return;
    for (u32 warp = 1; warp < THREADS / 32; ++warp) sum = capped(sum, masses[warp]);
    out[blockIdx.y] = sum;
}
