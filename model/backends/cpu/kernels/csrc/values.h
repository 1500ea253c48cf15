// The plain values that kernels work on: matrices, layers, and where a step's tokens are. What is
// said of mixtures is in `mixtures.h`. No torch here: the caller has checked every shape
// (`checks.h`, `bind.h`).
//
// Names of sizes: `width` is the model's, `inputs` and `outputs` are a matrix', `stride` is the
// distance of two rows in floats. Matrices are stored padded; what is padded holds zeros.
#pragma once
#include <cstdint>

namespace moedial {

constexpr int64_t PANEL = 64;  // outputs that are stored side by side

// How a matrix is stored. Each group of 1, 2 or 4 neighbouring inputs of one output is a 32-bit
// word (16 bits for INT8_WEIGHTS). GROUPED matrices have groups of their own (`GroupCodes`).
enum Kind : int32_t {
    FLOAT,         // float32 weights and inputs
    BFLOAT16,      // bfloat16 weights and inputs, float32 sums
    INT8_WEIGHTS,  // int8 weights, one scale per output; widened to bfloat16 on the way
    INT8,          // int8 weights, one scale per output; inputs quantised row by row; int32 sums
    GROUPED,       // codes of 4, 6 or 8 bits, a scale per group; inputs quantised in blocks of 256
};

// How the codes of a GROUPED matrix are read. A weight is factor * (scale * (entry - shift) +
// minimum): entry is the code's in the table, or the code itself; scale and minimum are its group's
// and output's, the factor is the output's.
struct GroupCodes {
    int64_t inputs = 0;        // of a group: 16, 32, 64 or 128
    int64_t bits = 4;          // of a code: 4, 6 or 8
    int64_t header = 2;        // bytes of scale and minimum: 1 or 2, and 2 where there are minima
    int32_t shift = 0;         // makes entries unsigned
    int32_t largest = 15;      // of the entries
    bool table = false;        // else an entry is its code
    uint8_t entries[16] = {};  // [code], 4 bits only

    bool minimum() const { return header > 2; }     // float16
    bool byte_scale() const { return header % 2; }  // an integer, else float16
    int64_t scale_bytes() const { return byte_scale() ? 1 : 2; }
    int64_t bytes() const { return header + inputs * bits / 8; }
};

enum Activation : int32_t { SILU, GELU, GELU_TANH, RELU, SWIGLU_CLAMPED };

// How one row of logits draws its token.
struct TokenRule {
    double temperature;  // above 0
    int64_t top_k;       // from 1 on
    double top_p, min_p;
    double u;  // the random number, in [0, 1)
};

// What codes of 4 bits stand for: rising integers.
struct CodeTable {
    int8_t values[16];
};

// y = W x, W [outputs, inputs]: panels of 64 outputs (the last may have 16, 32 or 48), each laid
// out as [groups][outputs] words, so that a vector holds one group of neighbouring outputs.
// GROUPED: [groups] of scales, minima and words, each of them for all outputs (`codes.h`).
struct Matrix {
    Kind kind = FLOAT;
    const char* data = nullptr;
    const float* scales = nullptr;     // [outputs], int8; GROUPED: the factors
    const int32_t* offsets = nullptr;  // [outputs], INT8 only: what inputs + 128 add to every sum
    int64_t outputs = 0, inputs = 0;   // as stored: multiples of 16 and of 4, or of the group
    GroupCodes codes;                  // GROUPED only

