// How ranks wait for each other in an exchange, and what they do if there is nothing to wait for: the same within a node and
// between nodes.
#pragma once
#include "kernel.cuh"

// The number of the exchange that a kernel takes part in. Exchanges are counted on each rank, by words that its kernels advance:
// [0] those that are over, [1] blocks that are done with the one that is not.
__device__ __forceinline__ u32 exchange_of(const u32 (&counter)[2]) {
    return *reinterpret_cast<const volatile u32*>(counter) + 1;
}

constexpr i32 ROUGHLY = 128;  // what rows that a rank has no room for are counted in

// As one word that is never zero: who waited for whom, in which step of the exchange in which slot.
template <typename Step>
__device__ __forceinline__ u64 failure_of(i32 rank, i32 other, Step step, i32 slot) {
    return u64(rank + 1) | u64(other + 1) << 16 | u64(step) << 32 | u64(slot) << 40;
}

// Of an exchange `Self`, which inherits it: it has a rank of so many, its slot, `patience`, `told`, and words of those that it reaches.
template <typename Self, typename Step>
struct Waits {
    using Steps = Step;
    __device__ __forceinline__ const Self& self() const { return static_cast<const Self&>(*this); }

    // Whether somebody has given up an exchange, this one or any before. Then the host is told.
    __device__ __forceinline__ bool is_aborted() const {
        u64 failure = ptx::load_relaxed_system(&self().words(self().rank).aborted);
        if (failure) ptx::store_release_system(self().told, failure);
        return failure;
    }

    // Tells everybody whose memory this device writes by itself; whoever sends to others tells these (node_roles.cuh).
    __device__ __forceinline__ void give_up(u64 failure) const {
#pragma unroll 1  // nobody is in a hurry, and many places give up
        for (i32 each = 0; each < self().ranks; each++)
            if (self().reaches(each)) ptx::store_release_system(&self().words(each).aborted, failure);
        ptx::store_release_system(self().told, failure);
    }

    // If the first number of a `came` says how many rows there was no room for: what experts have left out is nobody's to guess.
    __device__ __forceinline__ void give_up_without_room(const i32* came) const {
        i32 met = -__ldg(came), rank = self().rank;
        if (met > 0) give_up(failure_of(rank, rank, Step::ROWS, (met + ROUGHLY - 1) / ROUGHLY));
    }

    // If this rank has not read the exchange before: it would read it now, for this one.
    __device__ __forceinline__ void give_up_behind(u32 exchange) const {
        i32 rank = self().rank, slot = self().slot;
        if (exchange_of(self().words(rank).ended[slot]) != exchange) give_up(failure_of(rank, rank, Step::LEFT, slot));
    }

    // Until the word, of this rank's own memory, which another writes, is at least that; what it then is. Zero if it will not
    // be: somebody has given up, or nothing has come in time, and everybody is told so. Before what the word speaks of is
    // touched, a fence is due.
    __device__ __forceinline__ u64 wait(const u64* word, u64 at_least, i32 other, Step step) const {
        u64 deadline = 0, found;
        for (u32 turn = 0; (found = ptx::load_relaxed_system(word)) < at_least; turn++)
            if (turn % 64 == 0 && is_hopeless(deadline, other, step)) return 0;
        return found;
    }

    // Every so often, by who waits: whether there is nothing to wait for any more. Whoever has waited too long gives up.
    __device__ __forceinline__ bool is_hopeless(u64& deadline, i32 other, Step step) const {
        if (is_aborted()) return true;
        u64 now = ptx::nanoseconds();
        if (!deadline) deadline = now + u64(self().patience) * 1000000;
        if (now < deadline) return false;
        give_up(failure_of(self().rank, other, step, self().slot));
        return true;
    }
};
