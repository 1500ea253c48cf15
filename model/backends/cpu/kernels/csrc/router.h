// A router's choice for one token: what each expert is worth to it, the order of the experts, and
// the first of them. What rules of requests make of it is in `rules.h`, all tokens of a step are
// in `topk.h`.
#pragma once
#include <algorithm>

#include "rows.h"

namespace moedial {

// Values of `Ranked::order`, from the lowest: experts that are taken already or may not run, those
// outside the token's groups, and all others.
constexpr float TAKEN = -INFINITY, OUTSIDE = -3.0e38f, LEAST = -2.9e38f;

// One token's experts: what each is worth, and by what it is ranked; TAKEN behind the last one.
struct Ranked {
    float *worth, *order;  // [ranked_width(experts)]
};

// Whole vectors.
inline int64_t ranked_width(int64_t experts) { return (experts + 15) / 16 * 16; }

// Relative to the highest logit, so that no power overflows.
inline void softmax_row(const float* logits, int64_t count, float* probabilities) {
    float highest = logits[0], total = 0;
    for (int64_t i = 1; i < count; i++) highest = logits[i] > highest ? logits[i] : highest;
    int64_t i = 0;
    Floats totals{};
    for (; i + LANES <= count; i += LANES) {
        const Floats powers = exp(load(logits + i) - highest);
        store(probabilities + i, powers), totals += powers;
    }
    total = sum(totals);
    for (; i < count; i++) total += probabilities[i] = exp(splat(logits[i] - highest))[0];
    for (i = 0; i < count; i++) probabilities[i] /= total;
}

// The same over the allowed ones alone, as if there were no others; those get 0.
inline void softmax_allowed(const float* logits, const uint8_t* allowed, int64_t count,
                            float* probabilities) {
    int64_t open = 0;
    for (int64_t i = 0; i < count; i++)
        if (allowed[i]) probabilities[open++] = logits[i];
    softmax_row(probabilities, open, probabilities);
    // From the end, so that none is overwritten before it is moved.
    for (int64_t i = count; i-- > 0;) probabilities[i] = allowed[i] ? probabilities[--open] : 0;
}

// 1 / (1 + e^-x) of each allowed one, 0 of the others.
inline void sigmoid_row(const float* logits, const uint8_t* allowed, int64_t count, float* worth) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(worth + i, 1.0f / (exp(-load(logits + i)) + 1.0f));
    for (; i < count; i++) worth[i] = 1.0f / (exp(splat(-logits[i]))[0] + 1.0f);
    for (i = 0; allowed && i < count; i++) worth[i] = allowed[i] ? worth[i] : 0;
}

// The index of the highest value, of equals the lowest; there is no NaN.
inline int64_t highest_of(const float* order, int64_t width) {
    Floats top = load(order);
    for (int64_t i = LANES; i < width; i += LANES) top = max(top, load(order + i));
    const float best = largest(top);
    int64_t index = 0;
    while (order[index] != best) index++;
    return index;
}

// Ranks the experts outside a token's best groups behind all others. `worth`: room for each group.
inline void keep_groups(const Router& router, float* order, float* worth) {
    const int64_t groups = router.groups, size = router.experts / groups;
    const int64_t width = ranked_width(groups);
    std::fill(worth + groups, worth + width, TAKEN);
    for (int64_t group = 0; group < groups; group++) {
        float first = TAKEN, second = TAKEN;
        for (int64_t i = group * size; i < (group + 1) * size; i++) {
            const float value = order[i];
            if (value > first)
                second = first, first = value;
            else if (value > second)
                second = value;
        }
        worth[group] = std::max(LEAST, router.top2 ? first + second : first);
    }
    for (int64_t kept = 0; kept < router.kept_groups; kept++)
        worth[highest_of(worth, width)] = TAKEN;
    for (int64_t i = 0; i < router.experts; i++)
        if (worth[i / size] != TAKEN && order[i] != TAKEN) order[i] = OUTSIDE;
}

// What a token's experts are worth and by what they are ranked. What is not a number comes last.
// `allowed`: which may run; none: all. `groups`: room for each group.
inline void rank_row(const float* logits, const uint8_t* allowed, const Router& router,
                     const Ranked& to, float* groups) {
    const int64_t count = router.experts;
    if (router.score == SIGMOID)
        sigmoid_row(logits, allowed, count, to.worth);
    else if (router.score == SOFTMAX && allowed)
        softmax_allowed(logits, allowed, count, to.worth);
    else if (router.score == SOFTMAX)
        softmax_row(logits, count, to.worth);
    // The order of sigmoids is that of their logits, of which large ones do not become equal.
    const float* bias = router.selection_bias;
    const bool by_worth = router.score == SOFTMAX || bias || router.groups > 1;
    const float* by = by_worth ? to.worth : logits;
    for (int64_t i = 0; i < count; i++) {
        const float value = bias ? by[i] + bias[i] : by[i];
        to.order[i] = allowed && !allowed[i] ? TAKEN : value > LEAST ? value : LEAST;
    }
    std::fill(to.order + count, to.order + ranked_width(count), TAKEN);
    if (router.groups > 1) keep_groups(router, to.order, groups);
}

// The first `chosen` experts and what they are worth; they are taken then.
inline void best_row(const Ranked& row, int64_t experts, int64_t chosen, int32_t* index,
                     float* worth) {
    for (int64_t rank = 0; rank < chosen; rank++) {
        const int64_t best = highest_of(row.order, ranked_width(experts));
        index[rank] = int32_t(best), worth[rank] = row.worth[best];
        row.order[best] = TAKEN;
    }
}

// The sparse mixer's choice (Phi-3.5-MoE): the best expert weighs its softmax share among those
// not far below it; then the same again without it.
inline void mix_row(const float* logits, const Router& router, const Ranked& row, int64_t chosen,
                    int32_t* index, float* weight) {
    for (int64_t rank = 0; rank < chosen; rank++) {
        const int64_t best = highest_of(row.order, ranked_width(router.experts));
        const float top = row.order[best];
        float total = 0;
        for (int64_t i = 0; i < router.experts; i++) {
            const float size = std::max(top, std::fabs(logits[i]));
            const bool far = (top - logits[i]) / size > 2 * router.jitter;
            if (row.order[i] != TAKEN && !far) total += exp(splat(row.order[i] - top))[0];
        }
        index[rank] = int32_t(best), weight[rank] = 1 / total;
        row.order[best] = TAKEN;
    }
}

}  // namespace moedial
