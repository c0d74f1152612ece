// The epilogues that quantise what they write (epilogue.cuh says what an epilogue is): GEMM1's activation, and the way back
// through GEMM2 and it, for FP8 operands. A tile's features are whole scale blocks.
//
// Gate and up projection lie side by side, each padded to whole blocks: gates from column 0 on, up projections from
// `up` on. Matrices are padded with zeros, so that a tile has real features up to `features` and zeros behind them.
#pragma once
#include "epilogue.cuh"
#include "fp8.cuh"

// A column beyond every matrix's, where nothing is written. Tiles may have blocks behind the last one: the second half of a
// tile, or the second of two tiles that share an odd row tile. What they hold would be taken for the up projection.
constexpr i32 NOWHERE = 1 << 30;

// GEMM1's rows through the activation: out = activation(gate, up), quantised, and, with SAVE, the rows themselves, quantised
// for the backward. What the activation reads is the rounded row, not the quantised one. Scales are the format of those
// that are multiplied, the activation's; saved rows have powers of two.
template <typename Value, i32 COLUMNS, typename Activation, Layout LAYOUT, bool SAVE, bool BIAS, bool WEIGHTED, typename Scales>
struct QuantizedActivated {
    static constexpr bool ADDS = false, PAIRED = LAYOUT == Layout::HALVES;
    static constexpr i32 BLOCKS = COLUMNS / fp8::BLOCK / (PAIRED ? 2 : 1);  // of features in a tile
    static constexpr i32 SENDS = 1 + (SAVE ? (PAIRED ? 2 : 1) : 0);         // boxes for each of them
    static constexpr i32 BOXES = 2, REGISTERS = SAVE ? 224 : 216, HELD = BLOCKS * SENDS * fp8::PAIRS;
    static_assert(LAYOUT != Layout::INTERLEAVED, "quantised matrices are put side by side");
    struct Arguments {
        Target out;                 // (rows, padded features)
        Target hidden;              // (rows, columns)
        float *out_scales, *hidden_scales;  // (blocks, pitch)
        const u16 *bias, *bias_up;  // (E, features) each
        const float* weights;       // of an assignment
        const i32* order;           // the assignment of a row
        i32 pitch, features, up;
    };
    struct Shared {};

    static __device__ __forceinline__ void prepare(Shared&) {}

    static __device__ __forceinline__ void prefetch(u8*, Shared&, u32, const Arguments&, const Spot&) {}

    static __device__ __forceinline__ float weight_of(const Arguments& arguments, const box::Place& place, i32 row) {
        return WEIGHTED && row < place.end ? __ldg(arguments.weights + __ldg(arguments.order + row)) : 0;
    }

    // For each block of features: gates and up projections if they are saved, and the activation.
    using Held = u32[BLOCKS][SENDS][fp8::PAIRS];

    static __device__ __forceinline__ void take(const Arguments& arguments, const Spot& spot, float (&total)[COLUMNS / 2],
                                                u32 (&packed)[HELD]) {
        Held& held = reinterpret_cast<Held&>(packed);
        i32 row = spot.place.upper();
        float weight[2] = {weight_of(arguments, spot.place, row), weight_of(arguments, spot.place, row + 8)};
#pragma unroll
        for (i32 block = 0; block < BLOCKS; block++) {
            i32 feature = spot.column + block * fp8::BLOCK;
            u32 gates[fp8::PAIRS], ups[fp8::PAIRS];
            settle(arguments.bias, spot, arguments.features, feature, total + block * 64, gates);
            if constexpr (PAIRED) settle(arguments.bias_up, spot, arguments.features, feature, total + 64, ups);
#pragma unroll
            for (i32 i = 0; i < fp8::PAIRS; i++) {
                held[block][SENDS - 1][i] = activate(gates[i], ups[i], weight[i % 2]);
                if constexpr (SAVE) held[block][0][i] = gates[i];
                if constexpr (SAVE && PAIRED) held[block][1][i] = ups[i];
            }
            if (feature + fp8::BLOCK > arguments.features)
                fp8::clear_from(held[block][SENDS - 1], arguments.features - feature);
        }
    }

    static __device__ __forceinline__ void put(u8* boxes, const Arguments& arguments, const Spot& spot, u32 (&packed)[HELD]) {
        Held& held = reinterpret_cast<Held&>(packed);
#pragma unroll
        for (i32 block = 0; block < BLOCKS; block++) {
            i32 feature = spot.column + block * fp8::BLOCK, turn = (spot.turn * BLOCKS + block) * SENDS;
            i32 x = feature < arguments.up ? feature : NOWHERE;
            if constexpr (SAVE) {
                send<fp8::PowerOfTwo>(boxes, turn, held[block][0], arguments.hidden, arguments.hidden_scales, arguments.pitch, spot, x);
                if constexpr (PAIRED)
                    send<fp8::PowerOfTwo>(boxes, turn + 1, held[block][1], arguments.hidden, arguments.hidden_scales, arguments.pitch, spot,
                         arguments.up + x);
            }
            send<Scales>(boxes, turn + SENDS - 1, held[block][SENDS - 1], arguments.out, arguments.out_scales, arguments.pitch, spot, x);
        }
    }

