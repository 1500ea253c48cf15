// What happens to one row of float32: norms, activations, rotary positions. No threads, no
// matrices.
#pragma once
#include "gemm.h"

namespace moedial {

// y = norm(x): x / rms(x) · weight, or with a bias (x - mean) / std · weight + bias.
inline void norm_row(const float* x, int64_t width, const Norm& norm, float* y) {
    if (!norm.weight) {
        if (y != x) std::memcpy(y, x, width * 4);
        return;
    }
    const int64_t whole = width - width % LANES;
    float mean = 0;
    if (norm.bias) {
        vf total{};
        for (int64_t i = 0; i < whole; i += LANES) total += load(x + i);
        mean = sum(total);
        for (int64_t i = whole; i < width; i++) mean += x[i];
        mean /= float(width);
    }
    vf squares{};
    for (int64_t i = 0; i < whole; i += LANES)
        squares = fma(load(x + i) - mean, load(x + i) - mean, squares);
    float total = sum(squares);
    for (int64_t i = whole; i < width; i++) total += (x[i] - mean) * (x[i] - mean);
    const float inverse = 1.0f / std::sqrt(total / float(width) + norm.eps);
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf scaled = (load(x + i) - mean) * inverse * load(norm.weight + i);
        store(y + i, norm.bias ? scaled + load(norm.bias + i) : scaled);
    }
    for (int64_t i = whole; i < width; i++)
        y[i] = (x[i] - mean) * inverse * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

// The index of the highest value, of equals the lowest; -1 if one is not finite.
inline int64_t best_of(const float* x, int64_t width) {
    const int64_t whole = width - width % LANES;
    vf most = splat(x[0]), wrong{};
    for (int64_t i = 0; i < whole; i += LANES) {
        const vf v = load(x + i);
        most = max(most, v), wrong += v - v;
    }
    float top = largest(most), bad = sum(wrong);
    for (int64_t i = whole; i < width; i++) top = std::fmax(top, x[i]), bad += x[i] - x[i];
    if (bad != 0) return -1;
    int64_t at = 0;
    while (x[at] != top) at++;
    return at;
}

// y = x where a bit of `allowed` is set (bit i of the row is bit i % 32 of word i / 32), -inf
// elsewhere. Whether any value that stays is finite.
inline bool constrain_row(const float* x, const int32_t* allowed, int64_t width, float* y) {
    const int64_t whole = width - width % 32;
    const vi lane = iota();
    vi any{};
    for (int64_t i = 0; i < whole; i += 32) {
        const int32_t word = allowed[i / 32];
        for (int64_t j = 0; j < 32; j += LANES) {
            const vi stays = ((splat(word) >> (lane + int32_t(j))) & 1) != 0;
            const vf v = load(x + i + j);
            store(y + i + j, select(stays, v, splat(-INFINITY)));
            any |= stays & (v - v == vf{});
        }
    }
    bool finite = false;
    for (int l = 0; l < LANES; l++) finite |= any[l] != 0;
    for (int64_t i = whole; i < width; i++) {
        const bool stays = allowed[i / 32] >> (i % 32) & 1;
        y[i] = stays ? x[i] : -INFINITY, finite |= stays && x[i] - x[i] == 0;
    }
    return finite;
}

inline vf tanh(vf x) {
    const vf e = exp(min(max(x, splat(-9.0f)), splat(9.0f)) * 2.0f);
    return select(x == x, (e - 1.0f) / (e + 1.0f), x);
}

// erf by Abramowitz and Stegun 7.1.26, absolute error 1.5e-7.
inline vf erf(vf x) {
    const vf a = max(x, -x), t = 1.0f / fma(a, splat(0.3275911f), splat(1.0f));
    vf p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f)) * t;
    const vf y = 1.0f - p * exp(-a * a);
    return select(x < splat(0.0f), -y, y);
}

inline vf activate(vf x, Activation kind) {
    switch (kind) {
        case SILU: return x / (exp(-x) + 1.0f);
        case GELU: return x * 0.5f * (erf(x * 0.70710678f) + 1.0f);
        case GELU_TANH: return x * 0.5f * (tanh((x + x * x * x * 0.044715f) * 0.79788456f) + 1.0f);
        case RELU: return select(x < splat(0.0f), splat(0.0f), x);
    }
    return x;
}

// Turn each (i, i + C/2) pair of one head in place (Su et al. 2021, half-split layout).
inline void rotate_row(float* x, int64_t half, const float* cosines, const float* sines) {
    int64_t i = 0;
    for (; i + LANES <= half; i += LANES) {
        const vf a = load(x + i), b = load(x + half + i), c = load(cosines + i),
                 s = load(sines + i);
        store(x + i, fma(a, c, -(b * s)));
        store(x + half + i, fma(b, c, a * s));
    }
    for (; i < half; i++) {
        const float a = x[i], b = x[half + i];
        x[i] = a * cosines[i] - b * sines[i];
        x[half + i] = b * cosines[i] + a * sines[i];
    }
}

}  // namespace moedial
