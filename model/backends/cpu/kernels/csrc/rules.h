// What a routing rule (`RoutingRule`) makes of one token's ranked probabilities: how many ranks
// must be known, how many of them run, and their weights. Sums run in falling order: they depend
// neither on the experts' numbers nor on how many ranks are known.
#pragma once
#include <algorithm>

#include "kernels.h"

namespace moedial {

// What a token's probabilities are multiplied and divided by: p * mass / total.
struct Share {
    float mass = 1, total = 1;
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
// and those before it lack their share.
inline int64_t own_count(const RoutingRule& rule, int64_t count, const float* probabilities) {
    if (!rule.threshold && !rule.top_p) return count;
    const float least = float(rule.threshold) * probabilities[0], share = float(rule.top_p);
    float sum = probabilities[0];
    int64_t own = 1;
    while (own < count && probabilities[own] >= least && (!share || sum < share))
        sum += probabilities[own++];
    return own;
}

// The share of a token with this count; a total of 0 stands for the sum of those that run, which is
// not known yet where the step's other tokens decide it.
inline Share share_of(const RoutingRule& rule, int64_t count, const Router& router,
                      const float* probabilities) {
    const int64_t normaliser = normaliser_at(rule, count, router);
    Share share;
    if (needs_mass(normaliser, router)) share.mass = sum_of(probabilities, router.trained);
    if (normaliser > 0)
        share.total = sum_of(probabilities, normaliser);
    else if (normaliser == KEPT || (normaliser == TRAINED && router.normalise))
        share.total = 0;
    return share;
}

// Probabilities of the experts that run become their weights.
inline void weigh_row(Share share, int64_t used, float* probabilities) {
    const float total = share.total == 0 ? sum_of(probabilities, used) : share.total;
    for (int64_t rank = 0; rank < used; rank++)
        probabilities[rank] = probabilities[rank] * share.mass / total;
}

}  // namespace moedial
