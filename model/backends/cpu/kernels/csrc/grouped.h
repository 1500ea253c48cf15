// Products with grouped matrices: codes of 4, 6 or 8 bits, one scale and maybe one minimum for each
// group of inputs. Rows are signed bytes in blocks of 256 inputs with a scale each.
//
// An output is one chain of sums over blocks:
// - Per group an exact integer. If scales are float16, it is multiplied by the group's scale and
//   added to the block's sum by one `fused`. If they are 8-bit integers, the products are added as
//   integers, and the block's sum is converted to float once.
// - Per group the sum of the row's bytes, times the minimum, by one `fused`.
// - The block's sum, times the row's scale, is added to the output's.
// So bits depend neither on the batch nor on the library. How the integers are added up is the
// library's (`add_bytes`).
#pragma once
#include "codes.h"

namespace moedial {

constexpr int64_t ROW_BLOCK = 16 * ROWS;  // rows of one pass over a panel, of matrices of any kind
constexpr int GROUPED_ROWS = 4;           // so many that their integers fit the registers
// Vectors of outputs that one row takes at once: a whole panel, which is then read as it lies
// (portable: as other rows).
constexpr int ONE_ROW_VECTORS = LANES < 8 ? VECTORS : PANEL / LANES;

// Encoded rows, and where their parts lie.
struct GroupedRows {
    const int32_t* const* rows;
    const RowLayout& layout;

    GroupedRows from(int64_t row) const { return {rows + row, layout}; }
    const float* sums(int row) const { return (const float*)rows[row] + layout.sums; }
    float scale(int row, int64_t block) const {
        return ((const float*)rows[row])[layout.scales + block];
    }
};

// The sums of four words of R rows, from `from` on, and V vectors of outputs: parts[row][vector]
// += Σ of entry * input. With FIRST, the sums begin with the run's start instead. Moves `words` on
// behind them, and `ahead`, what is prefetched next.
template <bool FIRST, int R, int V, class Weights>
[[gnu::always_inline]] inline void sum_words(const int32_t* const (&rows)[R], int64_t start,
                                             int64_t from, const Weights& weights,
                                             const int32_t*& words, const char*& ahead,
                                             Ints (&parts)[R][V]) {
    using Codes = typename Weights::Codes;
#pragma GCC unroll 8
    for (int word = 0; word < 4; word += Codes::PLANES) {
        constexpr int BYTES = 4 * Codes::WORDS * V * LANES;
        weights.prefetch(ahead, BYTES, BYTES);
        // The planes of one row's vectors in turn, of several rows' vectors at once.
        constexpr int TOGETHER = R > 1 ? V : 1;
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector += TOGETHER) {
            Ints planes[TOGETHER][Codes::PLANES];
#pragma GCC unroll 8
            for (int i = 0; i < TOGETHER; i++) weights.planes(words, vector + i, planes[i]);
#pragma GCC unroll 4
            for (int plane = 0; plane < Codes::PLANES; plane++)
#pragma GCC unroll 4
                for (int row = 0; row < R; row++) {
                    const Ints input = splat(rows[row][from + word + plane]);
                    if (FIRST && word + plane == 0)
                        begin_bytes<Codes::SUMS.large, Codes::SUMS.starts, TOGETHER>(
                            parts[row] + vector, planes, input, rows[row] + start);
                    else
                        add_bytes<Codes::SUMS.large, TOGETHER>(parts[row] + vector, planes, plane,
                                                               input);
                }
        }
        words += weights.step();
    }
}

// The same for a run, from word `from` to `end`.
template <int R, int V, class Weights>
inline void sum_run(const int32_t* const (&rows)[R], int64_t start, int64_t from, int64_t end,
                    const Weights& weights, const int32_t*& words, const char*& ahead,
                    Ints (&parts)[R][V]) {
    sum_words<true, R, V>(rows, start, from, weights, words, ahead, parts);
    while ((from += 4) < end)
        sum_words<false, R, V>(rows, start, from, weights, words, ahead, parts);
}

// What the minima of the groups [first, last) add: block[row][vector] += Σ of the row's sum of
// bytes times the minimum. Its sums are here in registers, those of the caller in memory.
template <int R, int V, class Weights>
inline void add_minima(const GroupedRows& inputs, const Weights& weights, int64_t first,
                       int64_t last, Floats (&block)[R][V]) {
    const float* sums[R];
    Floats added[R][V];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++) {
        sums[row] = inputs.sums(row);
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) added[row][vector] = block[row][vector];
    }
    const char* group = weights.group(first);
    for (int64_t index = first; index < last; index++, group += weights.bytes()) {
        Floats minima[V];
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) minima[vector] = weights.minimum(group, vector);
#pragma GCC unroll 8
        for (int row = 0; row < R; row++) {
            const Floats sum = splat(sums[row][index]);
#pragma GCC unroll 8
            for (int vector = 0; vector < V; vector++)
                added[row][vector] = fused(sum, minima[vector], added[row][vector]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) block[row][vector] = added[row][vector];
}

