// Memory that ranks of several nodes write into each other's, and how they say what they have written.
// moecompile/runtime/node_memory.py lays it out alike:
//
//     words           NodeWords: of whom an exchange was aborted, counters, and of each slot what ranks tell each other
//     landed          (SLOTS, ranks, flags) 64 bits each: the exchange whose row of that rank lies at that place
//     homed           (SLOTS, nodes, flags) likewise, of rows that were summed on that node
//     rows            of each slot `room` times 16 bytes. In these (ranks, capacity) records of `pitch` bytes, by the rank that
//                     they come from; and behind them, of a combine (nodes, capacity) records, by the node that they come from,
//                     of a dispatch rings of (nodes, channels, ring, chunk) records of `ring_pitch` bytes
//
// A rank is `node * locals + rail`. Ranks of one rail, one on each node, are connected by the network, those of one node by
// NVLink. What goes to another node goes to the rank of its own rail there, once, and from there to the ranks that are to have it.
//
// Exchanges of a slot are counted from 1 on each rank, and chunks that a ring takes from 0, on both its ends: nothing is cleared,
// and a launch may be captured and repeated. Every place is known before a byte moves, so rows may come in any order.
#pragma once
#include "waits.cuh"

namespace nodes {

constexpr i32 RANKS = 64, NODES = 16, LOCALS = 8, SLOTS = 4, CHANNELS = 32, RING = 8;  // at most

enum class Role { SEND, PASS, HAND };  // to other nodes; what came from them to this node; within this node
constexpr i32 ROLES = 3;

struct Words {
    u64 aborted;  // a failure, of whoever gave up
    u64 reserved[15];
    u32 begun[SLOTS][2];                  // exchanges that this rank has sent its part of; blocks that are done with that
    u32 ended[SLOTS][2];                  // exchanges that it has read its part of; likewise
    u32 claimed[SLOTS][ROLES][NODES][CHANNELS];  // pieces of work of this exchange that warps of this rank have taken
    u32 chunks[SLOTS][2][NODES][CHANNELS];       // chunks of rings before this exchange: sent there, passed on from there
    u64 taken[SLOTS][RANKS];              // the last exchange whose rows that rank has read, written by that rank
    u64 over[SLOTS][RANKS];               // the last combine that has ended there
    u64 coming[SLOTS][RANKS];             // an exchange, and how many rows that rank sends in it
    u64 announced[SLOTS][NODES][1 + LOCALS];    // likewise: records that come by the ring, and rows for each rank of this node
    u64 filled[SLOTS][NODES][CHANNELS][RING];   // chunks that have come by that place of the ring, all before it included
    u64 freed[SLOTS][NODES][CHANNELS][RING];    // chunks sent there by that place that have been passed on: its credits
};

// What a rank was doing when it gave up, as moecompile/runtime/node_memory.py says it.
enum class Step { CREDIT, LAND, PASS, RECEIVE, SUM, HOME, OVER, ROWS, LEFT };
__device__ __forceinline__ u64 tagged(u32 exchange, u32 count) { return u64(exchange) << 32 | count; }

// How much of a word is of that exchange: -1 if it is none of it.
__device__ __forceinline__ i32 untagged(u64 word, u32 exchange) { return u32(word >> 32) == exchange ? i32(u32(word)) : -1; }

// One exchange, as this rank sees it: the first argument of its kernels.
struct Exchange : Waits<Exchange, Step> {
    const u64* bases;  // (ranks,): where each rank's memory begins, for this device; of one on a network, its number there
    u64* told;         // a word of the host's, which a failure is written to
    i32 rank, ranks, nodes, locals, node, rail;  // of `nodes` nodes of `locals` ranks, which are divided once, by the host
    i32 slot, room, capacity, pitch, channels, ring, chunk, flags;
    i32 patience;      // milliseconds that a wait may take
    i32 networked;     // whether other nodes are on a network, and not in this device's reach

    __device__ __forceinline__ bool reaches(i32 of) const { return !networked || of / locals == node; }
    __device__ __forceinline__ i32 on_rail(i32 of_node) const { return of_node * locals + rail; }
    __device__ __forceinline__ i32 neighbour(i32 of_rail) const { return node * locals + of_rail; }
    __device__ __forceinline__ i32 ring_pitch() const { return pitch + (4 * locals + 15) / 16 * 16; }
    __device__ __forceinline__ u8* base(i32 of) const { return reinterpret_cast<u8*>(__ldg(bases + of)); }
    __device__ __forceinline__ Words& words(i32 of) const { return *reinterpret_cast<Words*>(base(of)); }

    // Bytes from the beginning of a rank's memory: what it says of a row, and the row.
    __device__ __forceinline__ i64 landed(i32 from, i32 place) const {
        return i64(sizeof(Words)) + 8 * ((i64(slot) * ranks + from) * flags + place);
    }
    __device__ __forceinline__ i64 homed(i32 from_node, i32 place) const {
        return i64(sizeof(Words)) + 8 * ((i64(SLOTS) * ranks + slot * nodes + from_node) * flags + place);
    }
    __device__ __forceinline__ i64 rows() const {
        return (i64(sizeof(Words)) + i64(8) * SLOTS * (ranks + nodes) * flags + 127) / 128 * 128 + i64(16) * slot * room;
    }
    __device__ __forceinline__ i64 record(i32 from, i32 place) const { return rows() + (i64(from) * capacity + place) * pitch; }
    __device__ __forceinline__ i64 home_record(i32 from_node, i32 place) const { return record(ranks + from_node, place); }
    __device__ __forceinline__ i64 ring_record(i32 node, i32 channel, i32 place, i32 number) const {
        return record(ranks, 0) + (((i64(node) * channels + channel) * ring + place) * chunk + number) * ring_pitch();
    }
    // Where that record of this rank's own memory is.
    __device__ __forceinline__ u8* record(i32 at, i32 from, i32 place) const { return base(at) + record(from, place); }
    template <typename Word>
    __device__ __forceinline__ i64 offset_of(const Word& word) const {  // of this rank's words: the same on all ranks
        return reinterpret_cast<const u8*>(&word) - base(rank);
    }

    // How many rows a rank sends; less than none if that will not be known.
    __device__ __forceinline__ i32 wait_for_count(i32 from, u32 exchange, Step step) const {
        u64 found = wait(&words(rank).coming[slot][from], tagged(exchange, 0), from, step);
        return found ? i32(u32(found)) : -1;
    }

    // Until the row at that place of another rank's is here, or will not come.
    enum class Row { HERE, NONE, LOST };
    __device__ __forceinline__ Row wait_for_row(i32 from, i32 place, u32 exchange, Step step) const {
        const u64* flag = reinterpret_cast<const u64*>(base(rank) + landed(from, place));
        if (ptx::load_relaxed_system(flag) < exchange) {  // a row that is here was counted
            i32 count = wait_for_count(from, exchange, step);
            if (count >= 0 && place >= count) return Row::NONE;
            if (count < 0 || !wait(flag, exchange, from, step)) return Row::LOST;
        }
        ptx::fence_system();
        return Row::HERE;
    }

    // By a warp: how many rows another has sent, once all are here; less than none if that will not be.
    __device__ __forceinline__ i32 wait_for_all(i32 from, u32 exchange, Step step) const {
        i32 count = wait_for_count(from, exchange, step), lost = count < 0;
        for (i32 place = threadIdx.x % 32; place < count; place += 32) lost |= wait_for_row(from, place, exchange, step) == Row::LOST;
        return __any_sync(~0u, lost) ? -1 : count;
    }

};

}  // namespace nodes
