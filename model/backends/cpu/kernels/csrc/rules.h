// What a routing rule (`RoutingRule`) makes of one token's ranked scores: how many ranks must be
// known, how many of them run, and their weights. Sums run in the order of the ranks: they depend
// neither on the experts' numbers nor on how many ranks are known.
#pragma once
#include <algorithm>
#include <cfloat>

#include "kernels.h"

namespace moedial {

// What a token's scores are multiplied and divided by: p * mass / total. The total of those that
// run is not known yet where the step's other tokens decide it.
struct Share {
    bool divides = false, by_own = false;  // by_own: the total is that of those that run
    float mass = 1, total = 0;
};

inline float sum_of(const float* values, int64_t count) {
    float total = 0;
    for (int64_t i = 0; i < count; i++) total += values[i];
    return total;
}

// The normaliser of a token with this count: from the trained one on it is the family's.
inline int64_t normaliser_at(const RoutingRule& rule, int64_t count, const Router& router) {
    return count < router.trained ? rule.normaliser : TRAINED;
}

// Whether weights are brought to the sum that the trained count's have, where that is not 1.
inline bool needs_mass(int64_t normaliser, const Router& router) {
    return !router.normalise && (normaliser == KEPT || normaliser > 0);
}

// The ranks that choice and weights depend on.
inline int64_t ranks_needed(const RoutingRule& rule, int64_t count, const Router& router) {
    const int64_t normaliser = normaliser_at(rule, count, router);
    const int64_t mass = needs_mass(normaliser, router) ? router.trained : 0;
    return std::max({rule.skip + count, normaliser, mass});
}

// How many of `count` experts run, the best first: as long as none is too far below the best one,
// and those before it lack their share of `all`, the scores of all experts together.
inline int64_t own_count(const RoutingRule& rule, int64_t count, const float* scores, float all) {
    if (!rule.threshold && !rule.top_p) return count;
    const float least = float(rule.threshold) * scores[0], share = float(rule.top_p) * all;
    float sum = scores[0];
    int64_t own = 1;
    while (own < count && scores[own] >= least && (!rule.top_p || sum < share))
        sum += scores[own++];
    return own;
}

// The share of a token whose weights are the family's.
inline Share family_share(const Router& router) {
    return {.divides = router.normalise, .by_own = true};
}

// The share of a token with this count.
inline Share share_of(const RoutingRule& rule, int64_t count, const Router& router,
                      const float* scores) {
    const int64_t normaliser = normaliser_at(rule, count, router);
    if (normaliser == TRAINED) return family_share(router);
    Share share{.divides = normaliser != RAW, .by_own = normaliser == KEPT};
    if (needs_mass(normaliser, router)) share.mass = sum_of(scores, router.trained);
    if (normaliser > 0) share.total = sum_of(scores, normaliser);
    return share;
}

// Scores of the experts that run become their weights. Where all scores are 0 they stay so, if the
// family does not normalise.
inline void weigh_row(const Share& share, const Router& router, int64_t used, float* scores) {
    float divisor = 1;
    if (share.divides) {
        const float total = share.by_own ? sum_of(scores, used) : share.total;
        divisor = router.normalise ? router.divisor(total) : total < FLT_MIN ? FLT_MIN : total;
    }
    for (int64_t rank = 0; rank < used; rank++)
        scores[rank] = scores[rank] * share.mass / divisor * router.scale;
}

}  // namespace moedial
