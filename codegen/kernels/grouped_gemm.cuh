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
//     offsets      (E,) int32: the end of each expert's rows, on the device; nobody else knows how many there are. Of one
//                  group that has all rows (Whole) they are not asked for
//
// Rows need not be there when the kernel begins: it may dispatch them itself (feed.cuh), by the three warps beside the
// producer's, of which one may fill the ring for the first time before.
//
// Tiles have numbers, of which a cluster's blocks have every so-manieth, or (TAKEN) the next whenever they are free
// (tickets.cuh): then blocks may begin late, and an expert's rows beyond a multiple may be another launch's.
//
// A persistent block is a producer warp (producer.cuh), which moves tiles into a ring of stages in shared memory by bulk
// tensor copies, and two consumer warpgroups (consumer.cuh), each of which multiplies 64 rows of the tile and writes them
// out on its own. Two blocks of a cluster take neighbouring row tiles of one expert and share its matrix: each loads half of
// it into both. Where an expert's last row tile has no neighbour, they take it together, with columns of their own, and share
// its rows; if it has few rows (OVERHANG), the pair before takes them along, each of the four warpgroups a quarter of its
// columns of them: most experts of random routing have so few rows beyond whole pairs, or lack so few.
#pragma once
#include "consumer.cuh"
#include "epilogue_activated.cuh"
#include "epilogue_backward.cuh"
#include "epilogue_fp8.cuh"
#include "feed.cuh"
#include "kernel.cuh"
#include "producer.cuh"
#include "schedule.cuh"
#include "tickets.cuh"
#include "wgmma.cuh"

template <typename Input_, i32 COLUMNS_, i32 STAGES_, i32 CLUSTER_, bool B_MN_, bool OVER_ROWS_, i32 OVERHANG_, typename Epilogue_,
          typename Feed_ = Given, bool TAKEN_ = false>
struct GroupedGemm {
    using Input = Input_;
    using Epilogue = Epilogue_;
    using Feed = Feed_;
    static constexpr i32 COLUMNS = COLUMNS_, STAGES = STAGES_, CLUSTER = CLUSTER_, OVERHANG = OVERHANG_;
    static constexpr bool B_MN = B_MN_, OVER_ROWS = OVER_ROWS_, TAKEN = TAKEN_;
    static constexpr i32 CONSUMERS = 2, BOX_ROWS = 64, ROWS = BOX_ROWS * CONSUMERS, THREADS = 128 * (CONSUMERS + 1);
    static constexpr i32 BLOCKS = CLUSTER;
    static constexpr i32 LINE = 128;                     // bytes of a line of a stage: one swizzle atom
    static constexpr i32 K_TILE = LINE / Input::BYTES;   // of K, in a stage
    static constexpr i32 SHARE = COLUMNS / CLUSTER;      // columns that each block of the cluster loads for all
    static constexpr bool SCALED = Input::SCALED, A_MN = OVER_ROWS && !SCALED;
    static constexpr bool PAIRED = Epilogue::PAIRED;
    // Who fills the ring before the producer may needs registers that not every epilogue leaves.
    static constexpr bool EARLY = Epilogue::REGISTERS <= 216 && !OVER_ROWS && !TAKEN;
    static constexpr i32 BOX = PAIRED && CLUSTER == 1 ? COLUMNS / 2 : SHARE;  // columns that are loaded at once
    static constexpr i32 WIDTH = PAIRED ? COLUMNS / 2 : COLUMNS;  // of a tile, in what the schedule counts
    // A bulk copy without swizzle begins at a multiple of 16 bytes, a tile at any row: up to three scales before it come too.
    static constexpr i32 SCALES = ROWS + 4;
    static_assert(!(SCALED && B_MN), "FP8 is read along K only");
    static_assert(!OVER_ROWS || SCALED || B_MN, "what is summed over rows is read across them");
    static constexpr i32 PARTS = COLUMNS / 128;  // of an FP8 tile, each of a scale block's columns, multiplied one after the other
    static_assert(!SCALED || COLUMNS % 128 == 0, "a part of an FP8 tile is a scale block wide");
    static_assert(SHARE % 64 == 0, "a line across K holds 64 columns");
    static_assert(CLUSTER == 1 || CLUSTER == CONSUMERS, "blocks that share rows load a warpgroup's each");
    static_assert(OVERHANG == 0 || CLUSTER == 2 && COLUMNS == 256 && !SCALED && !OVER_ROWS, "pairs take rows along in 16 bits");
    static_assert(OVERHANG == 0 || !(PAIRED && B_MN), "half of the columns of a line across K have no stride");
    static_assert(OVERHANG <= BOX_ROWS && OVERHANG / CLUSTER % 8 == 0, "each block of a pair loads whole swizzle atoms of them");
    static_assert(!(OVER_ROWS && (Feed::BESIDE || Feed::WHOLE)), "rows are dispatched, or one group, for rows times matrices");
    static_assert(!Feed::BESIDE || Feed::AT_LEAST >= 2 * BAND * CLUSTER * ROWS, "or a cluster waits for itself (feed.cuh)");

