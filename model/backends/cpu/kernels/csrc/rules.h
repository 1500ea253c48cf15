// Applies a routing rule (`RoutingRule`) to one token's ranked scores: how many ranks must be
// known, how many of them run, and their weights. Sums run in the order of the ranks, so they do
// not depend on the experts' indices or on how many ranks are known.
#pragma once
#include <algorithm>
#include <cfloat>

#include "kernels.h"

namespace moedial {

// How scores become weights: score * mass / total. With `by_own` the total is the sum over the
// experts that run; it is computed later, because a rule that reuses experts adds some.
struct Normalisation {
    bool divides = false, by_own = false;
    float mass = 1, total = 0;
};

inline float sum_of(const float* values, int64_t count) {
    float total = 0;
    for (int64_t i = 0; i < count; i++) total += values[i];
    return total;
}

// The normaliser of a token with this count. From the trained count on it is the family's.
inline int64_t normaliser_at(const RoutingRule& rule, int64_t count, const Router& router) {
    return count < router.trained ? rule.normaliser : TRAINED;
}

// Whether the weights are scaled to the sum of the trained count's weights (which is 1 where the
// family normalises).
inline bool needs_mass(int64_t normaliser, const Router& router) {
    return !router.normalise && (normaliser == KEPT || normaliser > 0);
}

// How many ranks the choice and the weights depend on.
inline int64_t ranks_needed(const RoutingRule& rule, int64_t count, const Router& router) {
    const int64_t normaliser = normaliser_at(rule, count, router);
    const int64_t mass = needs_mass(normaliser, router) ? router.trained : 0;
    return std::max({rule.skip + count, normaliser, mass});
}

// How many of `count` experts run, best first: until a score is below `threshold` times the best
// one, or the scores before it sum to `top_p` of `all`, the sum over all experts.
inline int64_t own_count(const RoutingRule& rule, int64_t count, const float* scores, float all) {
    if (!rule.threshold && !rule.top_p) return count;
    const float least = float(rule.threshold) * scores[0], enough = float(rule.top_p) * all;
    float sum = scores[0];
    int64_t own = 1;
    while (own < count && scores[own] >= least && (!rule.top_p || sum < enough))
        sum += scores[own++];
    return own;
}

// The normalisation of the family.
inline Normalisation family_normalisation(const Router& router) {
    return {.divides = router.normalise, .by_own = true};
}

// The normalisation of a token with this rule and count.
inline Normalisation normalisation_of(const RoutingRule& rule, int64_t count, const Router& router,
                                      const float* scores) {
    const int64_t normaliser = normaliser_at(rule, count, router);
    if (normaliser == TRAINED) return family_normalisation(router);
    Normalisation how{.divides = normaliser != RAW, .by_own = normaliser == KEPT};
    if (needs_mass(normaliser, router)) how.mass = sum_of(scores, router.trained);
    if (normaliser > 0) how.total = sum_of(scores, normaliser);
    return how;
}

// Turns the scores of the experts that run into their weights. Scores that are all 0 stay 0 if the
// family does not normalise.
inline void weigh_row(const Normalisation& how, const Router& router, int64_t used, float* scores) {
    float divisor = 1;
    if (how.divides) {
        const float total = how.by_own ? sum_of(scores, used) : how.total;
        divisor = router.normalise ? router.divisor(total) : total < FLT_MIN ? FLT_MIN : total;
    }
    for (int64_t rank = 0; rank < used; rank++)
        scores[rank] = scores[rank] * how.mass / divisor * router.scale;
}

}  // namespace moedial
