// Decode attention of 16-bit heads on tensor cores: the middle of three kernels, see attend.cu for what and why.
//
// A warp takes 16 keys of each tile and shares nothing with the others until the end of an item: its ring of two stages
// is its own, so the loop has no block barrier. Rows of a block are padded to the 16 of an mma; they are read from
// shared memory again for each tile, which saves 32 registers. Head dims between those of the templates run in the next
// wider one with zeros, most of whose work is skipped.
//
// Weights are not rounded to 16 bits but split into terms that hold all of an f32: three of bf16, two of f16. That
// makes 64 (48) mma of 16 keys of 128 dims instead of 32, and they are free: a tile of 64 keys is 32 KB, 2260 clocks of
// what an H100's memory gives a multiprocessor, while 64 mma keep each quarter of it busy for 410. What a zero among
// the terms makes of an infinity, attend_combine repairs.
//
// Launch: grid (any, ceil(group * queries / 16)), 128 threads (64 for 256 dims), bytes of dynamic shared memory
// 2 * D * (16 + 64 * warps). Source: Flash-Decoding (FlashAttention's split-KV kernels).
// gates: attend_mma_* LDGSTS.E.BYPASS.128 LDG.E.64.CONSTANT
// gates: attend_mma_bf16_64 HMMA.16816.F32.BF16==32 LDSM.16.M88.4==8 LDSM.16.MT88.4==4 registers<=128
// gates: attend_mma_bf16_96 HMMA.16816.F32.BF16==40 LDSM.16.M88.4==4 LDSM.16.MT88.4==6 registers<=128
// gates: attend_mma_bf16_128 HMMA.16816.F32.BF16==56 LDSM.16.M88.4==8 LDSM.16.MT88.4==8 registers<=168
// gates: attend_mma_bf16_256 HMMA.16816.F32.BF16==104 LDSM.16.M88.4==8 LDSM.16.MT88.4==16 registers<=224
// gates: attend_mma_f16_64 HMMA.16816.F32==24 LDSM.16.M88.4==8 LDSM.16.MT88.4==4 registers<=128
// gates: attend_mma_f16_96 HMMA.16816.F32==28 LDSM.16.M88.4==4 LDSM.16.MT88.4==6 registers<=128
// gates: attend_mma_f16_128 HMMA.16816.F32==40 LDSM.16.M88.4==8 LDSM.16.MT88.4==8 registers<=168
// gates: attend_mma_f16_256 HMMA.16816.F32==72 LDSM.16.M88.4==8 LDSM.16.MT88.4==16 registers<=224
#include "attend.cuh"

constexpr u32 KEYS = 16, ROWS = 16;

// Products for a pair of key groups, or of groups of dims; one statement each, since PTX repeats itself enough.
#define ONE(TYPE, A, B, C, D)                                                                                          \
    "mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {" D "}, {" A "}, {" B "}, {" C "};\n\t"
#define BOTH(TYPE, A, C0, C1, D0, D1) ONE(TYPE, A, "%8, %9", C0, D0) ONE(TYPE, A, "%10, %11", C1, D1)
#define LOW "%0, %1, %2, %3"
#define HIGH "%4, %5, %6, %7"
#define SCORES(TYPE) BOTH(TYPE, "%12, %13, %14, %15", LOW, HIGH, LOW, HIGH)
// The first term meets nothing, the others what came before. The sum goes to the shrunken outputs here and not by an
// mma, which cuts off what it cannot hold: over many tiles that would be a bias.
#define FIRST(TYPE, P) BOTH(TYPE, P, "z, z, z, z", "z, z, z, z", "a, b, c, d", "e, f, g, h")
#define TERM(TYPE, P) BOTH(TYPE, P, "a, b, c, d", "e, f, g, h", "a, b, c, d", "e, f, g, h")
#define WEIGH(TERMS)                                                                                                   \
    "{ .reg .f32 a, b, c, d, e, f, g, h, z;\n\tmov.f32 z, 0f00000000;\n\t" TERMS                                       \
    "fma.rn.f32 %0, %0, %12, a;\n\tfma.rn.f32 %1, %1, %12, b;\n\tfma.rn.f32 %2, %2, %13, c;\n\t"                       \
    "fma.rn.f32 %3, %3, %13, d;\n\tfma.rn.f32 %4, %4, %12, e;\n\tfma.rn.f32 %5, %5, %12, f;\n\t"                       \
    "fma.rn.f32 %6, %6, %13, g;\n\tfma.rn.f32 %7, %7, %13, h; }"
