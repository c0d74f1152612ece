// Where each token's rows lie in expert order: a stable sort of the assignments by their expert, in one or two launches.
//
//     PlanCount    a block counts its assignments' experts                                 counts (blocks, experts)
//     PlanPlace    an expert's rows begin after those of the experts before it, and within them a block's after those of
//                  the blocks before it; within a block, a warp's after those of the warps before it, and so on
//
// Few assignments are counted and placed by one block. Sums are of integers, and every place follows from counts alone:
// the same ids give the same plan. An assignment without an expert (-1) has no row, nor has one for which there is no room:
// counts alone tell of those.
#pragma once
#include "kernel.cuh"

constexpr i32 PLAN_THREADS = 1024, PLAN_WARPS = PLAN_THREADS / 32;

// The assignments of one block: whole rounds of one for each thread.
struct Span {
    i32 begin, end;
    __device__ __forceinline__ explicit Span(i32 assignments) {
        i32 each = (assignments + gridDim.x * PLAN_THREADS - 1) / (gridDim.x * PLAN_THREADS) * PLAN_THREADS;
        begin = blockIdx.x * each, end = min(begin + each, assignments);
    }
};

// The experts of a plan among those that ids speak of: others' assignments have no row.
struct Among {
    i32 experts, first, all;
};

// Counted from the first of them.
template <typename Id>
__device__ __forceinline__ i32 expert_of(const Id* ids, i32 assignment, const Among& among) {
    Id id = __ldg(ids + assignment);
    if (id < -1 || id >= among.all)
        __assertfail("an expert id is outside [0, num_experts) and not -1 (no expert)", "moecompile::plan", 0, "plan", 1);
    i32 expert = i32(id) - among.first;
    return id >= 0 && expert >= 0 && expert < among.experts ? expert : -1;
}

template <typename Id>
__device__ __forceinline__ void count_experts(u32* counts, const Id* ids, const Span& span, const Among& among) {
    for (i32 e = threadIdx.x; e < among.experts; e += PLAN_THREADS) counts[e] = 0;
    __syncthreads();
    for (i32 i = span.begin + threadIdx.x; i < span.end; i += PLAN_THREADS) {
        i32 expert = expert_of(ids, i, among);
        if (expert >= 0) atomicAdd(counts + expert, 1);
    }
    __syncthreads();
}

template <typename Id, i32 EXPERTS>
struct PlanCount {
    static constexpr i32 THREADS = PLAN_THREADS, BLOCKS = 1;
    struct Arguments {
        const Id* ids;  // (assignments,)
        u32* counts;    // (blocks, experts)
        i32 assignments;
        Among among;
    };
    struct Shared {
        u32 counts[EXPERTS];
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 experts = arguments.among.experts;
        count_experts(shared.counts, arguments.ids, Span(arguments.assignments), arguments.among);
        u32* counts = arguments.counts + i64(blockIdx.x) * experts;
        for (i32 e = threadIdx.x; e < experts; e += THREADS) counts[e] = shared.counts[e];
    }
};

template <typename Id, i32 EXPERTS>
struct PlanPlace {
    static constexpr i32 THREADS = PLAN_THREADS, BLOCKS = 1;
    struct Arguments {
        const Id* ids;            // (assignments,)
        const u32* block_counts;  // (blocks, experts), of PlanCount; null where one block does all
        i32* counts;              // (experts,)
        i32* offsets;             // (experts,): the end of each expert's rows
        i32* slots;               // (assignments,): the row of an assignment
        i32* order;               // (room,): the assignment of a row
        i32 assignments;
        Among among;
        i32 room;                 // for so many rows, at most
    };
    struct Shared {
        u32 next[EXPERTS];              // the row of the block's next assignment to an expert
        u32 rows[PLAN_WARPS][EXPERTS];  // the row of a warp's first assignment to an expert, in this round
        i32 used;                       // rows of all experts together
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        Span span(arguments.assignments);
        if (arguments.block_counts)
            total(shared, arguments);
        else
            count_experts(shared.next, arguments.ids, span, arguments.among);
        if (threadIdx.x < 32) begin(shared, arguments);
        __syncthreads();
        if (arguments.block_counts) skip_earlier_blocks(shared, arguments);
        for (i32 first = span.begin; first < span.end; first += THREADS)
            place(shared, arguments, first + i32(threadIdx.x), span.end);
        for (i32 row = span.begin + threadIdx.x; row < min(span.end, arguments.room); row += THREADS)
            if (row >= shared.used) arguments.order[row] = -1;
    }

