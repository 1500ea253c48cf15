// The plain values that kernels work on, and the entry points of one instruction set's library.
// No torch here: the caller has checked every shape (`checks.h`, `bind.h`).
//
// Names of sizes: `width` is the model's, `inputs` and `outputs` are a matrix', `stride` is the
// distance of two rows in floats. Matrices are stored padded; what is padded holds zeros.
#pragma once
#include <cstdint>

namespace moedial {

// How a matrix is stored. Each group of 1, 2 or 4 neighbouring inputs of one output is a 32-bit
// word (16 bits for INT8_WEIGHTS).
enum Kind : int32_t {
    FLOAT,         // float32 weights and inputs
    BFLOAT16,      // bfloat16 weights and inputs, float32 sums
    INT8_WEIGHTS,  // int8 weights, one scale per output; widened to bfloat16 on the way
    INT8,          // int8 weights, one scale per output; inputs quantised row by row; int32 sums
};

enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU };

// y = W x, W [outputs, inputs]: panels of 64 outputs (the last may have 16, 32 or 48), each laid
// out as [groups][outputs] words, so that a vector holds one group of neighbouring outputs.
struct Matrix {
    Kind kind = FLOAT;
    const char* data = nullptr;
    const float* scales = nullptr;     // [outputs], int8 only
    const int32_t* offsets = nullptr;  // [outputs], INT8 only: what inputs + 128 add to every sum
    int64_t outputs = 0, inputs = 0;   // as stored: multiples of 16 and of 4

    int64_t group_inputs() const { return kind == FLOAT ? 1 : kind == INT8 ? 4 : 2; }
    int64_t groups() const { return inputs / group_inputs(); }
    int64_t word_bytes() const { return kind == INT8_WEIGHTS ? 2 : 4; }
    int64_t bytes() const { return outputs * groups() * word_bytes(); }
    int64_t panels() const { return (outputs + 63) / 64; }
    const char* panel(int64_t index) const { return data + index * 64 * groups() * word_bytes(); }
    int64_t panel_outputs(int64_t index) const {
        return outputs - index * 64 < 64 ? outputs - index * 64 : 64;
    }
    // One of many matrices stored behind each other.
    Matrix at(int64_t index) const {
        Matrix one = *this;
        one.data += index * bytes();
        if (scales) one.scales += index * outputs;
        if (offsets) one.offsets += index * outputs;
        return one;
    }
};

struct Norm {
    const float* weight = nullptr;  // none: no norm
    const float* bias = nullptr;    // with one: LayerNorm, else RMSNorm
    float eps = 0;
};

struct Linear {
    Matrix weight;
    const float* bias = nullptr;
};

struct Table {  // [count, width], not packed
    Kind kind = FLOAT;
    const char* data = nullptr;
    int64_t count = 0;
};

// (token, expert) pairs, sorted by expert; within an expert by token.
struct RoutedPairs {
    const int32_t* token = nullptr;  // [pairs]; none: 0, 1, 2, ...
    const float* weight = nullptr;   // [pairs]; none: 1
    const int64_t* ends = nullptr;   // [experts]: where each expert's pairs end
    int64_t experts = 0;
    // In place of the pairs' weights: mask [tokens, mask_stride], each value for `group_units`
    // neighbouring units, counted over the units of all experts in a row.
    const float* mask = nullptr;
    int64_t mask_stride = 0, group_units = 0;
};

// Feed-forward experts: up [experts] of [units or 2 units, width] (gated: 32 gates and their 32
// ups in turn), down [experts] of [width, units].
struct Experts {
    Matrix up, down;
    int64_t units = 0;  // of each, as stored: a multiple of 16
    bool gated = true;
    Activation activation = SILU;
};

// A dense feed-forward layer: a single expert that every row uses.
struct FeedForward {
    Norm norm;
    Experts expert;
    const float *up_bias = nullptr, *down_bias = nullptr;
};

// One sequence's rows in the step: `rows` new tokens from row `first` on, the last of them at
// position `context` - 1.
struct Span {
    int64_t first, rows, context;
};

struct Pages {
    const Span* spans = nullptr;
    int64_t count = 0, rows = 0;      // spans, and their rows together
    const int64_t* tables = nullptr;  // [count, table_width] block ids
    int64_t table_width = 0, block_size = 0;
};

// Keys and values of one layer, in tiles of 16 slots. Per tile and key-value head, keys are
// [head_width / group][16] words and values are [16 / group][head_width] words, where a word holds
// `group` = 1 float or 2 bfloat16: both are read as the weights of a product.
struct Cache {
    Kind kind = FLOAT;
    int32_t* keys = nullptr;
    int32_t* values = nullptr;
    int64_t kv_heads = 0, head_width = 0;

    int64_t group() const { return kind == FLOAT ? 1 : 2; }
    int64_t tile_words() const { return 16 * head_width / group(); }
};

struct Attention {
    int64_t heads = 0;
    float scale = 1, softcap = 0;  // softcap 0: none
    int64_t window = 0;            // 0: everything before
    const float* sinks = nullptr;  // [heads]
};

struct AttentionBlock {
    Norm norm, query_norm, key_norm;
    Linear qkv, out;
    bool norm_per_head = false;
    float clip = 0;                 // 0: none
    const float* rotary = nullptr;  // [positions, 2, head_width / 2]: cosines, then sines
    int64_t positions = 0, kv_heads = 0, head_width = 0;
    Attention attention;
};