#define SUMS(C)                                                                                                        \
    "+f"(C[0][0]), "+f"(C[0][1]), "+f"(C[0][2]), "+f"(C[0][3]), "+f"(C[1][0]), "+f"(C[1][1]), "+f"(C[1][2]),           \
        "+f"(C[1][3])
#define FOUR(A) "r"(A[0]), "r"(A[1]), "r"(A[2]), "r"(A[3])

struct Bf16Cache : Bf16 {
    static constexpr u32 TERMS = 3;
    static constexpr float WEIGHT = 1.0f;
    __device__ static void scores(float (&c)[2][4], const u32 (&q)[4], const u32 (&k)[4]) {
        asm(SCORES("bf16") : SUMS(c) : FOUR(k), FOUR(q));
    }
    __device__ static void weigh(float (*o)[4], const float (&shrink)[2], const u32 (&p)[3][4], const u32 (&v)[4]) {
        asm(WEIGH(FIRST("bf16", "%14, %15, %16, %17") TERM("bf16", "%18, %19, %20, %21")
                      TERM("bf16", "%22, %23, %24, %25"))
            : SUMS(o)
            : FOUR(v), "f"(shrink[0]), "f"(shrink[1]), FOUR(p[2]), FOUR(p[1]), FOUR(p[0]));
    }
    __device__ static float low(u32 pair) { return __uint_as_float(pair << 16); }
    __device__ static float high(u32 pair) { return __uint_as_float(pair & 0xffff0000); }
};
// Weights are multiplied by 2^15, so that the second terms of small ones are normal numbers.
struct F16Cache : F16 {
    static constexpr u32 TERMS = 2;
    static constexpr float WEIGHT = 32768.0f;
    __device__ static void scores(float (&c)[2][4], const u32 (&q)[4], const u32 (&k)[4]) {
        asm(SCORES("f16") : SUMS(c) : FOUR(k), FOUR(q));
    }
    __device__ static void weigh(float (*o)[4], const float (&shrink)[2], const u32 (&p)[2][4], const u32 (&v)[4]) {
        asm(WEIGH(FIRST("f16", "%14, %15, %16, %17") TERM("f16", "%18, %19, %20, %21"))
            : SUMS(o)
            : FOUR(v), "f"(shrink[0]), "f"(shrink[1]), FOUR(p[1]), FOUR(p[0]));
    }
    __device__ static float low(u32 pair) {
        float x;
        asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(x) : "r"(pair));
        return x;
    }
    __device__ static float high(u32 pair) { return low(pair >> 16); }
};

// A tile in shared memory, rows of CHUNKS times 16 bytes. Chunk c of row r lies at place c ^ (r % 8) of its eight (of
// its four, c ^ (r / 2 % 4), where rows are no multiple of eight): eight rows at one chunk, what ldmatrix reads in a
// phase, then lie in eight different groups of four banks.
template <u32 CHUNKS> struct Tile {
    static_assert(CHUNKS % 4 == 0, "a head dim that is a multiple of 32");
    static constexpr u32 TURN = CHUNKS % 8 == 0 ? 8 : 4;
    __device__ static u32 place(u32 row, u32 chunk) {
        return row * CHUNKS + (chunk ^ (TURN == 8 ? row % 8 : row / 2 % 4));
    }

    // Addresses of what a lane gives to ldmatrix: of chunks `first` + 2 i, the others follow at constant distances.
    u32 at[TURN / 2];
    __device__ Tile(const uint4* tile, u32 row, u32 first) {
        u32 address = (u32)__cvta_generic_to_shared(tile);
#pragma unroll
        for (u32 i = 0; i < TURN / 2; ++i) at[i] = address + place(row, first + 2 * i) * 16;
    }
    // Chunks first + TURN i + 2 j and their neighbours, j a constant once loops are unrolled.
    __device__ void load(u32 (&out)[4], u32 i, u32 j) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at[j] + i * TURN * 16)
                     : "memory");
    }
    __device__ void load_transposed(u32 (&out)[4], u32 i, u32 j) const {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                     : "r"(at[j] + i * TURN * 16)
                     : "memory");
    }
};

