// ∞-MoE (arXiv 2601.17680, eq. 5 and 6): draws points from each token's Gaussian (`draws.h`),
// scores every group of units for each draw, keeps the best groups, averages the draws' masks, and
// runs the wide layer under the mean mask, by tiles or by single units (`units.h`).
#pragma once
#include "draws.h"
#include "topk.h"
#include "units.h"

namespace moedial {

// An integer with the same order as the floats: ordered_bits(a) < ordered_bits(b) if a < b.
inline int32_t ordered_bits(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

// The `kept`-th largest of the scores (as `ordered_bits`), found by bisection over the 32 bits: 32
// passes, however many scores there are.
inline int32_t threshold(const int32_t* orders, int64_t count, int64_t kept) {
    int64_t low = INT32_MIN, high = INT32_MAX;  // reach(low) >= kept > reach(high + 1)
    while (low < high) {
        const int32_t middle = int32_t(low + (high - low + 1) / 2);
        Ints counts{};
        int64_t i = 0, reach = 0;
        for (; i + LANES <= count; i += LANES) counts -= load(orders + i) >= middle;
        for (int lane = 0; lane < LANES; lane++) reach += counts[lane];
        for (; i < count; i++) reach += orders[i] >= middle;
        if (reach >= kept)
            low = middle;
        else
            high = int64_t(middle) - 1;
    }
    return int32_t(low);
}

// Adds one draw's `kept` largest scores to `sums`. Every draw may keep any group. Returns the sum
// of their squares.
inline float add_draw(const float* row, int64_t groups, const MaskRule& rule, int32_t* orders,
                      float* sums) {
    for (int64_t i = 0; i < groups; i++) orders[i] = ordered_bits(row[i]);
    const int32_t least = threshold(orders, groups, rule.kept);
    for (int64_t i = 0; i < groups; i++) sums[i] += orders[i] >= least ? row[i] : 0.0f;
    if (!rule.keep_norm) return 0;
    float squares = 0;
    for (int64_t i = 0; i < groups; i++) squares += orders[i] >= least ? row[i] * row[i] : 0.0f;
    return squares;
}

// The same without replacement: a group that an earlier draw kept ranks behind all others.
inline float add_new_draw(const float* row, int64_t groups, const MaskRule& rule, int32_t* orders,
                          char* taken, float* sums) {
    for (int64_t i = 0; i < groups; i++) orders[i] = taken[i] ? INT32_MIN : ordered_bits(row[i]);
    const int32_t least = threshold(orders, groups, rule.kept);
    float squares = 0;
    for (int64_t i = 0; i < groups; i++) {
        if (taken[i] || orders[i] < least) continue;
        taken[i] = 1;
        sums[i] += row[i];
        squares += row[i] * row[i];
    }
    return squares;
}

// Scales the mean mask to the root mean square of its draws' norms: draws that keep different
// groups would otherwise have a smaller mean. `squares`: the sum of the squared norms. The epsilons
// are those of the model's training.
inline void restore_norm(float* mean, int64_t groups, float squares, int64_t draws) {
    float own = 0;
    for (int64_t i = 0; i < groups; i++) own += mean[i] * mean[i];
    const float wanted = std::sqrt(squares / float(draws) + 1e-12f);
    const float scale = wanted / std::sqrt(own + 1e-6f);
    for (int64_t i = 0; i < groups; i++) mean[i] *= scale;
}

// mask [tokens, groups]: the mean over a token's draws of the scores that each keeps.
void masks(const float* scores, int64_t stride, const LayerRows& budget, int64_t groups,
           const MaskRule& rule, float* mask) {
    const int64_t* first_draw = first_draws(budget);
    const int64_t tasks = ceil_div(budget.tokens, 4);
    int32_t* order_room = scratch().take<int32_t>(tasks * groups);
    char* taken_room = scratch().take<char>(tasks * groups);
    parallel_rows(budget.tokens, 4, [&](int64_t first, int64_t last) {
        int32_t* orders = order_room + first / 4 * groups;
        char* taken = taken_room + first / 4 * groups;
        for (int64_t token = first; token < last; token++) {
            float* sums = mask + token * groups;
            std::memset(sums, 0, groups * 4);
            std::memset(taken, 0, groups);
            float squares = 0;
            for (int64_t draw = first_draw[token]; draw < first_draw[token + 1]; draw++) {
                const float* row = scores + draw * stride;
                squares += rule.replacement ? add_draw(row, groups, rule, orders, sums)
                                            : add_new_draw(row, groups, rule, orders, taken, sums);
            }
            const int64_t draws = budget.counts[token];
            for (int64_t i = 0; i < groups; i++) sums[i] /= float(draws);
            if (rule.keep_norm) restore_norm(sums, groups, squares, draws);
        }
    });
}

// Each token's kept groups, ascending.
struct KeptGroups {
    int32_t* group;  // [tokens, groups]
    int64_t* count;  // [tokens]
};

inline KeptGroups kept_groups(const float* mask, int64_t tokens, int64_t groups) {
    const KeptGroups kept{scratch().take<int32_t>(tokens * groups),
                          scratch().take<int64_t>(tokens)};
    parallel_rows(tokens, 16, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; token++) {
            int64_t count = 0;
            // Every group is written; the next one overwrites a group that is not kept.
            for (int64_t group = 0; group < groups; group++) {
                kept.group[token * groups + count] = int32_t(group);
                count += mask[token * groups + group] != 0;
            }
            kept.count[token] = count;
        }
    });
    return kept;
}

