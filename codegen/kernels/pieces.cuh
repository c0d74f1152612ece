// Rows that are summed by a warp, read ahead in pieces.
#pragma once
#include "result.cuh"

namespace nodes {

// A ring of pieces in shared memory: taken in the order in which they were asked for.
struct Pieces {
    static constexpr i32 BYTES = 2048, MOST = 24;  // of a piece; pieces
    u8* memory;
    u64* full;
    i32 places, next = 0, oldest = 0, held = 0;
    u32 parity = 0;  // a bit for each place

    // In so many bytes. Barriers are to be MOST.
    __device__ __forceinline__ Pieces(u8* memory, i32 bytes, u64* full)
        : memory(memory), full(full), places(min(MOST, bytes / BYTES)) {
        if (threadIdx.x % 32 < places) ptx::barrier_init(full + threadIdx.x % 32, 1);
        ptx::barrier_init_fence();
        __syncwarp();
    }
    __device__ __forceinline__ i32 wrapped(i32 place) const { return place < places ? place : place - places; }
    __device__ __forceinline__ bool has_room(i32 pieces) const { return held + pieces <= places; }

    // By a warp: begins to read a piece for each lane that has one, in their order. There is to be room.
    __device__ __forceinline__ void read(bool active, const u8* from, u32 bytes) {
        u32 lanes = __ballot_sync(~0u, active);
        i32 place = wrapped(next + __popc(lanes & ((1u << threadIdx.x % 32) - 1)));
        if (active) {
            ptx::barrier_expect(full + place, bytes);
            ptx::load_bytes_once(memory + place * BYTES, from, bytes, full + place);
        }
        next = wrapped(next + __popc(lanes)), held += __popc(lanes);
    }

    // By a warp: of as many pieces the sum, in float32 in their order, rounded once; `bytes` of it.
    template <typename Result>
    __device__ __forceinline__ void reduce(i32 pieces, u8* to, i32 bytes) {
        constexpr i32 STEP = 512;  // of a warp
        float total[BYTES / STEP][Result::NUMBERS] = {};
        i32 at = 16 * (threadIdx.x % 32);
        for (i32 i = 0; i < pieces; i++) {
            ptx::barrier_wait(full + oldest, parity >> oldest & 1);
#pragma unroll
            for (i32 step = 0; step < BYTES / STEP; step++) {  // behind the last byte is what nobody will see
                float v[Result::NUMBERS];
                Result::unpack(*reinterpret_cast<const uint4*>(memory + oldest * BYTES + step * STEP + at), v);
#pragma unroll
                for (i32 j = 0; j < Result::NUMBERS; j++) total[step][j] += v[j];
            }
            parity ^= 1u << oldest;
            oldest = wrapped(oldest + 1);
        }
        __syncwarp();  // what all have read may be overwritten
        held -= pieces;
#pragma unroll
        for (i32 step = 0; step < BYTES / STEP; step++)
            if (step * STEP + at < bytes) *reinterpret_cast<uint4*>(to + step * STEP + at) = Result::pack(total[step]);
    }
};

}  // namespace nodes
