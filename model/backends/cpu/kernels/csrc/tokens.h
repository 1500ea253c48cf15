// Draws one token from a row of logits: from the whole vocabulary, or with top-k, top-p or min-p
// from the best tokens. Weights are relative to the best token's weight. The result depends on the
// row and its settings only. No threads.
#pragma once
#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "vec.h"

namespace moedial {

// One row of logits, whose highest value must be finite, with its sampling settings.
class TokenRow {
  public:
    TokenRow(const float* row, int64_t count, const TokenRule& how)
        : logits(row),
          width(count),
          rule(how),
          temperature(float(std::clamp(how.temperature, 1e-30, 1e30))) {
        Floats highest = splat(-INFINITY);
        for (int64_t i = 0; i < width; i += LANES) highest = max(highest, values_at(i));
        best = largest(highest);
    }

    // Draws a token by inverting the cumulative distribution.
    int64_t draw() const {
        const bool cuts = rule.top_k < width || rule.top_p < 1 || rule.min_p > 0;
        return cuts ? draw_from_best() : draw_from_all();
    }

  private:
    static constexpr int64_t SPAN =
        128;  // tokens whose weights are summed together before one of them is searched
    static constexpr int64_t RANGES = 1024, RANGES_PER_NAT = 32;

    // One token of a range of logits.
    struct Candidate {
        float logit, weight;
        int64_t token;
    };

    // The tokens in ranges of their logits, the best range first: how many each range has, and the
    // sum of their weights. Every token of a range is better than every token of the next.
    struct Ranges {
        double mass[RANGES] = {};
        int64_t count[RANGES] = {};
        int64_t above_min_p = 0;  // tokens whose weight is at least min-p
    };

    // LANES logits from `first` on, -inf for NaN and beyond the last token: those have no weight.
    Floats values_at(int64_t first) const {
        Floats values = splat(-INFINITY);
        if (first + LANES <= width)
            values = load(logits + first);
        else
            std::memcpy(&values, logits + first, (width - first) * 4);
        return select(values == values, values, splat(-INFINITY));
    }

    Floats weights(Floats values) const { return exp((values - best) / temperature); }

    // The range of each logit. The last range takes all logits below the others. A lower logit
    // never gets a better range, whatever is rounded.
    Ints ranges(Floats values) const {
        const Floats below = (best - values) * (float(RANGES_PER_NAT) / temperature);
        return __builtin_convertvector(min(below, splat(float(RANGES - 1))), Ints);
    }

    // Draws in the order of the vocabulary: finds the span of tokens that the random number falls
    // into, then the token in it. A token without weight is never drawn, whatever is rounded.
    int64_t draw_from_all() const {
        static thread_local std::vector<double> sums;
        sums.clear();
        double total = 0;
        for (int64_t first = 0; first < width; first += SPAN) {
            Floats span{};
            for (int64_t i = first; i < std::min(first + SPAN, width); i += LANES)
                span += weights(values_at(i));
            sums.push_back(sum(span)), total += sums.back();
        }
        const double target = rule.u * total;
        double before = 0;  // of the last span that has weight and begins at or below the target
        int64_t found = 0;
        double here = 0;
        for (int64_t span = 0; span < int64_t(sums.size()) && here <= target; span++) {
            if (sums[span] > 0) found = span, before = here;
            here += sums[span];
        }
        int64_t token = 0;
        here = before;
        for (int64_t first = found * SPAN; first < std::min((found + 1) * SPAN, width);
             first += LANES) {
            const Floats weight = weights(values_at(first));
            for (int lane = 0; lane < LANES; lane++) {
                if (!(weight[lane] > 0)) continue;
                token = first + lane, here += weight[lane];
                if (here > target) return token;
            }
        }
        return token;
    }

    Ranges count_ranges() const {
        Ranges found;
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats values = values_at(i), weight = weights(values);
            const Ints range = ranges(values);
            for (int64_t lane = 0; lane < std::min<int64_t>(LANES, width - i); lane++) {
                found.mass[range[lane]] += weight[lane], found.count[range[lane]]++;
                found.above_min_p += weight[lane] >= rule.min_p;
            }
        }
        return found;
    }

    // The best `count` tokens of a range, best first (the lower id of equal ones). At low
    // temperatures most of a vocabulary is in the last range, so only `count` tokens are sorted.
    const std::vector<Candidate>& candidates(int64_t range, int64_t count) const {
        static thread_local std::vector<Candidate> found;
        found.clear();
        for (int64_t i = 0; i < width; i += LANES) {
            const Floats values = values_at(i);
            const Ints here = ranges(values) == int32_t(range);
            int64_t pairs[LANES / 2], any = 0;  // most vectors have none
            std::memcpy(pairs, &here, sizeof(here));
            for (const int64_t pair : pairs) any |= pair;
            if (!any) continue;
            const Floats weight = weights(values);
            for (int64_t lane = 0; lane < std::min<int64_t>(LANES, width - i); lane++)
                if (here[lane]) found.push_back({values[lane], weight[lane], i + lane});
        }
        const auto better = [](const Candidate& one, const Candidate& other) {
            return one.logit != other.logit ? one.logit > other.logit : one.token < other.token;
        };
        const auto end = found.begin() + std::min(count, int64_t(found.size()));
        std::nth_element(found.begin(), end, found.end(), better);
        std::sort(found.begin(), end, better);
        found.erase(end, found.end());
        return found;
    }

    // The weight of the best `ranks` tokens.
    double mass_of(const Ranges& all, int64_t ranks) const {
        double mass = 0;
        int64_t range = 0;
        for (; range < RANGES && all.count[range] <= ranks; range++)
            mass += all.mass[range], ranks -= all.count[range];
        if (ranks == 0) return mass;
        for (const Candidate& candidate : candidates(range, ranks)) mass += candidate.weight;
        return mass;
    }

    // How many of the best tokens it takes until their weight is at least `share`.
    int64_t ranks_for(const Ranges& all, double share) const {
        double mass = 0;
        int64_t ranks = 0, range = 0;
        for (; range < RANGES && mass + all.mass[range] < share; range++)
            mass += all.mass[range], ranks += all.count[range];
        if (range == RANGES) return ranks;
        for (const Candidate& candidate : candidates(range, all.count[range])) {
            if (mass >= share) break;
            mass += candidate.weight, ranks++;
        }
        return ranks;
    }

    // Draws from the best tokens. Top-k applies first, then top-p and min-p to the rest.
    int64_t draw_from_best() const {
        const Ranges all = count_ranges();
        const int64_t most = std::min(rule.top_k, width);
        const double mass = mass_of(all, most);
        int64_t ranks = std::min(most, all.above_min_p);
        if (rule.top_p < 1) ranks = std::min(ranks, ranks_for(all, rule.top_p * mass));
        ranks = std::max<int64_t>(1, ranks);
        const double target = rule.u * (ranks == most ? mass : mass_of(all, ranks));
        double here = 0, before = 0;
        int64_t found = 0, left = ranks, left_there = ranks;
        for (int64_t range = 0; left > 0 && here <= target; range++) {
            if (all.mass[range] > 0) found = range, before = here, left_there = left;
            here += all.mass[range], left -= all.count[range];
        }
        int64_t token = 0;
        here = before;
        for (const Candidate& candidate : candidates(found, left_there)) {
            if (here > target) break;
            if (candidate.weight > 0) token = candidate.token, here += candidate.weight;
        }
        return token;
    }

    const float* logits;
    int64_t width;
    const TokenRule& rule;
    float temperature, best;  // best: the highest logit
};

}  // namespace moedial