// The tokens of a step in one mixture layer: each one's count, and what its draws depend on. Plain
// torch's counterpart is `LayerStep` (model/step.py).
struct LayerRows {
    const int64_t* counts = nullptr;     // experts, or draws, of each token
    const int64_t* seeds = nullptr;      // noise seeds, only where something is drawn
    const int64_t* positions = nullptr;  // only where something is drawn
    int64_t tokens = 0, k_max = 0;       // k_max: no count is higher

    // Pairs, or draws, of all tokens together: ΣK.
    int64_t pairs() const {
        int64_t total = 0;
        for (int64_t token = 0; token < tokens; token++) total += counts[token];
        return total;
    }
};

// The router's matrix, and what becomes of the chosen experts' probabilities.
struct Router {
    Matrix weight;  // [experts, width]
    int64_t experts = 0;
    bool normalise = false;  // the chosen probabilities, to the sum 1
};

struct TopK {
    Norm norm;
    Router router;
    Experts experts;
};

// How the points of an ∞-MoE are drawn from each token's Gaussian.
struct Draws {
    const float* quantiles = nullptr;  // [65536] of the standard normal distribution
    const float* points = nullptr;     // [point_rows, latent_dim]: fixed draws, nothing is random
    int64_t point_rows = 0;
    int64_t layer = 0;  // number of the mixture: part of the noise's key
    int64_t latent_dim = 0;
    bool exponential = true;  // the spread is e^raw, else softplus(raw)
    bool antithetic = false;  // each second draw mirrors the one before
    float sigma_min = 0;
};

// Unit-major copies of both matrices, up [units, inputs] and down [units, width], in the kind of
// the panels: what a unit needs lies together.
struct UnitRows {
    const int32_t* up = nullptr;
    const char* down = nullptr;
    int64_t crossover_rows = 0;  // they are read for up to so many kept units of all tokens
};

// What a draw keeps of its scores, and how a token's draws become one mask.
struct MaskRule {
    int64_t kept = 0;         // groups of one draw
    bool replacement = true;  // a draw may keep what an earlier draw of its token kept
    bool keep_norm = false;   // the mean mask is scaled to the root mean square of its draws' norms
};

// A wide layer whose units come in groups; each draw keeps the groups with the highest scores.
struct Infinity {
    Norm norm;
    Matrix router, scores;
    Experts tiles;  // the wide layer, cut: one "expert" per `tiles.units` units, whole groups
    Draws draws;
    MaskRule rule;
    int64_t groups = 0, group_units = 0;
    UnitRows rows;  // where groups are narrower than the tiles
};

// What a library of one instruction set does. Rows are float32.

const char* instruction_set();

// y [rows, width] = norm(x).
void norm(const float* x, int64_t rows, int64_t width, const Norm&, float* y);

// x [rows, width] = embeddings of ids, and of positions where there are any. The rows of a table
// are float32 or bfloat16.
void embed(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t width,
           const Table& embeddings, const Table& position_embeddings, float* x);

// The index of each row's highest value, of equals the lowest; -1 where one is not finite.
void best(const float* x, int64_t rows, int64_t width, int64_t* y);

// y [rows, width] = x, in rows that have a mask (`mask_of` >= 0) with -inf where its bit is 0. A
// row that this leaves without a finite value is taken from `raw` instead of x.
void constrain(const float* x, const float* raw, const int32_t* allowed, const int64_t* mask_of,
               int64_t rows, int64_t width, float* y);

// y [rows, outputs] (+)= W norm(x) + bias.
void linear(const float* x, int64_t rows, int64_t width, const Norm&, const Linear&, bool add,
            int64_t outputs, float* y);

// y [rows, width] = Σ over each row's pairs of weight · expert(x).
void experts(const float* x, int64_t rows, int64_t width, const RoutedPairs&, const Experts&,
             float* y);

// New keys and values, each row `stride` floats, into their cache slots.
void write_cache(const float* keys, const float* values, int64_t stride, const Cache&,
                 const Pages&);

// out [rows, heads * head_width] for queries [rows, stride]: every new token over its sequence up
// to itself.
void attend(const float* queries, int64_t stride, const Cache&, const Pages&, const Attention&,
            float* out);

// Softmax, each token's best experts, pairs sorted by expert: token and weight [ΣK], ends
// [experts].
void route(const float* logits, int64_t stride, const LayerRows&, int64_t experts, bool normalise,
           int32_t* token, float* weight, int64_t* ends);

// points [ΣK, latent_dim] for gaussian [tokens, stride]: means, then raw spreads.
void draw(const float* gaussian, int64_t stride, const LayerRows&, const Draws&, float* points);

// mask [tokens, groups]: mean over a token's draws of the scores [ΣK, stride] that each keeps.
void masks(const float* scores, int64_t stride, const LayerRows&, int64_t groups, const MaskRule&,
           float* mask);

// Blocks of a decoder layer, each x += f(norm(x)). Mixtures return their pairs and fill `load`,
// the tokens of each expert or group.
void attention_block(float* x, int64_t width, const AttentionBlock&, const Cache&, const Pages&);
int64_t topk_block(float* x, int64_t width, const TopK&, const LayerRows&, int64_t* load);
int64_t infinity_block(float* x, int64_t width, const Infinity&, const LayerRows&, int64_t* load);
void ffn_block(float* x, int64_t rows, int64_t width, const FeedForward&);

}  // namespace moedial
