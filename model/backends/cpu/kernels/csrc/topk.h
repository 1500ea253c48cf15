// Sparse top-k: softmax over the router's logits, each token's own number of best experts, or what
// its rule makes of it (`rules.h`), the pairs sorted by expert.
#pragma once
#include "experts.h"
#include "rules.h"

namespace moedial {

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

// The same over the allowed ones alone; for the others -1, which is below every probability.
inline void softmax_allowed(const float* logits, const uint8_t* allowed, int64_t count,
                            float* probabilities) {
    int64_t open = 0;
    for (int64_t i = 0; i < count; i++)
        if (allowed[i]) probabilities[open++] = logits[i];
    softmax_row(probabilities, open, probabilities);
    // From the end, so that none is overwritten before it is moved.
    for (int64_t i = count; i-- > 0;) probabilities[i] = allowed[i] ? probabilities[--open] : -1;
}

// The `chosen` best probabilities in falling order; of equals the lower index first; what is not a
// number comes last. Overwrites what it has taken.
inline void best_row(float* probabilities, int64_t count, int64_t chosen, int32_t* index,
                     float* value) {
    for (int64_t rank = 0; rank < chosen; rank++) {
        int64_t best = 0;
        for (int64_t i = 1; i < count; i++) {
            const float other = probabilities[i];
            best = !(other <= probabilities[best]) && other == other ? i : best;
        }
        index[rank] = int32_t(best);
        value[rank] = probabilities[best];
        probabilities[best] = -1;  // below every probability
    }
}

// The experts that each token runs, best first.
struct Chosen {
    int32_t* expert;      // [tokens, ranks]
    float* weight;        // [tokens, ranks]
    const int64_t* used;  // [tokens]: how many of the ranks
    int64_t ranks;
};

// Counting sort of the pairs by expert; within an expert by token.
inline void sort_pairs(const Chosen& chosen, int64_t tokens, int64_t experts, const PairsOut& out) {
    const int64_t ranks = chosen.ranks;
    std::memset(out.ends, 0, experts * 8);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t rank = 0; rank < chosen.used[token]; rank++)
            out.ends[chosen.expert[token * ranks + rank]]++;
    int64_t start = 0;
    // First where each begins; the fill below moves it to where it ends.
    for (int64_t one = 0; one < experts; one++) {
        const int64_t size = out.ends[one];
        out.ends[one] = start, start += size;
    }
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t rank = 0; rank < chosen.used[token]; rank++) {
            const int64_t pair = out.ends[chosen.expert[token * ranks + rank]]++;
            out.token[pair] = int32_t(token);
            out.weight[pair] = chosen.weight[token * ranks + rank];
        }
}

// Calls rank(row, probabilities) for every token; `ranks`: about how many each one wants. Returns
// the room of the probabilities, [tokens, experts].
template <class Rank>
inline float* rank_rows(const float* logits, int64_t stride, const LayerRows& budget, int64_t ranks,
                        int64_t experts, Rank&& rank) {
    const int64_t tokens = budget.tokens;
    float* room = scratch().take<float>(tokens * experts);
    parallel_rows(
        tokens, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                float* probabilities = room + row * experts;
                if (const uint8_t* allowed = budget.allowed_of(row))
                    softmax_allowed(logits + row * stride, allowed, experts, probabilities);
                else
                    softmax_row(logits + row * stride, experts, probabilities);
                rank(row, probabilities);
            }
        },
        tokens * ranks * experts);
    return room;
}

// Every token's count of experts, weighted as the family does.
inline Chosen choose(const float* logits, int64_t stride, const LayerRows& budget,
                     const Router& router) {
    const int64_t k_max = budget.k_max;
    const Chosen chosen{scratch().take<int32_t>(budget.tokens * k_max),
                        scratch().take<float>(budget.tokens * k_max), budget.counts, k_max};
    const auto rank = [&](int64_t row, float* probabilities) {
        float* weights = chosen.weight + row * k_max;
        const int64_t count = budget.counts[row];
        best_row(probabilities, router.experts, count, chosen.expert + row * k_max, weights);
        if (!router.normalise) return;
        const float total = sum_of(weights, count);
        for (int64_t rank = 0; rank < count; rank++) weights[rank] /= total;
    };
    rank_rows(logits, stride, budget, k_max, router.experts, rank);
    return chosen;
}

// Lets tokens whose rule reuses add the best of the experts that some token of the step runs.
// `known`: how many ranks each one has, without those that it skips; `used`: what it runs of its
// own, then altogether; probabilities [tokens, experts], -1 where an expert is ranked or skipped.
inline void reuse_experts(const Chosen& chosen, const LayerRows& budget, int64_t experts,
                          float* probabilities, const int64_t* known, int64_t* used) {
    char* runs = scratch().take<char>(experts);
    std::memset(runs, 0, experts);
    for (int64_t row = 0; row < budget.tokens; row++)
        for (int64_t rank = 0; rank < used[row]; rank++)
            runs[chosen.expert[row * chosen.ranks + rank]] = 1;
    for (int64_t row = 0; row < budget.tokens; row++) {
        const int64_t own = used[row], reuse = budget.rule(row).reuse;
        if (reuse == 0) continue;
        float *open = probabilities + row * experts, *weight = chosen.weight + row * chosen.ranks;
        int32_t* expert = chosen.expert + row * chosen.ranks;
        // Of what may have been ranked before, only the token's own stay taken.
        for (int64_t rank = own; rank < known[row]; rank++) open[expert[rank]] = weight[rank];
        for (int64_t one = 0; one < experts; one++)
            if (!runs[one]) open[one] = -1;
        const int64_t added = std::min(reuse, experts - std::count(open, open + experts, -1.0f));
        best_row(open, experts, added, expert + own, weight + own);
        used[row] = own + added;
    }
}