    template <bool over_rows, bool whole>
    struct ScheduleOf {
        using Type = RowSchedule<ROWS, WIDTH, CLUSTER, OVERHANG, TAKEN>;
    };
    template <>
    struct ScheduleOf<true, false> {
        using Type = MatrixSchedule<ROWS * CLUSTER, WIDTH>;
    };
    template <>
    struct ScheduleOf<false, true> {
        using Type = WholeSchedule<ROWS, WIDTH, CLUSTER>;
    };
    using Schedule = typename ScheduleOf<OVER_ROWS, Feed::WHOLE>::Type;
    using Tickets = ::Tickets<TAKEN, CLUSTER, STAGES>;
    static_assert(!TAKEN || !Feed::WHOLE && !(SCALED && OVER_ROWS), "tiles are taken of rows by expert, in FP8 not of their sums");

    struct Arguments {
        TensorMap a;          // boxes of BOX_ROWS x K_TILE, or of K_TILE x BOX_ROWS if A_MN
        TensorMap b, b_pair;  // of three dimensions; boxes of BOX x K_TILE, of K_TILE x 64 if B_MN; the second is for PAIRED
        TensorMap overhang;   // a; boxes of OVERHANG / CLUSTER x K_TILE
        TensorMap scales;     // of a, transposed: (K / 128, rows); boxes of 1 x SCALES
        const i32* offsets;     // null if all rows are of one group
        const float* b_scales;  // (E, b_scale_blocks, b_scale_stride); a pair's other half begins b_scale_pair blocks later
        i32 experts, a_columns, n, b_scale_blocks, b_scale_stride, b_scale_pair;
        i32 early;     // whether offsets, b and its scales were there before the grid before this one began
        i32 multiple;  // TAKEN, not OVER_ROWS: of each expert's rows only so many times that many, the first ones; 0 for all
        float factor;  // OVER_ROWS: of all sums
        u32* taken;    // TAKEN: zero at first
        typename Feed::Arguments feed;
        typename Epilogue::Arguments epilogue;
    };

    struct Shared {
        alignas(1024) u8 a[STAGES][(ROWS + OVERHANG) * LINE];
        alignas(1024) u8 b[STAGES][COLUMNS * LINE];
        alignas(1024) u8 boxes[CONSUMERS * 4][Epilogue::BOXES * box::BYTES];  // of each warp
        alignas(128) float a_scales[STAGES][SCALED ? (SCALES + 31) / 32 * 32 : 1];
        float b_scales[STAGES][SCALED ? PARTS : 1];
        Tile tiles[STAGES];  // of the stage that is a tile's first
        u64 full[STAGES], empty[STAGES];
        typename Epilogue::Shared epilogue;
        typename Tickets::Shared tickets;
        i32 tile_count;
        i32 reached;  // a row of the tile that the producer is at
    };

    static __device__ __forceinline__ Schedule schedule_of(const Arguments& arguments) {
        if constexpr (Feed::WHOLE)
            return Schedule(arguments.feed.rows, arguments.a_columns, arguments.n);
        else if constexpr (OVER_ROWS)
            return Schedule(arguments.offsets, arguments.experts, arguments.a_columns, arguments.n);
        else
            return Schedule(arguments.offsets, arguments.experts, arguments.a_columns, arguments.n, arguments.multiple);
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
            if (TAKEN) Tickets::prepare(shared.tickets);
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
                Producer<GroupedGemm>::run(shared, arguments, rows);
            else
                Producer<GroupedGemm>::beside(shared, arguments, rows);
        } else {
            ptx::take_registers<Epilogue::REGISTERS>();
            ptx::wait_for_earlier_grids();
            Consumer<GroupedGemm>::run(shared, arguments, group);
        }
        if (CLUSTER > 1) {  // nobody leaves while another may still arrive at its barriers
            __syncwarp();
            ptx::cluster_sync();
        }
    }

    static __device__ __forceinline__ bool starts_early(const Arguments& arguments) { return EARLY && arguments.early; }

    // To the ring's next stage.
    static __device__ __forceinline__ void advance(i32& stage, u32& parity) {
        if (++stage == STAGES) stage = 0, parity ^= 1;
    }
};
