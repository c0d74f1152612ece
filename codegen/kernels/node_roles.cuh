// How the warps of a channel share what there is to do. A channel is two blocks, and every so-manieth piece of work of each kind
// is its own. Its warps begin in roles, as many in each as it has of that work in this launch; a warp whose role has nothing left
// takes another one up. Work is claimed piece by piece, so that nobody waits for who is slow.
#pragma once
#include "transport.cuh"

namespace nodes {

constexpr i32 WARPS = 4, PARTS = 3, BYTES = 54 * 1024;  // of a block; of a warp's shared memory
constexpr i32 CHUNK = 32;                               // records of a chunk at most

// Of so many pieces of work, those that a channel has.
__device__ __forceinline__ i32 share(i32 pieces, i32 channel, i32 channels) {
    return pieces > channel ? (pieces - channel + channels - 1) / channels : 0;
}

// The role that a warp begins in: `work` says how much there is of each, in any unit.
__device__ __forceinline__ Role first_role(const i32 (&work)[ROLES], const Grid& grid, i32 warp) {
    constexpr i32 ALL = 2 * WARPS;
    i32 number = grid.block % 2 * WARPS + warp, total = 0, rest = ALL, least = 0;
    for (i32 role = 0; role < ROLES; role++) total += work[role], least += work[role] > 0;
    for (i32 role = 0; role < ROLES; role++) {
        if (!work[role]) continue;
        least--;
        i32 warps = min(max(1, i32((i64(ALL) * work[role] + total / 2) / total)), rest - least);
        if (least == 0) warps = rest;
        if (number < ALL - rest + warps) return Role(role);
        rest -= warps;
    }
    return Role::SEND;
}

// Parts of a warp's shared memory, which rows come to in bulk and leave from.
struct Pipe {
    u8* rows;
    u64* full;
    i32 parts, bytes;  // of each
    i32 at = 0;        // the part that is filled next
    u32 parity = 0;    // a bit for each part

    // For records of so many bytes.
    __device__ __forceinline__ Pipe(u8* rows, u64* full, i32 pitch)
        : rows(rows), full(full), parts(min(PARTS, BYTES / pitch)), bytes(BYTES / parts / 128 * 128) {
        if (threadIdx.x % 32 < parts) ptx::barrier_init(full + threadIdx.x % 32, 1);
        ptx::barrier_init_fence();
        __syncwarp();
    }
    __device__ __forceinline__ u8* part(i32 number) const { return rows + number * bytes; }

    // Batches one after the other: `load(batch, rows, barrier)` begins to fill a part, `use(batch, rows)` puts what is in it, as
    // one group. Nothing is in the parts before.
    template <typename Transport, typename Load, typename Use>
    __device__ __forceinline__ void run(i32 batches, Transport& transport, Load load, Use use) {
        i32 next = at;
        if (batches) load(0, part(next), full + next);
        for (i32 batch = 0; batch < batches; batch++) {
            i32 now = next;
            next = now + 1 == parts ? 0 : now + 1;
            if (batch + 1 < batches) {
                if (parts == PARTS)
                    transport.template sources_free<1>();
                else
                    transport.template sources_free<0>();
                load(batch + 1, part(next), full + next);
            }
            ptx::barrier_wait(full + now, parity >> now & 1);
            parity ^= 1u << now;
            use(batch, part(now));
            transport.commit();
        }
        at = next;
    }
};

// A warp's shared memory, beside its rows.
template <typename Near, typename Far>
struct WarpMemory {
    u64 full[PARTS];
    typename Near::Shared near;
    typename Far::Shared far;
};

// What every warp that sends knows.
template <typename Near, typename Far>
struct Sender {
    const Exchange& exchange;
    Words& words;
    Near near;
    Far far;
    Pipe pipe;
    u32 number;  // of the exchange
    i32 channel;
    bool lost = false, may_land = false;  // lost: the exchange was aborted, and nothing is written any more
    __device__ __forceinline__ Sender(const Exchange& exchange, WarpMemory<Near, Far>& memory, u8* rows, i32 pitch, u8* scratch,
                                      const Grid& grid, i32 warp)
        : exchange(exchange), words(exchange.words(exchange.rank)), near(exchange, memory.near, scratch_of(scratch, grid, warp, 0)),
          far(exchange, memory.far, scratch_of(scratch, grid, warp, 1)), pipe(rows, memory.full, pitch),
          number(exchange_of(words.begun[exchange.slot])), channel(grid.block / 2) {}
    __device__ __forceinline__ i32 lane() const { return threadIdx.x % 32; }

    // Memory of a transport, of which a warp has two.
    static __device__ __forceinline__ u8* scratch_of(u8* scratch, const Grid& grid, i32 warp, i32 transport) {
        constexpr i64 EACH = Near::SCRATCH > Far::SCRATCH ? Near::SCRATCH : Far::SCRATCH;
        return scratch + (2 * (grid.block * WARPS + warp) + transport) * EACH;
    }

    // Chunks of this channel, of so many rows.
    __device__ __forceinline__ i32 chunks(i32 rows) const {
        return share((rows + exchange.chunk - 1) / exchange.chunk, channel, exchange.channels);
    }
    // The first row of one of them.
    __device__ __forceinline__ i32 first(i32 chunk) const { return (chunk * exchange.channels + channel) * exchange.chunk; }

    // Pieces of work of a role that warps of this channel have taken.
    __device__ __forceinline__ u32& claimed(Role role, i32 of = 0) const {
        return words.claimed[exchange.slot][i32(role)][of][channel];
    }
    // The next one, for this warp.
    __device__ __forceinline__ i32 claim_next(Role role) const {
        u32 number = 0;
        if (lane() == 0) number = atomicAdd(&claimed(role), 1);
        return __shfl_sync(~0u, number, 0);
    }

    // Until those that this warp is to write to, a lane for each, have read what the exchange before wrote. `read`: whether that
    // is known.
    __device__ __forceinline__ void wait_until_read(bool& read, bool active, i32 other) {
        if (read || number == 1) return;
        read = wait_together(exchange, active, &words.taken[exchange.slot][other], number - 1, other, Step::LAND, near, far);
        lost |= !read;
    }

    // The same of all ranks of this node.
    __device__ __forceinline__ void wait_to_land() {
        wait_until_read(may_land, lane() < exchange.locals, exchange.neighbour(min(lane(), exchange.locals - 1)));
    }

    // By a warp, when all is sent: ranks that only a network reaches are told if anybody has given up.
    __device__ __forceinline__ void pass_failure_on() {
        if (!exchange.networked) return;
        u64 failure = __shfl_sync(~0u, ptx::load_relaxed_system(&words.aborted), 0);
        i32 node = min(lane(), exchange.nodes - 1);
        if (!failure) return;
        far.signal(lane() < exchange.nodes && lane() != exchange.node, {exchange.on_rail(node), exchange.offset_of(words.aborted)},
                   failure);
        far.drain();
    }
};

}  // namespace nodes
