// Rows to the other ranks that are to have them: of a local tensor, through shared memory, into their memory, by bulk copies.
//
// A warp is a channel: it has every so-manieth row of each rank, and a ring of its own. Behind a row travel the token's
// experts and their weights. Rows leave in batches, by a lane each. Every few rows a channel tells the rank how many are there,
// and in the end that these are all.
// Ranks begin with the one after them and go on to the next, so that no two send to the same one.
//
// What takes the rows (exchange_receive.cuh, exchange_home.cuh) may be launched behind this kernel and begins when all of its
// blocks have: nobody waits on the device for what the device has no room for.
#pragma once
#include "peer.cuh"

template <typename Id>
struct ExchangeSend {
    static constexpr i32 THREADS = 128, BLOCKS = 1, WARPS = THREADS / 32, PARTS = 3, RING = 54 * 1024;
    static constexpr i32 ALONG = 4;  // of what travels behind a batch's rows, in a lane's hands
    static constexpr i32 TELL = 8;   // a rank is told of so many rows, when those after them have left
    struct Arguments {
        Peers peers;
        const u8* x;        // (tokens, H), lines of `line` bytes, of which `bytes` are sent; a multiple of 16
        const i32* sent;    // (ranks, capacity): the line for each place, -1 behind the last; or null: line after line,
        const i32* came;    // (ranks,) so many of each rank's `capacity`; or less than none, and then how many there was no room for
        const Id* ids;      // (tokens, top_k), or null
        const u8* weights;  // (tokens, top_k) of `weight` bytes, 2 or 4, or null; these two by line, too
        i32 bytes, line, top_k, weight;  // `pitch` is that with what travels behind it
        i32 done;                        // the slot of an exchange whose rows this rank has read; -1 for none
        u32* started;                    // zero at first: how many blocks have begun (exchange_gate.cuh); or null
    };
    struct Batch {
        i32 turn, index, count;  // turn: of the rank it goes to; this one has none. index: of the first row, among the channel's
    };
    struct Warp {
        u64 full[PARTS];
        i32 lines[PARTS][32];
        Batch batches[PARTS];
    };
    struct Shared {
        u8 rows[WARPS][RING];
        Warp warps[WARPS];
    };

    // Batches of a channel, one after the other. By a warp, whose lanes hold the lines of 32 rows at a time.
    struct Cursor {
        i32 turn = 1, first = 0, used = 0, there, held;
        __device__ __forceinline__ Cursor(const Arguments& arguments, i32 channel) {
            load(arguments, channel);
            settle(arguments, channel);
        }
        __device__ __forceinline__ bool is_there(const Arguments& arguments) const { return turn < arguments.peers.ranks; }
        __device__ __forceinline__ Batch take(const Arguments& arguments, i32 channel, i32 most, i32& line) {
            Batch batch = {turn, first + used, min(most, there - used)};
            line = __shfl_sync(~0u, held, used + threadIdx.x % 32);
            used += batch.count;
            settle(arguments, channel);
            return batch;
        }
        __device__ __forceinline__ void settle(const Arguments& arguments, i32 channel) {
            while (used == there && is_there(arguments)) {
                if (there == 32)
                    first += 32;
                else
                    turn++, first = 0;
                load(arguments, channel);
            }
        }
        __device__ __forceinline__ void load(const Arguments& arguments, i32 channel) {
            const Peers& peers = arguments.peers;
            i32 to = rank_of(arguments, turn), place = channel + (first + i32(threadIdx.x % 32)) * peers.channels;
            held = -1;
            if (is_there(arguments) && arguments.sent)
                held = place < peers.capacity ? __ldg(arguments.sent + i64(to) * peers.capacity + place) : -1;
            else if (is_there(arguments) && place < __ldg(arguments.came + to))
                held = to * peers.capacity + place;
            there = __popc(__ballot_sync(~0u, held >= 0)), used = 0;
        }
    };

    // What travels behind a batch's rows: of each lane, every 32nd.
    struct Along {
        i32 ids[ALONG];
        u32 weights[ALONG];
        __device__ __forceinline__ void fetch(const Arguments& arguments, const i32* lines, i32 count) {
#pragma unroll
            for (i32 i = 0; i < ALONG; i++) {
                i32 number = i32(threadIdx.x % 32) + 32 * i;
                if (number >= count * arguments.top_k) continue;
                i64 at = i64(lines[number / arguments.top_k]) * arguments.top_k + number % arguments.top_k;
                if (arguments.ids) ids[i] = i32(__ldg(arguments.ids + at));
                if (arguments.weights)
                    weights[i] = arguments.weight == 4 ? __ldg(reinterpret_cast<const u32*>(arguments.weights) + at)
                                                       : __ldg(reinterpret_cast<const u16*>(arguments.weights) + at);
            }
        }
        __device__ __forceinline__ void put(const Arguments& arguments, u8* rows, i32 count) const {
#pragma unroll
            for (i32 i = 0; i < ALONG; i++) {
                i32 number = i32(threadIdx.x % 32) + 32 * i, k = number % max(1, arguments.top_k);
                if (number >= count * arguments.top_k) continue;
                u8* behind = rows + number / arguments.top_k * arguments.peers.pitch + arguments.bytes;
                u8* to = behind + (arguments.ids ? 4 * arguments.top_k : 0);
                if (arguments.ids) reinterpret_cast<i32*>(behind)[k] = ids[i];
                if (arguments.weights && arguments.weight == 4)
                    reinterpret_cast<u32*>(to)[k] = weights[i];
                else if (arguments.weights)
                    reinterpret_cast<u16*>(to)[k] = u16(weights[i]);
            }
        }
    };

