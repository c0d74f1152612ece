// What becomes of a tile's sums once they are complete: one struct for each, with
//
//     BOXES             of shared memory that each warp is given
//     REGISTERS         of a consumer's thread
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
// and, where it may follow a product of rows that go along (grouped_gemm.cuh),
//     finish_along(...) 16 rows of the warp and 64 columns, or if paired 32 of each matrix; these are APART, eight from eight.
//                       It leaves the boxes free.
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

// Adds an expert's vector, of that many columns, to a box's values, or its first ones; nothing beyond its end.
template <typename Input, i32 COUNT = box::VALUES, i32 APART = 8>
__device__ __forceinline__ void add_bias(const u16* bias, const Spot& spot, i32 columns, i32 x, float* v) {
#pragma unroll
    for (i32 eight = 0; eight < COUNT / 4; eight++) {
        i32 column = x + eight * APART + threadIdx.x % 4 * 2;
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
    static constexpr bool ADDS = false;
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

    template <i32 APART>
    static __device__ __forceinline__ void finish_along(u8* boxes, const Arguments& arguments, const Spot& spot,
                                                        float (&sums)[32]) {
        if (uniform(spot.place.row < spot.place.end)) {
            u32 packed[16];
            if constexpr (BIAS) add_bias<Input>(arguments.bias, spot, arguments.out.columns, spot.column, sums);
            box::pack<Input>(sums, packed);
            box::acquire<0>();
            box::write_now<32, APART>(boxes, arguments.out, spot.place, spot.column, packed);
        }
    }
};

// The sums of each expert transposed: out (E, columns, rows).
template <typename Input, i32 COLUMNS, i32 BOXES_>
struct Turned {
    static constexpr i32 BOXES = BOXES_, REGISTERS = 224;
    static constexpr bool ADDS = false;
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

// out += the sums of each expert, in float32: each is added once, so that the order of additions is that of the launches.
// TURNED: transposed, out (E, columns, rows). Where an expert has no rows, nothing is done.
//
// A box holds 16 rows of 32 columns: lines of 128 bytes, swizzled, or if TURNED lines of 16 rows, one after the other.
template <i32 COLUMNS, bool TURNED, i32 BOXES_>
struct Added {
    static constexpr i32 BOXES = BOXES_, REGISTERS = 224, HELD = 0, WIDTH = 32;
    static constexpr bool PAIRED = false, ADDS = true;
    static_assert(COLUMNS / WIDTH % BOXES == 0, "every tile begins with the first box");
    struct Arguments {
        TensorMap out;  // boxes of 1 x 16 x 32, or 1 x 32 x 16 if TURNED
        i32 columns;
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    static __device__ __forceinline__ void finish(u8* boxes, Shared&, u32, const Arguments& arguments, const Spot& spot,
                                                  float (&total)[COLUMNS / 2]) {
#pragma unroll
        for (i32 i = 0; i < COLUMNS / WIDTH; i++) {
            u8* staged = boxes + i % BOXES * box::BYTES;
            box::acquire<BOXES - 1>();
            put(staged, total + i * WIDTH / 2);
            box::publish();
            if (threadIdx.x % 32 == 0) {
                i32 column = spot.column + i * WIDTH, row = spot.place.row;
                if (row < spot.place.end && column < arguments.columns)
                    ptx::add_3d(&arguments.out, staged, TURNED ? row : column, TURNED ? column : row, spot.expert);
                ptx::store_commit();
            }
        }
    }

    static __device__ __forceinline__ void put(u8* staged, const float* v) {
        u32 lane = threadIdx.x % 32, to = ptx::shared_address(staged);
#pragma unroll
        for (u32 i = 0; i < 8; i++) {  // four times eight columns, of the upper and the lower rows
            u32 row = lane / 4 + i % 2 * 8, column = i / 2 * 8 + lane % 4 * 2;
            if constexpr (TURNED) {
                ptx::store_shared(to + (column * box::ROWS + row) * 4, v[2 * i]);
                ptx::store_shared(to + ((column + 1) * box::ROWS + row) * 4, v[2 * i + 1]);
            } else {
                ptx::store_shared(to + box::at(row, column / 4) + column % 4 * 4, v[2 * i], v[2 * i + 1]);
            }
        }
    }
};
