// Rows to the ranks that are to have them, on all nodes. Between nodes a row travels once, with its places on that node's ranks
// behind it; the rank there that has this one's rail passes it on.
//
//     SEND   chunks of rows for another node into a ring of that rank's, whose places it gives back as credits
//     PASS   chunks that have come by this rank's rings, to the ranks of this node that are to have each row, this one included
//     HAND   rows for other ranks of this node
//
// No warp waits in SEND or PASS for one thing where it could do another: what is ready is claimed. (DeepSeek-V3, section 3.2.2.)
#pragma once
#include "node_roles.cuh"

namespace nodes {

template <typename Id, typename Near, typename Far>
struct Dispatch {
    static constexpr i32 THREADS = 32 * WARPS, BLOCKS = 1;
    struct Arguments {
        Exchange exchange;
        const u8* x;           // (tokens, H), lines of `line` bytes, of which `bytes` are sent; a multiple of 16
        const i32* sent;       // (ranks, capacity): the line for each place of each rank, -1 behind the last
        const i32* home;       // (tokens, ranks): the place of a line on each rank, -1 where it has none
        const i32* node_sent;  // (nodes, capacity): the line for each record to each node, -1 behind the last
        const Id* ids;         // (tokens, top_k), or null
        const u8* weights;     // (tokens, top_k) of `weight` bytes, 2 or 4, or null
        i32* passed;           // (nodes, capacity, locals): the place, on each rank of this node, of each record that came
        i32* records;          // (nodes,): how many came
        u8* scratch;           // of the transports; or null
        i32 bytes, line, top_k, weight;
    };
    struct Warp : WarpMemory<Near, Far> {
        i32 lines[32];
        i32 places[CHUNK * LOCALS];
    };
    struct Shared {
        u8 rows[WARPS][BYTES];
        Warp warps[WARPS];
        i32 to_node[NODES], to_rank[RANKS];  // records and rows of this rank
        i32 last;
    };

    // What a warp knows.
    struct Worker : Sender<Near, Far> {
        using Sender<Near, Far>::exchange, Sender<Near, Far>::words, Sender<Near, Far>::near, Sender<Near, Far>::far;
        using Sender<Near, Far>::pipe, Sender<Near, Far>::number, Sender<Near, Far>::channel, Sender<Near, Far>::lost;
        using Sender<Near, Far>::lane, Sender<Near, Far>::chunks, Sender<Near, Far>::first, Sender<Near, Far>::claimed;
        using Sender<Near, Far>::claim_next, Sender<Near, Far>::wait_to_land;
        const Arguments& arguments;
        const Shared& shared;
        Warp& warp;
        __device__ __forceinline__ Worker(const Arguments& arguments, Shared& shared, const Grid& grid, i32 index)
            : Sender<Near, Far>(arguments.exchange, shared.warps[index], shared.rows[index], arguments.exchange.ring_pitch(),
                                arguments.scratch, grid, index),
              arguments(arguments), shared(shared), warp(shared.warps[index]) {}

        // How many records come from a node: by the lane of its number; -1 where it is not known yet.
        __device__ __forceinline__ i32 announced(i32 node) const {
            return untagged(ptx::load_relaxed_system(&words.announced[exchange.slot][node][0]), number);
        }

        // A chunk that is ready, of the node that has the lane's number, claimed for this warp; the one behind this node, and then
        // in turn. Its node, or -1: somebody else has it, or none is ready. By a warp.
        __device__ __forceinline__ i32 claim(Role role, bool ready, u32 chunk) {
            u32 lanes = __ballot_sync(~0u, ready);
            if (!lanes) return -1;
            u32 behind = lanes & ~((2u << exchange.node) - 1);
            i32 node = __ffs(behind ? behind : lanes) - 1;
            bool mine = lane() == node && atomicCAS(&claimed(role, node), chunk, chunk + 1) == chunk;
            return __any_sync(~0u, mine) ? node : -1;
        }

