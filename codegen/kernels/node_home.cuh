// What became of this rank's tokens on all nodes, summed at home in float32, rounded once: over nodes in their order, of which
// this one's is the sum over its ranks in their order, not rounded before; the others' have been (node_combine.cuh).
//
// Where the exchange was aborted, sums are NaN.
#pragma once
#include "transport.cuh"

namespace nodes {

template <typename Result, typename Weight, typename Far>
struct Home {
    static constexpr i32 THREADS = 256, BLOCKS = 1, WARPS = THREADS / 32;
    struct Arguments {
        Reading<Far> exchange;
        const i32* home;       // (tokens, ranks): the place of a token on each rank, -1 where it has none
        const i32* node_home;  // (tokens, nodes): its number among the records to each node, likewise
        const u8* own;         // (ranks * capacity, columns): this rank's own rows are read where they are
        const u8* own_weights; // (ranks * capacity, top_k), or null
        typename Result::Element* out;      // (tokens, columns)
        typename Weight::Element* weights;  // (tokens, top_k), or null
        i32 tokens, columns, top_k;
    };
    static constexpr i32 ELEMENT = sizeof(typename Result::Element), ALONG = sizeof(typename Weight::Element);
    struct Shared {
        const u8* near[WARPS][LOCALS];  // parts of a warp's token, by rank of this node, or null; this one's own among them
        const u8* far[WARPS][NODES];    // by node; null for this one
        i32 complete;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments, const Grid& grid = Grid::whole()) {
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        const Reading<Far>& exchange = arguments.exchange;
        u32 number = exchange_of(exchange.words(exchange.rank).ended[exchange.slot]);
        i32 warps = grid.blocks * WARPS, warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = grid.block * WARPS + warp;
        if (threadIdx.x == 0) shared.complete = 1;
        for (i32 token = first; token < arguments.tokens; token += warps) {
            find(arguments, shared.near[warp], shared.far[warp], token, number);
            sum(arguments, shared.near[warp], shared.far[warp], token, 0);
        }
        __syncthreads();
        await_all(shared, exchange, number);
        __syncthreads();
        if (!shared.complete) {
            if (lane < LOCALS) shared.near[warp][lane] = nullptr;
            if (lane < NODES) shared.far[warp][lane] = nullptr;
            __syncwarp();
            for (i32 token = first; token < arguments.tokens; token += warps)
                sum(arguments, shared.near[warp], shared.far[warp], token, __int_as_float(0x7fffffff));
        }
        ptx::wait_for_earlier_grids();  // this rank sums for others until then, of the same memory
        __syncthreads();
        if (threadIdx.x == 0) exchange.done_reading(grid);
        ptx::let_next_grid_begin();
    }

    // By a warp: where the token's parts are, once they are there.
    static __device__ __forceinline__ void find(const Arguments& arguments, const u8** near, const u8** far, i32 token, u32 number) {
        const Exchange& exchange = arguments.exchange;
        i32 lane = threadIdx.x % 32, locals = exchange.locals;
        const u8* memory = exchange.base(exchange.rank);
        if (lane < locals) {
            i32 rank = exchange.neighbour(lane), place = __ldcg(arguments.home + i64(token) * exchange.ranks + rank);
            const u8* at = nullptr;
            if (place >= 0 && rank == exchange.rank)
                at = arguments.own + (i64(rank) * exchange.capacity + place) * arguments.columns * ELEMENT;
            else if (place >= 0 && is_there(exchange, exchange.landed(rank, place), number, rank))
                at = memory + exchange.record(rank, place);
            near[lane] = at;
        }
        if (lane < exchange.nodes) {
            i32 record = lane == exchange.node ? -1 : __ldcg(arguments.node_home + i64(token) * exchange.nodes + lane);
            bool there = record >= 0 && is_there(exchange, exchange.homed(lane, record), number, exchange.on_rail(lane));
            far[lane] = there ? memory + exchange.home_record(lane, record) : nullptr;
        }
        __syncwarp();
    }

    static __device__ __forceinline__ bool is_there(const Exchange& exchange, i64 word, u32 number, i32 other) {
        bool there = exchange.wait(reinterpret_cast<const u64*>(exchange.base(exchange.rank) + word), number, other, Step::HOME);
        ptx::fence_system();
        return there;
    }

    // By a warp: what they add to that. Lanes stay together: who has no columns in the end writes the last ones, too.
    static __device__ __forceinline__ void sum(const Arguments& arguments, const u8* const* near, const u8* const* far, i32 token,
                                               float to) {
        const Exchange& exchange = arguments.exchange;
        i32 lane = threadIdx.x % 32, bytes = arguments.columns * ELEMENT;
#pragma unroll 2
        for (i32 begin = 0; begin < arguments.columns; begin += 256) {
            i32 column = min(begin + 8 * lane, arguments.columns - 8);
            float total[8];
#pragma unroll
            for (i32 j = 0; j < 8; j++) total[j] = to;
            for (i32 node = 0; node < exchange.nodes; node++) {
                float part[8] = {};
                if (node == exchange.node)
                    reduce<Result>(near, exchange.locals, column, part);
                else
                    reduce<Result>(far + node, 1, column, part);
#pragma unroll
                for (i32 j = 0; j < 8; j++) total[j] += part[j];
            }
            Result::store(arguments.out + i64(token) * arguments.columns + column, total);
        }
        if (arguments.weights && lane < arguments.top_k) {
            float total = to;
            for (i32 node = 0; node < exchange.nodes; node++) {
                float part = 0;
                for (i32 rail = 0; rail < exchange.locals && node == exchange.node; rail++)
                    if (near[rail]) part += Came<Weight>::one(behind(arguments, near[rail], rail, bytes), lane);
                if (far[node]) part = Came<Weight>::one(far[node] + bytes, lane);
                total += part;
            }
            Weight::store(arguments.weights + i64(token) * arguments.top_k + lane, total);
        }
        __syncwarp();
    }

    // What belongs to a part's experts: behind it, if it has travelled.
    static __device__ __forceinline__ const u8* behind(const Arguments& arguments, const u8* part, i32 rail, i32 bytes) {
        if (rail != arguments.exchange.rail) return part + bytes;
        return arguments.own_weights + (part - arguments.own) / bytes * arguments.top_k * ALONG;
    }

    // By a block: the exchange is over when all ranks of this node and all of this rail have said so.
    static __device__ __forceinline__ void await_all(Shared& shared, const Exchange& exchange, u32 number) {
        for (i32 i = threadIdx.x; i < exchange.locals + exchange.nodes; i += THREADS) {
            i32 other = i < exchange.locals ? exchange.neighbour(i) : exchange.on_rail(i - exchange.locals);
            if (other == exchange.rank) continue;
            if (!exchange.wait(&exchange.words(exchange.rank).over[exchange.slot][other], number, other, Step::OVER)) shared.complete = 0;
        }
        ptx::fence_system();
        __syncthreads();
        if (threadIdx.x == 0 && exchange.is_aborted()) shared.complete = 0;  // whoever has given up said so before
    }
};

}  // namespace nodes
