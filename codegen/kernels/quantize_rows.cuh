// Tokens to their rows in expert order, quantised on the way (dispatch.cuh moves them as they are):
//
//     rows[slots[t, k], :] = e4m3(x[t, :] / scale), with a scale for each 128 columns
//
// A warp has 1024 columns of a token, a lane 16 neighbouring ones: eight lanes share a scale. It is read and quantised once
// and written for each of the token's experts; `tokens`, if there, gets it once more, in the order of the tokens.
#pragma once
#include "fp8.cuh"
#include "kernel.cuh"
#include "wgmma.cuh"

template <typename Input, typename Scales>
struct QuantizeRows {
    static constexpr i32 THREADS = 256, BLOCKS = 1, OWN = 16, PIECES = 2;  // columns of a lane at once, and how often
    struct Arguments {
        const u16* x;         // (tokens, columns)
        const i32* slots;     // (tokens, top_k); -1 for an assignment without an expert. Null if tokens are rows
        u8* rows;             // (rows, columns); null if they are not wanted
        float* row_scales;    // (blocks, pitch)
        u8* values;           // (tokens, columns), lines of `line` bytes; null if they are not wanted
        float* scales;        // (tokens, blocks), lines of `scale_line` numbers
        i32 tokens, top_k, columns, pitch, line, scale_line;
    };
    struct Shared {
        u32 unused;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        i32 lane = threadIdx.x % 32, parts = (arguments.columns + 32 * OWN * PIECES - 1) / (32 * OWN * PIECES);
        i64 count = i64(arguments.tokens) * parts, step = i64(gridDim.x) * (THREADS / 32);
        for (i64 i = i64(blockIdx.x) * (THREADS / 32) + threadIdx.x / 32; i < count; i += step) {
            i32 token = i / parts, first = (i % parts * 32 * PIECES + lane) * OWN;
            uint4 values[PIECES];
            float scales[PIECES];
#pragma unroll
            for (i32 piece = 0; piece < PIECES; piece++)
                quantize(arguments, token, first + piece * 32 * OWN, values[piece], scales[piece]);
            if (arguments.values)
                write(arguments, arguments.values + i64(token) * arguments.line,
                      arguments.scales + i64(token) * arguments.scale_line, 1, first, values, scales);
            for (i32 k = 0; arguments.rows && k < arguments.top_k; k++) {
                i32 slot = arguments.slots ? __ldg(arguments.slots + i64(token) * arguments.top_k + k) : token;
                if (slot < 0) continue;
                write(arguments, arguments.rows + i64(slot) * arguments.columns, arguments.row_scales + slot, arguments.pitch,
                      first, values, scales);
            }
        }
    }

    static __device__ __forceinline__ void quantize(const Arguments& arguments, i32 token, i32 column, uint4& values,
                                                    float& scale) {
        u32 pairs[OWN / 2] = {};
        if (column < arguments.columns) {
            const uint4* from = reinterpret_cast<const uint4*>(arguments.x + i64(token) * arguments.columns + column);
            uint4 low = __ldg(from), high = __ldg(from + 1);
            pairs[0] = low.x, pairs[1] = low.y, pairs[2] = low.z, pairs[3] = low.w;
            pairs[4] = high.x, pairs[5] = high.y, pairs[6] = high.z, pairs[7] = high.w;
        }
        u16 narrow[OWN / 2];
        fp8::Scale found = fp8::quantize<Input, Scales>(pairs, narrow);
        values = make_uint4(narrow[0] | narrow[1] << 16, narrow[2] | narrow[3] << 16, narrow[4] | narrow[5] << 16,
                            narrow[6] | narrow[7] << 16);
        scale = found.value;
    }

    static __device__ __forceinline__ void write(const Arguments& arguments, u8* row, float* scales, i64 step, i32 first,
                                                 const uint4 (&values)[PIECES], const float (&found)[PIECES]) {
#pragma unroll
        for (i32 piece = 0; piece < PIECES; piece++) {
            i32 column = first + piece * 32 * OWN;
            if (column >= arguments.columns) continue;
            *reinterpret_cast<uint4*>(row + column) = values[piece];
            if (column % fp8::BLOCK == 0) scales[column / fp8::BLOCK * step] = found[piece];
        }
    }
};
