// Products of a few rows where the processor has no instruction for what is stored: inputs are
// widened once, as in `widened.h`, weights where they are multiplied, since reading them from
// memory takes as long. The sums are those of the products in `gemm.h`, in the same order.
#pragma once
#include "widened.h"

namespace moedial {

// Words of one output that all tiles take before the next ones: 8 KB of a panel, which stay in the
// first-level cache.
constexpr int64_t PIECE_WORDS = 32;

// Unfinished sums of at most ROWS rows and a slice that does not cross a panel, as `product` of
// gemm.h makes them.
template <class Wide>
inline void few_rows_product(const int32_t* const* rows, int64_t count, const Matrix& matrix,
                             int64_t first, int64_t outputs, int32_t* const* sums, int64_t column,
                             bool add) {
    constexpr int64_t CHUNK_WORDS = WIDE_WORDS / Wide::COUNT;
    const int64_t panel = first / PANEL, size = Wide::SIZE;
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
                with_constant<ROWS>(count, [&]<int height>() {
                    wide_tile<Wide, height, VECTORS>(
                        inputs + piece * Wide::STEP, words,
                        StoredWords<Wide, 3>{{data + output * size, step}}, sums, column + output,
                        add,
                        Ahead{data + (words * step + words * output * size), WIDE_OUTPUTS * size});
                });
        }
    }
}

}  // namespace moedial