    // A block of GEMM1's rows with its bias, rounded.
    static __device__ __forceinline__ void settle(const u16* bias, const Spot& spot, i32 features, i32 x, float* v,
                                                  u32 (&pairs)[fp8::PAIRS]) {
        if constexpr (BIAS) {
            add_bias<Value>(bias, spot, features, x, v);
            add_bias<Value>(bias, spot, features, x + 64, v + 32);
        }
#pragma unroll
        for (i32 i = 0; i < fp8::PAIRS; i++) pairs[i] = Value::pack(v[2 * i], v[2 * i + 1]);
    }

    template <typename Format>
    static __device__ __forceinline__ void send(u8* boxes, i32 turn, const u32 (&pairs)[fp8::PAIRS], const Target& target,
                                                float* scales, i32 pitch, const Spot& spot, i32 column) {
        box::acquire<BOXES - 1>();
        fp8::send<Value, Format>(boxes + turn % BOXES * box::BYTES, pairs, target, scales, pitch, spot.place, column);
    }

    // Two neighbouring features.
    static __device__ __forceinline__ u32 activate(u32 gates, u32 ups, float weight) {
        float gate[2], up[2];
        Value::unpack(gates, gate[0], gate[1]);
        if constexpr (PAIRED) {
            Value::unpack(ups, up[0], up[1]);
            return Value::pack(Activation::value(gate[0], up[0], weight), Activation::value(gate[1], up[1], weight));
        } else {
            return Value::pack(Activation::value(gate[0], weight), Activation::value(gate[1], weight));
        }
    }
};

// Back through GEMM2 and the activation, as ActivationBackward: from the quantised rows, to quantised gradients. Scales are
// the format of these; the scaled activation, which only the gradient of the matrices reads, has powers of two.
template <typename Value, i32 COLUMNS, typename Activation, Layout LAYOUT, bool READ, bool SCALED, typename Scales>
struct QuantizedActivationBackward {
    static constexpr bool PAIR = LAYOUT == Layout::HALVES, PAIRED = false, ADDS = false;
    static constexpr i32 HELD = 0;
    static constexpr i32 BLOCKS = COLUMNS / fp8::BLOCK, PARTS = PAIR ? 2 : 1;
    static constexpr i32 BOXES = BLOCKS * PARTS + 1, REGISTERS = 224;
    static_assert(LAYOUT != Layout::INTERLEAVED, "quantised matrices are put side by side");
    struct Arguments {
        TensorMap hidden;       // as `of_hidden`; boxes of 16 x 64
        Target of_hidden;       // (rows, columns)
        Target scaled;          // (rows, padded features)
        const float* hidden_scales;
        float *of_hidden_scales, *scaled_scales;  // (blocks, pitch)
        float* of_weight;                         // (column tiles, rows)
        const float *weights, *scales;            // of an assignment: what the activation reads, what the output multiplies by
        const i32* order;                         // the assignment of a row
        i32 rows, pitch, features, up;
    };
    struct Shared {
        u64 loaded[8][BLOCKS];  // of each warp
    };

    static __device__ __forceinline__ void prepare(Shared& shared) {
        for (i32 i = 0; i < 8 * BLOCKS; i++) ptx::barrier_init(&shared.loaded[i / BLOCKS][i % BLOCKS], 1);
    }

    static __device__ __forceinline__ void prefetch(u8* boxes, Shared& shared, u32 warp, const Arguments& arguments,
                                                    const Spot& spot) {
        __syncwarp();  // nobody reads the boxes any more
        if (threadIdx.x % 32 == 0) {
            ptx::store_wait_read<0>();
            for (i32 block = 0; block < BLOCKS; block++) {
                u64* loaded = &shared.loaded[warp][block];
                u8* to = boxes + block * PARTS * box::BYTES;
                i32 x = (spot.column + block * fp8::BLOCK) / 2;
                ptx::barrier_expect(loaded, PARTS * box::BYTES);
                ptx::load_2d(to, &arguments.hidden, loaded, x, spot.place.row);
                if (PAIR) ptx::load_2d(to + box::BYTES, &arguments.hidden, loaded, arguments.up / 2 + x, spot.place.row);
            }
        }
        __syncwarp();
    }

