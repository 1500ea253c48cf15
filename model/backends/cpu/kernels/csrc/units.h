// ∞-MoE with narrow groups and few tokens: only the rows of kept units are read. Each unit's sum
// over the inputs and each output's sum over the units run in the order of the panels of
// `experts.h`, where what is not kept adds zero: the bits are the same, so which of the two runs is
// a matter of time alone.
#pragma once
#include "experts.h"

namespace moedial {

constexpr int64_t SPAN = 16 * LANES;  // outputs of one task of the second product
constexpr int64_t AHEAD_UNITS = 4;    // units to prefetch ahead in the second product

// The words of LANES rows, turned so that vector g holds word g of every row.
inline void transpose(Ints (&rows)[LANES]) {
#if LANES_512
    // 16 x 16 words in four steps: neighbours, pairs, quarters and halves of the registers.
    __m512i pairs[16], quads[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32((__m512i)rows[i], (__m512i)rows[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            quads[i + 2 * j] = _mm512_unpacklo_epi64(pairs[i + j], pairs[i + j + 2]);
            quads[i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[i + j], pairs[i + j + 2]);
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i low = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0x88);
        const __m512i high = _mm512_shuffle_i32x4(quads[j], quads[4 + j], 0xDD);
        const __m512i low2 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0x88);
        const __m512i high2 = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], 0xDD);
        rows[j] = (Ints)_mm512_shuffle_i32x4(low, low2, 0x88);
        rows[8 + j] = (Ints)_mm512_shuffle_i32x4(low, low2, 0xDD);
        rows[4 + j] = (Ints)_mm512_shuffle_i32x4(high, high2, 0x88);
        rows[12 + j] = (Ints)_mm512_shuffle_i32x4(high, high2, 0xDD);
    }
#else
    for (int row = 0; row < LANES; row++)
        for (int column = 0; column < row; column++) {
            const int32_t other = rows[row][column];
            rows[row][column] = rows[column][row], rows[column][row] = other;
        }
#endif
}

// Σ over the words of row · x for LANES rows, one lane each.
template <class Dot>
inline Ints dot_rows(const int32_t* const* rows, const int32_t* x, int64_t words) {
    Ints sums = splat(0), part[LANES];
    int64_t from = 0;
    for (; from + LANES <= words; from += LANES) {
#pragma GCC unroll 16
        for (int row = 0; row < LANES; row++) part[row] = load(rows[row] + from);
        transpose(part);
#pragma GCC unroll 16
        for (int word = 0; word < LANES; word++)
            sums = Dot::dot(sums, splat(x[from + word]), part[word]);
    }
    for (; from < words; from++) {
        for (int row = 0; row < LANES; row++) part[0][row] = rows[row][from];
        sums = Dot::dot(sums, splat(x[from]), part[0]);
    }
    return sums;
}

// One token's kept units in rising order, and their activated and weighted values.
struct KeptUnits {
    const int32_t* unit;
    float* hidden;
    int64_t count;
};

// First product: the hidden values of LANES kept units from the `first` one on.
inline void up_units(const UnitRows& rows, const Experts& layer, const int32_t* x,
                     const float* mask, int64_t group_units, const KeptUnits& kept, int64_t first) {
    const int32_t* each[LANES];
    const int64_t now = std::min<int64_t>(LANES, kept.count - first), words = layer.up.groups();
    for (int64_t lane = 0; lane < LANES; lane++) {
        // Lanes without a unit repeat the last one; units of the next call are prefetched.
        each[lane] = rows.up + kept.unit[first + std::min(lane, now - 1)] * words;
        const int32_t* later =
            rows.up + kept.unit[std::min(first + LANES + lane, kept.count - 1)] * words;
        for (int64_t i = 0; i < words; i += 16) __builtin_prefetch(later + i);
    }
    const Ints sums = layer.up.kind == FLOAT ? dot_rows<FloatDot>(each, x, words)
                                             : dot_rows<Bfloat16Dot>(each, x, words);
    const Floats active = activate(bits(sums), layer.activation);
    for (int64_t lane = 0; lane < now; lane++)
        kept.hidden[first + lane] = active[lane] * mask[kept.unit[first + lane] / group_units];
}

