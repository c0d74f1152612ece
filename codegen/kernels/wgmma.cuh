// Warpgroup matrix products: 64 rows of A times N columns of B, both in shared memory, summed in registers.
//
// A tile in shared memory is swizzled in lines of 128 bytes. Along those lines runs K ("K-major", what FP8 needs), or,
// for 16-bit inputs, the rows of A or the columns of B ("MN-major": a matrix that is read transposed without a copy).
//
// One specialisation for each N of the tile table. The assembler wants every register by name, so the lists are macros,
// sixteen at a time.
#pragma once
#include "ptx.cuh"

namespace wgmma {

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int PENDING>
__device__ __forceinline__ void wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps the compiler from moving reads and writes of an accumulator over the asynchronous product that owns it.
template <int N>
__device__ __forceinline__ void hold(float (&sum)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(sum[i])::"memory");
}

template <int N>
__device__ __forceinline__ void hold(u32 (&words)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+r"(words[i])::"memory");
}

// The descriptor of a tile (PTX ISA, "Matrix Descriptor Format"); both offsets are in bytes.
//   K-major: eight rows of 128 bytes are 1024 bytes, `leading` is not used.
//   MN-major: eight steps of K are 1024 bytes; `leading` is from 64 rows (or columns) to the next 64.
// All of it that depends on the tile is in the lower half, and in units of 16 bytes: adding to it moves the tile.
__device__ __forceinline__ u32 describe(const void* tile, u32 leading) {
    return (ptx::shared_address(tile) & 0x3FFFF) >> 4 | leading >> 4 << 16;
}

// STRIDE, which is 1024 where rows or steps follow each other, is in bytes too.
template <u32 STRIDE = 1024>
__device__ __forceinline__ u64 descriptor(u32 lower) {
    constexpr u32 SWIZZLE_128 = 1u << 30;
    return u64(STRIDE >> 4 | SWIZZLE_128) << 32 | lower;
}

struct Bf16 {
    static constexpr i32 BYTES = 2;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ u32 pack(float low, float high) { return ptx::pack_bf16(low, high); }
    static __device__ __forceinline__ void unpack(u32 packed, float& low, float& high) { ptx::unpack_bf16(packed, low, high); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return ptx::larger_bf16(a, b); }
};
struct Fp16 {
    static constexpr i32 BYTES = 2;
    static constexpr bool SCALED = false;
    static __device__ __forceinline__ u32 pack(float low, float high) { return ptx::pack_fp16(low, high); }
    static __device__ __forceinline__ void unpack(u32 packed, float& low, float& high) { ptx::unpack_fp16(packed, low, high); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return ptx::larger_fp16(a, b); }
};
struct Fp8 {  // e4m3 with a scale for each block; its results are bf16
    static constexpr i32 BYTES = 1;
    static constexpr bool SCALED = true;
    static __device__ __forceinline__ u32 pack(float low, float high) { return ptx::pack_bf16(low, high); }
    static __device__ __forceinline__ void unpack(u32 packed, float& low, float& high) { ptx::unpack_bf16(packed, low, high); }
    static __device__ __forceinline__ u32 larger(u32 a, u32 b) { return ptx::larger_bf16(a, b); }
};

// static void run(float (&sum)[N / 2], u64 a, u64 b, bool accumulate)
// static void begin(float (&sum)[N / 2], u64 a, u64 b)     the same without adding, in 16 bits: sum need have no registers before
template <typename Input, int N, bool A_MN = false, bool B_MN = false>
struct Product;

#define NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define NAMES_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define NAMES_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define NAMES_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define NAMES_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define NAMES_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SUMS_4(HOW, i) HOW(sum[i]), HOW(sum[i + 1]), HOW(sum[i + 2]), HOW(sum[i + 3])
#define SUMS_16(HOW, i) SUMS_4(HOW, i), SUMS_4(HOW, i + 4), SUMS_4(HOW, i + 8), SUMS_4(HOW, i + 12)

