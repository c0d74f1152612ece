// Tokens to their rows in expert order: rows[slots[t, k], :] = x[t, :] for every k that has an expert.
//
// A warp has 2 KiB of a token, which it reads once and writes for each of the token's experts.
#pragma once
#include "kernel.cuh"

struct Dispatch {
    static constexpr i32 THREADS = 256, BLOCKS = 1, PIECES = 4;  // of 16 bytes, for each lane
    struct Arguments {
        const uint4* x;    // (tokens, pieces), of lines of pitch
        const i32* slots;  // (tokens, top_k); -1 for an assignment without an expert
        uint4* rows;       // (rows, pieces)
        i32 tokens, top_k, pieces, pitch;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        i32 lane = threadIdx.x % 32, parts = (arguments.pieces + 32 * PIECES - 1) / (32 * PIECES);
        i64 count = i64(arguments.tokens) * parts, step = i64(gridDim.x) * (THREADS / 32);
        for (i64 i = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32; i < count; i += step) {
            i64 token = i / parts;
            i32 first = i % parts * 32 * PIECES + lane;
            uint4 held[PIECES];
#pragma unroll
            for (i32 piece = 0; piece < PIECES; piece++)
                if (first + 32 * piece < arguments.pieces)
                    held[piece] = __ldg(arguments.x + token * arguments.pitch + first + 32 * piece);
            for (i32 k = 0; k < arguments.top_k; k++) {
                i32 slot = __ldg(arguments.slots + token * arguments.top_k + k);
                if (slot < 0) continue;
#pragma unroll
                for (i32 piece = 0; piece < PIECES; piece++)
                    if (first + 32 * piece < arguments.pieces)
                        arguments.rows[i64(slot) * arguments.pieces + first + 32 * piece] = held[piece];
            }
        }
    }
};
