// Products of a few rows where the processor has no instruction for what is stored: inputs are
// widened once, as in `widened.h`, weights where they are multiplied, since reading them from
// memory takes as long. The sums are those of the products in `gemm.h`, in the same order.
#pragma once
#include "widened.h"

namespace moedial {

// Words of one output that all tiles take before the next ones: 8 KB of a panel, which stay in the
// first-level cache.
constexpr int64_t PIECE_WORDS = 32;

// sums[row][vector] (+)= the inputs of R rows, widened, times the weights of V vectors of outputs,
// `words` stored words of each. Meanwhile as much memory is prefetched from `ahead` on.
template <class Wide, int R, int V>
[[gnu::noinline]] void few_rows_tile(const int32_t* inputs, int64_t words, const WideSlice& slice,
                                     int32_t* const* sums, int64_t column, bool add,
                                     const char* ahead) {
    Ints acc[R][V], wide[Wide::COUNT];
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            acc[row][vector] = add ? load(sums[row] + column + vector * LANES) : splat(0);
    const char* from = slice.data;
    const int64_t step = slice.step, size = slice.size;
    for (int64_t word = 0; word < words; word++, inputs += Wide::STEP, from += step) {
        __builtin_prefetch(ahead + word * V * LANES * size);
#pragma GCC unroll 2
        for (int part = 0; part < Wide::COUNT; part++) {
            Ints factors[V];
#pragma GCC unroll 8
            for (int vector = 0; vector < V; vector++) {
                // The compiler drops the other part.
                Wide::weights(from + vector * LANES * size, wide);
                factors[vector] = pinned(wide[part]);
            }
#pragma GCC unroll 8
            for (int row = 0; row < R; row++) {
                const Ints input = splat(inputs[row * WIDE_STRIDE + Wide::at(part)]);
#pragma GCC unroll 8
                for (int vector = 0; vector < V; vector++)
                    Wide::add(acc[row][vector], input, factors[vector]);
            }
        }
    }
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            store(sums[row] + column + vector * LANES, acc[row][vector]);
}

// `few_rows_tile` for a number of rows that is known when it runs: 1 to ROWS.
template <class Wide, int V, int R = ROWS>
inline void few_rows_tiles(int64_t rows, const int32_t* inputs, int64_t words,
                           const WideSlice& slice, int32_t* const* sums, int64_t column, bool add,
                           const char* ahead) {
    if (rows == R) return few_rows_tile<Wide, R, V>(inputs, words, slice, sums, column, add, ahead);
    if constexpr (R > 1)
        few_rows_tiles<Wide, V, R - 1>(rows, inputs, words, slice, sums, column, add, ahead);
}

// Unfinished sums of at most ROWS rows and a slice that does not cross a panel, as `product` of
// gemm.h makes them.
template <class Wide>
inline void few_rows_product(const int32_t* const* rows, int64_t count, const Matrix& matrix,
                             int64_t first, int64_t outputs, int32_t* const* sums, int64_t column,
                             bool add) {
    constexpr int64_t CHUNK_WORDS = WIDE_WORDS / Wide::COUNT;
    const int64_t panel = first / PANEL, size = matrix.group_bytes();
    const int64_t step = matrix.panel_outputs(panel) * size;
    int32_t* inputs = wide_room().inputs;
    for (int64_t from = 0; from < matrix.groups(); from += CHUNK_WORDS) {
        const int64_t now = std::min(matrix.groups() - from, CHUNK_WORDS);
        widen_rows<Wide>(rows, count, from, now, inputs);
        for (int64_t piece = 0; piece < now; piece += PIECE_WORDS, add = true) {
            const int64_t words = std::min(now - piece, PIECE_WORDS);
            const char* data =
                matrix.panel(panel) + (from + piece) * step + (first - panel * PANEL) * size;
            // Each tile prefetches its part of the next piece.
            for (int64_t output = 0; output < outputs; output += WIDE_OUTPUTS)
                few_rows_tiles<Wide, VECTORS>(
                    count, inputs + piece * Wide::STEP, words, {data + output * size, step, size},
                    sums, column + output, add, data + (words * step + words * output * size));
        }
    }
}

}  // namespace moedial
