// Sum and maximum of each row of a ragged f32 matrix [rows][stride]; what a floor at the mean needs.
//
//   out[r] = op of in[r * stride .. + lengths[r]]        0 and -inf for an empty row; max ignores NaN
//
// Launch: grid (chunks, rows), 256 threads. A row's chunks are merged by the block that ends last, in the order of
// the chunks: the result depends on `chunks`, not on the schedule. `partials` f32 [rows][chunks]; `arrivals` u32
// [rows], zero before the first launch and after each. Rows start at multiples of 16 bytes (stride % 4 == 0).
// Source: the last-block pattern of the CUDA programming guide (threadFenceReduction).
// gates: reduce_* LDG.E.128 ATOMG==1 registers<=32
#include "device.cuh"

template <class Op>
__device__ inline void reduce_rows(const float* in, float* out, float* partials, u32* arrivals, const i32* lengths,
                                   i64 stride) {
    __shared__ float scratch[32];
    u32 row = blockIdx.y, chunks = gridDim.x;
    const float* from = in + row * stride;
    // In units of four elements.
    u32 length = lengths[row], units = length / 4, chunk = (units + chunks - 1) / chunks;
    u32 end = min((blockIdx.x + 1) * chunk, units);

    float x = Op::none();
    for (u32 unit = blockIdx.x * chunk + threadIdx.x; unit < end; unit += blockDim.x) {
        float4 four = reinterpret_cast<const float4*>(from)[unit];
        x = Op::of(x, Op::of(Op::of(four.x, four.y), Op::of(four.z, four.w)));
    }
    // The one to three elements after the last unit.
    u32 rest = units * 4 + threadIdx.x;
    if (blockIdx.x == chunks - 1 && rest < length) x = Op::of(x, from[rest]);

    x = block_reduce<Op>(x, scratch);
    float* mine = partials + (u64)row * chunks;
    if (threadIdx.x == 0) mine[blockIdx.x] = x;
    if (!last_to_arrive(arrivals + row, chunks)) return;
    x = Op::none();
    for (u32 chunk = threadIdx.x; chunk < chunks; chunk += blockDim.x) x = Op::of(x, mine[chunk]);
    x = block_reduce<Op>(x, scratch);
    if (threadIdx.x == 0) out[row] = x;
}

extern "C" __global__ void __launch_bounds__(256)
    reduce_sum(const float* in, float* out, float* partials, u32* arrivals, const i32* lengths, i64 stride) {
    reduce_rows<Sum>(in, out, partials, arrivals, lengths, stride);
}

extern "C" __global__ void __launch_bounds__(256)
    reduce_max(const float* in, float* out, float* partials, u32* arrivals, const i32* lengths, i64 stride) {
    reduce_rows<Max>(in, out, partials, arrivals, lengths, stride);
}
