// Linear layers on packed weights: norm and encoding of the rows, then panels handed out to the
// threads.
#pragma once
#include <algorithm>

#include "encode.h"
#include "pool.h"
#include "rows.h"

namespace moedial {

// The largest slice of a product: panels for which the rows' inputs are widened once (`widened.h`).
constexpr int64_t MOST_OUTPUTS = LANES < 16 ? 4 * PANEL : PANEL;

// Room of one thread for a product of ROW_BLOCK rows with MOST_OUTPUTS outputs.
struct Block {
    alignas(64) int32_t words[ROW_BLOCK * MOST_OUTPUTS];
    const int32_t* rows[ROW_BLOCK];  // inputs
    int32_t* sums[ROW_BLOCK];        // where sums go that do not stay here

    Block() {
        for (int64_t row = 0; row < ROW_BLOCK; row++) own[row] = words + row * MOST_OUTPUTS;
    }
    int32_t* own[ROW_BLOCK];  // rows of `words`
};

inline Block& block() {
    static thread_local Block mine;
    return mine;
}

inline int64_t ceil_div(int64_t dividend, int64_t divisor) {
    return (dividend + divisor - 1) / divisor;
}

// Rows of one product where there are `rows` in all: blocks of nearly equal height.
inline int64_t block_rows(int64_t rows) {
    const int64_t blocks = std::max<int64_t>(ceil_div(rows, ROW_BLOCK), 1);
    return std::max<int64_t>(ceil_div(rows, blocks * ROWS), 1) * ROWS;
}

// Calls run(first, last) for parts of `count` rows; little work stays on the calling thread.
template <class Run>
inline void parallel_rows(int64_t count, int64_t part, Run&& run, int64_t work = MUCH) {
    parallel(
        ceil_div(count, part), [&](int64_t i) { run(i * part, std::min(count, (i + 1) * part)); },
        work);
}

// The rows of x [rows, width], normed and encoded for matrices of this kind and width. `normed`:
// where the normed rows are kept, for those who need them in another form.
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

// The work of products of `rows` rows, all together, with `matrices` matrices of one shape. Few
// rows take the time of reading the weights.
inline int64_t effort(const Matrix& matrix, int64_t rows, int64_t matrices = 1) {
    return std::max(matrices * matrix.bytes() / 2, rows * matrix.outputs * matrix.inputs / 4);
}

// Slices of a matrix' outputs, narrow where each has so few rows that the threads would not get
// several tasks.
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

// The most neighbouring slices that one task takes: a long run is read fastest; where rows are
// many, the panels' arithmetic hides where they lie.
inline int64_t longest_run(int64_t rows) { return rows > ROWS ? MOST_OUTPUTS / PANEL : 8; }

// How many slices of a run are multiplied as one.
inline int64_t joined(int64_t rows, int64_t width) {
    return (rows > ROWS ? MOST_OUTPUTS : PANEL) / width;
}

// With few rows memory is the limit: tasks stay on the node that has their panels.
inline Stealing stealing(int64_t rows) { return rows > 8 ? ALWAYS : LATE; }

// Neighbouring slices of one of several matrices, or of the only one.
struct Run {
    int64_t matrix, from, end;
};

// Slices of `matrices` matrices of one shape, cut into runs. Each node has a contiguous part of the
// panels (`place`, memory.h).
class Runs {
    Run* runs;
    int64_t first[MOST_NODES + 1] = {};  // run of each node

  public:
    // `slices` of `width` outputs; `rows` of each product. Runs shorten towards the end, so that
    // the threads end together. Many rows are `joined`: their runs have one length.
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

    // Each run is so many tasks.
    Shares shares(int64_t times = 1) const {
        Shares tasks;
        for (int64_t node = 0; node < nodes(); node++)
            tasks.counts[node] = (first[node + 1] - first[node]) * times;
        return tasks;
    }
};

// Calls take(row, slice, sums) for each row and slice of the matrix' product with the rows; `sums`
// are unfinished. A task is a run of slices times a part of the rows.
template <class Take>
inline void multiply(const Inputs& in, int64_t rows, const Matrix& matrix, Take&& take) {
    const int64_t work = effort(matrix, rows), least = 4 * team(work);  // tasks
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
            const int64_t step = joined(rows, slices.width);
            for (int64_t index = run.from; index < run.end; index += step) {
                const Slice slice = slices.at(index, std::min(run.end, index + step));
                for (int64_t first = start; first < last; first += height) {
                    Block& room = block();
                    const int64_t now = std::min(height, last - first);
                    for (int64_t row = 0; row < now; row++) room.rows[row] = in.row(first + row);
                    product(room.rows, now, slice, room.own, 0, false);
                    for (int64_t row = 0; row < now; row++) take(first + row, slice, room.own[row]);
                }
            }
        },
        work);
}

// y (+)= scale * (W x + bias); y has `stride` floats per row and room for W's stored outputs, or
// for exactly `outputs` of them.
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
            // The last vector, where y has no room for padding.
            for (int64_t lane = 0; slice.first + i + lane < outputs && lane < LANES; lane++) {
                const float bias = layer.bias ? layer.bias[slice.first + i + lane] : 0.0f;
                const float value = (values[lane] + bias) * layer.scale;
                out[i + lane] = add ? out[i + lane] + value : value;
            }
        }
    });
}

}  // namespace moedial
