// Exchanges are counted on each rank, by words that its kernels advance: [0] those that are over, [1] blocks that are done with
// the one that is not.
#pragma once
#include "kernel.cuh"

// The number of the exchange that a kernel takes part in.
__device__ __forceinline__ u32 exchange_of(const u32 (&counter)[2]) {
    return *reinterpret_cast<const volatile u32*>(counter) + 1;
}
