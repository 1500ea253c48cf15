// Sparse top-k: softmax over the router's logits, each token's own number of best experts, the
// pairs sorted by expert.
#pragma once
#include "experts.h"

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

// Room for routed pairs.
struct PairsOut {
    int32_t* token;
    float* weight;
    int64_t* ends;
    RoutedPairs pairs(int64_t experts) const { return {token, weight, ends, experts}; }
};

// Counting sort of the pairs by expert; within an expert by token. `expert` and `weight` have k_max
// entries per token, of which its count is used.
inline void sort_pairs(const int32_t* expert, const float* weight, const LayerRows& budget,
                       int64_t experts, const PairsOut& out) {
    const int64_t k_max = budget.k_max;
    std::memset(out.ends, 0, experts * 8);
    for (int64_t token = 0; token < budget.tokens; token++)
        for (int64_t rank = 0; rank < budget.counts[token]; rank++)
            out.ends[expert[token * k_max + rank]]++;
    int64_t start = 0;
    // First where each begins; the fill below moves it to where it ends.
    for (int64_t one = 0; one < experts; one++) {
        const int64_t size = out.ends[one];
        out.ends[one] = start, start += size;
    }
    for (int64_t token = 0; token < budget.tokens; token++)
        for (int64_t rank = 0; rank < budget.counts[token]; rank++) {
            const int64_t pair = out.ends[expert[token * k_max + rank]]++;
            out.token[pair] = int32_t(token), out.weight[pair] = weight[token * k_max + rank];
        }
}

// Each token's best experts, weighted by their probabilities, as pairs sorted by expert.
void route(const float* logits, int64_t stride, const LayerRows& budget, int64_t experts,
           bool normalise, int32_t* token, float* weight, int64_t* ends) {
    const int64_t k_max = budget.k_max;
    int32_t* chosen = scratch().take<int32_t>(budget.tokens * k_max);
    float* chosen_weights = scratch().take<float>(budget.tokens * k_max);
    float* room = scratch().take<float>(budget.tokens * experts);
    parallel_rows(
        budget.tokens, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                float *probabilities = room + row * experts,
                      *weights = chosen_weights + row * k_max;
                float total = 0;
                const int64_t count = budget.counts[row];
                softmax_row(logits + row * stride, experts, probabilities);
                best_row(probabilities, experts, count, chosen + row * k_max, weights);
                if (!normalise) continue;
                // Summed in falling order, which does not depend on the expert's numbers.
                for (int64_t rank = 0; rank < count; rank++) total += weights[rank];
                for (int64_t rank = 0; rank < count; rank++) weights[rank] /= total;
            }
        },
        budget.tokens * k_max * experts);
    sort_pairs(chosen, chosen_weights, budget, experts, {token, weight, ends});
}

// How many pairs each expert has.
inline void loads(const int64_t* ends, int64_t experts, int64_t* load) {
    for (int64_t expert = 0; expert < experts; expert++)
        load[expert] = ends[expert] - (expert ? ends[expert - 1] : 0);
}

// x += experts(norm(x)); returns the routed pairs and each expert's share of them.
int64_t topk_block(float* x, int64_t width, const TopK& layer, const LayerRows& budget,
                   int64_t* load) {
    const Matrix& router = layer.router.weight;
    const int64_t pairs = budget.pairs(), stride = router.outputs, rows = budget.tokens;
    const int64_t count = layer.router.experts;
    // Router and experts may be stored in different kinds: the normed rows are kept for the second
    // encoding.
    float* normed = scratch().take<float>(rows * width);
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, router, normed);
    float* logits = scratch().take<float>(rows * stride);
    linear_rows(in, rows, {router}, false, stride, stride, logits);
    const PairsOut sorted{scratch().take<int32_t>(pairs), scratch().take<float>(pairs),
                          scratch().take<int64_t>(count)};
    route(logits, stride, budget, count, layer.router.normalise, sorted.token, sorted.weight,
          sorted.ends);
    const bool same = inputs_match(router, layer.experts.up);
    const Inputs expert_in =
        same ? in : encode_rows(normed, rows, width, width, {}, layer.experts.up);
    run_experts(expert_in, rows, width, sorted.pairs(count), layer.experts, true, x);
    loads(sorted.ends, count, load);
    return pairs;
}

}  // namespace moedial
