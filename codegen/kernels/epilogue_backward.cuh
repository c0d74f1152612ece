// The epilogue of GEMM2's backward (epilogue.cuh says what that is): on through the activation, in 16 bits.
#pragma once
#include "epilogue.cuh"

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
    static constexpr i32 BOXES = 2 * PER_ROUND + 1, REGISTERS = 224;
    static constexpr bool ADDS = false, PAIRED = false;
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