    static __device__ __forceinline__ void finish(u8* boxes, Shared& shared, u32 warp, const Arguments& arguments,
                                                  const Spot& spot, float (&total)[COLUMNS / 2]) {
        i32 first = spot.place.upper();
        Row rows[2] = {Row(arguments, spot.place, first), Row(arguments, spot.place, first + 8)};
#pragma unroll
        for (i32 block = 0; block < BLOCKS; block++) {
            u8 *gate = boxes + block * PARTS * box::BYTES, *up = gate + box::BYTES, *last = boxes + (BOXES - 1) * box::BYTES;
            i32 feature = spot.column + block * fp8::BLOCK;
            for (i32 row = 0; row < 2; row++) rows[row].at(arguments, spot.place, first + 8 * row, feature);
            u32 of_gate[fp8::PAIRS], of_up[fp8::PAIRS], a[fp8::PAIRS];
            fp8::Pairs gates_of(gate), ups_of(up);
            ptx::barrier_wait(&shared.loaded[warp][block], spot.turn % 2);
#pragma unroll
            for (i32 i = 0; i < fp8::PAIRS; i++) {
                u16 gates = gates_of.get(i), ups = PAIR ? ups_of.get(i) : u16(0);
                bool real = feature + i / 2 * 8 + i32(threadIdx.x % 4) * 2 < arguments.features;
                rows[i % 2].back(total[block * 64 + 2 * i], total[block * 64 + 2 * i + 1], gates, ups, real, of_gate[i], of_up[i],
                                 a[i]);
            }
            if (feature + fp8::BLOCK > arguments.features) {
                fp8::clear_from(of_gate, arguments.features - feature);
                if constexpr (PAIR) fp8::clear_from(of_up, arguments.features - feature);
                fp8::clear_from(a, arguments.features - feature);
            }
            box::acquire<0>();  // all lanes have read the rows, and the block before has left `last`
            i32 x = feature < arguments.up ? feature : NOWHERE;
            fp8::send<Value, Scales>(gate, of_gate, arguments.of_hidden, arguments.of_hidden_scales, arguments.pitch, spot.place, x);
            if constexpr (PAIR)
                fp8::send<Value, Scales>(up, of_up, arguments.of_hidden, arguments.of_hidden_scales, arguments.pitch, spot.place,
                                 arguments.up + x);
            fp8::send<Value, fp8::PowerOfTwo>(last, a, arguments.scaled, arguments.scaled_scales, arguments.pitch, spot.place, x);
        }
        for (i32 row = 0; row < 2; row++) rows[row].store_weight(arguments, spot, first + 8 * row);
    }

    // One of a lane's two rows.
    struct Row {
        float weight = 0, scale = 1, of_weight = 0, gate_scale = 0, up_scale = 0;

        __device__ __forceinline__ Row(const Arguments& arguments, const box::Place& place, i32 row) {
            if (!(READ || SCALED) || row >= place.end) return;
            i32 assignment = __ldg(arguments.order + row);
            if (READ) weight = __ldg(arguments.weights + assignment);
            if (SCALED) scale = __ldg(arguments.scales + assignment);
        }

        // The scales of its block that begins at that feature.
        __device__ __forceinline__ void at(const Arguments& arguments, const box::Place& place, i32 row, i32 feature) {
            if (row >= place.end || feature >= arguments.features) return;
            gate_scale = __ldg(arguments.hidden_scales + i64(feature / fp8::BLOCK) * arguments.pitch + row);
            if (PAIR)
                up_scale = __ldg(arguments.hidden_scales + i64((arguments.up + feature) / fp8::BLOCK) * arguments.pitch + row);
        }

        // Two neighbouring features, of which v is the gradient of the activation: the gradients of gate and up, and the
        // scaled activation. What the activation makes of a feature that is not real, NaN perhaps, is not the weight's matter.
        __device__ __forceinline__ void back(float v0, float v1, u16 gates, u16 ups, bool real, u32& of_gate, u32& of_up, u32& a) {
            float gate[2], up[2], v[2] = {v0, v1}, of_gates[2], of_ups[2] = {0, 0}, values[2];
            ptx::unpack_e4m3(gates, gate[0], gate[1]);
            if (PAIR) ptx::unpack_e4m3(ups, up[0], up[1]);
#pragma unroll
            for (i32 i = 0; i < 2; i++) {
                float own = 0, value;
                gate[i] *= gate_scale;
                if constexpr (PAIR) {
                    up[i] *= up_scale;
                    value = Activation::value(gate[i], up[i], weight);
                    Activation::backward(v[i] * scale, gate[i], up[i], weight, of_gates[i], of_ups[i], own);
                } else {
                    value = Activation::value(gate[i], weight);
                    Activation::backward(v[i] * scale, gate[i], weight, of_gates[i], own);
                }
                of_weight += real ? (SCALED ? v[i] * value + own : own) : 0;
                values[i] = value * scale;
            }
            of_gate = Value::pack(of_gates[0], of_gates[1]), a = Value::pack(values[0], values[1]);
            if (PAIR) of_up = Value::pack(of_ups[0], of_ups[1]);
        }

        // The four lanes of a row together, in a fixed order.
        __device__ __forceinline__ void store_weight(const Arguments& arguments, const Spot& spot, i32 row) {
            of_weight += __shfl_xor_sync(~0u, of_weight, 1);
            of_weight += __shfl_xor_sync(~0u, of_weight, 2);
            bool ours = row < spot.place.end && spot.column < arguments.features;
            if ((READ || SCALED) && threadIdx.x % 4 == 0 && ours)
                arguments.of_weight[i64(spot.column / COLUMNS) * arguments.rows + row] = of_weight;
        }
    };
};
