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
#include "kernel.cuh"
#include "requantize.cuh"

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

// GATHERED: a row of the values is a token's, found through the row's assignment. Scales are the format of what is given;
// PER_COLUMN takes both.
template <bool GATHERED, bool PER_COLUMN, typename Scales>
struct TransposeRows {
    static constexpr i32 THREADS = tile::THREADS, BLOCKS = 1, RESIDENT = PER_COLUMN ? 3 : 4, OWN = tile::OWN;
    struct Arguments {
        const u8* values;     // (rows or tokens, columns), lines of `line`
        const float* scales;  // of a row or token and a block of columns, by the strides below
        const i32* order;     // (rows,): the assignment of a row
        const i32 *offsets, *padded;  // (E,); null of one expert that has all rows
        u8* out;              // (features, padded rows)
        float* out_scales;    // PER_COLUMN: (blocks of rows, scale_pitch); otherwise (blocks of columns, blocks of rows)
        i32 scale_row, scale_block;
        i32 experts, rows, top_k, columns, line, row_blocks, scale_pitch;
        // Halves of the columns, `half` each (all columns if there is one), begin with that many features; those of the first
        // half are lines 0, step, 2 step, ... of the result, and those of the second begin with line `second`.
        i32 half, features, step, second;
    };
    struct Shared : requantize::Shared {
        i32 sources[tile::SIZE];  // the rows or tokens of a tile; -1 where there is none
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
        i32 row = begin + threadIdx.x, source = -1;
        if (threadIdx.x < tile::SIZE) {
            if (row < end) source = GATHERED ? __ldg(arguments.order + row) / arguments.top_k : row;
            shared.sources[threadIdx.x] = source;
        }
        __syncthreads();
        i32 blocks = (arguments.columns + fp8::BLOCK - 1) / fp8::BLOCK, step = gridDim.x / arguments.row_blocks;
        uint2 rows[OWN];
        float scale;
        auto load = [&](i32 block) {
            find(shared, arguments, block, rows);
            i64 place = i64(source) * arguments.scale_row + i64(block) * arguments.scale_block;
            scale = source < 0 ? 0 : __ldg(arguments.scales + place);
        };
        i32 block = blockIdx.x / arguments.row_blocks;
        load(block);
        for (; block < blocks; block += step) {
            if (threadIdx.x < tile::SIZE) shared.scales[threadIdx.x] = scale;
            __syncthreads();
            Lines lines(arguments, block);
            if constexpr (PER_COLUMN) {
                fp8::Scale scales[4];
                auto again = [&](uint2(&found)[OWN]) { find(shared, arguments, block, found); };
                requantize::columns(shared, rows, again, scales);
                float* out = arguments.out_scales + i64(row_block) * arguments.scale_pitch + lines.first;
                requantize::write_scales(scales, out, arguments.step, lines.count);
            } else {
                shift(shared, rows, arguments.out_scales + i64(block) * arguments.scale_pitch + row_block);
            }
            if (block + step < blocks) load(block + step);  // on its way while this one is written
            __syncthreads();
            i64 pitch = i64(arguments.row_blocks) * fp8::BLOCK;
            tile::write(shared.turned, arguments.out + lines.first * pitch + row_block * fp8::BLOCK, arguments.step * pitch,
                        lines.count);
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

    static __device__ __forceinline__ void find(const Shared& shared, const Arguments& arguments, i32 block, uint2 (&rows)[OWN]) {
        i32 column = block * fp8::BLOCK + tile::first_column();
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            i32 source = shared.sources[tile::first_row() + i];
            rows[i] = make_uint2(0, 0);
            if (source >= 0 && column < arguments.columns)
                rows[i] = __ldg(reinterpret_cast<const uint2*>(arguments.values + i64(source) * arguments.line + column));
        }
    }

    // Brings the tile to one scale, the largest. Scales are positive, so that their bits are ordered; infinite ones infect: no
    // NaN is lost.
    static __device__ __forceinline__ void shift(Shared& shared, const uint2 (&rows)[OWN], float* out) {
        uint4 four = reinterpret_cast<const uint4*>(shared.scales)[threadIdx.x % 32];
        float most = __uint_as_float(__reduce_max_sync(~0u, max(max(four.x, four.y), max(four.z, four.w))));
        if constexpr (!Scales::EXACT) most = fp8::power_above(most);
        float ratio = shared.scales[tile::own_row()] * fp8::inverse_of(most);
        u32 factor = Scales::EXACT ? ptx::pack_fp16(ratio, ratio) : __float_as_uint(ratio);
        uint2 shifted[OWN];
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            u32 of_row = tile::of_row(factor, i);
            shifted[i] = make_uint2(times(rows[i].x, of_row), times(rows[i].y, of_row));
        }
        tile::put(shared.turned, shifted);
        if (threadIdx.x == 0) *out = most;
    }

    // Four numbers times a ratio, at most 1: in fp16 if they are exact, for below 2^-24, which that does not have, nothing is
    // left of e4m3 either.
    static __device__ __forceinline__ u32 times(u32 found, u32 factor) {
        if constexpr (Scales::EXACT) {
            u32 low, high;
            ptx::widen_e4m3(found, low, high);
            return ptx::narrow_e4m3(ptx::multiply_fp16(low, factor), ptx::multiply_fp16(high, factor));
        } else {
            float v[4], ratio = __uint_as_float(factor);
            ptx::unpack_e4m3(found, v[0], v[1]), ptx::unpack_e4m3(found >> 16, v[2], v[3]);
            return ptx::pack_e4m3(v[0] * ratio, v[1] * ratio) | u32(ptx::pack_e4m3(v[2] * ratio, v[3] * ratio)) << 16;
        }
    }
};
