// What became of this rank's tokens on all ranks, summed at home: in float32, in the order of ranks, rounded once.
//
// This rank's own part is read where it is, or summed as well, the others' where they have put it, as soon as it is there.
// Where the exchange was aborted, sums are NaN. The grid begins and ends as exchange_receive.cuh does, but where it sums its own
// part: that is what grids before it have computed.
#pragma once
#include "came.cuh"
#include "combine.cuh"
#include "parts.cuh"
#include "peer.cuh"
#include "result.cuh"

// This rank's own part of a token. What a warp holds of it:
//     Own(arguments, peers, token, place)     place: among those that this rank has of its own; -1 for a token without a part
//     eight(arguments, column, v)
//
// There is a row, which was there before what is sent was sent.
template <typename Result>
struct OwnRows {
    struct Arguments {
        const typename Result::Element* rows;  // (ranks * capacity, columns)
        i32 columns, unused;
    };
    static constexpr bool EARLY = true;
    const u8* at;
    __device__ __forceinline__ OwnRows(const Arguments& arguments, const Peers& peers, i32, i32 place)
        : at(reinterpret_cast<const u8*>(arguments.rows + (i64(peers.rank) * peers.capacity + place) * arguments.columns)) {}
    __device__ __forceinline__ void eight(const Arguments&, i32 column, float (&v)[8]) const { Came<Result>::eight(at, column, v); }
};

// It is the sum of the token's rows of experts, of both parts (parts.cuh), which is rounded as if it were a row, too.
template <typename Input, typename Result, typename Output, typename Id>
struct OwnSums {
    struct Arguments {
        Parts<Id> parts;
        const u16* rows;       // (rows of both parts, columns)
        const float* weights;  // (tokens, top_k), or null
        i32 columns, unused;
    };
    static constexpr bool EARLY = false;
    const u16* rows;
    i32 slot, top_k;  // slot: of the lane's assignment, -1 for none
    float weight;
    __device__ __forceinline__ OwnSums(const Arguments& arguments, const Peers& peers, i32 token, i32 place)
        : rows(arguments.rows), slot(-1), top_k(arguments.parts.top_k), weight(0) {
        i32 k = threadIdx.x % 32;
        if (k >= top_k || place < 0) return;
        slot = arguments.parts.slot(peers, token, place, k);
        if (arguments.weights) weight = __ldcg(arguments.weights + i64(token) * top_k + k);
    }
    __device__ __forceinline__ void eight(const Arguments& arguments, i32 column, float (&v)[8]) const {
        float sum[8] = {};
#pragma unroll 4
        for (i32 k = 0; k < top_k; k++) {
            i32 of = __shfl_sync(~0u, slot, k);
            float times = __shfl_sync(~0u, weight, k);
            uint4 packed = make_uint4(0, 0, 0, 0);
            if (of >= 0) packed = __ldcg(reinterpret_cast<const uint4*>(rows + i64(of) * arguments.columns + column));
            add_output<Input, Output>(of, packed, times, sum);
        }
        Result::round(sum, v);
    }
};

