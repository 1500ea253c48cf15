// Runs exactly the routed (token, expert) pairs: gate, up and activation in one pass, down and the
// weighted sum in a second one. A task of the second pass is some columns of the output, so no two
// threads write one element, and a token's results are summed in the order of the experts, whatever
// else is in the batch.
#pragma once
#include "linear.h"
#include "output.h"

namespace moedial {

// The hidden rows between the two products.
struct Hidden {
    Inputs in;  // [pairs, units], activated and weighted, as `down` multiplies them
    // The same before quantisation, which needs more of a row than one panel.
    float* floats = nullptr;
};

// hidden = activation of one slice of an expert's first product. If gated, the first half of the
// slice are gates, the second half their ups. `weight` multiplies the row before the activation.
inline void activate_slice(const Experts& experts, const Matrix& matrix, const int32_t* sums,
                           int64_t first, int64_t outputs, float row_scale, float weight,
                           const float* bias, float* hidden) {
    const int64_t half = experts.gated ? outputs / 2 : outputs;
    const auto finished = [&](int64_t i) {
        const Floats values = finish(matrix, sums + i, first + i, row_scale) * weight;
        return bias ? values + load(bias + first + i) : values;
    };
    for (int64_t i = 0; i < half; i += LANES)
        store(hidden + i, experts.gated
                              ? activate_gated(finished(i), finished(half + i), experts.activation)
                              : activate(finished(i), experts.activation));
}

// The weight of a pair.
inline float weight_of(const RoutedPairs& pairs, int64_t pair) {
    return pairs.weight ? pairs.weight[pair] : 1.0f;
}

// Multiplies hidden units by the pair's weight, or each by the token's mask. `unit`: the number of
// the first one among the units of all experts.
inline void weigh(const RoutedPairs& pairs, int64_t pair, int64_t token, int64_t unit,
                  int64_t count, float* hidden) {
    if (pairs.mask) {
        const float* mask = pairs.mask + token * pairs.mask_stride;
        int64_t i = 0;
        if (pairs.group_units == 1)
            for (; i + LANES <= count && unit + i + LANES <= pairs.mask_stride; i += LANES)
                store(hidden + i, load(hidden + i) * load(mask + unit + i));
        // Padded units lie behind the mask's end; they are 0, whatever they are multiplied by.
        for (; i < count; i++)
            hidden[i] *= mask[std::min((unit + i) / pairs.group_units, pairs.mask_stride - 1)];
    } else if (pairs.weight) {
        for (int64_t i = 0; i < count; i += LANES)
            store(hidden + i, load(hidden + i) * pairs.weight[pair]);
    }
}

// Encodes a part of a pair's hidden row for the product with `down`.
inline void encode_part(const Hidden& to, int64_t row, int64_t first, const float* hidden,
                        int64_t count) {
    if (to.floats) {
        std::memcpy(to.floats + row * to.in.inputs + first, hidden, count * 4);
    } else if (to.in.kind == FLOAT) {
        std::memcpy(to.in.data + row * to.in.words + first, hidden, count * 4);
    } else {
        uint16_t* out = (uint16_t*)(to.in.data + row * to.in.words) + first;
        int64_t i = 0;
        for (; i + 2 * LANES <= count; i += 2 * LANES)
            store_bf16(out + i, load(hidden + i), load(hidden + i + LANES));
        for (; i < count; i++) out[i] = to_bf16(hidden[i]);
    }
}

// Rows [first, first + rows) of the sorted pairs, all of one expert.
struct ExpertRows {
    int64_t expert, first, rows;
};

// Lists the experts that have pairs; returns how many entries. An expert with more than `max_rows`
// pairs has several entries, so that no thread waits long for another.
inline int64_t list_expert_rows(const RoutedPairs& pairs, int64_t max_rows, ExpertRows* work) {
    int64_t count = 0, start = 0;
    for (int64_t expert = 0; expert < pairs.experts; expert++) {
        for (; start < pairs.ends[expert]; start = work[count - 1].first + work[count - 1].rows)
            work[count++] = {expert, start, std::min(max_rows, pairs.ends[expert] - start)};
    }
    return count;
}

// Computes one panel of a pair's hidden row from its unfinished sums: scale, activation, weight.
inline void finish_panel(const Inputs& in, const RoutedPairs& pairs, const Experts& experts,
                         int64_t expert, const Slice& panel, int64_t pair, const int32_t* sums,
                         const Hidden& to) {
    const int64_t token = pairs.token ? pairs.token[pair] : pair;
    // The panel has the expert's units [first, first + count).
    const int64_t first = experts.gated ? panel.first / 2 : panel.first;
    const int64_t count = experts.gated ? panel.outputs / 2 : panel.outputs;
    const float scale = in.scales ? in.scales[token] : 1.0f;
    const float weight = experts.weigh_input ? weight_of(pairs, pair) : 1.0f;
    alignas(64) float hidden[PANEL];
    activate_slice(experts, *panel.matrix, sums, panel.first, panel.outputs, scale, weight,
                   experts.up_bias_of(expert), hidden);
    if (!experts.weigh_input)
        weigh(pairs, pair, token, expert * experts.units + first, count, hidden);
    encode_part(to, pair, first, hidden, count);
}

// Some neighbouring panels of the first product, for some pairs of one expert.
inline void up_tile(const Inputs& in, const RoutedPairs& pairs, const Experts& experts,
                    const ExpertRows& work, int64_t first_panel, int64_t panels, const Hidden& to) {
    ProductRoom& room = product_room();
    const Matrix matrix = experts.up.at(work.expert);
    const int64_t start = first_panel * PANEL, end = start + panels * PANEL;
    const Slice all{&matrix, start, std::min(end, matrix.outputs) - start};
    const int64_t height = block_rows(work.rows);
    for (int64_t done = 0; done < work.rows; done += height) {
        const int64_t now = std::min(height, work.rows - done), pair = work.first + done;
        for (int64_t row = 0; row < now; row++)
            room.rows[row] = in.row(pairs.token ? pairs.token[pair + row] : pair + row);
        product(room.rows, now, all, room.own, 0, false);
        for (int64_t row = 0; row < now; row++)
            for (int64_t panel = first_panel; panel < first_panel + panels; panel++)
                finish_panel(in, pairs, experts, work.expert,
                             {&matrix, panel * PANEL, matrix.panel_outputs(panel)}, pair + row,
                             room.own[row] + panel * PANEL - start, to);
    }
}

// y[:, slice] += Σ over these pairs of down · hidden + weight · bias. Sums that need no scale are
// added to y by the product itself.
inline void down_tile(const Hidden& hidden, const RoutedPairs& pairs, const Experts& experts,
                      const ExpertRows& work, const Slice& slice, float* y, int64_t width) {
    ProductRoom& room = product_room();
    const Matrix& matrix = *slice.matrix;
    const float* bias = experts.down_bias_of(work.expert);
    const bool direct = matrix.kind == FLOAT || matrix.kind == BFLOAT16;
    const int64_t height = block_rows(work.rows);
    for (int64_t done = 0; done < work.rows; done += height) {
        const int64_t now = std::min(height, work.rows - done), pair = work.first + done;
        for (int64_t row = 0; row < now; row++) {
            const int64_t token = pairs.token ? pairs.token[pair + row] : pair + row;
            room.rows[row] = hidden.in.row(pair + row);
            room.sums[row] = (int32_t*)(y + token * width + slice.first);
        }
        // The tokens' sums are not contiguous: `room.sums` says where each one lies.
        product(room.rows, now, slice, direct ? room.sums : room.own, 0, direct);
        if (direct && !bias) continue;
        for (int64_t row = 0; row < now; row++) {
            const float scale = hidden.in.scales ? hidden.in.scales[pair + row] : 1.0f;
            const float weight = experts.weigh_input ? 1.0f : weight_of(pairs, pair + row);
            float* out = (float*)room.sums[row];
            for (int64_t i = 0; i < slice.outputs; i += LANES) {
                Floats sums = load(out + i);
                if (!direct) sums += finish(matrix, room.own[row] + i, slice.first + i, scale);
                if (bias) sums += load(bias + slice.first + i) * weight;
                store(out + i, sums);
            }
        }
    }
}

// Prefetches the next expert's part of a slice: it is too short for the hardware prefetcher.
inline void prefetch_slice(const Matrix& matrix, const Slice& slice) {
    const int64_t panel = slice.first / PANEL;
    const int64_t bytes = std::min<int64_t>(
        matrix.panel_outputs(panel) * matrix.groups() * matrix.group_bytes(), 8192);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(matrix.panel(panel) + i);
}

// Allocates the hidden rows of all pairs.
inline Hidden hidden_rows(const Experts& experts, int64_t pairs) {
    Hidden hidden{inputs(experts.down, pairs)};
    if (experts.down.kind == INT8 || experts.down.kind == GROUPED)
        hidden.floats = scratch().take<float>(pairs * experts.down.inputs);
    return hidden;
}

// What both products of one layer share: the pairs in pieces of work, and the hidden rows.
struct ExpertsRun {
    const RoutedPairs& pairs;
    const Experts& experts;
    Hidden hidden;
    ExpertRows* work;
    int64_t count, pieces, mean_rows;  // pairs, pieces of work, pairs of each on average
};

inline ExpertsRun plan_experts(const RoutedPairs& pairs, const Experts& experts) {
    const int64_t count = pairs.ends[pairs.experts - 1];
    const Hidden hidden = hidden_rows(experts, count);
    ExpertRows* work = scratch().take<ExpertRows>(pairs.experts + ceil_div(count, ROW_BLOCK));
    const int64_t pieces = list_expert_rows(pairs, 8 * ROW_BLOCK, work);
    return {pairs, experts, hidden, work, count, pieces, pieces ? ceil_div(count, pieces) : 0};
}

// First product: a task is a run of panels of one piece of work.
inline void run_up(const Inputs& in, const ExpertsRun& step) {
    const Matrix& up = step.experts.up;
    const Hidden& hidden = step.hidden;
    const int64_t units = step.experts.units, stride = hidden.in.inputs;
    const int64_t panels = up.panels(), work = work_of(up, step.count, step.pieces);
    const Runs runs(step.pieces, panels, PANEL, step.mean_rows, team(work));
    parallel_on_nodes(
        runs.shares(), stealing(step.mean_rows),
        [&](int64_t node, int64_t task) {
            const Run& run = runs.at(node, task);
            const ExpertRows& part = step.work[run.matrix];
            const int64_t together = slices_at_once(part.rows, PANEL);
            for (int64_t panel = run.from; panel < run.end; panel += together)
                up_tile(in, step.pairs, step.experts, part, panel,
                        std::min(together, run.end - panel), hidden);
        },
        work);
    if (!hidden.floats) return;
    parallel_rows(
        step.count, 32,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                encode(hidden.floats + row * stride, units, hidden.in, row, stride);
        },
        4 * step.count * units);
}