// block[row][vector] = Σ of the groups [first, last), each with the integers that are its scales.
template <int R, int V, class Weights>
inline void sum_whole_groups(const int32_t* const (&rows)[R], const RowLayout& layout,
                             const Weights& weights, int64_t first, int64_t last,
                             Floats (&block)[R][V]) {
    constexpr bool LARGE = Weights::Codes::SUMS.large;
    const GroupCodes& codes = weights.codes;
    const int64_t run_words = (ADDS_IN_16_BITS && !LARGE ? WHOLE_RUN : codes.inputs) / 4;
    const int64_t runs = layout.runs;
    int64_t from = first * (codes.inputs / 4), start = layout.starts + first * runs;
    const char *group = weights.group(first), *ahead = weights.ahead(first, V * LANES);
    Ints totals[R][V];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) totals[row][vector] = Ints{};
    for (int64_t index = first; index < last; index++, group += weights.bytes()) {
        const int32_t* words = weights.words(group);
        weights.prefetch_header(ahead, 4 * V * LANES, codes.header * V * LANES);
        Ints scales[V];
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) scales[vector] = weights.scale(group, vector);
        keep_in_memory(scales);
        for (int64_t run = 0; run < runs; run++, from += run_words) {
            Ints parts[R][V];
            if constexpr (R * V > 4) keep_in_memory(totals);
            sum_run<R, V>(rows, start++, from, from + run_words, weights, words, ahead, parts);
#pragma GCC unroll 8
            for (int vector = 0; vector < V; vector++)
#pragma GCC unroll 8
                for (int row = 0; row < R; row++)
                    totals[row][vector] += scaled_bytes<LARGE>(parts[row][vector], scales[vector]);
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            block[row][vector] = to_float(totals[row][vector]);
}

// The same where scales are floats.
template <int R, int V, bool SPLIT, class Weights>
inline void sum_groups(const int32_t* const (&rows)[R], const RowLayout& layout,
                       const Weights& weights, int64_t first, int64_t last, Floats (&block)[R][V]) {
    constexpr bool LARGE = Weights::Codes::SUMS.large;
    const GroupCodes& codes = weights.codes;
    const int64_t runs = SPLIT ? layout.runs : 1;
    const int64_t run_words = (SPLIT ? run_inputs(codes) : codes.inputs) / 4;
    int64_t from = first * (codes.inputs / 4), start = layout.starts + first * runs;
    const char *group = weights.group(first), *ahead = weights.ahead(first, V * LANES);
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) block[row][vector] = Floats{};
    for (int64_t index = first; index < last; index++, group += weights.bytes()) {
        const int32_t* words = weights.words(group);
        weights.prefetch_header(ahead, 4 * V * LANES, codes.header * V * LANES);
        Ints parts[R][V], totals[R][V];
        // All runs but the last.
        for (int64_t run = 1; run < runs; run++, from += run_words) {
            sum_run<R, V>(rows, start++, from, from + run_words, weights, words, ahead, parts);
#pragma GCC unroll 8
            for (int row = 0; row < R; row++)
#pragma GCC unroll 8
                for (int vector = 0; vector < V; vector++) {
                    const Ints part = end_bytes<LARGE>(parts[row][vector]);
                    totals[row][vector] = run == 1 ? part : totals[row][vector] + part;
                }
            if constexpr (R * V > 4) keep_in_memory(totals);
        }
        if constexpr (R * V > 4) keep_in_memory(block);
        sum_run<R, V>(rows, start++, from, from + run_words, weights, words, ahead, parts);
        from += run_words;
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) {
            const Floats scale = weights.scale(group, vector);
#pragma GCC unroll 8
            for (int row = 0; row < R; row++) {
                Ints total = end_bytes<LARGE>(parts[row][vector]);
                if constexpr (SPLIT) total += totals[row][vector];
                block[row][vector] = fused(to_float(total), scale, block[row][vector]);
            }
        }
    }
}

// One block of R rows and V vectors of outputs, groups [first, last): sums[row] + column (+)= it.
// SPLIT: whether groups with float scales have several runs. Not inlined: the compiler then keeps
// the inner loop's sums in registers.
template <int R, int V, bool SPLIT, class Weights>
__attribute__((noinline)) void grouped_tile(const GroupedRows& inputs, const Weights& weights,
                                            int64_t first, int64_t last, float* const* sums,
                                            int64_t column) {
    const GroupCodes& codes = weights.codes;
    const int32_t* rows[R];
    Floats block[R][V];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++) rows[row] = inputs.rows[row];
    if constexpr (Weights::Codes::SUMS.whole)
        sum_whole_groups<R, V>(rows, inputs.layout, weights, first, last, block);
    else
        sum_groups<R, V, SPLIT>(rows, inputs.layout, weights, first, last, block);
    if (codes.minimum()) add_minima<R, V>(inputs, weights, first, last, block);
    // All addresses first: a store may change what they are read from, for all that is known.
    const int64_t number = first * codes.inputs / BLOCK_INPUTS;
    float* to[R];
    Floats scales[R];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
        to[row] = sums[row] + column, scales[row] = splat(inputs.scale(row, number));
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            store(to[row] + vector * LANES,
                  fused(block[row][vector], scales[row],
                        number ? load(to[row] + vector * LANES) : Floats{}));
}