// sums[vector] = Σ over the kept units of hidden · down for N vectors of outputs from `first`.
// bfloat16 panels hold two neighbouring units in a word, whose products are added in one step: so
// are they here, an even unit with the odd one behind it, and a unit without its neighbour with 0.
template <int N>
inline void down_part(const UnitRows& rows, Kind kind, const KeptUnits& kept, int64_t width,
                      int64_t first, float* sums) {
    Floats acc[N] = {};
    for (int64_t i = 0; i < kept.count; i++) {
        const int64_t unit = kept.unit[i], at = unit * width + first;
        const int64_t later = kept.unit[std::min(i + AHEAD_UNITS, kept.count - 1)] * width + first;
        const int64_t size = kind == FLOAT ? 4 : 2;
        for (int64_t byte = 0; byte < N * LANES * size; byte += 64)
            __builtin_prefetch(rows.down + later * size + byte);
        if (kind == FLOAT) {
            const Floats hidden = splat(kept.hidden[i]);
            const float* weights = (const float*)rows.down + at;
#pragma GCC unroll 16
            for (int vector = 0; vector < N; vector++)
                acc[vector] = fma(hidden, load(weights + vector * LANES), acc[vector]);
            continue;
        }
        const uint16_t *weights = (const uint16_t*)rows.down + at, *next = weights + width;
        const uint32_t hidden = to_bf16(kept.hidden[i]);
        if (unit % 2) {
#pragma GCC unroll 16
            for (int vector = 0; vector < N; vector++)
                acc[vector] = dot_pairs(acc[vector], splat(int32_t(hidden << 16)),
                                        high_half(weights + vector * LANES));
        } else if (i + 1 < kept.count && kept.unit[i + 1] == unit + 1) {
            const Ints pair = splat(int32_t(hidden | uint32_t(to_bf16(kept.hidden[++i])) << 16));
#pragma GCC unroll 16
            for (int vector = 0; vector < N; vector++)
                acc[vector] = dot_pairs(
                    acc[vector], pair,
                    low_half(weights + vector * LANES) | high_half(next + vector * LANES));
        } else {
#pragma GCC unroll 16
            for (int vector = 0; vector < N; vector++)
                acc[vector] = dot_pairs(acc[vector], splat(int32_t(hidden)),
                                        low_half(weights + vector * LANES));
        }
    }
#pragma GCC unroll 16
    for (int vector = 0; vector < N; vector++) store(sums + vector * LANES, acc[vector]);
}

// Second product for one span of outputs: a whole span, or single vectors of the last one; the
// width is a multiple of LANES.
inline void down_units(const UnitRows& rows, Kind kind, const KeptUnits& kept, int64_t width,
                       int64_t first, float* sums) {
    if (first + SPAN <= width)
        return down_part<SPAN / LANES>(rows, kind, kept, width, first, sums + first);
    for (int64_t column = first; column < width; column += LANES)
        down_part<1>(rows, kind, kept, width, column, sums + column);
}

// The units of each token whose group has a mask that is not zero.
inline KeptUnits* kept_units(const float* mask, int64_t tokens, int64_t groups,
                             int64_t group_units) {
    KeptUnits* kept = scratch().take<KeptUnits>(tokens);
    for (int64_t token = 0; token < tokens; token++) {
        int32_t* list = scratch().take<int32_t>(groups * group_units);
        int64_t count = 0;
        for (int64_t group = 0; group < groups; group++)
            if (mask[token * groups + group] != 0)
                for (int64_t unit = 0; unit < group_units; unit++)
                    list[count++] = int32_t(group * group_units + unit);
        kept[token] = {list, scratch().take<float>(count), count};
    }
    return kept;
}

// The masked feed-forward layer, token by token; `in` are the encoded rows, mask [tokens, groups].
inline void run_units(const Infinity& layer, const Inputs& in, const float* mask,
                      const Output& out) {
    const int64_t tokens = out.rows, width = out.width;
    const int64_t groups = layer.groups, group_units = layer.group_units;
    const KeptUnits* kept = kept_units(mask, tokens, groups, group_units);
    for (int64_t token = 0; token < tokens; token++) {
        const KeptUnits& units = kept[token];
        parallel_rows(ceil_div(units.count, LANES), 8, [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                up_units(layer.rows, layer.tiles, in.row(token), mask + token * groups, group_units,
                         units, i * LANES);
        });
    }
    const int64_t spans = ceil_div(width, SPAN);
    float* sums = scratch().take<float>(tokens * width);
    parallel(tokens * spans, [&](int64_t task) {
        const int64_t token = task / spans, first = task % spans * SPAN;
        float* row_sums = sums + token * width;
        const int64_t last = std::min(first + SPAN, width);
        down_units(layer.rows, layer.tiles.down.kind, kept[token], width, first, row_sums);
        out.store(token, first, last, row_sums);
    });
}

}  // namespace moedial
