// The two parts that the rows of a rank's experts are multiplied in (moecompile/runtime/hopper_exchanged.py): of each expert the
// first so many times `multiple` of this rank's own, and the others, together with what came from other ranks.
#pragma once
#include "peer.cuh"

// Whether a row, -1 for none, is in the first part.
__device__ __forceinline__ bool is_whole(i32 slot, i32 expert, const i32* offsets, i32 multiple) {
    if (slot < 0) return false;
    i32 begin = expert ? __ldcg(offsets + expert - 1) : 0, rows = __ldcg(offsets + expert) - begin;
    return slot - begin < rows - rows % multiple;
}

// Where the rows of this rank's own assignments are.
template <typename Id>
struct Parts {
    const Id* ids;       // (tokens, top_k), of all ranks' experts
    const i32* slots;    // (tokens, top_k): the row of an assignment, were all in the first part; -1 for none
    const i32* offsets;  // (experts,)
    const i32* others;   // (ranks * capacity, top_k): the row of an assignment in the second part, counted from `first`
    i32 top_k, experts, first, multiple;

    // Of a token that has that place among those that this rank has of its own.
    __device__ __forceinline__ i32 slot(const Peers& peers, i32 token, i32 place, i32 k) const {
        i64 assignment = i64(token) * top_k + k;
        i32 slot = __ldcg(slots + assignment);
        if (slot < 0 || is_whole(slot, i32(__ldcg(ids + assignment)) - peers.rank * experts, offsets, multiple)) return slot;
        return first + __ldcg(others + (i64(peers.rank) * peers.capacity + place) * top_k + k);
    }
};
