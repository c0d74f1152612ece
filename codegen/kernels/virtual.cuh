// A kernel of several ranks in one launch on one device, an equal number of neighbouring blocks each: what many devices do, where
// there is one. All blocks have to run at once: the launch is a cooperative one.
#pragma once
#include "kernel.cuh"

template <typename Kernel, i32 RANKS_OF_ALL>
struct Virtual {
    static constexpr i32 THREADS = Kernel::THREADS, BLOCKS = Kernel::BLOCKS;
    static_assert(BLOCKS == 1, "ranks share no cluster");
    struct Arguments {
        typename Kernel::Arguments each[RANKS_OF_ALL];
    };
    using Shared = typename Kernel::Shared;

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        i32 blocks = gridDim.x / RANKS_OF_ALL;
        Kernel::run(arguments.each[blockIdx.x / blocks], {i32(blockIdx.x) % blocks, blocks});
    }
};
