// How ranks exchange, in four primitives that are the same within a node and between nodes:
//
//     put       bytes of shared memory into a rank's memory, by each lane that has any; of no order with anything
//     signal    a word into a rank's memory, by each lane that has one; what was put and signalled before the last `fence` that it
//               is covered by comes before it
//     wait      until a word of this rank's own memory is at least something (`wait_together`)
//     reduce    a row's parts that came from several ranks, summed in float32 in their order: from memory, or read ahead (pieces.cuh)
//
// A kernel is compiled for a transport: to choose one costs nothing while it runs. A warp has one of its own, and all its lanes
// call it together. It is told, too, what the warp does: in which role it is, and when it begins and ends to wait.
#pragma once
#include "came.cuh"
#include "nodes.cuh"

namespace nodes {

// Where something goes: so many bytes behind the beginning of that rank's memory.
struct Target {
    i32 rank;
    i64 offset;
};

// Memory that this device writes by itself: NVLink, PCIe, or its own.
struct PeerTransport {
    struct Shared {
        u32 unused;
    };
    static constexpr i64 SCRATCH = 0;
    const Exchange& exchange;
    __device__ __forceinline__ PeerTransport(const Exchange& exchange, Shared&, u8*) : exchange(exchange) {}

    __device__ __forceinline__ void put(bool active, const Target& to, const u8* from, u32 bytes) {
        if (active) ptx::store_bytes(exchange.base(to.rank) + to.offset, from, bytes);
    }
    // What was put since the last call is a group.
    __device__ __forceinline__ void commit() { ptx::store_commit(); }
    // Until what all but the last PENDING groups were put from may be overwritten.
    template <i32 PENDING>
    __device__ __forceinline__ void sources_free() {
        ptx::store_wait_read<PENDING>();
        __syncwarp();
    }
    // All but the last PENDING groups come before whatever is signalled from here on.
    template <i32 PENDING>
    __device__ __forceinline__ void fence() {
        ptx::store_wait<PENDING>();
        ptx::fence_async_all();
        __syncwarp();
    }
    __device__ __forceinline__ void signal(bool active, const Target& to, u64 value) {
        if (active) tell(exchange, to, value);
    }
    // By a thread that has put nothing.
    static __device__ __forceinline__ void tell(const Exchange& exchange, const Target& to, u64 value) {
        ptx::store_release_system(reinterpret_cast<u64*>(exchange.base(to.rank) + to.offset), value);
    }
    // While the warp waits for something.
    __device__ __forceinline__ void progress() {}
    // Until all is under way.
    __device__ __forceinline__ void drain() {}
    __device__ __forceinline__ void begins(Role) {}
    __device__ __forceinline__ void waits() {}
    __device__ __forceinline__ void goes_on() {}
};

// The same, for who wants to know what warps do: cycles of each role, and those of them that a warp has waited in.
struct MeteredTransport : PeerTransport {
    static constexpr i64 SCRATCH = 16 * ROLES;  // of each warp
    u64* cycles;
    i32 role = -1;
    u64 begun = 0, since = 0, waited = 0;
    __device__ __forceinline__ MeteredTransport(const Exchange& exchange, Shared& shared, u8* scratch)
        : PeerTransport(exchange, shared, scratch), cycles(reinterpret_cast<u64*>(scratch)) {}
    __device__ __forceinline__ void begins(Role next) {
        u64 now = clock64();
        if (role >= 0 && threadIdx.x % 32 == 0) cycles[2 * role] += now - begun, cycles[2 * role + 1] += waited;
        role = i32(next), begun = now, waited = 0;
    }
    __device__ __forceinline__ void waits() {
        if (!since) since = clock64();
    }
    __device__ __forceinline__ void goes_on() {
        if (since) waited += clock64() - since;
        since = 0;
    }
    __device__ __forceinline__ void drain() { begins(Role::SEND), role = -1; }
};

// The same, for tests: what is put or signalled is held back, and delivered late and in any order that fences allow. A network
// does so, and peer memory hides what a missing fence or a source that is overwritten too early would do there. What travels
// is counted: bytes that were put, by rank.
struct FaultyTransport {
    static constexpr i32 HELD = 16, BYTES = 27 * 1024;  // puts and signals that a warp holds back, and bytes of a put, at most
    static constexpr i64 SCRATCH = i64(HELD) * BYTES + 8 * RANKS;  // bytes that a warp needs: sources, and counters
    struct Entry {
        u64 to, value;  // where it goes; a word, if there are no bytes
        u32 bytes, group;
    };
    struct Shared {
        Entry entries[HELD];
    };
    const Exchange& exchange;
    Shared& shared;
    u8* scratch;
    i32 held = 0;
    u32 group = 0, used = 0, chance;  // used: a bit for each part of the scratch
    __device__ __forceinline__ FaultyTransport(const Exchange& exchange, Shared& shared, u8* scratch)
        : exchange(exchange), shared(shared), scratch(scratch), chance(u32(clock()) | 1) {
        chance = __shfl_sync(~0u, chance, 0);
    }
    __device__ __forceinline__ u32 random(u32 below) {
        chance = chance * 1664525u + 1013904223u;
        return (chance >> 8) % below;
    }

