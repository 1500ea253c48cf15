// The plain values that kernels work on, and the table of entry points that each instruction set
// fills. No torch here: whoever calls has checked every shape.
#pragma once
#include <cstdint>

namespace moedial {

// How a matrix is stored. Each group of 1, 2 or 4 neighbouring inputs of one output is a 32-bit
// word (16 for BYTES).
enum Kind : int32_t {
    FLOAT,    // float32 weights and inputs
    BFLOAT,   // bfloat16 weights and inputs, float32 sums
    BYTES,    // int8 weights, one scale per output; widened to bfloat16 on the way
    QUANTUM,  // int8 weights, one scale per output; inputs quantised row by row; int32 sums
};

enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU };

// y = W x, W [n, k]: panels of 64 outputs (the last may have 16, 32 or 48), each [groups][outputs]
// words.
struct Matrix {
    Kind kind = FLOAT;
    const char* data = nullptr;
    const float* scale = nullptr;  // [n], int8 only
    const int32_t* offset =
        nullptr;           // [n], QUANTUM only: what inputs shifted by 128 add to every sum
    int64_t n = 0, k = 0;  // as stored: n a multiple of 16, k of 4

    int64_t per_group() const { return kind == FLOAT ? 1 : kind == QUANTUM ? 4 : 2; }
    int64_t groups() const { return k / per_group(); }
    int64_t word_bytes() const { return kind == BYTES ? 2 : 4; }
    int64_t bytes() const { return n * groups() * word_bytes(); }
    int64_t panels() const { return (n + 63) / 64; }
    const char* panel(int64_t p) const { return data + p * 64 * groups() * word_bytes(); }
    int64_t outputs(int64_t p) const { return n - p * 64 < 64 ? n - p * 64 : 64; }
    // One of many matrices stored behind each other.
    Matrix at(int64_t e) const {
        Matrix m = *this;
        m.data += e * bytes();
        if (scale) m.scale += e * n;
        if (offset) m.offset += e * n;
        return m;
    }
};

struct Norm {
    const float* weight = nullptr;  // none: no norm
    const float* bias = nullptr;    // with one: LayerNorm, else RMSNorm
    float eps = 0;
};

// Routed pairs, sorted by expert; within an expert by token.
struct Calls {
    const int32_t* token = nullptr;  // [R]; none: 0, 1, 2, ...
    const float* weight = nullptr;   // [R]; none: 1
    const int64_t* ends = nullptr;   // [E], cumulative
    int64_t experts = 0;
    // Or one weight per score instead: [tokens, stride], each for `share` neighbouring units of all
    // experts in a row.
    const float* mask = nullptr;
    int64_t stride = 0, share = 0;
};

// Feed-forward experts: up [experts] of [units or 2 units, d] (gated: 32 gates and 32 ups in turn),
// down [d, units].
struct Experts {
    Matrix up, down;
    int64_t units = 0;  // as stored: a multiple of 16
    bool gated = true;
    Activation activation = SILU;
};

struct Table {  // [count, width], not packed
    Kind kind = FLOAT;
    const char* data = nullptr;
    int64_t count = 0;
};

struct Linear {
    Matrix weight;
    const float* bias = nullptr;
};

// One sequence's rows in the step: `rows` new tokens from row `first`, the last of them at position
// `context` - 1.
struct Span {
    int64_t first, rows, context;
};

struct Pages {
    const Span* spans = nullptr;
    int64_t count = 0, rows = 0;
    const int64_t* tables = nullptr;  // [count, width] block ids
    int64_t width = 0, block_size = 0;
};

// Keys and values of one layer. Tiles of 16 slots; per tile and kv head keys are [C / group][16]
// words and values are [16 / group][C] words, where a word holds `group` = 1 float or 2 bfloat16.
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
    const float* rotary = nullptr;  // [positions, 2, C / 2]: cosines, then sines
    int64_t positions = 0, kv_heads = 0, head_width = 0;
    Attention attention;
};