    // next = rows of each expert, of all blocks.
    static __device__ __forceinline__ void total(Shared& shared, const Arguments& arguments) {
        for (i32 e = threadIdx.x; e < arguments.among.experts; e += THREADS)
            shared.next[e] = sum_of_blocks(arguments, e, gridDim.x);
        __syncthreads();
    }

    static __device__ __forceinline__ void skip_earlier_blocks(Shared& shared, const Arguments& arguments) {
        for (i32 e = threadIdx.x; e < arguments.among.experts; e += THREADS)
            shared.next[e] += sum_of_blocks(arguments, e, blockIdx.x);
        __syncthreads();
    }

    static __device__ __forceinline__ u32 sum_of_blocks(const Arguments& arguments, i32 expert, i32 blocks) {
        u32 sum = 0;
#pragma unroll 8
        for (i32 block = 0; block < blocks; block++) sum += __ldg(arguments.block_counts + i64(block) * arguments.among.experts + expert);
        return sum;
    }

    // next: from each expert's number of rows to its first row. By one warp.
    static __device__ __forceinline__ void begin(Shared& shared, const Arguments& arguments) {
        u32 lane = threadIdx.x, rows = 0;
        for (i32 first = 0; first < arguments.among.experts; first += 32) {
            i32 e = first + lane;
            u32 own = e < arguments.among.experts ? shared.next[e] : 0, end = own;
            for (u32 step = 1; step < 32; step *= 2) {
                u32 before = __shfl_up_sync(~0u, end, step);
                if (lane >= step) end += before;
            }
            end += rows;
            rows = __shfl_sync(~0u, end, 31);
            if (e >= arguments.among.experts) continue;
            shared.next[e] = end - own;
            if (blockIdx.x == 0) arguments.counts[e] = own, arguments.offsets[e] = min(i32(end), arguments.room);
        }
        if (lane == 0) shared.used = i32(rows);
    }

    // One round: an assignment for each thread. A warp's line of `rows` is its own, but for the sums over warps.
    static __device__ __forceinline__ void place(Shared& shared, const Arguments& arguments, i32 i, i32 end) {
        u32 lane = threadIdx.x % 32;
        u32* rows = shared.rows[threadIdx.x / 32];
        for (i32 e = lane; e < arguments.among.experts; e += 32) rows[e] = 0;
        i32 expert = i < end ? expert_of(arguments.ids, i, arguments.among) : -1;
        __syncwarp();
        u32 alike = __match_any_sync(~0u, expert), earlier = alike & ((1u << lane) - 1);
        if (expert >= 0 && !earlier) rows[expert] = __popc(alike);
        __syncthreads();
        for (i32 e = threadIdx.x; e < arguments.among.experts; e += THREADS) {
            u32 next = shared.next[e];
            for (i32 warp = 0; warp < PLAN_WARPS; warp++) {
                u32 own = shared.rows[warp][e];
                shared.rows[warp][e] = next;
                next += own;
            }
            shared.next[e] = next;
        }
        __syncthreads();
        i32 row = expert < 0 ? -1 : i32(rows[expert]) + __popc(earlier);
        if (row >= arguments.room) row = -1;
        if (i < end) arguments.slots[i] = row;
        if (row >= 0) arguments.order[row] = i;
        __syncwarp();
    }
};
