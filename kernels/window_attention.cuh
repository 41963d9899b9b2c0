// What the kernels of window_attention.cu, projection.cu and attention_spread.cu are made of: which query rows a block has, what a row sees, and the product of
// 32 query rows with 16 keys while tiles of keys stream through shared memory.
#pragma once
#include "device.cuh"

constexpr u32 WARPS = 4, ROWS = 32, GROUP = 16; // warps of a block at most, rows of a warp, keys of a product
constexpr float LOG2_E_REST = 1.9259629911266175e-08f, LN_2 = 0.6931471805599453f;

// What an operation asks for; the twin of `Flags` in src/backend/cuda/window_attention/plan.rs.
enum Flags : u32 {
    WINDOW_MAX = 1,   // maximum over the window, else mean
    GROUP_MAX = 2,    // maximum over the group, else mean
    SCORE_WINDOW = 4, // slots inside the window get scores, too
    POOLED = 8,       // rows are pooled over 2 * radius + 1 slots and scaled back to their mass
    MEANS = 16,       // the mean over window and group of the unpooled rows is wanted, too
    ONLY_MEANS = 32,  // what is computed goes to the planes of the means
    HALF = 64,        // 16-bit elements are f16, else bf16
};

// Query rows of one head: the twins of this and the next are in plan.rs, too.
struct Query {
    Rows rows, lse;       // lse.base is 0 if none is lent
    u32 first, lse_first; // rows of the window's first token
    u32 unused[2];
};

// One KV head to score.
struct Segment {
    u32 row;     // its number among keys, lengths and scores
    u32 query;   // first of its group's heads among the queries
    u32 group, window;
    u32 tokens;  // tokens that the sequence has seen; 0: as many as the head has slots
    u32 ends;    // first of its entries in the table of ends; ALL_LANES without
    u32 splits;  // blocks that share the rows of a unit
    u32 stride;  // floats from a plane of partial results to the next
    u32 chunks;  // 16-byte chunks of a row
    float scale; // log2(e) / sqrt(D)
    u64 stats;   // its first entry among the rows' statistics
    u64 planes;  // its first float among partial results; all ones if its blocks write the scores themselves
};

// How many slots there are, and how many the rows see: the first ones, because positions ascend. `ends`, for heads whose
// positions have holes, holds the past, what each window token sees, and what each gives scores to.
struct Sight {
    const u32* ends;
    u32 length, window, past, scored, gap;
    i32 oldest; // position of the window's first token

    __device__ Sight(const Segment& segment, const u32* lengths, const u32* all_ends, u32 gap, u32 flags)
        : length(lengths[segment.row]), window(segment.window), gap(gap) {
        oldest = (segment.tokens ? segment.tokens : length) - window;
        ends = segment.ends == ALL_LANES ? nullptr : all_ends + segment.ends;
        past = ends ? ends[0] : before(oldest);
        scored = flags & SCORE_WINDOW ? length : past;
    }
    __device__ u32 before(i32 position) const { return min(max(position, 0), (i32)length); }
    __device__ u32 visible(u32 w) const { return ends ? ends[1 + w] : before(oldest + (i32)w + 1); }
    __device__ u32 counted(u32 w) const {
        return min(scored, ends ? ends[1 + window + w] : before(oldest + (i32)w + 1 - (i32)gap));
    }
};

// The larger; NaN if either is.
struct Greatest {
    __device__ static float of(float a, float b) {
        float greater;
        asm("max.NaN.f32 %0, %1, %2;" : "=f"(greater) : "f"(a), "f"(b));
        return greater;
    }
};

// Which rows a block has. Rows are numbered head after head of the group, then by window token. A unit is what is reduced
// as one: all rows, or the rows of a query head if window and group are reduced differently. Warps belong to one unit; a
// block has several small units, or 128 rows of a large one.
struct Block {
    u32 units, rows; // in the segment, in each unit
    u32 warps;       // that a unit has in this block
    u32 unit, mine;  // first unit of the block, their number
    u32 first;       // row of the unit that the block starts at

    __device__ bool has(u32 warp) const { return warp / warps < mine; }
    // Number of a row among all rows of the segment. Rows that a warp has too many repeat the last one.
    __device__ u32 index(u32 warp, u32 row) const {
        return (unit + warp / warps) * rows + min(place(warp, row), rows - 1);
    }
    __device__ bool real(u32 warp, u32 row) const { return place(warp, row) < rows; }
    __device__ u32 place(u32 warp, u32 row) const { return first + warp % warps * ROWS + row; }
    // Window tokens of all these rows: the first and the last.
    __device__ u32 oldest(u32 window) const { return crosses(window) ? 0 : low() % window; }
    __device__ u32 newest(u32 window) const { return crosses(window) ? window - 1 : high() % window; }
    __device__ bool crosses(u32 window) const { return low() / window != high() / window; }
    __device__ u32 low() const { return unit * rows + first; }
    __device__ u32 high() const { return (unit + mine - 1) * rows + min(rows, first + warps * ROWS) - 1; }
};

