// Quantised rows in expert order, transposed for the gradient of the matrices: (rows, columns) to (columns, padded rows).
//
// FP8 products read operands along what they sum over, here the rows. Each expert's rows are filled up with zeros to whole
// blocks of 128, so that a block belongs to one expert and its gradient begins and ends with one:
//
//     PadOffsets       the end of each expert's blocks, in rows
//     TransposeRows    a block of threads for each block of rows and some blocks of columns
//
// Columns that are padded halves, gate and up projection, lose their padding and come to lie as the matrix has them.
//
// The new scales are for the rows of a block:
//     PER_COLUMN       one for each column: gradients, quantised anew along the rows
//     otherwise        one for 128 columns, the largest of the rows', or the power of two above: the values are shifted to
//                      it, which is exact but for what falls below the smallest number if Scales are powers of two
#pragma once
#include "fp8.cuh"
#include "kernel.cuh"

struct PadOffsets {
    static constexpr i32 THREADS = 32, BLOCKS = 1;
    struct Arguments {
        const i32* offsets;  // (E,)
        i32* padded;         // (E,)
        i32 experts;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        i32 lane = threadIdx.x, before = 0;
        for (i32 first = 0; first < arguments.experts; first += 32) {
            i32 expert = first + lane, end = 0;
            if (expert < arguments.experts) {
                i32 rows = arguments.offsets[expert] - (expert ? arguments.offsets[expert - 1] : 0);
                end = (rows + fp8::BLOCK - 1) / fp8::BLOCK * fp8::BLOCK;
            }
            for (i32 step = 1; step < 32; step *= 2) {
                i32 other = __shfl_up_sync(~0u, end, step);
                if (lane >= step) end += other;
            }
            end += before;
            before = __shfl_sync(~0u, end, 31);
            if (expert < arguments.experts) arguments.padded[expert] = end;
        }
    }
};

// GATHERED: a row of the values is a token's, found through the row's assignment.
template <bool GATHERED, bool PER_COLUMN, typename Scales>
struct TransposeRows {
    static constexpr i32 THREADS = fp8::TILE_THREADS, BLOCKS = 1, WARPS = THREADS / 32;
    struct Arguments {
        const u8* values;     // (rows or tokens, columns)
        const float* scales;  // of a row or token and a block of columns, by the strides below
        const i32* order;     // (rows,): the assignment of a row
        const i32 *offsets, *padded;  // (E,); null of one expert that has all rows
        u8* out;              // (features, padded rows)
        float* out_scales;    // PER_COLUMN: (blocks of rows, scale_pitch); otherwise (blocks of columns, blocks of rows)
        i32 scale_row, scale_block;
        i32 experts, rows, top_k, columns, row_blocks, scale_pitch;
        // Halves of the columns, `half` each (all columns if there is one), begin with that many features; those of the first
        // half are lines 0, step, 2 step, ... of the result, and those of the second begin with line `second`.
        i32 half, features, step, second;
    };
    struct Shared {
        u8 tile[fp8::BLOCK * fp8::BLOCK];
        u8 turned[fp8::BLOCK * fp8::BLOCK];
        float scales[fp8::BLOCK];
        float most[WARPS][fp8::BLOCK];
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 row_block = blockIdx.x % arguments.row_blocks, begin = row_block * fp8::BLOCK, end = arguments.rows;
        if (arguments.offsets) {
            i32 expert = expert_of(arguments, row_block);
            if (expert < 0) return;  // behind all experts' blocks
            begin -= expert ? __ldg(arguments.padded + expert - 1) - __ldg(arguments.offsets + expert - 1) : 0;
            end = __ldg(arguments.offsets + expert);
        }
        i32 count = min(fp8::BLOCK, end - begin);
        i64 sources[4];  // the rows or tokens of this thread's sixteens of columns; -1 where there is none
#pragma unroll
        for (i32 i = 0; i < 4; i++) sources[i] = source(arguments, begin, count, threadIdx.x / 8 + 32 * i);
        i32 blocks = (arguments.columns + fp8::BLOCK - 1) / fp8::BLOCK, step = gridDim.x / arguments.row_blocks;
        i64 scaled = source(arguments, begin, count, threadIdx.x % fp8::BLOCK);
        for (i32 block = blockIdx.x / arguments.row_blocks; block < blocks; block += step) {
            load(shared, arguments, sources, scaled, block);
            __syncthreads();
            if constexpr (PER_COLUMN)
                requantize(shared, arguments, row_block, block);
            else
                shift(shared, arguments, row_block, block, count);
            __syncthreads();
            i64 pitch = i64(arguments.row_blocks) * fp8::BLOCK;
            Lines lines(arguments, block);
            fp8::write_transposed(shared.turned, arguments.out + lines.first * pitch + row_block * fp8::BLOCK,
                                  arguments.step * pitch, lines.count);
        }
    }

