// The blocks of a pre-norm decoder layer that are not mixtures: x += attention(norm(x)) and
// x += feed-forward(norm(x)). Mixtures are in `topk.h` and `infinity.h`.
#pragma once
#include "attend.h"
#include "infinity.h"

namespace moedial {

// Norms the queries and keys of one row, over all heads at once or over each head.
inline void norm_heads(float* queries, float* keys, const AttentionBlock& layer, int64_t head) {
    const int64_t query_width = layer.attention.heads * head, key_width = layer.kv_heads * head;
    const int64_t query_step = layer.norm_per_head ? head : query_width;
    const int64_t key_step = layer.norm_per_head ? head : key_width;
    for (int64_t i = 0; i < query_width; i += query_step)
        norm_row(queries + i, query_step, layer.query_norm, queries + i);
    for (int64_t i = 0; i < key_width; i += key_step)
        norm_row(keys + i, key_step, layer.key_norm, keys + i);
}

// Prepares one row for attention: norm, clip, rotary positions, query scale. `qkv`: the row's
// queries, keys and values behind each other.
inline void prepare_row(float* qkv, int64_t position, const AttentionBlock& layer, int64_t head) {
    const int64_t queries = layer.attention.heads * head, keys = layer.kv_heads * head;
    const bool normed = layer.query_norm.weight;
    if (normed && !layer.norm_after_rotary) norm_heads(qkv, qkv + queries, layer, head);
    if (layer.clip)
        for (int64_t i = 0; i < queries + 2 * keys; i += LANES) {
            const Floats values = load(qkv + i);  // NaN stays NaN
            const Floats clipped = max(min(values, splat(layer.clip)), splat(-layer.clip));
            store(qkv + i, select(values == values, clipped, values));
        }
    if (layer.rotary.table)
        for (int64_t i = 0; i < queries + keys; i += head)
            rotate_row(qkv + i, layer.rotary.half, layer.rotary.cosines(position),
                       layer.rotary.sines(position));
    if (normed && layer.norm_after_rotary) norm_heads(qkv, qkv + queries, layer, head);
    if (layer.query_scale)
        for (int64_t i = 0; i < queries; i += LANES)
            store(qkv + i, load(qkv + i) * layer.query_scale[position]);
}

// The position of each row in its sequence.
inline int64_t* row_positions(const Pages& pages) {
    int64_t* position = scratch().take<int64_t>(pages.rows);
    for (int64_t index = 0; index < pages.count; index++) {
        const Span& span = pages.spans[index];
        for (int64_t i = 0; i < span.rows; i++)
            position[span.first + i] = span.context - span.rows + i;
    }
    return position;
}

// Multiplies out [rows, width] by the sigmoid of gates [rows, stride].
inline void apply_gates(const float* gates, int64_t stride, int64_t rows, int64_t width,
                        float* out) {
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++) {
                float* y = out + row * width;
                for (int64_t i = 0; i < width; i += LANES)
                    store(y + i, load(y + i) / (exp(-load(gates + row * stride + i)) + 1.0f));
            }
        },
        16 * rows * width);
}

// Projection, preparation of rows, cache write, attention, projection back onto x.
void attention_block(float* x, int64_t width, const AttentionBlock& layer, const Cache& cache,
                     const Pages& pages) {
    const int64_t head = cache.head_width, queries = layer.attention.heads * head;
    const int64_t stride = layer.qkv.weight.outputs;
    const Inputs in = encode_rows(x, pages.rows, width, width, layer.norm, layer.qkv.weight);
    float* qkv = scratch().take<float>(pages.rows * stride);
    linear_rows(in, pages.rows, layer.qkv, false, stride, stride, qkv);
    const int64_t* position = row_positions(pages);
    parallel_rows(
        pages.rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                prepare_row(qkv + row * stride, position[row], layer, head);
        },
        4 * pages.rows * stride);
    // Keys and values are written before they are read, because a token attends to itself.
    const float* keys = qkv + queries;
    const float* values = keys + cache.kv_heads * head;
    write_cache(keys, values, stride, cache, pages);
    float* out = scratch().take<float>(pages.rows * queries);
    attend(qkv, stride, cache, pages, layer.attention, out);
    if (layer.gated) {
        const float* gates = values + cache.kv_heads * head;
        apply_gates(gates, stride, pages.rows, queries, out);
    }
    const Inputs rows = encode_rows(out, pages.rows, queries, queries, {}, layer.out.weight);
    linear_rows(rows, pages.rows, layer.out, true, width, width, x);
}

// A dense feed-forward layer is one expert that every row uses, with a weight of 1.
void ffn_block(float* x, int64_t rows, int64_t width, const FeedForward& layer) {
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, layer.expert.up);
    const Output out{.y = x, .rows = rows, .width = width, .scale = layer.residual_scale};
    run_experts(in, {nullptr, nullptr, &rows, 1}, layer.expert, out);
}

}  // namespace moedial
