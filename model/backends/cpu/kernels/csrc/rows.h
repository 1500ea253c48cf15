// Functions of one row of float32: norms, argmax, grammar masks, activations, rotary positions. No
// threads, no matrices. Each loop over whole vectors is followed by one over the values that are
// left.
#pragma once
#include "kernels.h"
#include "vec.h"

namespace moedial {

// y = norm(x): x / rms(x) · weight, or with a bias (x - mean) / std · weight + bias. x may be y.
inline void norm_row(const float* x, int64_t width, const Norm& norm, float* y) {
    if (!norm.weight) {
        if (y != x) std::memcpy(y, x, width * 4);
        return;
    }
    const int64_t whole = width - width % LANES;
    float mean = 0;
    if (norm.bias) {
        Floats total{};
        for (int64_t i = 0; i < whole; i += LANES) total += load(x + i);
        mean = sum(total);
        for (int64_t i = whole; i < width; i++) mean += x[i];
        mean /= float(width);
    }
    Floats squares{};
    for (int64_t i = 0; i < whole; i += LANES)
        squares = fma(load(x + i) - mean, load(x + i) - mean, squares);
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(total / float(width) + norm.eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats scaled = (load(x + i) - mean) * inverse * load(norm.weight + i);
        store(y + i, norm.bias ? scaled + load(norm.bias + i) : scaled);
    }
    for (int64_t i = whole; i < width; i++)
        y[i] = (x[i] - mean) * inverse * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

// The index of the highest value (the lowest index where several are equal), or -1 if a value is
// not finite.
inline int64_t argmax_row(const float* x, int64_t width) {
    const int64_t whole = width - width % LANES;
    Floats highest = splat(x[0]), wrong{};
    for (int64_t i = 0; i < whole; i += LANES) {
        const Floats values = load(x + i);
        highest = max(highest, values), wrong += values - values;  // inf - inf and NaN - NaN: NaN
    }
    float top = largest(highest), bad = sum(wrong);
    for (int64_t i = whole; i < width; i++) top = std::fmax(top, x[i]), bad += x[i] - x[i];
    if (bad != 0) return -1;
    int64_t index = 0;
    while (x[index] != top) index++;
    return index;
}

// y = x where a bit of `allowed` is set (bit i of the row is bit i % 32 of word i / 32), -inf
// elsewhere. Returns whether an allowed value is finite.
inline bool constrain_row(const float* x, const int32_t* allowed, int64_t width, float* y) {
    const int64_t whole = width - width % 32;
    const Ints lanes = iota();
    Ints any{};
    for (int64_t i = 0; i < whole; i += 32) {
        const int32_t word = allowed[i / 32];
        for (int64_t bit = 0; bit < 32; bit += LANES) {
            const Ints stays = ((splat(word) >> (lanes + int32_t(bit))) & 1) != 0;
            const Floats values = load(x + i + bit);
            store(y + i + bit, select(stays, values, splat(-INFINITY)));
            any |= stays & (values - values == Floats{});
        }
    }
    bool finite = false;
    for (int lane = 0; lane < LANES; lane++) finite |= any[lane] != 0;
    for (int64_t i = whole; i < width; i++) {
        const bool stays = allowed[i / 32] >> (i % 32) & 1;
        y[i] = stays ? x[i] : -INFINITY, finite |= stays && x[i] - x[i] == 0;
    }
    return finite;
}

// From e^2x; beyond 9 the result is 1 in float32 and e^2x would overflow.
inline Floats tanh(Floats x) {
    const Floats power = exp(min(max(x, splat(-9.0f)), splat(9.0f)) * 2.0f);
    return select(x == x, (power - 1.0f) / (power + 1.0f), x);
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline Floats erf(Floats x) {
    const Floats size = max(x, -x), t = 1.0f / fma(size, splat(0.3275911f), splat(1.0f));
    Floats series = splat(1.061405429f);
    series = fma(series, t, splat(-1.453152027f));
    series = fma(series, t, splat(1.421413741f));
    series = fma(series, t, splat(-0.284496736f));
    series = fma(series, t, splat(0.254829592f)) * t;
    const Floats positive = 1.0f - series * exp(-size * size);
    return select(x < splat(0.0f), -positive, positive);
}

// GELU by erf, or by tanh: 0.79788456 is sqrt(2 / π), 0.70710678 is 1 / sqrt(2).
inline Floats activate(Floats x, Activation kind) {
    switch (kind) {
        case SILU: return x / (exp(-x) + 1.0f);
        case GELU: return x * 0.5f * (erf(x * 0.70710678f) + 1.0f);
        case GELU_TANH: return x * 0.5f * (tanh((x + x * x * x * 0.044715f) * 0.79788456f) + 1.0f);
        case RELU: return select(x < splat(0.0f), splat(0.0f), x);
        case SWIGLU_CLAMPED: break;  // of a gate and a value together
    }
    return x;
}

// activation(gate) * up. SWIGLU_CLAMPED is the activation of gpt-oss: gate is at most 7, up is
// between -7 and 7, the sigmoid is steeper, and 1 is added to up. NaN stays NaN.
inline Floats activate_gated(Floats gate, Floats up, Activation kind) {
    if (kind != SWIGLU_CLAMPED) return activate(gate, kind) * up;
    const Floats most = splat(7.0f);
    gate = min(most, gate), up = max(-most, min(most, up));
    return (up + 1.0f) * (gate / (exp(gate * -1.702f) + 1.0f));
}

// Rotates each pair (i, i + half) of one head in place (Su et al. 2021, half-split layout).
inline void rotate_row(float* x, int64_t half, const float* cosines, const float* sines) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const Floats first = load(x + i), second = load(x + half + i);
        const Floats cosine = load(cosines + i), sine = load(sines + i);
        store(x + i, fma(first, cosine, -(second * sine)));
        store(x + half + i, fma(second, cosine, first * sine));
    }
    for (; i < half; i++) {
        const float first = x[i], second = x[half + i];
        x[i] = first * cosines[i] - second * sines[i];
        x[half + i] = second * cosines[i] + first * sines[i];
    }
}

}  // namespace moedial
