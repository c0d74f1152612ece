// 16 rows of 64 columns on their way between a warp's registers and a tensor, through shared memory of the warp's own.
//
// A box lies in shared memory in the 128-byte swizzle of bulk copies. In registers it is what a matrix product leaves:
// of each 16 columns a lane holds two neighbouring ones, and two that are 8 further, in rows lane / 4 and lane / 4 + 8:
//
//     v[8 i + 0, 1]   row lane / 4,      columns 16 i + 2 (lane % 4) + 0, 1       v[8 i + 4, 5]   8 columns further
//     v[8 i + 2, 3]   row lane / 4 + 8,  the same columns                         v[8 i + 6, 7]   8 columns further
#pragma once
#include "ptx.cuh"

// A matrix in global memory that boxes are written to.
struct Target {
    TensorMap map;       // boxes of 16 x 64
    u16* rows;           // its first element, for rows that no bulk copy may write
    i32 columns, pitch;  // how many are written; from one row to the next
};

namespace box {

constexpr i32 ROWS = 16, COLUMNS = 64, LINE = 128, BYTES = ROWS * LINE, VALUES = 32;  // VALUES of each lane

// Where a warp's rows lie, and which of them it may write.
struct Place {
    i32 row, end;
    __device__ __forceinline__ bool whole() const { return row + ROWS <= end; }
    __device__ __forceinline__ i32 upper() const { return row + threadIdx.x % 32 / 4; }
};

// The place of 16 bytes, 8 columns, in a box.
__device__ __forceinline__ u32 at(u32 row, u32 eight) { return row * LINE + (eight ^ row % 8) * 16; }

// Until the memory of all but the last PENDING boxes may be written again.
template <i32 PENDING>
__device__ __forceinline__ void acquire() {
    if (threadIdx.x % 32 == 0) ptx::store_wait_read<PENDING>();
    __syncwarp();
}

// A box's values, or those of its first columns, as its tensor will have them: pairs of neighbouring columns.
template <typename Input, i32 COUNT = VALUES>
__device__ __forceinline__ void pack(const float* v, u32* packed) {
#pragma unroll
    for (i32 i = 0; i < COUNT / 2; i++) packed[i] = Input::pack(v[2 * i], v[2 * i + 1]);
}

// The i'th sixteen columns of a box.
__device__ __forceinline__ void put_sixteen(u8* staged, i32 i, u32 a, u32 b, u32 c, u32 d) {
    u32 lane = threadIdx.x % 32;
    ptx::store_matrix_x4(ptx::shared_address(staged) + at(lane % 16, i * 2 + lane / 16), a, b, c, d);
}

template <i32 COUNT = VALUES>
__device__ __forceinline__ void put(u8* staged, const u32* packed) {
#pragma unroll
    for (i32 i = 0; i < COUNT / 8; i++)
        put_sixteen(staged, i, packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
}

// The box transposed: 64 lines of 16 values, one after the other.
__device__ __forceinline__ void put_turned(u8* staged, const u32* packed) {
    u32 lane = threadIdx.x % 32, line = lane / 16 * 8 + lane % 8, half = lane / 8 % 2;
#pragma unroll
    for (i32 i = 0; i < 4; i++)
        ptx::store_matrix_x4_turned(ptx::shared_address(staged) + (16 * i + line) * 2 * ROWS + half * 16, packed[4 * i],
                                    packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
}

__device__ __forceinline__ void take_sixteen(const u8* staged, i32 i, u32 (&packed)[4]) {
    u32 lane = threadIdx.x % 32;
    ptx::load_matrix_x4(ptx::shared_address(staged) + at(lane % 16, i * 2 + lane / 16), packed);
}

// Until what this warp has put into boxes may be sent.
__device__ __forceinline__ void publish() {
    ptx::fence_async_proxy();
    __syncwarp();
}

// Writes those rows of a box that may be, or the first EIGHTS columns by eight of them, to the columns from x on, eight and
// eight APART; by all lanes.
template <i32 EIGHTS = COLUMNS / 8, i32 APART = 8>
__device__ __forceinline__ void write(const u8* staged, const Target& target, const Place& place, i32 x, i32 offset = 0) {
    for (i32 first = 0; first < ROWS * EIGHTS; first += 32) {
        i32 i = first + i32(threadIdx.x % 32);
        i32 row = i / EIGHTS, column = x + i % EIGHTS * APART;
        if (place.row + row < place.end && column < target.columns)
            *reinterpret_cast<uint4*>(target.rows + i64(offset + place.row + row) * target.pitch + column) =
                *reinterpret_cast<const uint4*>(staged + at(row, i % EIGHTS));
    }
}

// Writes a published box to the columns from x on; `offset` is added to its rows. No early return: the compiler must see
// that all lanes come out together, or it keeps everything that follows out of uniform registers.
__device__ __forceinline__ void send_published(const u8* staged, const Target& target, const Place& place, i32 x,
                                               i32 offset = 0) {
    u32 lane = threadIdx.x % 32;
    bool whole = place.whole();
    if (!whole) write(staged, target, place, x, offset);  // rows of the next expert follow: only our own
    if (lane == 0) {
        if (whole && x < target.columns) ptx::store_2d(&target.map, staged, x, offset + place.row);
        ptx::store_commit();  // an empty group where there was nothing to copy: boxes are waited for by their number
    }
}

__device__ __forceinline__ void send(const u8* staged, const Target& target, const Place& place, i32 x, i32 offset = 0) {
    publish();
    send_published(staged, target, place, x, offset);
}

// Of columns' values, 4 in each lane for 8 of them, those rows that may be written, at once and without a bulk copy.
template <i32 COUNT, i32 APART>
__device__ __forceinline__ void write_now(u8* staged, const Target& target, const Place& place, i32 x, const u32* packed) {
    __syncwarp();
    put<COUNT>(staged, packed);
    __syncwarp();
    write<COUNT / 4, APART>(staged, target, place, x);
}

}  // namespace box
