// Sparse top-k: softmax over the router's logits, each token's own number of best experts, the
// pairs sorted by expert.
#pragma once
#include "experts.h"

namespace moedial {

inline void softmax_row(const float* logits, int64_t n, float* p) {
    float most = logits[0], total = 0;
    for (int64_t i = 1; i < n; i++) most = logits[i] > most ? logits[i] : most;
    int64_t i = 0;
    vf totals{};
    for (; i + LANES <= n; i += LANES) {
        const vf e = exp(load(logits + i) - most);
        store(p + i, e), totals += e;
    }
    total = sum(totals);
    for (; i < n; i++) total += p[i] = exp(splat(logits[i] - most))[0];
    for (i = 0; i < n; i++) p[i] /= total;
}

// The k best of p in falling order; of equals the lower index first; what is not a number comes
// last.
inline void best_row(float* p, int64_t n, int64_t k, int32_t* index, float* value) {
    for (int64_t rank = 0; rank < k; rank++) {
        int64_t best = 0;
        for (int64_t i = 1; i < n; i++) best = !(p[i] <= p[best]) && p[i] == p[i] ? i : best;
        index[rank] = int32_t(best);
        value[rank] = p[best];
        p[best] = -1;  // below every probability
    }
}

struct Pairs {
    int32_t* token;
    float* weight;
    int64_t* ends;
    Calls calls(int64_t experts) const { return {token, weight, ends, experts}; }
};

// Counting sort of the pairs by expert; within an expert by token.
inline void sort_pairs(const int32_t* expert, const float* weight, const Tokens& t, int64_t experts,
                       const Pairs& out) {
    std::memset(out.ends, 0, experts * 8);
    for (int64_t i = 0; i < t.count; i++)
        for (int64_t k = 0; k < t.counts[i]; k++) out.ends[expert[i * t.k_max + k]]++;
    int64_t start = 0;
    for (int64_t e = 0; e < experts;
         e++) {  // first where each begins; the fill below moves it to where it ends
        const int64_t size = out.ends[e];
        out.ends[e] = start, start += size;
    }
    for (int64_t i = 0; i < t.count; i++)
        for (int64_t k = 0; k < t.counts[i]; k++) {
            const int64_t at = out.ends[expert[i * t.k_max + k]]++;
            out.token[at] = int32_t(i), out.weight[at] = weight[i * t.k_max + k];
        }
}

void route(const float* logits, int64_t stride, const Tokens& t, int64_t experts, bool normalise,
           int32_t* token, float* weight, int64_t* ends) {
    int32_t* chosen = scratch().take<int32_t>(t.count * t.k_max);
    float* share = scratch().take<float>(t.count * t.k_max);
    float* room = scratch().take<float>(t.count * experts);
    parallel_rows(
        t.count, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                float *p = room + i * experts, *w = share + i * t.k_max, total = 0;
                softmax_row(logits + i * stride, experts, p);
                best_row(p, experts, t.counts[i], chosen + i * t.k_max, w);
                if (!normalise) continue;
                for (int64_t k = 0; k < t.counts[i]; k++) total += w[k];
                for (int64_t k = 0; k < t.counts[i]; k++) w[k] /= total;
            }
        },
        t.count * t.k_max * experts);
    sort_pairs(chosen, share, t, experts, {token, weight, ends});
}

inline int64_t total_pairs(const Tokens& t) {
    int64_t pairs = 0;
    for (int64_t i = 0; i < t.count; i++) pairs += t.counts[i];
    return pairs;
}

inline void loads(const int64_t* ends, int64_t experts, int64_t* load) {
    for (int64_t e = 0; e < experts; e++) load[e] = ends[e] - (e ? ends[e - 1] : 0);
}

// x += experts(norm(x)); returns the routed pairs and each expert's share of them.
int64_t topk_block(float* x, int64_t width, const TopK& layer, const Tokens& t, int64_t* load) {
    const int64_t pairs = total_pairs(t), stride = layer.router.n;
    // Router and experts may be stored in different kinds: the normed rows are kept for the second
    // encoding.
    float* h = scratch().take<float>(t.count * width);
    const Inputs in = encode_rows(x, t.count, width, width, layer.norm, layer.router, h);
    float* logits = scratch().take<float>(t.count * stride);
    linear_rows(in, t.count, {layer.router}, false, stride, stride, logits);
    const Pairs sorted{scratch().take<int32_t>(pairs), scratch().take<float>(pairs),
                       scratch().take<int64_t>(layer.count)};
    route(logits, stride, t, layer.count, layer.normalise, sorted.token, sorted.weight,
          sorted.ends);
    const bool same = inputs_match(layer.router, layer.experts.up);
    const Inputs rows = same ? in : encode_rows(h, t.count, width, width, {}, layer.experts.up);
    run_experts(rows, t.count, width, sorted.calls(layer.count), layer.experts, true, x);
    loads(sorted.ends, layer.count, load);
    return pairs;
}

}  // namespace moedial
