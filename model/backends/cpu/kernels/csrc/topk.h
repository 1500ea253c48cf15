// Sparse top-k mixtures: chooses each token's experts (`router.h`) by its count and its routing
// rule (`rules.h`), and sorts the (token, expert) pairs by expert.
#pragma once
#include "experts.h"
#include "router.h"
#include "rules.h"

namespace moedial {

// The experts that each token runs, best first.
struct ChosenExperts {
    int32_t* expert;      // [tokens, ranks]
    float* weight;        // [tokens, ranks]
    const int64_t* used;  // [tokens]: how many of its ranks are used
    int64_t ranks;
};

// Counting sort of the pairs by expert; within an expert by token.
inline void sort_pairs(const ChosenExperts& chosen, int64_t tokens, int64_t experts,
                       const PairsOut& out) {
    const int64_t ranks = chosen.ranks;
    std::memset(out.ends, 0, experts * 8);
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t rank = 0; rank < chosen.used[token]; rank++)
            out.ends[chosen.expert[token * ranks + rank]]++;
    int64_t start = 0;
    // `ends` first has the start of each expert; the fill below moves it to the end.
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

// All tokens' experts, [tokens, ranked_width(experts)].
struct Rankings {
    float *score, *order;
    int64_t stride;

    RankedExperts of(int64_t row) const { return {score + row * stride, order + row * stride}; }
};

// Ranks every token's experts and calls take(row, ranked) for each token. `ranks`: about how many
// ranks `take` reads; with the number of experts it decides how many threads work.
template <class Take>
inline Rankings rank_rows(const float* logits, int64_t stride, const LayerRows& budget,
                          int64_t ranks, const Router& router, Take&& take) {
    const int64_t tokens = budget.tokens, width = ranked_width(router.experts);
    const int64_t group_width = router.groups > 1 ? ranked_width(router.groups) : 0;
    const Rankings all{scratch().take<float>(tokens * width), scratch().take<float>(tokens * width),
                       width};
    float* groups = scratch().take<float>(tokens * group_width);
    const auto run = [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const RankedExperts ranked = all.of(row);
            rank_row(logits + row * stride, budget.allowed_of(row), router, ranked,
                     groups + row * group_width);
            take(row, ranked);
        }
    };
    const int64_t part = std::clamp<int64_t>(2048 / width, 1, 16);
    parallel_rows(tokens, part, run, tokens * width * (16 + ranks));
    return all;
}

// Chooses each token's best `count` experts, weighted as the family does.
inline ChosenExperts choose(const float* logits, int64_t stride, const LayerRows& budget,
                            const Router& router) {
    const int64_t k_max = budget.k_max;
    const ChosenExperts chosen{scratch().take<int32_t>(budget.tokens * k_max),
                               scratch().take<float>(budget.tokens * k_max), budget.counts, k_max};
    const auto take = [&](int64_t row, const RankedExperts& ranked) {
        const int64_t count = budget.counts[row];
        int32_t* expert = chosen.expert + row * k_max;
        float* weight = chosen.weight + row * k_max;
        if (router.score == SPARSE_MIXER)
            return sparse_mixer_row(logits + row * stride, router, ranked, count, expert, weight);
        take_best(ranked, router.experts, count, expert, weight);
        weigh_row(family_normalisation(router), router, count, weight);
    };
    rank_rows(logits, stride, budget, k_max, router, take);
    return chosen;
}

