// A gradient in e4m3 for both products that read it: rows with a scale for each 128 columns, and, quantised once more from
// these, token-major, with a scale for each column and 128 rows (transpose.cuh does the latter for rows of experts).
//
// A block of threads has 128 rows of 128 columns. Rows are filled up with zeros to whole blocks in the token-major copy.
#pragma once
#include "fp8.cuh"
#include "kernel.cuh"
#include "wgmma.cuh"

template <typename Input, typename Scales>
struct QuantizeGradient {
    static constexpr i32 THREADS = fp8::TILE_THREADS, BLOCKS = 1, OWN = 8;  // columns of a thread, in each of eight rows
    struct Arguments {
        const u16* x;              // (rows, columns)
        u8* rows;                  // (rows, columns)
        float* row_scales;         // (blocks of columns, rows)
        u8* turned;                // (columns, blocks of rows of 128)
        float* turned_scales;      // (blocks of rows, columns)
        i32 count, columns, row_blocks;
    };
    struct Shared {
        u8 tile[fp8::BLOCK * fp8::BLOCK];
        u8 turned[fp8::BLOCK * fp8::BLOCK];
        float scales[fp8::BLOCK];
        float most[THREADS / 32][fp8::BLOCK];
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 blocks = (arguments.columns + fp8::BLOCK - 1) / fp8::BLOCK, block = blockIdx.x % blocks, row_block = blockIdx.x / blocks;
        i32 row = row_block * fp8::BLOCK + threadIdx.x / 16, column = block * fp8::BLOCK + threadIdx.x % 16 * OWN;
        uint4 found[8];
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
            found[i] = make_uint4(0, 0, 0, 0);
            if (row + 16 * i < arguments.count && column < arguments.columns)
                found[i] = __ldcs(reinterpret_cast<const uint4*>(arguments.x + i64(row + 16 * i) * arguments.columns + column));
        }
#pragma unroll
        for (i32 i = 0; i < 8; i++) write_row(shared, arguments, found[i], row + 16 * i, column, block);
        __syncthreads();
        fp8::Scale scales[4];
        fp8::requantize_columns(shared, scales);
        i32 first = block * fp8::BLOCK, left = arguments.columns - first, own = threadIdx.x % 32 * 4;
#pragma unroll
        for (i32 j = 0; j < 4; j++)
            if (threadIdx.x < 32 && own + j < left)
                arguments.turned_scales[i64(row_block) * arguments.columns + first + own + j] = scales[j].value;
        __syncthreads();
        i64 pitch = i64(arguments.row_blocks) * fp8::BLOCK;
        fp8::write_transposed(shared.turned, arguments.turned + first * pitch + row_block * fp8::BLOCK, pitch, left);
    }

    // Eight columns of a row: sixteen threads share its scale.
    static __device__ __forceinline__ void write_row(Shared& shared, const Arguments& arguments, const uint4& found, i32 row,
                                                     i32 column, i32 block) {
        u32 pairs[OWN / 2] = {found.x, found.y, found.z, found.w};
        u16 narrow[OWN / 2];
        fp8::Scale scale = fp8::quantize<Input, Scales>(pairs, narrow);
        uint2 eight = make_uint2(narrow[0] | narrow[1] << 16, narrow[2] | narrow[3] << 16);
        i32 local = row % fp8::BLOCK, own = column % fp8::BLOCK;
        *reinterpret_cast<uint2*>(shared.tile + local * fp8::BLOCK + own) = eight;
        if (own == 0) shared.scales[local] = scale.value;
        if (row >= arguments.count || column >= arguments.columns) return;
        *reinterpret_cast<uint2*>(arguments.rows + i64(row) * arguments.columns + column) = eight;
        if (own == 0) arguments.row_scales[i64(block) * arguments.count + row] = scale.value;
    }
};
