// Vectors of one instruction set: this file is compiled once for each, and is the only one that
// knows intrinsics. Every operation rounds the same way wherever it is used (contraction is off;
// `fma` is explicit): bits never depend on how many rows share a loop.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moedial {

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define LANES_512 1
constexpr int LANES = 16, ROWS = 6,
              VECTORS = 4;  // a tile of accumulators: ROWS x VECTORS registers
#elif defined(__AVX2__)
#define LANES_256 1
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;
#else
constexpr int LANES = 4, ROWS = 4, VECTORS = 2;
#endif

typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef float vf_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

inline vf load(const float* p) { return *(const vf_any*)p; }
inline vi load(const int32_t* p) { return *(const vi_any*)p; }
inline void store(float* p, vf v) { *(vf_any*)p = v; }
inline void store(int32_t* p, vi v) { *(vi_any*)p = v; }
inline vf splat(float x) { return x - vf{}; }
inline vi splat(int32_t x) { return x - vi{}; }
inline vf bits(vi v) { return (vf)v; }
inline vi bits(vf v) { return (vi)v; }

inline vf fma(vf a, vf b, vf c) {
#if LANES_512
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif LANES_256
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

inline vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }
inline vf max(vf a, vf b) { return select(a > b, a, b); }
inline vf min(vf a, vf b) { return select(a < b, a, b); }
inline vi iota() {
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}
inline vf to_float(vi v) { return __builtin_convertvector(v, vf); }

// A fixed tree over the lanes: the same sum whatever the caller.
inline float sum(vf v) {
#if LANES_512
    return _mm512_reduce_add_ps((__m512)v);
#endif
    float lane[LANES];
    store(lane, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) lane[i] += lane[i + width];
    return lane[0];
}

inline float largest(vf v) {
#if LANES_512
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float lane[LANES];
    store(lane, v);
    float best = lane[0];
    for (int i = 1; i < LANES; i++) best = lane[i] > best ? lane[i] : best;
    return best;
}

// acc + a.1 * b.1 + a.0 * b.0 for pairs of bfloat16 in each lane.
inline vf dot_pairs(vf acc, vi a, vi b) {
#if LANES_512
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
    const vi high = splat(int32_t(0xFFFF0000));
    acc = fma(bits(a & high), bits(b & high), acc);
    return fma(bits(a << 16), bits(b << 16), acc);
#endif
}

// acc + Σ a.i * b.i for four unsigned bytes a and four signed bytes b in each lane.
inline vi dot_bytes(vi acc, vi a, vi b) {
#if LANES_512
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)a, (__m512i)b);
#elif LANES_256
    const __m256i low = _mm256_set1_epi16(0xFF), x = (__m256i)a, y = (__m256i)b;
    const __m256i even =
        _mm256_madd_epi16(_mm256_and_si256(x, low), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return acc + (vi)even + (vi)odd;
#else
    for (int shift = 0; shift < 32; shift += 8)
        acc += ((a >> shift) & 0xFF) * ((b << (24 - shift)) >> 24);
    return acc;
#endif
}

inline uint16_t to_bf16(float x) {
    uint32_t u;
    std::memcpy(&u, &x, 4);
    if ((u & 0x7FFFFFFF) > 0x7F800000) return uint16_t(u >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t x) {
    const uint32_t u = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

// LANES bfloat16 as the lower or the upper half of a word each.
inline vi low_half(const uint16_t* p) {
#if LANES_512
    return (vi)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#else
    vi v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}
inline vi high_half(const uint16_t* p) { return low_half(p) << 16; }

// Two vectors of floats, rounded to nearest even, as 2 * LANES bfloat16 in order.
inline void store_bf16(uint16_t* out, vf low, vf high) {
#if LANES_512
    const __m512bh packed = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(out, &packed, 64);
#else
    float lane[2 * LANES];
    store(lane, low), store(lane + LANES, high);
    for (int i = 0; i < 2 * LANES; i++) out[i] = to_bf16(lane[i]);
#endif
}

// e^x, relative error about 1e-7; 0 below -87.3, +inf above 88.7. Cody-Waite reduction and a
// degree-6 polynomial.
inline vf exp(vf x) {
    const vf clamped = min(max(x, splat(-87.3f)), splat(88.7f));
    const vf shifted =
        fma(clamped, splat(1.44269504f), splat(12582912.0f));  // 1.5 * 2^23: rounds to an integer
    const vf n = shifted - 12582912.0f;
    vf r = fma(n, splat(-0.693359375f), clamped);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p * r, r, r) + 1.0f;
    // 2^n in two factors, so that n = 128 does not overflow on the way.
    const vi whole = bits(shifted) - bits(splat(12582912.0f)), half = whole >> 1;
    vf y = p * bits((half + 127) << 23) * bits((whole - half + 127) << 23);
    y = select(x < splat(-87.3f), splat(0.0f), y);
    y = select(x > splat(88.7f), splat(INFINITY), y);
    return select(x == x, y, x);
}

}  // namespace moedial
