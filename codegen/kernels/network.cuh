// Ranks on other nodes, over a network, by NVSHMEM.
//
// A network reads what it sends from memory of the device, and later: what is put goes to `scratch` first, and is handed over from
// there when it is there. That is a ring, and what is in it is not overwritten before it has arrived.
#pragma once
#include "transport.cuh"

// network_functions.cuh says what they do.
extern "C" __device__ void moecompile_network_put(void* to, const void* from, u64 bytes, i32 pe);
extern "C" __device__ void moecompile_network_fence();
extern "C" __device__ void moecompile_network_signal(u64* to, u64 value, i32 pe);
extern "C" __device__ void moecompile_network_quiet();

namespace nodes {

struct NetworkTransport {
    static constexpr i32 HELD = 8;              // puts that are not handed over yet, at most
    static constexpr i64 SCRATCH = 512 * 1024;  // bytes of each warp, of memory that the network reads
    struct Entry {
        Target to;
        u32 at, bytes, group;
    };
    struct Shared {
        Entry entries[HELD];
    };
    const Exchange& exchange;
    Shared& shared;
    u8* scratch;
    i32 held = 0;
    u32 at = 0, group = 0;
    __device__ __forceinline__ NetworkTransport(const Exchange& exchange, Shared& shared, u8* scratch)
        : exchange(exchange), shared(shared), scratch(scratch) {}

    // As this rank would write it in its own memory, and the number of whose it is.
    static __device__ __forceinline__ u8* address(const Exchange& exchange, const Target& to) {
        return exchange.base(exchange.rank) + to.offset;
    }
    static __device__ __forceinline__ i32 number(const Exchange& exchange, const Target& to) {
        return i32(__ldg(exchange.bases + to.rank));
    }

    __device__ __forceinline__ void put(bool active, const Target& to, const u8* from, u32 bytes) {
        for (u32 lanes = __ballot_sync(~0u, active); lanes; lanes &= lanes - 1) {
            i32 lane = __ffs(lanes) - 1;
            u32 size = __shfl_sync(~0u, bytes, lane);
            make_room(size);
            if (i32(threadIdx.x % 32) == lane) {
                ptx::store_bytes(scratch + at, from, bytes);
                shared.entries[held] = {to, at, bytes, group};
            }
            at += size, held++;
            __syncwarp();
        }
    }
    __device__ __forceinline__ void make_room(u32 bytes) {  // ptxas 13.0 crashes, sometimes, where this is a call
        bool full = at + bytes > SCRATCH;
        if (held < HELD && !full) return;
        ptx::store_commit();
        hand_over<0>(~0u);
        if (full) quiet();
    }
    __device__ __forceinline__ void commit() { ptx::store_commit(), group++; }

    // What is of these groups, in order; all but the last PENDING bulk copies are complete by then.
    template <i32 PENDING>
    __device__ __forceinline__ void hand_over(u32 last) {
        ptx::store_wait<PENDING>();
        ptx::fence_async_all();
        ptx::fence_system();
        __syncwarp();
        i32 count = 0;
        for (; count < held && shared.entries[count].group <= last; count++) {
            const Entry& entry = shared.entries[count];
            moecompile_network_put(address(exchange, entry.to), scratch + entry.at, entry.bytes, number(exchange, entry.to));
        }
        Entry left;
        i32 lane = threadIdx.x % 32;
        held -= count;
        if (lane < held) left = shared.entries[lane + count];
        __syncwarp();
        if (lane < held) shared.entries[lane] = left;
        __syncwarp();
    }
    template <i32 PENDING>
    __device__ __forceinline__ void sources_free() {
        if (group > PENDING)
            hand_over<PENDING>(group - PENDING - 1);
        else
            ptx::store_wait_read<PENDING>();
        __syncwarp();
    }
    template <i32 PENDING>
    __device__ __forceinline__ void fence() {
        sources_free<PENDING>();
        if (threadIdx.x % 32 == 0) moecompile_network_fence();
        __syncwarp();
    }
    __device__ __forceinline__ void signal(bool active, const Target& to, u64 value) {
        if (active) moecompile_network_signal(reinterpret_cast<u64*>(address(exchange, to)), value, number(exchange, to));
        __syncwarp();
    }
    static __device__ __forceinline__ void tell(const Exchange& exchange, const Target& to, u64 value) {
        moecompile_network_fence();
        moecompile_network_signal(reinterpret_cast<u64*>(address(exchange, to)), value, number(exchange, to));
    }
    __device__ __forceinline__ void progress() {}
    __device__ __forceinline__ void drain() {
        hand_over<0>(~0u);
        quiet();
    }
    __device__ __forceinline__ void quiet() {
        if (threadIdx.x % 32 == 0) moecompile_network_quiet();
        __syncwarp();
        at = 0;
    }
    __device__ __forceinline__ void begins(Role) {}
    __device__ __forceinline__ void waits() {}
    __device__ __forceinline__ void goes_on() {}
};

}  // namespace nodes
