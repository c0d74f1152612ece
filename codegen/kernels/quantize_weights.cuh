// The experts' matrices in e4m3, with a scale for each block of 128 x 128, both as they lie and transposed: forward and
// backward multiply by one each, and FP8 products read operands along K only.
//
// A matrix is one or two halves (gate and up projection) along its rows or along its columns, each of which is padded with
// zeros to whole blocks: where they were interleaved, or two tensors, they come to lie side by side. A block of threads has
// one block of the matrix.
#pragma once
#include "kernel.cuh"
#include "tile.cuh"
#include "wgmma.cuh"

// COLUMN_STEP: 2 where the halves' columns are interleaved; then `second` is `first`, and the other half of every pair is it.
template <typename Input, i32 COLUMN_STEP, typename Scales>
struct QuantizeWeights {
    static constexpr i32 THREADS = tile::THREADS, BLOCKS = 1, RESIDENT = 3, OWN = tile::OWN;
    struct Arguments {
        const u16 *first, *second;          // each half of the first expert
        u8* same;                           // (E, padded rows, padded columns)
        float* same_scales;                 // (E, blocks of rows, blocks of columns)
        u8* transposed;                     // (E, padded columns, padded rows)
        float* transposed_scales;           // (E, blocks of columns, blocks of rows)
        i32 expert_stride, row_stride;      // of the halves, in elements; columns lie one after the other
        i32 rows, columns;                  // of a half
        i32 row_halves, column_halves;      // 1 or 2
    };
    struct Shared {
        u8 turned[fp8::BLOCK * fp8::BLOCK];
        float most[THREADS / 32];
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 half_rows = (arguments.rows + fp8::BLOCK - 1) / fp8::BLOCK, all_rows = half_rows * arguments.row_halves;
        i32 half_columns = (arguments.columns + fp8::BLOCK - 1) / fp8::BLOCK, all_columns = half_columns * arguments.column_halves;
        i32 column_block = blockIdx.x % all_columns, row_block = blockIdx.x / all_columns % all_rows;
        i64 expert = blockIdx.x / all_columns / all_rows;
        bool up = row_block >= half_rows || column_block >= half_columns;
        const u16* from = (up ? arguments.second : arguments.first) + expert * arguments.expert_stride;
        u32 pairs[OWN][OWN / 2];
        load(arguments, from, row_block % half_rows * fp8::BLOCK, column_block % half_columns * fp8::BLOCK, up, pairs);
        fp8::Scale scale = scale_of_block(shared, pairs);
        i64 row = (expert * all_rows + row_block) * fp8::BLOCK, column = (expert * all_columns + column_block) * fp8::BLOCK;
        i64 row_bytes = i64(all_columns) * fp8::BLOCK, column_bytes = i64(all_rows) * fp8::BLOCK;
        u8* same = arguments.same ? arguments.same + row * row_bytes + column_block * fp8::BLOCK : nullptr;
        uint2 rows[OWN];
        quantize(pairs, scale.inverse, rows);
        if (same) write_rows(same, row_bytes, rows);
        if (threadIdx.x == 0 && same)
            arguments.same_scales[(expert * all_rows + row_block) * all_columns + column_block] = scale.value;
        if (!arguments.transposed) return;
        tile::put(shared.turned, rows);
        __syncthreads();
        tile::write(shared.turned, arguments.transposed + column * column_bytes + row_block * fp8::BLOCK, column_bytes, fp8::BLOCK);
        if (threadIdx.x == 0)
            arguments.transposed_scales[(expert * all_columns + column_block) * all_rows + row_block] = scale.value;
    }

    // A thread's eight columns of eight rows.
    static __device__ __forceinline__ void load(const Arguments& arguments, const u16* from, i32 row, i32 column, bool up,
                                                u32 (&pairs)[OWN][OWN / 2]) {
        column += tile::first_column(), row += tile::first_row();
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            uint4 found[COLUMN_STEP] = {};
            if (row + i < arguments.rows && column < arguments.columns) {
                const u16* place = from + i64(row + i) * arguments.row_stride + column * COLUMN_STEP;
#pragma unroll
                for (i32 step = 0; step < COLUMN_STEP; step++) found[step] = __ldcs(reinterpret_cast<const uint4*>(place) + step);
            }
            const u32* words = reinterpret_cast<const u32*>(found);
#pragma unroll
            for (i32 pair = 0; pair < OWN / 2; pair++)
                pairs[i][pair] = COLUMN_STEP == 1 ? words[pair]
                                                  : __byte_perm(words[2 * pair], words[2 * pair + 1], up ? 0x7632 : 0x5410);
        }
    }

    static __device__ __forceinline__ fp8::Scale scale_of_block(Shared& shared, const u32 (&pairs)[OWN][OWN / 2]) {
        u32 most = 0;
#pragma unroll
        for (i32 i = 0; i < OWN * OWN / 2; i++) most = Input::larger(most, pairs[i / (OWN / 2)][i % (OWN / 2)] & 0x7fff7fff);
#pragma unroll
        for (i32 other = 1; other < 32; other *= 2) most = Input::larger(most, __shfl_xor_sync(~0u, most, other));
        float low, high;
        Input::unpack(most, low, high);
        if (threadIdx.x % 32 == 0) shared.most[threadIdx.x / 32] = fmaxf(low, high);
        __syncthreads();
        float all = 0;
#pragma unroll
        for (i32 warp = 0; warp < THREADS / 32; warp++) all = fmaxf(all, shared.most[warp]);
        return Scales::of(all);
    }

    static __device__ __forceinline__ void quantize(const u32 (&pairs)[OWN][OWN / 2], float inverse, uint2 (&rows)[OWN]) {
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            u16 narrow[OWN / 2];
#pragma unroll
            for (i32 pair = 0; pair < OWN / 2; pair++) {
                float low, high;
                Input::unpack(pairs[i][pair], low, high);
                narrow[pair] = ptx::pack_e4m3(low * inverse, high * inverse);
            }
            rows[i] = make_uint2(narrow[0] | narrow[1] << 16, narrow[2] | narrow[3] << 16);
        }
    }

    static __device__ __forceinline__ void write_rows(u8* to, i64 pitch, const uint2 (&rows)[OWN]) {
#pragma unroll
        for (i32 i = 0; i < OWN; i++)
            *reinterpret_cast<uint2*>(to + (tile::first_row() + i) * pitch + tile::first_column()) = rows[i];
    }
};
