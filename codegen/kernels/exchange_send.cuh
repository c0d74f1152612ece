// Rows to the ranks that are to have them: of a local tensor, through shared memory, into the peers' own, by bulk copies.
//
// A warp is a channel: it has every so-manieth row of each rank, and a ring of its own. Behind a row travel the token's
// experts and their weights. When all of a channel's rows are there, it says so to each rank, with their number. Ranks begin
// with themselves and go on to the next, so that no two send to the same one.
#pragma once
#include "peer.cuh"

template <typename Id>
struct ExchangeSend {
    static constexpr i32 THREADS = 128, BLOCKS = 1, WARPS = THREADS / 32, STAGES = 16, RING = 54 * 1024;
    struct Arguments {
        const u64* bases;
        u64* told;
        const u8* x;        // (tokens, H), lines of `line` bytes, of which `bytes` are sent; a multiple of 16
        const i32* sent;    // (ranks, capacity): the line for each place, -1 behind the last; or null: line after line,
        const i32* came;    // (ranks,) so many of each rank's `capacity`
        const Id* ids;      // (tokens, top_k), or null
        const u8* weights;  // (tokens, top_k) of `weight` bytes, 2 or 4, or null; these two by line, too
        i32 rank, ranks, slot, room, capacity, pitch, channels, patience;
        i32 bytes, line, top_k, weight;  // `pitch` is that with what travels behind it
    };
    struct Shared {
        u8 rows[WARPS][RING];
        u64 full[WARPS][STAGES];
        i32 counts[WARPS][RANKS];
    };

    // A row, and where it goes: those of a channel one after the other.
    struct Item {
        i32 turn, place, line;  // turn: of the rank it goes to
        __device__ __forceinline__ Item(const Arguments& arguments, i32 channel) : turn(0), place(channel) { settle(arguments, channel); }
        __device__ __forceinline__ bool is_there(const Arguments& arguments) const { return turn < arguments.ranks; }
        __device__ __forceinline__ i32 to(const Arguments& arguments) const { return (arguments.rank + turn) % arguments.ranks; }
        __device__ __forceinline__ void next(const Arguments& arguments, i32 channel) {
            place += arguments.channels;
            settle(arguments, channel);
        }
        __device__ __forceinline__ void settle(const Arguments& arguments, i32 channel) {
            for (; turn < arguments.ranks; turn++, place = channel) {
                i32 first = to(arguments) * arguments.capacity;
                if (arguments.sent) {
                    line = place < arguments.capacity ? __ldg(arguments.sent + first + place) : -1;
                    if (line >= 0) return;
                } else if (place < __ldg(arguments.came + to(arguments))) {
                    line = first + place;
                    return;
                }
            }
        }
    };

    static __device__ __forceinline__ void run(const Arguments& arguments) {
        ptx::take_turn();
        extern __shared__ __align__(128) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        Peers peers = {arguments.bases, arguments.told,     arguments.rank,  arguments.ranks,    arguments.slot,
                       arguments.room,  arguments.capacity, arguments.pitch, arguments.channels, arguments.patience};
        PeerWords& own = peers.words(peers.rank);
        u32 exchange = exchange_of(own.begun[peers.slot]);
        i32 warp = threadIdx.x / 32, channel = blockIdx.x * WARPS + warp;
        if (send(shared, arguments, peers, exchange, warp, channel) && threadIdx.x % 32 == 0) {
            ptx::store_wait();
            ptx::fence_async_all();
            ptx::fence_system();
            for (i32 other = 0; other < peers.ranks; other++)
                ptx::store_release_system(&peers.words(other).arrived[peers.slot][peers.rank][channel],
                                          u64(exchange) << 32 | u32(shared.counts[warp][other]));
        }
        __syncthreads();
        if (threadIdx.x == 0 && is_last_block(own.begun[peers.slot])) own.begun[peers.slot][0] = exchange;
    }

