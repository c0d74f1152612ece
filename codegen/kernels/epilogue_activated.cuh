// GEMM1's epilogue (epilogue.cuh says what that is): its rows through the activation, in 16 bits.
#pragma once
#include "epilogue.cuh"

// GEMM1's rows through the activation: out = activation(gate, up), and, with SAVE, the rows themselves for the backward.
//
// They are rounded before the activation, as where each of them is a tensor. LAST of each warp's boxes are for `out`.
template <typename Input, i32 COLUMNS, typename Activation, Layout LAYOUT, bool SAVE, bool BIAS, bool WEIGHTED, i32 LAST>
struct Activated {
    static constexpr i32 PER_ROUND = LAYOUT == Layout::SINGLE ? 1 : 2;  // boxes of columns for a box of features
    static constexpr i32 ROUNDS = COLUMNS / 64 / PER_ROUND, SAVED = SAVE ? PER_ROUND : 0;
    static constexpr i32 BOXES = SAVED + LAST, REGISTERS = 216;
    static constexpr bool ADDS = false, PAIRED = LAYOUT == Layout::HALVES;
    static constexpr i32 HELD = SAVE ? 0 : ROUNDS * 16;  // together with the rows that are saved they would be too many
    static_assert(ROUNDS % LAST == 0, "every tile begins with the first box");
    struct Arguments {
        Target out;                // (rows, features)
        Target hidden, hidden_up;  // (rows, columns), or (rows, features) each if there are two halves
        const u16 *bias, *bias_up;  // (E, columns), or (E, features) each
        const float* weights;      // of an assignment
        const i32* order;          // the assignment of a row
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    // The routing weights of a lane's two rows.
    struct Weights {
        float of[2];
        __device__ __forceinline__ Weights(const Arguments& arguments, const Spot& spot) {
            for (i32 i = 0; i < 2; i++) {
                i32 row = spot.place.upper() + 8 * i;
                of[i] = WEIGHTED && row < spot.place.end ? __ldg(arguments.weights + __ldg(arguments.order + row)) : 0;
            }
        }
    };

    // A box of GEMM1's rows: with its bias, rounded, and saved.
    static __device__ __forceinline__ void settle(u8* staged, const Target& target, const u16* bias, const Spot& spot, i32 x,
                                                  float* v, u32 (&packed)[16]) {
        if constexpr (BIAS) add_bias<Input>(bias, spot, target.columns, x, v);
        box::pack<Input>(v, packed);
        if constexpr (SAVE) {
            box::acquire<BOXES - 1>();
            box::put(staged, packed);
            box::send(staged, target, spot.place, x);
        }
    }

    static __device__ __forceinline__ void finish(u8* boxes, Shared&, u32, const Arguments& arguments, const Spot& spot,
                                                  float (&total)[COLUMNS / 2]) {
        Weights weights(arguments, spot);
#pragma unroll
        for (i32 round = 0; round < ROUNDS; round++) {
            u8* last = boxes + (SAVED + round % LAST) * box::BYTES;
            u32 a[16];
            features(boxes, arguments, spot, total, weights, round, a);
            box::acquire<BOXES - 1>();
            stage(last, a);
            box::send(last, arguments.out, spot.place, first_feature(spot) + round * 64);
        }
    }

    static __device__ __forceinline__ void take(const Arguments& arguments, const Spot& spot, float (&total)[COLUMNS / 2],
                                                u32 (&packed)[HELD ? HELD : 1]) {
        Weights weights(arguments, spot);
#pragma unroll
        for (i32 round = 0; round < ROUNDS; round++) features(nullptr, arguments, spot, total, weights, round, packed + round * 16);
    }

    static __device__ __forceinline__ void put(u8* boxes, const Arguments& arguments, const Spot& spot,
                                               const u32 (&packed)[HELD ? HELD : 1]) {
#pragma unroll
        for (i32 first = 0; first < ROUNDS; first += LAST) {
            box::acquire<0>();
#pragma unroll
            for (i32 i = 0; i < LAST; i++) stage(boxes + i * box::BYTES, packed + (first + i) * 16);
            box::publish();
#pragma unroll
            for (i32 i = 0; i < LAST; i++)
                box::send_published(boxes + i * box::BYTES, arguments.out, spot.place, first_feature(spot) + (first + i) * 64);
        }
    }

    static __device__ __forceinline__ i32 first_feature(const Spot& spot) {
        return LAYOUT == Layout::INTERLEAVED ? spot.column / 2 : spot.column;
    }

    static __device__ __forceinline__ void stage(u8* staged, const u32* a) {
        if constexpr (LAYOUT == Layout::INTERLEAVED)
            put_fours(staged, a);
        else
            box::put(staged, a);
    }