    // Of one lane's, by all.
    __device__ __noinline__ void hold(u64 to, u64 value, const u8* from, u32 bytes) {
        if (held == HELD) deliver(random(HELD));
        i32 lane = threadIdx.x % 32, place = __ffs(~used) - 1;
        for (u32 at = 16 * lane; at < bytes; at += 512)
            *reinterpret_cast<uint4*>(scratch + i64(place) * BYTES + at) = *reinterpret_cast<const uint4*>(from + at);
        if (lane == 0) shared.entries[held] = {to, bytes ? u64(place) : value, bytes, group};
        if (bytes) used |= 1u << place;
        held++;
        __syncwarp();
    }
    __device__ __noinline__ void deliver(i32 number) {
        i32 lane = threadIdx.x % 32;
        __syncwarp();
        Entry entry = shared.entries[number];
        const u8* from = scratch + i64(entry.bytes ? entry.value : 0) * BYTES;
        for (u32 at = 16 * lane; at < entry.bytes; at += 512)
            __stcg(reinterpret_cast<uint4*>(entry.to + at), __ldcg(reinterpret_cast<const uint4*>(from + at)));
        if (!entry.bytes && lane == 0) ptx::store_release_system(reinterpret_cast<u64*>(entry.to), entry.value);
        if (entry.bytes) used &= ~(1u << u32(entry.value));
        held--;
        __syncwarp();
        if (lane == 0) shared.entries[number] = shared.entries[held];
        __syncwarp();
    }
    __device__ __noinline__ void deliver_until(u32 last) {
        for (;;) {
            u32 due = __ballot_sync(~0u, i32(threadIdx.x % 32) < held && shared.entries[threadIdx.x % 32].group <= last);
            if (!due) break;
            u32 which = random(__popc(due));
            for (u32 i = 0; i < which; i++) due &= due - 1;
            deliver(__ffs(due) - 1);
        }
        ptx::fence_system();
        __syncwarp();
    }

    __device__ __forceinline__ void put(bool active, const Target& to, const u8* from, u32 bytes) {
        u64 at = active ? u64(exchange.base(to.rank) + to.offset) : 0, source = u64(from);
        if (active) atomicAdd(reinterpret_cast<u64*>(scratch + i64(HELD) * BYTES) + to.rank, u64(bytes));
        for (u32 lanes = __ballot_sync(~0u, active); lanes; lanes &= lanes - 1) {
            i32 lane = __ffs(lanes) - 1;
            hold(__shfl_sync(~0u, at, lane), 0, reinterpret_cast<const u8*>(__shfl_sync(~0u, source, lane)),
                 __shfl_sync(~0u, bytes, lane));
        }
    }
    __device__ __forceinline__ void commit() { group++; }
    template <i32 PENDING>
    __device__ __forceinline__ void sources_free() {
        __syncwarp();
    }
    template <i32 PENDING>
    __device__ __forceinline__ void fence() {
        if (group > PENDING) deliver_until(group - PENDING - 1);
        __syncwarp();
    }
    __device__ __forceinline__ void signal(bool active, const Target& to, u64 value) {
        u64 at = active ? u64(exchange.base(to.rank) + to.offset) : 0;
        for (u32 lanes = __ballot_sync(~0u, active); lanes; lanes &= lanes - 1) {
            i32 lane = __ffs(lanes) - 1;
            hold(__shfl_sync(~0u, at, lane), __shfl_sync(~0u, value, lane), nullptr, 0);
        }
        // of the group that comes next: who covers that covers the word
    }
    __device__ __forceinline__ void progress() {
        if (held && random(4) == 0) deliver(random(held));
    }
    __device__ __forceinline__ void drain() { deliver_until(~0u); }
    __device__ __forceinline__ void begins(Role) {}
    __device__ __forceinline__ void waits() {}
    __device__ __forceinline__ void goes_on() {}
};

// By a warp, each lane for itself or not at all, until every word that is waited for is at least that. False if that will not be.
template <typename... Transports>
__device__ __forceinline__ bool wait_together(const Exchange& exchange, bool active, const u64* word, u64 at_least, i32 other,
                                              Step step, Transports&... transports) {
    u64 deadline = 0;
    (transports.waits(), ...);
    for (u32 turn = 0;; turn++) {
        bool missing = active && ptx::load_relaxed_system(word) < at_least;
        if (!__any_sync(~0u, missing)) break;
        bool hopeless = turn % 64 == 0 && missing && exchange.is_hopeless(deadline, other, step);
        if (__any_sync(~0u, hopeless)) return false;
        (transports.progress(), ...);
    }
    (transports.goes_on(), ...);
    ptx::fence_system();
    return true;
}

// An exchange in kernels that read rows, and say so by a transport between nodes.
template <typename Far>
struct Reading : Exchange {
    // By one thread of each block, when the block is done: those who write here may write again.
    __device__ __forceinline__ void done_reading(const Grid& grid) const {
        u32(&ended)[2] = words(rank).ended[slot];
        if (!grid.is_last_block(ended[1])) return;
        u32 exchange = exchange_of(ended);
        ended[0] = exchange;
        ptx::fence_system();
        i64 word = offset_of(words(rank).taken[slot][rank]);
        for (i32 of_rail = 0; of_rail < locals; of_rail++) PeerTransport::tell(*this, {neighbour(of_rail), word}, exchange);
        for (i32 of_node = 0; of_node < nodes; of_node++)
            if (of_node != node) Far::tell(*this, {on_rail(of_node), word}, exchange);
    }
};

// Eight columns of a row: the sum of its parts, of which some may not be there.
template <typename Result>
__device__ __forceinline__ void reduce(const u8* const* parts, i32 count, i32 column, float (&sum)[8]) {
    for (i32 i = 0; i < count; i++) {
        if (!parts[i]) continue;
        float v[8];
        Came<Result>::eight(parts[i], column, v);
#pragma unroll
        for (i32 j = 0; j < 8; j++) sum[j] += v[j];
    }
}

}  // namespace nodes
