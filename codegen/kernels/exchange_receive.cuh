// This rank's own rows, and those that came from the others, out of the memory that these write to, which they may write to
// again. A row is copied as soon as it is there: to its place, or, if its experts' rows are known already, to each of these. Where
// nothing came places are not written, and have no expert; rows that experts expect all the same are NaN.
//
// Or, if rows STAY, all but these, which stay where they are until somebody says that they have been read (exchange_send.cuh): then a lane
// waits for each row, and all of them take what belongs to their experts together.
//
// The grid begins while rows are still being sent, by the kernel before it (exchange_send.cuh): it writes only what was
// allocated before that one, and ends after it.
#pragma once
#include "parts.cuh"
#include "peer.cuh"

template <typename Id, bool STAY, typename Exchange = Peers>
struct ExchangeReceive {
    static constexpr i32 THREADS = 256, BLOCKS = 1, WARPS = THREADS / 32, HELD = 7;  // pieces of a row in a lane's hands
    static constexpr i32 NOT_A_NUMBER = 0x7fff7fff;                                  // in bf16, fp16 and float32
    struct Arguments {
        Exchange peers;
        const u8* x;               // (tokens, H), lines of `line` bytes: what this rank sends
        const i32* sent;           // (ranks, capacity): the line for each place, -1 behind the last
        const Id* own_ids;         // (tokens, top_k), or null
        const u8* own_weights;     // (tokens, top_k) of `weight` bytes, 2 or 4, or null
        uint4* rows;               // (ranks * capacity, pieces) of 16 bytes, or the experts'; null if they STAY
        i32* ids;                  // (ranks * capacity, top_k), counted from this rank's first; or null
        u8* weights;               // (ranks * capacity, top_k) of `weight` bytes; or null
        i32* came;                 // (ranks,): how many rows came from each
        const i32* own_slots;      // (tokens, top_k): the rows of this rank's own assignments to experts of its own; if rows STAY.
        const i32* own_offsets;    // (experts,): of each expert the first so many times `multiple` of them are somebody else's,
        i32 multiple;              // and have no expert here
        const i32* slots;          // (ranks * capacity, spread): the rows that a place's row is copied to, -1 for none; null: its own
        i32 spread;
        i32 line, pieces, top_k, weight, experts;  // experts of each rank
    };
    struct Shared {
        i32 unused;
    };
    using Row = typename Exchange::Row;
    using Step = typename Exchange::Steps;

    static __device__ __forceinline__ void run(const Arguments& arguments, const Grid& grid = Grid::whole()) {
        const Exchange& peers = arguments.peers;
        u32 exchange = exchange_of(peers.words(peers.rank).ended[peers.slot]);
        i32 warps = grid.blocks * WARPS, first = grid.block * WARPS + threadIdx.x / 32;
        if constexpr (STAY) {
            i32 each = (peers.capacity + 31) / 32;
            for (i32 batch = first; batch < peers.ranks * each; batch += warps)
                take_words(arguments, sender(peers, batch / each), batch % each * 32, exchange);
        } else {
            for (i32 place = first; place < peers.capacity; place += warps) take_own(arguments, place);
            for (i32 turn = 1; turn < peers.ranks; turn++)
                for (i32 place = first; place < peers.capacity; place += warps) take(arguments, sender(peers, turn), place, exchange);
        }
        for (i32 from = first; from < peers.ranks; from += warps) count(arguments, from, exchange);
        __syncthreads();
        if (threadIdx.x == 0 && !STAY) peers.done_reading(grid);
        ptx::take_turn();  // whoever waits for this grid waits for those before it, too
    }

    // The ranks, this one first, then in the order in which they send to this one.
    static __device__ __forceinline__ i32 sender(const Exchange& peers, i32 turn) {
        return (peers.rank + peers.ranks - turn) % peers.ranks;
    }

    // By a warp, as are all that follow: of 32 places what belongs to their experts.
    static __device__ __forceinline__ void take_words(const Arguments& arguments, i32 from, i32 first, u32 exchange) {
        const Exchange& peers = arguments.peers;
        i32 lane = threadIdx.x % 32, place = first + lane, token = -1;  // of this rank's own
        bool own = from == peers.rank, here = false;
        if (place < peers.capacity && own)
            token = __ldcg(arguments.sent + i64(from) * peers.capacity + place), here = token >= 0;
        else if (place < peers.capacity)
            here = peers.wait_for_row(from, place, exchange, Step::RECEIVE) == Row::HERE;
        u32 there = __ballot_sync(~0u, here);
        i32 count = min(32, peers.capacity - first) * arguments.top_k;
        i64 row = i64(from) * peers.capacity + first;
#pragma unroll 4
        for (i32 begin = 0; begin < count; begin += 32) {
            i32 number = min(begin + lane, count - 1), of = number / arguments.top_k, k = number % arguments.top_k;
            i64 at = i64(__shfl_sync(~0u, token, of)) * arguments.top_k + k;
            const u8* behind = peers.record(peers.rank, from, first + of) + 16 * arguments.pieces;
            const u8* weight = behind + 4 * arguments.top_k + k * arguments.weight;
            if (own) weight = arguments.own_weights + at * arguments.weight;
            bool is_there = there >> of & 1;
            i32 id = -1;
            if (is_there) id = own ? left(arguments, at, i32(__ldcg(arguments.own_ids + at))) : __ldcg(reinterpret_cast<const i32*>(behind) + k);
            put_id(arguments, row + of, k, id);
            if (arguments.weights) put_weight(arguments, row + of, k, is_there ? weight : nullptr);
        }
    }