// `grouped_tile` for a number of rows that is known when it runs: 1 to R.
template <int V, int R, class Weights>
inline void grouped_rows(int rows, const GroupedRows& inputs, const Weights& weights, int64_t first,
                         int64_t last, float* const* sums, int64_t column) {
    if (rows == R) {
        if constexpr (ADDS_IN_16_BITS && !Weights::Codes::SUMS.large && !Weights::Codes::SUMS.whole)
            if (inputs.layout.runs > 1)
                return grouped_tile<R, V, true>(inputs, weights, first, last, sums, column);
        return grouped_tile<R, V, false>(inputs, weights, first, last, sums, column);
    }
    if constexpr (R > 1) grouped_rows<V, R - 1>(rows, inputs, weights, first, last, sums, column);
}

// One block of all rows for `outputs` outputs of a panel, V vectors at a time, then fewer. Where
// products cost more than unpacking, many rows share it.
template <class Codes, int V, int R>
inline void grouped_block(const GroupedRows& inputs, int64_t rows, Stored<Codes> stored,
                          int64_t outputs, int64_t first, int64_t last, float* const* sums,
                          int64_t column) {
    const auto tiles = [&](const auto& weights) {
        for (int64_t row = 0; row < rows; row += R)
            grouped_rows<V, R>(int(std::min<int64_t>(rows - row, R)), inputs.from(row), weights,
                               first, last, sums + row, column);
    };
    for (; outputs >= V * LANES; outputs -= V * LANES) {
        if constexpr (ADDS_IN_16_BITS && R > 1) {
            if (rows > GROUPED_ROWS)
                tiles(Unpacked<Codes::SUMS, V>(stored, first, last, (rows + R - 1) / R));
            else
                tiles(stored);
        } else {
            tiles(stored);
        }
        stored.column += V * LANES, column += V * LANES;
    }
    if constexpr (V * LANES > 16)
        grouped_block<Codes, V / 2, R>(inputs, rows, stored, outputs, first, last, sums, column);
}

// sums[row] + column = the sums of `outputs` outputs of one panel from `first`, without the
// outputs' factors. All rows pass over a block before the next: it stays in the first-level cache.
template <class Codes, int V, int R>
inline void grouped_panel(const int32_t* const* inputs, int64_t rows, const Matrix& matrix,
                          int64_t first, int64_t outputs, float* const* sums, int64_t column) {
    const RowLayout layout(matrix.inputs, matrix.codes);
    const int64_t panel = first / PANEL;
    const Stored<Codes> stored{matrix.panel(panel), matrix.panel_outputs(panel),
                               first - panel * PANEL, matrix.codes};
    const int64_t groups = matrix.groups(), block = BLOCK_INPUTS / matrix.codes.inputs;
    for (int64_t group = 0; group < groups; group += block)
        grouped_block<Codes, V, R>({inputs, layout}, rows, stored, outputs, group,
                                   std::min(groups, group + block), sums, column);
}

// The same for the codes of this matrix. Sums are floats.
inline void grouped_product(const int32_t* const* inputs, int64_t rows, const Matrix& matrix,
                            int64_t first, int64_t outputs, int32_t* const* sums, int64_t column) {
    const auto run = [&]<class Codes>(Codes) {
        float* const* to = (float* const*)sums;
        if (rows == 1)
            grouped_panel<Codes, ONE_ROW_VECTORS, 1>(inputs, 1, matrix, first, outputs, to, column);
        else
            grouped_panel<Codes, VECTORS, GROUPED_ROWS>(inputs, rows, matrix, first, outputs, to,
                                                        column);
    };
    const GroupCodes& codes = matrix.codes;
    if (codes.bits == 8) return run(WholeBytes{});
    if (codes.bits == 6) return run(SixBits{});
    const bool whole = codes.byte_scale();
    if constexpr (ADDS_IN_16_BITS) {
        if (large_codes(codes) && whole)
            return run(Nibbles<true, Sums{.large = true, .whole = true, .starts = false}>{});
        if (large_codes(codes)) return run(Nibbles<true, Sums{.large = true, .starts = false}>{});
        if (!whole && !codes.table && !codes.shift)
            return run(Nibbles<false, Sums{.starts = false}>{});
    }
    if (whole) return run(Nibbles<true, Sums{.whole = true}>{});
    if (codes.table) return run(Nibbles<true, Sums{}>{});
    run(Nibbles<false, Sums{}>{});
}

}  // namespace moedial