    int64_t group_inputs() const {
        return kind == FLOAT ? 1 : kind == INT8 ? 4 : kind == GROUPED ? codes.inputs : 2;
    }
    int64_t groups() const { return inputs / group_inputs(); }
    // Of one group of one output.
    int64_t group_bytes() const {
        return kind == INT8_WEIGHTS ? 2 : kind == GROUPED ? codes.bytes() : 4;
    }
    int64_t bytes() const { return outputs * groups() * group_bytes(); }
    int64_t panels() const { return (outputs + PANEL - 1) / PANEL; }
    const char* panel(int64_t index) const {
        return data + index * PANEL * groups() * group_bytes();
    }
    int64_t panel_outputs(int64_t index) const {
        return outputs - index * PANEL < PANEL ? outputs - index * PANEL : PANEL;
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

struct Linear {  // scale * (W x + bias)
    Matrix weight;
    const float* bias = nullptr;
    float scale = 1;
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
// ups in turn), down [experts] of [width, units]. Biases are as long as the stored outputs.
struct Experts {
    Matrix up, down;
    int64_t units = 0;  // of each, as stored: a multiple of 16
    bool gated = true;
    Activation activation = SILU;
    const float* up_bias = nullptr;    // [experts, up.outputs]
    const float* down_bias = nullptr;  // [experts, down.outputs], times the weight of the pair
    bool weigh_input = false;          // a pair's weight multiplies what its expert reads

    const float* up_bias_of(int64_t expert) const {
        return up_bias ? up_bias + expert * up.outputs : nullptr;
    }
    const float* down_bias_of(int64_t expert) const {
        return down_bias ? down_bias + expert * down.outputs : nullptr;
    }
};

// A dense feed-forward layer: a single expert that every row uses.
struct FeedForward {
    Norm norm;
    Experts expert;
    float residual_scale = 1;  // of what is added to the rows
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
// [head_width / group][16] words and values are [16 / group][value_width] words, where a word holds
// `group` = 1 float or 2 bfloat16: both are read as the weights of a product. Without values of
// their own, these are the first value_width elements of the keys (`turn.h`).
//
// A quantised cache has bytes in place of floats, behind the scales of the tile's 16 slots; what is
// multiplied are floats.
struct Cache {
    Kind kind = FLOAT;  // of what is multiplied
    bool quantised = false;
    int32_t* keys = nullptr;
    int32_t* values = nullptr;
    int64_t kv_heads = 0, head_width = 0, value_width = 0;

    int64_t group() const { return kind == FLOAT ? 1 : 2; }
    int64_t tile_words() const { return 16 * head_width / group(); }
    int64_t value_tile_words() const { return 16 * value_width / group(); }
    // As kept, in words of 32 bits.
    int64_t stored_words() const { return quantised ? 16 + 4 * head_width : tile_words(); }
};

struct Attention {
    int64_t heads = 0;
    float scale = 1, softcap = 0;   // softcap 0: none
    int64_t window = 0, chunk = 0;  // positions; 0: everything before
    const float* sinks = nullptr;   // [heads]

    // The first position that the query at `position` sees.
    int64_t oldest(int64_t position) const {
        const int64_t start = chunk ? position / chunk * chunk : 0;
        return window && position - window >= start ? position - window + 1 : start;
    }
};

// Cosines, then sines of half the turned elements of a head: [positions, 2, half]. None: no
// rotary positions.
struct Rotary {
    const float* table = nullptr;
    int64_t positions = 0, half = 0;

    const float* cosines(int64_t position) const { return table + position * 2 * half; }
    const float* sines(int64_t position) const { return cosines(position) + half; }
};

struct AttentionBlock {
    Norm norm, query_norm, key_norm;
    Linear qkv, out;
    bool norm_per_head = false, norm_after_rotary = false;
    float clip = 0;  // 0: none
    Rotary rotary;
    const float* query_scale = nullptr;  // [query_positions]
    int64_t query_positions = 0;
    bool gated = false;  // the output times the sigmoid of a gate, which is behind the values
    int64_t kv_heads = 0, head_width = 0;
    Attention attention;
};

constexpr int64_t MAX_TAPS = 16;  // inputs of one output of a convolution

// A gated delta net: `heads` matrices [key_width, value_width], of which some share a key head.
struct DeltaBlock {
    Norm norm, head_norm;
    Matrix project;  // queries, keys and values: the channels of the convolution; then gates
    Linear rates;    // beta of each head, then the decay, each padded to a multiple of 16 heads
    Matrix out;
    const float* convolution = nullptr;  // [kernel, channels]
    const float* decay = nullptr;        // [padded heads]: -e^A
    int64_t key_heads = 0, heads = 0, key_width = 0, value_width = 0, kernel = 0;

    int64_t values() const { return heads * value_width; }
    int64_t channels() const { return 2 * key_heads * key_width + values(); }
    int64_t padded_heads() const { return (heads + 15) / 16 * 16; }
    int64_t rate_width() const { return 2 * padded_heads(); }
    int64_t state_size() const { return (kernel - 1) * channels() + key_width * values(); }
};

// What is kept of a span's state beside its own: what it is behind the first `rows` rows.
struct Snapshot {
    int64_t span, rows, slot;
};

// One layer's states, a row of `size` floats for each slot: inputs of the convolution, then the
// matrices.
struct States {
    float* data = nullptr;
    int64_t size = 0;
    const int64_t* slots = nullptr;  // of each span
    const Snapshot* snapshots = nullptr;
    int64_t snapshot_count = 0;  // by span, then by rows

    float* of_slot(int64_t slot) const { return data + slot * size; }
    float* at(int64_t span) const { return of_slot(slots[span]); }

    // Calls `take` with each snapshot of a span.
    template <class Take>
    void each_snapshot(int64_t span, Take take) const {
        for (int64_t i = 0; i < snapshot_count; i++)
            if (snapshots[i].span == span) take(snapshots[i]);
    }
};

// Multi-head latent attention: one key for all heads, [latent | turned part], whose latent is the
// value.
struct LatentBlock {
    Norm norm, query_norm, latent_norm;
    Linear down;   // [query_rank + rank + turned, width]: what queries are made of, latent, turned
    Linear query;  // [heads][plain_width + turned] from query_rank, or from norm(x) where that is 0
    Linear out;
    Matrix to_keys, to_values;  // of each head: [rank, plain_width] and [value_width, rank]
    Rotary rotary;
    int64_t query_rank = 0, rank = 0, plain_width = 0;
    Attention attention;

    int64_t key_width() const { return rank + 2 * rotary.half; }
};

}  // namespace moedial
