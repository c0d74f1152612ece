// A value of each row, in parts, back to assignments: out[i] = sum over p of parts[p, slots[i]], plus more[slots[i]].
//
// Sums are in float32, in the order of the parts, and rounded once; zero for an assignment without an expert.
#pragma once
#include "kernel.cuh"
#include "result.cuh"

template <typename Result>
struct Collect {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        const float* parts;  // (count, rows)
        const float* more;   // (rows,), or null
        const i32* slots;    // (assignments,); -1 for an assignment without an expert
        typename Result::Element* out;  // (assignments,)
        i32 count, rows, assignments;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        for (i32 i = blockIdx.x * THREADS + threadIdx.x; i < arguments.assignments; i += gridDim.x * THREADS) {
            i32 slot = __ldg(arguments.slots + i);
            float sum = 0;
#pragma unroll 4
            for (i32 part = 0; part < arguments.count; part++)
                sum += slot < 0 ? 0 : __ldg(arguments.parts + i64(part) * arguments.rows + slot);
            if (arguments.more && slot >= 0) sum += __ldg(arguments.more + slot);
            Result::store(arguments.out + i, sum);
        }
    }
};
