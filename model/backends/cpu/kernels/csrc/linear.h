// Linear layers on packed weights: norms and encodes the rows, then divides the product among the
// threads by panels. Also the division itself (`Slices`, `Runs`), which experts use too.
#pragma once
#include <algorithm>

#include "encode.h"
#include "pool.h"
#include "rows.h"

namespace moedial {

// The most outputs of one slice of a product: the rows' inputs are widened once for it
// (`widened.h`).
constexpr int64_t MAX_SLICE_OUTPUTS = LANES < 16 ? 4 * PANEL : PANEL;

// A thread's buffers for a product of ROW_BLOCK rows with MAX_SLICE_OUTPUTS outputs.
struct ProductRoom {
    alignas(64) int32_t words[ROW_BLOCK * MAX_SLICE_OUTPUTS];
    const int32_t* rows[ROW_BLOCK];  // inputs
    int32_t* sums[ROW_BLOCK];        // where the caller wants its sums

    ProductRoom() {
        for (int64_t row = 0; row < ROW_BLOCK; row++) own[row] = words + row * MAX_SLICE_OUTPUTS;
    }
    int32_t* own[ROW_BLOCK];  // rows of `words`
};

inline ProductRoom& product_room() {
    static thread_local ProductRoom mine;
    return mine;
}

inline int64_t ceil_div(int64_t dividend, int64_t divisor) {
    return (dividend + divisor - 1) / divisor;
}

// How many rows one product takes if there are `rows` in all: products of nearly equal height.
inline int64_t block_rows(int64_t rows) {
    const int64_t blocks = std::max<int64_t>(ceil_div(rows, ROW_BLOCK), 1);
    return std::max<int64_t>(ceil_div(rows, blocks * ROWS), 1) * ROWS;
}

// Calls run(first, last) for every `part` of `count` rows; little work stays on the calling thread.
template <class Run>
inline void parallel_rows(int64_t count, int64_t part, Run&& run, int64_t work = ALL_THREADS) {
    parallel(
        ceil_div(count, part), [&](int64_t i) { run(i * part, std::min(count, (i + 1) * part)); },
        work);
}

// The rows of x [rows, width], normed and encoded for matrices of this kind and width. `normed`: if
// given, also gets the normed rows as floats, to be encoded again for another kind.
inline Inputs encode_rows(const float* x, int64_t rows, int64_t width, int64_t stride,
                          const Norm& norm, const Matrix& matrix, float* normed = nullptr) {
    const Inputs encoded = inputs(matrix, rows);
    float* y = normed ? normed : norm.weight ? scratch().take<float>(rows * width) : nullptr;
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                if (y) norm_row(x + row * stride, width, norm, y + row * width);
                encode(y ? y + row * width : x + row * stride, width, encoded, row, matrix.inputs);
            }
        },
        4 * rows * width);
    return encoded;
}

// The work of products with `matrices` matrices of one shape, `rows` rows in all, in multiply-adds.
// With few rows it is the time of reading the weights.
inline int64_t work_of(const Matrix& matrix, int64_t rows, int64_t matrices = 1) {
    return std::max(matrices * matrix.bytes() / 2, rows * matrix.outputs * matrix.inputs / 4);
}

// Divides a matrix' outputs into slices: panels, or narrower slices if the threads would otherwise
// not get several tasks each.
struct Slices {
    const Matrix& matrix;
    int64_t width;

    Slices(const Matrix& of, int64_t rows, int64_t team) : matrix(of), width(PANEL) {
        while (width > 16 && ceil_div(matrix.outputs, width) * ceil_div(rows, ROW_BLOCK) < 4 * team)
            width /= 2;
    }
    int64_t count() const { return ceil_div(matrix.outputs, width); }
    Slice at(int64_t index, int64_t end) const {
        return {&matrix, index * width, std::min(end * width, matrix.outputs) - index * width};
    }
    Slice at(int64_t index) const { return at(index, index + 1); }
};

// The most neighbouring slices of one task: memory is read fastest in long runs. With many rows the
// time is arithmetic, and length does not matter.
inline int64_t longest_run(int64_t rows) { return rows > ROWS ? MAX_SLICE_OUTPUTS / PANEL : 8; }

// How many slices of a run one product takes.
inline int64_t slices_at_once(int64_t rows, int64_t width) {
    return (rows > ROWS ? MAX_SLICE_OUTPUTS : PANEL) / width;
}

// With few rows memory is the limit, so tasks stay on the node that has their panels.
inline Stealing stealing(int64_t rows) { return rows > 8 ? ALWAYS : LATE; }

// Slices [from, end) of matrix number `matrix`.
struct Run {
    int64_t matrix, from, end;
};

// Divides the slices of `matrices` matrices of one shape into runs, which are the tasks of a
// product. Each node has a contiguous part of the panels (`touch_on_nodes`, memory.h).
class Runs {
    Run* runs;
    int64_t first[MAX_NODES + 1] = {};  // the first run of each node

