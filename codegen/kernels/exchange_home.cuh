// What became of this rank's tokens on all ranks, summed at home: in float32, in the order of ranks, rounded once.
//
// Rows are read where their ranks have put them. Where the exchange was aborted, every sum is NaN.
#pragma once
#include "peer.cuh"
#include "result.cuh"

// Eight neighbouring numbers of a row, or one, that another device may have written: loads go past L1.
template <typename Result>
struct Came;
template <>
struct Came<Float> {
    static __device__ __forceinline__ float one(const u8* row, i32 column) { return __ldcg(reinterpret_cast<const float*>(row) + column); }
    static __device__ __forceinline__ void eight(const u8* row, i32 column, float (&v)[8]) {
        const float4* from = reinterpret_cast<const float4*>(row) + column / 4;
        float4 low = __ldcg(from), high = __ldcg(from + 1);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    }
};
template <typename Input>
struct Came<Half<Input>> {
    static __device__ __forceinline__ float one(const u8* row, i32 column) {
        float low, high;
        Input::unpack(__ldcg(reinterpret_cast<const u16*>(row) + column), low, high);
        return low;
    }
    static __device__ __forceinline__ void eight(const u8* row, i32 column, float (&v)[8]) {
        uint4 packed = __ldcg(reinterpret_cast<const uint4*>(row) + column / 8);
        Input::unpack(packed.x, v[0], v[1]), Input::unpack(packed.y, v[2], v[3]);
        Input::unpack(packed.z, v[4], v[5]), Input::unpack(packed.w, v[6], v[7]);
    }
};

template <typename Result, typename Weight>
struct ExchangeHome {
    static constexpr i32 THREADS = 256, BLOCKS = 1;
    struct Arguments {
        const u64* bases;
        u64* told;
        const i32* home;  // (tokens, ranks): the place of a token on each rank, -1 where it has none
        typename Result::Element* out;      // (tokens, columns)
        typename Weight::Element* weights;  // (tokens, top_k), or null
        i32 rank, ranks, slot, room, capacity, pitch, channels, patience;
        i32 tokens, columns, top_k;
    };
    struct Shared {
        i32 complete;
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(16) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        Peers peers = {arguments.bases, arguments.told,     arguments.rank,  arguments.ranks,    arguments.slot,
                       arguments.room,  arguments.capacity, arguments.pitch, arguments.channels, arguments.patience};
        PeerWords& own = peers.words(peers.rank);
        u32 exchange = exchange_of(own.ended[peers.slot]);
        bool complete = wait(shared, peers, exchange);
        i32 eights = arguments.columns / 8;
        i64 count = i64(arguments.tokens) * eights, step = i64(gridDim.x) * THREADS, first = i64(blockIdx.x) * THREADS + threadIdx.x;
        for (i64 i = first; i < count; i += step) {
            i32 token = i / eights, column = i % eights * 8;
            float sum[8] = {};
            for (i32 rank = 0; rank < peers.ranks; rank++) {
                i32 place = __ldg(arguments.home + i64(token) * peers.ranks + rank);
                if (place < 0) continue;
                float v[8];
                Came<Result>::eight(peers.record(peers.rank, rank, place), column, v);
#pragma unroll
                for (i32 j = 0; j < 8; j++) sum[j] += v[j];
            }
#pragma unroll
            for (i32 j = 0; j < 8; j++) sum[j] = complete ? sum[j] : __int_as_float(0x7fffffff);
            Result::store(arguments.out + i64(token) * arguments.columns + column, sum);
        }
        i32 behind = arguments.columns * i32(sizeof(typename Result::Element));
        for (i64 i = first; arguments.weights && i < i64(arguments.tokens) * arguments.top_k; i += step) {
            i32 token = i / arguments.top_k, k = i % arguments.top_k;
            float sum = 0;
            for (i32 rank = 0; rank < peers.ranks; rank++) {
                i32 place = __ldg(arguments.home + i64(token) * peers.ranks + rank);
                if (place >= 0) sum += Came<Weight>::one(peers.record(peers.rank, rank, place) + behind, k);
            }
            Weight::store(arguments.weights + i, complete ? sum : __int_as_float(0x7fffffff));
        }
        __syncthreads();
        if (threadIdx.x == 0 && is_last_block(own.ended[peers.slot])) {
            own.ended[peers.slot][0] = exchange;
            ptx::fence_system();
            for (i32 other = 0; other < peers.ranks; other++)
                ptx::store_release_system(&peers.words(other).taken[peers.slot][peers.rank], exchange);
        }
    }

    // By a block, until everything is there; false if the exchange was aborted.
    static __device__ __forceinline__ bool wait(Shared& shared, const Peers& peers, u32 exchange) {
        if (threadIdx.x == 0) shared.complete = 1;
        __syncthreads();
        for (i32 i = threadIdx.x; i < peers.ranks * peers.channels; i += THREADS) {
            i32 from = i / peers.channels;
            const u64* word = &peers.words(peers.rank).arrived[peers.slot][from][i % peers.channels];
            if (!peers.wait(word, u64(exchange) << 32, from, Step::HOME)) shared.complete = 0;
        }
        ptx::fence_system();
        __syncthreads();
        return shared.complete;
    }
};
