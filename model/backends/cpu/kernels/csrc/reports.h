// The buffers into which the mixtures of a step report their work: tokens per expert, experts that
// ran, and which.
#pragma once
#include <algorithm>
#include <vector>

#include "checks.h"

namespace moedial {

// What the size of a mixture's report depends on. `groups`: the experts are groups of an ∞-MoE, and
// a token may keep all of them.
struct MixtureSize {
    int64_t experts;
    bool groups;
};

// `load`: tokens per expert, mixture after mixture. `used` [mixtures, T], only if a rule is
// adaptive: how many experts each token ran. `routes`, only if wanted, for each mixture [T, most]:
// the experts that a token ran, best first, or the groups that it kept, ascending; then -1.
struct StepReports {
    Tensor load;
    OptionalTensor used;
    std::vector<Tensor> routes;
    std::vector<LayerReport> layers;  // where each mixture writes its own

    // `tokens`: the tokens of the step. `budgets`: the same tokens with their counts in each
    // mixture.
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
            if (wants_routes) allocate_routes(mixtures[layer], budgets[layer], report);
            layers.push_back(report);
            loads += mixtures[layer].experts;
        }
    }

  private:
    void allocate_routes(const MixtureSize& mixture, const LayerRows& budget, LayerReport& report) {
        int64_t most = mixture.groups ? mixture.experts : 0;
        for (int64_t token = 0; token < budget.tokens; token++)
            most = std::max(most, budget.max_pairs_of(token, mixture.experts));
        routes.push_back(at::empty({budget.tokens, most}, at::kInt));
        report.routes = routes.back().data_ptr<int32_t>();
        report.route_width = most;
    }
};

}  // namespace moedial
