// e4m3 numbers with a scale for each block (DeepSeek-V3, section 3.3.2; moecompile/runtime/quantize.py is the same in
// PyTorch, bit for bit).
//
// A box of 16 rows of 128 e4m3 numbers has the bytes of a box of 16 x 64 numbers of 16 bits, and travels as one (box.cuh):
// what is said there of columns is half of what is said here.
#pragma once
#include "box.cuh"

namespace fp8 {

constexpr i32 BLOCK = 128;  // columns, or rows and columns, that share a scale

struct Scale {
    float value, inverse;
};

// The two formats of scales. A block that is infinite has an infinite scale: what it holds becomes NaN, and is seen.

// The smallest power of two that brings amax to at most 448 = 1.75 * 2^8.
struct PowerOfTwo {
    static constexpr bool EXACT = true;  // what is multiplied by it, or by its inverse, loses nothing
    static __device__ __forceinline__ Scale of(float amax) {
        u32 bits = __float_as_uint(amax);
        i32 exponent = max(i32(bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000), 1);
        bool infinite = bits == 0x7f800000;
        return {infinite ? amax : __uint_as_float(exponent << 23), infinite ? 0 : __uint_as_float((254 - exponent) << 23)};
    }
};

// amax / 448, and its inverse, each rounded to the nearest; not below the smallest of the other format.
struct Float32 {
    static constexpr bool EXACT = false;
    static __device__ __forceinline__ Scale of(float amax) {
        float scale = fmaxf(__fdiv_rn(amax, 448), 0x1p-126f);
        return {scale, __frcp_rn(scale)};
    }
};

// A thread's part of a row in e4m3, pairs of neighbouring columns; BLOCK / (2 PAIRS) threads of a warp share the scale.
template <typename Input, typename Scales, i32 PAIRS>
__device__ __forceinline__ Scale quantize(const u32 (&pairs)[PAIRS], u16 (&narrow)[PAIRS]) {
    u32 most = 0;
#pragma unroll
    for (i32 i = 0; i < PAIRS; i++) most = Input::larger(most, pairs[i] & 0x7fff7fff);
#pragma unroll
    for (i32 other = 1; other < BLOCK / (2 * PAIRS); other *= 2) most = Input::larger(most, __shfl_xor_sync(~0u, most, other));
    float low, high;
    Input::unpack(most, low, high);
    Scale scale = Scales::of(fmaxf(low, high));
#pragma unroll
    for (i32 i = 0; i < PAIRS; i++) {
        Input::unpack(pairs[i], low, high);
        narrow[i] = ptx::pack_e4m3(low * scale.inverse, high * scale.inverse);
    }
    return scale;
}

// 1 / scale, for a scale that is a power of two or infinite.
__device__ __forceinline__ float inverse_of(float scale) {
    u32 bits = __float_as_uint(scale);
    return bits == 0x7f800000 ? 0 : __uint_as_float((254 << 23) - bits);
}

// The smallest power of two that is not below a scale; an infinite one is.
__device__ __forceinline__ float power_above(float scale) {
    u32 bits = __float_as_uint(scale);
    return __uint_as_float((bits + 0x7fffff) & ~0x7fffffu);
}

// ---- a lane's part of 16 rows of 128 columns, as matrix products leave it: pairs of neighbouring columns
//
//     pairs[2 g]       row lane / 4,      columns 8 g + 2 (lane % 4) + 0, 1
//     pairs[2 g + 1]   row lane / 4 + 8,  the same columns

constexpr i32 PAIRS = 32;

// Zeros for columns from `count` on.
__device__ __forceinline__ void clear_from(u32 (&pairs)[PAIRS], i32 count) {
    i32 own = threadIdx.x % 4 * 2;
#pragma unroll
    for (i32 i = 0; i < PAIRS; i++)
        if (i / 2 * 8 + own >= count) pairs[i] = 0;
}

// The scales of both rows, the same in the four lanes that hold a row.
template <typename Value, typename Scales>
__device__ __forceinline__ void scales_of(const u32 (&pairs)[PAIRS], Scale (&scales)[2]) {
#pragma unroll
    for (i32 row = 0; row < 2; row++) {
        u32 most = 0;
#pragma unroll
        for (i32 g = 0; g < PAIRS / 2; g++) most = Value::larger(most, pairs[2 * g + row] & 0x7fff7fff);
        most = Value::larger(most, __shfl_xor_sync(~0u, most, 1));
        most = Value::larger(most, __shfl_xor_sync(~0u, most, 2));
        float low, high;
        Value::unpack(most, low, high);
        scales[row] = Scales::of(fmaxf(low, high));
    }
}

// A lane's pairs in a box of 16 rows of 128 bytes: what box::at says, with one operation for each 16 columns.
struct Pairs {
    u32 first;
    __device__ __forceinline__ explicit Pairs(const u8* staged) {
        u32 lane = threadIdx.x % 32;
        first = ptx::shared_address(staged) + box::at(lane / 4, 0) + lane % 4 * 2;
    }
    __device__ __forceinline__ u32 at(i32 i) const { return (first ^ i / 4 * 16) + i / 2 % 2 * 8 + i % 2 * 8 * box::LINE; }
    __device__ __forceinline__ u16 get(i32 i) const { return ptx::load_shared(at(i)); }
    __device__ __forceinline__ void put(i32 i, u16 pair) const { ptx::store_shared(at(i), pair); }
};

// Quantises 16 rows of 128 columns, of which the first is `column`, into a box, and sends it and its scales on their way.
template <typename Value, typename Scales>
__device__ __forceinline__ void send(u8* staged, const u32 (&pairs)[PAIRS], const Target& target, float* scales, i32 pitch,
                                     const box::Place& place, i32 column) {
    Scale found[2];
    scales_of<Value, Scales>(pairs, found);
    Pairs narrow(staged);
#pragma unroll
    for (i32 i = 0; i < PAIRS; i++) {
        float low, high;
        Value::unpack(pairs[i], low, high);
        float inverse = found[i % 2].inverse;
        narrow.put(i, ptx::pack_e4m3(low * inverse, high * inverse));
    }
    box::send(staged, target, place, column / 2);
    if (threadIdx.x % 4 == 0 && column / 2 < target.columns) {
        float* block = scales + i64(column / BLOCK) * pitch;
        i32 row = place.upper();
        if (row < place.end) block[row] = found[0].value;
        if (row + 8 < place.end) block[row + 8] = found[1].value;
    }
}

}  // namespace fp8