    static __device__ __forceinline__ void take_own(const Arguments& arguments, i32 place) {
        const Exchange& peers = arguments.peers;
        i32 token = __ldcg(arguments.sent + i64(peers.rank) * peers.capacity + place), lane = threadIdx.x % 32;
        i64 row = i64(peers.rank) * peers.capacity + place, at = i64(token) * arguments.top_k + lane;
        put_row(arguments, row, arguments.x + i64(token) * arguments.line, token >= 0 ? Row::HERE : Row::NONE);
        if (lane >= arguments.top_k) return;
        if (arguments.ids) put_id(arguments, row, lane, token < 0 ? -1 : i32(__ldcg(arguments.own_ids + at)));
        if (arguments.weights) put_weight(arguments, row, lane, token < 0 ? nullptr : arguments.own_weights + at * arguments.weight);
    }

    // The expert of one of this rank's own assignments, or -1 if that is somebody else's.
    static __device__ __forceinline__ i32 left(const Arguments& arguments, i64 assignment, i32 id) {
        i32 slot = __ldcg(arguments.own_slots + assignment), expert = id - arguments.peers.rank * arguments.experts;
        return is_whole(slot, expert, arguments.own_offsets, arguments.multiple) ? -1 : id;
    }

    static __device__ __forceinline__ void take(const Arguments& arguments, i32 from, i32 place, u32 exchange) {
        const Exchange& peers = arguments.peers;
        i32 lane = threadIdx.x % 32;
        i64 row = i64(from) * peers.capacity + place;
        const u8* record = peers.record(peers.rank, from, place);
        Row found = Row::NONE;
        if (lane == 0) found = peers.wait_for_row(from, place, exchange, Step::RECEIVE);
        found = Row(__shfl_sync(~0u, i32(found), 0));
        put_row(arguments, row, record, found);
        if (lane >= arguments.top_k) return;
        const u8* behind = record + 16 * arguments.pieces;
        const u8* weights = behind + (arguments.ids ? 4 * arguments.top_k : 0) + lane * arguments.weight;
        if (arguments.ids) put_id(arguments, row, lane, found == Row::HERE ? __ldcg(reinterpret_cast<const i32*>(behind) + lane) : -1);
        if (arguments.weights) put_weight(arguments, row, lane, found == Row::HERE ? weights : nullptr);
    }

    // How many rows a rank has sent.
    static __device__ __forceinline__ void count(const Arguments& arguments, i32 from, u32 exchange) {
        const Exchange& peers = arguments.peers;
        i32 lane = threadIdx.x % 32, rows = 0, lost = 0;
        if (from == peers.rank) {
            for (i32 place = lane; place < peers.capacity; place += 32)
                rows += __ldcg(arguments.sent + i64(from) * peers.capacity + place) >= 0;
        } else {
            rows = peers.wait_for_all(from, exchange, Step::RECEIVE);
            lost = rows < 0;
            if (lane) rows = 0;  // all lanes know it
        }
        lost |= peers.is_aborted();
        rows = __reduce_add_sync(~0u, rows), lost = __any_sync(~0u, lost);
        if (lane == 0) arguments.came[from] = lost ? 0 : rows;
    }

    // By a warp: a row that is there is copied, one that is lost is NaN, and so is what its experts expect and did not come. Loads
    // go past L1, which does not see what other devices write.
    static __device__ __forceinline__ void put_row(const Arguments& arguments, i64 row, const u8* line, Row found) {
        if (found == Row::NONE && !arguments.slots) return;
        constexpr i32 N = NOT_A_NUMBER;
        const uint4* from = reinterpret_cast<const uint4*>(line);
        for (i32 at = threadIdx.x % 32; at < arguments.pieces; at += 32 * HELD) {
            uint4 held[HELD];
#pragma unroll
            for (i32 i = 0; i < HELD; i++) {
                held[i] = make_uint4(N, N, N, N);
                if (found == Row::HERE && at + 32 * i < arguments.pieces) held[i] = __ldcg(from + at + 32 * i);
            }
            if (!arguments.slots) store(arguments, row, at, held);
            for (i32 k = 0; arguments.slots && k < arguments.spread; k++) {
                i32 slot = __ldcg(arguments.slots + row * arguments.spread + k);
                if (slot >= 0) store(arguments, slot, at, held);
            }
        }
    }

    static __device__ __forceinline__ void store(const Arguments& arguments, i64 row, i32 at, const uint4 (&held)[HELD]) {
        uint4* to = arguments.rows + row * arguments.pieces;
#pragma unroll
        for (i32 i = 0; i < HELD; i++)
            if (at + 32 * i < arguments.pieces) to[at + 32 * i] = held[i];
    }

    // By a lane, what belongs to an expert of the row: of all ranks' experts, or -1.
    static __device__ __forceinline__ void put_id(const Arguments& arguments, i64 row, i32 k, i32 id) {
        id -= id < 0 ? 0 : arguments.peers.rank * arguments.experts;
        arguments.ids[row * arguments.top_k + k] = id >= 0 && id < arguments.experts ? id : -1;
    }

    static __device__ __forceinline__ void put_weight(const Arguments& arguments, i64 row, i32 k, const u8* weight) {
        i64 at = row * arguments.top_k + k;
        if (arguments.weight == 4)
            reinterpret_cast<u32*>(arguments.weights)[at] = weight ? __ldcg(reinterpret_cast<const u32*>(weight)) : 0;
        else
            reinterpret_cast<u16*>(arguments.weights)[at] = weight ? __ldcg(reinterpret_cast<const u16*>(weight)) : 0;
    }
};
