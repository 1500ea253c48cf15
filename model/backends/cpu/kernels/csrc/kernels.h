// The functions that a library of one instruction set exports. They take the plain values of
// `values.h` and `mixtures.h`, no tensors. Rows are float32.
#pragma once
#include "mixtures.h"

namespace moedial {

const char* instruction_set();

// y [rows, width] = norm(x).
void norm(const float* x, int64_t rows, int64_t width, const Norm&, float* y);

// x [rows, width] = scale * embeddings of ids, and of positions where there are any. The rows of a
// table are float32 or bfloat16.
void embed(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t width,
           const Table& embeddings, float scale, const Table& position_embeddings, float* x);

// The index of each row's highest value (the lowest index where several are equal), or -1 if the
// row has a value that is not finite.
void argmax(const float* x, int64_t rows, int64_t width, int64_t* y);

// y [rows, width] = x with -inf where the row's mask has a 0 bit. `mask_of`: the number of each
// row's mask, -1 for none. A row that its mask leaves without a finite value is read from `raw`
// instead of x.
void constrain(const float* x, const float* raw, const int32_t* allowed, const int64_t* mask_of,
               int64_t rows, int64_t width, float* y);

// Draws one token for each of `count` rules, from its row of logits. The highest logit of a row
// must be finite.
void draw_tokens(const float* logits, int64_t width, const int64_t* rows, const TokenRule* rules,
                 int64_t count, int64_t* tokens);

// y [rows, outputs] (+)= scale * (W norm(x) + bias).
void linear(const float* x, int64_t rows, int64_t width, const Norm&, const Linear&, bool add,
            int64_t outputs, float* y);

// y [rows, width] = Σ over each row's pairs of weight · expert(x).
void experts(const float* x, int64_t rows, int64_t width, const RoutedPairs&, const Experts&,
             float* y);

// Rows of weights [count, width] as 4-bit codes of the table, two in a byte, with a scale for each
// group of inputs and a factor for each row.
void quantise(const Table& weight, int64_t width, const CodeTable&, int64_t group, uint8_t* codes,
              int8_t* scales, float* factors);

// Writes new keys and values, each row `stride` floats, to their cache slots. `values` is null
// where the values are a part of the keys.
void write_cache(const float* keys, const float* values, int64_t stride, const Cache&,
                 const Pages&);

// out [rows, heads * value_width] = causal attention of queries [rows, stride] over their
// sequences in the cache.
void attend(const float* queries, int64_t stride, const Cache&, const Pages&, const Attention&,
            float* out);

// Each token's best experts and their weights, as pairs sorted by expert, with room for
// `max_pairs`. Writes `used` and `routes` of the report.
void route(const float* logits, int64_t stride, const LayerRows&, const Router&, const PairsOut&,
           const LayerReport&);

// points [ΣK, latent_dim] for gaussian [tokens, stride]: means, then raw spreads.
void draw(const float* gaussian, int64_t stride, const LayerRows&, const Draws&, float* points);

// mask [tokens, groups]: for each token the mean over its draws of the scores [ΣK, stride] that a
// draw keeps.
void masks(const float* scores, int64_t stride, const LayerRows&, int64_t groups, const MaskRule&,
           float* mask);

// Blocks of a decoder layer, each x += f(norm(x)).
void attention_block(float* x, int64_t width, const AttentionBlock&, const Cache&, const Pages&);
void delta_block(float* x, int64_t width, const DeltaBlock&, const States&, const Pages&);
void latent_block(float* x, int64_t width, const LatentBlock&, const Cache&, const Pages&);
void topk_block(float* x, int64_t width, const TopK&, const LayerRows&, const LayerReport&);
void infinity_block(float* x, int64_t width, const Infinity&, const LayerRows&, const LayerReport&);
void ffn_block(float* x, int64_t rows, int64_t width, const FeedForward&);

}  // namespace moedial
