// What becomes of a tile's sums once they are complete: one struct for each, with
//
//     BOXES             of shared memory that each warp is given
//     REGISTERS         of a consumer's thread
//     EARLY             whether these leave enough for a warp that fills the ring before the producer may (grouped_gemm.cuh)
//     ADDS              whether nothing is to be done where nothing was summed
//     PAIRED            the tile's columns are two matrices': the first half of one, then as many of the other
//     prepare(...)      once, by one thread, before anything else
//     prefetch(...)     before a tile's products, by each consumer warp
//     finish(...)       after them: total holds 16 rows of the warp, box after box of 64 columns, as in box.cuh
//
// or, if HELD is not 0, in its place
//     take(...)         after them, which leaves what will be written in HELD registers
//     put(...)          writes it, while the next tile's first product is under way
//
// FEATURES are what the model calls columns: a tile of 256 columns holds 128 features with a gate and an up projection.
#pragma once
#include "box.cuh"
#include "elementwise.cuh"

enum class Layout { SINGLE, HALVES, INTERLEAVED };  // of gate and up projection among GEMM1's columns

// Where in the result a warp is.
struct Spot {
    box::Place place;
    i32 expert, column;  // the tile's expert and its first column (of each half, if paired)
    i32 offset;          // added to rows that are written
    u32 turn;            // how many tiles the block has finished
};

// Adds an expert's vector, of that many columns, to a box's values; nothing beyond its end.
template <typename Input>
__device__ __forceinline__ void add_bias(const u16* bias, const Spot& spot, i32 columns, i32 x, float* v) {
#pragma unroll
    for (i32 eight = 0; eight < 8; eight++) {
        i32 column = x + eight * 8 + threadIdx.x % 4 * 2;
        float low = 0, high = 0;
        if (column < columns)
            Input::unpack(__ldg(reinterpret_cast<const u32*>(bias + i64(spot.expert) * columns + column)), low, high);
        v[4 * eight] += low, v[4 * eight + 1] += high, v[4 * eight + 2] += low, v[4 * eight + 3] += high;
    }
}

// The sums as they are, plus a bias for each expert.
template <typename Input, i32 COLUMNS, bool BIAS, i32 BOXES_>
struct Plain {
    static constexpr i32 BOXES = BOXES_, REGISTERS = 216;
    static constexpr bool EARLY = true, ADDS = false;
    static_assert(COLUMNS / 64 % BOXES == 0, "every tile begins with the first box");
    static constexpr bool PAIRED = false;
    static constexpr i32 HELD = COLUMNS / 4;
    struct Arguments {
        Target out;
        const u16* bias;  // (E, N)
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    static __device__ __forceinline__ void take(const Arguments& arguments, const Spot& spot, float (&total)[COLUMNS / 2],
                                                u32 (&packed)[HELD]) {
#pragma unroll
        for (i32 i = 0; i < COLUMNS / 64; i++) {
            if constexpr (BIAS)
                add_bias<Input>(arguments.bias, spot, arguments.out.columns, spot.column + i * 64, total + i * 32);
            box::pack<Input>(total + i * 32, packed + i * 16);
        }
    }

    static __device__ __forceinline__ void put(u8* boxes, const Arguments& arguments, const Spot& spot,
                                               const u32 (&packed)[HELD]) {
#pragma unroll
        for (i32 first = 0; first < COLUMNS / 64; first += BOXES) {
            box::acquire<0>();
#pragma unroll
            for (i32 i = 0; i < BOXES; i++) box::put(boxes + i * box::BYTES, packed + (first + i) * 16);
            box::publish();
#pragma unroll
            for (i32 i = 0; i < BOXES; i++)
                box::send_published(boxes + i * box::BYTES, arguments.out, spot.place, spot.column + (first + i) * 64, spot.offset);
        }
    }
};

// The sums of each expert transposed: out (E, columns, rows).
template <typename Input, i32 COLUMNS, i32 BOXES_>
struct Turned {
    static constexpr i32 BOXES = BOXES_, REGISTERS = 224;
    static constexpr bool EARLY = false, ADDS = false;
    static_assert(COLUMNS / 64 % BOXES == 0, "every tile begins with the first box");
    static constexpr bool PAIRED = false;
    static constexpr i32 HELD = COLUMNS / 4;
    struct Arguments {
        TensorMap out;  // boxes of 1 x 64 x 16
        i32 columns;
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    static __device__ __forceinline__ void take(const Arguments&, const Spot&, float (&total)[COLUMNS / 2],
                                                u32 (&packed)[HELD]) {
#pragma unroll
        for (i32 i = 0; i < COLUMNS / 64; i++) box::pack<Input>(total + i * 32, packed + i * 16);
    }

    static __device__ __forceinline__ void put(u8* boxes, const Arguments& arguments, const Spot& spot,
                                               const u32 (&packed)[HELD]) {
#pragma unroll
        for (i32 first = 0; first < COLUMNS / 64; first += BOXES) {
            box::acquire<0>();
#pragma unroll
            for (i32 i = 0; i < BOXES; i++) box::put_turned(boxes + i * box::BYTES, packed + (first + i) * 16);
            box::publish();
            if (threadIdx.x % 32 == 0) {
#pragma unroll
                for (i32 i = 0; i < BOXES; i++) {
                    i32 x = spot.column + (first + i) * 64;
                    if (spot.place.row < spot.place.end && x < arguments.columns)
                        ptx::store_3d(&arguments.out, boxes + i * box::BYTES, spot.place.row, x, spot.expert);
                }
                ptx::store_commit();
            }
        }
    }
};

// out += the sums of each expert, in float32: each is added once, by one thread, so that the order of additions is that of
// the launches. TURNED: transposed, out (E, columns, rows). Where an expert has no rows, nothing is done.
template <i32 COLUMNS, bool TURNED>
struct Added {
    static constexpr i32 BOXES = 1, REGISTERS = 224, HELD = 0;
    static constexpr bool EARLY = false, PAIRED = false, ADDS = true;
    struct Arguments {
        float* out;
        // from one expert's to the next; how many columns of sums there are; from one line of memory to the next
        i32 expert_pitch, columns, pitch;
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    static __device__ __forceinline__ void finish(u8*, Shared&, u32, const Arguments& arguments, const Spot& spot,
                                                  float (&total)[COLUMNS / 2]) {
        float* out = arguments.out + i64(spot.expert) * arguments.expert_pitch;
        i32 lane = threadIdx.x % 32;
#pragma unroll
        for (i32 half = 0; half < 2; half++) {
            i32 row = spot.place.row + lane / 4 + half * 8;
            if (row >= spot.place.end) continue;
#pragma unroll
            for (i32 i = 0; i < COLUMNS / 8; i++) {
                i32 column = spot.column + i * 8 + lane % 4 * 2;
                float first = total[4 * i + 2 * half], second = total[4 * i + 2 * half + 1];
                if (column >= arguments.columns) continue;
                if constexpr (TURNED) {
                    float* to = out + i64(column) * arguments.pitch + row;
                    ptx::add(to, first), ptx::add(to + arguments.pitch, second);
                } else {
                    ptx::add_two(out + i64(row) * arguments.pitch + column, first, second);
                }
            }
        }
    }
};
