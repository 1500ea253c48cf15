// The blocks of a pre-norm decoder layer that are not mixtures: x += attention(norm(x)) and
// x += feed-forward(norm(x)). Mixtures are in `topk.h` and `infinity.h`.
#pragma once
#include "attend.h"
#include "infinity.h"

namespace moedial {

// Queries and keys of one row: normed, clipped, turned to their position. `qkv` is the row's
// queries, keys and values behind each other.
inline void prepare_row(float* qkv, int64_t position, const AttentionBlock& layer, int64_t kv_heads,
                        int64_t head) {
    const int64_t queries = layer.attention.heads * head, keys = kv_heads * head;
    if (layer.query_norm.weight) {
        const int64_t query_step = layer.norm_per_head ? head : queries;
        const int64_t key_step = layer.norm_per_head ? head : keys;
        for (int64_t i = 0; i < queries; i += query_step)
            norm_row(qkv + i, query_step, layer.query_norm, qkv + i);
        for (int64_t i = 0; i < keys; i += key_step)
            norm_row(qkv + queries + i, key_step, layer.key_norm, qkv + queries + i);
    }
    if (layer.clip)
        for (int64_t i = 0; i < queries + 2 * keys; i += LANES) {
            const Floats values = load(qkv + i);  // NaN stays NaN
            const Floats clipped = max(min(values, splat(layer.clip)), splat(-layer.clip));
            store(qkv + i, select(values == values, clipped, values));
        }
    if (layer.rotary) {
        const float* cosines = layer.rotary + position * head;
        for (int64_t i = 0; i < queries + keys; i += head)
            rotate_row(qkv + i, head / 2, cosines, cosines + head / 2);
    }
}

// Projection, preparation of rows, cache write, attention, projection back onto x.
void attention_block(float* x, int64_t width, const AttentionBlock& layer, const Cache& cache,
                     const Pages& pages) {
    const int64_t head = cache.head_width, queries = layer.attention.heads * head;
    const int64_t stride = layer.qkv.weight.outputs;
    const Inputs in = encode_rows(x, pages.rows, width, width, layer.norm, layer.qkv.weight);
    float* qkv = scratch().take<float>(pages.rows * stride);
    linear_rows(in, pages.rows, layer.qkv, false, stride, stride, qkv);
    // Where each row stands in its sequence.
    int64_t* position = scratch().take<int64_t>(pages.rows);
    for (int64_t index = 0; index < pages.count; index++) {
        const Span& span = pages.spans[index];
        for (int64_t i = 0; i < span.rows; i++)
            position[span.first + i] = span.context - span.rows + i;
    }
    parallel_rows(
        pages.rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                prepare_row(qkv + row * stride, position[row], layer, cache.kv_heads, head);
        },
        4 * pages.rows * stride);
    // Written before they are read: a token attends to itself.
    const float* keys = qkv + queries;
    write_cache(keys, keys + cache.kv_heads * head, stride, cache, pages);
    float* out = scratch().take<float>(pages.rows * queries);
    attend(qkv, stride, cache, pages, layer.attention, out);
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
