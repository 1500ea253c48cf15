// The plain values of mixtures: what the tokens of a step may use of them, what they are made of,
// and what they tell of their work.
#pragma once
#include "values.h"

namespace moedial {

// What divides the probabilities of a token's experts where its count is below the trained one.
// Above RAW: the sum of so many best ones, whether they run or not.
enum Normaliser : int64_t {
    KEPT = -2,     // the sum of those that run
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

    // Whether how many experts run depends on the token.
    bool adaptive() const { return threshold != 0 || top_p != 0 || reuse != 0; }
    // Whether it says anything of the router's choice and weights.
    bool routes() const { return normaliser != TRAINED || adaptive() || skip != 0; }
};

// The tokens of a step in one mixture layer: each one's count, and what its draws depend on. Plain
// torch's counterpart is `LayerStep` (model/step.py).
struct LayerRows {
    const int64_t* counts = nullptr;     // experts, or draws, of each token
    const int64_t* seeds = nullptr;      // noise seeds, only where something is drawn
    const int64_t* positions = nullptr;  // only where something is drawn
    int64_t tokens = 0, k_max = 0;       // k_max: no count is higher
    // The step's distinct rules, and which of them each token has; none: all have their family's.
    const RoutingRule* rules = nullptr;
    const int64_t* rule_of = nullptr;
    int64_t rule_count = 0;
    // Of each rule which experts its tokens may run, 0 or 1; none: all.
    const uint8_t* allowed = nullptr;  // [rules, allowed_stride], from this layer's first expert on
    int64_t allowed_stride = 0;

    // Those of a token; none: all.
    const uint8_t* allowed_of(int64_t token) const {
        return allowed ? allowed + rule_of[token] * allowed_stride : nullptr;
    }

    const RoutingRule& rule(int64_t token) const { return rules[rule_of[token]]; }

    // Whether some rule of the step is such a one.
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

    // The most pairs that a token's rule lets it have, and those of all tokens together.
    int64_t most_pairs_of(int64_t token, int64_t experts) const {
        const int64_t most = counts[token] + (rules ? rule(token).reuse : 0);
        return most < experts ? most : experts;
    }
    int64_t most_pairs(int64_t experts) const {
        int64_t total = 0;
        for (int64_t token = 0; token < tokens; token++) total += most_pairs_of(token, experts);
        return total;
    }
};

// What a mixture tells of its work. Null: not wanted.
struct LayerReport {
    int64_t* load = nullptr;    // the tokens of each expert or group
    int64_t* used = nullptr;    // the experts that each token ran
    int32_t* routes = nullptr;  // [tokens, route_width]: which, best first, or its kept groups,
                                // rising; -1 behind the last
    int64_t route_width = 0;
};

// For each count from 0 on, what brings a mixture's result to its mean and spread at the trained
// count: y * scale + shift.
struct Repair {
    const float *scale = nullptr, *shift = nullptr;  // [counts, width]
    int64_t counts = 0;
};

// What an expert is worth to a token.
enum Score : int32_t {
    SOFTMAX,       // its share of e^logit among all experts
    SIGMOID,       // 1 / (1 + e^-logit)
    SPARSE_MIXER,  // its share among those not far below it, without those chosen before it
};

// How a token's experts are chosen and weighted: `Router` of model/shapes/mixtures.py.
struct Router {
    Linear logits;  // [experts, and the gate of a shared part, width]
    int64_t experts = 0;
    int64_t trained = 0;  // the count from which on a rule's normaliser does not apply
    Score score = SOFTMAX;
    bool normalise = false;  // the weights of those that run are divided by their sum
    float scale = 1;         // of the weights in the end
    const float* selection_bias = nullptr;  // [experts]: added to the scores for choosing alone
    int64_t groups = 1, kept_groups = 1;    // of neighbours; a token chooses inside its best ones
    bool top2 = false;  // a group is worth the sum of its two best, else its best
    float jitter = 0;   // sparse mixer: how far below the best an expert may lie, relatively
    float eps = 0;      // added to, or with `clamp_sum` the least of, the sum that normalises
    bool clamp_sum = false;

    // The experts that a token chooses among.
    int64_t most() const { return experts / groups * kept_groups; }

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

// What runs for every token beside its experts, weighted by 1, or with `gated` by the sigmoid of
// the router's last output. It lies behind the experts, in pieces of their width, or is a layer of
// its own.
struct Shared {
    int64_t pieces = 0;  // the last so many of the mixture's experts
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
    float residual_scale = 1;  // of what is added to the rows
};

// How the points of an ∞-MoE are drawn from each token's Gaussian.
struct Draws {
    const float* quantiles = nullptr;  // [65536] of the standard normal distribution
    const float* points = nullptr;     // [point_rows, latent_dim]: fixed draws, nothing is random
    int64_t point_rows = 0;
    int64_t layer = 0;  // number of the mixture: part of the noise's key
    int64_t latent_dim = 0;
    bool exponential = true;  // the spread is e^raw, else softplus(raw)
    bool antithetic = false;  // each second draw mirrors the one before
    float sigma_min = 0;
};

// Unit-major copies of both matrices, up [units, inputs] and down [units, width], in the kind of
// the panels: what a unit needs lies together.
struct UnitRows {
    const int32_t* up = nullptr;
    const char* down = nullptr;
    int64_t crossover_rows = 0;  // they are read for up to so many kept units of all tokens
};

// What a draw keeps of its scores, and how a token's draws become one mask.
struct MaskRule {
    int64_t kept = 0;         // groups of one draw
    bool replacement = true;  // a draw may keep what an earlier draw of its token kept
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
