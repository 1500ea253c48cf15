// The parameters of the mixtures' ops, in the same way as in `params.h`.
#pragma once
#include "params.h"

namespace moedial {

// How logits become a choice of experts and their weights (`Router` in mixtures.h).
struct RoutingParams {
    int64_t trained = 0, score = 0;
    bool normalise = false;
    double weight_scale = 1;
    OptionalTensor selection_bias;  // [experts]
    int64_t groups = 1, kept_groups = 1;
    bool top2 = false;
    double jitter = 0, normalise_eps = 0;
    bool clamp_sum = false;

    void each(auto&& visit) {
        visit({"trained"}, trained);
        visit({"score"}, score);
        visit({"normalise"}, normalise);
        visit({"weight_scale"}, weight_scale);
        visit({"selection_bias"}, selection_bias);
        visit({"groups"}, groups);
        visit({"kept_groups"}, kept_groups);
        visit({"top2"}, top2);
        visit({"jitter"}, jitter);
        visit({"normalise_eps"}, normalise_eps);
        visit({"clamp_sum"}, clamp_sum);
    }
};

// Which experts a token's pairs go to.
struct RouterParams {
    PackedParams router;        // [experts, width]; with `shared_gate` one output more
    OptionalTensor logit_bias;  // padded like the outputs
    int64_t experts = 0;
    bool weigh_input = false;  // a weight multiplies its expert's input, not its output
    bool shared_gate = false;  // the sigmoid of the last output weighs the shared part
    RoutingParams routing;

    void each(auto&& visit) {
        router.each(visit, "router");
        visit({"logit_bias"}, logit_bias);
        visit({"experts"}, experts);
        visit({"weigh_input"}, weigh_input);
        visit({"shared_gate"}, shared_gate);
        routing.each(visit);
    }
};

// The tables that repair a mixture's result (`Repair` in mixtures.h); none: it cannot be repaired.
struct RepairParams {
    OptionalTensor scale, shift;  // [counts, width]

    void each(auto&& visit) {
        visit({"repair", "_scale"}, scale);
        visit({"repair", "_shift"}, shift);
    }
};

// x += residual_scale * top-k mixture(norm(x)). A shared part is the last `shared_pieces` of the
// experts, behind the routed ones, or a layer of its own.
struct TopKParams {
    NormParams norm;
    RouterParams router;
    ExpertsParams experts;
    int64_t shared_pieces = 0;
    ExpertsParams shared;  // 0 units: none
    RepairParams repair;
    double residual_scale = 1;

    void each(auto&& visit) {
        norm.each(visit);
        router.each(visit);
        experts.each(visit);
        visit({"shared_pieces"}, shared_pieces);
        shared.each([&](Name name, auto& member) {
            visit(Name{name.stem, name.suffix, "shared_"}, member);
        });
        repair.each(visit);
        visit({"residual_scale"}, residual_scale);
    }
};

// How the points of an ∞-MoE are drawn from each token's Gaussian.
struct DrawsParams {
    Tensor quantiles;       // [65536]
    OptionalTensor points;  // [largest count, latent_dim]: fixed draws, instead of random ones
    int64_t layer = 0;      // number of the mixture
    bool exponential = true, antithetic = false;
    double sigma_min = 0;

    void each(auto&& visit) {
        visit({"quantiles"}, quantiles);
        visit({"points"}, points);
        visit({"layer"}, layer);
        visit({"exponential"}, exponential);
        visit({"sigma_min"}, sigma_min);
        visit({"antithetic"}, antithetic);
    }
};

// x += residual_scale * ∞-MoE(norm(x)).
struct InfinityParams {
    NormParams norm;
    PackedParams router;  // [2 latent_dim, width]: means, then raw spreads
    Tensor scores;  // packed floats [groups, latent_dim]: which groups win is decided in float32
    int64_t latent_dim = 0;
    PackedParams up, down;  // the wide layer in tiles of `tile_units` units, whole groups
    int64_t units = 0, tile_units = 0, groups = 0, kept = 0, activation = 0;
    DrawsParams draws;
    bool replacement = true;            // a draw may keep what an earlier draw kept
    bool keep_norm = false;             // the mean mask gets the mean norm of its draws
    OptionalTensor up_rows, down_rows;  // the wide layer unit by unit
    int64_t crossover_rows = 0;         // kept units up to which it is read so
    RepairParams repair;
    double residual_scale = 1;

    void each(auto&& visit) {
        norm.each(visit);
        router.each(visit, "router");
        visit({"scores"}, scores);
        visit({"latent_dim"}, latent_dim);
        up.each(visit, "up");
        down.each(visit, "down");
        visit({"units"}, units);
        visit({"tile_units"}, tile_units);
        visit({"groups"}, groups);
        visit({"kept"}, kept);
        visit({"activation"}, activation);
        draws.each(visit);
        visit({"replacement"}, replacement);
        visit({"keep_norm"}, keep_norm);
        visit({"up_rows"}, up_rows);
        visit({"down_rows"}, down_rows);
        visit({"crossover_rows"}, crossover_rows);
        repair.each(visit);
        visit({"residual_scale"}, residual_scale);
    }
};

}  // namespace moedial
