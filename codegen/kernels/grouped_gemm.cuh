// Products of rows that are grouped by expert, summed in float32. One template, two directions:
//
//     rows times matrices             out[r, :] = a[r, :] @ b[e(r)]
//         a        (rows, K) in bf16, fp16, or e4m3 with a float32 scale for each row and 128 columns
//         b        (E, N, K); (E, K, N) if B_MN, 16-bit inputs only; e4m3 with a float32 scale for each 128 x 128 block
//         out      (rows, N) in bf16 or fp16; rows beyond the last offset are not written
//
//     rows times rows (OVER_ROWS)     out[e] = sum over e's rows of a[r, :]^T b[r, :]
//         a, b     (rows, M), (rows, N) in bf16 or fp16; rows beyond the last offset are not looked at. In e4m3 they are
//                  (M, rows), (N, rows), each expert's rows filled up with zeros to a multiple of 128 (transpose.cuh), with
//                  scales as above: for each 128 rows of a column of a, and for each 128 rows of 128 columns of b
//         out      (E, M, N); zeros for an expert without rows, or, where sums are added to what is there, nothing
//
// What is written, and of what more than the sums it is made, is the epilogue's matter (epilogue.cuh).
//
//     offsets      (E,) int32: the end of each expert's rows, on the device; nobody else knows how many there are
//
// Rows need not be there when the kernel begins: it may dispatch them itself (feed.cuh), by the three warps beside the
// producer's, of which one may fill the ring for the first time before.
//
// A persistent block is a producer warp, which moves tiles into a ring of stages in shared memory by bulk tensor copies,
// and two consumer warpgroups, each of which multiplies 64 rows of the tile and writes them out on its own. Two blocks of
// a cluster take neighbouring row tiles of one expert and share its matrix: each loads half of it into both. Where an
// expert's last row tile has no neighbour, they take it together, with columns of their own, and share its rows.
//
// FP8: the tensor cores add up in less than float32, so after every 128 columns of K their sum is scaled and added to
// float32 registers (DeepSeek-V3, section 3.3.2). A tile of 256 columns is multiplied in two parts, because the sums of
// both and the totals would not fit into registers; at 128 columns a tile, L2 could not deliver the operands in time.
#pragma once
#include "epilogue_activated.cuh"
#include "epilogue_backward.cuh"
#include "epilogue_fp8.cuh"
#include "feed.cuh"
#include "kernel.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

template <typename Input, i32 COLUMNS, i32 STAGES, i32 CLUSTER, bool B_MN, bool OVER_ROWS, typename Epilogue, typename Feed = Given>
struct GroupedGemm {
    static constexpr i32 CONSUMERS = 2, BOX_ROWS = 64, ROWS = BOX_ROWS * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr i32 BLOCKS = CLUSTER;
    static constexpr i32 LINE = 128;                     // bytes of a line of a stage: one swizzle atom
    static constexpr i32 K_TILE = LINE / Input::BYTES;   // of K, in a stage
    static constexpr i32 SHARE = COLUMNS / CLUSTER;      // columns that each block of the cluster loads for all
    static constexpr bool SCALED = Input::SCALED, A_MN = OVER_ROWS && !SCALED;
    static constexpr bool PAIRED = Epilogue::PAIRED, EARLY = Epilogue::EARLY && !OVER_ROWS;
    static constexpr i32 BOX = PAIRED && CLUSTER == 1 ? COLUMNS / 2 : SHARE;  // columns that are loaded at once
    static constexpr i32 WIDTH = PAIRED ? COLUMNS / 2 : COLUMNS;  // of a tile, in what the schedule counts
    // A bulk copy without swizzle begins at a multiple of 16 bytes, a tile at any row: up to three scales before it come too.
    static constexpr i32 SCALES = ROWS + 4;
    static_assert(!(SCALED && B_MN), "FP8 is read along K only");
    static_assert(!OVER_ROWS || SCALED || B_MN, "what is summed over rows is read across them");
    static constexpr i32 PARTS = COLUMNS / 128;  // of an FP8 tile, each of a scale block's columns, multiplied one after the other
    // FP8 gradients of matrices are faster written at once (docs/perf.md).
    static constexpr bool LATER = !(SCALED && OVER_ROWS);
    static_assert(!SCALED || COLUMNS % 128 == 0, "a part of an FP8 tile is a scale block wide");
    static_assert(SHARE % 64 == 0, "a line across K holds 64 columns");
    static_assert(CLUSTER == 1 || CLUSTER == CONSUMERS, "blocks that share rows load a warpgroup's each");
    static_assert(!(OVER_ROWS && Feed::BESIDE), "rows are dispatched for rows times matrices");
    static_assert(!Feed::BESIDE || Feed::AT_LEAST >= 2 * BAND * CLUSTER * ROWS, "or a cluster waits for itself (feed.cuh)");