template <typename Result, typename Weight, typename Own = OwnRows<Result>>
struct ExchangeHome {
    static constexpr i32 THREADS = 256, BLOCKS = 1, WARPS = THREADS / 32, UNROLLED = Own::EARLY ? 4 : 1;
    struct Arguments {
        Peers peers;
        const i32* home;                             // (tokens, ranks): the place of a token on each rank, -1 where it has none
        typename Own::Arguments own;
        const typename Weight::Element* own_weights; // (ranks * capacity, top_k), or null
        typename Result::Element* out;               // (tokens, columns)
        typename Weight::Element* weights;           // (tokens, top_k), or null
        i32 tokens, columns, top_k;
    };
    struct Shared {
        const u8* rows[WARPS][RANKS];  // of a warp's token, by rank, or null; of this one's own, whether there is a part
        i32 complete;
    };
    using Row = Peers::Row;

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        const Peers& peers = arguments.peers;
        if (!Own::EARLY) ptx::take_turn();
        u32 exchange = exchange_of(peers.words(peers.rank).ended[peers.slot]);
        i32 warps = gridDim.x * WARPS, first = blockIdx.x * WARPS + threadIdx.x / 32;
        const u8** rows = shared.rows[threadIdx.x / 32];
        if (threadIdx.x == 0) shared.complete = 1;
        for (i32 token = first; token < arguments.tokens; token += warps) {
            i32 place = find(arguments, rows, token, exchange);
            sum(arguments, Own(arguments.own, peers, token, place), rows, token, place, 0);
        }
        __syncthreads();
        await_all(shared, peers, exchange);
        __syncthreads();
        if (!shared.complete) {
            if (threadIdx.x % 32 < RANKS) rows[threadIdx.x % 32] = nullptr;
            __syncwarp();
            for (i32 token = first; token < arguments.tokens; token += warps)
                sum(arguments, Own(arguments.own, peers, token, -1), rows, token, -1, __int_as_float(0x7fffffff));
        }
        __syncthreads();
        if (threadIdx.x == 0) peers.done_reading(Grid::whole());
        if (Own::EARLY) ptx::take_turn();  // whoever waits for this grid waits for those before it, too
    }

    // By a warp, a lane for each rank: where the token's rows are, once they are there. Its place among this rank's own.
    static __device__ __forceinline__ i32 find(const Arguments& arguments, const u8** rows, i32 token, u32 exchange) {
        const Peers& peers = arguments.peers;
        i32 rank = threadIdx.x % 32, place = -1;
        if (rank < peers.ranks) {
            place = __ldcg(arguments.home + i64(token) * peers.ranks + rank);
            const u8* row = nullptr;
            if (place >= 0 && rank == peers.rank)
                row = reinterpret_cast<const u8*>(arguments.home);
            else if (place >= 0 && peers.wait_for_row(rank, place, exchange, Step::HOME) == Row::HERE)
                row = peers.record(peers.rank, rank, place);
            rows[rank] = row;
        }
        __syncwarp();
        return __shfl_sync(~0u, place, peers.rank);
    }

    // By a warp: what its rows add to that. Lanes stay together: who has no columns in the end writes the last ones, too.
    static __device__ __forceinline__ void sum(const Arguments& arguments, const Own& own, const u8* const* rows, i32 token,
                                               i32 place, float to) {
        i32 lane = threadIdx.x % 32, ranks = arguments.peers.ranks;
#pragma unroll UNROLLED
        for (i32 first = 0; first < arguments.columns; first += 256) {
            i32 column = min(first + 8 * lane, arguments.columns - 8);
            float total[8];
#pragma unroll
            for (i32 j = 0; j < 8; j++) total[j] = to;
            for (i32 rank = 0; rank < ranks; rank++) {
                if (!rows[rank]) continue;
                float v[8];
                if (rank == arguments.peers.rank)
                    own.eight(arguments.own, column, v);
                else
                    Came<Result>::eight(rows[rank], column, v);
#pragma unroll
                for (i32 j = 0; j < 8; j++) total[j] += v[j];
            }
            Result::store(arguments.out + i64(token) * arguments.columns + column, total);
        }
        if (arguments.weights && lane < arguments.top_k) {
            float total = to;
            for (i32 rank = 0; rank < ranks; rank++)
                if (rows[rank]) total += Came<Weight>::one(weights_of(arguments, rows[rank], rank, place), lane);
            Weight::store(arguments.weights + i64(token) * arguments.top_k + lane, total);
        }
        __syncwarp();
    }

    // Those that belong to a row: behind it, if it has travelled.
    static __device__ __forceinline__ const u8* weights_of(const Arguments& arguments, const u8* row, i32 rank, i32 place) {
        if (rank != arguments.peers.rank) return row + arguments.columns * i32(sizeof(typename Result::Element));
        i64 line = i64(rank) * arguments.peers.capacity + place;
        return reinterpret_cast<const u8*>(arguments.own_weights + line * arguments.top_k);
    }

    // By a block: the exchange is over when all ranks have said all, those without a row for this one, too.
    static __device__ __forceinline__ void await_all(Shared& shared, const Peers& peers, u32 exchange) {
        for (i32 i = threadIdx.x; i < peers.ranks * peers.channels; i += THREADS) {
            i32 from = i / peers.channels;
            if (from != peers.rank && peers.wait_for_all(from, i % peers.channels, exchange, Step::HOME) < 0) shared.complete = 0;
        }
        ptx::fence_system();
        __syncthreads();
        if (threadIdx.x == 0 && peers.is_aborted()) shared.complete = 0;  // whoever has given up said so before
    }
};
