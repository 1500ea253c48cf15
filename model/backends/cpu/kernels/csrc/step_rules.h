// The rules of a step's tokens, from torch's tensors to plain values, and whether a mixture can
// follow them.
#pragma once
#include <algorithm>
#include <cmath>

#include "checks.h"

namespace moedial {

// The rules of a step's tokens, for as long as it runs. `rules` float64 [R, 6]: normaliser,
// threshold, top_p, repair, reuse and skip of each; `rule_of` [T]: which each token has. Both are empty
// where all tokens have their family's.
struct StepRules {
    std::vector<RoutingRule> rules;
    const int64_t* rule_of = nullptr;

    StepRules(const Tensor& given, const Tensor& of, int64_t tokens) {
        if (!given.numel() && !of.numel()) return;
        TORCH_CHECK(given.dim() == 2 && given.size(1) == 6 && of.numel() == tokens,
                    "rules must be [R, 6], with one of them for each of ", tokens, " tokens, got ",
                    given.sizes(), " and ", of.sizes());
        const double* values = data<const double>(given, "rules");
        for (int64_t i = 0; i < given.size(0); i++) rules.push_back(rule(values + 6 * i));
        rule_of = data<const int64_t>(of, "rule_of");
        for (int64_t token = 0; token < tokens; token++)
            TORCH_CHECK(0 <= rule_of[token] && rule_of[token] < given.size(0), "rule ",
                        rule_of[token], " is not one of ", given.size(0));
    }

    // Makes them the rules of a layer's tokens.
    void give(LayerRows& rows) const {
        if (rules.empty()) return;
        rows.rules = rules.data(), rows.rule_of = rule_of;
        rows.rule_count = int64_t(rules.size());
    }

  private:
    static RoutingRule rule(const double* values) {
        constexpr double MOST = 1 << 20;  // more experts than a layer has
        const double normaliser = values[0], threshold = values[1], top_p = values[2];
        const double repair = values[3], reuse = values[4], skip = values[5];
        const bool whole = normaliser == std::floor(normaliser) && reuse == std::floor(reuse) &&
                           skip == std::floor(skip);
        TORCH_CHECK(whole && KEPT <= normaliser && normaliser <= MOST && 0 <= threshold &&
                        threshold <= 1 && 0 <= top_p && top_p <= 1 && 0 <= reuse && reuse <= MOST &&
                        0 <= skip && skip <= MOST && (repair == 0 || repair == 1),
                    "there is no rule ", normaliser, ", ", threshold, ", ", top_p, ", ", repair,
                    ", ", reuse, ", ", skip);
        return {int64_t(normaliser), threshold,      top_p,
                repair != 0,         int64_t(reuse), int64_t(skip)};
    }
};

// Rules whose repair has tables for the layer's counts.
inline void check_repair(const LayerRows& budget, const Repair& repair) {
    if (!budget.any_rule([](const RoutingRule& rule) { return rule.repair; })) return;
    TORCH_CHECK(budget.k_max < repair.counts, "counts up to ", budget.k_max,
                " are to be repaired, the tables have ", repair.counts);
}

// What a top-k mixture reads for its rules: so many experts must be there.
inline void check_rules(const LayerRows& budget, const Router& router) {
    for (int64_t i = 0; i < budget.rule_count; i++) {
        const RoutingRule& rule = budget.rules[i];
        TORCH_CHECK(rule.normaliser <= router.experts && rule.reuse <= router.experts, "a rule of ",
                    std::max(rule.normaliser, rule.reuse), " experts does not fit ",
                    router.experts);
    }
    if (!budget.any_rule([](const RoutingRule& rule) { return rule.skip > 0; })) return;
    for (int64_t token = 0; token < budget.tokens; token++)
        TORCH_CHECK(budget.counts[token] + budget.rule(token).skip <= router.experts, "a count of ",
                    budget.counts[token], " after ", budget.rule(token).skip,
                    " skipped experts does not fit ", router.experts);
}

inline void check_rules(const LayerRows& budget, const TopK& block) {
    check_rules(budget, block.router);
    check_repair(budget, block.repair);
}

// An ∞-MoE has no weights of experts that a rule could change.
inline void check_rules(const LayerRows& budget, const Infinity& block) {
    const bool routes = budget.any_rule([](const RoutingRule& rule) { return rule.routes(); });
    TORCH_CHECK(!routes, "an infinity mixture has no router weights: its rule can only repair");
    check_repair(budget, block.repair);
}

}  // namespace moedial