    template <bool over_rows>
    struct ScheduleOf {
        using Type = RowSchedule<ROWS, WIDTH, CLUSTER>;
    };
    template <>
    struct ScheduleOf<true> {
        using Type = MatrixSchedule<ROWS * CLUSTER, WIDTH>;
    };
    using Schedule = typename ScheduleOf<OVER_ROWS>::Type;

    struct Arguments {
        TensorMap a;          // boxes of BOX_ROWS x K_TILE, or of K_TILE x BOX_ROWS if A_MN
        TensorMap b, b_pair;  // of three dimensions; boxes of BOX x K_TILE, of K_TILE x 64 if B_MN; the second is for PAIRED
        TensorMap scales;     // of a, transposed: (K / 128, rows); boxes of 1 x SCALES
        const i32* offsets;
        const float* b_scales;  // (E, b_scale_blocks, b_scale_stride); a pair's other half begins b_scale_pair blocks later
        i32 experts, a_columns, n, b_scale_blocks, b_scale_stride, b_scale_pair;
        i32 early;  // whether offsets, b and its scales were there before the grid before this one began
        typename Feed::Arguments feed;
        typename Epilogue::Arguments epilogue;
    };

    struct Shared {
        alignas(1024) u8 a[STAGES][ROWS * LINE];
        alignas(1024) u8 b[STAGES][COLUMNS * LINE];
        alignas(1024) u8 boxes[CONSUMERS * 4][Epilogue::BOXES * box::BYTES];  // of each warp
        alignas(128) float a_scales[STAGES][SCALED ? (SCALES + 31) / 32 * 32 : 1];
        float b_scales[STAGES][SCALED ? PARTS : 1];
        Tile tiles[STAGES];  // of the stage that is a tile's first
        u64 full[STAGES], empty[STAGES];
        typename Epilogue::Shared epilogue;
        i32 tile_count;
        i32 reached;  // a row of the tile that the producer is at
    };