// What is stored. One kernel is for both 16-bit types, which differ in the instruction of the product only: half the PTX.
struct Bits16 {};
struct F32 {};

// With a log-sum-exp lent: what is subtracted from a row's logits to base two, and the factor from exponential to
// probability.
struct Lent {
    float minus, factor;

    __device__ Lent(const Query& query, u32 w, const u32* pages) {
        float lse = *reinterpret_cast<const float*>(query.lse.at(query.lse_first + w, pages));
        minus = lse * LOG2_E;
        // Rounding the logarithm would cost a large one its last digits.
        float rest = fmaf(lse, LOG2_E, -minus) + lse * LOG2_E_REST;
        factor = fabsf(lse) < INFINITE ? fmaf(-rest, LN_2, 1.0f) : 1.0f;
    }
};

// Tiles of keys in shared memory. Rows are an odd number of 16-byte chunks apart: eight rows at one chunk, what ldmatrix
// reads in a phase, lie in eight different groups of four banks. f32 takes any dim up to D.
template <class T, u32 D> struct Tile {
    static constexpr u32 CHUNKS = D * 2 / 16, STRIDE = CHUNKS + 1, STAGES = 2, KEYS = D > 128 ? 32 : 64;
};
template <u32 D> struct Tile<F32, D> {
    static constexpr u32 CHUNKS = D * 4 / 16, STRIDE = CHUNKS + 1, STAGES = 1, KEYS = 16;
};

// Address of the query row that a lane looks after, 0 in warps without rows.
__device__ inline u64 row_of_lane(const Block& block, const Segment& segment, const Query* queries, const u32* pages) {
    if (!block.has(warp_id())) return 0;
    u32 index = block.index(warp_id(), lane_id());
    const Query& query = queries[segment.query + index / segment.window];
    return reinterpret_cast<u64>(query.rows.at(query.first + index % segment.window, pages));
}

// 32 query rows of a warp, in registers. After a product, element e of fragment (m, n) is row lane / 4 + 8 * r of them,
// r = 2 * m + e / 2, and key 8 * n + 2 * (lane % 4) + e % 2 of the 16.
template <class T, u32 D> struct Queries {
    u32 a[2][D / 16][4];
    bool half;
    static constexpr u32 STRIDE = Tile<T, D>::STRIDE;

    // Rows pass through the ring, those of as many warps at a time as it holds.
    template <u32 RING>
    __device__ void load(uint4* ring, const Block& block, const Segment& segment, const Query* queries,
                         const u32* pages, u32 flags) {
        constexpr u32 CHUNKS = Tile<T, D>::CHUNKS;
        half = flags & HALF;
        u64 mine = row_of_lane(block, segment, queries, pages);
#pragma unroll 1
        for (u32 from = 0; from < blockDim.x; from += RING) {
            __syncthreads();
            u32 place = warp_id() * ROWS - from;
            if (place >= RING || !block.has(warp_id())) continue;
            uint4* rows = ring + place * STRIDE;
#pragma unroll 1
            for (u32 i = lane_id(); i < ROWS * CHUNKS; i += 32) {
                u32 row = i / CHUNKS, chunk = i % CHUNKS;
                u64 address = __shfl_sync(ALL_LANES, mine, row) + chunk * 16;
                copy_async(rows + row * STRIDE + chunk, reinterpret_cast<const void*>(address), chunk < segment.chunks);
            }
            commit_copies();
            wait_copies<0>();
            __syncwarp();
            const uint4* row = rows + lane_id() % 16 * STRIDE + lane_id() / 16;
#pragma unroll
            for (u32 k = 0; k < D / 16; ++k) {
                load_matrices(a[0][k], row + 2 * k);
                load_matrices(a[1][k], row + 2 * k + 16 * STRIDE);
            }
        }
        __syncthreads();
    }

    __device__ void multiply(float (&c)[2][2][4], const uint4* keys, u32) const {
        if (half) multiply_as<F16>(c, keys);
        else multiply_as<Bf16>(c, keys);
    }
    template <class Type> __device__ void multiply_as(float (&c)[2][2][4], const uint4* keys) const {
        const uint4* mine = keys + (lane_id() / 16 * 8 + lane_id() % 8) * STRIDE + lane_id() / 8 % 2;
#pragma unroll
        for (u32 k = 0; k < D / 16; ++k) {
            u32 b[4];
            load_matrices(b, mine + 2 * k);
#pragma unroll
            for (u32 m = 0; m < 2; ++m) {
                Type::multiply_add(c[m][0], a[m][k], b[0], b[1]);
                Type::multiply_add(c[m][1], a[m][k], b[2], b[3]);
            }
        }
    }
    // What turns a product into a logit to base two.
    __device__ static float scale(const Segment& segment) { return segment.scale; }
};