        // Until nothing is left to claim of a role. `look(node, chunk, chunks, ready)` is asked by each lane for its node: how many
        // chunks there are, -1 if that is not known, and whether the one of that number is ready; `work` does one.
        template <typename Look, typename Work>
        __device__ __forceinline__ void work_off(Role role, Step step, Look look, Work work) {
            u64 deadline = 0;
            for (u32 turn = 1; !lost; turn++) {
                bool other = lane() < exchange.nodes && lane() != exchange.node, ready = false;
                u32 chunk = other ? ptx::load_relaxed(&claimed(role, lane())) : 0;
                i32 chunks = other ? look(lane(), chunk, ready) : 0;
                bool left = chunks < 0 || i32(chunk) < chunks;
                if (!__any_sync(~0u, left)) break;
                i32 node = claim(role, left && ready, chunk);
                if (node >= 0) {
                    near.goes_on();
                    work(node, i32(__shfl_sync(~0u, chunk, node)));
                    deadline = 0;
                    continue;
                }
                bool hopeless = turn % 64 == 0 && left && exchange.is_hopeless(deadline, exchange.on_rail(lane()), step);
                lost = __any_sync(~0u, hopeless);
                near.waits();
                near.progress(), far.progress();
            }
            near.goes_on();
        }

        __device__ __forceinline__ void send() {
            i32 slot = exchange.slot;
            work_off(
                Role::SEND, Step::CREDIT,
                [&](i32 node, u32 chunk, bool& ready) {
                    u32 sequence = words.chunks[slot][0][node][channel] + chunk, ring = exchange.ring;
                    ready = sequence < ring || ptx::load_relaxed_system(&words.freed[slot][node][channel][sequence % ring]) >
                                                   u64(sequence - ring);
                    return chunks(shared.to_node[node]);
                },
                [&](i32 node, i32 chunk) { send_chunk(node, chunk, words.chunks[slot][0][node][channel] + chunk); });
        }

        // By a warp, as are all that follow.
        __device__ __forceinline__ void send_chunk(i32 node, i32 chunk, u32 sequence) {
            i32 begin = first(chunk), count = min(exchange.chunk, shared.to_node[node] - begin), pitch = exchange.ring_pitch();
            i32 most = min(32, pipe.bytes / pitch), to = exchange.on_rail(node), place = sequence % exchange.ring;
            ptx::fence_system();  // who gave the place back has read it
            pipe.run(
                (count + most - 1) / most, far,
                [&](i32 batch, u8* rows, u64* full) {
                    const i32* lines = arguments.node_sent + i64(node) * exchange.capacity + begin + batch * most;
                    load(lines, min(most, count - batch * most), pitch, rows, full, node);
                },
                [&](i32 batch, u8* rows) {
                    ptx::fence_async_proxy();
                    __syncwarp();
                    Target target = {to, exchange.ring_record(exchange.node, channel, place, batch * most)};
                    far.put(lane() == 0, target, rows, min(most, count - batch * most) * pitch);
                });
            far.template fence<0>();
            Target target = {to, exchange.offset_of(words.filled[exchange.slot][exchange.node][channel][place])};
            far.signal(lane() == 0, target, u64(sequence) + 1);
        }

