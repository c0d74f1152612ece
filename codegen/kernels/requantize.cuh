// A tile of quantised rows, each with a scale, quantised once more: a power of two for each column and 128 rows.
//
// In fp16, two numbers at a time, where that loses nothing. An e4m3 number, a multiple of 2^-9 and at most 448, is brought
// to the largest scale of the tile,
//
//     product = value * (scale / largest * 2^7)                at most 57344
//     result  = product * (largest / 2^7 / scale of the column)
//
// both by powers of two, which are normal numbers of fp16 from 2^-14 to 2^15; products are multiples of 2^-23 then, which
// fp16 has. Results that are too small for it round to zero in e4m3, too. So this gives the bits of float32, if
//
//     scales are powers of two (or 0, of rows that are not there), not infinite,
//     rows whose scales lie further below the largest than 2^-21 are zero,
//     columns whose scales lie further below it than 2^-22 are zero,
//     no column's largest number is infinite in float32.
//
// Other tiles take float32: all whose scales are no powers of two, and few others.
#pragma once
#include "tile.cuh"

namespace requantize {

using tile::OWN;

constexpr u32 FARTHEST = 21;                // of scales of rows from the largest, as exponents
constexpr i32 UNIT = 7, BIAS = 15;          // of products; of fp16's exponents
constexpr u32 INFINITE_FP16 = 0x7c007c00;

struct Shared {
    u8 turned[tile::SIZE * tile::SIZE];
    float scales[tile::SIZE];             // of rows
    u16 most[tile::WARPS][tile::SIZE];    // products in a column, of 16 rows
};

// Four columns of the eight that a thread has: these are worked out once for both halves of a warp.
__device__ __forceinline__ i32 own_columns() { return tile::first_column() + threadIdx.x / 16 % 2 * 4; }

// Whether all scales are ones that fp16 can do, and the largest, as bits: the same in all threads.
__device__ __forceinline__ bool are_powers(const float* scales, u32& largest) {
    uint4 four = reinterpret_cast<const uint4*>(scales)[threadIdx.x % 32];
    largest = __reduce_max_sync(~0u, max(max(four.x, four.y), max(four.z, four.w)));
    u32 mantissas = __reduce_or_sync(~0u, (four.x | four.y | four.z | four.w) & 0x807fffff);
    return mantissas == 0 && largest < 0x7f800000;
}

// A row's factor, for products of two numbers; 0 for rows that lie too far below the largest. `own` is its scale's bits.
__device__ __forceinline__ u32 factor_of(u32 own, u32 largest) {
    u32 distance = (largest - own) >> 23, factor = (BIAS + UNIT - distance) << 10;
    return distance > FARTHEST || own == 0 ? 0 : factor | factor << 16;
}

// Whether this thread has numbers in rows whose factor is 0.
__device__ __forceinline__ bool loses(const uint2 (&rows)[OWN], u32 factor) {
    u32 lost = 0;
#pragma unroll
    for (i32 i = 0; i < OWN; i++)
        if (tile::of_row(factor, i) == 0) lost |= rows[i].x | rows[i].y;
    return lost & 0x7f7f7f7f;
}

// The largest products of four columns, own_columns(), in all rows; `most` are those of a thread's eight in its own.
__device__ __forceinline__ uint2 largest_of_columns(Shared& shared, u32 (&most)[4]) {
#pragma unroll
    for (i32 pair = 0; pair < 4; pair++)
        most[pair] = ptx::farther_fp16(most[pair], __shfl_xor_sync(~0u, most[pair], 16)) & 0x7fff7fff;
    if (threadIdx.x % 32 < 16)
        *reinterpret_cast<uint4*>(&shared.most[threadIdx.x / 32][tile::first_column()]) =
            make_uint4(most[0], most[1], most[2], most[3]);
    __syncthreads();
    uint2 found = make_uint2(0, 0);
#pragma unroll
    for (i32 warp = 0; warp < tile::WARPS; warp++) {
        uint2 theirs = *reinterpret_cast<const uint2*>(&shared.most[warp][own_columns()]);
        found.x = ptx::larger_fp16(found.x, theirs.x), found.y = ptx::larger_fp16(found.y, theirs.y);
    }
    return found;
}

// The factors of a thread's eight columns, from four exponents in each half of a warp.
__device__ __forceinline__ void factors_of_columns(const i32 (&exponents)[4], u32 (&factors)[4]) {
    u32 halves[4];
#pragma unroll
    for (i32 j = 0; j < 4; j++) halves[j] = u32(min(exponents[j], BIAS) + BIAS) << 10;
    u32 low = halves[0] | halves[1] << 16, high = halves[2] | halves[3] << 16;
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        i32 lane = threadIdx.x % 16 + 16 * half;
        factors[2 * half] = __shfl_sync(~0u, low, lane), factors[2 * half + 1] = __shfl_sync(~0u, high, lane);
    }
}

