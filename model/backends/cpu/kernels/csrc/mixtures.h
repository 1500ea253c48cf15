// The plain values of mixture layers: the tokens of a step with their budgets (`LayerRows`), the
// layers themselves (`TopK`, `Infinity`), and their reports (`LayerReport`).
#pragma once
#include "values.h"

namespace moedial {

// What divides the probabilities of a token's experts if its count is below the trained one. A
// value above RAW: the sum of that many best probabilities, whether these experts run or not.
enum Normaliser : int64_t {
    KEPT = -2,     // the sum over the experts that run
    TRAINED = -1,  // what the family does
    RAW = 0,       // nothing
};

// How a token's experts are chosen and weighted beside its count: `RoutingRule` of model/budget.py.
struct RoutingRule {
    int64_t normaliser = TRAINED;  // a `Normaliser`, or a number of experts
    double threshold = 0;  // an expert runs from this part of the best probability on; 0: all run
    double top_p = 0;      // experts run until they have this share of all probability; 0: all run
    bool repair = false;   // the layer's result is scaled and shifted by its tables (`Repair`)
    int64_t reuse = 0;     // of the experts that the step runs anyway, up to so many are added
    int64_t skip = 0;      // the first so many experts of a token's order do not run

    // Whether the number of experts that run depends on the token or on the step.
    bool adaptive() const { return threshold != 0 || top_p != 0 || reuse != 0; }
    // Whether it changes the router's choice or weights.
    bool routes() const { return normaliser != TRAINED || adaptive() || skip != 0; }
};

// The tokens of a step in one mixture layer: each one's count, and what its draws depend on. Plain
// torch's counterpart is `LayerStep` (model/step.py).
struct LayerRows {
    const int64_t* counts = nullptr;     // experts, or draws, of each token
    const int64_t* seeds = nullptr;      // noise seeds, only where something is drawn
    const int64_t* positions = nullptr;  // only where something is drawn
    int64_t tokens = 0, k_max = 0;       // k_max: no count is higher
    // The step's distinct rules, and the rule of each token. Null: all have their family's.
    const RoutingRule* rules = nullptr;
    const int64_t* rule_of = nullptr;
    int64_t rule_count = 0;
    // For each rule and expert: 1 if tokens with the rule may run the expert. Null: all may run.
    const uint8_t* allowed = nullptr;  // [rules, allowed_stride], from this layer's first expert on
    int64_t allowed_stride = 0;

    // The row of `allowed` for a token, or null: all experts may run.
    const uint8_t* allowed_of(int64_t token) const {
        return allowed ? allowed + rule_of[token] * allowed_stride : nullptr;
    }

    const RoutingRule& rule(int64_t token) const { return rules[rule_of[token]]; }

    // Whether any rule of the step passes the test.
    template <class Test>
    bool any_rule(Test&& test) const {
        for (int64_t i = 0; i < rule_count; i++)
            if (test(rules[i])) return true;
        return false;
    }

    // Pairs, or draws, of all tokens together: ΣK.
    int64_t pairs() const {
        int64_t total = 0;
        for (int64_t token = 0; token < tokens; token++) total += counts[token];
        return total;
    }