        // Begins to read lines, and writes what travels behind them: experts, weights, and, for another node, places there.
        __device__ __forceinline__ void load(const i32* lines, i32 count, i32 pitch, u8* rows, u64* full, i32 node) {
            i32 top_k = arguments.top_k, locals = exchange.locals, line = lane() < count ? __ldg(lines + lane()) : 0;
            if (lane() == 0) ptx::barrier_expect(full, count * arguments.bytes);
            warp.lines[lane()] = line;
            __syncwarp();
            if (lane() < count)
                ptx::load_bytes(rows + lane() * pitch, arguments.x + i64(line) * arguments.line, arguments.bytes, full);
            for (i32 i = lane(); i < count * top_k; i += 32) {
                i32 of = i / top_k, k = i % top_k;
                i64 at = i64(warp.lines[of]) * top_k + k;
                u8* behind = rows + of * pitch + arguments.bytes;
                u8* weights = behind + (arguments.ids ? 4 * top_k : 0);
                if (arguments.ids) reinterpret_cast<i32*>(behind)[k] = i32(__ldg(arguments.ids + at));
                if (arguments.weights && arguments.weight == 4)
                    reinterpret_cast<u32*>(weights)[k] = __ldg(reinterpret_cast<const u32*>(arguments.weights) + at);
                else if (arguments.weights)
                    reinterpret_cast<u16*>(weights)[k] = __ldg(reinterpret_cast<const u16*>(arguments.weights) + at);
            }
            for (i32 i = lane(); node >= 0 && i < count * locals; i += 32) {
                i32 of = i / locals, rail = i % locals;
                i32* places = reinterpret_cast<i32*>(rows + of * pitch + exchange.pitch);
                places[rail] = __ldg(arguments.home + i64(warp.lines[of]) * exchange.ranks + node * locals + rail);
            }
        }

        __device__ __forceinline__ void pass() {
            i32 slot = exchange.slot;
            bool told = false;
            work_off(
                Role::PASS, Step::PASS,
                [&](i32 node, u32 chunk, bool& ready) {
                    i32 records = announced(node);
                    if (records >= 0 && channel == 0 && !told) told = relay(node, records);
                    if (records < 0 || (channel == 0 && !told)) return -1;
                    u32 sequence = words.chunks[slot][1][node][channel] + chunk;
                    ready = ptx::load_relaxed_system(&words.filled[slot][node][channel][sequence % exchange.ring]) > sequence;
                    return chunks(records);
                },
                [&](i32 node, i32 chunk) {
                    i32 records = __shfl_sync(~0u, lane() < exchange.nodes ? announced(lane()) : 0, node);
                    pass_chunk(node, chunk, min(exchange.chunk, records - first(chunk)),
                               words.chunks[slot][1][node][channel] + chunk);
                });
        }

        // By a lane, in the first channel, where any warp may do it, or several the same: how many rows come from the rank of this
        // rail on that node, to each of this node. False as long as it is not known. What is told needs no order with rows.
        __device__ __forceinline__ bool relay(i32 node, i32 records) const {
            i32 locals = exchange.locals, slot = exchange.slot;
            for (i32 rail = 0; rail < locals; rail++)
                if (untagged(ptx::load_relaxed_system(&words.announced[slot][node][1 + rail]), number) < 0) return false;
            for (i32 rail = 0; rail < locals; rail++) {
                u64 rows = ptx::load_relaxed_system(&words.announced[slot][node][1 + rail]);
                ptx::store_release_system(&exchange.words(exchange.neighbour(rail)).coming[slot][exchange.on_rail(node)], rows);
            }
            arguments.records[node] = records;
            return true;
        }

