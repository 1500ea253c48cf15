// Multi-head latent attention in its absorbed form (DeepSeek-V2, arXiv 2405.04434 §2.1):
// x += attention(norm(x)) where all heads share one key per token (a latent and a rotated part),
// and the values are the latents. Prompts and single tokens take the same path, so that bits do not
// depend on chunks.
#pragma once
#include "blocks.h"

namespace moedial {

constexpr int64_t MAX_ROWS = 256;  // computed at a time: the queries of all heads are wide

// y[row][head] = W_head x[row][head], each result `stride` floats after the one before. Inputs are
// encoded in the order row * heads + head.
inline void multiply_heads(const Inputs& in, int64_t rows, int64_t heads, const Matrix& all,
                           int64_t stride, float* y) {
    const int64_t panels = all.panels(), count = heads * panels;
    const int64_t run = std::clamp<int64_t>(count / (4 * threads()), 1, 8);
    const auto multiply_panel = [&](int64_t head, int64_t panel) {
        const Matrix matrix = all.at(head);
        const Slice slice{&matrix, panel * PANEL, matrix.panel_outputs(panel)};
        const int64_t height = block_rows(rows);
        for (int64_t first = 0; first < rows; first += height) {
            ProductRoom& room = product_room();
            const int64_t now = std::min(height, rows - first);
            for (int64_t row = 0; row < now; row++)
                room.rows[row] = in.row((first + row) * heads + head);
            product(room.rows, now, slice, room.own, 0, false);
            for (int64_t row = 0; row < now; row++) {
                const int64_t at = (first + row) * heads + head;
                const float scale = in.scales ? in.scales[at] : 1.0f;
                float* out = y + at * stride + slice.first;
                for (int64_t i = 0; i < slice.outputs; i += LANES)
                    store(out + i, finish(matrix, room.own[row] + i, slice.first + i, scale));
            }
        }
    };
    parallel(
        ceil_div(count, run),
        [&](int64_t task) {
            for (int64_t i = task * run; i < std::min(count, (task + 1) * run); i++)
                multiply_panel(i / panels, i % panels);
        },
        rows * heads * all.outputs * all.inputs);
}

// Encodes the first `width` values of each head for the heads' matrices. Heads are `step` floats
// apart, rows `stride`.
inline Inputs encode_heads(const float* x, int64_t rows, int64_t stride, int64_t heads,
                           int64_t step, int64_t width, const Matrix& all) {
    const Inputs in = inputs(all, rows * heads);
    parallel_rows(
        rows, 4,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                for (int64_t head = 0; head < heads; head++)
                    encode(x + row * stride + head * step, width, in, row * heads + head,
                           all.inputs);
        },
        4 * rows * heads * width);
    return in;
}

// The pages of rows [first, first + rows) of a step. `spans`: room for as many spans as the step
// has.
inline Pages pages_of_rows(const Pages& pages, int64_t first, int64_t rows, Span* spans) {
    Pages part = pages;
    part.spans = spans, part.count = 0, part.rows = rows;
    for (int64_t index = 0; index < pages.count; index++) {
        const Span& span = pages.spans[index];
        const int64_t from = std::max(first, span.first);
        const int64_t until = std::min(first + rows, span.first + span.rows);
        if (from >= until) continue;
        if (!part.count) part.tables = pages.tables + index * pages.table_width;
        const int64_t later = span.first + span.rows - until;
        spans[part.count++] = {from - first, until - from, span.context - later};
    }
    return part;
}

// Queries in the space of the keys, [rows, heads, rank + rotated]: the part without rotary
// positions is multiplied by the head's matrix, the other part is rotated.
inline float* latent_queries(const Inputs& in, const LatentBlock& layer, const int64_t* position,
                             int64_t rows) {
    const int64_t heads = layer.attention.heads, rotated = 2 * layer.rotary.half;
    const int64_t step = layer.plain_width + rotated, width = layer.rank + rotated;
    const int64_t stride = layer.query.weight.outputs;
    float* q = scratch().take<float>(rows * stride);
    linear_rows(in, rows, layer.query, false, stride, stride, q);
    float* queries = scratch().take<float>(rows * heads * width);
    const Inputs plain =
        encode_heads(q, rows, stride, heads, step, layer.plain_width, layer.to_keys);
    multiply_heads(plain, rows, heads, layer.to_keys, width, queries);
    parallel_rows(
        rows, 4,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                for (int64_t head = 0; head < heads; head++) {
                    float* to = queries + (row * heads + head) * width + layer.rank;
                    std::memcpy(to, q + row * stride + head * step + layer.plain_width,
                                rotated * 4);
                    rotate_row(to, layer.rotary.half, layer.rotary.cosines(position[row]),
                               layer.rotary.sines(position[row]));
                }
        },
        4 * rows * heads * rotated);
    return queries;
}

// One part of a step.
inline void latent_rows(float* x, int64_t width, const LatentBlock& layer, const Cache& cache,
                        const Pages& pages) {
    const int64_t rows = pages.rows, heads = layer.attention.heads, rank = layer.rank;
    const int64_t stride = layer.down.weight.outputs;
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, layer.down.weight);
    float* down = scratch().take<float>(rows * stride);
    linear_rows(in, rows, layer.down, false, stride, stride, down);
    const int64_t* position = row_positions(pages);
    float* latents = down + layer.query_rank;
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                float* latent = latents + row * stride;
                norm_row(latent, rank, layer.latent_norm, latent);
                rotate_row(latent + rank, layer.rotary.half, layer.rotary.cosines(position[row]),
                           layer.rotary.sines(position[row]));
            }
        },
        4 * rows * stride);
    write_cache(latents, nullptr, stride, cache, pages);
    const Inputs lows = layer.query_rank ? encode_rows(down, rows, layer.query_rank, stride,
                                                       layer.query_norm, layer.query.weight)
                        : inputs_match(layer.down.weight, layer.query.weight)
                            ? in
                            : encode_rows(x, rows, width, width, layer.norm, layer.query.weight);
    const float* queries = latent_queries(lows, layer, position, rows);
    float* mixed = scratch().take<float>(rows * heads * rank);
    attend(queries, heads * cache.head_width, cache, pages, layer.attention, mixed);
    const int64_t values = layer.to_values.outputs;
    const Inputs mixed_in =
        encode_heads(mixed, rows, heads * rank, heads, rank, rank, layer.to_values);
    float* out = scratch().take<float>(rows * heads * values);
    multiply_heads(mixed_in, rows, heads, layer.to_values, values, out);
    const int64_t outs = heads * values;
    const Inputs out_in = encode_rows(out, rows, outs, outs, {}, layer.out.weight);
    linear_rows(out_in, rows, layer.out, true, width, width, x);
}

void latent_block(float* x, int64_t width, const LatentBlock& layer, const Cache& cache,
                  const Pages& pages) {
    Span* spans = scratch().take<Span>(pages.count);
    const Scratch::Mark mark = scratch().mark();
    for (int64_t first = 0; first < pages.rows; first += MAX_ROWS) {
        const int64_t rows = std::min(MAX_ROWS, pages.rows - first);
        latent_rows(x + first * width, width, layer, cache,
                    pages_of_rows(pages, first, rows, spans));
        scratch().release(mark);
    }
}

}  // namespace moedial
