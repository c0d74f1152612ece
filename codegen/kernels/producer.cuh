// The producer's warpgroup of a grouped GEMM (grouped_gemm.cuh): what moves tiles into the ring.
#pragma once
#include "feed.cuh"
#include "kernel.cuh"
#include "schedule.cuh"

template <typename Gemm>
struct Producer {
    using Shared = typename Gemm::Shared;
    using Arguments = typename Gemm::Arguments;
    using Schedule = typename Gemm::Schedule;
    using Feed = typename Gemm::Feed;
    using Tickets = typename Gemm::Tickets;
    static constexpr i32 COLUMNS = Gemm::COLUMNS, STAGES = Gemm::STAGES, CLUSTER = Gemm::CLUSTER, CONSUMERS = Gemm::CONSUMERS;
    static constexpr i32 ROWS = Gemm::ROWS, BOX_ROWS = Gemm::BOX_ROWS, LINE = Gemm::LINE, K_TILE = Gemm::K_TILE;
    static constexpr i32 SHARE = Gemm::SHARE, BOX = Gemm::BOX, WIDTH = Gemm::WIDTH, PARTS = Gemm::PARTS, SCALES = Gemm::SCALES;
    static constexpr bool SCALED = Gemm::SCALED, A_MN = Gemm::A_MN, B_MN = Gemm::B_MN, OVER_ROWS = Gemm::OVER_ROWS;
    static constexpr bool PAIRED = Gemm::PAIRED, TAKEN = Gemm::TAKEN;
    static constexpr i32 OVERHANG = Gemm::OVERHANG;

    // ---- the producer warp: all lanes walk together, one of them copies

    static __device__ __forceinline__ void run(Shared& shared, const Arguments& arguments, i32 rows) {
        Schedule schedule = Gemm::schedule_of(arguments);
        u32 rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
        // of the first tile, stages that another warp fills (`fill_first`); if these are all, the ring is in its second round
        i32 filled = Gemm::starts_early(arguments) ? stages_filled_first(arguments) : 0, stage = filled % STAGES;
        u32 parity = filled < STAGES;
        ptx::wait_for_earlier_grids();
        i32 turn = 0, number = blockIdx.x / CLUSTER;
        if (TAKEN) Tickets::tell(shared.tickets, Tickets::ask(arguments.taken, rank), turn, rank);
        if (TAKEN) number = Tickets::get(shared.tickets, turn++);
        while (number < shared.tile_count) {
            u32 asked = TAKEN ? Tickets::ask(arguments.taken, rank) : 0;
            Tile tile = own(schedule.find(number), rank);
            if (Feed::BESIDE && threadIdx.x % 32 == 0) atomicExch(&shared.reached, tile.row);
            Feed::wait(arguments.feed, tile.row, rows_end(tile), rows);
            bool first = !TAKEN && number == i32(blockIdx.x) / CLUSTER;
            auto meanwhile = [&] {
                if (TAKEN) Tickets::tell(shared.tickets, asked, turn, rank);
            };
            fill(shared, arguments, tile, rank, stage, parity, first ? filled * K_TILE : 0, meanwhile);
            number = TAKEN ? Tickets::get(shared.tickets, turn++) : number + gridDim.x / CLUSTER;
        }
        if (TAKEN) end(shared, stage, parity);
        if (Feed::BESIDE && threadIdx.x % 32 == 0) atomicExch(&shared.reached, 0x7fffffff);  // the rows left are other blocks'
    }

    // A stage without anything, for consumers that do not know how many tiles there are for them.
    static __device__ __forceinline__ void end(Shared& shared, i32 stage, u32 parity) {
        ptx::barrier_wait(&shared.empty[stage], parity);
        if (!ptx::elect()) return;
        shared.tiles[stage] = Tile{-1};
        ptx::barrier_arrive(&shared.full[stage]);
    }

    // A block's part of what a cluster has a number for.
    static __device__ __forceinline__ Tile own(Tile tile, u32 rank) {
        (tile.split ? tile.column : tile.row) += rank * (tile.split ? WIDTH : ROWS);
        return tile;
    }

