// A gradient in e4m3 for both products that read it: rows with a scale for each 128 columns, and, quantised once more from
// these, token-major, with a scale for each column and 128 rows (transpose.cuh does the latter for rows of experts).
//
// A block of threads has 128 rows of 128 columns. Rows are filled up with zeros to whole blocks in the token-major copy.
#pragma once
#include "kernel.cuh"
#include "requantize.cuh"
#include "wgmma.cuh"

template <typename Input, typename Scales>
struct QuantizeGradient {
    static constexpr i32 THREADS = tile::THREADS, BLOCKS = 1, RESIDENT = 3, OWN = tile::OWN;
    struct Arguments {
        const u16* x;              // (rows, columns)
        u8* rows;                  // (rows, columns)
        float* row_scales;         // (blocks of columns, rows)
        u8* turned;                // (columns, blocks of rows of 128)
        float* turned_scales;      // (blocks of rows, columns)
        i32 count, columns, row_blocks;
    };
    using Shared = requantize::Shared;

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        i32 blocks = (arguments.columns + fp8::BLOCK - 1) / fp8::BLOCK, block = blockIdx.x % blocks, row_block = blockIdx.x / blocks;
        uint2 rows[OWN];
        float scales[OWN];
        quantize(arguments, row_block, block, rows, scales);
        write_rows(shared, arguments, row_block, block, rows, scales);
        __syncthreads();
        fp8::Scale turned[4];
        auto again = [&](uint2(&found)[OWN]) { quantize(arguments, row_block, block, found, scales); };
        requantize::columns(shared, rows, again, turned);
        i32 first = block * fp8::BLOCK, left = arguments.columns - first;
        requantize::write_scales(turned, arguments.turned_scales + i64(row_block) * arguments.columns + first, 1, left);
        __syncthreads();
        i64 pitch = i64(arguments.row_blocks) * fp8::BLOCK;
        tile::write(shared.turned, arguments.turned + first * pitch + row_block * fp8::BLOCK, pitch, left);
    }

    // A thread's eight columns of eight rows: half a warp, which has a row, shares its scale.
    static __device__ __forceinline__ void quantize(const Arguments& arguments, i32 row_block, i32 block, uint2 (&rows)[OWN],
                                                    float (&scales)[OWN]) {
        i32 row = row_block * fp8::BLOCK + tile::first_row(), column = block * fp8::BLOCK + tile::first_column();
        uint4 found[OWN];
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            found[i] = make_uint4(0, 0, 0, 0);
            if (row + i < arguments.count && column < arguments.columns)
                found[i] = __ldcs(reinterpret_cast<const uint4*>(arguments.x + i64(row + i) * arguments.columns + column));
        }
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            u32 pairs[4] = {found[i].x, found[i].y, found[i].z, found[i].w};
            u16 narrow[4];
            scales[i] = fp8::quantize<Input, Scales>(pairs, narrow).value;
            rows[i] = make_uint2(narrow[0] | narrow[1] << 16, narrow[2] | narrow[3] << 16);
        }
    }

    static __device__ __forceinline__ void write_rows(Shared& shared, const Arguments& arguments, i32 row_block, i32 block,
                                                      const uint2 (&rows)[OWN], const float (&scales)[OWN]) {
        i32 row = row_block * fp8::BLOCK + tile::first_row(), column = block * fp8::BLOCK + tile::first_column();
#pragma unroll
        for (i32 i = 0; i < OWN; i++) {
            if (threadIdx.x % 16 == 0) shared.scales[tile::first_row() + i] = scales[i];
            if (row + i >= arguments.count || column >= arguments.columns) continue;
            *reinterpret_cast<uint2*>(arguments.rows + i64(row + i) * arguments.columns + column) = rows[i];
            if (threadIdx.x % 16 == 0) arguments.row_scales[i64(block) * arguments.count + row + i] = scales[i];
        }
    }
};
