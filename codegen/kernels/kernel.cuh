// How an instantiation becomes a kernel: one struct of arguments, dynamic shared memory, a persistent grid.
#pragma once
#include "ptx.cuh"

constexpr i32 SHARED_LIMIT = 232448;  // bytes of shared memory that one block may have: 227 KiB

// What the host asks of a kernel before it launches it.
struct KernelFacts {
    i32 shared_bytes, argument_bytes, threads, blocks_of_a_cluster;
};

#define MOECOMPILE_KERNEL(name, ...)                                                                        \
    using Instance = __VA_ARGS__;                                                                        \
    static_assert(sizeof(Instance::Shared) <= SHARED_LIMIT, "a block has 227 KiB of shared memory");          \
    extern "C" __constant__ KernelFacts facts = {sizeof(Instance::Shared), sizeof(Instance::Arguments),  \
                                                 Instance::THREADS, Instance::BLOCKS};                   \
    extern "C" __global__ void __cluster_dims__(Instance::BLOCKS, 1, 1)                                  \
        __launch_bounds__(Instance::THREADS, 1) name(const __grid_constant__ Instance::Arguments arguments) { \
        Instance::run(arguments);                                                                        \
    }
