// Reads the routing rules of a step's tokens from torch's tensors, and checks that a mixture can
// apply them.
#pragma once
#include <algorithm>
#include <cmath>

#include "checks.h"

namespace moedial {

// The rules of a step's tokens. `rules` float64 [R, 6]: normaliser, threshold, top_p, repair, reuse
// and skip of each rule. `rule_of` [T]: the rule of each token. `allowed` uint8 [R, N]: 1 where a
// rule lets an expert run; N counts the experts of all layers, layer after layer. `rules` and
// `rule_of` are empty if all tokens have their family's rule, `allowed` if every expert may run.
struct StepRules {
    std::vector<RoutingRule> rules;
    const int64_t* rule_of = nullptr;
    const uint8_t* allowed = nullptr;
    int64_t experts = 0;  // of all layers; 0 without `allowed`

    StepRules(const Tensor& given, const Tensor& of, const Tensor& lets_run, int64_t tokens) {
        TORCH_CHECK(!lets_run.numel() || given.numel(), "experts may run by no rule");
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
        if (!lets_run.numel()) return;
        TORCH_CHECK(lets_run.dim() == 2 && lets_run.size(0) == given.size(0), "allowed must be [",
                    given.size(0), ", N], got ", lets_run.sizes());
        allowed = data<const uint8_t>(lets_run, "allowed"), experts = lets_run.size(1);
    }

    // Sets the rules of a layer's tokens.
    void apply_to(LayerRows& rows) const {
        if (rules.empty()) return;
        rows.rules = rules.data(), rows.rule_of = rule_of;
        rows.rule_count = int64_t(rules.size());
        rows.allowed = allowed, rows.allowed_stride = experts;
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
        return {int64_t(normaliser), threshold, top_p, repair != 0, int64_t(reuse), int64_t(skip)};
    }
};

// Checks that `allowed` has one column for each of `experts` experts.
inline void check_allowed(const StepRules& rules, int64_t experts) {
    TORCH_CHECK(!rules.allowed || rules.experts == experts, "allowed is of ", rules.experts,
                " experts, not of ", experts);
}

// Checks that repair tables exist for the layer's counts, if a rule repairs.
inline void check_repair(const LayerRows& budget, const Repair& repair) {
    if (!budget.any_rule([](const RoutingRule& rule) { return rule.repair; })) return;
    TORCH_CHECK(budget.k_max < repair.counts, "counts up to ", budget.k_max,
                " are to be repaired, the tables have ", repair.counts);
}

// Checks that a top-k mixture has as many experts as the rules of its tokens need.
inline void check_rules(const LayerRows& budget, const Router& router) {
    for (int64_t i = 0; i < budget.rule_count; i++) {
        const RoutingRule& rule = budget.rules[i];
        TORCH_CHECK(rule.normaliser <= router.experts && rule.reuse <= router.experts, "a rule of ",
                    std::max(rule.normaliser, rule.reuse), " experts does not fit ",
                    router.experts);
    }
    const bool routes = budget.any_rule([](const RoutingRule& rule) { return rule.routes(); });
    TORCH_CHECK(!routes || router.score != SPARSE_MIXER,
                "the sparse mixer's weights are defined for its own rule only");
    std::vector<int64_t> open(budget.rule_count, router.max_count());  // experts of each rule
    for (int64_t i = 0; budget.allowed && i < budget.rule_count; i++) {
        const uint8_t* allowed = budget.allowed + i * budget.allowed_stride;
        TORCH_CHECK(router.groups == 1, "a router of ", router.groups,
                    " groups chooses among all experts");
        open[i] = router.experts - std::count(allowed, allowed + router.experts, 0);
        TORCH_CHECK(std::max(budget.rules[i].normaliser, router.trained) <= open[i], "a rule lets ",
                    open[i], " experts run, but weighs by more");
    }
    for (int64_t token = 0; budget.rules && token < budget.tokens; token++)
        TORCH_CHECK(budget.counts[token] + budget.rule(token).skip <= open[budget.rule_of[token]],
                    "a count of ", budget.counts[token], " after ", budget.rule(token).skip,
                    " skipped experts does not fit ", open[budget.rule_of[token]]);
}

inline void check_rules(const LayerRows& budget, const TopK& block) {
    check_rules(budget, block.router);
    check_repair(budget, block.repair);
}

// An ∞-MoE has no weights of experts that a rule could change.
inline void check_rules(const LayerRows& budget, const Infinity& block) {
    const bool routes = budget.any_rule([](const RoutingRule& rule) { return rule.routes(); });
    TORCH_CHECK(!routes && !budget.allowed,
                "an infinity mixture has no router weights: its rule can only repair");
    check_repair(budget, block.repair);
}

}  // namespace moedial