// f32 rows stay where they are: no tensor cores, and registers for sums only. They are scaled before the product, which
// could overflow otherwise.
template <u32 D> struct Queries<F32, D> {
    const float4* rows[4];
    float before;

    template <u32 RING>
    __device__ void load(uint4*, const Block& block, const Segment& segment, const Query* queries, const u32* pages,
                         u32) {
        __syncthreads();
        if (!block.has(warp_id())) return;
        before = segment.scale;
        u64 mine = row_of_lane(block, segment, queries, pages);
#pragma unroll
        for (u32 r = 0; r < 4; ++r)
            rows[r] = reinterpret_cast<const float4*>(__shfl_sync(ALL_LANES, mine, lane_id() / 4 + 8 * r));
    }

    __device__ void multiply(float (&c)[2][2][4], const uint4* keys, u32 chunks) const {
        const uint4* mine = keys + lane_id() % 4 * 2 * Tile<F32, D>::STRIDE;
#pragma unroll 1
        for (u32 chunk = 0; chunk < chunks; ++chunk) {
            float4 q[4];
#pragma unroll
            for (u32 r = 0; r < 4; ++r) {
                q[r] = __ldg(rows[r] + chunk);
                q[r].x *= before, q[r].y *= before, q[r].z *= before, q[r].w *= before;
            }
#pragma unroll
            for (u32 i = 0; i < 4; ++i) {
                const uint4* key = mine + (i / 2 * 8 + i % 2) * Tile<F32, D>::STRIDE + chunk;
                float4 k = *reinterpret_cast<const float4*>(key);
#pragma unroll
                for (u32 r = 0; r < 4; ++r) {
                    float& sum = c[r / 2][i / 2][r % 2 * 2 + i % 2];
                    sum = fmaf(q[r].x, k.x, sum), sum = fmaf(q[r].y, k.y, sum);
                    sum = fmaf(q[r].z, k.z, sum), sum = fmaf(q[r].w, k.w, sum);
                }
            }
        }
    }
    __device__ static float scale(const Segment&) { return 1.0f; }
};

// Reduces four values of each lane over the eight lanes with the same lane % 4. Lane l gets value l / 16 * 2 + l / 8 % 2.
template <class Op> __device__ inline float across_rows(const float (&p)[4]) {
    bool upper = lane_id() & 16, odd = lane_id() & 8;
    float x = Op::of(upper ? p[2] : p[0], __shfl_xor_sync(ALL_LANES, upper ? p[0] : p[2], 16));
    float y = Op::of(upper ? p[3] : p[1], __shfl_xor_sync(ALL_LANES, upper ? p[1] : p[3], 16));
    x = Op::of(odd ? y : x, __shfl_xor_sync(ALL_LANES, odd ? x : y, 8));
    return Op::of(x, __shfl_xor_sync(ALL_LANES, x, 4));
}

// Multiplies the rows with the slots from `start` on, `tiles` tiles of KEYS, zeros from slot `end` on and before slot 0.
// Calls `work(slot, group, c)` for each 16 of them, in all warps that have rows, and `done(slot)` after each tile, in all.
template <class T, u32 D, u32 KEYS, class Work, class Done>
__device__ inline void stream(uint4* ring, const Queries<T, D>& queries, bool active, const Rows keys,
                              const u32* pages, u32 chunks, i32 start, u32 end, u32 tiles, Work work, Done done) {
    using Tile = Tile<T, D>;
    constexpr u32 CHUNKS = Tile::CHUNKS, STRIDE = Tile::STRIDE, STAGES = Tile::STAGES;
    // One place for the copies, ahead of the products by the stages of the ring: the loop runs on after the last of them.
#pragma unroll 1
    for (u32 next = 0; next < tiles + STAGES; ++next) {
        uint4* stage = ring + next % STAGES * KEYS * STRIDE;
        i32 slot = start + (i32)(next - STAGES) * (i32)KEYS;
        bool filled = next >= STAGES;
        if (filled) {
            wait_copies<STAGES - 1>();
            __syncthreads();
            if (active) {
#pragma unroll 1
                for (u32 group = 0; group < KEYS / GROUP; ++group) {
                    float c[2][2][4] = {};
                    queries.multiply(c, stage + group * GROUP * STRIDE, chunks);
                    work(slot + (i32)(group * GROUP), group, c);
                }
            }
            __syncthreads();
        }
        if (next < tiles) {
#pragma unroll 2
            for (u32 i = threadIdx.x; i < KEYS * CHUNKS; i += blockDim.x) {
                u32 key = i / CHUNKS, chunk = i % CHUNKS, at = start + next * KEYS + key;
                bool there = at < end && chunk < chunks;
                const char* from = there ? keys.at(at, pages) + chunk * 16 : reinterpret_cast<const char*>(keys.base);
                copy_async(stage + key * STRIDE + chunk, from, there);
            }
        }
        commit_copies();
        if (filled) done(slot);
    }
}