    // Whose rows a block holds; -1 if nobody's.
    static __device__ __forceinline__ i32 expert_of(const Arguments& arguments, i32 row_block) {
        for (i32 first = 0; first < arguments.experts; first += 32) {
            i32 own = first + threadIdx.x % 32;
            u32 later = __ballot_sync(~0u, own < arguments.experts && row_block * fp8::BLOCK < __ldg(arguments.padded + own));
            if (later) return first + __ffs(later) - 1;
        }
        return -1;
    }

    // Where a block's columns become lines.
    struct Lines {
        i32 first, count;
        __device__ __forceinline__ Lines(const Arguments& arguments, i32 block) {
            i32 column = block * fp8::BLOCK, second = column >= arguments.half;
            i32 feature = column - second * arguments.half;
            first = feature * arguments.step + second * arguments.second, count = arguments.features - feature;
        }
    };

    static __device__ __forceinline__ i64 source(const Arguments& arguments, i32 begin, i32 count, i32 row) {
        if (row >= count) return -1;
        return GATHERED ? __ldg(arguments.order + begin + row) / arguments.top_k : begin + row;
    }

    static __device__ __forceinline__ void load(Shared& shared, const Arguments& arguments, const i64 (&sources)[4], i64 scaled,
                                                i32 block) {
        i32 column = block * fp8::BLOCK + threadIdx.x % 8 * 16;
        uint4 found[4];
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            found[i] = make_uint4(0, 0, 0, 0);
            if (sources[i] >= 0 && column < arguments.columns)
                found[i] = __ldg(reinterpret_cast<const uint4*>(arguments.values + sources[i] * arguments.columns + column));
        }
        if (threadIdx.x < fp8::BLOCK)
            shared.scales[threadIdx.x] =
                scaled < 0 ? 0 : __ldg(arguments.scales + scaled * arguments.scale_row + i64(block) * arguments.scale_block);
#pragma unroll
        for (i32 i = 0; i < 4; i++) reinterpret_cast<uint4*>(shared.tile)[threadIdx.x + THREADS * i] = found[i];
    }

    static __device__ __forceinline__ void shift(Shared& shared, const Arguments& arguments, i32 row_block, i32 block, i32 count) {
        i32 lane = threadIdx.x % 32;
        float most = 0;
        for (i32 row = lane; row < count; row += 32) most = larger(most, shared.scales[row]);
        for (i32 other = 1; other < 32; other *= 2) most = larger(most, __shfl_xor_sync(~0u, most, other));
        if constexpr (!Scales::EXACT) most = fp8::power_above(most);
        float inverse = fp8::inverse_of(most);
        u32 words[16];
#pragma unroll
        for (i32 i = 0; i < 16; i++) {
            float ratio = shared.scales[threadIdx.x / 32 * 16 + i] * inverse;
            words[i] = times(fp8::word_of(shared.tile, i), ratio);
        }
        fp8::put_transposed(shared.turned, words);
        if (threadIdx.x == 0) arguments.out_scales[i64(block) * arguments.scale_pitch + row_block] = most;
    }

    // Four numbers times a ratio, at most 1.
    static __device__ __forceinline__ u32 times(u32 found, float ratio) {
        if constexpr (Scales::EXACT) {  // below 2^-24, which fp16 does not have, nothing is left of e4m3 either
            u32 factor = ptx::pack_fp16(ratio, ratio);
            u16 low = ptx::narrow_e4m3(ptx::multiply_fp16(ptx::widen_e4m3(found & 0xffff), factor));
            u16 high = ptx::narrow_e4m3(ptx::multiply_fp16(ptx::widen_e4m3(found >> 16), factor));
            return low | u32(high) << 16;
        } else {
            float v[4];
            ptx::unpack_e4m3(found & 0xffff, v[0], v[1]);
            ptx::unpack_e4m3(found >> 16, v[2], v[3]);
            return ptx::pack_e4m3(v[0] * ratio, v[1] * ratio) | u32(ptx::pack_e4m3(v[2] * ratio, v[3] * ratio)) << 16;
        }
    }

    // Scales are positive, and infinite ones infect: no NaN is lost.
    static __device__ __forceinline__ float larger(float a, float b) { return a > b ? a : b; }

    static __device__ __forceinline__ void requantize(Shared& shared, const Arguments& arguments, i32 row_block, i32 block) {
        fp8::Scale scales[4];
        fp8::requantize_columns(shared, scales);
        Lines lines(arguments, block);
        float* out = arguments.out_scales + i64(row_block) * arguments.scale_pitch + lines.first;
        i32 column = threadIdx.x % 32 * 4;
#pragma unroll
        for (i32 j = 0; j < 4; j++)
            if (threadIdx.x < 32 && column + j < lines.count) out[(column + j) * arguments.step] = scales[j].value;
    }
};