    // The most pairs that a token can have under its rule, and that all tokens can have together.
    int64_t max_pairs_of(int64_t token, int64_t experts) const {
        const int64_t most = counts[token] + (rules ? rule(token).reuse : 0);
        return most < experts ? most : experts;
    }
    int64_t max_pairs(int64_t experts) const {
        int64_t total = 0;
        for (int64_t token = 0; token < tokens; token++) total += max_pairs_of(token, experts);
        return total;
    }
};

// The buffers for a mixture's report of its work. Null: not wanted.
struct LayerReport {
    int64_t* load = nullptr;  // how many tokens each expert or group had
    int64_t* used = nullptr;  // how many experts each token ran
    // [tokens, route_width]: the experts that a token ran, best first, or the groups that it kept,
    // ascending; then -1.
    int32_t* routes = nullptr;
    int64_t route_width = 0;
};

// y * scale + shift for each count from 0 on: brings a mixture's result to the mean and spread that
// it has at the trained count.
struct Repair {
    const float *scale = nullptr, *shift = nullptr;  // [counts, width]
    int64_t counts = 0;
};

// How a logit becomes an expert's score.
enum Score : int32_t {
    SOFTMAX,       // e^logit / the sum over all experts
    SIGMOID,       // 1 / (1 + e^-logit)
    SPARSE_MIXER,  // Phi-3.5-MoE: its share among the experts not far below it
};

// How a token's experts are chosen and weighted: `Router` of model/shapes/mixtures.py.
struct Router {
    Linear logits;  // [experts, and the gate of a shared part, width]
    int64_t experts = 0;
    int64_t trained = 0;  // the count from which on a rule's normaliser does not apply
    Score score = SOFTMAX;
    bool normalise = false;  // the weights of the experts that run are divided by their sum
    float scale = 1;         // multiplies the weights
    const float* selection_bias = nullptr;  // [experts]: added to the scores for choosing alone
    // Groups of neighbouring experts; a token chooses within its best groups.
    int64_t groups = 1, kept_groups = 1;
    bool top2 = false;  // a group's score is the sum of its two best experts', else its best one's
    float jitter = 0;   // sparse mixer: how far below the best an expert may lie, relatively
    float eps = 0;      // added to the sum that normalises; with `clamp_sum` its lower bound
    bool clamp_sum = false;

    // The highest possible count: the experts of a token's best groups.
    int64_t max_count() const { return experts / groups * kept_groups; }

    // What normalised weights are divided by.
    float divisor(float sum) const { return clamp_sum ? (sum < eps ? eps : sum) : sum + eps; }
};

// Room for routed pairs.
struct PairsOut {
    int32_t* token;
    float* weight;
    int64_t* ends;  // [experts]
    RoutedPairs pairs(int64_t experts) const { return {token, weight, ends, experts}; }
};

// Shared experts: a part that runs for every token, with weight 1, or with `gated` the sigmoid of
// the router's last output. It is stored behind the experts in pieces of their width, or is a layer
// of its own.
struct Shared {
    int64_t pieces = 0;  // how many of the last stored experts are pieces
    Experts layer;       // without units: none
    bool gated = false;

    bool any() const { return pieces || layer.units; }
};

struct TopK {
    Norm norm;
    Router router;
    Experts experts;
    Shared shared;
    Repair repair;
    float residual_scale = 1;  // multiplies what is added to the rows
};

// How the points of an ∞-MoE are drawn from each token's Gaussian.
struct Draws {
    const float* quantiles = nullptr;  // [65536] of the standard normal distribution
    const float* points = nullptr;     // [point_rows, latent_dim]: fixed draws, nothing is random
    int64_t point_rows = 0;
    int64_t layer = 0;  // number of the mixture: part of the noise's key
    int64_t latent_dim = 0;
    bool exponential = true;  // the spread is e^raw, else softplus(raw)
    bool antithetic = false;  // every second draw uses the negated noise of the one before
    float sigma_min = 0;
};

// Copies of both matrices in the order of units, up [units, inputs] and down [units, width], in the
// kind of the panels: the weights of one unit are contiguous.
struct UnitRows {
    const int32_t* up = nullptr;
    const char* down = nullptr;
    int64_t crossover_rows = 0;  // read up to this many kept units of all tokens; above, the panels
};

// How many groups a draw keeps, and how a token's draws become one mask.
struct MaskRule {
    int64_t kept = 0;         // groups of one draw
    bool replacement = true;  // a draw may keep groups that an earlier draw of its token kept
    bool keep_norm = false;   // the mean mask is scaled to the root mean square of its draws' norms
};

// A wide layer whose units come in groups; each draw keeps the groups with the highest scores.
struct Infinity {
    Norm norm;
    Matrix router, scores;
    Experts tiles;  // the wide layer, cut: one "expert" per `tiles.units` units, whole groups
    Draws draws;
    MaskRule rule;
    int64_t groups = 0, group_units = 0;
    UnitRows rows;  // where groups are narrower than the tiles
    Repair repair;
    float residual_scale = 1;
};

}  // namespace moedial