    static __device__ __forceinline__ Schedule schedule_of(const Arguments& arguments) {
        return Schedule(arguments.offsets, arguments.experts, arguments.a_columns, arguments.n);
    }

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        extern __shared__ __align__(1024) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        u32 group = __shfl_sync(~0u, threadIdx.x / 128, 0);
        if (threadIdx.x == 0) {
            for (i32 i = 0; i < STAGES; i++) {
                ptx::barrier_init(&shared.full[i], 1);
                ptx::barrier_init(&shared.empty[i], CONSUMERS * 4 * CLUSTER);
            }
            Epilogue::prepare(shared.epilogue);
            shared.reached = 0;
            ptx::barrier_init_fence();
            ptx::prefetch_map(&arguments.a);
            ptx::prefetch_map(&arguments.b);
        }
        if (!starts_early(arguments)) ptx::wait_for_earlier_grids();  // each role waits all the same: then it is free
        if (threadIdx.x / 32 == 1) {
            i32 count = schedule_of(arguments).count();
            if (threadIdx.x == 32) shared.tile_count = count;
        }
        __syncthreads();
        if (CLUSTER > 1) ptx::cluster_sync();
        if (group == CONSUMERS) {
            ptx::give_registers<504 - CONSUMERS * Epilogue::REGISTERS>();  // of 512 for a thread of each warpgroup
            i32 rows = Feed::BESIDE ? __ldcg(arguments.offsets + arguments.experts - 1) : 0;
            if (threadIdx.x / 32 == CONSUMERS * 4)
                produce(shared, arguments, rows);
            else
                beside(shared, arguments, rows);
        } else {
            ptx::take_registers<Epilogue::REGISTERS>();
            ptx::wait_for_earlier_grids();
            consume(shared, arguments, group);
        }
        if (CLUSTER > 1) {  // nobody leaves while another may still arrive at its barriers
            __syncwarp();
            ptx::cluster_sync();
        }
    }

    static __device__ __forceinline__ void beside(Shared& shared, const Arguments& arguments, i32 rows) {
        if (starts_early(arguments) && threadIdx.x / 32 == CONSUMERS * 4 + 1) fill_first(shared, arguments, rows);
        ptx::take_turn();
        Feed::run(arguments.feed, rows, wave(arguments), &shared.reached);
    }

    // How many rows the tiles have that run at the same time, if they share columns as little as they can.
    static __device__ __forceinline__ i32 wave(const Arguments& arguments) {
        return i32(gridDim.x) * ROWS / ((arguments.n + WIDTH - 1) / WIDTH);
    }

    // ---- the producer warp: all lanes walk together, one of them copies

    static __device__ __forceinline__ void produce(Shared& shared, const Arguments& arguments, i32 rows) {
        Schedule schedule = schedule_of(arguments);
        u32 rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
        // of the first tile, stages that another warp fills (`fill_first`); if these are all, the ring is in its second round
        i32 filled = starts_early(arguments) ? stages_filled_first(arguments) : 0, stage = filled % STAGES;
        u32 parity = filled < STAGES;
        ptx::wait_for_earlier_grids();
        for (i32 number = blockIdx.x / CLUSTER; number < shared.tile_count; number += gridDim.x / CLUSTER) {
            Tile tile = own(schedule.find(number), rank);
            if (Feed::BESIDE && threadIdx.x % 32 == 0) atomicExch(&shared.reached, tile.row);
            Feed::wait(arguments.feed, tile.row, min(tile.row + ROWS, tile.row_end), rows);
            fill(shared, arguments, tile, rank, stage, parity, number == i32(blockIdx.x) / CLUSTER ? filled * K_TILE : 0);
        }
        if (Feed::BESIDE && threadIdx.x % 32 == 0) atomicExch(&shared.reached, 0x7fffffff);  // the rows left are other blocks'
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

    // A tile's stages, but for the first ones of K, `skipped`. The scales of b are read a stage ahead: nothing may come between a free stage and its copies.
    static __device__ __forceinline__ void fill(Shared& shared, const Arguments& arguments, const Tile& tile, u32 rank,
                                                i32& stage, u32& parity, i32 skipped) {
        i32 k = tile.k_begin + skipped;
        if (skipped && k >= tile.k_end) return;
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
                for (i32 part = 0; SCALED && part < PARTS; part++) shared.b_scales[stage][part] = ahead[part];
                ptx::barrier_expect(&shared.full[stage], row_bytes(tile) + sizeof(shared.b[0]));
                load_rows(shared, arguments, tile, k, stage, rank);
                load_matrix(shared, arguments, tile, k, stage, rank);
            }
#pragma unroll
            for (i32 part = 0; SCALED && part < PARTS; part++) ahead[part] = __ldg(scales.at(part, next));
            advance(stage, parity);
            k += K_TILE;
        } while (k < tile.k_end);
    }

    // Of the last rows only as many warpgroups' as there are.
    static __device__ __forceinline__ i32 boxes_of(const Tile& tile) {
        return A_MN || tile.row_end - tile.row > BOX_ROWS ? CONSUMERS : 1;
    }

    static __device__ __forceinline__ u32 row_bytes(const Tile& tile) {
        return boxes_of(tile) * BOX_ROWS * LINE + (SCALED ? SCALES * sizeof(float) : 0);
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

    // ---- a warp beside it, which fills the ring for the first time: with the matrix, before the rows may be read

    static __device__ __forceinline__ bool starts_early(const Arguments& arguments) { return EARLY && arguments.early; }

    static __device__ __forceinline__ i32 stages_filled_first(const Arguments& arguments) {
        return min(STAGES, (arguments.a_columns + K_TILE - 1) / K_TILE);
    }

    static __device__ __forceinline__ void fill_first(Shared& shared, const Arguments& arguments, i32 rows) {
        u32 rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
        i32 number = blockIdx.x / CLUSTER, stages = stages_filled_first(arguments), lane = threadIdx.x % 32;
        if (number >= shared.tile_count) return;
        Tile tile = own(schedule_of(arguments).find(number), rank);
        if (lane == 0) shared.tiles[0] = tile;
        if (SCALED && lane < stages) {
            MatrixScales scales(arguments, tile);
            for (i32 part = 0; part < PARTS; part++) shared.b_scales[lane][part] = __ldcg(scales.at(part, lane));
        }
        __syncwarp();
        if (ptx::elect()) {
#pragma unroll 1
            for (i32 stage = 0; stage < stages; stage++) {
                ptx::barrier_expect_more(&shared.full[stage], sizeof(shared.b[0]));
                load_matrix(shared, arguments, tile, stage * K_TILE, stage, rank);
            }
        }
        ptx::wait_for_earlier_grids();
        Feed::wait(arguments.feed, tile.row, min(tile.row + ROWS, tile.row_end), rows);
        if (ptx::elect()) {
#pragma unroll 1
            for (i32 stage = 0; stage < stages; stage++) {
                ptx::barrier_expect(&shared.full[stage], row_bytes(tile));
                load_rows(shared, arguments, tile, stage * K_TILE, stage, rank);
            }
        }
        __syncwarp();
    }

    // ---- the consumer warpgroups

    // The first stage's rows of this warpgroup and columns, as matrix products are told of them.
    struct Operands {
        u32 a, b;
        __device__ __forceinline__ Operands(const Shared& shared, u32 group)
            : a(wgmma::describe(shared.a[0] + group * 64 * LINE, K_TILE * LINE)), b(wgmma::describe(shared.b[0], K_TILE * LINE)) {}
    };

    static __device__ __forceinline__ void consume(Shared& shared, const Arguments& arguments, u32 group) {
        i32 stage = 0;
        // in a uniform register 16-bit products are 1 % faster, FP8's 3 to 12 % slower (docs/perf.md)
        u32 parity = 0, warp = SCALED ? threadIdx.x / 32 : uniform(threadIdx.x / 32), turn = 0;
        u8* boxes = shared.boxes[warp];
        Operands operands(shared, group);
        Waiting waiting;
        for (i32 number = blockIdx.x / CLUSTER; number < shared.tile_count; number += gridDim.x / CLUSTER) {
            float total[COLUMNS / 2];
            ptx::barrier_wait(&shared.full[stage], parity);
            Tile tile = read(shared.tiles[stage]);
            if (!OVER_ROWS && tile.row + i32(group) * 64 >= tile.row_end || Epilogue::ADDS && tile.k_begin >= tile.k_end) {
                waiting.write(boxes, arguments);
                pass(shared, tile, stage, parity);
                continue;
            }
            i32 offset = OVER_ROWS ? tile.expert * arguments.a_columns : 0;
            Spot spot{{tile.row + i32(warp) * box::ROWS, tile.row_end}, tile.expert, tile.column, offset, turn++};
            Epilogue::prefetch(boxes, shared.epilogue, warp, arguments.epilogue, spot);
            if constexpr (SCALED)
                scaled_products(shared, operands, tile, group, stage, parity, total, [&] { waiting.write(boxes, arguments); });
            else
                products(shared, operands, tile, group, stage, parity, total, [&] { waiting.write(boxes, arguments); });
            if constexpr (Epilogue::HELD > 0)
                waiting.take(boxes, arguments, spot, total);
            else
                Epilogue::finish(boxes, shared.epilogue, warp, arguments.epilogue, spot, total);
        }
        waiting.write(boxes, arguments);
        if (threadIdx.x % 32 == 0) ptx::store_wait();
    }

    // What the last tile left to be written.
    struct Waiting {
        u32 packed[Epilogue::HELD ? Epilogue::HELD : 1];
        Spot spot = {};  // of no rows: nothing waits

        __device__ __forceinline__ void take(u8* boxes, const Arguments& arguments, const Spot& at, float (&total)[COLUMNS / 2]) {
            Epilogue::take(arguments.epilogue, at, total, packed);
            wgmma::hold(packed);  // now, not when it is written: the next product has the registers of the sums
            spot = at;
            if constexpr (!LATER) write(boxes, arguments);
        }

        __device__ __forceinline__ void write(u8* boxes, const Arguments& arguments) {
            if constexpr (Epilogue::HELD > 0) {
                if (spot.place.end > 0) Epilogue::put(boxes, arguments.epilogue, spot, packed);
                spot.place.end = 0;
            }
        }
    };

    // What the producer wrote is read by the lane that will tell it that the stage is free again: such a read needs no order
    // but its own. (What bulk copies wrote, scales of rows, all lanes read; their products are waited for in between.)
    static __device__ __forceinline__ u32 reader() { return CLUSTER > 1 ? ptx::cluster_rank() : 0; }

    static __device__ __forceinline__ Tile read(const Tile& shared) {
        Tile tile = {};
        if (threadIdx.x % 32 == reader()) tile = shared;
        return tile.from(reader());
    }

    static __device__ __forceinline__ float read(const float& shared) {
        float value = 0;
        if (threadIdx.x % 32 == reader()) value = shared;
        return __shfl_sync(~0u, value, reader());
    }

    static __device__ __forceinline__ void release(u64* empty) {
        u32 lane = threadIdx.x % 32;
        if (CLUSTER > 1) {
            if (lane < CLUSTER) ptx::barrier_arrive_at(empty, lane);
        } else if (lane == 0) {
            ptx::barrier_arrive(empty);
        }
    }

    // A tile of which none of this warpgroup's rows are the expert's, or that has nothing to sum.
    static __device__ __forceinline__ void pass(Shared& shared, const Tile& tile, i32& stage, u32& parity) {
        i32 k = tile.k_begin;
        do {
            ptx::barrier_wait(&shared.full[stage], parity);
            release(&shared.empty[stage]);
            advance(stage, parity);
            k += K_TILE;
        } while (k < tile.k_end);
    }

    // sum += 64 rows of a times N columns of b, from the column `first` on, over the K of one stage. The four products are
    // issued at once, from descriptors that are ready: in between, the other warpgroup's would slip in, and both would end at
    // the same time and leave the tensor cores idle together.
    template <i32 N>
    static __device__ __forceinline__ void multiply(float (&sum)[N / 2], const Operands& operands, i32 stage, i32 first,
                                                    bool accumulate) {
        constexpr i32 ALONG = LINE / 4 >> 4, ACROSS = K_TILE / 4 * LINE >> 4;  // from one product to the next
        u32 left = operands.a + stage * (ROWS * LINE >> 4), right = operands.b + stage * (COLUMNS * LINE >> 4) + (first * LINE >> 4);
        wgmma::fence();
#pragma unroll
        for (i32 i = 0; i < 4; i++)
            wgmma::Product<Input, N, A_MN, B_MN>::run(sum, wgmma::descriptor(left + i * (A_MN ? ACROSS : ALONG)),
                                                      wgmma::descriptor(right + i * (B_MN ? ACROSS : ALONG)), accumulate || i > 0);
        wgmma::commit();
    }

    static __device__ __forceinline__ void advance(i32& stage, u32& parity) {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }

    // `meanwhile` is done while the first product is under way.
    template <typename Meanwhile>
    static __device__ __forceinline__ void products(Shared& shared, const Operands& operands, const Tile& tile, u32 group, i32& stage, u32& parity,
                                                    float (&total)[COLUMNS / 2], Meanwhile meanwhile) {
        i32 last = -1, k = tile.k_begin;
        if constexpr (Epilogue::HELD > 0) {
            start(shared, operands, tile, stage, parity, k, total, false);
            meanwhile();
            last = stage;
            advance(stage, parity), k += K_TILE;
        }
        while (last < 0 || k < tile.k_end) {
            start(shared, operands, tile, stage, parity, k, total, last >= 0);
            wgmma::wait<1>();  // the product before this one is done with its stage
            if (last >= 0) release(&shared.empty[last]);
            last = stage;
            advance(stage, parity), k += K_TILE;
        }
        wgmma::hold(total);
        wgmma::wait<0>();
        wgmma::hold(total);
        release(&shared.empty[last]);
    }

    static __device__ __forceinline__ void start(Shared& shared, const Operands& operands, const Tile& tile, i32 stage, u32 parity, i32 k,
                                                 float (&total)[COLUMNS / 2], bool accumulate) {
        ptx::barrier_wait(&shared.full[stage], parity);
        if (OVER_ROWS && k + K_TILE > tile.k_end) clear(shared, stage, tile.k_end - k);
        multiply<COLUMNS>(total, operands, stage, 0, accumulate);
    }

    // Zeros for the lines of a stage from `line` on, which are other experts' rows: whatever they hold, infinities too, it
    // must not meet ours. By both warpgroups together.
    static __device__ __forceinline__ void clear(Shared& shared, i32 stage, i32 line) {
        for (i32 block = 0; block < (ROWS + COLUMNS) / 64; block++) {  // 64 columns wide each
            u8* first = block < ROWS / 64 ? shared.a[stage] + block * 64 * LINE : shared.b[stage] + (block - ROWS / 64) * 64 * LINE;
            for (i32 at = line * LINE + threadIdx.x * 16; at < K_TILE * LINE; at += CONSUMERS * 128 * 16)
                *reinterpret_cast<uint4*>(first + at) = make_uint4(0, 0, 0, 0);
        }
        ptx::fence_async_proxy();
        ptx::named_barrier(1, CONSUMERS * 128);
    }

    // What the sums of a stage are multiplied by.
    struct Factors {
        float upper, lower;  // of this lane's two rows
        __device__ __forceinline__ Factors(const Shared& shared, u32 row, i32 stage, i32 part) {
            float columns = read(shared.b_scales[stage][part]);
            upper = shared.a_scales[stage][row] * columns, lower = shared.a_scales[stage][row + 8] * columns;
        }
    };

    // While one warpgroup adds its sum to its totals, the other has the tensor cores, and the first must be back with its next
    // product before theirs ends: it reads its factors while a product is under way.
    template <typename Meanwhile>
    static __device__ __forceinline__ void scaled_products(Shared& shared, const Operands& operands, const Tile& tile, u32 group, i32& stage,
                                                           u32& parity, float (&total)[COLUMNS / 2], Meanwhile meanwhile) {
        add_scaled<true>(shared, operands, tile, group, stage, parity, total, meanwhile);
        for (i32 k = tile.k_begin + K_TILE; k < tile.k_end; k += K_TILE)
            add_scaled<false>(shared, operands, tile, group, stage, parity, total, [] {});
        if (OVER_ROWS && tile.k_begin == tile.k_end) {  // no rows: what was loaded is another expert's
#pragma unroll
            for (i32 i = 0; i < COLUMNS / 2; i++) total[i] = 0;
        }
    }

    template <bool FIRST, typename Meanwhile>
    static __device__ __forceinline__ void add_scaled(Shared& shared, const Operands& operands, const Tile& tile, u32 group, i32& stage, u32& parity,
                                                      float (&total)[COLUMNS / 2], Meanwhile meanwhile) {
        float sum[64];
        u32 row = (tile.row & 3) + group * 64 + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
        ptx::barrier_wait(&shared.full[stage], parity);
#pragma unroll
        for (i32 part = 0; part < PARTS; part++) {
            wgmma::hold(sum);
            multiply<128>(sum, operands, stage, part * 128, false);
            Factors factors(shared, row, stage, part);
            if (part == 0) meanwhile();
            wgmma::wait<0>();
            wgmma::hold(sum);
            if (part == PARTS - 1) release(&shared.empty[stage]);
#pragma unroll
            for (i32 i = 0; i < 64; i++) {
                float product = (i % 4 < 2 ? factors.upper : factors.lower) * sum[i];
                total[part * 64 + i] = FIRST ? product : total[part * 64 + i] + product;
            }
        }
        advance(stage, parity);
    }
};
