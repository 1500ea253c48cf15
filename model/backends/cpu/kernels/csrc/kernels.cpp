// The entry points of `kernels.h`. Compiled once for each instruction set, into a library of its
// own: code that the compiler shares between libraries would otherwise carry instructions that
// another machine lacks.
#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "blocks.h"

namespace moedial {

const char* instruction_set() { return LANES == 16 ? "avx512" : LANES == 8 ? "avx2" : "portable"; }

void norm(const float* x, int64_t rows, int64_t width, const Norm& n, float* y) {
    parallel_rows(rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) norm_row(x + r * width, width, n, y + r * width);
    });
}

void embed(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t width,
           const Table& words, const Table& places, float* x) {
    const auto add = [&](const Table& table, int64_t at, float* y) {
        const float* floats = (const float*)table.data + at * width;
        const uint16_t* halves = (const uint16_t*)table.data + at * width;
        for (int64_t i = 0; i < width; i++)
            y[i] += table.kind == FLOAT ? floats[i] : from_bf16(halves[i]);
    };
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            std::memset(x + first * width, 0, (last - first) * width * 4);
            for (int64_t r = first; r < last; r++) {
                add(words, ids[r], x + r * width);
                if (places.data) add(places, positions[r], x + r * width);
            }
        },
        4 * rows * width);
}

void best(const float* x, int64_t rows, int64_t width, int64_t* y) {
    parallel_rows(
        rows, 1,
        [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) y[r] = best_of(x + r * width, width);
        },
        rows * width);
}

void constrain(const float* x, const float* raw, const int32_t* allowed, const int64_t* mask_of,
               int64_t rows, int64_t width, float* y) {
    const int64_t words = (width + 31) / 32;
    parallel_rows(
        rows, 1,
        [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++) {
                const int64_t at = r * width, mask = mask_of[r] * words;
                if (mask_of[r] < 0)
                    std::memcpy(y + at, x + at, width * 4);
                else if (!constrain_row(x + at, allowed + mask, width, y + at))
                    constrain_row(raw + at, allowed + mask, width, y + at);
            }
        },
        2 * rows * width);
}

void linear(const float* x, int64_t rows, int64_t width, const Norm& n, const Linear& layer,
            bool add, int64_t out, float* y) {
    linear_rows(encode_rows(x, rows, width, width, n, layer.weight), rows, layer, add, out, out, y);
}

void experts(const float* x, int64_t rows, int64_t width, const Calls& calls, const Experts& e,
             float* y) {
    run_experts(encode_rows(x, rows, width, width, {}, e.up), rows, width, calls, e, false, y);
}

}  // namespace moedial
