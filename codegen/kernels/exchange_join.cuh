// The rows of a rank's own assignments to experts of its own, which two launches have computed: of each expert the first so many
// times `multiple` by the one, the others by the other, together with what came from other ranks.
#pragma once
#include "exchange_receive.cuh"

template <typename Id>
struct ExchangeJoin {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        const Id* ids;       // (tokens, top_k), of all ranks' experts
        const i32* home;     // (tokens, ranks): the place of a token on each rank
        const i32* slots;    // (tokens, top_k): the row of an assignment for the one; -1 for none
        const i32* offsets;  // (experts,)
        const i32* others;   // (ranks * capacity, top_k): the row of an assignment for the other, counted from `first`
        i32* joint;          // (tokens, top_k): the row of each, -1 for none
        i32 assignments, top_k, rank, ranks, capacity, experts, first, multiple;
    };
    struct Shared {
        i32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        i32 own = arguments.rank * arguments.experts;
        for (i32 i = blockIdx.x * THREADS + threadIdx.x; i < arguments.assignments; i += gridDim.x * THREADS) {
            i32 slot = __ldg(arguments.slots + i), token = i / arguments.top_k;
            if (slot >= 0 && !is_whole(slot, i32(__ldg(arguments.ids + i)) - own, arguments.offsets, arguments.multiple)) {
                i64 place = i64(arguments.rank) * arguments.capacity + __ldg(arguments.home + i64(token) * arguments.ranks + arguments.rank);
                slot = arguments.first + __ldg(arguments.others + place * arguments.top_k + i % arguments.top_k);
            }
            arguments.joint[i] = slot;
        }
    }
};