    // A box of features, from one or two boxes of columns.
    static __device__ __forceinline__ void features(u8* boxes, const Arguments& arguments, const Spot& spot,
                                                    float (&total)[COLUMNS / 2], const Weights& weights, i32 round, u32* a) {
        float* gate = total + round * 32 * (LAYOUT == Layout::INTERLEAVED ? 2 : 1);
        float* up = LAYOUT == Layout::HALVES ? gate + COLUMNS / 4 : gate + 32;
        i32 feature = first_feature(spot) + round * 64;
        u32 first[16], second[16];
        if constexpr (LAYOUT == Layout::INTERLEAVED) {
            settle(boxes, arguments.hidden, arguments.bias, spot, 2 * feature, gate, first);
            settle(boxes + box::BYTES, arguments.hidden, arguments.bias, spot, 2 * feature + 64, up, second);
            activate_pairs(first, weights.of, a);
            activate_pairs(second, weights.of, a + 8);
        } else {
            settle(boxes, arguments.hidden, arguments.bias, spot, feature, gate, first);
            if constexpr (PAIRED)
                settle(boxes + box::BYTES, arguments.hidden_up, arguments.bias_up, spot, feature, up, second);
#pragma unroll
            for (i32 i = 0; i < 16; i++) a[i] = activate(first[i], second[i], weights.of[i % 2]);
        }
    }

    template <i32 APART>
    static __device__ __forceinline__ void finish_along(u8* boxes, const Arguments& arguments, const Spot& spot,
                                                        float (&sums)[32]) {
        constexpr i32 COUNT = PAIRED ? 16 : 32;
        if (uniform(spot.place.row < spot.place.end)) {
            Weights weights(arguments, spot);
            u32 first[16], second[16], a[16];
            box::acquire<0>();
            settle_along<COUNT, APART>(boxes, arguments.hidden, arguments.bias, spot, sums, first);
            if constexpr (PAIRED)
                settle_along<COUNT, APART>(boxes, arguments.hidden_up, arguments.bias_up, spot, sums + COUNT, second);
            if constexpr (LAYOUT == Layout::INTERLEAVED) {
                activate_pairs(first, weights.of, a);
                __syncwarp();
                put_fours<8>(boxes, a);
                __syncwarp();
                box::write<4>(boxes, arguments.out, spot.place, first_feature(spot));
            } else {
#pragma unroll
                for (i32 i = 0; i < COUNT / 2; i++) a[i] = activate(first[i], second[i], weights.of[i % 2]);
                box::write_now<COUNT, APART>(boxes, arguments.out, spot.place, spot.column, a);
            }
        }
    }

    // `settle`, for rows that go along.
    template <i32 COUNT, i32 APART>
    static __device__ __forceinline__ void settle_along(u8* staged, const Target& target, const u16* bias, const Spot& spot,
                                                        float* v, u32 (&packed)[16]) {
        if constexpr (BIAS) add_bias<Input, COUNT, APART>(bias, spot, target.columns, spot.column, v);
        box::pack<Input, COUNT>(v, packed);
        if constexpr (SAVE) box::write_now<COUNT, APART>(staged, target, spot.place, spot.column, packed);
    }

    // Two neighbouring features.
    static __device__ __forceinline__ u32 activate(u32 gates, u32 ups, float weight) {
        float gate[2], up[2];
        Input::unpack(gates, gate[0], gate[1]);
        if constexpr (PAIRED) {
            Input::unpack(ups, up[0], up[1]);
            return Input::pack(Activation::value(gate[0], up[0], weight), Activation::value(gate[1], up[1], weight));
        } else {
            return Input::pack(Activation::value(gate[0], weight), Activation::value(gate[1], weight));
        }
    }

    // A box of pairs of a gate and its up projection: 32 features, of which each lane holds every fourth, in two rows. Lanes
    // exchange with their neighbours, so that each has features 4 i + lane % 4 / 2 * 2 and the next, of one row: the lower one
    // if the lane is odd.
    static __device__ __forceinline__ void activate_pairs(const u32 (&pairs)[16], const float (&weight)[2], u32* a) {
        bool odd = threadIdx.x % 2;
#pragma unroll
        for (i32 i = 0; i < 8; i++) {
            float gate, up, value[2];
#pragma unroll
            for (i32 j = 0; j < 2; j++) {
                Input::unpack(pairs[2 * i + j], gate, up);
                value[j] = Activation::value(gate, up, weight[j]);
            }
            float other = __shfl_xor_sync(~0u, odd ? value[0] : value[1], 1);
            a[i] = odd ? Input::pack(other, value[1]) : Input::pack(value[0], other);
        }
    }

    // A box of what `activate_pairs` made, twice; or half a box of what it made once.
    template <i32 COUNT = 16>
    static __device__ __forceinline__ void put_fours(u8* staged, const u32* a) {
        u32 lane = threadIdx.x % 32, row = lane / 4 + 8 * (lane % 2);
#pragma unroll
        for (i32 i = 0; i < COUNT; i++) {
            u32 column = 4 * i + lane % 4 / 2 * 2;
            *reinterpret_cast<u32*>(staged + box::at(row, column / 8) + column % 8 * 2) = a[i];
        }
    }
};
