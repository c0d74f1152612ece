// A value of each row, in parts, back to assignments: out[i] = sum over p of parts[p, slots[i]], plus more[slots[i]].
//
// Sums are in float32, in the order of the parts, and rounded once; zero for an assignment without an expert.
#pragma once
#include "kernel.cuh"
#include "parts.cuh"
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

// The same of this rank's own assignments to experts of its own, whose rows are in one of two parts (parts.cuh), to where
// their tokens are among those that have come: out[home[t], k] = sum over p of parts[p, the row of t, k].
template <typename Result, typename Id>
struct CollectOwn {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        Peers peers;
        Parts<Id> own;
        const i32* home;                // (tokens, ranks): the place of a token on each rank, -1 where it has none
        const float* parts;             // (count, rows)
        typename Result::Element* out;  // (ranks * capacity, top_k)
        i32 count, rows, tokens;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        const Peers& peers = arguments.peers;
        i32 top_k = arguments.own.top_k;
        for (i32 i = blockIdx.x * THREADS + threadIdx.x; i < arguments.tokens * top_k; i += gridDim.x * THREADS) {
            i32 token = i / top_k, k = i % top_k, place = __ldcg(arguments.home + i64(token) * peers.ranks + peers.rank);
            if (place < 0) continue;
            i32 slot = arguments.own.slot(peers, token, place, k);
            float sum = 0;
#pragma unroll 4
            for (i32 part = 0; part < arguments.count; part++)
                sum += slot < 0 ? 0 : __ldg(arguments.parts + i64(part) * arguments.rows + slot);
            Result::store(arguments.out + (i64(peers.rank) * peers.capacity + place) * top_k + k, sum);
        }
    }
};
