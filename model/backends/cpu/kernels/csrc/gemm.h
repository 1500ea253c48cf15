// Products with packed matrices: tiles of sums in registers, one panel of up to 64 outputs at a
// time. Every output is one chain of sums over the inputs in order, so a row's bits do not depend
// on the rows beside it, nor on how rows and outputs are cut into tiles.
//
// Input rows and sums are words of 32 bits here, whatever they hold: the arithmetic is a template
// argument (`FloatDot`, `Bfloat16Dot`, `Int8Dot`).
#pragma once
#include <algorithm>

#include "few_rows.h"

namespace moedial {

constexpr int64_t CHUNK = 128;  // groups that stay in the first-level cache: 64 * 4 * CHUNK bytes
constexpr int64_t AHEAD = LANES == 16 ? 12 : 32;  // groups to prefetch ahead

// Up to PANEL_ROWS rows take PANEL_VECTORS vectors of outputs at once.
constexpr int PANEL_ROWS = LANES == 16 ? 1 : 2, PANEL_VECTORS = LANES == 16 ? VECTORS : 8;

// One step of a sum: a word of inputs, the same in every lane, times a word of weights per lane.
struct FloatDot {
    static Ints dot(Ints sums, Ints input, Ints weights) {
        return bits(fma(bits(input), bits(weights), bits(sums)));
    }
};
struct Bfloat16Dot {
    static Ints dot(Ints sums, Ints input, Ints weights) {
        return bits(dot_pairs(bits(sums), input, weights));
    }
};
struct Int8Dot {
    static Ints dot(Ints sums, Ints input, Ints weights) { return dot_bytes(sums, input, weights); }
};

// Where a tile finds its weights: vector `vector` of group `group` at `at(group, vector)`.
// `prefetch` is called with the same, and may prefetch memory some groups ahead.
struct PanelWords {
    const int32_t* words;
    int64_t step;  // words from one group to the next
    const int32_t* at(int64_t group, int vector) const {
        return words + group * step + vector * LANES;
    }
    void prefetch(int64_t group, int vector) const {
        // Once for each 64 bytes, a line of the cache.
        if (vector * LANES % 16 == 0)
            __builtin_prefetch(words + (group + AHEAD) * step + vector * LANES);
    }
};

// sums[row][vector] (+)= Σ over the groups of inputs[row][from + group] · words[group][vector].
// Row r's sums lie at sums[r] + column. The sums stay in registers, which the compiler only does
// where all loops over rows and vectors are unrolled: hence the template arguments and the pragmas.
template <class Dot, int R, int V, class Words>
inline void tile(const int32_t* const* inputs, int64_t from, int64_t groups, const Words& words,
                 int32_t* const* sums, int64_t column, bool add) {
    Ints acc[R][V];
    begin_sums(acc, sums, column, add);
    const int32_t* row_inputs[R];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++) row_inputs[row] = inputs[row] + from;
    for (int64_t group = 0; group < groups; group++) {
        Ints weights[V];
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++) {
            weights[vector] = load(words.at(group, vector));
            words.prefetch(group, vector);
        }
#pragma GCC unroll 8
        for (int row = 0; row < R; row++) {
            const Ints input = splat(row_inputs[row][group]);
#pragma GCC unroll 8
            for (int vector = 0; vector < V; vector++)
                acc[row][vector] = Dot::dot(acc[row][vector], input, weights[vector]);
        }
    }
    end_sums(acc, sums, column);
}

// All rows against one chunk of a panel, `groups` groups of `outputs` outputs, in tiles of up to V
// vectors and R rows.
template <class Dot, int V, int R>
inline void chunk_tiles(const int32_t* const* inputs, int64_t rows, int64_t from,
                        const int32_t* words, int64_t outputs, int64_t groups, int64_t step,
                        int32_t* const* sums, int64_t column, bool add) {
    for (int64_t output = 0; output < outputs; output += V * LANES) {
        const PanelWords here{words + output, step};
        with_constant<V>(std::min<int64_t>((outputs - output) / LANES, V), [&]<int vectors>() {
            for (int64_t row = 0; row < rows; row += R)
                with_constant<R>(std::min<int64_t>(rows - row, R), [&]<int height>() {
                    tile<Dot, height, vectors>(inputs + row, from, groups, here, sums + row,
                                               column + output, add);
                });
        });
    }
}

// The same for any number of rows. Few rows take as many vectors at once as they can, so that
// memory is read in the order in which it lies, even where not all of their sums fit the registers.
template <class Dot>
inline void chunk(const int32_t* const* inputs, int64_t rows, int64_t from, const int32_t* words,
                  int64_t outputs, int64_t groups, int64_t step, int32_t* const* sums,
                  int64_t column, bool add) {
    const auto run = rows <= PANEL_ROWS ? chunk_tiles<Dot, PANEL_VECTORS, PANEL_ROWS>
                                        : chunk_tiles<Dot, VECTORS, ROWS>;
    run(inputs, rows, from, words, outputs, groups, step, sums, column, add);
}