// The pairs (token, tile) with at least one kept group, sorted by tile. `load` gets each group's
// number of tokens.
inline RoutedPairs mask_pairs(const float* mask, int64_t tokens, const Infinity& layer,
                              int64_t* load) {
    const int64_t groups = layer.groups, tile_groups = layer.tiles.units / layer.group_units;
    const int64_t tiles = ceil_div(groups, tile_groups);
    const KeptGroups kept = kept_groups(mask, tokens, groups);
    int64_t* ends = scratch().take<int64_t>(tiles);
    std::memset(ends, 0, tiles * 8);
    std::memset(load, 0, groups * 8);
    // Calls visit(token, tile, group) once for each tile of a token, with the first kept group.
    const auto each = [&](auto&& visit) {
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t i = 0, last = -1; i < kept.count[token]; i++)
                if (const int64_t group = kept.group[token * groups + i],
                    tile = group / tile_groups;
                    tile != last)
                    visit(token, last = tile, group);
    };
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < kept.count[token]; i++) load[kept.group[token * groups + i]]++;
    each([&](int64_t, int64_t tile, int64_t) { ends[tile]++; });
    int64_t count = 0;
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t size = ends[tile];
        ends[tile] = count, count += size;
    }
    int32_t* token_of = scratch().take<int32_t>(count);
    float* weight = scratch().take<float>(count);
    each([&](int64_t token, int64_t tile, int64_t group) {
        token_of[ends[tile]] = int32_t(token);
        weight[ends[tile]++] = mask[token * groups + group];
    });
    RoutedPairs pairs{token_of, weight, ends, tiles};
    // The units of a tile with several groups have different weights: the mask has them.
    if (tile_groups > 1)
        pairs.mask = mask, pairs.mask_stride = groups, pairs.group_units = layer.group_units;
    return pairs;
}

// Whether so few units are kept that reading their rows one by one is faster. If so, `load` gets
// each group's number of tokens.
inline bool reads_single_units(const float* mask, int64_t tokens, const Infinity& layer,
                               int64_t* load) {
    const int64_t groups = layer.groups, limit = layer.rows.crossover_rows;
    // A token keeps at least `kept` groups.
    if (tokens * layer.rule.kept * layer.group_units > limit) return false;
    std::memset(load, 0, groups * 8);
    int64_t kept = 0;
    for (int64_t i = 0; i < tokens * groups; i++)
        load[i % groups] += mask[i] != 0, kept += mask[i] != 0;
    return kept * layer.group_units <= limit;
}

// The mean mask of each token, [tokens, groups]: draws points, scores the groups, and masks them.
inline const float* infinity_masks(const Inputs& in, const Infinity& layer, const LayerRows& budget,
                                   int64_t draws) {
    const int64_t stride = layer.router.outputs, size = layer.draws.latent_dim;
    float* gaussian = scratch().take<float>(budget.tokens * stride);
    linear_rows(in, budget.tokens, {layer.router}, false, stride, stride, gaussian);
    float* points = scratch().take<float>(draws * size);
    draw(gaussian, stride, budget, layer.draws, points);
    const Inputs encoded = encode_rows(points, draws, size, size, {}, layer.scores);
    const int64_t score_stride = layer.scores.outputs;
    float* scores = scratch().take<float>(draws * score_stride);
    linear_rows(encoded, draws, {layer.scores}, false, score_stride, score_stride, scores);
    float* mask = scratch().take<float>(budget.tokens * layer.groups);
    masks(scores, score_stride, budget, layer.groups, layer.rule, mask);
    return mask;
}

// Reports each token's kept groups, ascending; then -1.
inline void write_kept(const float* mask, int64_t tokens, int64_t groups,
                       const LayerReport& report) {
    for (int64_t token = 0; token < tokens; token++) {
        int32_t* routes = report.routes + token * report.route_width;
        int64_t count = 0;
        for (int64_t group = 0; group < groups; group++)
            if (mask[token * groups + group] != 0) routes[count++] = int32_t(group);
        std::fill(routes + count, routes + report.route_width, -1);
    }
}

// x += mean over the draws of the masked feed-forward layer of norm(x).
void infinity_block(float* x, int64_t width, const Infinity& layer, const LayerRows& budget,
                    const LayerReport& report) {
    const int64_t rows = budget.tokens;
    float* normed = scratch().take<float>(rows * width);
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, layer.router, normed);
    const float* mask = infinity_masks(in, layer, budget, budget.pairs());
    if (report.routes) write_kept(mask, rows, layer.groups, report);
    const bool same = inputs_match(layer.router, layer.tiles.up);
    const Inputs up = same ? in : encode_rows(normed, rows, width, width, {}, layer.tiles.up);
    const Output out{.y = x,
                     .rows = rows,
                     .width = width,
                     .scale = layer.residual_scale,
                     .repaired = RepairedRows(budget, layer.repair)};
    if (layer.rows.crossover_rows && reads_single_units(mask, rows, layer, report.load))
        return run_units(layer, up, mask, out);
    const RoutedPairs pairs = mask_pairs(mask, rows, layer, report.load);
    // Without pairs only a repair changes x.
    if (pairs.ends[pairs.experts - 1] || out.repaired.any())
        run_experts(up, pairs, layer.tiles, out);
}

}  // namespace moedial