        __device__ __forceinline__ void pass_chunk(i32 node, i32 chunk, i32 count, u32 sequence) {
            i32 begin = first(chunk), pitch = exchange.ring_pitch(), locals = exchange.locals;
            i32 most = min(32 / locals, pipe.bytes / pitch), place = sequence % exchange.ring, from = exchange.on_rail(node);
            i32 of = lane() / locals, rail = lane() % locals;
            const u8* ring = exchange.base(exchange.rank) + exchange.ring_record(node, channel, place, 0);
            ptx::fence_system();  // what was said to be there is
            ptx::fence_async_all();
            __syncwarp();
            wait_to_land();
            pipe.run(
                (count + most - 1) / most, near,
                [&](i32 batch, u8* rows, u64* full) {
                    u32 bytes = min(most, count - batch * most) * pitch;
                    if (lane() == 0) ptx::barrier_expect(full, bytes);
                    if (lane() == 0) ptx::load_bytes_once(rows, ring + i64(batch) * most * pitch, bytes, full);
                },
                [&](i32 batch, u8* rows) {
                    i32 record = batch * most + of, to = -1;
                    if (of < most && record < count) {
                        to = reinterpret_cast<const i32*>(rows + of * pitch + exchange.pitch)[rail];
                        warp.places[record * locals + rail] = to;
                        arguments.passed[(i64(node) * exchange.capacity + begin + record) * locals + rail] = to;
                    }
                    __syncwarp();
                    Target target = {exchange.neighbour(rail), exchange.record(from, to)};
                    near.put(to >= 0 && !lost, target, rows + of * pitch, exchange.pitch);
                });
            Target target = {from, exchange.offset_of(words.freed[exchange.slot][exchange.node][channel][place])};
            far.signal(lane() == 0, target, u64(sequence) + 1);
            near.template fence<0>();
            for (i32 i = 0; i < count * locals; i += 32) {
                i32 to = i + lane() < count * locals ? warp.places[i + lane()] : -1;
                near.signal(to >= 0 && !lost, {exchange.neighbour((i + lane()) % locals), exchange.landed(from, to)}, number);
            }
            __syncwarp();
        }

        __device__ __forceinline__ void hand() {
            i32 others = exchange.locals - 1, groups = 0;
            for (i32 rail = 0; rail <= others; rail++)
                if (rail != exchange.rail) groups = max(groups, chunks(shared.to_rank[exchange.neighbour(rail)]));
            while (!lost) {
                i32 piece = claim_next(Role::HAND);
                if (piece >= groups * others) return;
                hand_group(exchange.neighbour((exchange.rail + 1 + piece % others) % (others + 1)), piece / others);
            }
        }

        __device__ __forceinline__ void hand_group(i32 to, i32 group) {
            i32 begin = first(group), count = min(exchange.chunk, shared.to_rank[to] - begin), pitch = exchange.pitch;
            if (count <= 0) return;
            i32 most = min(32, pipe.bytes / pitch);
            wait_to_land();
            if (lost) return;
            pipe.run(
                (count + most - 1) / most, near,
                [&](i32 batch, u8* rows, u64* full) {
                    const i32* lines = arguments.sent + i64(to) * exchange.capacity + begin + batch * most;
                    load(lines, min(most, count - batch * most), pitch, rows, full, -1);
                },
                [&](i32 batch, u8* rows) {
                    ptx::fence_async_proxy();
                    __syncwarp();
                    Target target = {to, exchange.record(exchange.rank, begin + batch * most)};
                    near.put(lane() == 0, target, rows, min(most, count - batch * most) * pitch);
                });
            near.template fence<0>();
            near.signal(lane() < count, {to, exchange.landed(exchange.rank, begin + lane())}, number);
        }

        // What others have to know: how many rows come to the ranks of this node, how many records to other nodes, and how many
        // rows these are there.
        __device__ __forceinline__ void announce() {
            i32 slot = exchange.slot, locals = exchange.locals;
            i32 next = exchange.neighbour(min(lane(), locals - 1));
            near.signal(lane() < locals, {next, exchange.offset_of(words.coming[slot][exchange.rank])},
                        tagged(number, shared.to_rank[next]));
            for (i32 i = 0; i <= locals; i++) {
                i32 node = min(lane(), exchange.nodes - 1), count = i ? shared.to_rank[node * locals + i - 1] : shared.to_node[node];
                far.signal(lane() < exchange.nodes && lane() != exchange.node,
                           {exchange.on_rail(node), exchange.offset_of(words.announced[slot][exchange.node][i])},
                           tagged(number, count));
            }
        }

