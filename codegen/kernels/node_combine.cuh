// What became of rows back to where they came from: within a node to the rank of the home's rail, which sums what its node has of
// a row, in float32 in the order of ranks, rounds that once and sends it on, between nodes; or to the home itself, on its node.
//
//     HAND   rows to ranks of this node
//     PASS   sums to the ranks of this rail on other nodes
//
// Every rank says to those that it writes to when it is done, and a rank says so to other nodes when all of its node are: whoever
// has heard all of that knows whether any rank has given up.
#pragma once
#include "node_roles.cuh"
#include "pieces.cuh"

namespace nodes {

template <typename Result, typename Weight, typename Near, typename Far>
struct Combine {
    static constexpr i32 THREADS = 32 * WARPS, BLOCKS = 1;
    static constexpr i32 MUCH = 8 * Pieces::BYTES;  // a piece of a row of each rank, at least
    struct Arguments {
        Exchange exchange;
        const u8* rows;     // (ranks * capacity, columns), contiguous: of each rank's
        const i32* came;    // (ranks,): so many of them go back; or less than none, and then how many there was no room for
        const i32* passed;  // of the dispatch: (nodes, capacity, locals)
        const i32* records; // of it: (nodes,)
        const u8* weights;  // (ranks * capacity, top_k), or null
        u8* scratch;        // of the transports; or null
        i32 columns, top_k;
    };
    static constexpr i32 ELEMENT = sizeof(typename Result::Element), ALONG = sizeof(typename Weight::Element);
    struct Warp : WarpMemory<Near, Far> {
        u64 read[Pieces::MOST];
        i32 places[CHUNK * LOCALS];
    };
    struct Shared {
        u8 rows[WARPS][BYTES];
        Warp warps[WARPS];
        i32 rows_of_all, most_rows, most_records, last;
    };

    struct Worker : Sender<Near, Far> {
        using Sender<Near, Far>::exchange, Sender<Near, Far>::words, Sender<Near, Far>::near, Sender<Near, Far>::far;
        using Sender<Near, Far>::pipe, Sender<Near, Far>::number, Sender<Near, Far>::lost, Sender<Near, Far>::lane;
        using Sender<Near, Far>::chunks, Sender<Near, Far>::first, Sender<Near, Far>::claim_next;
        using Sender<Near, Far>::wait_to_land, Sender<Near, Far>::wait_until_read;
        const Arguments& arguments;
        const Shared& shared;
        Warp& warp;
        i32 sums, apart;  // rows that are put from shared memory, beside the pieces that they are sums of; bytes from one to the next
        Pieces pieces;
        bool may_go_home = false;
        __device__ __forceinline__ Worker(const Arguments& arguments, Shared& shared, const Grid& grid, i32 index)
            : Sender<Near, Far>(arguments.exchange, shared.warps[index], shared.rows[index], arguments.exchange.pitch,
                                arguments.scratch, grid, index),
              arguments(arguments), shared(shared), warp(shared.warps[index]), sums(2 * exchange.pitch > BYTES - MUCH ? 1 : 2),
              apart((exchange.pitch + 127) / 128 * 128), pieces(pipe.rows + sums * apart, BYTES - sums * apart, warp.read) {}

        // Rows of all ranks but those of this rail.
        __device__ __forceinline__ void hand() {
            i32 others = exchange.locals - 1, from = exchange.nodes * others;
            for (i32 piece; !lost && (piece = claim_next(Role::HAND)) < chunks(shared.most_rows) * from;) {
                i32 number = piece % from, node = number / others;
                i32 rail = (exchange.rail + 1 + number % others) % exchange.locals;
                hand_group(node, rail, first(piece / from));
            }
        }

        __device__ __forceinline__ void hand_group(i32 node, i32 rail, i32 begin) {
            i32 of = node * exchange.locals + rail, to = exchange.neighbour(rail), pitch = exchange.pitch;
            i32 count = min(exchange.chunk, __ldg(arguments.came + of) - begin), part = exchange.on_rail(node);
            if (count <= 0) return;
            i32 most = min(32, pipe.bytes / pitch), bytes = arguments.columns * ELEMENT;
            wait_to_land();
            if (lost) return;
            pipe.run(
                (count + most - 1) / most, near,
                [&](i32 batch, u8* rows, u64* full) {
                    i32 held = min(most, count - batch * most);
                    i64 line = i64(of) * exchange.capacity + begin + batch * most;
                    if (lane() == 0) ptx::barrier_expect(full, held * bytes);
                    __syncwarp();
                    if (lane() < held) ptx::load_bytes_once(rows + lane() * pitch, arguments.rows + (line + lane()) * bytes, bytes, full);
                    for (i32 i = lane(); arguments.weights && i < held * arguments.top_k; i += 32) {
                        i32 row = i / arguments.top_k, k = i % arguments.top_k;
                        const typename Weight::Element* weights = reinterpret_cast<const typename Weight::Element*>(arguments.weights);
                        reinterpret_cast<typename Weight::Element*>(rows + row * pitch + bytes)[k] =
                            __ldg(weights + (line + row) * arguments.top_k + k);
                    }
                },
                [&](i32 batch, u8* rows) {
                    ptx::fence_async_proxy();
                    __syncwarp();
                    near.put(lane() == 0, {to, exchange.record(part, begin + batch * most)}, rows, min(most, count - batch * most) * pitch);
                });
            near.template fence<0>();
            near.signal(lane() < count, {to, exchange.landed(part, begin + lane())}, number);
        }

