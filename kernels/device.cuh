// What the kernels share: integer names, the total order of scores, reductions over a block, arrival of the last
// block, and the PTX instructions that CUDA C++ has no word for. No vendor header is included, so the PTX depends on
// the compiler and on this folder only.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;
typedef long long i64;

constexpr u32 ALL_LANES = 0xffffffff;
constexpr float LOG2_E = 1.4426950408889634f;
#define INFINITE __int_as_float(0x7f800000)

__device__ inline u32 lane_id() { return threadIdx.x % 32; }
__device__ inline u32 warp_id() { return threadIdx.x / 32; }

// Reductions. Every lane gets the result, and the order of the additions depends on nothing but the block's shape.
struct Sum {
    __device__ static float none() { return 0.0f; }
    __device__ static float of(float a, float b) { return a + b; }
};
struct Max {
    __device__ static float none() { return -INFINITE; }
    __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

template <class Op> __device__ inline float warp_reduce(float x) {
    for (int distance = 16; distance > 0; distance /= 2)
        x = Op::of(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

// `scratch` holds 32 floats of shared memory; whole warps only. It may be used again at once: the first barrier waits
// for readers of the last call.
template <class Op> __device__ inline float block_reduce(float x, float* scratch) {
    x = warp_reduce<Op>(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    return warp_reduce<Op>(lane_id() < blockDim.x / 32 ? scratch[lane_id()] : Op::none());
}

// True in the block that arrives last of `expected`; what the others wrote before is then visible to all its threads.
// Nobody waits, so no block needs to be resident for another. The counter wraps to zero, ready for the next launch. One
// thread releases and acquires for its block: the barriers order the others before and after it.
__device__ inline bool last_to_arrive(u32* counter, u32 expected) {
    __shared__ bool last;
    __syncthreads();
    if (threadIdx.x == 0) {
        u32 before;
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                     : "=r"(before)
                     : "l"(counter), "r"(expected - 1)
                     : "memory");
        last = before == expected - 1;
    }
    __syncthreads();
    return last;
}

// Scores as integers in the same order: -0 equals +0, and NaN is below everything.
__device__ inline u32 ordered(float score) {
    u32 bits = __float_as_uint(score + 0.0f);
    return score != score ? 0 : bits ^ (bits >> 31 ? 0xffffffff : 0x80000000);
}

// Strong accesses of a word that other blocks of the same launch read or write.
__device__ inline u64 load_relaxed(const u64* word) {
    u64 value;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}
__device__ inline void store_relaxed(u64* word, u64 value) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}
__device__ inline u32 load_acquire(const u32* word) {
    u32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}
__device__ inline void store_release(u32* word, u32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ inline float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Sixteen bytes from global to shared memory; zeros where `there` is false (nothing is read then).
__device__ inline void copy_async(void* shared, const void* global, bool there) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global), "r"(there ? 16 : 0)
                 : "memory");
}
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> __device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8.
__device__ inline void load_matrices(u32 (&out)[4], const void* shared) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}
__device__ inline void load_matrices_transposed(u32 (&out)[4], const void* shared) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
}

// What a cache stores: 16-bit floats, their product with f32 sums, and how a pair of f32 becomes one word.
struct Bf16 {
    __device__ static void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    __device__ static u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};
struct F16 {
    __device__ static void multiply_add(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
    __device__ static u32 pack(float low, float high) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
        return pair;
    }
};

// A tile in shared memory: rows of 128 16-bit elements as 16 chunks of 16 bytes, chunk c of row r at place c ^ (r % 8).
// Eight rows at one chunk, what ldmatrix reads in a phase, then lie in eight different groups of four banks.
constexpr int DIM = 128;
constexpr int CHUNKS = DIM * 2 / 16;
__device__ inline uint4* chunk_at(uint4* tile, u32 row, u32 chunk) {
    return tile + row * CHUNKS + (chunk ^ (row % 8));
}

// Rows of one head of a borrowed tensor: the twin of `HeadRows` in src/backend/cuda/views.rs. Rows start at multiples of
// 16 bytes. With pages, slot s is row s % page of the page that the head's table names for s / page.
struct Rows {
    u64 base;
    i64 stride; // bytes from a row to the next, within a page
    i64 table;  // first entry of the head's table in `pages`; -1 without pages
    u32 page, magic, shift;
    u32 unused;

    __device__ const char* at(u32 slot, const u32* __restrict__ pages) const {
        i64 row = slot;
        if (table >= 0) {
            u32 number = (u64)slot * magic >> (31 + shift);
            row = (i64)pages[table + number] * page + (slot - number * page);
        }
        return reinterpret_cast<const char*>(base) + row * stride;
    }
};

// Sixteen bytes of a row, widened to f32: exact, NaN and infinities included.
struct F32Chunk {
    static constexpr int COUNT = 4;
    __device__ static void widen(const uint4& words, float (&x)[COUNT]) {
        x[0] = __uint_as_float(words.x), x[1] = __uint_as_float(words.y);
        x[2] = __uint_as_float(words.z), x[3] = __uint_as_float(words.w);
    }
};
struct Bf16Chunk {
    static constexpr int COUNT = 8;
    __device__ static void widen(const uint4& words, float (&x)[COUNT]) {
        const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = __uint_as_float(word[i] << 16);
            x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000);
        }
    }
};
struct F16Chunk {
    static constexpr int COUNT = 8;
    __device__ static void widen(const uint4& words, float (&x)[COUNT]) {
        const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
                : "=f"(x[2 * i]), "=f"(x[2 * i + 1])
                : "r"(word[i]));
        }
    }
};

// The reductions above in f64.
struct WideSum {
    __device__ static double none() { return 0.0; }
    __device__ static double of(double a, double b) { return a + b; }
};
struct WideMax {
    __device__ static double none() { return -__longlong_as_double(0x7ff0000000000000); }
    __device__ static double of(double a, double b) { return fmax(a, b); }
};

template <class Op> __device__ inline double warp_reduce(double x) {
    for (int distance = 16; distance > 0; distance /= 2)
        x = Op::of(x, __shfl_xor_sync(ALL_LANES, x, distance));
    return x;
}

template <class Op> __device__ inline double block_reduce(double x, double* scratch) {
    x = warp_reduce<Op>(x);
    __syncthreads();
    if (lane_id() == 0) scratch[warp_id()] = x;
    __syncthreads();
    return warp_reduce<Op>(lane_id() < blockDim.x / 32 ? scratch[lane_id()] : Op::none());
}

// An address that was read from memory, as one of global memory: else the compiler takes it for one of any space, and
// accesses are generic. In PTX, since it undoes a conversion that it sees through.
template <class T> __device__ inline T* global(T* address) {
    u64 there;
    asm("cvta.to.global.u64 %0, %1;" : "=l"(there) : "l"(address));
    return (T*)__cvta_global_to_generic(there);
}

// What a selection keeps of a row: `count` slots, ascending, from place `start` on in a list of all. They are those
// with keys above the threshold and the first `ties` that equal it. Of the row's slots that are not protected, `nan` score
// NaN. The twin of `Cut` in src/backend/cuda/selection.rs.
struct Cut {
    u64 start;
    u32 count, threshold, ties;
    u32 nan;
};
