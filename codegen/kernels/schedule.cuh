// Which tile comes when: persistent blocks walk the tiles of all experts, whose rows only the device knows.
//
// A schedule is asked by a whole warp:
//     i32 count()              how many tiles there are; instead of `find`
//     Tile find(i32 number)    the tile of that number, below the count; numbers rise from call to call
//
// Tiles of one expert come in bands of row tiles, along the columns within a band, so that what runs at the same time
// shares rows and columns in L2.
#pragma once
#include "ptx.cuh"

// A tile of an expert's result, and the part of K that it is summed over.
struct __align__(16) Tile {
    i32 expert;
    i32 row, row_end;      // its first row, and the end of the rows it may write
    i32 column;            // its first column
    i32 k_begin, k_end;
    i32 split;             // whether a cluster's blocks have the same rows and neighbouring columns
    i32 overhang;          // the first of the rows that the cluster takes along, up to row_end; 0 if there are none
};

constexpr i32 BAND = 8;  // row tiles

// The local'th tile of an expert with that many row tiles, in tiles.
__device__ __forceinline__ void in_bands(i32 local, i32 rows, i32 columns, i32& row, i32& column) {
    i32 band = local / (BAND * columns), rest = local % (BAND * columns);
    i32 height = min(BAND, rows - band * BAND);
    row = band * BAND + rest % height;
    column = rest / height;
}

// The result is (rows, n), its rows are grouped by expert, and every tile is summed over all of K. The lanes of a warp hold
// 32 experts at a time; a tile is the one lane's whose expert it falls into.
//
// With CLUSTER 2, what has a number is the two tiles of a cluster: two row tiles, or, where an odd one is left, that one
// with two column tiles. Up to OVERHANG rows beyond an expert's last whole pair have no tile of their own: that pair takes
// them along.
template <i32 ROWS, i32 COLUMNS, i32 CLUSTER, i32 OVERHANG, bool PARTLY = false>
struct RowSchedule {
    const i32* offsets;
    i32 experts, k, columns, multiple, lane;
    i32 first = 0;         // of the 32 experts
    i32 before = 0;        // tiles before theirs
    i32 begin, end, last;  // this lane's expert: its rows, its last tile and one

    // PARTLY: of an expert's rows only the first so many times `multiple`, if that is not 0.
    __device__ __forceinline__ RowSchedule(const i32* offsets, i32 experts, i32 k, i32 n, i32 multiple)
        : offsets(offsets), experts(experts), k(k), columns((n + COLUMNS - 1) / COLUMNS), multiple(multiple), lane(threadIdx.x % 32) {
        load();
    }

    static_assert(CLUSTER <= 2, "an odd row tile has one neighbour");

    // How many row tiles an expert has.
    static __device__ __forceinline__ i32 row_tiles(i32 rows) { return (rows - along(rows) + ROWS - 1) / ROWS; }

    // How many of its rows go along.
    static __device__ __forceinline__ i32 along(i32 rows) {
        i32 beyond = rows % (CLUSTER * ROWS);
        return beyond <= OVERHANG && beyond < rows ? beyond : 0;
    }

    // How many numbers an expert has.
    __device__ __forceinline__ i32 tiles(i32 rows) const {
        i32 count = row_tiles(rows);
        return count / CLUSTER * columns + (count % CLUSTER ? (columns + 1) / 2 : 0);
    }

    __device__ __forceinline__ void load() {
        i32 expert = first + lane;
        bool real = expert < experts;
        end = real ? __ldcg(offsets + expert) : 0;  // maybe before earlier grids are done (ptx.cuh)
        begin = real && expert ? __ldcg(offsets + expert - 1) : 0;
        if (PARTLY && multiple) end -= (end - begin) % multiple;
        last = tiles(end - begin);
        for (i32 step = 1; step < 32; step *= 2) {
            i32 other = __shfl_up_sync(~0u, last, step);
            if (lane >= step) last += other;
        }
        last += before;
    }

    __device__ __forceinline__ void advance() {
        first += 32;
        before = __shfl_sync(~0u, last, 31);
        load();
    }

    __device__ __forceinline__ i32 count() {
        while (first + 32 < experts) advance();
        return __shfl_sync(~0u, last, 31);
    }

    __device__ __forceinline__ Tile find(i32 number) {
        u32 holders;
        while (!(holders = __ballot_sync(~0u, number < last))) advance();
        i32 holder = __ffs(holders) - 1;
        i32 from = pick(begin, holder), to = pick(end, holder);
        i32 previous = holder ? pick(last, holder - 1) : uniform(before);
        i32 local = number - previous, groups = row_tiles(to - from) / CLUSTER, expert = uniform(first) + holder;
        i32 split = local >= groups * columns, row = groups, column = (local - groups * columns) * CLUSTER;
        if (!split) in_bands(local, groups, columns, row, column);
        if (OVERHANG > 0 && !split) row = turned(row, column, groups);
        i32 overhang = !split && row == groups - 1 && along(to - from) ? from + groups * CLUSTER * ROWS : 0;
        return {expert, from + row * CLUSTER * ROWS, to, column * COLUMNS, 0, k, split, overhang};
    }

    // Pairs that take rows along take longer, and are an expert's last: not every time for the same clusters.
    static __device__ __forceinline__ i32 turned(i32 row, i32 column, i32 rows) {
        i32 first = row / BAND * BAND;
        return first + (row - first + column) % min(BAND, rows - first);
    }

    static __device__ __forceinline__ i32 pick(i32 value, i32 lane) { return uniform(__shfl_sync(~0u, value, lane)); }
};

// The result is (rows, n), all rows are of one group, and every tile is summed over all of K. Clusters as above.
template <i32 ROWS, i32 COLUMNS, i32 CLUSTER>
struct WholeSchedule {
    i32 rows, k, columns;

    __device__ __forceinline__ WholeSchedule(i32 rows, i32 k, i32 n)
        : rows(rows), k(k), columns((n + COLUMNS - 1) / COLUMNS) {}

    __device__ __forceinline__ i32 row_tiles() const { return (rows + ROWS - 1) / ROWS; }

    __device__ __forceinline__ i32 count() {
        return row_tiles() / CLUSTER * columns + (row_tiles() % CLUSTER ? (columns + 1) / 2 : 0);
    }

    __device__ __forceinline__ Tile find(i32 number) {
        i32 groups = row_tiles() / CLUSTER, split = number >= groups * columns;
        i32 row = groups, column = (number - groups * columns) * CLUSTER;
        if (!split) in_bands(number, groups, columns, row, column);
        return {0, row * CLUSTER * ROWS, rows, column * COLUMNS, 0, k, split, 0};
    }
};

// The result is (E, m, n), and each expert's is summed over its rows.
template <i32 ROWS, i32 COLUMNS>
struct MatrixSchedule {
    const i32* offsets;
    i32 experts, m, rows, columns;

    __device__ __forceinline__ MatrixSchedule(const i32* offsets, i32 experts, i32 m, i32 n)
        : offsets(offsets), experts(experts), m(m), rows((m + ROWS - 1) / ROWS), columns((n + COLUMNS - 1) / COLUMNS) {}

    __device__ __forceinline__ i32 count() { return experts * rows * columns; }

    __device__ __forceinline__ Tile find(i32 number) {
        i32 expert = number / (rows * columns), row, column;
        in_bands(number % (rows * columns), rows, columns, row, column);
        return {expert, row * ROWS, m, column * COLUMNS, expert ? offsets[expert - 1] : 0, offsets[expert], 0, 0};
    }
};