// int8 pairs to bfloat16 pairs; every int8 is one exactly. Of AVX512 alone.
inline void widen(const int8_t* from, int64_t words, int32_t* to) {
#if LANES_512
    for (int64_t word = 0; word < words; word += 16) {
        const auto part = [&](int64_t at) {
            return _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 2 * word + at))));
        };
        store_bf16((uint16_t*)(to + word), (Floats)part(0), (Floats)part(16));
    }
#endif
}

// Some outputs of a matrix, from `first` on: both are multiples of 16.
struct Slice {
    const Matrix* matrix;
    int64_t first, outputs;
};

// Whether the inputs of products with matrices of this kind are widened once.
inline bool widens_inputs(Kind kind) {
    constexpr bool FLOATS = LANES < 16, BYTES = FLOATS && ADDS_IN_16_BITS;
    return kind != GROUPED && (kind == INT8 ? BYTES : FLOATS);
}
// Whether they are for several panels together: products of many rows (`widened.h`).
inline bool widens(Kind kind, int64_t rows) { return rows > ROWS && widens_inputs(kind); }

// Calls run(Wide) with how the words of this kind are widened.
template <class Run>
inline void with_wide(Kind kind, Run&& run) {
    switch (kind) {
        case FLOAT: return run(WideFloats{});
        case INT8: return run(WideBytes{});
        case INT8_WEIGHTS: return run(WideBytePairs{});
        default: return run(WidePairs{});
    }
}

// `product` for a slice that does not cross a panel.
inline void panel_product(const int32_t* const* inputs, int64_t rows, const Slice& slice,
                          int32_t* const* sums, int64_t column, bool add) {
    const Matrix& matrix = *slice.matrix;
    if (matrix.kind == GROUPED)
        return grouped_product(inputs, rows, matrix, slice.first, slice.outputs, sums, column);
    if (widens_inputs(matrix.kind) && (rows > PANEL_ROWS || matrix.kind == INT8_WEIGHTS))
        return with_wide(matrix.kind, [&]<class Wide>(Wide) {
            few_rows_product<Wide>(inputs, rows, matrix, slice.first, slice.outputs, sums, column,
                                   add);
        });
    const int64_t panel = slice.first / PANEL, step = matrix.panel_outputs(panel);
    const int64_t inside = slice.first - panel * PANEL, groups = matrix.groups();
    alignas(64) static thread_local int32_t wide[CHUNK * PANEL];
    // Few rows pass once over all inputs; many pass over chunks that stay in the cache. The sums
    // are the same: a chunk's sums are stored exactly and loaded again.
    const int64_t chunk_groups = rows <= ROWS && matrix.kind != INT8_WEIGHTS ? groups : CHUNK;
    for (int64_t from = 0; from < groups; from += chunk_groups, add = true) {
        const int64_t now = std::min(groups - from, chunk_groups);
        const char* data = matrix.panel(panel) + from * step * matrix.group_bytes();
        const int32_t* words = (const int32_t*)data + inside;
        const auto run = [&]<class Dot>(Dot, const int32_t* weights) {
            chunk<Dot>(inputs, rows, from, weights, slice.outputs, now, step, sums, column, add);
        };
        switch (matrix.kind) {
            case FLOAT: run(FloatDot{}, words); break;
            case BFLOAT16: run(Bfloat16Dot{}, words); break;
            case INT8: run(Int8Dot{}, words); break;
            case INT8_WEIGHTS:
                widen((const int8_t*)data, now * step, wide);
                run(Bfloat16Dot{}, wide + inside);
                break;
            case GROUPED: break;  // above
        }
    }
}

// Unfinished sums of a slice for at most ROW_BLOCK rows: floats, or int32 for INT8, row r's at
// sums[r] + column. With `add` they continue what is there, which GROUPED cannot.
inline void product(const int32_t* const* inputs, int64_t rows, const Slice& slice,
                    int32_t* const* sums, int64_t column, bool add) {
    const auto [matrix, first, outputs] = slice;
    if (widens(matrix->kind, rows))
        return with_wide(matrix->kind, [&]<class Wide>(Wide) {
            wide_product<Wide>(inputs, rows, *matrix, first, outputs, sums, column, add);
        });
    for (int64_t at = first; at < first + outputs;) {
        const int64_t end = std::min(first + outputs, (at / PANEL + 1) * PANEL);
        panel_product(inputs, rows, {matrix, at, end - at}, sums, column + at - first, add);
        at = end;
    }
}

// One vector of finished values: scales applied, and the offset of int8 inputs taken off.
inline Floats finish(const Matrix& matrix, const int32_t* sums, int64_t output, float row_scale) {
    switch (matrix.kind) {
        case INT8:
            return to_float(load(sums) - load(matrix.offsets + output)) *
                   (load(matrix.scales + output) * row_scale);
        case INT8_WEIGHTS:
        case GROUPED: return load((const float*)sums) * load(matrix.scales + output);
        default: return load((const float*)sums);
    }
}

}  // namespace moedial
