// Numbers of tiles, taken by whoever is free: for kernels some of whose blocks begin late, since another kernel still has their
// multiprocessors. With numbers that are given beforehand, all would wait for these in the end.
//
// The blocks of a cluster work on one number together: its first block takes it and writes it into the other's memory.
#pragma once
#include "ptx.cuh"

template <bool TAKEN, i32 CLUSTER, i32 STAGES>
struct Tickets {
    // A block runs ahead of its cluster's other by a ring of stages at most, and a tile has one at least.
    static constexpr i32 HELD = TAKEN ? 8 : 1;
    static_assert(!TAKEN || STAGES < HELD && CLUSTER <= 2, "or a number is written over before it is read");
    struct Shared {
        u64 told[HELD];
        i32 numbers[HELD];
    };

    // By one thread.
    static __device__ __forceinline__ void prepare(Shared& shared) {
        for (i32 i = 0; i < HELD; i++) ptx::barrier_init(shared.told + i, 1);
    }

    // All that follows by one warp of each block, for the `turn`th of its numbers. Each of the steps may be long on its way:
    // whoever takes one when there is something else to do does not wait.
    static __device__ __forceinline__ u32 ask(u32* taken, u32 rank) {
        return rank == 0 && threadIdx.x % 32 == 0 ? atomicAdd(taken, 1) : 0;
    }

    static __device__ __forceinline__ void tell(Shared& shared, u32 asked, i32 turn, u32 rank) {
        asked = __shfl_sync(~0u, asked, 0);
        i32 lane = threadIdx.x % 32, place = turn % HELD;
        if (rank == 0 && lane < CLUSTER) ptx::store_at(shared.numbers + place, asked, shared.told + place, lane);
    }

    static __device__ __forceinline__ i32 get(Shared& shared, i32 turn) {
        i32 place = turn % HELD;
        if (threadIdx.x % 32 == 0) ptx::barrier_expect(shared.told + place, sizeof(i32));
        ptx::barrier_wait(shared.told + place, turn / HELD & 1);
        return uniform(*const_cast<const volatile i32*>(shared.numbers + place));
    }
};
