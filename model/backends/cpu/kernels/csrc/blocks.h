// The blocks of a pre-norm decoder layer, each one op: x += attention(norm(x)), x +=
// feed-forward(norm(x)).
#pragma once
#include "attend.h"
#include "infinity.h"

namespace moedial {

// Queries and keys of one row: normed, clipped, turned to their position.
inline void prepare_row(float* qkv, int64_t position, const AttentionBlock& b, int64_t kv_heads,
                        int64_t head) {
    const int64_t queries = b.attention.heads * head, keys = kv_heads * head;
    if (b.query_norm.weight) {
        const int64_t q = b.norm_per_head ? head : queries, k = b.norm_per_head ? head : keys;
        for (int64_t i = 0; i < queries; i += q) norm_row(qkv + i, q, b.query_norm, qkv + i);
        for (int64_t i = 0; i < keys; i += k)
            norm_row(qkv + queries + i, k, b.key_norm, qkv + queries + i);
    }
    if (b.clip)
        for (int64_t i = 0; i < queries + 2 * keys; i += LANES) {
            const vf v = load(qkv + i);  // NaN stays NaN
            store(qkv + i, select(v == v, max(min(v, splat(b.clip)), splat(-b.clip)), v));
        }
    if (b.rotary)
        for (int64_t i = 0; i < queries + keys; i += head)
            rotate_row(qkv + i, head / 2, b.rotary + position * head,
                       b.rotary + position * head + head / 2);
}

void attention_block(float* x, int64_t width, const AttentionBlock& b, const Cache& cache,
                     const Pages& pages) {
    const int64_t head = cache.head_width, queries = b.attention.heads * head,
                  stride = b.qkv.weight.n;
    const Inputs in = encode_rows(x, pages.rows, width, width, b.norm, b.qkv.weight);
    float* qkv = scratch().take<float>(pages.rows * stride);
    linear_rows(in, pages.rows, b.qkv, false, stride, stride, qkv);
    int64_t* position = scratch().take<int64_t>(pages.rows);
    for (int64_t s = 0; s < pages.count; s++) {
        const Span& span = pages.spans[s];
        for (int64_t i = 0; i < span.rows; i++)
            position[span.first + i] = span.context - span.rows + i;
    }
    parallel_rows(
        pages.rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t r = first; r < last; r++)
                prepare_row(qkv + r * stride, position[r], b, cache.kv_heads, head);
        },
        4 * pages.rows * stride);
    const float* keys = qkv + queries;
    write_cache(keys, keys + cache.kv_heads * head, stride, cache, pages);
    float* out = scratch().take<float>(pages.rows * queries);
    attend(qkv, stride, cache, pages, b.attention, out);
    const Inputs rows = encode_rows(out, pages.rows, queries, queries, {}, b.out.weight);
    linear_rows(rows, pages.rows, b.out, true, width, width, x);
}

// A dense feed-forward layer is one expert that every row uses.
void ffn_block(float* x, int64_t rows, int64_t width, const Norm& norm, const Experts& ffn,
               const float* up_bias, const float* down_bias) {
    const Inputs in = encode_rows(x, rows, width, width, norm, ffn.up);
    run_experts(in, rows, width, {nullptr, nullptr, &rows, 1}, ffn, true, x, up_bias, down_bias);
}

}  // namespace moedial
