// The ops of the sampler, on logits: argmax, grammar masks, and drawing a token.
#pragma once
#include <torch/library.h>

#include <vector>

#include "checks.h"

namespace moedial {

// The index of the highest logit of each row (the lowest index where several are equal), or -1 if
// a logit of the row is not finite.
inline Tensor argmax_op(const Tensor& logits) {
    const float* in = floats(logits, "logits");
    const int64_t rows = logits.size(0), width = logits.size(1);
    TORCH_CHECK(width > 0, "there must be logits to choose from");
    Tensor y = at::empty({rows}, at::kLong);
    Op op;
    argmax(in, rows, width, y.data_ptr<int64_t>());
    return y;
}

// Logits with -inf at the tokens that a row's mask forbids. `mask_of`: each row's mask in `allowed`
// [masks, words of 32 bits], -1 for none.
inline Tensor constrain_op(const Tensor& logits, const Tensor& raw, const Tensor& allowed,
                           const Tensor& mask_of) {
    const float *in = floats(logits, "logits"), *before = floats(raw, "raw");
    const int32_t* bits = data<const int32_t>(allowed, "allowed");
    const int64_t* row_masks = data<const int64_t>(mask_of, "mask_of");
    const int64_t rows = logits.size(0), width = logits.size(1);
    TORCH_CHECK(raw.sizes() == logits.sizes() && mask_of.numel() == rows && allowed.dim() == 2 &&
                    allowed.size(1) == (width + 31) / 32,
                "constrain: shapes do not fit");
    for (int64_t row = 0; row < rows; row++)
        TORCH_CHECK(-1 <= row_masks[row] && row_masks[row] < allowed.size(0), "row ", row,
                    " has mask ", row_masks[row], " of ", allowed.size(0));
    Tensor y = like(logits, {rows, width});
    Op op;
    constrain(in, before, bits, row_masks, rows, width, y.data_ptr<float>());
    return y;
}

// Draws one token for each of `rows` (indices of rows of the logits, whose highest value must be
// finite). rules [R, 5] in float64: temperature, top-k, top-p, min-p, and a random number in [0,
// 1).
inline Tensor draw_tokens_op(const Tensor& logits, const Tensor& rows, const Tensor& rules) {
    const float* in = floats(logits, "logits");
    const int64_t* of = data<const int64_t>(rows, "rows");
    const double* values = data<const double>(rules, "rules");
    const int64_t count = rows.numel(), width = logits.size(1);
    TORCH_CHECK(rules.dim() == 2 && rules.size(0) == count && rules.size(1) == 5, "rules must be [",
                count, ", 5], got ", rules.sizes());
    TORCH_CHECK(width > 0 && width <= INT32_MAX, "there cannot be ", width, " logits in a row");
    std::vector<TokenRule> each;
    for (int64_t i = 0; i < count; i++, values += 5) {
        TORCH_CHECK(0 <= of[i] && of[i] < logits.size(0), "row ", of[i], " is not one of ",
                    logits.size(0));
        TORCH_CHECK(values[0] > 0 && 1 <= values[1] && values[1] <= 0x1p53 && 0 <= values[2] &&
                        0 <= values[3] && 0 <= values[4] && values[4] < 1,
                    "nothing is drawn with ", values[0], ", ", values[1], ", ", values[2], ", ",
                    values[3], ", ", values[4]);
        each.push_back({values[0], int64_t(values[1]), values[2], values[3], values[4]});
    }
    Tensor y = at::empty({count}, at::kLong);
    Op op;
    draw_tokens(in, width, of, each.data(), count, y.data_ptr<int64_t>());
    return y;
}

inline void define_sampling_ops(torch::Library& library) {
    library.def("argmax(Tensor logits) -> Tensor");
    library.def("constrain(Tensor logits, Tensor raw, Tensor allowed, Tensor mask_of) -> Tensor");
    library.def("draw_tokens(Tensor logits, Tensor rows, Tensor rules) -> Tensor");
}

inline void implement_sampling_ops(torch::Library& library) {
    library.impl("argmax", &argmax_op);
    library.impl("constrain", &constrain_op);
    library.impl("draw_tokens", &draw_tokens_op);
}

}  // namespace moedial