#define NAMES_OF_64 NAMES_0 ", " NAMES_1
#define NAMES_OF_128 NAMES_OF_64 ", " NAMES_2 ", " NAMES_3
#define NAMES_OF_256 NAMES_OF_128 ", " NAMES_4 ", " NAMES_5 ", " NAMES_6 ", " NAMES_7
#define SUMS_OF_64(HOW) SUMS_16(HOW, 0), SUMS_16(HOW, 16)
#define SUMS_OF_128(HOW) SUMS_OF_64(HOW), SUMS_16(HOW, 32), SUMS_16(HOW, 48)
#define SUMS_OF_256(HOW) SUMS_OF_128(HOW), SUMS_16(HOW, 64), SUMS_16(HOW, 80), SUMS_16(HOW, 96), SUMS_16(HOW, 112)
#define READ_AND_WRITTEN(value) "+f"(value)
#define WRITTEN(value) "=f"(value)

#define MULTIPLY(SHAPE, TYPES, NAMES, A, B, ADD, TAIL)                          \
    "{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                        \
    "wgmma.mma_async.sync.aligned." SHAPE ".f32." TYPES " {" NAMES "}, " A ", " B ", add, " TAIL ";\n}"

#define PRODUCT_8(N, A, B, ADD)                                                                              \
    template <>                                                                                              \
    struct Product<Fp8, N, false, false> {                                                                   \
        static __device__ __forceinline__ void run(float (&sum)[N / 2], u64 a, u64 b, i32 accumulate) {      \
            asm volatile(MULTIPLY("m64n" #N "k32", "e4m3.e4m3", NAMES_OF_##N, A, B, ADD, "1, 1")             \
                         : SUMS_OF_##N(READ_AND_WRITTEN)                                                     \
                         : "l"(a), "l"(b), "r"(accumulate));                                                 \
        }                                                                                                    \
    };

#define PRODUCT_16(INPUT, TYPES, N, A, B, ADD, A_MAJOR, B_MAJOR)                                             \
    template <bool A_MN, bool B_MN>                                                                          \
    struct Product<INPUT, N, A_MN, B_MN> {                                                                   \
        static __device__ __forceinline__ void run(float (&sum)[N / 2], u64 a, u64 b, i32 accumulate) {      \
            asm volatile(                                                                                    \
                MULTIPLY("m64n" #N "k16", TYPES, NAMES_OF_##N, A, B, ADD, "1, 1, " A_MAJOR ", " B_MAJOR)     \
                : SUMS_OF_##N(READ_AND_WRITTEN)                                                              \
                : "l"(a), "l"(b), "r"(accumulate), "n"(A_MN), "n"(B_MN));                                    \
        }                                                                                                    \
        static __device__ __forceinline__ void begin(float (&sum)[N / 2], u64 a, u64 b) {                    \
            asm volatile(                                                                                    \
                MULTIPLY("m64n" #N "k16", TYPES, NAMES_OF_##N, A, B, "0", "1, 1, " ADD ", " A_MAJOR)         \
                : SUMS_OF_##N(WRITTEN)                                                                       \
                : "l"(a), "l"(b), "n"(A_MN), "n"(B_MN));                                                     \
        }                                                                                                    \
    };

#define PRODUCTS(N, A, B, ADD, A_MAJOR, B_MAJOR)                          \
    PRODUCT_8(N, A, B, ADD)                                               \
    PRODUCT_16(Bf16, "bf16.bf16", N, A, B, ADD, A_MAJOR, B_MAJOR)         \
    PRODUCT_16(Fp16, "f16.f16", N, A, B, ADD, A_MAJOR, B_MAJOR)

PRODUCTS(64, "%32", "%33", "%34", "%35", "%36")
PRODUCTS(128, "%64", "%65", "%66", "%67", "%68")
PRODUCTS(256, "%128", "%129", "%130", "%131", "%132")

}  // namespace wgmma
