// ∞-MoE with narrow masks and few tokens: only the rows of kept units are read. Each unit's sum
// over the inputs and each output's sum over the units run in the order of the panels of
// `experts.h`, where what is not kept adds zero: the bits are the same, so which of the two runs is
// a matter of time alone.
#pragma once
#include "experts.h"

namespace moedial {

constexpr int64_t SPAN = 16 * LANES;  // outputs of one task of the second product

// The words of LANES rows, turned so that vector g holds word g of every row.
inline void transpose(vi (&v)[LANES]) {
#if LANES_512
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)v[i], (__m512i)v[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)v[i], (__m512i)v[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            b[i + 2 * j] = _mm512_unpacklo_epi64(a[i + j], a[i + j + 2]);
            b[i + 2 * j + 1] = _mm512_unpackhi_epi64(a[i + j], a[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88),
                      high = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD);
        const __m512i low2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88),
                      high2 = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD);
        v[j] = (vi)_mm512_shuffle_i32x4(low, low2, 0x88),
        v[8 + j] = (vi)_mm512_shuffle_i32x4(low, low2, 0xDD);
        v[4 + j] = (vi)_mm512_shuffle_i32x4(high, high2, 0x88),
              v[12 + j] = (vi)_mm512_shuffle_i32x4(high, high2, 0xDD);
    }
#else
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < i; j++) {
            const int32_t other = v[i][j];
            v[i][j] = v[j][i], v[j][i] = other;
        }
#endif
}

// Σ_k row · x for LANES rows of `words` words, one lane each.
template <class K>
inline vi dot_rows(const int32_t* const* rows, const int32_t* x, int64_t words) {
    vi acc = splat(0), part[LANES];
    int64_t from = 0;
    for (; from + LANES <= words; from += LANES) {
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++) part[r] = load(rows[r] + from);
        transpose(part);
#pragma GCC unroll 16
        for (int g = 0; g < LANES; g++) acc = K::dot(acc, splat(x[from + g]), part[g]);
    }
    for (; from < words; from++) {
        for (int r = 0; r < LANES; r++) part[0][r] = rows[r][from];
        acc = K::dot(acc, splat(x[from]), part[0]);
    }
    return acc;
}

// One token's kept units in rising order, and their activated and weighted values.
struct KeptUnits {
    const int32_t* unit;
    float* h;
    int64_t count;
};

inline void up_units(const UnitRows& rows, const Experts& e, const int32_t* x, const float* mask,
                     int64_t share, const KeptUnits& kept, int64_t first) {
    const int32_t* each[LANES];
    const int64_t now = std::min<int64_t>(LANES, kept.count - first), words = e.up.groups();
    for (int64_t r = 0; r < LANES; r++) {
        each[r] = rows.up + kept.unit[first + std::min(r, now - 1)] * words;
        const int32_t* later =
            rows.up + kept.unit[std::min(first + LANES + r, kept.count - 1)] * words;
        for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(later + i);
    }
    const vi sums =
        e.up.kind == FLOAT ? dot_rows<Float>(each, x, words) : dot_rows<Bfloat>(each, x, words);
    const vf active = activate(bits(sums), e.activation);
    for (int64_t r = 0; r < now; r++)
        kept.h[first + r] = active[r] * mask[kept.unit[first + r] / share];
}

// sums[v] = Σ over the kept units of h · down for N vectors of outputs from `first`: pair by pair
// where a word holds two.
template <int N>
inline void down_part(const UnitRows& rows, Kind kind, const KeptUnits& kept, int64_t width,
                      int64_t first, float* sums) {
    constexpr int64_t AHEAD_UNITS = 4;
    vf acc[N] = {};
    for (int64_t i = 0; i < kept.count; i++) {
        const int64_t unit = kept.unit[i], at = unit * width + first;
        const int64_t later = kept.unit[std::min(i + AHEAD_UNITS, kept.count - 1)] * width + first;
        const int64_t size = kind == FLOAT ? 4 : 2;
        for (int64_t b = 0; b < N * LANES * size; b += 64)
            __builtin_prefetch(rows.down + later * size + b);
        if (kind == FLOAT) {
            const vf h = splat(kept.h[i]);
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                acc[v] = fma(h, load((const float*)rows.down + at + v * LANES), acc[v]);
            continue;
        }
        const uint16_t *w = (const uint16_t*)rows.down + at, *next = w + width;
        const uint32_t h = to_bf16(kept.h[i]);
        if (unit % 2) {
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                acc[v] = dot_pairs(acc[v], splat(int32_t(h << 16)), high_half(w + v * LANES));
        } else if (i + 1 < kept.count && kept.unit[i + 1] == unit + 1) {
            const vi pair = splat(int32_t(h | uint32_t(to_bf16(kept.h[++i])) << 16));
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                acc[v] =
                    dot_pairs(acc[v], pair, low_half(w + v * LANES) | high_half(next + v * LANES));
        } else {
#pragma GCC unroll 16
            for (int v = 0; v < N; v++)
                acc[v] = dot_pairs(acc[v], splat(int32_t(h)), low_half(w + v * LANES));
        }
    }
#pragma GCC unroll 16
    for (int v = 0; v < N; v++) store(sums + v * LANES, acc[v]);
}

// The same for one span of outputs: whole spans, then single vectors; the width is a multiple of
// LANES.
inline void down_units(const UnitRows& rows, Kind kind, const KeptUnits& kept, int64_t width,
                       int64_t first, float* sums) {
    if (first + SPAN <= width)
        return down_part<SPAN / LANES>(rows, kind, kept, width, first, sums + first);
    for (int64_t c = first; c < width; c += LANES)
        down_part<1>(rows, kind, kept, width, c, sums + c);
}

// x += the masked feed-forward layer, token by token; `in` are the encoded rows, mask [tokens,
// stride].
inline void run_units(const UnitRows& rows, const Inputs& in, int64_t tokens, int64_t width,
                      const Experts& e, const float* mask, int64_t stride, int64_t share,
                      float* x) {
    KeptUnits* kept = scratch().take<KeptUnits>(tokens);
    for (int64_t t = 0; t < tokens; t++) {
        int32_t* list = scratch().take<int32_t>(stride * share);
        int64_t n = 0;
        for (int64_t s = 0; s < stride; s++)
            if (mask[t * stride + s] != 0)
                for (int64_t u = 0; u < share; u++) list[n++] = int32_t(s * share + u);
        kept[t] = {list, scratch().take<float>(n), n};
    }
    for (int64_t t = 0; t < tokens; t++) {
        const KeptUnits& k = kept[t];
        parallel_rows(ceil_div(k.count, LANES), 8, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                up_units(rows, e, in.row(t), mask + t * stride, share, k, i * LANES);
        });
    }
    const int64_t spans = ceil_div(width, SPAN);
    float* sums = scratch().take<float>(tokens * width);
    parallel(tokens * spans, [&](int64_t i) {
        const int64_t t = i / spans, first = i % spans * SPAN;
        down_units(rows, e.down.kind, kept[t], width, first, sums + t * width);
        for (int64_t c = first; c < std::min(first + SPAN, width); c++)
            x[t * width + c] += sums[t * width + c];
    });
}

}  // namespace moedial
