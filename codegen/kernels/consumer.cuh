// The consumer warpgroups of a grouped GEMM (grouped_gemm.cuh): products of what is in the ring, and their epilogue.
//
// FP8: the tensor cores add up in less than float32, so after every 128 columns of K their sum is scaled and added to
// float32 registers (DeepSeek-V3, section 3.3.2). A tile of 256 columns is multiplied in two parts, because the sums of
// both and the totals would not fit into registers; at 128 columns a tile, L2 could not deliver the operands in time.
#pragma once
#include "epilogue.cuh"
#include "kernel.cuh"
#include "schedule.cuh"
#include "wgmma.cuh"

template <typename Gemm>
struct Consumer {
    using Shared = typename Gemm::Shared;
    using Arguments = typename Gemm::Arguments;
    using Input = typename Gemm::Input;
    using Epilogue = typename Gemm::Epilogue;
    static constexpr i32 COLUMNS = Gemm::COLUMNS, STAGES = Gemm::STAGES, CLUSTER = Gemm::CLUSTER, CONSUMERS = Gemm::CONSUMERS;
    static constexpr i32 ROWS = Gemm::ROWS, LINE = Gemm::LINE, K_TILE = Gemm::K_TILE, PARTS = Gemm::PARTS;
    static constexpr bool SCALED = Gemm::SCALED, A_MN = Gemm::A_MN, B_MN = Gemm::B_MN, OVER_ROWS = Gemm::OVER_ROWS;
    // FP8 gradients of matrices are faster written at once (docs/perf.md).
    static constexpr bool LATER = !(SCALED && OVER_ROWS);

    // The first stage's rows of this warpgroup and columns, as matrix products are told of them.
    struct Operands {
        u32 a, b;
        __device__ __forceinline__ Operands(const Shared& shared, u32 group)
            : a(wgmma::describe(shared.a[0] + group * 64 * LINE, K_TILE * LINE)), b(wgmma::describe(shared.b[0], K_TILE * LINE)) {}
    };

    static __device__ __forceinline__ void run(Shared& shared, const Arguments& arguments, u32 group) {
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
            Gemm::advance(stage, parity);
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

    // `meanwhile` is done while the first product is under way.
    template <typename Meanwhile>
    static __device__ __forceinline__ void products(Shared& shared, const Operands& operands, const Tile& tile, u32 group,
                                                    i32& stage, u32& parity,
                                                    float (&total)[COLUMNS / 2], Meanwhile meanwhile) {
        i32 last = -1, k = tile.k_begin;
        if constexpr (Epilogue::HELD > 0) {
            start(shared, operands, tile, stage, parity, k, total, false);
            meanwhile();
            last = stage;
            Gemm::advance(stage, parity), k += K_TILE;
        }
        while (last < 0 || k < tile.k_end) {
            start(shared, operands, tile, stage, parity, k, total, last >= 0);
            wgmma::wait<1>();  // the product before this one is done with its stage
            if (last >= 0) release(&shared.empty[last]);
            last = stage;
            Gemm::advance(stage, parity), k += K_TILE;
        }
        wgmma::hold(total);
        wgmma::wait<0>();
        wgmma::hold(total);
        release(&shared.empty[last]);
    }

    static __device__ __forceinline__ void start(Shared& shared, const Operands& operands, const Tile& tile, i32 stage,
                                                 u32 parity, i32 k,
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
    static __device__ __forceinline__ void scaled_products(Shared& shared, const Operands& operands, const Tile& tile,
                                                           u32 group, i32& stage,
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
    static __device__ __forceinline__ void add_scaled(Shared& shared, const Operands& operands, const Tile& tile, u32 group,
                                                      i32& stage, u32& parity,
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
        Gemm::advance(stage, parity);
    }
};
