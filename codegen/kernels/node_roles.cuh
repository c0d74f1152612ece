// How the warps of a channel share what there is to do. A channel is two blocks, and every so-manieth piece of work of each kind
// is its own. Its warps begin in roles, as many in each as it has of that work in this launch; a warp whose role has nothing left
// takes another one up. Work is claimed piece by piece, so that nobody waits for who is slow.
#pragma once
#include "transport.cuh"

namespace nodes {

constexpr i32 WARPS = 4, PARTS = 3, BYTES = 54 * 1024;  // of a block; of a warp's shared memory

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

// Memory of a warp's transport; `far`: 1 for that between nodes, 0 for the other.
template <typename Near, typename Far>
__device__ __forceinline__ u8* scratch_of(u8* scratch, const Grid& grid, i32 warp, i32 far) {
    constexpr i64 EACH = Near::SCRATCH > Far::SCRATCH ? Near::SCRATCH : Far::SCRATCH;
    return scratch + (2 * (grid.block * WARPS + warp) + far) * EACH;
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

}  // namespace nodes
