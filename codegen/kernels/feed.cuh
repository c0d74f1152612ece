// Where a grouped GEMM has its rows from: one struct for each, with
//
//     run(...)      by the warps beside the producer's, from beginning to end, with REGISTERS a thread
//     wait(...)     by the producer warp, until a tile's rows may be loaded
#pragma once
#include "ptx.cuh"

// They were there before the launch.
struct Given {
    static constexpr bool BESIDE = false;
    struct Arguments {
        i32 unused;
    };
    template <i32 REGISTERS>
    static __device__ __forceinline__ void run(const Arguments&, i32) {}
    static __device__ __forceinline__ void wait(const Arguments&, i32, i32, i32) {}
};

// They are tokens', dispatched by this very kernel while others are multiplied: rows[r, :] = tokens[order[r] / top_k, :],
// with their scales if they are quantised.
//
// Warps take rows in order, a few at a time, and whoever takes some writes them, waiting for nobody: however few blocks
// run at once, tiles get their rows. Who counts which rows are there does not decide what is in them.
template <bool SCALED>
struct Dispatched {
    static constexpr bool BESIDE = true;
    static constexpr i32 UNIT = 2, BLOCK = 64;  // rows that a warp takes at once, and that are counted together
    struct Arguments {
        const uint4* tokens;        // (tokens, pieces)
        uint4* rows;                // (rows, pieces): what the GEMM reads
        const float* token_scales;  // (tokens, scale blocks)
        float* scales;              // (scale blocks, pitch)
        const i32* order;           // the assignment of a row
        u32* progress;              // zeros at first: how many units are taken; for each block of rows, how many are there
        i32 top_k, pieces, scale_blocks, pitch;
    };

    template <i32 REGISTERS>
    static __device__ __forceinline__ void run(const Arguments& arguments, i32 rows) {
        i32 lane = threadIdx.x % 32, unit = take(arguments), token = token_of(arguments, unit, rows);
        while (unit * UNIT < rows) {
            i32 next = take(arguments), next_token = token_of(arguments, next, rows);
            copy<REGISTERS >= 56 ? 3 : 2>(arguments, unit * UNIT, token, rows);
            if constexpr (SCALED) copy_scales(arguments, unit * UNIT, token, rows);
            ptx::fence_async_global();  // bulk copies will read it
            __syncwarp();
            if (lane == 0) ptx::add_release(arguments.progress + 1 + unit * UNIT / BLOCK, 1);
            unit = next, token = next_token;
        }
    }

    static __device__ __forceinline__ void wait(const Arguments& arguments, i32 first, i32 end, i32 rows) {
        i32 block = first / BLOCK + i32(threadIdx.x % 32);
        bool ours = block <= (end - 1) / BLOCK;
        u32 whole = (min(BLOCK, rows - block * BLOCK) + UNIT - 1) / UNIT;
        while (__any_sync(~0u, ours && ptx::load_acquire(arguments.progress + 1 + block) < whole)) {}
        __syncwarp();
        ptx::fence_async_global();
    }

    static __device__ __forceinline__ i32 take(const Arguments& arguments) {
        u32 unit = 0;
        if (threadIdx.x % 32 == 0) unit = atomicAdd(arguments.progress, 1);
        return i32(__shfl_sync(~0u, unit, 0));
    }

    // Of the unit's rows, each in a lane of that number.
    static __device__ __forceinline__ i32 token_of(const Arguments& arguments, i32 unit, i32 rows) {
        i32 row = unit * UNIT + i32(threadIdx.x % 32);
        return threadIdx.x % 32 < UNIT && row < rows ? __ldg(arguments.order + row) / arguments.top_k : 0;
    }

    // PIECES of each row are in a lane's hands at once. Places are counted in pieces, in 32 bits: the producer's warpgroup
    // has few registers.
    template <i32 PIECES>
    static __device__ __forceinline__ void copy(const Arguments& arguments, i32 first, i32 token, i32 rows) {
        u32 from[UNIT], to = u32(first) * arguments.pieces;
#pragma unroll
        for (i32 i = 0; i < UNIT; i++) from[i] = u32(__shfl_sync(~0u, token, i)) * arguments.pieces;
        i32 count = min(UNIT, rows - first);
#pragma unroll 1
        for (i32 at = threadIdx.x % 32; at < arguments.pieces; at += 32 * PIECES) {
            uint4 held[UNIT][PIECES];
#pragma unroll
            for (i32 i = 0; i < UNIT; i++)
#pragma unroll
                for (i32 piece = 0; piece < PIECES; piece++)
                    if (at + 32 * piece < arguments.pieces) held[i][piece] = __ldg(arguments.tokens + (from[i] + at + 32 * piece));
#pragma unroll
            for (i32 i = 0; i < UNIT; i++)
#pragma unroll
                for (i32 piece = 0; piece < PIECES; piece++)
                    if (i < count && at + 32 * piece < arguments.pieces)
                        arguments.rows[to + i * arguments.pieces + at + 32 * piece] = held[i][piece];
        }
    }

    static __device__ __forceinline__ void copy_scales(const Arguments& arguments, i32 first, i32 token, i32 rows) {
        i32 lane = threadIdx.x % 32, own = lane % UNIT;
        i64 line = i64(__shfl_sync(~0u, token, own)) * arguments.scale_blocks;
#pragma unroll 1
        for (i32 block = lane / UNIT; block < arguments.scale_blocks; block += 32 / UNIT)
            if (first + own < rows)
                arguments.scales[i64(block) * arguments.pitch + first + own] = __ldg(arguments.token_scales + line + block);
    }
};