    // Where a tile's scales of b begin, of each part's columns.
    struct MatrixScales {
        const float* first;
        i32 second;  // the other part's, from there
        __device__ __forceinline__ MatrixScales(const Arguments& arguments, const Tile& tile) {
            // of two tiles that share an odd row tile, the second may have no columns
            i32 stride = arguments.b_scale_stride, block = min(tile.column / 128, max(arguments.b_scale_blocks - 1, 0));
            i32 last = arguments.b_scale_blocks - 1 - block;
            first = arguments.b_scales + (i64(OVER_ROWS ? 0 : tile.expert) * arguments.b_scale_blocks + block) * stride;
            second = min(PAIRED ? arguments.b_scale_pair : 1, last) * stride;
        }
        __device__ __forceinline__ const float* at(i32 part, i32 block) const { return first + part * second + block; }
    };

    // A tile's stages, but for the first ones of K, `skipped`. The scales of b are read a stage ahead: nothing may come between
    // a free stage and its copies, and `meanwhile` is done half-way: what it waits for, and who waits for it, have that long.
    template <typename Meanwhile>
    static __device__ __forceinline__ void fill(Shared& shared, const Arguments& arguments, const Tile& tile, u32 rank,
                                                i32& stage, u32& parity, i32 skipped, Meanwhile meanwhile) {
        i32 k = tile.k_begin + skipped;
        if (skipped && k >= tile.k_end) return;
        i32 half = tile.k_begin + (tile.k_end - tile.k_begin) / (2 * K_TILE) * K_TILE;
        MatrixScales scales(arguments, tile);
        float ahead[PARTS];
#pragma unroll
        for (i32 part = 0; SCALED && part < PARTS; part++)
            ahead[part] = __ldg(scales.at(part, min(k / 128, arguments.b_scale_stride - 1)));
        do {  // a tile has a stage even where there is nothing to sum
            ptx::barrier_wait(&shared.empty[stage], parity);
            i32 next = min(k + K_TILE, tile.k_end - 1) / 128;
            if (ptx::elect()) {
                if (k == tile.k_begin) shared.tiles[stage] = tile;
                for (i32 part = 0; SCALED && part < PARTS; part++)
                    shared.b_scales[stage][part] = OVER_ROWS ? arguments.factor * ahead[part] : ahead[part];
                ptx::barrier_expect(&shared.full[stage], row_bytes(tile) + sizeof(shared.b[0]));
                load_rows(shared, arguments, tile, k, stage, rank);
                load_matrix(shared, arguments, tile, k, stage, rank);
            }
#pragma unroll
            for (i32 part = 0; SCALED && part < PARTS; part++) ahead[part] = __ldg(scales.at(part, next));
            if (TAKEN && k == half) meanwhile();
            Gemm::advance(stage, parity);
            k += K_TILE;
        } while (k < tile.k_end);
    }

    // Before it lie all the rows that a tile needs.
    static __device__ __forceinline__ i32 rows_end(const Tile& tile) {
        return OVERHANG > 0 && tile.overhang ? tile.row_end : min(tile.row + ROWS, tile.row_end);
    }

    // Of the last rows only as many warpgroups' as there are.
    static __device__ __forceinline__ i32 boxes_of(const Tile& tile) {
        return A_MN || tile.row_end - tile.row > BOX_ROWS ? CONSUMERS : 1;
    }

    static __device__ __forceinline__ u32 row_bytes(const Tile& tile) {
        i32 along = OVERHANG > 0 && tile.overhang ? OVERHANG : 0;
        return (boxes_of(tile) * BOX_ROWS + along) * LINE + (SCALED ? SCALES * sizeof(float) : 0);
    }

    static __device__ __forceinline__ void load_rows(Shared& shared, const Arguments& arguments, const Tile& tile, i32 k,
                                                     i32 stage, u32 rank) {
        u64* full = &shared.full[stage];
        i32 boxes = boxes_of(tile);
        for (i32 box = 0; box < boxes; box++) {
            u8* to = shared.a[stage] + box * BOX_ROWS * LINE;
            i32 row = tile.row + box * BOX_ROWS;
            if (A_MN)
                ptx::load_2d(to, &arguments.a, full, row, k);
            else if (CLUSTER == 1 || !tile.split)
                ptx::load_2d(to, &arguments.a, full, k, row);
            else if (box == i32(rank))  // blocks with the same rows load one box each, for both
                ptx::load_2d_multicast(to, &arguments.a, full, k, row, (1 << CLUSTER) - 1);
        }
        if (OVERHANG > 0 && tile.overhang) {  // each block loads a part of them, for both
            i32 first = rank * (OVERHANG / CLUSTER);
            ptx::load_2d_multicast(shared.a[stage] + (ROWS + first) * LINE, &arguments.overhang, full, k,
                                   tile.overhang + first, (1 << CLUSTER) - 1);
        }
        if (SCALED) ptx::load_2d(shared.a_scales[stage], &arguments.scales, full, tile.row & ~3, k / 128);
    }

