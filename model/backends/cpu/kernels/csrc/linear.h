// Linear layers on packed weights: norm and encoding of the rows, then panels handed out to the
// threads.
#pragma once
#include <algorithm>

#include "pool.h"
#include "rows.h"
#include "scratch.h"

namespace moedial {

struct Block {
    alignas(64) int32_t words[BLOCK * PANEL];
    const int32_t* rows[BLOCK];
    int32_t* sums[BLOCK];

    Block() {
        for (int64_t r = 0; r < BLOCK; r++) own[r] = words + r * PANEL;
    }
    int32_t* own[BLOCK];  // rows of `words`
};

inline Block& block() {
    static thread_local Block mine;
    return mine;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls f(first, last) for parts of `count` rows; little work stays on the calling thread.
template <class F>
inline void parallel_rows(int64_t count, int64_t part, F&& f, int64_t work = SMALL) {
    parallel(
        ceil_div(count, part), [&](int64_t i) { f(i * part, std::min(count, (i + 1) * part)); },
        work);
}

inline Inputs inputs(Kind kind, int64_t rows, int64_t stored) {
    Inputs in{kind == BYTES ? BFLOAT : kind};
    in.words = stored / (kind == FLOAT ? 1 : kind == QUANTUM ? 4 : 2);
    in.data = scratch().take<int32_t>(rows * in.words);
    if (kind == QUANTUM) in.scale = scratch().take<float>(rows);
    return in;
}

// The rows of x [rows, width], normed and encoded for matrices of `m`'s kind and width.
inline Inputs encode_rows(const float* x, int64_t rows, int64_t width, int64_t stride,
                          const Norm& norm, const Matrix& m, float* normed = nullptr) {
    const Inputs in = inputs(m.kind, rows, m.k);
    float* y = normed ? normed : norm.weight ? scratch().take<float>(rows * width) : nullptr;
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) {
                if (y) norm_row(x + r * stride, width, norm, y + r * width);
                encode(y ? y + r * width : x + r * stride, width, in, r, m.k);
            }
        },
        4 * rows * width);
    return in;
}

// Whether rows encoded for one matrix can be multiplied by another.
inline bool inputs_match(const Matrix& a, const Matrix& b) {
    const auto form = [](Kind kind) { return kind == BYTES ? BFLOAT : kind; };
    return form(a.kind) == form(b.kind) && a.k == b.k;
}

// Slices of a matrix' outputs, narrow where each has so few rows that the threads would not get
// several tasks.
struct Slices {
    const Matrix& m;
    int64_t width;

    Slices(const Matrix& matrix, int64_t rows) : m(matrix), width(PANEL) {
        while (width > 16 && ceil_div(m.n, width) * ceil_div(rows, BLOCK) < 4 * threads())
            width /= 2;
    }
    int64_t count() const { return ceil_div(m.n, width); }
    Slice at(int64_t i) const { return {&m, i * width, std::min(width, m.n - i * width)}; }
};

// How many neighbouring panels one task takes. A long run is read fastest, but each thread needs
// several tasks; where rows are many, the panels' arithmetic hides where they lie.
inline int64_t run_length(int64_t panels, int64_t rows) {
    return rows > ROWS ? 1 : std::clamp<int64_t>(panels / (4 * threads()), 1, 8);
}

// Calls f(row, first output, words) for each row and slice of m times the rows; words are
// unfinished sums.
template <class F>
inline void multiply(const Inputs& in, int64_t rows, const Matrix& m, F&& f) {
    const Slices slices(m, rows);
    const int64_t parts =
        std::clamp<int64_t>(ceil_div(4 * threads(), slices.count()), 1, ceil_div(rows, BLOCK));
    const int64_t part = ceil_div(ceil_div(rows, parts), BLOCK) * BLOCK,
                  run = run_length(slices.count() * parts, rows);
    parallel(
        ceil_div(slices.count(), run) * parts,
        [&](int64_t i) {
            const int64_t end = std::min(slices.count(), (i / parts + 1) * run),
                          last = std::min(rows, (i % parts + 1) * part);
            for (int64_t s = i / parts * run; s < end; s++) {
                const Slice slice = slices.at(s);
                for (int64_t r = i % parts * part; r < last; r += BLOCK) {
                    Block& b = block();
                    const int64_t now = std::min(BLOCK, last - r);
                    for (int64_t j = 0; j < now; j++) b.rows[j] = in.row(r + j);
                    product(b.rows, now, slice, b.own, 0, false);
                    for (int64_t j = 0; j < now; j++) f(r + j, slice, b.words + j * PANEL);
                }
            }
        },
        rows * m.n * m.k);
}

// y (+)= W x + bias; y has `stride` floats per row and room for W's stored outputs or exactly `n`
// of them.
inline void linear_rows(const Inputs& in, int64_t rows, const Linear& layer, bool add, int64_t n,
                        int64_t stride, float* y) {
    const Matrix& m = layer.weight;
    multiply(in, rows, m, [&](int64_t r, const Slice& s, const int32_t* words) {
        const float scale = in.scale ? in.scale[r] : 1.0f;
        float* out = y + r * stride + s.first;
        for (int64_t i = 0; i < s.outputs; i += LANES) {
            vf v = finish(m, words + i, s.first + i, scale);
            if (s.first + i + LANES <= n) {
                if (layer.bias) v += load(layer.bias + s.first + i);
                store(out + i, add ? load(out + i) + v : v);
                continue;
            }
            for (int64_t l = 0; s.first + i + l < n && l < LANES; l++) {
                const float value = v[l] + (layer.bias ? layer.bias[s.first + i + l] : 0.0f);
                out[i + l] = add ? out[i + l] + value : value;
            }
        }
    });
}

}  // namespace moedial