        __device__ __forceinline__ void pass() {
            i32 others = exchange.nodes - 1;
            for (i32 piece; !lost && (piece = claim_next(Role::PASS)) < chunks(shared.most_records) * others;)
                pass_group((exchange.node + 1 + piece % others) % exchange.nodes, first(piece / others));
        }

        __device__ __forceinline__ void pass_group(i32 node, i32 begin) {
            i32 count = min(exchange.chunk, __ldg(arguments.records + node) - begin), to = exchange.on_rail(node);
            if (count <= 0) return;
            wait_until_read(may_go_home, lane() < exchange.nodes && lane() != exchange.node,
                            exchange.on_rail(min(lane(), exchange.nodes - 1)));
            if (!lost) find(node, begin, count);
            if (lost) return;
            Next next = {part(node, lane(), 0), lane() == exchange.rail ? arguments.columns * ELEMENT : exchange.pitch, count};
            read_ahead(next);
            for (i32 i = 0; i < count; i++) {
                u8* row = pipe.rows + (i % sums) * apart;
                if (sums == 1)
                    far.template sources_free<0>();
                else
                    far.template sources_free<1>();
                sum(node, i, row, next);
                ptx::fence_async_proxy();
                __syncwarp();
                far.put(lane() == 0, {to, exchange.home_record(exchange.node, begin + i)}, row, exchange.pitch);
                far.commit();
            }
            far.template fence<0>();
            far.signal(lane() < count, {to, exchange.homed(exchange.node, begin + lane())}, number);
        }

        // The places of the parts of records, once all are there.
        __device__ __forceinline__ void find(i32 node, i32 begin, i32 count) {
            i32 locals = exchange.locals;
            const i32* passed = arguments.passed + (i64(node) * exchange.capacity + begin) * locals;
            for (i32 first = 0; first < count * locals && !lost; first += 32) {
                i32 i = min(first + lane(), count * locals - 1), place = __ldg(passed + i), rail = i % locals;
                const u8* flag = exchange.base(exchange.rank) + exchange.landed(node * locals + rail, max(place, 0));
                lost = !wait_together(exchange, place >= 0 && rail != exchange.rail, reinterpret_cast<const u64*>(flag), number,
                                      exchange.neighbour(rail), Step::SUM, near, far);
                warp.places[i] = place;
            }
            ptx::fence_async_all();  // they are read by another proxy than flags
            __syncwarp();
        }

        // The part of a record that a rank of this node has, one behind the other.
        __device__ __forceinline__ const u8* part(i32 node, i32 rail, i32 place) const {
            i32 from = node * exchange.locals + rail;
            if (rail != exchange.rail) return exchange.record(exchange.rank, from, place);
            return arguments.rows + (i64(from) * exchange.capacity + place) * arguments.columns * ELEMENT;
        }
        // The place of the lane's part of a record; less than none if it has none.
        __device__ __forceinline__ i32 place(i32 record) const {
            return lane() < exchange.locals ? warp.places[record * exchange.locals + lane()] : -1;
        }

        // The pieces that are read next: those of all parts of a record, so many bytes behind their beginning. Of each lane the
        // first part of its rank, and bytes from one to the next.
        struct Next {
            const u8* parts;
            i32 apart, records, record = 0, at = 0;
        };
        __device__ __forceinline__ void read_ahead(Next& next) {
            i32 bytes = arguments.columns * ELEMENT;
            while (next.record < next.records) {
                i32 found = place(next.record);
                if (!pieces.has_room(__popc(__ballot_sync(~0u, found >= 0)))) return;
                pieces.read(found >= 0, next.parts + i64(found) * next.apart + next.at, min(Pieces::BYTES, bytes - next.at));
                next.at += Pieces::BYTES;
                if (next.at >= bytes) next.at = 0, next.record++;
            }
        }

