// Where this rank's tokens go: to each rank that has one of their experts, in the order of tokens.
//
// A block counts the tokens of all blocks before it by itself: they are few words, and to wait for the others would take
// longer. Every place follows from counts alone: the same ids give the same plan.
#pragma once
#include "peer.cuh"

template <typename Id>
struct ExchangePlan {
    static constexpr i32 THREADS = 1024, BLOCKS = 1, WARPS = THREADS / 32;
    struct Arguments {
        const Id* ids;  // (tokens, top_k); -1 for an assignment without an expert
        i32* sent;      // (ranks, capacity): the token at each place of each rank, -1 where there is none
        i32* home;      // (tokens, ranks): the place of a token on each rank, -1 where it has none
        i32 tokens, top_k, experts, ranks, capacity;  // experts of each rank
    };
    struct Shared {
        i32 counts[WARPS][RANKS];  // of a warp's tokens; then of those before them
        i32 before[RANKS];         // tokens that were placed
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 each = (arguments.tokens + gridDim.x * THREADS - 1) / (gridDim.x * THREADS) * THREADS;
        i32 begin = min(i32(blockIdx.x) * each, arguments.tokens), end = min(begin + each, arguments.tokens);
        i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, count = 0;  // count: of the rank that is the lane's number
        for (i32 first = 0; first < begin; first += THREADS) {  // whole rounds
            u32 met = ranks_of(arguments, first + threadIdx.x, begin);
            for (i32 rank = 0; rank < arguments.ranks; rank++) {
                u32 lanes = __ballot_sync(~0u, met >> rank & 1);
                count += lane == rank ? __popc(lanes) : 0;
            }
        }
        if (lane < RANKS) shared.counts[warp][lane] = count;
        __syncthreads();
        if (threadIdx.x < arguments.ranks) {
            i32 total = 0;
            for (i32 other = 0; other < WARPS; other++) total += shared.counts[other][threadIdx.x];
            shared.before[threadIdx.x] = total;
        }
        __syncthreads();
        for (i32 first = begin; first < end; first += THREADS) place(shared, arguments, first, end);
        if (blockIdx.x + 1 == gridDim.x)
            for (i32 rank = 0; rank < arguments.ranks; rank++)
                for (i32 i = shared.before[rank] + threadIdx.x; i < arguments.capacity; i += THREADS)
                    arguments.sent[i64(rank) * arguments.capacity + i] = -1;
    }

    // One bit for each rank that has an expert of the token.
    static __device__ __forceinline__ u32 ranks_of(const Arguments& arguments, i32 token, i32 end) {
        u32 met = 0;
        for (i32 k = 0; token < end && k < arguments.top_k; k++) {
            Id id = __ldg(arguments.ids + i64(token) * arguments.top_k + k);
            if (id < -1 || id >= Id(arguments.experts) * arguments.ranks)
                __assertfail("an expert id is outside [0, num_experts) and not -1 (no expert)", "moecompile::exchange_plan", 0,
                             "exchange_plan", 1);
            if (id >= 0) met |= 1u << u32(id) / u32(arguments.experts);
        }
        return met;
    }

    // One token for each thread.
    static __device__ __forceinline__ void place(Shared& shared, const Arguments& arguments, i32 first, i32 end) {
        i32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = first + threadIdx.x;
        u32 met = ranks_of(arguments, token, end), lower = (1u << lane) - 1;
        for (i32 rank = 0; rank < arguments.ranks; rank++) {
            u32 lanes = __ballot_sync(~0u, met >> rank & 1);
            if (lane == 0) shared.counts[warp][rank] = __popc(lanes);
        }
        __syncthreads();
        for (i32 rank = 0; rank < arguments.ranks; rank++) {
            u32 lanes = __ballot_sync(~0u, met >> rank & 1);
            i32 at = shared.before[rank] + __popc(lanes & lower);
            for (i32 other = 0; other < warp; other++) at += shared.counts[other][rank];
            bool meets = met >> rank & 1;
            if (meets) arguments.sent[i64(rank) * arguments.capacity + at] = token;
            if (token < end) arguments.home[i64(token) * arguments.ranks + rank] = meets ? at : -1;
        }
        __syncthreads();
        if (threadIdx.x < arguments.ranks)
            for (i32 other = 0; other < WARPS; other++) shared.before[threadIdx.x] += shared.counts[other][threadIdx.x];
        __syncthreads();
    }
};
