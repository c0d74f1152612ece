// What becomes of a tile's sums once they are complete: one struct for each, with
//
//     BOXES             of shared memory that each warp is given
//     REGISTERS         of a consumer's thread
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
    static constexpr i32 BOXES = BOXES_, REGISTERS = 224;
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

// GEMM1's rows through the activation: out = activation(gate, up), and, with SAVE, the rows themselves for the backward.
//
// They are rounded before the activation, as where each of them is a tensor.
template <typename Input, i32 COLUMNS, typename Activation, Layout LAYOUT, bool SAVE, bool BIAS, bool WEIGHTED>
struct Activated {
    static constexpr i32 PER_ROUND = LAYOUT == Layout::SINGLE ? 1 : 2;  // boxes of columns for a box of features
    static constexpr i32 ROUNDS = COLUMNS / 64 / PER_ROUND, SAVED = SAVE ? PER_ROUND : 0, LAST = SAVE ? 1 : 2;
    static constexpr i32 BOXES = SAVED + LAST, REGISTERS = 224;
    static constexpr bool PAIRED = LAYOUT == Layout::HALVES;
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

    // A box of what `activate_pairs` made, twice.
    static __device__ __forceinline__ void put_fours(u8* staged, const u32* a) {
        u32 lane = threadIdx.x % 32, row = lane / 4 + 8 * (lane % 2);
#pragma unroll
        for (i32 i = 0; i < 16; i++) {
            u32 column = 4 * i + lane % 4 / 2 * 2;
            *reinterpret_cast<u32*>(staged + box::at(row, column / 8) + column % 8 * 2) = a[i];
        }
    }
};

// Back through GEMM2 and the activation. The sums are `of_a`, the gradient of the activation before the output's weight
// scales it; with a = activation(gate, up) and the weight w of the row:
//
//     of_hidden = activation'(gate, up) of_a w       scaled = a w, for the gradient of GEMM2's matrices
//     of_weight = <of_a, a> + the activation's own gradient, over this tile's columns; the rest is summed elsewhere
//
// READ: the activation reads the weight. SCALED: the output multiplies by it.
template <typename Input, i32 COLUMNS, typename Activation, Layout LAYOUT, bool READ, bool SCALED>
struct ActivationBackward {
    static constexpr i32 PER_ROUND = LAYOUT == Layout::SINGLE ? 1 : 2, ROUNDS = COLUMNS / 64;
    static constexpr i32 BOXES = 2 * PER_ROUND + 1, REGISTERS = 232;
    static constexpr bool PAIRED = false;
    static constexpr i32 HELD = 0;
    struct Arguments {
        TensorMap hidden, hidden_up;           // as `of_hidden`; boxes of 16 x 64
        Target of_hidden, of_hidden_up;        // (rows, columns), or (rows, features) each if there are two halves
        Target scaled;                         // (rows, features)
        float* of_weight;                      // (column tiles, rows)
        const float *weights, *scales;         // of an assignment: what the activation reads, what the output multiplies by
        const i32* order;                      // the assignment of a row
        i32 rows;
    };
    struct Shared {
        u64 loaded[8][2];  // of each warp, a barrier for every other round
    };

    static __device__ __forceinline__ void prepare(Shared& shared) {
        for (i32 i = 0; i < 16; i++) ptx::barrier_init(&shared.loaded[i / 2][i % 2], 1);
    }

    static __device__ __forceinline__ u8* buffer(u8* boxes, i32 round) { return boxes + round % 2 * PER_ROUND * box::BYTES; }

    // One round's boxes of `hidden`, by one lane.
    static __device__ __forceinline__ void load(u8* boxes, Shared& shared, u32 warp, const Arguments& arguments,
                                                const Spot& spot, i32 round) {
        u64* loaded = &shared.loaded[warp][round % 2];
        u8* to = buffer(boxes, round);
        i32 feature = spot.column + round * 64, x = LAYOUT == Layout::INTERLEAVED ? 2 * feature : feature;
        ptx::barrier_expect(loaded, PER_ROUND * box::BYTES);
        ptx::load_2d(to, &arguments.hidden, loaded, x, spot.place.row);
        if (LAYOUT == Layout::HALVES) ptx::load_2d(to + box::BYTES, &arguments.hidden_up, loaded, x, spot.place.row);
        if (LAYOUT == Layout::INTERLEAVED) ptx::load_2d(to + box::BYTES, &arguments.hidden, loaded, x + 64, spot.place.row);
    }

    static __device__ __forceinline__ void prefetch(u8* boxes, Shared& shared, u32 warp, const Arguments& arguments,
                                                    const Spot& spot) {
        __syncwarp();  // nobody reads the boxes any more
        if (threadIdx.x % 32 == 0) {
            ptx::store_wait_read<0>();
            for (i32 round = 0; round < 2; round++) load(boxes, shared, warp, arguments, spot, round);
        }
        __syncwarp();
    }

