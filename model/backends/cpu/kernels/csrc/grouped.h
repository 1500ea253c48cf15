// Products with grouped matrices: codes of 4 or 8 bits, one scale and maybe one minimum for each
// group of inputs. A panel is one stream (model/backends/cpu/kernels/groups.py): per group the
// float16 scales of its outputs, their minima, then words. Rows are signed bytes in blocks of 256
// inputs with a scale each.
//
// An output is one chain: per group an exact integer, times the group's scale onto the block's sum
// by one `fused`; the block's sum, times the row's scale, onto the output's. So bits depend neither
// on the batch nor on the library.
#pragma once
#include <algorithm>
#include <type_traits>

#include "kernels.h"
#include "vec.h"

namespace moedial {

constexpr int64_t ROW_BLOCK = 16 * ROWS;  // rows of one pass over a panel, of matrices of any kind
constexpr int64_t BLOCK_INPUTS = 256;     // a whole number of groups of any size
constexpr int GROUPED_ROWS = 4;           // so many that their integers and sums fit the registers
constexpr int64_t AHEAD_BYTES = 6144;     // to prefetch ahead in a panel

// An encoded row: codes, four in a word, then each group's sum of them, then each block's scale.
template <class Word>
struct GroupedRow {
    using Float = std::conditional_t<std::is_const_v<Word>, const float, float>;
    Word *codes, *sums;
    Float* scales;

    GroupedRow() = default;
    GroupedRow(Word* row, int64_t inputs, int64_t group)
        : codes(row), sums(row + inputs / 4), scales((Float*)(sums + inputs / group)) {}

    static int64_t words(int64_t inputs, int64_t group) {
        return inputs / 4 + inputs / group + (inputs + BLOCK_INPUTS - 1) / BLOCK_INPUTS;
    }
};

// Codes of 4 bits: a word has two planes of 4 neighbouring inputs, in the low and the high halves
// of its bytes. TABLE: whether they are looked up. ADDED: how many words' products are added in 16
// bits where the library does that; 0: none, entries are too large (`add_bytes`).
template <bool TABLE, int ADDED>
struct Nibbles {
    static constexpr int PLANES = 2, WORDS = 2, SHORT_WORDS = ADDED;
    static void decode(Ints words, Ints table, Ints (&planes)[PLANES]) {
        planes[0] = words & 0x0F0F0F0F, planes[1] = (words >> 4) & 0x0F0F0F0F;
        if constexpr (TABLE)
            planes[0] = look_up(table, planes[0]), planes[1] = look_up(table, planes[1]);
    }
};

// Codes of 8 bits: a word is one plane.
struct WholeBytes {
    static constexpr int PLANES = 1, WORDS = 4, SHORT_WORDS = 0;
    static void decode(Ints words, Ints, Ints (&planes)[PLANES]) { planes[0] = words; }
};

// sums[row][vector] += Σ of entry * input over 16 inputs, for R rows and V vectors of outputs.
template <class Codes, int R, int V>
inline void add_sixteen(const int32_t* const (&inputs)[R], int64_t from, const int32_t* words,
                        int64_t step, Ints table, Ints (&sums)[R][V]) {
    Ints part[R][V];
#pragma GCC unroll 4
    for (int word = 0; word < Codes::WORDS; word++) {
        Ints planes[V][Codes::PLANES];
#pragma GCC unroll 4
        for (int vector = 0; vector < V; vector++) {
            const int32_t* at = words + word * step + vector * LANES;
            Codes::decode(load(at), table, planes[vector]);
            // Once for each 64 bytes, a line of the cache.
            if (vector * LANES % 16 == 0) __builtin_prefetch((const char*)at + AHEAD_BYTES);
        }
#pragma GCC unroll 4
        for (int row = 0; row < R; row++) {
            Ints input[Codes::PLANES];
#pragma GCC unroll 2
            for (int plane = 0; plane < Codes::PLANES; plane++)
                input[plane] = splat(inputs[row][from + word * Codes::PLANES + plane]);
#pragma GCC unroll 4
            for (int vector = 0; vector < V; vector++) {
                Ints& sum = sums[row][vector];
                if constexpr (Codes::SHORT_WORDS == 0) {
#pragma GCC unroll 2
                    for (int plane = 0; plane < Codes::PLANES; plane++)
                        sum = dot_bytes(sum, planes[vector][plane], input[plane]);
                    continue;
                }
                constexpr int ADDED = std::max(1, Codes::SHORT_WORDS);
                if (word % ADDED == 0) part[row][vector] = begin_bytes(sum);
#pragma GCC unroll 2
                for (int plane = 0; plane < Codes::PLANES; plane++)
                    part[row][vector] =
                        add_bytes(part[row][vector], planes[vector][plane], input[plane]);
                if (word % ADDED == ADDED - 1) sum = end_bytes(sum, part[row][vector]);
            }
        }
    }
}

// A panel's stream as a product reads it.
struct GroupStream {
    const char* data;       // the first group
    int64_t width, column;  // outputs of the panel, and the first one of the tile
    const GroupCodes& codes;