struct Draws {
    const float* quantiles = nullptr;  // [65536]
    int64_t layer = 0, space = 0;
    bool exponential = true, antithetic = false;
    float sigma_min = 0;
};

// Unit-major copies of both matrices, up [units, k] and down [units, width], in the kind of the
// panels.
struct UnitRows {
    const int32_t* up = nullptr;
    const char* down = nullptr;
    int64_t most = 0;  // they are read for up to so many kept units of all tokens
};

struct Infinity {
    Norm norm;
    Matrix router, scores;
    Experts blocks;  // one "expert" per `blocks.units` units, a multiple of `share`
    Draws draws;
    int64_t scored = 0, share = 0, kept = 0;  // scores, units of each, scores kept by one draw
    UnitRows rows;                            // where masks are narrower than the blocks
};

struct TopK {
    Norm norm;
    Matrix router;
    Experts experts;
    int64_t count = 0;  // experts
    bool normalise = false;
};

struct Tokens {
    const int64_t* counts = nullptr;
    const int64_t* seeds = nullptr;
    const int64_t* positions = nullptr;
    int64_t count = 0, k_max = 0;
};

// What a library of one instruction set does. Shapes have been checked; rows are float32.

const char* instruction_set();

// y [rows, width] = norm(x).
void norm(const float* x, int64_t rows, int64_t width, const Norm&, float* y);

// x [rows, width] = embeddings of ids, and of positions where there are any. `Table`: rows of
// float32 or bfloat16.
void embed(const int64_t* ids, const int64_t* positions, int64_t rows, int64_t width,
           const Table& words, const Table& places, float* x);

// The index of each row's highest value, of equals the lowest; -1 where one is not finite.
void best(const float* x, int64_t rows, int64_t width, int64_t* y);

// y [rows, width] = x, in rows that have a mask (`mask_of` >= 0) with -inf where its bit is 0. A
// row that this leaves without a finite value is taken from `raw` instead of x.
void constrain(const float* x, const float* raw, const int32_t* allowed, const int64_t* mask_of,
               int64_t rows, int64_t width, float* y);

// y [rows, n] (+)= W norm(x) + bias.
void linear(const float* x, int64_t rows, int64_t width, const Norm&, const Linear&, bool add,
            int64_t n, float* y);

// y [rows, width] = Σ over each row's pairs of weight · expert(x).
void experts(const float* x, int64_t rows, int64_t width, const Calls&, const Experts&, float* y);

// New keys and values, each row `stride` floats, into their cache slots.
void write_cache(const float* k, const float* v, int64_t stride, const Cache&, const Pages&);

// out [rows, heads * C] for q [rows, stride >= heads * C]: every new token over its sequence up to
// itself.
void attend(const float* q, int64_t stride, const Cache&, const Pages&, const Attention&,
            float* out);

// Softmax, each token's best experts, pairs sorted by expert: token and weight [ΣK], ends
// [experts].
void route(const float* logits, int64_t stride, const Tokens&, int64_t experts, bool normalise,
           int32_t* token, float* weight, int64_t* ends);

// z [ΣK, space] for gaussian [tokens, stride]: means, then raw spreads.
void draw(const float* gaussian, int64_t stride, const Tokens&, const Draws&, float* z);

// mask [tokens, scored]: mean over a token's draws of the scores [ΣK, stride] that each keeps.
void masks(const float* scores, int64_t stride, const Tokens&, int64_t scored, int64_t kept,
           float* mask);

// Blocks of a decoder layer, each x += f(norm(x)). Mixtures return their pairs and fill `load`,
// tokens per expert.
void attention_block(float* x, int64_t width, const AttentionBlock&, const Cache&, const Pages&);
int64_t topk_block(float* x, int64_t width, const TopK&, const Tokens&, int64_t* load);
int64_t infinity_block(float* x, int64_t width, const Infinity&, const Tokens&, int64_t* load);
void ffn_block(float* x, int64_t rows, int64_t width, const Norm&, const Experts&,
               const float* up_bias, const float* down_bias);

}  // namespace moedial