        __device__ __forceinline__ void run(const Grid& grid) {
            i32 work[ROLES] = {}, rows = 0, records = 0, expected = 0;
            for (i32 rank = 0; rank < exchange.ranks; rank++) {
                bool near_by = rank / exchange.locals == exchange.node;
                if (!near_by) rows += shared.to_rank[rank];
                if (near_by && rank != exchange.rank) work[i32(Role::HAND)] += exchange.chunk * chunks(shared.to_rank[rank]);
            }
            for (i32 node = 0; node < exchange.nodes; node++) {
                if (node == exchange.node) continue;
                i32 coming = announced(node);  // as many as go there, if nobody has said it yet
                records += shared.to_node[node];
                work[i32(Role::SEND)] += exchange.chunk * chunks(shared.to_node[node]);
                expected += exchange.chunk * chunks(coming < 0 ? shared.to_node[node] : coming);
            }
            work[i32(Role::PASS)] = records ? i32(i64(expected) * rows / records) : expected;
            work[i32(Role::PASS)] += exchange.nodes > 1;  // it is not known to be nothing
            Role role = first_role(work, grid, threadIdx.x / 32);
            // warps do not see the same of what is announced: one of each channel passes on whatever the others have chosen
            if (exchange.nodes > 1 && grid.block % 2 && threadIdx.x / 32 == WARPS - 1) role = Role::PASS;
            for (i32 turn = 0; turn < ROLES; turn++, role = Role((i32(role) + 1) % ROLES)) {
                near.begins(role);
                if (role == Role::SEND) send();
                if (role == Role::PASS) pass();
                if (role == Role::HAND) hand();
            }
            near.drain(), far.drain();
        }
    };

    static __device__ __forceinline__ void run(const Arguments& arguments, const Grid& grid = Grid::whole()) {
        ptx::take_turn();
        extern __shared__ __align__(128) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        const Exchange& exchange = arguments.exchange;
        Words& words = exchange.words(exchange.rank);
        u32 number = exchange_of(words.begun[exchange.slot]);
        if (grid.block == 0 && threadIdx.x == 0) exchange.give_up_behind(number);
        count(shared, arguments);
        __syncthreads();
        Worker worker(arguments, shared, grid, threadIdx.x / 32);
        if (grid.block == 0 && threadIdx.x < 32) worker.announce();
        worker.run(grid);
        __syncthreads();
        if (threadIdx.x == 0) shared.last = grid.is_last_block(words.begun[exchange.slot][1]);
        __syncthreads();
        if (shared.last && threadIdx.x < 32) worker.pass_failure_on();
        if (shared.last) finish(exchange, words, number);
    }

    // How many rows this rank has for each rank, and records for each node: places are taken without a gap.
    static __device__ __forceinline__ void count(Shared& shared, const Arguments& arguments) {
        const Exchange& exchange = arguments.exchange;
        for (i32 i = threadIdx.x; i < exchange.ranks + exchange.nodes; i += THREADS) {
            bool rank = i < exchange.ranks;
            const i32* places = (rank ? arguments.sent : arguments.node_sent) + i64(rank ? i : i - exchange.ranks) * exchange.capacity;
            i32 low = 0, high = exchange.capacity;
            while (low < high) {
                i32 middle = (low + high) / 2;
                if (__ldg(places + middle) >= 0)
                    low = middle + 1;
                else
                    high = middle;
            }
            (rank ? shared.to_rank[i] : shared.to_node[i - exchange.ranks]) = low;
        }
    }

    // By the last block: the next exchange begins where this one has ended.
    static __device__ __forceinline__ void finish(const Exchange& exchange, Words& words, u32 number) {
        i32 slot = exchange.slot;
        for (i32 i = threadIdx.x; i < NODES * CHANNELS; i += THREADS) {
            i32 node = i / CHANNELS, channel = i % CHANNELS;
            for (i32 role = 0; role < ROLES; role++) {
                u32& claimed = words.claimed[slot][role][node][channel];
                if (role < i32(Role::HAND)) words.chunks[slot][role][node][channel] += __ldcg(&claimed);
                claimed = 0;
            }
        }
        if (threadIdx.x == 0) words.begun[slot][0] = number;
    }
};

}  // namespace nodes
