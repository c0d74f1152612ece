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
    static constexpr i32 OVERHANG = Gemm::OVERHANG;
    static constexpr bool SCALED = Gemm::SCALED, A_MN = Gemm::A_MN, B_MN = Gemm::B_MN, OVER_ROWS = Gemm::OVER_ROWS;
    static constexpr bool TAKEN = Gemm::TAKEN;
    // FP8 gradients of matrices are faster written at once (docs/perf.md).
    static constexpr bool LATER = !(SCALED && OVER_ROWS);

    // Where the compiler loses sight of it that all lanes are at the same stage, it computes the products' descriptors in each
    // of them, which is up to 10 % slower. Elsewhere it is the other way around: to tell it costs up to 4 % (docs/perf.md).
    static constexpr bool UNIFORM = OVERHANG > 0 || Epilogue::HELD == 0 && !(SCALED && OVER_ROWS);

    // Whether it is told of what is the same for all lanes, or for all tiles. FP8's other loops are 1 to 10 % slower so.
    static constexpr bool TOLD = UNIFORM || !SCALED, WHOLE = TOLD && !OVER_ROWS;

    // The first stage's rows of this warpgroup and columns, as matrix products are told of them.
    struct Operands {
        u32 a, b;
        __device__ __forceinline__ Operands(const Shared& shared, u32 group)
            : a(wgmma::describe(shared.a[0] + group * 64 * LINE, K_TILE * LINE)), b(wgmma::describe(shared.b[0], K_TILE * LINE)) {}
        __device__ __forceinline__ u32 a_of(i32 stage) const { return a + stage * ((ROWS + OVERHANG) * LINE >> 4); }
        __device__ __forceinline__ u32 b_of(i32 stage, i32 column) const { return b + (stage * COLUMNS + column) * (LINE >> 4); }
    };

    // A tile's rows alone.
    struct Alone {
        template <bool FIRST>
        __device__ __forceinline__ void multiply(i32) {}
        __device__ __forceinline__ void hold() {}
    };

    // The sums of the rows that go along, 64 of them or less and whatever follows, times 64 columns for each warpgroup of the
    // cluster. If the columns are two matrices', half of them are of one and half of the other, every fourth eight columns: so
    // one product finds them at one stride.
    struct Along {
        static constexpr i32 WIDTH = 64, APART = Gemm::PAIRED ? COLUMNS / 8 : 8;  // from eight columns of a matrix to its next
        float sums[WIDTH / 2];
        u32 a, b;  // of the first stage

        __device__ __forceinline__ Along(const Operands& operands, u32 group)
            : a(operands.a + ((CONSUMERS - group) * 64 * LINE >> 4)), b(operands.b_of(0, first_column(group))) {}

        static __device__ __forceinline__ u32 first_column(u32 group) {
            return (ptx::cluster_rank() * CONSUMERS + group) * (Gemm::PAIRED ? 8 : WIDTH);
        }

        __device__ __forceinline__ void first(i32 stage) {
            wgmma::fence();
            multiply<true>(stage);
            wgmma::commit();
        }

        template <bool FIRST>
        __device__ __forceinline__ void multiply(i32 stage) {
            u32 left = a + stage * ((ROWS + OVERHANG) * LINE >> 4), right = b + stage * (COLUMNS * LINE >> 4);
            issue<WIDTH, FIRST, APART * LINE>(sums, left, right);
        }

        __device__ __forceinline__ void hold() { wgmma::hold(sums); }
    };

    static __device__ __forceinline__ void run(Shared& shared, const Arguments& arguments, u32 group) {
        i32 stage = 0;
        // in a uniform register 16-bit products are 1 % faster, FP8's 3 to 12 % slower (docs/perf.md)
        u32 parity = 0, warp = SCALED ? threadIdx.x / 32 : uniform(threadIdx.x / 32), turn = 0;
        if (!SCALED) group = warp / 4;
        u8* boxes = shared.boxes[warp];
        Operands operands(shared, group);
        Waiting waiting;
        i32 count = TOLD ? uniform(shared.tile_count) : 0;
        for (i32 number = blockIdx.x / CLUSTER; TAKEN || number < (TOLD ? count : shared.tile_count);
             number += gridDim.x / CLUSTER) {
            float total[COLUMNS / 2];
            if (UNIFORM) stage = uniform(stage), parity = uniform(parity);
            ptx::barrier_wait(&shared.full[stage], parity);
            Tile tile = read(shared.tiles[stage], arguments);
            if (TAKEN && tile.expert < 0) break;
            if (!OVER_ROWS && tile.row + i32(group) * 64 >= tile.row_end || Epilogue::ADDS && tile.k_begin >= tile.k_end) {
                waiting.write(boxes, arguments);
                pass(shared, tile, stage, parity);
                continue;
            }
            i32 offset = OVER_ROWS ? tile.expert * arguments.a_columns : 0;
            Spot spot{{tile.row + i32(warp) * box::ROWS, tile.row_end}, tile.expert, tile.column, offset, turn++};
            Epilogue::prefetch(boxes, shared.epilogue, warp, arguments.epilogue, spot);
            auto meanwhile = [&] { waiting.write(boxes, arguments); };
            if constexpr (SCALED)
                scaled_products(shared, operands, tile, group, stage, parity, total, meanwhile);
            else
                products(shared, operands, tile, group, stage, parity, total, meanwhile, [&](Along& along) {
                    if constexpr (OVERHANG > 0) {
                        i32 row = tile.overhang + i32(warp) % 4 * box::ROWS, column = tile.column + Along::first_column(group);
                        Spot beyond{{row, tile.row_end}, tile.expert, column, 0, 0};
                        Epilogue::template finish_along<Along::APART>(boxes, arguments.epilogue, beyond, along.sums);
                    }
                });
            if (OVER_ROWS && !SCALED && arguments.factor != 1) {  // FP8's producer has seen to it
#pragma unroll
                for (i32 i = 0; i < COLUMNS / 2; i++) total[i] *= arguments.factor;
            }
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

    static __device__ __forceinline__ Tile read(const Tile& shared, const Arguments& arguments) {
        Tile tile = {};
        if (threadIdx.x % 32 == reader()) tile = shared;
        auto share = [](i32 value) { return __shfl_sync(~0u, value, reader()); };
        return {share(tile.expert), share(tile.row), share(tile.row_end), share(tile.column),
                WHOLE ? 0 : share(tile.k_begin), WHOLE ? arguments.a_columns : share(tile.k_end),
                0, OVERHANG > 0 ? uniform(tile.overhang) : 0};  // zero in other lanes
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

    // sum += 64 rows of a times N columns of b, over the K of one stage; FIRST: sum = that. The four products are issued at once,
    // from descriptors that are ready: in between, the other warpgroup's would slip in, and both would end at the same time
    // and leave the tensor cores idle together. (FP8's sums are best in the same registers all the time.)
    template <i32 N, bool FIRST, u32 B_STRIDE = 1024>
    static __device__ __forceinline__ void issue(float (&sum)[N / 2], u32 a, u32 b) {
        using Product = wgmma::Product<Input, N, A_MN, B_MN>;
        constexpr i32 ALONG = LINE / 4 >> 4, ACROSS = K_TILE / 4 * LINE >> 4;  // from one product to the next
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            u64 left = wgmma::descriptor(a + i * (A_MN ? ACROSS : ALONG));
            u64 right = wgmma::descriptor<B_STRIDE>(b + i * (B_MN ? ACROSS : ALONG));
            if constexpr (FIRST && !SCALED) {
                if (i == 0) {
                    Product::begin(sum, left, right);
                    continue;
                }
            }
            Product::run(sum, left, right, i > 0 || !FIRST);
        }
    }

    // `meanwhile` is done while the first product is under way; rows that go along begin after it, for both want the same
    // registers. `finish` is told of these rows' sums.
    template <typename Meanwhile, typename Finish>
    static __device__ __forceinline__ void products(Shared& shared, const Operands& operands, const Tile& tile, u32 group,
                                                    i32& stage, u32& parity, float (&total)[COLUMNS / 2],
                                                    Meanwhile meanwhile, Finish finish) {
        Alone alone;
        start<true>(shared, operands, tile, stage, parity, tile.k_begin, total, alone);
        meanwhile();
        if constexpr (OVERHANG > 0) {
            if (tile.overhang) {
                Along along(operands, group);
                along.first(stage);
                others(shared, operands, tile, stage, parity, total, along);
                finish(along);
                return;
            }
        }
        others(shared, operands, tile, stage, parity, total, alone);
    }

    // All products but the first, which is under way.
    template <typename Rest>
    static __device__ __forceinline__ void others(Shared& shared, const Operands& operands, const Tile& tile, i32& stage,
                                                  u32& parity, float (&total)[COLUMNS / 2], Rest& rest) {
        if (UNIFORM) stage = uniform(stage), parity = uniform(parity);
        i32 last = stage;
        Gemm::advance(stage, parity);
#pragma unroll 1
        for (i32 k = tile.k_begin + K_TILE; k < tile.k_end; k += K_TILE) {
            start<false>(shared, operands, tile, stage, parity, k, total, rest);
            wgmma::wait<1>();  // the product before this one is done with its stage
            release(&shared.empty[last]);
            last = stage;
            Gemm::advance(stage, parity);
        }
        wgmma::hold(total);
        rest.hold();
        wgmma::wait<0>();
        wgmma::hold(total);
        rest.hold();
        release(&shared.empty[last]);
    }

    template <bool FIRST, typename Rest>
    static __device__ __forceinline__ void start(Shared& shared, const Operands& operands, const Tile& tile, i32 stage,
                                                 u32 parity, i32 k, float (&total)[COLUMNS / 2], Rest& rest) {
        ptx::barrier_wait(&shared.full[stage], parity);
        if (OVER_ROWS && k + K_TILE > tile.k_end) clear(shared, stage, tile.k_end - k);
        wgmma::fence();
        rest.template multiply<FIRST>(stage);  // the shorter first: up to 7 % faster
        issue<COLUMNS, FIRST>(total, operands.a_of(stage), operands.b_of(stage, 0));
        wgmma::commit();
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
            wgmma::fence();
            issue<128, true>(sum, operands.a_of(stage), operands.b_of(stage, part * 128));
            wgmma::commit();
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