// The rule `reuse`: adds to a token the best experts that other tokens of the step run anyway.
// `used`: how many experts each token runs, without and then with the added ones. `candidates`
// [tokens, stride of the rankings]: `RankedExperts::order` of each token, TAKEN for experts that it
// runs already or skips.
inline void reuse_experts(const ChosenExperts& chosen, const LayerRows& budget, int64_t experts,
                          const Rankings& rankings, float* candidates, int64_t* used) {
    char* runs = scratch().take<char>(experts);
    std::memset(runs, 0, experts);
    for (int64_t row = 0; row < budget.tokens; row++)
        for (int64_t rank = 0; rank < used[row]; rank++)
            runs[chosen.expert[row * chosen.ranks + rank]] = 1;
    for (int64_t row = 0; row < budget.tokens; row++) {
        const int64_t own = used[row], reuse = budget.rule(row).reuse, at = row * chosen.ranks;
        if (reuse == 0) continue;
        const RankedExperts ranked{rankings.of(row).score, candidates + row * rankings.stride};
        int64_t left = 0;
        for (int64_t one = 0; one < experts; one++) {
            if (!runs[one] || ranked.order[one] <= OUTSIDE) ranked.order[one] = TAKEN;
            left += ranked.order[one] != TAKEN;
        }
        used[row] = own + std::min(reuse, left);
        take_best(ranked, experts, used[row] - own, chosen.expert + at + own,
                  chosen.weight + at + own);
    }
}

// The sum over all experts' scores, of which `top_p` is a part; 1 for a softmax.
inline float total_score(const Router& router, const RankedExperts& ranked) {
    return router.score == SOFTMAX ? 1 : sum_of(ranked.score, router.experts);
}

// Chooses each token's experts where tokens have routing rules: how many run may depend on the
// token's scores, or on the other tokens of the step.
inline ChosenExperts choose_by_rules(const float* logits, int64_t stride, const LayerRows& budget,
                                     const Router& router) {
    const int64_t tokens = budget.tokens;
    int64_t* used = scratch().take<int64_t>(tokens);
    int64_t* known = scratch().take<int64_t>(tokens);  // ranks to find
    Normalisation* normalisations = scratch().take<Normalisation>(tokens);
    int64_t ranks = 0;
    for (int64_t row = 0; row < tokens; row++) {
        known[row] = ranks_needed(budget.rule(row), budget.counts[row], router);
        ranks = std::max({ranks, known[row], budget.max_pairs_of(row, router.experts)});
    }
    const ChosenExperts chosen{scratch().take<int32_t>(tokens * ranks),
                               scratch().take<float>(tokens * ranks), used, ranks};
    const bool reuses = budget.any_rule([](const RoutingRule& rule) { return rule.reuse > 0; });
    const int64_t width = ranked_width(router.experts);
    float* candidates = reuses ? scratch().take<float>(tokens * width) : nullptr;
    const auto take = [&](int64_t row, const RankedExperts& ranked) {
        const RoutingRule& rule = budget.rule(row);
        const int64_t count = budget.counts[row];
        int32_t* expert = chosen.expert + row * ranks;
        float* weight = chosen.weight + row * ranks;  // scores until `weigh_row`
        if (reuses) std::copy_n(ranked.order, width, candidates + row * width);
        take_best(ranked, router.experts, known[row], expert, weight);
        normalisations[row] = normalisation_of(rule, count, router, weight);
        // Neither a skipped expert nor one that runs can be added later.
        const int64_t own = own_count(rule, count, weight + rule.skip, total_score(router, ranked));
        for (int64_t rank = 0; reuses && rank < rule.skip + own; rank++)
            candidates[row * width + expert[rank]] = TAKEN;
        std::copy(expert + rule.skip, expert + rule.skip + own, expert);
        std::copy(weight + rule.skip, weight + rule.skip + own, weight);
        used[row] = own;
    };
    const Rankings rankings = rank_rows(logits, stride, budget, ranks, router, take);
    if (reuses) reuse_experts(chosen, budget, router.experts, rankings, candidates, used);
    for (int64_t row = 0; row < tokens; row++)
        weigh_row(normalisations[row], router, used[row], chosen.weight + row * ranks);
    return chosen;
}

// Reports how many experts each token ran, and which, if wanted.
inline void write_report(const ChosenExperts& chosen, int64_t tokens, const LayerReport& report) {
    if (report.used) std::copy_n(chosen.used, tokens, report.used);
    if (!report.routes) return;
    for (int64_t token = 0; token < tokens; token++) {
        int32_t* routes = report.routes + token * report.route_width;
        const int64_t used = chosen.used[token];
        std::copy_n(chosen.expert + token * chosen.ranks, used, routes);
        std::fill(routes + used, routes + report.route_width, -1);
    }
}