template <class T, u32 D, u32 WARPS> __device__ inline void attend(const Work& work) {
    constexpr u32 CHUNKS = D / 8, STEPS = D / 16, STAGE = 2 * KEYS * CHUNKS, TILE = KEYS * WARPS;
    constexpr u32 TURNS = Tile<CHUNKS>::TURN / 2;
    // Rows of partial outputs, padded so that the rows of a quad fall into different banks.
    constexpr u32 PITCH = D + 8;
    static_assert(WARPS * ROWS * (PITCH * 4 + 8) <= WARPS * 2 * STAGE * 16, "partial outputs fit into the ring");
    // Queries, then for each warp two stages of 16 keys and 16 values.
    extern __shared__ uint4 shared[];
    float scale = work.scale * LOG2_E;
    u32 lane = lane_id(), warp = warp_id(), items = work.offsets[work.segments];
    uint4 *ring = shared + ROWS * CHUNKS, *mine = ring + warp * 2 * STAGE;

#pragma unroll 1
    for (u32 index = blockIdx.x; index < items; index += gridDim.x) {
        Item item(work, index, ROWS);
        if (item.end <= item.first) continue;
        // The last item's partial outputs have been read.
        __syncthreads();
#pragma unroll 1
        for (u32 i = threadIdx.x; i < ROWS * CHUNKS; i += WARPS * 32) {
            u32 row = i / CHUNKS, chunk = i % CHUNKS;
            copy_async(shared + Tile<CHUNKS>::place(row, chunk), item.query(work, row) + chunk * 16,
                       row < item.rows && chunk * 8 < work.dim);
        }
        // Of the thread's two rows, lane / 4 and eight below it.
        u32 bound[2] = {item.bound(work, lane / 4), item.bound(work, lane / 4 + 8)};
        float maximum[2] = {-INFINITE, -INFINITE}, sum[2] = {}, o[D / 8][4] = {};
        u32 tiles = (item.end - item.first + TILE - 1) / TILE;
        auto fetch = [&](u32 tile) {
            uint4* stage = mine + tile % 2 * STAGE;
            u32 first = item.first + tile * TILE + warp * KEYS;
            // Half of the lanes find keys, the other half values.
            const Rows* rows = lane < KEYS ? work.k : work.v;
            u64 row = reinterpret_cast<u64>(rows[item.segment].at(min(first + lane % KEYS, item.end - 1), work.pages));
#pragma unroll 1
            for (u32 i = lane; i < STAGE; i += 32) {
                u64 from = __shfl_sync(ALL_LANES, row, i / CHUNKS) + i % CHUNKS * 16;
                // Zeros past the end: 0 * NaN would be NaN.
                copy_async(stage + Tile<CHUNKS>::place(i / CHUNKS, i % CHUNKS), reinterpret_cast<const char*>(from),
                           first + i / CHUNKS % KEYS < item.end && i % CHUNKS * 8 < work.dim);
            }
        };
#pragma unroll 1
        for (u32 tile = 0; tile < 2; ++tile) {
            if (tile < tiles) fetch(tile);
            commit_copies();
        }
        // All queries are there.
        wait_copies<1>();
        __syncthreads();
#pragma unroll 1
        for (u32 tile = 0; tile < tiles; ++tile) {
            const uint4* stage = mine + tile % 2 * STAGE;
            wait_copies<1>();
            __syncwarp();
            float x[2][4] = {};
            Tile<CHUNKS> queries(shared, lane % 16, lane / 16);
            Tile<CHUNKS> keys(stage, lane / 16 * 8 + lane % 8, lane / 8 % 2);
#pragma unroll 1
            for (u32 i = 0; i * TURNS * 16 < work.dim; ++i)
#pragma unroll
                for (u32 j = 0; j < TURNS; ++j) {
                    u32 q[4], k[4];
                    queries.load(q, i, j);
                    keys.load(k, i, j);
                    T::scores(x, q, k);
                }
            u32 key = item.first + tile * TILE + warp * KEYS + lane % 4 * 2;
            float shrink[2];
#pragma unroll
            for (u32 r = 0; r < 2; ++r) {
                float greater = maximum[r];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float& score = x[i / 2][2 * r + i % 2];
                    score = key + i / 2 * 8 + i % 2 < bound[r] ? score * scale : -INFINITE;
                    greater = fmaxf(greater, score);
                }
                greater = fmaxf(greater, __shfl_xor_sync(ALL_LANES, greater, 1));
                greater = fmaxf(greater, __shfl_xor_sync(ALL_LANES, greater, 2));
                // Nothing but -inf so far: subtracting it would be NaN.
                float subtract = greater == -INFINITE ? 0.0f : greater;
                shrink[r] = exp2_approx(maximum[r] - subtract);
                maximum[r] = greater;
                sum[r] *= shrink[r];
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float& score = x[i / 2][2 * r + i % 2];
                    score = exp2_approx(score - subtract) * T::WEIGHT;
                    sum[r] += score;
                }
            }
            // Sums of two key groups are laid out as the left operand of the next product.
            u32 p[T::TERMS][4];
#pragma unroll
            for (u32 term = 0; term < T::TERMS; ++term)
#pragma unroll
                for (u32 i = 0; i < 4; ++i) {
                    float &low = x[i / 2][i % 2 * 2], &high = x[i / 2][i % 2 * 2 + 1];
                    u32 pair = p[term][i] = T::pack(low, high);
                    low -= T::low(pair), high -= T::high(pair);
                }
            Tile<CHUNKS> values(stage, KEYS + lane % 16, lane / 16);
            // Dims that the head lacks are left out. The branches also keep assemblers from loading all values at once,
            // which takes more registers than there are.
#pragma unroll
            for (u32 i = 0; i < STEPS; i += 2) {
                if (i * 16 >= work.dim) break;
#pragma unroll
                for (u32 j = i; j < i + 2; ++j) {
                    u32 v[4];
                    values.load_transposed(v, j / TURNS, j % TURNS);
                    T::weigh(o + 2 * j, shrink, p, v);
                }
            }
            // All lanes have read before any refills.
            __syncwarp();
            if (tile + 2 < tiles) fetch(tile + 2);
            commit_copies();
        }
        wait_copies<0>();
        __syncthreads();

        float* outputs = reinterpret_cast<float*>(ring);
        float2* stats = reinterpret_cast<float2*>(outputs + WARPS * ROWS * PITCH);
