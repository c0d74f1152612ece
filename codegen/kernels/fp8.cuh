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

// ---- a tile of 128 x 128 bytes in shared memory, by 256 threads

constexpr i32 TILE_THREADS = 256;

// Four words of four bytes each: byte j of words 0 to 3 becomes word j.
__device__ __forceinline__ void transpose_4x4(const u32 (&rows)[4], u32 (&columns)[4]) {
    u32 low01 = __byte_perm(rows[0], rows[1], 0x5140), high01 = __byte_perm(rows[0], rows[1], 0x7362);
    u32 low23 = __byte_perm(rows[2], rows[3], 0x5140), high23 = __byte_perm(rows[2], rows[3], 0x7362);
    columns[0] = __byte_perm(low01, low23, 0x5410), columns[1] = __byte_perm(low01, low23, 0x7632);
    columns[2] = __byte_perm(high01, high23, 0x5410), columns[3] = __byte_perm(high01, high23, 0x7632);
}

// Where 16 bytes of a transposed tile lie: swizzled, so that lanes four lines apart meet different banks.
__device__ __forceinline__ u32 transposed_at(i32 line, i32 sixteen) { return line * BLOCK + (sixteen ^ line / 4 % 8) * 16; }

// The bytes of rows 16 w to 16 w + 15 (w the warp), columns 4 lane to 4 lane + 3, into the transposed tile.
__device__ __forceinline__ void put_transposed(u8* tile, const u32 (&words)[16]) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, columns[4][4];
#pragma unroll
    for (i32 four = 0; four < 4; four++) {
        u32 rows[4] = {words[4 * four], words[4 * four + 1], words[4 * four + 2], words[4 * four + 3]}, turned[4];
        transpose_4x4(rows, turned);
#pragma unroll
        for (i32 j = 0; j < 4; j++) columns[j][four] = turned[j];
    }
#pragma unroll
    for (i32 j = 0; j < 4; j++)
        *reinterpret_cast<uint4*>(tile + transposed_at(4 * lane + j, warp)) =
            make_uint4(columns[j][0], columns[j][1], columns[j][2], columns[j][3]);
}

// The first `lines` lines of a transposed tile to global memory.
__device__ __forceinline__ void write_transposed(const u8* tile, u8* to, i64 pitch, i32 lines) {
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        i32 line = threadIdx.x / 8 + 32 * i, sixteen = threadIdx.x % 8;
        if (line < lines)
            *reinterpret_cast<uint4*>(to + line * pitch + sixteen * 16) =
                *reinterpret_cast<const uint4*>(tile + transposed_at(line, sixteen));
    }
}

// Of a tile of rows, this thread's four columns in its i-th of sixteen rows.
__device__ __forceinline__ u32 word_of(const u8* tile, i32 i) {
    return *reinterpret_cast<const u32*>(tile + (threadIdx.x / 32 * 16 + i) * BLOCK + threadIdx.x % 32 * 4);
}

// Quantises a tile of rows, each with a scale, once more, with a power of two for each column, into the transposed tile. `shared` has
// both tiles, the rows' scales, and room for the largest number that each warp finds in a column.
//
// `scales` become those of columns 4 lane to 4 lane + 3, in every warp.
template <typename Shared>
__device__ __forceinline__ void requantize_columns(Shared& shared, Scale (&scales)[4]) {
    i32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    auto values = [&](i32 i, float (&v)[4]) {
        u32 found = word_of(shared.tile, i);
        float scale = shared.scales[warp * 16 + i];
        ptx::unpack_e4m3(found & 0xffff, v[0], v[1]);
        ptx::unpack_e4m3(found >> 16, v[2], v[3]);
#pragma unroll
        for (i32 j = 0; j < 4; j++) v[j] *= scale;
    };
    float most[4] = {};
#pragma unroll
    for (i32 i = 0; i < 16; i++) {
        float v[4];
        values(i, v);
#pragma unroll
        for (i32 j = 0; j < 4; j++) most[j] = fmaxf(most[j], fabsf(v[j]));
    }
    *reinterpret_cast<float4*>(&shared.most[warp][4 * lane]) = make_float4(most[0], most[1], most[2], most[3]);
    __syncthreads();
#pragma unroll
    for (i32 j = 0; j < 4; j++) most[j] = 0;
#pragma unroll
    for (i32 other = 0; other < TILE_THREADS / 32; other++) {
        float4 theirs = *reinterpret_cast<const float4*>(&shared.most[other][4 * lane]);
        most[0] = fmaxf(most[0], theirs.x), most[1] = fmaxf(most[1], theirs.y);
        most[2] = fmaxf(most[2], theirs.z), most[3] = fmaxf(most[3], theirs.w);
    }
#pragma unroll
    for (i32 j = 0; j < 4; j++) scales[j] = PowerOfTwo::of(most[j]);
    u32 words[16];
#pragma unroll
    for (i32 i = 0; i < 16; i++) {
        float v[4];
        values(i, v);
        u16 low = ptx::pack_e4m3(v[0] * scales[0].inverse, v[1] * scales[1].inverse);
        u16 high = ptx::pack_e4m3(v[2] * scales[2].inverse, v[3] * scales[3].inverse);
        words[i] = low | u32(high) << 16;
    }
    put_transposed(shared.turned, words);
}

}  // namespace fp8
