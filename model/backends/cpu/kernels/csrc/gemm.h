// Products with packed matrices: accumulator tiles, one panel of up to 64 outputs at a time.
// Every output is one chain of sums over the inputs in order, so a row's bits do not depend on the
// rows beside it.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "vec.h"

namespace moedial {

constexpr int64_t PANEL = 64;
constexpr int64_t BLOCK = 16 * ROWS;  // rows of one pass over a panel
constexpr int64_t CHUNK = 128;  // groups that stay in the first-level cache: 64 * 4 * CHUNK bytes
constexpr int64_t AHEAD = 12;   // groups to prefetch ahead

struct Float {
    static vi dot(vi acc, vi a, vi b) { return bits(fma(bits(a), bits(b), bits(acc))); }
};
struct Bfloat {
    static vi dot(vi acc, vi a, vi b) { return bits(dot_pairs(bits(acc), a, b)); }
};
struct Quantum {
    static vi dot(vi acc, vi a, vi b) { return dot_bytes(acc, a, b); }
};

// Where a tile finds its words: vector v of group g at `at(g, v)`; `soon` is asked for some groups
// ahead.
struct Panel {
    const int32_t* w;
    int64_t step;
    const int32_t* at(int64_t g, int v) const { return w + g * step + v * LANES; }
    void soon(int64_t g, int v) const {
        if (v * LANES % 16 == 0) __builtin_prefetch(w + (g + AHEAD) * step + v * LANES);
    }
};

// c[r][v] (+)= Σ_g a[r][g] · w[g][v] for R rows and V vectors of outputs; row r's sums lie at c[r]
// + to.
template <class K, int R, int V, class Words>
inline void tile(const int32_t* const* a, int64_t from, int64_t groups, const Words& words,
                 int32_t* const* c, int64_t to, bool add) {
    vi acc[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) acc[r][v] = add ? load(c[r] + to + v * LANES) : splat(0);
    const int32_t* x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) x[r] = a[r] + from;
    for (int64_t g = 0; g < groups; g++) {
        vi y[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
            y[v] = load(words.at(g, v));
            words.soon(g, v);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            const vi each = splat(x[r][g]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) acc[r][v] = K::dot(acc[r][v], each, y[v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(c[r] + to + v * LANES, acc[r][v]);
}

template <class K, int V, int R = ROWS, class Words>
inline void tile_rows(int rows, const int32_t* const* a, int64_t from, int64_t groups,
                      const Words& words, int32_t* const* c, int64_t to, bool add) {
    if (rows == R) return tile<K, R, V>(a, from, groups, words, c, to, add);
    if constexpr (R > 1) tile_rows<K, V, R - 1>(rows, a, from, groups, words, c, to, add);
}

// All rows against the same `vectors` vectors of outputs.
template <class K, int V = VECTORS, class Words>
inline void tiles(int vectors, const int32_t* const* a, int64_t rows, int64_t from, int64_t groups,
                  const Words& words, int32_t* const* c, int64_t to, bool add) {
    if (vectors == V) {
        for (int64_t r = 0; r < rows; r += ROWS)
            tile_rows<K, V>(int(std::min<int64_t>(rows - r, ROWS)), a + r, from, groups, words,
                            c + r, to, add);
        return;
    }
    if constexpr (V > 1) tiles<K, V - 1>(vectors, a, rows, from, groups, words, c, to, add);
}

// All rows against one chunk of a panel.
template <class K>
inline void chunk(const int32_t* const* a, int64_t rows, int64_t from, const int32_t* w,
                  int64_t outputs, int64_t groups, int64_t step, int32_t* const* c, int64_t to,
                  bool add) {
    for (int64_t n = 0; n < outputs; n += VECTORS * LANES) {
        const int vectors = int(std::min<int64_t>((outputs - n) / LANES, VECTORS));
        tiles<K>(vectors, a, rows, from, groups, Panel{w + n, step}, c, to + n, add);
    }
}

// int8 pairs to bfloat16 pairs; every int8 is one exactly.
inline void widen(const int8_t* from, int64_t words, int32_t* to) {
#if LANES_512
    for (int64_t i = 0; i < words; i += 16) {
        const auto part = [&](int64_t at) {
            return _mm512_cvtepi32_ps(
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(from + 2 * i + at))));
        };
        store_bf16((uint16_t*)(to + i), (vf)part(0), (vf)part(16));
    }
#else
    for (int64_t i = 0; i < 2 * words; i++) ((uint16_t*)to)[i] = to_bf16(float(from[i]));
#endif
}

// A slice of a panel: `outputs` columns of the matrix from `first`, a multiple of 16 that does not
// cross a panel.
struct Slice {
    const Matrix* matrix;
    int64_t first, outputs;
};

// The words of Σ_k for at most BLOCK rows, floats (int32 for QUANTUM), row r at c[r] + to; with
// `add`, onto what is there.
inline void product(const int32_t* const* a, int64_t rows, const Slice& s, int32_t* const* c,
                    int64_t to, bool add) {
    const Matrix& m = *s.matrix;
    const int64_t p = s.first / PANEL, step = m.outputs(p), inside = s.first - p * PANEL,
                  groups = m.groups();
    alignas(64) static thread_local int32_t wide[CHUNK * PANEL];
    // Few rows pass once over all inputs; many pass over chunks that stay in the cache. The sums
    // are the same.
    const int64_t most = rows <= ROWS && m.kind != BYTES ? groups : CHUNK;
    for (int64_t from = 0; from < groups; from += most, add = true) {
        const int64_t now = std::min(groups - from, most);
        const char* data = m.panel(p) + from * step * m.word_bytes();
        const int32_t* words = (const int32_t*)data + inside;
        switch (m.kind) {
            case FLOAT: chunk<Float>(a, rows, from, words, s.outputs, now, step, c, to, add); break;
            case BFLOAT:
                chunk<Bfloat>(a, rows, from, words, s.outputs, now, step, c, to, add);
                break;
            case QUANTUM:
                chunk<Quantum>(a, rows, from, words, s.outputs, now, step, c, to, add);
                break;
            case BYTES:
                widen((const int8_t*)data, now * step, wide);
                chunk<Bfloat>(a, rows, from, wide + inside, s.outputs, now, step, c, to, add);
                break;
        }
    }
}

// One vector of finished values: scales applied.
inline vf finish(const Matrix& m, const int32_t* c, int64_t n, float row_scale) {
    switch (m.kind) {
        case QUANTUM:
            return to_float(load(c) - load(m.offset + n)) * (load(m.scale + n) * row_scale);
        case BYTES: return load((const float*)c) * load(m.scale + n);
        default: return load((const float*)c);
    }
}

// Input rows in the form that a matrix of this kind multiplies.
struct Inputs {
    Kind kind;
    int64_t words = 0;        // per row
    int32_t* data = nullptr;  // [rows, words]
    float* scale = nullptr;   // [rows], QUANTUM only

    const int32_t* row(int64_t r) const { return data + r * words; }
};

// Bytes 128 + round(127 x / max |x|); returns the scale that undoes it. A row that is not finite
// has none: NaN.
inline float quantise(const float* x, int64_t k, uint8_t* bytes) {
    vf best{}, bad{};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
        const vf v = load(x + i);
        best = max(best, max(v, -v)), bad += v - v;
    }
    float most = largest(best), wrong = sum(bad);
    for (; i < k; i++) most = std::fmax(most, std::fabs(x[i])), wrong += x[i] - x[i];
    if (wrong != 0 || most == 0) {
        std::memset(bytes, 128, k);
        return wrong != 0 ? NAN : 0;
    }
    const vf inverse = splat(127.0f / most),
             shift = splat(12582912.0f);  // 1.5 * 2^23: rounds to an integer
    for (i = 0; i + LANES <= k; i += LANES) {
        const vi q = bits(fma(load(x + i), inverse, shift)) - bits(shift) + 128;
        for (int l = 0; l < LANES; l++) bytes[i + l] = uint8_t(q[l]);
    }
    for (; i < k; i++) bytes[i] = uint8_t(int32_t(std::nearbyint(x[i] * inverse[0])) + 128);
    return most / 127.0f;
}

inline void encode(const float* x, int64_t k, const Inputs& to, int64_t row, int64_t stored) {
    int32_t* out = to.data + row * to.words;
    if (to.kind == FLOAT) {
        std::memcpy(out, x, k * 4);
        std::memset(out + k, 0, (stored - k) * 4);
    } else if (to.kind == QUANTUM) {
        to.scale[row] = quantise(x, k, (uint8_t*)out);
        std::memset((uint8_t*)out + k, 128, stored - k);
    } else {
        uint16_t* halves = (uint16_t*)out;
        int64_t i = 0;
        for (; i + 2 * LANES <= k; i += 2 * LANES)
            store_bf16(halves + i, load(x + i), load(x + i + LANES));
        for (; i < k; i++) halves[i] = to_bf16(x[i]);
        std::memset(halves + k, 0, (stored - k) * 2);
    }
}

}  // namespace moedial
