// A tile of 128 x 128 bytes, turned by 256 threads: what is there as rows leaves as lines, one for each column.
//
// A thread has eight columns of eight rows, so that half a warp has eight whole rows, and a lane looks after one of these:
//
//     columns 8 c + 0 .. 7           c the lane, of 16
//     rows    8 h + 0 .. 7           h the half warp, of 16
//     row     8 h + lane % 8         the lane's own, where something is worked out once for each row
//
// Turned, a column's eight bytes lie together: eight bytes are the smallest part of a line that is written at once.
#pragma once
#include "fp8.cuh"

namespace tile {

constexpr i32 THREADS = 256, WARPS = THREADS / 32, OWN = 8, SIZE = fp8::BLOCK;

__device__ __forceinline__ i32 first_column() { return threadIdx.x % 16 * OWN; }
__device__ __forceinline__ i32 first_row() { return threadIdx.x / 16 * OWN; }
__device__ __forceinline__ i32 own_row() { return first_row() + threadIdx.x % OWN; }

// Of row i of a thread, what the lane that looks after it has.
template <typename Value>
__device__ __forceinline__ Value of_row(Value value, i32 i) {
    return __shfl_sync(~0u, value, i, OWN);
}

// Where the eights of bytes of a line lie: swizzled, so that lanes with other columns meet other banks.
__device__ __forceinline__ u32 swizzle(i32 line) { return line / OWN % 16; }

// Four words of four bytes each: byte j of words 0 to 3 becomes word j.
__device__ __forceinline__ void turn_4x4(const u32 (&rows)[4], u32 (&columns)[4]) {
    u32 low01 = __byte_perm(rows[0], rows[1], 0x5140), high01 = __byte_perm(rows[0], rows[1], 0x7362);
    u32 low23 = __byte_perm(rows[2], rows[3], 0x5140), high23 = __byte_perm(rows[2], rows[3], 0x7362);
    columns[0] = __byte_perm(low01, low23, 0x5410), columns[1] = __byte_perm(low01, low23, 0x7632);
    columns[2] = __byte_perm(high01, high23, 0x5410), columns[3] = __byte_perm(high01, high23, 0x7632);
}

// A thread's bytes into the turned tile; rows[i] are eight columns of row i.
__device__ __forceinline__ void put(u8* turned, const uint2 (&rows)[OWN]) {
    u8* place = turned + first_column() * SIZE + (threadIdx.x / 16 ^ swizzle(first_column())) * OWN;
#pragma unroll
    for (i32 half = 0; half < 2; half++) {
        u32 upper[4], lower[4], first[4], second[4];
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            upper[i] = half ? rows[i].y : rows[i].x;
            lower[i] = half ? rows[4 + i].y : rows[4 + i].x;
        }
        turn_4x4(upper, first), turn_4x4(lower, second);
#pragma unroll
        for (i32 j = 0; j < 4; j++)
            *reinterpret_cast<uint2*>(place + (4 * half + j) * SIZE) = make_uint2(first[j], second[j]);
    }
}

// The first `lines` lines of a turned tile to global memory.
__device__ __forceinline__ void write(const u8* turned, u8* to, i64 pitch, i32 lines) {
#pragma unroll
    for (i32 i = 0; i < SIZE * SIZE / 16 / THREADS; i++) {
        i32 line = threadIdx.x / 8 + i * THREADS / 8, sixteen = threadIdx.x % 8;
        if (line >= lines) break;
        u32 swizzled = swizzle(line);
        uint4 found = *reinterpret_cast<const uint4*>(turned + line * SIZE + (sixteen ^ swizzled / 2) * 16);
        if (swizzled % 2) found = make_uint4(found.z, found.w, found.x, found.y);
        *reinterpret_cast<uint4*>(to + line * pitch + sixteen * 16) = found;
    }
}

}  // namespace tile