    const char* group(int64_t index) const { return data + index * width * codes.bytes(); }
    const uint16_t* scales(const char* group) const { return (const uint16_t*)group + column; }
    const uint16_t* minima(const char* group) const { return scales(group) + width; }
    const int32_t* words(const char* group) const {
        return (const int32_t*)(group + width * codes.header_bytes()) + column;
    }
};

// One block of R rows and V vectors of outputs, groups [first, last): sums[row] + column (+)= it.
template <class Codes, int R, int V>
inline void grouped_tile(const GroupedRow<const int32_t>* rows, const GroupStream& stream,
                         int64_t first, int64_t last, float* const* sums, int64_t column) {
    const GroupCodes& codes = stream.codes;
    const Ints table = repeat_bytes(codes.entries);
    const int32_t* inputs[R];
#pragma GCC unroll 4
    for (int row = 0; row < R; row++) inputs[row] = rows[row].codes;
    Floats block[R][V] = {};
    for (int64_t group = first; group < last; group++) {
        const char* at = stream.group(group);
        Ints acc[R][V];
#pragma GCC unroll 4
        for (int row = 0; row < R; row++)
#pragma GCC unroll 4
            for (int vector = 0; vector < V; vector++)
                acc[row][vector] = splat(-codes.shift * rows[row].sums[group]);
        const int32_t* words = stream.words(at);
        for (int64_t from = group * codes.inputs / 4; from < (group + 1) * codes.inputs / 4;
             from += 4, words += Codes::WORDS * stream.width)
            add_sixteen<Codes, R, V>(inputs, from, words, stream.width, table, acc);
#pragma GCC unroll 4
        for (int vector = 0; vector < V; vector++) {
            const Floats scale = load_float16(stream.scales(at) + vector * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < R; row++)
                block[row][vector] = fused(to_float(acc[row][vector]), scale, block[row][vector]);
            if (!codes.minimum) continue;
            const Floats minimum = load_float16(stream.minima(at) + vector * LANES);
#pragma GCC unroll 4
            for (int row = 0; row < R; row++)
                block[row][vector] =
                    fused(splat(float(rows[row].sums[group])), minimum, block[row][vector]);
        }
    }
    const int64_t number = first * codes.inputs / BLOCK_INPUTS;
#pragma GCC unroll 4
    for (int row = 0; row < R; row++)
#pragma GCC unroll 4
        for (int vector = 0; vector < V; vector++) {
            float* sum = sums[row] + column + vector * LANES;
            store(sum, fused(block[row][vector], splat(rows[row].scales[number]),
                             number ? load(sum) : Floats{}));
        }
}

// `grouped_tile` for a number of rows that is known when it runs: 1 to R.
template <class Codes, int V, int R = GROUPED_ROWS>
inline void grouped_rows(int rows, const GroupedRow<const int32_t>* inputs,
                         const GroupStream& stream, int64_t first, int64_t last, float* const* sums,
                         int64_t column) {
    if (rows == R) return grouped_tile<Codes, R, V>(inputs, stream, first, last, sums, column);
    if constexpr (R > 1)
        grouped_rows<Codes, V, R - 1>(rows, inputs, stream, first, last, sums, column);
}

// One block of all rows for `outputs` outputs of a panel, V vectors at a time, then fewer.
template <class Codes, int V = VECTORS>
inline void grouped_block(const GroupedRow<const int32_t>* inputs, int64_t rows, GroupStream stream,
                          int64_t outputs, int64_t first, int64_t last, float* const* sums,
                          int64_t column) {
    for (; outputs >= V * LANES; outputs -= V * LANES) {
        for (int64_t row = 0; row < rows; row += GROUPED_ROWS)
            grouped_rows<Codes, V>(int(std::min<int64_t>(rows - row, GROUPED_ROWS)), inputs + row,
                                   stream, first, last, sums + row, column);
        stream.column += V * LANES, column += V * LANES;
    }
    if constexpr (V > 1)
        grouped_block<Codes, V / 2>(inputs, rows, stream, outputs, first, last, sums, column);
}

// sums[row] + column = the sums of `outputs` outputs of one panel from `first`, without the
// outputs' factors. All rows pass over a block before the next: it stays in the first-level cache.
template <class Codes>
inline void grouped_panel(const int32_t* const* inputs, int64_t rows, const Matrix& matrix,
                          int64_t first, int64_t outputs, float* const* sums, int64_t column) {
    GroupedRow<const int32_t> encoded[ROW_BLOCK];
    for (int64_t row = 0; row < rows; row++)
        encoded[row] = {inputs[row], matrix.inputs, matrix.codes.inputs};
    const int64_t panel = first / PANEL;
    const GroupStream stream{matrix.panel(panel), matrix.panel_outputs(panel),
                             first - panel * PANEL, matrix.codes};
    const int64_t groups = matrix.groups(), block = BLOCK_INPUTS / matrix.codes.inputs;
    for (int64_t group = 0; group < groups; group += block)
        grouped_block<Codes>(encoded, rows, stream, outputs, group, std::min(groups, group + block),
                             sums, column);
}

// The same for the codes of this matrix. Sums are floats.
inline void grouped_product(const int32_t* const* inputs, int64_t rows, const Matrix& matrix,
                            int64_t first, int64_t outputs, int32_t* const* sums, int64_t column) {
    const auto run = [&]<class Codes>(Codes) {
        grouped_panel<Codes>(inputs, rows, matrix, first, outputs, (float* const*)sums, column);
    };
    const GroupCodes& codes = matrix.codes;
    if (codes.bits == 8) return run(WholeBytes{});
    if (!codes.table) return run(Nibbles<false, 2>{});
    if constexpr (ADDS_IN_16_BITS) {
        if (codes.largest >= 64) return run(Nibbles<true, 0>{});
        if (codes.largest >= 32) return run(Nibbles<true, 1>{});
    }
    run(Nibbles<true, 2>{});
}

}  // namespace moedial