// Second product: a task is some columns of all tokens, summed over all pieces of work.
inline void run_down(const ExpertsRun& step, const Output& out) {
    const Matrix& down = step.experts.down;
    const int64_t padded = down.outputs, pieces = step.pieces;
    float* sums = scratch().take<float>(out.rows * padded);
    const int64_t work_to_do = work_of(down, step.count, pieces), threads = team(work_to_do);
    const Slices slices(down, 1, threads);  // a column is summed by one thread
    const Runs runs(1, slices.count(), slices.width, step.mean_rows, threads);
    parallel_on_nodes(
        runs.shares(), stealing(step.mean_rows),
        [&](int64_t node, int64_t task) {
            const auto [matrix, from, end] = runs.at(node, task);
            const int64_t first = slices.at(from).first;
            const int64_t last = std::min(end * slices.width, padded);
            // This thread clears, sums and stores the task's columns for all tokens.
            for (int64_t row = 0; row < out.rows; row++)
                std::memset(sums + row * padded + first, 0, (last - first) * 4);
            for (int64_t piece = 0; piece < pieces; piece++) {
                const ExpertRows& work = step.work[piece];
                if (piece + 1 < pieces)
                    prefetch_slice(down.at(step.work[piece + 1].expert), slices.at(from));
                const Matrix one = down.at(work.expert);
                const int64_t together = slices_at_once(work.rows, slices.width);
                for (int64_t index = from; index < end; index += together) {
                    const Slice slice = slices.at(index, std::min(end, index + together));
                    down_tile(step.hidden, step.pairs, step.experts, work,
                              {&one, slice.first, slice.outputs}, sums, padded);
                }
            }
            const int64_t stored = std::min(last, out.width);  // without padding
            for (int64_t row = 0; row < out.rows; row++)
                out.store(row, first, stored, sums + row * padded);
        },
        work_to_do);
}

// Computes Σ over each token's pairs of weight · expert(x).
inline void run_experts(const Inputs& in, const RoutedPairs& pairs, const Experts& experts,
                        const Output& out) {
    const ExpertsRun step = plan_experts(pairs, experts);
    run_up(in, step);
    run_down(step, out);
}

}  // namespace moedial