    // The tile's columns; of a pair's, the second half are the other matrix's. Blocks with the same columns load a share each,
    // for both.
    static __device__ __forceinline__ void load_matrix(Shared& shared, const Arguments& arguments, const Tile& tile, i32 k,
                                                       i32 stage, u32 rank) {
        u64* full = &shared.full[stage];
        i32 first = CLUSTER > 1 && !tile.split ? rank * SHARE : 0, end = CLUSTER > 1 && !tile.split ? first + SHARE : COLUMNS;
        for (; first < end; first += BOX) {
            bool other = PAIRED && first >= WIDTH;
            i32 n = tile.column + (other ? first - WIDTH : first);
            load_b(shared.b[stage] + first * LINE, other ? &arguments.b_pair : &arguments.b, full, n, k,
                   OVER_ROWS ? 0 : tile.expert, CLUSTER > 1 && !tile.split);
        }
    }

    static __device__ __forceinline__ void load_b(u8* to, const TensorMap* map, u64* full, i32 n, i32 k, i32 matrix, bool all) {
        if constexpr (B_MN) {
            for (i32 column = 0; column < BOX; column += 64)
                copy_b(to + column * LINE, map, full, n + column, k, matrix, all);
        } else {
            copy_b(to, map, full, k, n, matrix, all);
        }
    }

    static __device__ __forceinline__ void copy_b(u8* to, const TensorMap* map, u64* full, i32 x, i32 y, i32 z, bool all) {
        if (all)
            ptx::load_3d_multicast(to, map, full, x, y, z, (1 << CLUSTER) - 1);
        else
            ptx::load_3d(to, map, full, x, y, z);
    }

    // ---- the warps beside it: one fills the ring for the first time, with the matrix before the rows may be read; all
    // dispatch rows, if the kernel does so

    static __device__ __forceinline__ void beside(Shared& shared, const Arguments& arguments, i32 rows) {
        if (Gemm::starts_early(arguments) && threadIdx.x / 32 == CONSUMERS * 4 + 1) fill_first(shared, arguments, rows);
        ptx::take_turn();
        Feed::run(arguments.feed, rows, wave(arguments), &shared.reached);
    }

    // How many rows the tiles have that run at the same time, if they share columns as little as they can.
    static __device__ __forceinline__ i32 wave(const Arguments& arguments) {
        return i32(gridDim.x) * ROWS / ((arguments.n + WIDTH - 1) / WIDTH);
    }

    static __device__ __forceinline__ i32 stages_filled_first(const Arguments& arguments) {
        return min(STAGES, (arguments.a_columns + K_TILE - 1) / K_TILE);
    }

    static __device__ __forceinline__ void fill_first(Shared& shared, const Arguments& arguments, i32 rows) {
        u32 rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
        i32 number = blockIdx.x / CLUSTER, stages = stages_filled_first(arguments), lane = threadIdx.x % 32;
        if (number >= shared.tile_count) return;
        Tile tile = own(Gemm::schedule_of(arguments).find(number), rank);
        float held[PARTS];  // of the stage of this lane's number
        MatrixScales scales(arguments, tile);
#pragma unroll
        for (i32 part = 0; SCALED && part < PARTS; part++) held[part] = lane < stages ? __ldcg(scales.at(part, lane)) : 0;
        if (ptx::elect()) {
#pragma unroll 1
            for (i32 stage = 0; stage < stages; stage++) {
                ptx::barrier_expect_more(&shared.full[stage], sizeof(shared.b[0]));
                load_matrix(shared, arguments, tile, stage * K_TILE, stage, rank);
            }
        }
        ptx::wait_for_earlier_grids();
        Feed::wait(arguments.feed, tile.row, rows_end(tile), rows);
#pragma unroll 1
        for (i32 stage = 0; stage < stages; stage++) {  // what is written, whoever tells of it has written
            float of_stage[PARTS];
#pragma unroll
            for (i32 part = 0; SCALED && part < PARTS; part++) of_stage[part] = __shfl_sync(~0u, held[part], stage);
            if (ptx::elect()) {
                if (stage == 0) shared.tiles[0] = tile;
                for (i32 part = 0; SCALED && part < PARTS; part++) shared.b_scales[stage][part] = of_stage[part];
                ptx::barrier_expect(&shared.full[stage], row_bytes(tile));
                load_rows(shared, arguments, tile, stage * K_TILE, stage, rank);
            }
        }
    }
};
