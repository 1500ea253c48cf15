// Routing of one token: the score of each expert, the value by which experts are ranked, and the
// best ones. Routing rules of requests are in `rules.h`, the tokens of a step in `topk.h`.
#pragma once
#include <algorithm>

#include "rows.h"

namespace moedial {

// Special values of `RankedExperts::order`: TAKEN for an expert that is chosen already or may not
// run, OUTSIDE for one outside the token's groups. Any other expert has at least LOWEST.
constexpr float TAKEN = -INFINITY, OUTSIDE = -3.0e38f, LOWEST = -2.9e38f;

// One token's experts: the score of each, which becomes its weight, and the value by which it is
// ranked. The padding of `order` is TAKEN.
struct RankedExperts {
    float *score, *order;  // [ranked_width(experts)]
};

// Experts, rounded up to whole vectors.
inline int64_t ranked_width(int64_t experts) { return (experts + 15) / 16 * 16; }

// The softmax of one row. Powers are relative to the highest logit, so that none overflows.
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

// The softmax over the allowed experts only; the others get 0.
inline void softmax_allowed(const float* logits, const uint8_t* allowed, int64_t count,
                            float* probabilities) {
    int64_t open = 0;
    for (int64_t i = 0; i < count; i++)
        if (allowed[i]) probabilities[open++] = logits[i];
    softmax_row(probabilities, open, probabilities);
    // From the end, so that none is overwritten before it is moved.
    for (int64_t i = count; i-- > 0;) probabilities[i] = allowed[i] ? probabilities[--open] : 0;
}

// 1 / (1 + e^-x) of each allowed expert, 0 of the others.
inline void sigmoid_row(const float* logits, const uint8_t* allowed, int64_t count, float* score) {
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) store(score + i, 1.0f / (exp(-load(logits + i)) + 1.0f));
    for (; i < count; i++) score[i] = 1.0f / (exp(splat(-logits[i]))[0] + 1.0f);
    for (i = 0; allowed && i < count; i++) score[i] = allowed[i] ? score[i] : 0;
}

// The index of the highest value, the lowest index where several are equal. No value may be NaN.
inline int64_t highest_of(const float* order, int64_t width) {
    Floats top = load(order);
    for (int64_t i = LANES; i < width; i += LANES) top = max(top, load(order + i));
    const float best = largest(top);
    int64_t index = 0;
    while (order[index] != best) index++;
    return index;
}

// Ranks the experts outside a token's best groups behind all others. `score`: scratch, a
// value for each group.
inline void keep_groups(const Router& router, float* order, float* score) {
    const int64_t groups = router.groups, size = router.experts / groups;
    const int64_t width = ranked_width(groups);
    std::fill(score + groups, score + width, TAKEN);
    for (int64_t group = 0; group < groups; group++) {
        float first = TAKEN, second = TAKEN;
        for (int64_t i = group * size; i < (group + 1) * size; i++) {
            const float value = order[i];
            if (value > first)
                second = first, first = value;
            else if (value > second)
                second = value;
        }
        score[group] = std::max(LOWEST, router.top2 ? first + second : first);
    }
    for (int64_t kept = 0; kept < router.kept_groups; kept++)
        score[highest_of(score, width)] = TAKEN;
    for (int64_t i = 0; i < router.experts; i++)
        if (score[i / size] != TAKEN && order[i] != TAKEN) order[i] = OUTSIDE;
}

// Writes the scores of a token's experts and the values by which they are ranked; NaN ranks last.
// `allowed`: which experts may run; null: all. `groups`: scratch, one value a group.
inline void rank_row(const float* logits, const uint8_t* allowed, const Router& router,
                     const RankedExperts& to, float* groups) {
    const int64_t count = router.experts;
    if (router.score == SIGMOID)
        sigmoid_row(logits, allowed, count, to.score);
    else if (router.score == SOFTMAX && allowed)
        softmax_allowed(logits, allowed, count, to.score);
    else if (router.score == SOFTMAX)
        softmax_row(logits, count, to.score);
    // The order of sigmoids is that of their logits, of which large ones do not become equal.
    const float* bias = router.selection_bias;
    const bool by_score = router.score == SOFTMAX || bias || router.groups > 1;
    const float* by = by_score ? to.score : logits;
    for (int64_t i = 0; i < count; i++) {
        const float value = bias ? by[i] + bias[i] : by[i];
        to.order[i] = allowed && !allowed[i] ? TAKEN : value > LOWEST ? value : LOWEST;
    }
    std::fill(to.order + count, to.order + ranked_width(count), TAKEN);
    if (router.groups > 1) keep_groups(router, to.order, groups);
}

// Writes the best `chosen` experts and their scores, and marks them TAKEN.
inline void take_best(const RankedExperts& row, int64_t experts, int64_t chosen, int32_t* index,
                      float* score) {
    for (int64_t rank = 0; rank < chosen; rank++) {
        const int64_t best = highest_of(row.order, ranked_width(experts));
        index[rank] = int32_t(best), score[rank] = row.score[best];
        row.order[best] = TAKEN;
    }
}

// The routing of Phi-3.5-MoE: the best expert's weight is its softmax probability among the experts
// that are not far below it. Then the same without that expert.
inline void sparse_mixer_row(const float* logits, const Router& router, const RankedExperts& row,
                             int64_t chosen, int32_t* index, float* weight) {
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
