// What is done with a grouped GEMM's rows before it ends: one struct for each, with
//
//     written(...)  by each consumer warp, once a tile's rows of its own are in memory
//     run(...)      by the warps beside the producer's from the beginning on, by the consumers after their last tile
#pragma once
#include "combine.cuh"

// Nothing: they are the result.
struct Kept {
    static constexpr bool BESIDE = false;
    struct Arguments {
        i32 slabs;  // 1
    };
    static __device__ __forceinline__ void written(const Arguments&, i32) {}
    static __device__ __forceinline__ void run(const Arguments&, i32) {}
};

// They are combined into tokens (combine.cuh): of one slab of columns, while the next one's are computed.
//
// Warps take tokens in order, slab after slab. They wait for tiles alone, which wait for nobody: however few blocks run at
// once, all ends.
template <typename Input, typename Result, typename Output>
struct Combined {
    using Eight = Sum<Input, Result, Output, true>;
    static constexpr bool BESIDE = true;
    struct Arguments {
        u32* progress;  // zeros at first: how many tokens are taken, of all slabs; how many warps have written, for each slab
        const u16* rows;  // as of Combine
        const i32* slots;
        const float* weights;
        typename Result::Element* out;
        i32 tokens, top_k, columns, width, slabs;  // columns of a slab; the last may have fewer
    };

    static __device__ __forceinline__ void written(const Arguments& arguments, i32 slab) {
        if (threadIdx.x % 32 == 0) ptx::add_release(arguments.progress + 1 + slab, 1);
    }

    // `writes` of a slab: how often `written` is called for it.
    static __device__ __forceinline__ void run(const Arguments& arguments, i32 writes) {
        i32 tokens = arguments.tokens, there = -1;
        for (i32 unit = take(arguments); unit < tokens * arguments.slabs; unit = take(arguments)) {
            i32 slab = unit / tokens;
            for (; there < slab; there++)
                while (ptx::load_acquire(arguments.progress + 2 + there) < u32(writes)) __nanosleep(500);
            __syncwarp();
            i32 first = slab * arguments.width, end = min(first + arguments.width, arguments.columns);
            for (i32 column = first + threadIdx.x % 32 * 8; column < end; column += 32 * 8)
                Eight::run(arguments, unit % tokens, column);
        }
    }

    static __device__ __forceinline__ i32 take(const Arguments& arguments) {
        u32 unit = 0;
        if (threadIdx.x % 32 == 0) unit = atomicAdd(arguments.progress, 1);
        return i32(__shfl_sync(~0u, unit, 0));
    }
};