    static __device__ __forceinline__ i32 rank_of(const Arguments& arguments, i32 turn) {
        return (arguments.peers.rank + turn) % arguments.peers.ranks;
    }

    static __device__ __forceinline__ void run(const Arguments& arguments, const Grid& grid = Grid::whole()) {
        ptx::take_turn();
        extern __shared__ __align__(128) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        const Peers& peers = arguments.peers;
        u32(&begun)[2] = peers.words(peers.rank).begun[peers.slot];
        i32 warp = threadIdx.x / 32;
        u32 exchange = exchange_of(begun);
        if (arguments.started && threadIdx.x == 0) atomicAdd(arguments.started, 1);
        if (grid.block == 0 && threadIdx.x == 0) {
            if (!arguments.sent) peers.give_up_without_room(arguments.came);
            peers.give_up_behind(exchange);
        }
        if (arguments.done >= 0 && grid.block == 0 && threadIdx.x == 0) peers.tell_all_read(arguments.done);
        send(shared.warps[warp], shared.rows[warp], arguments, exchange, grid.block * WARPS + warp);
        __syncthreads();
        if (threadIdx.x == 0 && grid.is_last_block(begun[1])) begun[0] = exchange;
    }

    // By a warp. The ring has parts, a batch each: one that leaves, and others on their way to it.
    static __device__ __forceinline__ void send(Warp& shared, u8* ring, const Arguments& arguments, u32 exchange, i32 channel) {
        i32 lane = threadIdx.x % 32, pitch = arguments.peers.pitch, parts = min(PARTS, RING / pitch);
        i32 most = min(RING / (parts * pitch), 32 * ALONG / max(4, arguments.top_k)), bytes = most * pitch;
        if (lane < parts) ptx::barrier_init(shared.full + lane, 1);
        if (lane < parts) ptx::barrier_init_fence();
        __syncwarp();
        Cursor cursor(arguments, channel);
        Destination destination{arguments, exchange, channel};
        i32 loads = 0, loading = 0, leaving = 0;  // the latter two: parts
        u32 parity = 0;
        Along along[PARTS - 1];  // of the next batch to leave, and of the one behind it
        auto load = [&]() {
            if (parts == PARTS) along[0] = along[1];
            if (!cursor.is_there(arguments)) return;
            i32 line;
            Batch batch = cursor.take(arguments, channel, most, line);
            shared.lines[loading][lane] = line;
            if (lane == 0) shared.batches[loading] = batch;
            if (lane == 0) ptx::barrier_expect(shared.full + loading, batch.count * arguments.bytes);
            __syncwarp();
            if (lane < batch.count)
                ptx::load_bytes(ring + loading * bytes + lane * pitch, arguments.x + i64(line) * arguments.line, arguments.bytes,
                                shared.full + loading);
            if (parts == PARTS)
                along[1].fetch(arguments, shared.lines[loading], batch.count);
            else
                along[0].fetch(arguments, shared.lines[loading], batch.count);
            loads++;
            loading = loading + 1 == parts ? 0 : loading + 1;
        };
        for (i32 i = 0; i + 1 < parts; i++) load();
        for (i32 i = 0; i < loads; i++) {
            Batch batch = shared.batches[leaving];
            destination.become(batch.turn);
            ptx::barrier_wait(shared.full + leaving, parity);
            along[0].put(arguments, ring + leaving * bytes, batch.count);
            ptx::fence_async_proxy();
            __syncwarp();
            destination.take(batch, ring + leaving * bytes);
            ptx::store_wait_read<1>();  // what the next loads overwrite left one batch ago
            __syncwarp();
            load();
            if (++leaving == parts) leaving = 0, parity ^= 1;
        }
        destination.become(arguments.peers.ranks);
    }

    // The rank that a channel's rows go to, and what it has been told. By a warp.
    struct Destination {
        const Arguments& arguments;
        u32 exchange;
        i32 channel;
        i32 turn = 0, rows = 0, told = 0;  // turn 0: none yet
        bool lost = false;                 // the exchange was aborted: nothing is written any more

        __device__ __forceinline__ i32 rank() const { return rank_of(arguments, turn); }
        // That of a later turn; those before it have all their rows then, and know it, who have none as well.
        __device__ __forceinline__ void become(i32 next) {
            const Peers& peers = arguments.peers;
            while (turn < next) {
                if (turn) {
                    ptx::store_wait();
                    tell(u32(rows) | ALL);
                }
                rows = told = 0;
                if (++turn == peers.ranks || exchange == 1) continue;
                // It may have what this exchange writes when it has read what the one before wrote.
                if (threadIdx.x % 32 == 0)
                    lost |= !peers.wait(&peers.words(peers.rank).taken[peers.slot][rank()], exchange - 1, rank(), Step::SEND);
                lost = __shfl_sync(~0u, lost, 0);
                ptx::fence_system();
            }
        }
        __device__ __forceinline__ void take(const Batch& batch, const u8* from) {
            const Peers& peers = arguments.peers;
            i32 lane = threadIdx.x % 32, place = channel + (batch.index + lane) * peers.channels;
            if (lane < batch.count && !lost)
                ptx::store_bytes(peers.record(rank(), peers.rank, place), from + lane * peers.pitch, peers.pitch);
            ptx::store_commit();
            if (rows - told >= TELL) {
                ptx::store_wait<1>();
                tell(rows);
                told = rows;
            }
            rows += batch.count;
        }
        __device__ __forceinline__ void tell(u32 rows) const {
            const Peers& peers = arguments.peers;
            ptx::fence_async_all();
            __syncwarp();
            if (threadIdx.x % 32 == 0 && !lost)
                ptx::store_release_system(&peers.words(rank()).arrived[peers.slot][peers.rank][channel],
                                          u64(exchange) << 32 | rows);
        }
    };
};
