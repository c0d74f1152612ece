// Where a grouped GEMM has its rows from: one struct for each, with
//
//     run(...)      by the warps beside the producer's, from beginning to end. There are `rows` in all, tiles of a `wave` of
//                   them run at once, and this block's tiles have `reached` a row.
//     wait(...)     by the producer warp, until a tile's rows may be loaded
#pragma once
#include "ptx.cuh"

// They were there before the launch.
struct Given {
    static constexpr bool BESIDE = false, WHOLE = false;
    static constexpr i32 AT_LEAST = 1 << 30;  // no row is too far ahead
    struct Arguments {
        i32 unused;
    };
    static __device__ __forceinline__ void run(const Arguments&, i32, i32, i32*) {}
    static __device__ __forceinline__ void wait(const Arguments&, i32, i32, i32) {}
};

// So were these, and all are of one group: how many there are, the host knows.
struct Whole {
    static constexpr bool BESIDE = false, WHOLE = true;
    static constexpr i32 AT_LEAST = 1 << 30;
    struct Arguments {
        i32 rows;
    };
    static __device__ __forceinline__ void run(const Arguments&, i32, i32, i32*) {}
    static __device__ __forceinline__ void wait(const Arguments&, i32, i32, i32) {}
};

// Tokens that are dispatched, with their scales if they are quantised: those of a tensor.
struct Tokens {
    struct Arguments {
        const uint4* tokens;        // (tokens, pieces)
        const float* token_scales;  // (tokens, scale blocks)
    };
    // Places are counted in pieces, in 32 bits: the producer's warpgroup has few registers.
    using Line = u32;
    static __device__ __forceinline__ i32 any(const Arguments&) { return 0; }
    static __device__ __forceinline__ i32 find(const Arguments&, i32 token) { return token; }
    static __device__ __forceinline__ Line line(const Arguments&, i32 token, i32 pieces) { return u32(token) * pieces; }
    static __device__ __forceinline__ uint4 load(const Arguments& arguments, Line line, i32 at) {
        return __ldg(arguments.tokens + (line + at));
    }
    static __device__ __forceinline__ const float* scales(const Arguments& arguments, i32 token, i32 blocks) {
        return arguments.token_scales + i64(token) * blocks;
    }
};

// Those that came from other ranks, in the records that these have written (peer.cuh), and among them this rank's own, where
// they are. A token's scales lie behind it. Numbers are places: `capacity` of each rank; or, without records, this rank's lines.
struct Records {
    struct Arguments {
        const uint4* tokens;   // this rank's own, `line` pieces from one to the next
        const uint4* records;  // (ranks * capacity), `record` pieces from one to the next
        const i32* sent;       // (ranks, capacity): which of this rank's is at its own places; null if they are all there are
        i32 own, own_end;      // this rank's places
        i32 line, record;
        i32 scales;            // the piece with a line's first ones
        i32 unused;
    };
    using Line = const uint4*;
    static __device__ __forceinline__ i32 any(const Arguments& arguments) { return arguments.records ? 0 : -1; }
    // A place of another rank, or, less than zero, a line of this one.
    static __device__ __forceinline__ i32 find(const Arguments& arguments, i32 place) {
        if (!arguments.sent) return -1 - place;
        return place < arguments.own || place >= arguments.own_end ? place : -1 - __ldg(arguments.sent + place);
    }
    static __device__ __forceinline__ Line line(const Arguments& arguments, i32 found, i32) {
        return found < 0 ? arguments.tokens + i64(-1 - found) * arguments.line : arguments.records + i64(found) * arguments.record;
    }
    // Past L1, which does not see what other devices write.
    static __device__ __forceinline__ uint4 load(const Arguments&, Line line, i32 at) { return __ldcg(line + at); }
    static __device__ __forceinline__ const float* scales(const Arguments& arguments, i32 found, i32) {
        return reinterpret_cast<const float*>(line(arguments, found, 0) + arguments.scales);
    }
};