  public:
    // `slices`: per matrix, of `width` outputs each. `rows`: of each product. Runs become shorter
    // towards the end, so that the threads end together; with many rows all have one length.
    Runs(int64_t matrices, int64_t slices, int64_t width, int64_t rows, int64_t team)
        : runs(scratch().take<Run>(matrices * slices)) {
        const int64_t panels = ceil_div(slices * width, PANEL), all = nodes();
        const int64_t threads = ceil_div(team, all);
        const int64_t longest =
            std::clamp<int64_t>(matrices * slices / (4 * team), 1, longest_run(rows));
        int64_t count = 0;
        for (int64_t node = 0; node < all; node++) {
            const auto begin = [&](int64_t at) {
                return std::min(slices, part_begin(panels, at, all) * (PANEL / width));
            };
            const int64_t start = begin(node), end = begin(node + 1);
            int64_t left = matrices * (end - start);
            for (int64_t matrix = 0; matrix < matrices; matrix++)
                for (int64_t from = start; from < end; from = runs[count++].end) {
                    const int64_t shared = 2 * left / (3 * threads);
                    const int64_t length =
                        rows > ROWS ? longest : std::clamp<int64_t>(shared, 1, longest_run(rows));
                    runs[count] = {matrix, from, std::min(end, from + length)};
                    left -= runs[count].end - from;
                }
            first[node + 1] = count;
        }
    }

    const Run& at(int64_t node, int64_t index) const { return runs[first[node] + index]; }

    // How many tasks each node has if every run is `times` tasks.
    Shares shares(int64_t times = 1) const {
        Shares tasks;
        for (int64_t node = 0; node < nodes(); node++)
            tasks.counts[node] = (first[node + 1] - first[node]) * times;
        return tasks;
    }
};

// Multiplies the rows by a matrix, and calls take(row, slice, sums) for each row and slice with the
// unfinished sums. A task is a run of slices times a part of the rows.
template <class Take>
inline void multiply(const Inputs& in, int64_t rows, const Matrix& matrix, Take&& take) {
    const int64_t work = work_of(matrix, rows), least = 4 * team(work);  // tasks
    const Slices slices(matrix, rows, team(work));
    const int64_t parts =
        std::clamp<int64_t>(ceil_div(least, slices.count()), 1, ceil_div(rows, ROW_BLOCK));
    const int64_t part = ceil_div(ceil_div(rows, parts), ROW_BLOCK) * ROW_BLOCK;
    const Runs runs(1, slices.count(), slices.width, rows, team(work));
    parallel_on_nodes(
        runs.shares(parts), stealing(rows),
        [&](int64_t node, int64_t task) {
            const Run& run = runs.at(node, task / parts);
            const int64_t last = std::min(rows, (task % parts + 1) * part);
            const int64_t start = task % parts * part, height = block_rows(last - start);
            const int64_t step = slices_at_once(rows, slices.width);
            for (int64_t index = run.from; index < run.end; index += step) {
                const Slice slice = slices.at(index, std::min(run.end, index + step));
                for (int64_t first = start; first < last; first += height) {
                    ProductRoom& room = product_room();
                    const int64_t now = std::min(height, last - first);
                    for (int64_t row = 0; row < now; row++) room.rows[row] = in.row(first + row);
                    product(room.rows, now, slice, room.own, 0, false);
                    for (int64_t row = 0; row < now; row++) take(first + row, slice, room.own[row]);
                }
            }
        },
        work);
}

// y = (with `add`, +=) scale * (W x + bias). y has `stride` floats per row, and room for the stored
// outputs of W with their padding, or for exactly `outputs` of them.
inline void linear_rows(const Inputs& in, int64_t rows, const Linear& layer, bool add,
                        int64_t outputs, int64_t stride, float* y) {
    const Matrix& matrix = layer.weight;
    multiply(in, rows, matrix, [&](int64_t row, const Slice& slice, const int32_t* sums) {
        const float scale = in.scales ? in.scales[row] : 1.0f;
        float* out = y + row * stride + slice.first;
        for (int64_t i = 0; i < slice.outputs; i += LANES) {
            Floats values = finish(matrix, sums + i, slice.first + i, scale);
            if (slice.first + i + LANES <= outputs) {
                if (layer.bias) values += load(layer.bias + slice.first + i);
                values *= layer.scale;
                store(out + i, add ? load(out + i) + values : values);
                continue;
            }
            // The last vector, if y has no room for padding.
            for (int64_t lane = 0; slice.first + i + lane < outputs && lane < LANES; lane++) {
                const float bias = layer.bias ? layer.bias[slice.first + i + lane] : 0.0f;
                const float value = (values[lane] + bias) * layer.scale;
                out[i + lane] = add ? out[i + lane] + value : value;
            }
        }
    });
}

}  // namespace moedial
