// ∞-MoE: points drawn from each token's Gaussian. The numbers drawn are those of model/noise.py: a
// token's draws depend on its noise seed, the layer and its position, and on nothing else.
#pragma once
#include "linear.h"

namespace moedial {

// SplitMix64 (Steele et al. 2014): neighbouring numbers give independent bits.
constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;

inline uint64_t mix(uint64_t bits) {
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9u;
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EBu;
    return bits ^ (bits >> 31);
}

// The random key of all draws of one token in one layer, from its noise seed, the layer and its
// position.
inline uint64_t noise_key(const LayerRows& budget, int64_t token, int64_t layer) {
    const uint64_t of_layer = mix(uint64_t(budget.seeds[token]) + uint64_t(layer + 1) * GOLDEN);
    return mix(of_layer + uint64_t(budget.positions[token]) * GOLDEN);
}

// Standard normal values of one sample: 64 bits give four, 16 bits the index of each one's
// quantile.
inline void noise_row(uint64_t key, uint64_t sample, const Draws& draws, float* noise) {
    const uint64_t words = uint64_t(draws.latent_dim + 3) / 4;
    for (uint64_t word = 0; word < words; word++) {
        const uint64_t bits = mix(key + (sample * words + word + 1) * GOLDEN);
        for (int64_t i = 0; i < 4 && int64_t(4 * word) + i < draws.latent_dim; i++)
            noise[4 * word + i] = draws.quantiles[bits >> (16 * i) & 0xFFFF];
    }
}

// The standard deviation that the router's raw value stands for.
inline float spread(float raw, const Draws& draws) {
    if (draws.exponential) return exp(splat(raw))[0] + draws.sigma_min;
    return (raw > 20 ? raw : std::log1p(std::exp(raw))) + draws.sigma_min;
}

// The index of each token's first draw among the draws of all tokens, [tokens + 1].
inline int64_t* first_draws(const LayerRows& budget) {
    int64_t* first = scratch().take<int64_t>(budget.tokens + 1);
    first[0] = 0;
    for (int64_t token = 0; token < budget.tokens; token++)
        first[token + 1] = first[token] + budget.counts[token];
    return first;
}

// One point: mean + sigma · noise. Fixed draws take their noise from a table. Antithetic draws come
// in pairs; the second one negates the noise.
inline void draw_point(const float* mean, const float* sigma, uint64_t key, int64_t index,
                       const Draws& draws, float* point) {
    if (draws.points) {
        const float* fixed = draws.points + index * draws.latent_dim;
        for (int64_t i = 0; i < draws.latent_dim; i++) point[i] = mean[i] + sigma[i] * fixed[i];
        return;
    }
    noise_row(key, uint64_t(draws.antithetic ? index / 2 : index), draws, point);
    const float sign = draws.antithetic && index % 2 ? -1.0f : 1.0f;
    for (int64_t i = 0; i < draws.latent_dim; i++)
        point[i] = mean[i] + sigma[i] * (sign * point[i]);
}

// points [ΣK, latent_dim], the draws of token 0 first. gaussian [tokens, stride]: means, then raw
// spreads.
void draw(const float* gaussian, int64_t stride, const LayerRows& budget, const Draws& draws,
          float* points) {
    const int64_t size = draws.latent_dim;
    const int64_t* first_draw = first_draws(budget);
    float* sigmas = scratch().take<float>(budget.tokens * size);
    parallel_rows(budget.tokens, 8, [&](int64_t first, int64_t last) {
        for (int64_t token = first; token < last; token++) {
            const uint64_t key = noise_key(budget, token, draws.layer);
            const float *mean = gaussian + token * stride, *raw = mean + size;
            float* sigma = sigmas + token * size;
            for (int64_t i = 0; i < size; i++) sigma[i] = spread(raw[i], draws);
            for (int64_t index = 0; index < budget.counts[token]; index++)
                draw_point(mean, sigma, key, index, draws,
                           points + (first_draw[token] + index) * size);
        }
    });
}

}  // namespace moedial