// The same where tokens have rules: how many run may depend on the token, or on the whole step.
inline Chosen choose_by_rules(const float* logits, int64_t stride, const LayerRows& budget,
                              const Router& router) {
    const int64_t tokens = budget.tokens;
    int64_t* used = scratch().take<int64_t>(tokens);
    int64_t* known = scratch().take<int64_t>(tokens);  // ranks
    Share* shares = scratch().take<Share>(tokens);
    int64_t ranks = 0;
    for (int64_t row = 0; row < tokens; row++) {
        known[row] = ranks_needed(budget.rule(row), budget.counts[row], router);
        ranks = std::max({ranks, known[row], budget.most_pairs_of(row, router.experts)});
    }
    const Chosen chosen{scratch().take<int32_t>(tokens * ranks),
                        scratch().take<float>(tokens * ranks), used, ranks};
    const auto rank = [&](int64_t row, float* probabilities) {
        const RoutingRule& rule = budget.rule(row);
        const int64_t count = budget.counts[row];
        int32_t* expert = chosen.expert + row * ranks;
        float* weights = chosen.weight + row * ranks;  // probabilities until `weigh_row`
        best_row(probabilities, router.experts, known[row], expert, weights);
        shares[row] = share_of(rule, count, router, weights);
        std::copy(expert + rule.skip, expert + known[row], expert);
        std::copy(weights + rule.skip, weights + known[row], weights);
        known[row] -= rule.skip;
        used[row] = own_count(rule, count, weights);
    };
    float* probabilities = rank_rows(logits, stride, budget, ranks, router.experts, rank);
    if (budget.any_rule([](const RoutingRule& rule) { return rule.reuse > 0; }))
        reuse_experts(chosen, budget, router.experts, probabilities, known, used);
    for (int64_t row = 0; row < tokens; row++)
        weigh_row(shares[row], used[row], chosen.weight + row * ranks);
    return chosen;
}

// What each token ran, as far as it is wanted.
inline void tell(const Chosen& chosen, int64_t tokens, const LayerReport& report) {
    if (report.used) std::copy_n(chosen.used, tokens, report.used);
    if (!report.routes) return;
    for (int64_t token = 0; token < tokens; token++) {
        int32_t* routes = report.routes + token * report.route_width;
        const int64_t used = chosen.used[token];
        std::copy_n(chosen.expert + token * chosen.ranks, used, routes);
        std::fill(routes + used, routes + report.route_width, -1);
    }
}

// Each token's best experts, weighted by their probabilities, as pairs sorted by expert.
void route(const float* logits, int64_t stride, const LayerRows& budget, const Router& router,
           const PairsOut& out, const LayerReport& report) {
    const Chosen chosen = budget.rules ? choose_by_rules(logits, stride, budget, router)
                                       : choose(logits, stride, budget, router);
    sort_pairs(chosen, budget.tokens, router.experts, out);
    tell(chosen, budget.tokens, report);
}

// How many pairs each expert has.
inline void loads(const int64_t* ends, int64_t experts, int64_t* load) {
    for (int64_t expert = 0; expert < experts; expert++)
        load[expert] = ends[expert] - (expert ? ends[expert - 1] : 0);
}

// x += experts(norm(x)).
void topk_block(float* x, int64_t width, const TopK& layer, const LayerRows& budget,
                const LayerReport& report) {
    const Matrix& router = layer.router.weight;
    const int64_t rows = budget.tokens, stride = router.outputs, count = layer.router.experts;
    const int64_t pairs = budget.most_pairs(count);
    // Router and experts may be stored in different kinds: the normed rows are kept for the second
    // encoding.
    float* normed = scratch().take<float>(rows * width);
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, router, normed);
    float* logits = scratch().take<float>(rows * stride);
    linear_rows(in, rows, {router}, false, stride, stride, logits);
    const PairsOut sorted{scratch().take<int32_t>(pairs), scratch().take<float>(pairs),
                          scratch().take<int64_t>(count)};
    route(logits, stride, budget, layer.router, sorted, report);
    const bool same = inputs_match(router, layer.experts.up);
    const Inputs expert_in =
        same ? in : encode_rows(normed, rows, width, width, {}, layer.experts.up);
    const Output out{.y = x,
                     .rows = rows,
                     .width = width,
                     .scale = layer.residual_scale,
                     .repaired = RepairedRows(budget, layer.repair)};
    run_experts(expert_in, sorted.pairs(count), layer.experts, out);
    loads(sorted.ends, count, report.load);
}

}  // namespace moedial
