// The entry points of `kernels.h`. Compiled once for each instruction set, into a library of its own: code that the
// compiler shares between libraries would otherwise carry instructions that another machine lacks.
#include "kernels.h"

#include <algorithm>
#include <new>

#include "blocks.h"

namespace moedial {

const char* instruction_set() { return LANES == 16 ? "avx512" : LANES == 8 ? "avx2" : "portable"; }

void norm(const float* x, int64_t rows, int64_t width, const Norm& n, float* y) {
    parallel_rows(rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) norm_row(x + r * width, width, n, y + r * width);
    });
}

void linear(const float* x, int64_t rows, int64_t width, const Norm& n, const Linear& layer, bool add, int64_t out, float* y) {
    linear_rows(encode_rows(x, rows, width, width, n, layer.weight), rows, layer, add, out, out, y);
}

void experts(const float* x, int64_t rows, int64_t width, const Calls& calls, const Experts& e, float* y) {
    run_experts(encode_rows(x, rows, width, width, {}, e.up), rows, width, calls, e, false, y);
}

}  // namespace moedial