    static __device__ __forceinline__ void finish(u8* boxes, Shared& shared, u32 warp, const Arguments& arguments,
                                                  const Spot& spot, float (&total)[COLUMNS / 2]) {
        i32 first = spot.place.upper();
        Row upper(arguments, spot.place, first), lower(arguments, spot.place, first + 8);
        u8* scaled = boxes + (BOXES - 1) * box::BYTES;
#pragma unroll
        for (i32 round = 0; round < ROUNDS; round++) {
            u8* hidden = buffer(boxes, round);
            ptx::barrier_wait(&shared.loaded[warp][round % 2], (spot.turn * (ROUNDS / 2) + round / 2) % 2);
            float* v = total + round * 32;
            i32 features = arguments.scaled.columns - spot.column - round * 64;  // that are real, from this round's on
            u32 a[16];
            if constexpr (LAYOUT == Layout::INTERLEAVED)
                interleaved(hidden, v, features, upper, lower, a);
            else
                side_by_side(hidden, v, features, upper, lower, a);
            box::acquire<0>();  // the round before: its boxes, and the one for `scaled`
            box::put(scaled, a);
            if (round > 0 && round + 1 < ROUNDS && threadIdx.x % 32 == 0)
                load(boxes, shared, warp, arguments, spot, round + 1);
            i32 feature = spot.column + round * 64;
            if constexpr (LAYOUT == Layout::INTERLEAVED) {
                box::send(hidden, arguments.of_hidden, spot.place, 2 * feature);
                box::send(hidden + box::BYTES, arguments.of_hidden, spot.place, 2 * feature + 64);
            } else {
                box::send(hidden, arguments.of_hidden, spot.place, feature);
                if (LAYOUT == Layout::HALVES) box::send(hidden + box::BYTES, arguments.of_hidden_up, spot.place, feature);
            }
            box::send(scaled, arguments.scaled, spot.place, feature);
        }
        store_weight(arguments, spot, first, upper.of_weight);
        store_weight(arguments, spot, first + 8, lower.of_weight);
    }

    // One of a lane's two rows.
    struct Row {
        float weight = 0, scale = 1, of_weight = 0;
        __device__ __forceinline__ Row(const Arguments& arguments, const box::Place& place, i32 row) {
            if (!(READ || SCALED) || row >= place.end) return;
            i32 assignment = __ldg(arguments.order + row);
            if (READ) weight = __ldg(arguments.weights + assignment);
            if (SCALED) scale = __ldg(arguments.scales + assignment);
        }

        // One feature of which v is the gradient of the activation: gate and up become their gradients. The activation, scaled.
        // What the activation makes of a feature that is not real, NaN perhaps, is not the weight's matter.
        __device__ __forceinline__ float back(float v, bool real, float& gate, float& up) {
            float of_gate, of_up = 0, own = 0, a;
            if constexpr (LAYOUT == Layout::SINGLE) {
                a = Activation::value(gate, weight);
                Activation::backward(v * scale, gate, weight, of_gate, own);
            } else {
                a = Activation::value(gate, up, weight);
                Activation::backward(v * scale, gate, up, weight, of_gate, of_up, own);
            }
            of_weight += real ? (SCALED ? v * a + own : own) : 0;
            gate = of_gate, up = of_up;
            return a * scale;
        }
    };

    static __device__ __forceinline__ void side_by_side(u8* hidden, const float* v, i32 features, Row& upper, Row& lower,
                                                        u32 (&a)[16]) {
        constexpr bool PAIR = LAYOUT == Layout::HALVES;
#pragma unroll
        for (i32 i = 0; i < 4; i++) {
            u32 gates[4], ups[4];
            box::take_sixteen(hidden, i, gates);
            if constexpr (PAIR) box::take_sixteen(hidden + box::BYTES, i, ups);
#pragma unroll
            for (i32 k = 0; k < 4; k++) {
                Row& row = k % 2 ? lower : upper;
                bool real = 16 * i + 8 * (k / 2) + i32(threadIdx.x % 4) * 2 < features;
                float gate[2], up[2] = {0, 0}, value[2];
                Input::unpack(gates[k], gate[0], gate[1]);
                if constexpr (PAIR) Input::unpack(ups[k], up[0], up[1]);
#pragma unroll
                for (i32 l = 0; l < 2; l++) value[l] = row.back(v[8 * i + 2 * k + l], real, gate[l], up[l]);
                gates[k] = Input::pack(gate[0], gate[1]);
                if constexpr (PAIR) ups[k] = Input::pack(up[0], up[1]);
                a[4 * i + k] = Input::pack(value[0], value[1]);
            }
            __syncwarp();
            box::put_sixteen(hidden, i, gates[0], gates[1], gates[2], gates[3]);
            if constexpr (PAIR) box::put_sixteen(hidden + box::BYTES, i, ups[0], ups[1], ups[2], ups[3]);
        }
    }

    // The gates and up projections of a lane's two features lie side by side: 8 bytes.
    static __device__ __forceinline__ void interleaved(u8* hidden, const float* v, i32 features, Row& upper, Row& lower,
                                                       u32 (&a)[16]) {
        u32 lane = threadIdx.x % 32, column = 4 * (lane % 4);
#pragma unroll
        for (i32 i = 0; i < 16; i++) {  // eight features each, in the upper row and in the lower
            Row& row = i % 2 ? lower : upper;
            u32 at = box::at(lane / 4 + i % 2 * 8, i / 2 % 4 * 2 + column / 8) + column % 8 * 2;
            uint2& pair = *reinterpret_cast<uint2*>(hidden + i / 8 * box::BYTES + at);
            float gate[2], up[2], value[2];
            Input::unpack(pair.x, gate[0], up[0]), Input::unpack(pair.y, gate[1], up[1]);
#pragma unroll
            for (i32 l = 0; l < 2; l++) value[l] = row.back(v[2 * i + l], i / 2 * 8 + i32(column / 2) < features, gate[l], up[l]);
            pair = make_uint2(Input::pack(gate[0], up[0]), Input::pack(gate[1], up[1]));
            a[i] = Input::pack(value[0], value[1]);
        }
    }

    // The four lanes of a row together, in a fixed order.
    static __device__ __forceinline__ void store_weight(const Arguments& arguments, const Spot& spot, i32 row, float sum) {
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        // of two blocks that share an odd row tile, the second may have no columns
        bool ours = row < spot.place.end && spot.column < arguments.scaled.columns;
        if ((READ || SCALED) && threadIdx.x % 4 == 0 && ours)
            arguments.of_weight[i64(spot.column / COLUMNS) * arguments.rows + row] = sum;
    }
};
