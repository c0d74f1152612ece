// Memory that ranks write into each other's, and how they say what they have written. moecompile/runtime/peer_memory.py lays
// it out alike:
//
//     words           WORDS bytes: of whom an exchange was aborted, counters, and of each slot
//         taken       (ranks,)             the last exchange whose rows that rank has read here, written by that rank
//         arrived     (ranks, CHANNELS)    of that rank's channel: the exchange, how many of its rows are there, and whether
//                                          these are all
//     rows            of each slot `room` times 16 bytes, and in these (ranks, capacity) records of `pitch` bytes: the rows
//                     of its exchange, by the rank they come from
//
// Exchanges of a slot are counted from 1 on each rank, by words of its own that its kernels advance: nothing is ever cleared,
// and a launch may be captured and repeated. An exchange writes a rank's rows when that rank has read the ones before. A rank's
// own rows do not travel: who reads the others' reads them where they are.
#pragma once
#include "waits.cuh"

constexpr i32 RANKS = 16, SLOTS = 8, CHANNELS = 256;  // at most
constexpr u32 ALL = 1u << 31;                          // in a word of `arrived`, above the number of rows

struct PeerWords {
    u64 aborted;              // a Failure, of whoever gave up
    u64 reserved[15];
    u32 begun[SLOTS][2];      // exchanges that this rank has sent its part of; blocks that are done with that
    u32 ended[SLOTS][2];      // exchanges that it has read its part of; likewise
    u64 taken[SLOTS][RANKS];
    u64 arrived[SLOTS][RANKS][CHANNELS];
};

// What a rank was doing when it gave up. For the last two it was not waiting for anybody: it had no room for rows of experts; or
// it has never read all of the exchange before, in that slot, since something failed on its host.
enum class Step { SEND, RECEIVE, HOME, ROWS, LEFT };
// One exchange, as this rank sees it: the first argument of its kernels.
struct Peers : Waits<Peers, Step> {
    const u64* bases;  // (ranks,): where each rank's memory begins, for this device
    u64* told;         // a word of the host's, which a failure is written to
    i32 rank, ranks, slot, room, capacity, pitch, channels;
    i32 patience;      // milliseconds that a wait may take

    __device__ __forceinline__ bool reaches(i32) const { return true; }
    __device__ __forceinline__ PeerWords& words(i32 of) const { return *reinterpret_cast<PeerWords*>(__ldg(bases + of)); }
    // The record at that rank which has that place among those of `from`.
    __device__ __forceinline__ u8* record(i32 at, i32 from, i32 place) const {
        u8* rows = reinterpret_cast<u8*>(__ldg(bases + at)) + sizeof(PeerWords);
        return rows + 16 * i64(slot) * room + (i64(from) * capacity + place) * pitch;
    }

    // Until all of a channel's rows are here: how many; less than none if that will not be.
    __device__ __forceinline__ i32 wait_for_all(i32 from, i32 channel, u32 exchange, Step step) const {
        u64 found = wait(&words(rank).arrived[slot][from][channel], u64(exchange) << 32 | ALL, from, step);
        return found ? i32(u32(found) & ALL - 1) : -1;
    }

    // By a warp: how many rows another has sent, once all are here; less than none if that will not be.
    __device__ __forceinline__ i32 wait_for_all(i32 from, u32 exchange, Step step) const {
        i32 rows = 0, lost = 0;
        for (i32 channel = threadIdx.x % 32; channel < channels; channel += 32) {
            i32 found = wait_for_all(from, channel, exchange, step);
            lost |= found < 0;
            rows += found;
        }
        rows = __reduce_add_sync(~0u, rows);
        return __any_sync(~0u, lost) ? -1 : rows;
    }

    // Until the row at that place of another rank's is here, or will not come.
    enum class Row { HERE, NONE, LOST };
    __device__ __forceinline__ Row wait_for_row(i32 from, i32 place, u32 exchange, Step step) const {
        u32 number = place / channels;
        u64 found = wait(&words(rank).arrived[slot][from][place % channels], u64(exchange) << 32 | number + 1, from, step);
        ptx::fence_system();
        return !found ? Row::LOST : (u32(found) & ALL - 1) > number ? Row::HERE : Row::NONE;
    }

    // By one thread of each block of a kernel that reads rows, when the block is done.
    __device__ __forceinline__ void done_reading(const Grid& grid) const;
    // By one thread alone, when kernels that were before its own have read all of the next exchange in that slot.
    __device__ __forceinline__ void tell_all_read(i32 of) const;
};

__device__ __forceinline__ void Peers::done_reading(const Grid& grid) const {
    if (grid.is_last_block(words(rank).ended[slot][1])) tell_all_read(slot);
}

__device__ __forceinline__ void Peers::tell_all_read(i32 of) const {
    u32(&ended)[2] = words(rank).ended[of], exchange = exchange_of(ended);
    ended[0] = exchange;
    ptx::fence_system();
    for (i32 other = 0; other < ranks; other++) ptx::store_release_system(&words(other).taken[of][rank], exchange);
}
