// Rows in expert order back to tokens: out[t, :] = sum over k of output(rows[slots[t, k], :], weights[t, k]).
//
// A thread has eight columns of a token. Sums are in float32 and in the order of k, and rounded once; no atomics.
#pragma once
#include "elementwise.cuh"
#include "kernel.cuh"
#include "result.cuh"

// sum += output(row, weight) of eight neighbouring columns, if there is such a row.
template <typename Input, typename Output>
__device__ __forceinline__ void add_output(i32 slot, const uint4& packed, float weight, float (&sum)[8]) {
    u32 pairs[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (i32 i = 0; i < 4; i++) {
        float low, high;
        Input::unpack(pairs[i], low, high);
        sum[2 * i] += slot < 0 ? 0 : Output::value(low, weight);
        sum[2 * i + 1] += slot < 0 ? 0 : Output::value(high, weight);
    }
}

template <typename Input, typename Result, typename Output>
struct Combine {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        const u16* rows;       // (rows, columns)
        const i32* slots;      // (tokens, top_k); -1 for an assignment without an expert
        const float* weights;  // (tokens, top_k), or null
        typename Result::Element* out;  // (tokens, columns)
        i32 tokens, top_k, columns;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        i32 eights = arguments.columns / 8;
        i64 count = i64(arguments.tokens) * eights, step = i64(gridDim.x) * THREADS;
        for (i64 i = i64(blockIdx.x) * THREADS + threadIdx.x; i < count; i += step) {
            i64 token = i / eights, column = i % eights * 8;
            float sum[8] = {};
#pragma unroll 4
            for (i32 k = 0; k < arguments.top_k; k++) add(arguments, token * arguments.top_k + k, column, sum);
            Result::store(arguments.out + token * arguments.columns + column, sum);
        }
    }

    // A row that is not there is not read: by a predicate, since a branch would keep the loads apart.
    static __device__ __forceinline__ void add(const Arguments& arguments, i64 assignment, i64 column, float (&sum)[8]) {
        i32 slot = __ldg(arguments.slots + assignment);
        float weight = arguments.weights ? __ldg(arguments.weights + assignment) : 0;
        const u16* row = arguments.rows + i64(max(slot, 0)) * arguments.columns + column;
        uint4 packed = make_uint4(0, 0, 0, 0);
        if (slot >= 0) packed = __ldg(reinterpret_cast<const uint4*>(row));
        add_output<Input, Output>(slot, packed, weight, sum);
    }
};