    // By a warp; false if the exchange was aborted.
    static __device__ __forceinline__ bool send(Shared& shared, const Arguments& arguments, const Peers& peers, u32 exchange,
                                                i32 warp, i32 channel) {
        i32 lane = threadIdx.x % 32, stages = min(STAGES, RING / arguments.pitch);
        u64* full = shared.full[warp];
        if (lane < RANKS) shared.counts[warp][lane] = 0;
        if (lane == 0) {
            for (i32 stage = 0; stage < stages; stage++) ptx::barrier_init(full + stage, 1);
            ptx::barrier_init_fence();
        }
        __syncwarp();
        Item loaded(arguments, channel), stored = loaded;
        Along along(arguments, stored);
        i32 loads = 0, open = -1;  // open: the turn of the last rank whose memory is known to be free
        auto load = [&]() {
            if (!loaded.is_there(arguments)) return;
            if (lane == 0) {
                i32 stage = loads % stages;
                ptx::barrier_expect(full + stage, arguments.bytes);
                ptx::load_bytes(shared.rows[warp] + stage * arguments.pitch, arguments.x + i64(loaded.line) * arguments.line,
                                arguments.bytes, full + stage);
            }
            loads++;
            loaded.next(arguments, channel);
        };
        for (i32 i = 0; i + 1 < stages; i++) load();
        for (i32 i = 0; stored.is_there(arguments); i++) {
            i32 to = stored.to(arguments), stage = i % stages;
            if (stored.turn != open) {
                bool free = true;
                if (lane == 0) free = is_free(peers, to, exchange);
                if (!__shfl_sync(~0u, free, 0)) return false;
                open = stored.turn;
            }
            u8* row = shared.rows[warp] + stage * arguments.pitch;
            i32 place = stored.place;
            stored.next(arguments, channel);
            Along following(arguments, stored);  // on its way while the row before it is
            ptx::barrier_wait(full + stage, i / stages & 1);
            along.put(arguments, row + arguments.bytes);
            along = following;
            if (lane == 0) {
                ptx::store_bytes(peers.record(to, peers.rank, place), row, arguments.pitch);
                ptx::store_commit();
                shared.counts[warp][to]++;
                ptx::store_wait_read<1>();  // what the next load overwrites was stored one row ago
            }
            __syncwarp();
            load();
        }
        if (lane == 0) {  // who sends nothing to a rank says that as well, and only when it may
            for (i32 other = 0; other < peers.ranks; other++)
                if (!is_free(peers, other, exchange)) return false;
        }
        return true;
    }

    // Whether a rank has read what this one wrote there before, sooner or later; false if the exchange was aborted.
    static __device__ __forceinline__ bool is_free(const Peers& peers, i32 other, u32 exchange) {
        bool free = exchange == 1 || peers.wait(&peers.words(peers.rank).taken[peers.slot][other], exchange - 1, other, Step::SEND);
        ptx::fence_system();
        return free;
    }

    // A token's experts, in 32 bits, and their weights: one of each for a lane.
    struct Along {
        i32 id;
        u32 weight;
        __device__ __forceinline__ Along(const Arguments& arguments, const Item& item) : id(-1), weight(0) {
            i32 k = threadIdx.x % 32;
            if (!item.is_there(arguments) || k >= arguments.top_k) return;
            i64 at = i64(item.line) * arguments.top_k + k;
            if (arguments.ids) id = i32(__ldg(arguments.ids + at));
            if (arguments.weights)
                weight = arguments.weight == 4 ? __ldg(reinterpret_cast<const u32*>(arguments.weights) + at)
                                               : __ldg(reinterpret_cast<const u16*>(arguments.weights) + at);
        }
        // Behind its row in shared memory.
        __device__ __forceinline__ void put(const Arguments& arguments, u8* behind) const {
            if (!arguments.ids && !arguments.weights) return;
            i32 k = threadIdx.x % 32;
            u8* weights = behind + (arguments.ids ? 4 * arguments.top_k : 0);
            if (k < arguments.top_k) {
                if (arguments.ids) reinterpret_cast<i32*>(behind)[k] = id;
                if (arguments.weights && arguments.weight == 4)
                    reinterpret_cast<u32*>(weights)[k] = weight;
                else if (arguments.weights)
                    reinterpret_cast<u16*>(weights)[k] = u16(weight);
            }
            ptx::fence_async_proxy();
            __syncwarp();
        }
    };
};
