// Sparse top-k: each token's own number of best experts (`router.h`), or what its rule makes of it
// (`rules.h`), and the pairs sorted by expert.
#pragma once
#include "experts.h"
#include "router.h"
#include "rules.h"

namespace moedial {

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

// All tokens' experts, [tokens, ranked_width(experts)].
struct Rankings {
    float *worth, *order;
    int64_t stride;

    Ranked of(int64_t row) const { return {worth + row * stride, order + row * stride}; }
};

// Ranks every token's experts and calls take(row, ranked) for it; `ranks`: about how many each one
// wants. Rows are handed to the threads where there are many experts to look at.
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
            const Ranked ranked = all.of(row);
            rank_row(logits + row * stride, budget.allowed_of(row), router, ranked,
                     groups + row * group_width);
            take(row, ranked);
        }
    };
    const int64_t part = std::clamp<int64_t>(2048 / width, 1, 16);
    parallel_rows(tokens, part, run, tokens * width * (16 + ranks));
    return all;
}

// Every token's count of experts, weighted as the family does.
inline Chosen choose(const float* logits, int64_t stride, const LayerRows& budget,
                     const Router& router) {
    const int64_t k_max = budget.k_max;
    const Chosen chosen{scratch().take<int32_t>(budget.tokens * k_max),
                        scratch().take<float>(budget.tokens * k_max), budget.counts, k_max};
    const auto take = [&](int64_t row, const Ranked& ranked) {
        const int64_t count = budget.counts[row];
        int32_t* expert = chosen.expert + row * k_max;
        float* weight = chosen.weight + row * k_max;
        if (router.score == SPARSE_MIXER)
            return mix_row(logits + row * stride, router, ranked, count, expert, weight);
        best_row(ranked, router.experts, count, expert, weight);
        weigh_row(family_share(router), router, count, weight);
    };
    rank_rows(logits, stride, budget, k_max, router, take);
    return chosen;
}

// Lets tokens whose rule reuses add the best of the experts that some token of the step runs.
// `used`: what each runs of its own, then altogether. `open` [tokens, stride of the rankings]: the
// order of those tokens' experts, TAKEN where one runs or is skipped.
inline void reuse_experts(const Chosen& chosen, const LayerRows& budget, int64_t experts,
                          const Rankings& rankings, float* open, int64_t* used) {
    char* runs = scratch().take<char>(experts);
    std::memset(runs, 0, experts);
    for (int64_t row = 0; row < budget.tokens; row++)
        for (int64_t rank = 0; rank < used[row]; rank++)
            runs[chosen.expert[row * chosen.ranks + rank]] = 1;
    for (int64_t row = 0; row < budget.tokens; row++) {
        const int64_t own = used[row], reuse = budget.rule(row).reuse, at = row * chosen.ranks;
        if (reuse == 0) continue;
        const Ranked ranked{rankings.of(row).worth, open + row * rankings.stride};
        int64_t left = 0;
        for (int64_t one = 0; one < experts; one++) {
            if (!runs[one] || ranked.order[one] <= OUTSIDE) ranked.order[one] = TAKEN;
            left += ranked.order[one] != TAKEN;
        }
        used[row] = own + std::min(reuse, left);
        best_row(ranked, experts, used[row] - own, chosen.expert + at + own,
                 chosen.weight + at + own);
    }
}

// The scores of all experts together, which a rule's share is of: those of a softmax are 1.
inline float all_of(const Router& router, const Ranked& ranked) {
    return router.score == SOFTMAX ? 1 : sum_of(ranked.worth, router.experts);
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
    const bool reuses = budget.any_rule([](const RoutingRule& rule) { return rule.reuse > 0; });
    const int64_t width = ranked_width(router.experts);
    float* open = reuses ? scratch().take<float>(tokens * width) : nullptr;
    const auto take = [&](int64_t row, const Ranked& ranked) {
        const RoutingRule& rule = budget.rule(row);
        const int64_t count = budget.counts[row];
        int32_t* expert = chosen.expert + row * ranks;
        float* weight = chosen.weight + row * ranks;  // scores until `weigh_row`
        if (reuses) std::copy_n(ranked.order, width, open + row * width);
        best_row(ranked, router.experts, known[row], expert, weight);
        shares[row] = share_of(rule, count, router, weight);
        // What is skipped is taken, and so is what runs.
        const int64_t own = own_count(rule, count, weight + rule.skip, all_of(router, ranked));
        for (int64_t rank = 0; reuses && rank < rule.skip + own; rank++)
            open[row * width + expert[rank]] = TAKEN;
        std::copy(expert + rule.skip, expert + rule.skip + own, expert);
        std::copy(weight + rule.skip, weight + rule.skip + own, weight);
        used[row] = own;
    };
    const Rankings rankings = rank_rows(logits, stride, budget, ranks, router, take);
    if (reuses) reuse_experts(chosen, budget, router.experts, rankings, open, used);
    for (int64_t row = 0; row < tokens; row++)
        weigh_row(shares[row], router, used[row], chosen.weight + row * ranks);
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

// Each token's best experts and their weights, as pairs sorted by expert. A sparse mixer has no
// rules that say anything of its choice.
void route(const float* logits, int64_t stride, const LayerRows& budget, const Router& router,
           const PairsOut& out, const LayerReport& report) {
    const bool by_rules = budget.rules && router.score != SPARSE_MIXER;
    const Chosen chosen = by_rules ? choose_by_rules(logits, stride, budget, router)
                                   : choose(logits, stride, budget, router);
    sort_pairs(chosen, budget.tokens, router.experts, out);
    tell(chosen, budget.tokens, report);
}

// How many pairs each expert has.
inline void loads(const int64_t* ends, int64_t experts, int64_t* load) {
    for (int64_t expert = 0; expert < experts; expert++)
        load[expert] = ends[expert] - (expert ? ends[expert - 1] : 0);
}

// The weight of each token's shared part; none: 1.
inline const float* shared_weights(const TopK& layer, const float* logits, int64_t stride,
                                   int64_t tokens) {
    if (!layer.shared.any() || !layer.shared.gated) return nullptr;
    float* weights = scratch().take<float>(tokens);
    for (int64_t token = 0; token < tokens; token++)
        sigmoid_row(logits + token * stride + layer.router.experts, nullptr, 1, weights + token);
    return weights;
}

// The pieces of a shared part as pairs behind those of `routed` experts.
inline void add_pieces(const PairsOut& pairs, int64_t routed, int64_t pieces, int64_t tokens,
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

// x += experts(norm(x)) and what is shared.
void topk_block(float* x, int64_t width, const TopK& layer, const LayerRows& budget,
                const LayerReport& report) {
    const Matrix& router = layer.router.logits.weight;
    const int64_t rows = budget.tokens, stride = router.outputs, count = layer.router.experts;
    const int64_t pieces = layer.shared.pieces;
    const int64_t pairs = budget.most_pairs(count) + pieces * rows;
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
    add_pieces(sorted, count, pieces, rows, weights);
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
        float* rest = scratch().take<float>(rows * width);
        run_experts(encoded_for(shared.up), {nullptr, weights, &rows, 1}, shared,
                    {.y = rest, .rows = rows, .width = width, .add = false});
        out.rest = rest;
    }
    run_experts(encoded_for(layer.experts.up), sorted.pairs(count + pieces), layer.experts, out);
    loads(sorted.ends, count, report.load);
}

}  // namespace moedial
