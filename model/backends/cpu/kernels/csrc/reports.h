// What the mixtures of a step tell of their work, and the room for it.
#pragma once
#include <algorithm>
#include <vector>

#include "checks.h"

namespace moedial {

// What a report's size depends on: experts, or groups of an ∞-MoE, whose tokens may keep them all.
struct MixtureSize {
    int64_t experts;
    bool groups;
};

// `load`: tokens per expert, mixture after mixture. `used`, where some rule is adaptive: the
// experts that each token ran [mixtures, T]. `routes`, where they are wanted: which they were, for
// each mixture [T, most], best first, or the groups that the token kept, rising; -1 behind the
// last.
struct StepReports {
    Tensor load;
    OptionalTensor used;
    std::vector<Tensor> routes;
    std::vector<LayerReport> layers;  // where each mixture writes its own

    // `tokens`: those of the step, `budgets`: the same with their counts in each mixture.
    StepReports(const std::vector<MixtureSize>& mixtures, const LayerRows& tokens,
                const std::vector<LayerRows>& budgets, bool wants_routes) {
        int64_t experts = 0;
        for (const MixtureSize& mixture : mixtures) experts += mixture.experts;
        load = at::zeros({experts}, at::kLong);
        if (tokens.any_rule([](const RoutingRule& rule) { return rule.adaptive(); }))
            used = at::empty({int64_t(mixtures.size()), tokens.tokens}, at::kLong);
        int64_t* loads = load.data_ptr<int64_t>();
        for (size_t layer = 0; layer < mixtures.size(); layer++) {
            LayerReport report{loads};
            if (used) report.used = used->data_ptr<int64_t>() + int64_t(layer) * tokens.tokens;
            if (wants_routes) give_routes(mixtures[layer], budgets[layer], report);
            layers.push_back(report);
            loads += mixtures[layer].experts;
        }
    }

  private:
    void give_routes(const MixtureSize& mixture, const LayerRows& budget, LayerReport& report) {
        int64_t most = mixture.groups ? mixture.experts : 0;
        for (int64_t token = 0; token < budget.tokens; token++)
            most = std::max(most, budget.most_pairs_of(token, mixture.experts));
        routes.push_back(at::empty({budget.tokens, most}, at::kInt));
        report.routes = routes.back().data_ptr<int32_t>();
        report.route_width = most;
    }
};

}  // namespace moedial
