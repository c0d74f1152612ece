// How an instantiation becomes a kernel: one struct of arguments, dynamic shared memory, a persistent grid.
#pragma once
#include "ptx.cuh"

constexpr i32 SHARED_LIMIT = 232448;  // bytes of shared memory that one block may have: 227 KiB

// What the host asks of a kernel before it launches it.
struct KernelFacts {
    i32 shared_bytes, argument_bytes, threads, blocks_of_a_cluster;
};

// The blocks that run a kernel together, and which of them this is: all of the launch, unless several ranks share it.
struct Grid {
    i32 block, blocks;
    static __device__ __forceinline__ Grid whole() { return {i32(blockIdx.x), i32(gridDim.x)}; }

    // By one thread of each block, when the block is done: true in the last of them. The counter is zero before and after.
    __device__ __forceinline__ bool is_last_block(u32& counter) const {
        __threadfence();
        bool last = atomicInc(&counter, blocks - 1) == u32(blocks) - 1;
        __threadfence();
        return last;
    }
};

// Blocks that a multiprocessor is to hold at once, so many at least: RESIDENT, where an instantiation says it.
template <typename Instance, typename = void>
struct Resident {
    static constexpr i32 BLOCKS = 1;
};
template <typename Instance>
struct Resident<Instance, decltype(void(Instance::RESIDENT))> {
    static constexpr i32 BLOCKS = Instance::RESIDENT;
};

#define MOECOMPILE_KERNEL(name, ...)                                                                        \
    using Instance = __VA_ARGS__;                                                                        \
    static_assert(sizeof(Instance::Shared) <= SHARED_LIMIT, "a block has 227 KiB of shared memory");          \
    extern "C" __constant__ KernelFacts facts = {sizeof(Instance::Shared), sizeof(Instance::Arguments),  \
                                                 Instance::THREADS, Instance::BLOCKS};                   \
    extern "C" __global__ void __cluster_dims__(Instance::BLOCKS, 1, 1)                                  \
        __launch_bounds__(Instance::THREADS, Resident<Instance>::BLOCKS)                                 \
        name(const __grid_constant__ Instance::Arguments arguments) {                                    \
        Instance::run(arguments);                                                                        \
    }
