// Rows that came from all ranks, out of the memory that these write to, which they may write to again.
//
// A block waits for all channels of a rank, copies its share of the rank's rows, and goes on to the next; this rank's own
// come first. Rows of places where nothing came are not written, and have no expert.
#pragma once
#include "peer.cuh"

struct ExchangeReceive {
    static constexpr i32 THREADS = 256, BLOCKS = 1, NOT_A_NUMBER = 0x7fff7fff;  // in bf16, fp16 and float32
    struct Arguments {
        const u64* bases;
        u64* told;
        uint4* rows;   // (ranks * capacity, pieces) of 16 bytes
        i32* ids;      // (ranks * capacity, top_k), counted from this rank's first; or null
        u8* weights;   // (ranks * capacity, top_k) of `weight` bytes, 2 or 4; or null
        i32* came;     // (ranks,): how many rows came from each
        i32 rank, ranks, slot, room, capacity, pitch, channels, patience;
        i32 pieces, top_k, weight, experts;  // experts of each rank
    };
    struct Shared {
        i32 count, complete;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        Peers peers = {arguments.bases, arguments.told,     arguments.rank,  arguments.ranks,    arguments.slot,
                       arguments.room,  arguments.capacity, arguments.pitch, arguments.channels, arguments.patience};
        PeerWords& own = peers.words(peers.rank);
        u32 exchange = exchange_of(own.ended[peers.slot]);
        for (i32 turn = 0; turn < peers.ranks; turn++) {
            i32 from = (peers.rank + turn) % peers.ranks;
            bool complete = wait_for(shared, peers, exchange, from);
            if (blockIdx.x == 0 && threadIdx.x == 0) arguments.came[from] = shared.count;
            for (i32 place = blockIdx.x; place < peers.capacity; place += gridDim.x)
                take(arguments, peers, from, place, place < shared.count, complete);
            __syncthreads();
        }
        if (threadIdx.x == 0 && is_last_block(own.ended[peers.slot])) {
            own.ended[peers.slot][0] = exchange;
            ptx::fence_system();
            for (i32 other = 0; other < peers.ranks; other++)
                ptx::store_release_system(&peers.words(other).taken[peers.slot][peers.rank], exchange);
        }
    }

    // By a block: how many rows a rank has sent, once they are there. False, and none, if the exchange was aborted.
    static __device__ __forceinline__ bool wait_for(Shared& shared, const Peers& peers, u32 exchange, i32 from) {
        if (threadIdx.x == 0) shared.count = 0, shared.complete = 1;
        __syncthreads();
        for (i32 channel = threadIdx.x; channel < peers.channels; channel += THREADS) {
            const u64* word = &peers.words(peers.rank).arrived[peers.slot][from][channel];
            if (u64 found = peers.wait(word, u64(exchange) << 32, from, Step::RECEIVE))
                atomicAdd(&shared.count, i32(u32(found)));
            else
                shared.complete = 0;
        }
        ptx::fence_system();
        __syncthreads();
        bool complete = shared.complete;
        if (!complete && threadIdx.x == 0) shared.count = 0;
        __syncthreads();
        return complete;
    }

    // Loads go past L1, which does not see what other devices write.
    static __device__ __forceinline__ void take(const Arguments& arguments, const Peers& peers, i32 from, i32 place, bool is_there,
                                                bool complete) {
        const u8* record = peers.record(peers.rank, from, place);
        i64 row = i64(from) * peers.capacity + place;
        for (i32 piece = threadIdx.x; is_there && piece < arguments.pieces; piece += THREADS)
            arguments.rows[row * arguments.pieces + piece] = __ldcg(reinterpret_cast<const uint4*>(record) + piece);
        constexpr i32 N = NOT_A_NUMBER;
        for (i32 piece = threadIdx.x; !complete && piece < arguments.pieces; piece += THREADS)
            arguments.rows[row * arguments.pieces + piece] = make_uint4(N, N, N, N);
        const u8* behind = record + 16 * arguments.pieces;
        const u8* weights = behind + (arguments.ids ? 4 * arguments.top_k : 0);
        for (i32 k = threadIdx.x; k < arguments.top_k; k += THREADS) {
            i64 at = row * arguments.top_k + k;
            if (arguments.ids) {
                i32 id = is_there ? __ldcg(reinterpret_cast<const i32*>(behind) + k) - arguments.rank * arguments.experts : -1;
                arguments.ids[at] = id >= 0 && id < arguments.experts ? id : -1;
            }
            if (arguments.weights && arguments.weight == 4)
                reinterpret_cast<u32*>(arguments.weights)[at] = is_there ? __ldcg(reinterpret_cast<const u32*>(weights) + k) : 0;
            else if (arguments.weights)
                reinterpret_cast<u16*>(arguments.weights)[at] = is_there ? __ldcg(reinterpret_cast<const u16*>(weights) + k) : 0;
        }
    }
};
