// A gated delta net (Qwen3-Next; arXiv 2412.06464 eq. 10): a short causal convolution, the delta
// rule on each head's state, a gated norm, and a projection back onto x. Per value head a matrix S
// [keys, values] in float32: S = e^g S; S += k (beta (v - S'k))'; y = S'q.
//
// Tokens are computed one by one in the order of their sequence, and states are float32 between
// steps, so a token's bits depend on its sequence only. A task is one head of a sequence. It
// applies all tokens to some columns of the matrix, which stay in the first-level cache, then to
// the next.
#pragma once
#include "linear.h"

namespace moedial {

// Columns of a matrix that lie together: [values / STRIPE][keys][STRIPE].
constexpr int64_t STRIPE = 16;
constexpr int STATE_VECTORS = 4;  // vectors of columns that a task updates together

// ln(1 + e^x) = max(x, 0) + ln(1 + u), u = e^-|x|; ln(1 + u) = 2 artanh(u / (2 + u)), whose
// argument is at most 1/3.
inline Floats softplus(Floats x) {
    const Floats power = exp(-max(x, -x)), part = power / (power + 2.0f), square = part * part;
    Floats series = splat(1.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2) series = fma(series, square, splat(1.0f / float(odd)));
    return max(x, splat(0.0f)) + 2.0f * part * series;
}

// y = scale * x / |x|.
inline void unit_row(float* x, int64_t width, float scale) {
    Floats squares{};
    for (int64_t i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
    const float factor = scale / std::sqrt(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < width; i += LANES) store(x + i, load(x + i) * factor);
}

// Updates V vectors of columns of a matrix with one token, and writes what it reads to `y`.
template <int V>
inline void delta_token(float* memory, int64_t keys, const float* key, const float* query,
                        float decay, float beta, const float* value, float* y) {
    Floats known[V] = {}, change[V], seen[V] = {};
    float* column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; v++)
        column[v] = memory + v * LANES / STRIPE * STRIPE * keys + v * LANES % STRIPE;
    for (int64_t k = 0; k < keys; k++) {
        const Floats factor = splat(key[k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) known[v] = fma(load(column[v] + k * STRIPE), factor, known[v]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) change[v] = (load(value + v * LANES) - known[v] * decay) * beta;
    for (int64_t k = 0; k < keys; k++) {
        const Floats factor = splat(key[k]), read = splat(query[k]);
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            float* place = column[v] + k * STRIPE;
            const Floats now = fma(change[v], factor, load(place) * decay);
            store(place, now);
            seen[v] = fma(now, read, seen[v]);
        }
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) store(y + v * LANES, seen[v]);
}

// One step of a layer. The rows of `mixed` are projections: the channels of the convolution
// (queries, keys, values), then the gates. `rates`: beta of each head, then e^g.
struct DeltaStep {
    const DeltaBlock& layer;
    const States& states;
    const Pages& pages;
    int64_t stride;          // of `mixed`
    float *mixed, *rates;    // [rows, stride] and [rows, 2 padded heads]
    float *convolved, *out;  // [rows, channels] and [rows, heads * value width]

    int64_t channels() const { return layer.channels(); }

    // Where a state keeps the convolution's input of a position. The last kernel - 1 inputs are
    // kept, that of position p in row p % (kernel - 1).
    float* kept(float* state, int64_t position) const {
        return state + position % (layer.kernel - 1) * channels();
    }

    // beta = sigmoid, e^g = e^(-e^A softplus(.)), in place.
    void rate_row(int64_t row) const {
        const int64_t heads = layer.padded_heads();
        float *beta = rates + row * 2 * heads, *decay = beta + heads;
        for (int64_t i = 0; i < heads; i += LANES) {
            store(beta + i, 1.0f / (exp(-load(beta + i)) + 1.0f));
            store(decay + i, exp(load(layer.decay + i) * softplus(load(decay + i))));
        }
    }

    // Convolves one row, applies SiLU, and normalises its queries and keys to length 1.
    void convolve_row(int64_t index, int64_t row) const {
        const Span& span = pages.spans[index];
        const int64_t position = span.context - span.rows + row, taps = layer.kernel;
        const int64_t first = std::max<int64_t>(0, taps - 1 - position);  // before it: zeros
        const float* inputs[MAX_TAPS];
        for (int64_t tap = first; tap < taps; tap++) {
            const int64_t at = row - (taps - 1) + tap;  // in the step
            inputs[tap] = at >= 0 ? mixed + (span.first + at) * stride
                                  : kept(states.at(index), position - (taps - 1) + tap);
        }
        float* y = convolved + (span.first + row) * channels();
        for (int64_t i = 0; i < channels(); i += LANES) {
            Floats total{};
            for (int64_t tap = first; tap < taps; tap++)
                total = fma(load(inputs[tap] + i), load(layer.convolution + tap * channels() + i),
                            total);
            store(y + i, activate(total, SILU));
        }
        const int64_t width = layer.key_width, keys = layer.key_heads * width;
        for (int64_t i = 0; i < keys; i += width) {
            unit_row(y + i, width, 1.0f / std::sqrt(float(width)));
            unit_row(y + keys + i, width, 1.0f);
        }
    }

    // Copies the last inputs of a sequence into its snapshots and then into its own state, for
    // later steps. The own state is written last, because snapshots read older inputs from it.
    void keep_inputs(int64_t index) const {
        states.each_snapshot(index, [&](const Snapshot& taken) {
            keep_inputs(index, taken.rows, states.of_slot(taken.slot));
        });
        keep_inputs(index, pages.spans[index].rows, states.at(index));
    }

    // Copies the last inputs of the first `rows` rows of a sequence's step into `state`.
    void keep_inputs(int64_t index, int64_t rows, float* state) const {
        const Span& span = pages.spans[index];
        const int64_t start = span.context - span.rows;
        const bool own =
            state == states.at(index);  // which has the inputs of earlier steps already
        const int64_t first = rows - (layer.kernel - 1);
        for (int64_t row = std::max<int64_t>(own ? 0 : -start, first); row < rows; row++) {
            float* place = kept(state, start + row);
            const float* input =
                row < 0 ? kept(states.at(index), start + row) : mixed + (span.first + row) * stride;
            std::memcpy(place, input, channels() * 4);
        }
    }

    // Applies the tokens of rows [begin, end) to V vectors of columns of one head's matrix.
    template <int V>
    void columns(int64_t begin, int64_t end, int64_t head, int64_t first, float* memory) const {
        const int64_t width = layer.key_width, keys = layer.key_heads * width;
        const int64_t key = head / (layer.heads / layer.key_heads) * width;
        const int64_t value = head * layer.value_width + first;
        for (int64_t row = begin; row < end; row++) {
            const float *x = convolved + row * channels(), *rate = rates + row * layer.rate_width();
            delta_token<V>(memory, width, x + keys + key, x + key,
                           rate[layer.padded_heads() + head], rate[head], x + 2 * keys + value,
                           out + row * layer.values() + value);
        }
    }

    template <int V = STATE_VECTORS>
    void some_columns(int64_t vectors, int64_t begin, int64_t end, int64_t head, int64_t first,
                      float* memory) const {
        if (vectors == V) return columns<V>(begin, end, head, first, memory);
        if constexpr (V > 1) some_columns<V - 1>(vectors, begin, end, head, first, memory);
    }

    // Applies the tokens of rows [begin, end) to the matrix of one head.
    void run_rows(int64_t begin, int64_t end, int64_t head, float* memory) const {
        for (int64_t first = 0; first < layer.value_width; first += STATE_VECTORS * LANES) {
            const int64_t left = (layer.value_width - first) / LANES;
            some_columns(std::min<int64_t>(left, STATE_VECTORS), begin, end, head, first,
                         memory + first * layer.key_width);
        }
    }

    // Computes one head of a sequence: applies its tokens to the state, then norm and gate.
    void run_head(int64_t index, int64_t head) const {
        const Span& span = pages.spans[index];
        const int64_t width = layer.value_width, matrix = layer.key_width * width;
        const int64_t place = (layer.kernel - 1) * channels() + head * matrix;
        float* memory = states.at(index) + place;
        if (span.context == span.rows) std::memset(memory, 0, matrix * 4);
        int64_t begin = span.first;
        states.each_snapshot(index, [&](const Snapshot& taken) {
            run_rows(begin, span.first + taken.rows, head, memory);
            std::memcpy(states.of_slot(taken.slot) + place, memory, matrix * 4);
            begin = span.first + taken.rows;
        });
        run_rows(begin, span.first + span.rows, head, memory);
        for (int64_t row = span.first; row < span.first + span.rows; row++) {
            float* y = out + row * layer.values() + head * width;
            const float* gate = mixed + row * stride + channels() + head * width;
            norm_row(y, width, layer.head_norm, y);
            for (int64_t i = 0; i < width; i += LANES)
                store(y + i, load(y + i) * activate(load(gate + i), SILU));
        }
    }

    void run() const {
        const int64_t rows = pages.rows, matrices = layer.values() * layer.key_width;
        int64_t* span_of = scratch().take<int64_t>(rows);
        for (int64_t index = 0; index < pages.count; index++)
            std::fill_n(span_of + pages.spans[index].first, pages.spans[index].rows, index);
        parallel(
            rows,
            [&](int64_t row) {
                rate_row(row);
                convolve_row(span_of[row], row - pages.spans[span_of[row]].first);
            },
            16 * rows * channels());
        // All rows have read the old inputs: they can be overwritten.
        parallel(
            pages.count, [&](int64_t index) { keep_inputs(index); },
            layer.kernel * pages.count * channels());
        parallel(
            pages.count * layer.heads,
            [&](int64_t task) { run_head(task / layer.heads, task % layer.heads); },
            4 * rows * matrices);
    }
};

// Projections, convolution, delta rule, gated norm, projection back onto x.
void delta_block(float* x, int64_t width, const DeltaBlock& layer, const States& states,
                 const Pages& pages) {
    const int64_t rows = pages.rows, stride = layer.project.outputs;
    float* normed = scratch().take<float>(rows * width);
    const Inputs in = encode_rows(x, rows, width, width, layer.norm, layer.project, normed);
    const DeltaStep step{.layer = layer,
                         .states = states,
                         .pages = pages,
                         .stride = stride,
                         .mixed = scratch().take<float>(rows * stride),
                         .rates = scratch().take<float>(rows * layer.rate_width()),
                         .convolved = scratch().take<float>(rows * layer.channels()),
                         .out = scratch().take<float>(rows * layer.values())};
    linear_rows(in, rows, {layer.project}, false, stride, stride, step.mixed);
    const Inputs rates = inputs_match(layer.project, layer.rates.weight)
                             ? in
                             : encode_rows(normed, rows, width, width, {}, layer.rates.weight);
    linear_rows(rates, rows, layer.rates, false, layer.rate_width(), layer.rate_width(),
                step.rates);
    step.run();
    const Inputs read = encode_rows(step.out, rows, layer.values(), layer.values(), {}, layer.out);
    linear_rows(read, rows, {layer.out}, true, width, width, x);
}

}  // namespace moedial
