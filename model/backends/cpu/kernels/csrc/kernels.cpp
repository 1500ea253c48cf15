// The entry points of `kernels.h`: the larger ones are defined in the headers under `blocks.h`
// and in `delta.h`, which no other file includes. Compiled once for each instruction set, into a
// library of its own: code that the compiler shares between libraries would otherwise carry
// instructions that another machine lacks. The other files are compiled once, for any processor.
#include "kernels.h"

#include <algorithm>
#include <cstring>

#include "delta.h"
#include "latent.h"
#include "quantiser.h"
#include "tokens.h"

namespace moedial {

const char* instruction_set() { return INSTRUCTION_SET; }

void norm(const float* x, int64_t rows, int64_t width, const Norm& layer, float* y) {
    parallel_rows(rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            norm_row(x + row * width, width, layer, y + row * width);
    });
}

void embed(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t width,
           const Table& embeddings, float scale, const Table& position_embeddings, float* x) {
    const auto add = [&](const Table& table, int64_t index, float factor, float* y) {
        // Only one of the two is read.
        const float* floats = (const float*)table.data + index * width;
        const uint16_t* halves = (const uint16_t*)table.data + index * width;
        for (int64_t i = 0; i < width; i++)
            y[i] += factor * (table.kind == FLOAT ? floats[i] : from_bf16(halves[i]));
    };
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            std::memset(x + first * width, 0, (last - first) * width * 4);
            for (int64_t row = first; row < last; row++) {
                add(embeddings, ids[row], scale, x + row * width);
                if (position_embeddings.data)
                    add(position_embeddings, positions[row], 1, x + row * width);
            }
        },
        4 * rows * width);
}

void argmax(const float* x, int64_t rows, int64_t width, int64_t* y) {
    parallel_rows(
        rows, 1,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                y[row] = argmax_row(x + row * width, width);
        },
        rows * width);
}

void constrain(const float* x, const float* raw, const int32_t* allowed, const int64_t* mask_of,
               int64_t rows, int64_t width, float* y) {
    const int64_t words = (width + 31) / 32;  // of one mask
    parallel_rows(
        rows, 1,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                const int64_t at = row * width;
                if (mask_of[row] < 0) {
                    std::memcpy(y + at, x + at, width * 4);
                    continue;
                }
                const int32_t* mask = allowed + mask_of[row] * words;
                // A row that its mask leaves without a finite value is made again from `raw`.
                if (!constrain_row(x + at, mask, width, y + at))
                    constrain_row(raw + at, mask, width, y + at);
            }
        },
        2 * rows * width);
}

void draw_tokens(const float* logits, int64_t width, const int64_t* rows, const TokenRule* rules,
                 int64_t count, int64_t* tokens) {
    parallel_rows(
        count, 1,
        [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                tokens[i] = TokenRow(logits + rows[i] * width, width, rules[i]).draw();
        },
        8 * count * width);
}

void linear(const float* x, int64_t rows, int64_t width, const Norm& norm, const Linear& layer,
            bool add, int64_t outputs, float* y) {
    const Inputs in = encode_rows(x, rows, width, width, norm, layer.weight);
    linear_rows(in, rows, layer, add, outputs, outputs, y);
}

void experts(const float* x, int64_t rows, int64_t width, const RoutedPairs& pairs,
             const Experts& layer, float* y) {
    const Inputs in = encode_rows(x, rows, width, width, {}, layer.up);
    run_experts(in, pairs, layer, {.y = y, .rows = rows, .width = width, .add = false});
}

}  // namespace moedial
