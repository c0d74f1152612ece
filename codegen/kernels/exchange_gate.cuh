// Ends when all blocks of a kernel on another stream have begun (exchange_send.cuh): what comes behind this one takes all
// multiprocessors that it finds, and those blocks would have to wait for it. That would be slow and nothing worse, so it does
// not wait for long: nobody promises that kernels of two streams run side by side.
#pragma once
#include "kernel.cuh"

struct ExchangeGate {
    static constexpr i32 THREADS = 32, BLOCKS = 1;
    static constexpr u64 LONG = 1000000;  // nanoseconds
    struct Arguments {
        const u32* started;
        i32 blocks;
    };
    struct Shared {
        i32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::wait_for_earlier_grids();
        u64 deadline = ptx::nanoseconds() + LONG;
        while (ptx::load_relaxed(arguments.started) < u32(arguments.blocks) && ptx::nanoseconds() < deadline) __nanosleep(100);
        ptx::let_next_grid_begin();
    }
};