// Each token's experts and their weights, as pairs sorted by expert. Rules do not apply to a sparse
// mixer's choice (`check_rules` refuses them).
void route(const float* logits, int64_t stride, const LayerRows& budget, const Router& router,
           const PairsOut& out, const LayerReport& report) {
    const bool by_rules = budget.rules && router.score != SPARSE_MIXER;
    const ChosenExperts chosen = by_rules ? choose_by_rules(logits, stride, budget, router)
                                          : choose(logits, stride, budget, router);
    sort_pairs(chosen, budget.tokens, router.experts, out);
    write_report(chosen, budget.tokens, report);
}

// How many pairs each expert has.
inline void count_pairs(const int64_t* ends, int64_t experts, int64_t* load) {
    for (int64_t expert = 0; expert < experts; expert++)
        load[expert] = ends[expert] - (expert ? ends[expert - 1] : 0);
}

// The weight of each token's shared part, or null if all are 1.
inline const float* shared_weights(const TopK& layer, const float* logits, int64_t stride,
                                   int64_t tokens) {
    if (!layer.shared.any() || !layer.shared.gated) return nullptr;
    float* weights = scratch().take<float>(tokens);
    for (int64_t token = 0; token < tokens; token++)
        sigmoid_row(logits + token * stride + layer.router.experts, nullptr, 1, weights + token);
    return weights;
}

// Appends the pairs of all tokens with the pieces of the shared part.
inline void add_shared_pairs(const PairsOut& pairs, int64_t routed, int64_t pieces, int64_t tokens,
                             const float* weights) {
    int64_t pair = pairs.ends[routed - 1];
    for (int64_t piece = 0; piece < pieces; piece++) {
        for (int64_t token = 0; token < tokens; token++, pair++) {
            pairs.token[pair] = int32_t(token);
            pairs.weight[pair] = weights ? weights[token] : 1;
        }
        pairs.ends[routed + piece] = pair;
    }
}

// x += routed experts(norm(x)) + shared part(norm(x)).
void topk_block(float* x, int64_t width, const TopK& layer, const LayerRows& budget,
                const LayerReport& report) {
    const Matrix& router = layer.router.logits.weight;
    const int64_t rows = budget.tokens, stride = router.outputs, count = layer.router.experts;
    const int64_t pieces = layer.shared.pieces;
    const int64_t pairs = budget.max_pairs(count) + pieces * rows;
    // Router and experts may be stored in different kinds: the normed rows are kept for the second
    // encoding.
    float* normed = scratch().take<float>(rows * width);
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, router, normed);
    float* logits = scratch().take<float>(rows * stride);
    linear_rows(in, rows, layer.router.logits, false, stride, stride, logits);
    const PairsOut sorted{scratch().take<int32_t>(pairs), scratch().take<float>(pairs),
                          scratch().take<int64_t>(count + pieces)};
    route(logits, stride, budget, layer.router, sorted, report);
    const float* weights = shared_weights(layer, logits, stride, rows);
    add_shared_pairs(sorted, count, pieces, rows, weights);
    const auto encoded_for = [&](const Matrix& matrix) {
        return inputs_match(router, matrix) ? in
                                            : encode_rows(normed, rows, width, width, {}, matrix);
    };
    Output out{.y = x,
               .rows = rows,
               .width = width,
               .scale = layer.residual_scale,
               .repaired = RepairedRows(budget, layer.repair)};
    if (const Experts& shared = layer.shared.layer; shared.units) {
        float* shared_sums = scratch().take<float>(rows * width);
        run_experts(encoded_for(shared.up), {nullptr, weights, &rows, 1}, shared,
                    {.y = shared_sums, .rows = rows, .width = width, .add = false});
        out.shared = shared_sums;
    }
    run_experts(encoded_for(layer.experts.up), sorted.pairs(count + pieces), layer.experts, out);
    count_pairs(sorted.ends, count, report.load);
}

}  // namespace moedial