#pragma unroll
        for (u32 r = 0; r < 2; ++r) {
            u32 row = warp * ROWS + r * 8 + lane / 4;
            sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 1);
            sum[r] += __shfl_xor_sync(ALL_LANES, sum[r], 2);
            if (lane % 4 == 0) stats[row] = make_float2(maximum[r], sum[r]);
#pragma unroll
            for (u32 n = 0; n < D / 8; ++n)
                *reinterpret_cast<float2*>(outputs + row * PITCH + n * 8 + lane % 4 * 2) =
                    make_float2(o[n][2 * r], o[n][2 * r + 1]);
        }
        __syncthreads();
        merge_warps(work, item, outputs, stats, ROWS, PITCH, 1.0f / T::WEIGHT);
    }
}

#define ATTEND(NAME, TYPE, D, WARPS, BLOCKS)                                                                           \
    extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS) attend_mma_##NAME##_##D(WORK_PARAMETERS) {        \
        attend<TYPE, D, WARPS>(WORK);                                                                                  \
    }
ATTEND(bf16, Bf16Cache, 64, 4, 3)
ATTEND(bf16, Bf16Cache, 96, 4, 3)
ATTEND(bf16, Bf16Cache, 128, 4, 3)
ATTEND(bf16, Bf16Cache, 256, 2, 3)
ATTEND(f16, F16Cache, 64, 4, 3)
ATTEND(f16, F16Cache, 96, 4, 3)
ATTEND(f16, F16Cache, 128, 4, 3)
ATTEND(f16, F16Cache, 256, 2, 3)