// The tile's columns in fp16; false, in all threads, if it takes float32.
__device__ __forceinline__ bool in_fp16(Shared& shared, const uint2 (&rows)[OWN], u32 largest, fp8::Scale (&scales)[4]) {
    u32 factor = factor_of(__float_as_uint(shared.scales[tile::own_row()]), largest);
    u32 products[OWN][4], most[4] = {}, factors[4];
    if (__any_sync(~0u, factor == 0) && loses(rows, factor)) most[0] = INFINITE_FP16;  // which nothing else becomes
#pragma unroll
    for (i32 i = 0; i < OWN; i++) {
        u32 of_row = tile::of_row(factor, i), wide[4];
        ptx::widen_e4m3(rows[i].x, wide[0], wide[1]), ptx::widen_e4m3(rows[i].y, wide[2], wide[3]);
#pragma unroll
        for (i32 pair = 0; pair < 4; pair++) {
            products[i][pair] = ptx::multiply_fp16(wide[pair], of_row);
            most[pair] = ptx::farther_fp16(most[pair], products[i][pair]);
        }
    }
    uint2 found = largest_of_columns(shared, most);
    float amax[4], unit = __uint_as_float(largest) * 0x1p-7f;
    ptx::unpack_fp16(found.x, amax[0], amax[1]), ptx::unpack_fp16(found.y, amax[2], amax[3]);
    i32 exponents[4];
    bool beyond = false;
#pragma unroll
    for (i32 j = 0; j < 4; j++) {
        scales[j] = fp8::PowerOfTwo::of(amax[j] * unit);
        exponents[j] = (i32(largest - __float_as_uint(scales[j].value)) >> 23) - UNIT;
        beyond |= amax[j] > 65504 || scales[j].inverse == 0 || (exponents[j] > BIAS && amax[j] > 0);
    }
    if (__any_sync(~0u, beyond)) return false;
    factors_of_columns(exponents, factors);
    uint2 narrow[OWN];
#pragma unroll
    for (i32 i = 0; i < OWN; i++) {
        u32 results[4];
#pragma unroll
        for (i32 pair = 0; pair < 4; pair++) results[pair] = ptx::multiply_fp16(products[i][pair], factors[pair]);
        narrow[i] = make_uint2(ptx::narrow_e4m3(results[0], results[1]), ptx::narrow_e4m3(results[2], results[3]));
    }
    tile::put(shared.turned, narrow);
    return true;
}

// The tile's columns in float32, row by row, which needs few registers.
__device__ __forceinline__ void in_float32(Shared& shared, const uint2 (&rows)[OWN], fp8::Scale (&scales)[4]) {
    auto& most = reinterpret_cast<u32(&)[tile::SIZE]>(shared.most);  // magnitudes, whose bits are ordered
    auto& kept = reinterpret_cast<uint2(&)[OWN][tile::THREADS]>(shared.turned);
#pragma unroll
    for (i32 i = 0; i < OWN; i++) kept[i][threadIdx.x] = rows[i];
    __syncthreads();  // nobody reads maxima of products any more
    if (threadIdx.x < tile::SIZE) most[threadIdx.x] = 0;
    __syncthreads();
    auto values = [&](i32 i, float (&v)[OWN]) {
        uint2 row = kept[i][threadIdx.x];
        float scale = shared.scales[tile::first_row() + i];
        ptx::unpack_e4m3(row.x, v[0], v[1]), ptx::unpack_e4m3(row.x >> 16, v[2], v[3]);
        ptx::unpack_e4m3(row.y, v[4], v[5]), ptx::unpack_e4m3(row.y >> 16, v[6], v[7]);
#pragma unroll
        for (i32 j = 0; j < OWN; j++) v[j] *= scale;
    };
    float own[OWN] = {}, inverses[OWN];
#pragma unroll 1
    for (i32 i = 0; i < OWN; i++) {
        float v[OWN];
        values(i, v);
#pragma unroll
        for (i32 j = 0; j < OWN; j++) own[j] = fmaxf(own[j], fabsf(v[j]));
    }
#pragma unroll
    for (i32 j = 0; j < OWN; j++) atomicMax(&most[tile::first_column() + j], __float_as_uint(own[j]));
    __syncthreads();
#pragma unroll
    for (i32 j = 0; j < OWN; j++)
        inverses[j] = fp8::PowerOfTwo::of(__uint_as_float(most[tile::first_column() + j])).inverse;
#pragma unroll
    for (i32 j = 0; j < 4; j++) scales[j] = fp8::PowerOfTwo::of(__uint_as_float(most[own_columns() + j]));
#pragma unroll 1
    for (i32 i = 0; i < OWN; i++) {
        float v[OWN];
        u16 pairs[4];
        values(i, v);
#pragma unroll
        for (i32 pair = 0; pair < 4; pair++)
            pairs[pair] = ptx::pack_e4m3(v[2 * pair] * inverses[2 * pair], v[2 * pair + 1] * inverses[2 * pair + 1]);
        kept[i][threadIdx.x] = make_uint2(pairs[0] | u32(pairs[1]) << 16, pairs[2] | u32(pairs[3]) << 16);
    }
    uint2 narrow[OWN];
#pragma unroll
    for (i32 i = 0; i < OWN; i++) narrow[i] = kept[i][threadIdx.x];
    __syncthreads();
    tile::put(shared.turned, narrow);
}

// Quantises a tile's columns into shared.turned; shared.scales are those of its rows. `scales` become those of
// own_columns(), in every warp. `again(rows)` finds the rows once more: few tiles want them twice, so nobody holds them.
template <typename Again>
__device__ __forceinline__ void columns(Shared& shared, uint2 (&rows)[OWN], Again again, fp8::Scale (&scales)[4]) {
    u32 largest;
    if (are_powers(shared.scales, largest)) {
        if (in_fp16(shared, rows, largest, scales)) return;
        again(rows);
    }
    in_float32(shared, rows, scales);
}

// Writes the scales of the first `lines` columns, `step` apart.
__device__ __forceinline__ void write_scales(const fp8::Scale (&scales)[4], float* out, i32 step, i32 lines) {
    i32 column = own_columns();
#pragma unroll
    for (i32 j = 0; j < 4; j++)
        if (threadIdx.x < 32 && column + j < lines) out[(column + j) * step] = scales[j].value;
}

}  // namespace requantize