        // A record's parts, and what belongs to their experts.
        __device__ __forceinline__ void sum(i32 node, i32 record, u8* row, Next& next) {
            i32 bytes = arguments.columns * ELEMENT, parts = __popc(__ballot_sync(~0u, place(record) >= 0));
            bool weighs = arguments.weights && lane() < arguments.top_k;
            float weights[LOCALS], total = 0;
#pragma unroll
            for (i32 rail = 0; rail < LOCALS; rail++) {  // on their way while rows are summed
                i32 of = rail < exchange.locals ? warp.places[record * exchange.locals + rail] : -1;
                weights[rail] = weighs && of >= 0 ? Came<Weight>::one(behind(node, rail, of), lane()) : 0;
            }
            for (i32 at = 0; at < bytes; at += Pieces::BYTES) {
                pieces.template reduce<Result>(parts, row + at, min(Pieces::BYTES, bytes - at));
                read_ahead(next);
            }
#pragma unroll
            for (i32 rail = 0; rail < LOCALS; rail++) total += weights[rail];
            if (weighs) Weight::store(reinterpret_cast<typename Weight::Element*>(row + bytes) + lane(), total);
        }

        // What belongs to a part's experts: behind it, if it has travelled.
        __device__ __forceinline__ const u8* behind(i32 node, i32 rail, i32 place) const {
            i64 own = i64(node * exchange.locals + rail) * exchange.capacity + place;
            if (rail != exchange.rail) return part(node, rail, place) + arguments.columns * ELEMENT;
            return arguments.weights + own * arguments.top_k * ALONG;
        }

        __device__ __forceinline__ void run(const Grid& grid) {
            i32 work[ROLES] = {};
            work[i32(Role::HAND)] = exchange.locals > 1 ? shared.rows_of_all : 0;
            for (i32 node = 0; node < exchange.nodes; node++)  // as many are read as come from the ranks of this node
                if (node != exchange.node) work[i32(Role::PASS)] += 2 * __ldg(arguments.records + node);
            Role role = first_role(work, grid, threadIdx.x / 32);
            near.begins(role);
            if (role == Role::PASS && exchange.nodes > 1) pass();
            near.begins(Role::HAND);
            if (exchange.locals > 1) hand();
            near.begins(Role::PASS);
            if (exchange.nodes > 1) pass();
            near.drain(), far.drain();
        }

        // By a warp of the last block, when all is sent.
        __device__ __forceinline__ void say_over() {
            i32 rail = min(lane(), exchange.locals - 1), node = min(lane(), exchange.nodes - 1), slot = exchange.slot;
            i64 word = exchange.offset_of(words.over[slot][exchange.rank]);
            ptx::fence_system();
            near.signal(lane() < exchange.locals, {exchange.neighbour(rail), word}, number);
            near.drain();
            i32 other = exchange.neighbour(rail);
            bool all = wait_together(exchange, lane() < exchange.locals, &words.over[slot][other], number, other, Step::OVER, near, far);
            // who gave up has said so before it was over: whoever is told that an exchange is over knows of it, too
            if (all && !__any_sync(~0u, exchange.is_aborted()))
                far.signal(lane() < exchange.nodes && lane() != exchange.node, {exchange.on_rail(node), word}, number);
            far.drain();
            this->pass_failure_on();
        }
    };

    static __device__ __forceinline__ void run(const Arguments& arguments, const Grid& grid = Grid::whole()) {
        ptx::take_turn();
        extern __shared__ __align__(128) u8 raw[];
        Shared& shared = *reinterpret_cast<Shared*>(raw);
        const Exchange& exchange = arguments.exchange;
        Words& words = exchange.words(exchange.rank);
        u32 number = exchange_of(words.begun[exchange.slot]);
        if (grid.block == 0 && threadIdx.x == 0) {
            exchange.give_up_without_room(arguments.came);
            exchange.give_up_behind(number);
        }
        if (threadIdx.x == 0) shared.rows_of_all = shared.most_rows = shared.most_records = 0;
        __syncthreads();
        count(shared, arguments);
        __syncthreads();
        Worker worker(arguments, shared, grid, threadIdx.x / 32);
        worker.run(grid);
        __syncthreads();
        if (threadIdx.x == 0) shared.last = grid.is_last_block(words.begun[exchange.slot][1]);
        __syncthreads();
        if (!shared.last) return;
        if (threadIdx.x < 32) worker.say_over();
        for (i32 i = threadIdx.x; i < ROLES * CHANNELS; i += THREADS)
            words.claimed[exchange.slot][i / CHANNELS][0][i % CHANNELS] = 0;
        if (threadIdx.x == 0) words.begun[exchange.slot][0] = number;
    }

    static __device__ __forceinline__ void count(Shared& shared, const Arguments& arguments) {
        const Exchange& exchange = arguments.exchange;
        i32 i = threadIdx.x;
        if (i < exchange.ranks && i % exchange.locals != exchange.rail) {
            i32 rows = max(0, __ldg(arguments.came + i));
            atomicAdd(&shared.rows_of_all, rows), atomicMax(&shared.most_rows, rows);
        }
        if (i < exchange.nodes && i != exchange.node) atomicMax(&shared.most_records, __ldg(arguments.records + i));
    }
};

}  // namespace nodes