// Rows are tokens', dispatched by this very kernel while others are multiplied: rows[r, :] = tokens[order[r] / top_k, :].
//
// Warps take rows in order, a few at a time, and whoever takes some writes them. They keep some way ahead of their block's
// tiles, but no more: all at once, they would have the memory to themselves, and the tiles would starve (docs/perf.md).
//
// However few blocks run at once, tiles get their rows. Take the first row that nobody has written and somebody has taken:
// who took it is at work, or waits for the tiles of its cluster to come nearer. These wait for rows only; those they wait
// for lie no further than a band's height, the rows that go along with it, and a block ahead of the tile that the slower of
// the cluster's blocks is at, and that is less than AT_LEAST: so all of them are there, and the tiles go on. Blocks without
// tiles keep nobody waiting.
template <bool SCALED, typename Source = Tokens>
struct Dispatched {
    static constexpr bool BESIDE = true, WHOLE = false;
    static constexpr i32 UNIT = 2, BLOCK = 64;  // rows that a warp takes at once, and that are counted together
    static constexpr i32 PIECES = 3;            // of 16 bytes, of a row, in a lane's hands
    static constexpr i32 WAVES = 3, AT_LEAST = 4096;  // rows ahead of the tiles: those of so many waves, and so many more
    struct Arguments {
        typename Source::Arguments source;
        uint4* rows;       // (rows, pieces): what the GEMM reads
        float* scales;     // (scale blocks, pitch)
        const i32* order;  // the assignment of a row
        u32* progress;     // zeros at first: how many units are taken; for each block of rows, how many are there
        i32 top_k, pieces, scale_blocks, pitch;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments, i32 rows, i32 wave, i32* reached) {
        i32 lane = threadIdx.x % 32, unit = take(arguments), token = token_of(arguments, unit, rows);
        while (unit * UNIT < rows) {
            while (unit * UNIT - look(reached) > WAVES * wave + AT_LEAST) __nanosleep(200);
            i32 next = take(arguments), next_token = token_of(arguments, next, rows);
            copy(arguments, unit * UNIT, token, rows);
            if constexpr (SCALED) copy_scales(arguments, unit * UNIT, token, rows);
            ptx::fence_async_global();  // bulk copies will read it
            __syncwarp();
            if (lane == 0) ptx::add_release(arguments.progress + 1 + unit * UNIT / BLOCK, 1);
            unit = next, token = next_token;
        }
    }

    static __device__ __forceinline__ void wait(const Arguments& arguments, i32 first, i32 end, i32 rows) {
        i32 block = first / BLOCK + i32(threadIdx.x % 32);
        bool ours = block <= (end - 1) / BLOCK;
        u32 whole = (min(BLOCK, rows - block * BLOCK) + UNIT - 1) / UNIT;
        const u32* there = arguments.progress + 1 + block;
        while (__any_sync(~0u, ours && ptx::load_relaxed(there) < whole)) __nanosleep(40);
        if (ours) ptx::load_acquire(there);
        __syncwarp();
        ptx::fence_async_global();
    }

    static __device__ __forceinline__ i32 take(const Arguments& arguments) {
        u32 unit = 0;
        if (threadIdx.x % 32 == 0) unit = atomicAdd(arguments.progress, 1);
        return i32(__shfl_sync(~0u, unit, 0));
    }

    // Atomic, since the producer writes it meanwhile.
    static __device__ __forceinline__ i32 look(i32* reached) {
        i32 row = 0;
        if (threadIdx.x % 32 == 0) row = atomicAdd(reached, 0);
        return __shfl_sync(~0u, row, 0);
    }

    // Of the unit's rows, each in a lane of that number, as the source calls it.
    static __device__ __forceinline__ i32 token_of(const Arguments& arguments, i32 unit, i32 rows) {
        i32 row = unit * UNIT + i32(threadIdx.x % 32);
        if (threadIdx.x % 32 >= UNIT || row >= rows) return Source::any(arguments.source);  // which is read, and not written
        return Source::find(arguments.source, __ldg(arguments.order + row) / arguments.top_k);
    }

    static __device__ __forceinline__ void copy(const Arguments& arguments, i32 first, i32 token, i32 rows) {
        typename Source::Line from[UNIT];
        u32 to = u32(first) * arguments.pieces;
#pragma unroll
        for (i32 i = 0; i < UNIT; i++) from[i] = Source::line(arguments.source, __shfl_sync(~0u, token, i), arguments.pieces);
        i32 count = min(UNIT, rows - first);
#pragma unroll 1
        for (i32 at = threadIdx.x % 32; at < arguments.pieces; at += 32 * PIECES) {
            uint4 held[UNIT][PIECES];
#pragma unroll
            for (i32 i = 0; i < UNIT; i++)
#pragma unroll
                for (i32 piece = 0; piece < PIECES; piece++)
                    if (at + 32 * piece < arguments.pieces) held[i][piece] = Source::load(arguments.source, from[i], at + 32 * piece);
#pragma unroll
            for (i32 i = 0; i < UNIT; i++)
#pragma unroll
                for (i32 piece = 0; piece < PIECES; piece++)
                    if (i < count && at + 32 * piece < arguments.pieces)
                        arguments.rows[to + i * arguments.pieces + at + 32 * piece] = held[i][piece];
        }
    }

    static __device__ __forceinline__ void copy_scales(const Arguments& arguments, i32 first, i32 token, i32 rows) {
        i32 lane = threadIdx.x % 32, own = lane % UNIT;
        const float* line = Source::scales(arguments.source, __shfl_sync(~0u, token, own), arguments.scale_blocks);
#pragma unroll 1
        for (i32 block = lane / UNIT; block < arguments.scale_blocks; block += 32 / UNIT)
            if (first + own < rows)
                arguments.scales[i64(block) * arguments.pitch + first + own] = __ldcg(line + block);
    }
};
