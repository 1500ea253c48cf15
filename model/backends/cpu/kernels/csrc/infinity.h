// ∞-MoE: draws from each token's Gaussian, scores, the kept share of each draw, and the mean of the
// masks (arXiv 2601.17680, eq. 5 and 6). The numbers drawn are those of model/noise.py.
#pragma once
#include "topk.h"
#include "units.h"

namespace moedial {

inline uint64_t mix(uint64_t x) {  // SplitMix64 (Steele et al. 2014)
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

inline void noise_row(uint64_t key, uint64_t sample, const Draws& d, float* e) {
    const uint64_t groups = uint64_t(d.space + 3) / 4;
    for (uint64_t g = 0; g < groups; g++) {
        const uint64_t bits = mix(key + (sample * groups + g + 1) * GOLDEN);
        for (int64_t i = 0; i < 4 && int64_t(4 * g) + i < d.space; i++)
            e[4 * g + i] = d.quantiles[bits >> (16 * i) & 0xFFFF];
    }
}

inline float spread(float raw, const Draws& d) {
    if (d.exponential) return exp(splat(raw))[0] + d.sigma_min;
    return (raw > 20 ? raw : std::log1p(std::exp(raw))) + d.sigma_min;
}

// z [R, space], the draws of token 0 first: mean + spread · noise. gaussian [T, stride]: means,
// then raw spreads.
void draw(const float* gaussian, int64_t stride, const Tokens& t, const Draws& d, float* z) {
    int64_t* first = scratch().take<int64_t>(t.count + 1);
    first[0] = 0;
    for (int64_t i = 0; i < t.count; i++) first[i + 1] = first[i] + t.counts[i];
    float* sigma = scratch().take<float>(t.count * d.space);
    parallel_rows(t.count, 8, [&](int64_t from, int64_t until) {
        for (int64_t i = from; i < until; i++) {
            const uint64_t key = mix(mix(uint64_t(t.seeds[i]) + uint64_t(d.layer + 1) * GOLDEN) +
                                     uint64_t(t.positions[i]) * GOLDEN);
            const float *mean = gaussian + i * stride, *raw = mean + d.space;
            float* s = sigma + i * d.space;
            for (int64_t c = 0; c < d.space; c++) s[c] = spread(raw[c], d);
            for (int64_t k = 0; k < t.counts[i]; k++) {
                float* out = z + (first[i] + k) * d.space;
                noise_row(key, uint64_t(d.antithetic ? k / 2 : k), d, out);
                const float sign = d.antithetic && k % 2 ? -1.0f : 1.0f;
                for (int64_t c = 0; c < d.space; c++) out[c] = mean[c] + s[c] * (sign * out[c]);
            }
        }
    });
}

// Integers in the order of the floats they come from.
inline vi rank(vf v) {
    const vi b = bits(v);
    return b ^ ((b >> 31) & 0x7FFFFFFF);
}

// The `kept`-th largest of n scores, found by halving the range of its bits: 32 passes whatever n
// is.
inline int32_t threshold(const int32_t* ranks, int64_t n, int64_t kept) {
    int64_t low = INT32_MIN, high = INT32_MAX;  // count(low) >= kept > count(high + 1)
    while (low < high) {
        const int32_t middle = int32_t(low + (high - low + 1) / 2);
        vi count{};
        int64_t i = 0, reach = 0;
        for (; i + LANES <= n; i += LANES) count -= load(ranks + i) >= middle;
        for (int l = 0; l < LANES; l++) reach += count[l];
        for (; i < n; i++) reach += ranks[i] >= middle;
        if (reach >= kept)
            low = middle;
        else
            high = int64_t(middle) - 1;
    }
    return int32_t(low);
}

// mask [T, scored]: the mean over a token's draws of its scores, those under the draw's `kept`-th
// largest zeroed.
void masks(const float* scores, int64_t stride, const Tokens& t, int64_t scored, int64_t kept,
           float* mask) {
    int64_t* first = scratch().take<int64_t>(t.count + 1);
    first[0] = 0;
    for (int64_t i = 0; i < t.count; i++) first[i + 1] = first[i] + t.counts[i];
    int32_t* ranks = scratch().take<int32_t>(ceil_div(t.count, 4) * scored);
    parallel_rows(t.count, 4, [&](int64_t from, int64_t until) {
        int32_t* r = ranks + from / 4 * scored;
        for (int64_t i = from; i < until; i++) {
            float* m = mask + i * scored;
            std::memset(m, 0, scored * 4);
            for (int64_t k = first[i]; k < first[i + 1]; k++) {
                const float* s = scores + k * stride;
                for (int64_t b = 0; b < scored; b++) {
                    int32_t bits;
                    std::memcpy(&bits, s + b, 4);
                    r[b] = bits ^ ((bits >> 31) & 0x7FFFFFFF);
                }
                const int32_t least = threshold(r, scored, kept);
                for (int64_t b = 0; b < scored; b++) m[b] += r[b] >= least ? s[b] : 0.0f;
            }
            for (int64_t b = 0; b < scored; b++) m[b] /= float(t.counts[i]);
        }
    });
}

// Pairs (token, group of units) in which some score is kept, sorted by group; `load` counts each
// score's tokens.
inline Calls mask_calls(const float* mask, const Tokens& t, const Infinity& layer, int64_t* load) {
    const int64_t scored = layer.scored, per = layer.blocks.units / layer.share,
                  groups = ceil_div(scored, per);
    int32_t* kept = scratch().take<int32_t>(t.count * scored);  // each token's scores, rising
    int64_t* count = scratch().take<int64_t>(t.count);
    parallel_rows(t.count, 16, [&](int64_t from, int64_t until) {
        for (int64_t i = from; i < until; i++) {
            int64_t n = 0;
            for (int64_t b = 0; b < scored; b++)
                kept[i * scored + n] = int32_t(b), n += mask[i * scored + b] != 0;
            count[i] = n;
        }
    });
    int64_t* ends = scratch().take<int64_t>(groups);
    std::memset(ends, 0, groups * 8);
    std::memset(load, 0, scored * 8);
    const auto each = [&](auto&& f) {  // f(token, group, score), once for each group of a token
        for (int64_t i = 0; i < t.count; i++)
            for (int64_t n = 0, last = -1; n < count[i]; n++)
                if (const int64_t b = kept[i * scored + n], g = b / per; g != last)
                    f(i, last = g, b);
    };
    for (int64_t i = 0; i < t.count; i++)
        for (int64_t n = 0; n < count[i]; n++) load[kept[i * scored + n]]++;
    each([&](int64_t, int64_t g, int64_t) { ends[g]++; });
    int64_t pairs = 0;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t size = ends[g];
        ends[g] = pairs, pairs += size;
    }
    int32_t* token = scratch().take<int32_t>(pairs);
    float* weight = scratch().take<float>(pairs);
    each([&](int64_t i, int64_t g, int64_t b) {
        token[ends[g]] = int32_t(i), weight[ends[g]++] = mask[i * scored + b];
    });
    Calls calls{token, weight, ends, groups};
    if (per > 1) calls.mask = mask, calls.stride = scored, calls.share = layer.share;
    return calls;
}

// Counts each score's tokens; whether so few units are kept that reading their rows alone is
// faster.
inline bool few_units(const float* mask, const Tokens& t, const Infinity& layer, int64_t* load) {
    const int64_t scored = layer.scored;
    if (t.count * layer.kept * layer.share > layer.rows.most)
        return false;  // a token keeps this many at least
    std::memset(load, 0, scored * 8);
    int64_t units = 0;
    for (int64_t i = 0; i < t.count * scored; i++)
        load[i % scored] += mask[i] != 0, units += mask[i] != 0;
    return units * layer.share <= layer.rows.most;
}

// x += mean over the draws of the masked feed-forward layer of norm(x); returns ΣK and each score's
// tokens.
int64_t infinity_block(float* x, int64_t width, const Infinity& layer, const Tokens& t,
                       int64_t* load) {
    const int64_t draws = total_pairs(t), stride = layer.router.n, space = layer.draws.space;
    float* h = scratch().take<float>(t.count * width);
    const Inputs in = encode_rows(x, t.count, width, width, layer.norm, layer.router, h);
    float* gaussian = scratch().take<float>(t.count * stride);
    linear_rows(in, t.count, {layer.router}, false, stride, stride, gaussian);
    float* z = scratch().take<float>(draws * space);
    draw(gaussian, stride, t, layer.draws, z);
    const Inputs rows = encode_rows(z, draws, space, space, {}, layer.scores);
    float* scores = scratch().take<float>(draws * layer.scores.n);
    linear_rows(rows, draws, {layer.scores}, false, layer.scores.n, layer.scores.n, scores);
    float* mask = scratch().take<float>(t.count * layer.scored);
    masks(scores, layer.scores.n, t, layer.scored, layer.kept, mask);
    const bool same = inputs_match(layer.router, layer.blocks.up);
    const Inputs up = same ? in : encode_rows(h, t.count, width, width, {}, layer.blocks.up);
    if (layer.rows.most && few_units(mask, t, layer, load)) {
        run_units(layer.rows, up, t.count, width, layer.blocks, mask, layer.scored, layer.share, x);
        return draws;
    }
    const Calls calls = mask_calls(mask, t, layer, load);
    if (calls.ends[calls.experts - 1])
        run_experts(up, t.count, width, calls, layer.blocks, true, x);
    return draws;
}

}  // namespace moedial
