// Zeros for a few words, which other kernels count in.
#pragma once
#include "kernel.cuh"

struct Clear {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        u32* words;
        i32 count;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        for (i32 i = blockIdx.x * THREADS + threadIdx.x; i < arguments.count; i += gridDim.x * THREADS) arguments.words[i] = 0;
    }
};
