// Vectors of one instruction set: `Floats` and `Ints` with their arithmetic, bfloat16 and e^x.
// This file is compiled once for each instruction set, and is the only one that knows intrinsics.
// Every operation rounds the same way wherever it is used (contraction is off; `fma` is explicit):
// bits never depend on how many rows share a loop.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace moedial {

// LANES numbers fill a register. A product keeps ROWS x VECTORS registers of sums, as many as fit
// beside the operands.
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#define LANES_512 1
constexpr const char* INSTRUCTION_SET = "avx512";
constexpr int LANES = 16, ROWS = 6, VECTORS = 4;
#elif defined(__AVX2__)
#define LANES_256 1
#if defined(__AVXVNNI__)
constexpr const char* INSTRUCTION_SET = "avxvnni";
#else
constexpr const char* INSTRUCTION_SET = "avx2";
#endif
constexpr int LANES = 8, ROWS = 6, VECTORS = 2;
#else
constexpr const char* INSTRUCTION_SET = "portable";
constexpr int LANES = 4, ROWS = 4, VECTORS = 2;
#endif

// GCC's vector types: operators work lane by lane, a comparison gives -1 (true) or 0 in each lane.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
// The same in memory, at any address and in place of any type.
typedef float StoredFloats __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t StoredInts __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t StoredHalf __attribute__((may_alias));  // of a word

// Calls run.operator()<N>() with N = value, from 1 to MOST and known when it runs. A loop keeps its
// sums in registers only where their number is known when it is compiled.
template <int MOST, class Run>
[[gnu::always_inline]] inline void with_constant(int64_t value, Run&& run) {
    if (value == MOST) return run.template operator()<MOST>();
    if constexpr (MOST > 1) with_constant<MOST - 1>(value, run);
}

inline Floats load(const float* from) { return *(const StoredFloats*)from; }
inline Ints load(const int32_t* from) { return *(const StoredInts*)from; }
inline void store(float* to, Floats values) { *(StoredFloats*)to = values; }
inline void store(int32_t* to, Ints values) { *(StoredInts*)to = values; }
inline Floats splat(float value) { return value - Floats{}; }
inline Ints splat(int32_t value) { return value - Ints{}; }
// The same bits as the other type; `to_float` converts the values.
inline Floats bits(Ints values) { return (Floats)values; }
inline Ints bits(Floats values) { return (Ints)values; }
inline Floats to_float(Ints values) { return __builtin_convertvector(values, Floats); }

// left * right + sum. With vector instructions it is rounded once, in portable code twice.
inline Floats fma(Floats left, Floats right, Floats sum) {
#if LANES_512
    return (Floats)_mm512_fmadd_ps((__m512)left, (__m512)right, (__m512)sum);
#elif LANES_256
    return (Floats)_mm256_fmadd_ps((__m256)left, (__m256)right, (__m256)sum);
#else
    return left * right + sum;
#endif
}

// left * right + sum rounded once in every library, for what must have the same bits in all of
// them.
inline Floats fused(Floats left, Floats right, Floats sum) {
#if LANES_512 || LANES_256
    return fma(left, right, sum);
#else
    for (int lane = 0; lane < LANES; lane++)
        sum[lane] = std::fma(left[lane], right[lane], sum[lane]);
    return sum;
#endif
}

// fma(left, right, sum) and a value as it is, in the order in which the program has them and each
// in a register of its own: GCC would mix up the steps of a large tile until its sums no longer
// fit.
inline Floats add_product(Floats left, Floats right, Floats sum) {
#if LANES_256
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
    return sum;
#else
    return fma(left, right, sum);
#endif
}

inline Ints pinned(Ints value) {
#if LANES_256
    asm volatile("" : "+x"(value));
#endif
    return value;
}

inline Floats select(Ints mask, Floats yes, Floats no) { return mask ? yes : no; }
// Where one is not a number, `right`.
inline Floats max(Floats left, Floats right) {
#if LANES_256
    return (Floats)_mm256_max_ps((__m256)left, (__m256)right);
#else
    return select(left > right, left, right);
#endif
}
inline Floats min(Floats left, Floats right) {
#if LANES_256
    return (Floats)_mm256_min_ps((__m256)left, (__m256)right);
#else
    return select(left < right, left, right);
#endif
}

// 0, 1, 2, ...
inline Ints iota() {
    Ints lanes;
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = lane;
    return lanes;
}

// Lanes of two vectors by number: those of `right` follow those of `left`.
template <int... Lane>
inline Ints pick(Ints left, Ints right) {
#if defined(__clang__)
    return __builtin_shufflevector(left, right, Lane...);
#else
    return __builtin_shuffle(left, right, Ints{Lane...});
#endif
}

// In each block of 2 Step x 2 Step numbers, the upper right and the lower left quarter change
// places.
template <int Step, int... Lane>
inline void swap_quarters(Ints* rows, std::integer_sequence<int, Lane...>) {
#pragma GCC unroll 16
    for (int row = 0; row < LANES; row++) {
        if (row & Step) continue;
        const Ints upper = rows[row], lower = rows[row + Step];
        rows[row] = pick<(Lane & Step ? LANES + Lane - Step : Lane)...>(upper, lower);
        rows[row + Step] = pick<(Lane & Step ? LANES + Lane : Lane + Step)...>(upper, lower);
    }
}

// LANES rows of LANES numbers become columns.
template <int Step = 1>
inline void transpose(Ints* rows) {
    swap_quarters<Step>(rows, std::make_integer_sequence<int, LANES>{});
    if constexpr (2 * Step < LANES) transpose<2 * Step>(rows);
}

// A fixed tree over the lanes: the same sum whatever the caller.
inline float sum(Floats values) {
#if LANES_512
    return _mm512_reduce_add_ps((__m512)values);
#elif LANES_256
    const __m256 all = (__m256)values;
    const __m128 four = _mm256_castps256_ps128(all) + _mm256_extractf128_ps(all, 1);
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#else
    float lanes[LANES];
    store(lanes, values);
    for (int width = LANES / 2; width; width /= 2)
        for (int lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
    return lanes[0];
#endif
}

inline float largest(Floats values) {
#if LANES_512
    return _mm512_reduce_max_ps((__m512)values);
#elif LANES_256
    const __m256 all = (__m256)values;
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return two[0] > two[1] ? two[0] : two[1];
#else
    float lanes[LANES];
    store(lanes, values);
    float best = lanes[0];
    for (int lane = 1; lane < LANES; lane++) best = lanes[lane] > best ? lanes[lane] : best;
    return best;
#endif
}

// sums + left.1 * right.1 + left.0 * right.0 for the pair of bfloat16 in each lane. The odd one
// comes first, as in the processor's own instruction.
inline Floats dot_pairs(Floats sums, Ints left, Ints right) {
#if LANES_512
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)left, (__m512bh)right);
#else
    const Ints high = splat(int32_t(0xFFFF0000));
    sums = fma(bits(left & high), bits(right & high), sums);
    return fma(bits(left << 16), bits(right << 16), sums);
#endif
}

// What `WideBytes` (widened.h) makes of bytes: sums + left.1 * right.1 + left.0 * right.0 for the
// pair of 16-bit integers in each lane.
inline Ints dot_shorts(Ints sums, Ints left, Ints right) {
#if LANES_256
    return sums + (Ints)_mm256_madd_epi16((__m256i)left, (__m256i)right);
#else
    return sums + (left >> 16) * (right >> 16) + ((left << 16) >> 16) * ((right << 16) >> 16);
#endif
}

// Signed bytes as two pairs of 16-bit integers: the even ones, the odd ones.
inline void widen_bytes(Ints bytes, Ints& even, Ints& odd) {
#if LANES_256
    even = (Ints)_mm256_srai_epi16(_mm256_slli_epi16((__m256i)bytes, 8), 8);
    odd = (Ints)_mm256_srai_epi16((__m256i)bytes, 8);
#else
    even = (((bytes << 24) >> 24) & 0xFFFF) | ((bytes << 8 >> 24) << 16);
    odd = (((bytes << 16) >> 24) & 0xFFFF) | ((bytes >> 24) << 16);
#endif
}

// sums + Σ left.i * right.i for the four unsigned bytes `left` and four signed bytes `right` of
// each lane. AVX2 has no exact instruction for bytes: even and odd ones are widened to 16 bits.
// AVX-VNNI, AVX2 with that instruction, differs here and in `add_bytes` below.
inline Ints dot_bytes(Ints sums, Ints left, Ints right) {
#if LANES_512
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)left, (__m512i)right);
#elif defined(__AVXVNNI__)
    return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)left, (__m256i)right);
#elif LANES_256
    const __m256i low = _mm256_set1_epi16(0xFF), unsigneds = (__m256i)left,
                  signeds = (__m256i)right;
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(unsigneds, low),
                                           _mm256_srai_epi16(_mm256_slli_epi16(signeds, 8), 8));
    const __m256i odd =
        _mm256_madd_epi16(_mm256_srli_epi16(unsigneds, 8), _mm256_srai_epi16(signeds, 8));
    return sums + (Ints)even + (Ints)odd;
#else
    for (int shift = 0; shift < 32; shift += 8)
        sums += ((left >> shift) & 0xFF) * ((right << (24 - shift)) >> 24);
    return sums;
#endif
}

// The same for sums of many products, as each library does it best: `part = add_bytes(part, left,
// right)` some times, from what `start_of` gives, then `end_bytes(part)`, the sum. AVX2 multiplies
// small `left` bytes (LARGE false) and adds neighbouring products in 16 bits, an even and an odd
// pair of each lane: what is added may overflow on the way, as long as the sums of all of them and
// of their starts do not. Of LARGE ones `left` is signed there.
#if LANES_256 && !defined(__AVXVNNI__)
constexpr bool ADDS_IN_16_BITS = true;
template <bool LARGE>
inline Ints end_bytes(Ints part) {
    if constexpr (LARGE) return part;
    return (Ints)_mm256_madd_epi16((__m256i)part, _mm256_set1_epi16(1));
}
template <bool LARGE>
inline Ints add_bytes(Ints part, Ints left, Ints right) {
    const __m256i bytes = (__m256i)left, inputs = (__m256i)right;
    if constexpr (LARGE)
        return part + end_bytes<false>((Ints)_mm256_maddubs_epi16(_mm256_abs_epi8(bytes),
                                                                  _mm256_sign_epi8(inputs, bytes)));
    return (Ints)_mm256_add_epi16((__m256i)part, _mm256_maddubs_epi16(bytes, inputs));
}
#else
constexpr bool ADDS_IN_16_BITS = false;
template <bool LARGE>
inline Ints end_bytes(Ints part) {
    return part;
}
template <bool LARGE>
inline Ints add_bytes(Ints part, Ints left, Ints right) {
    return dot_bytes(part, left, right);
}
#endif

// These have the compiler put values that change in a loop where they are said to be: on its own it
// may keep rarely needed ones in registers, or add up an inner loop's products in another order,
// for which there are too few.
template <class Values>
inline void keep_in_memory(Values& values) {
#if LANES_256
    asm volatile("" : "+m"(values));
#endif
}
inline void keep_in_register(Ints& values) {
#if LANES_256
    asm("" : "+x"(values));
#endif
}

// `add_bytes` of a row's input to several parts, of which each `left` is an element of `lefts`. The
// order of the steps is kept: products wait for the input together, then sums for the products.
template <bool LARGE, int COUNT, int PLANES>
[[gnu::always_inline]] inline void add_bytes(Ints* parts, const Ints (&lefts)[COUNT][PLANES],
                                             int plane, Ints right) {
#if LANES_256 && !defined(__AVXVNNI__)
    if constexpr (!LARGE) {
        Ints products[COUNT];
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++)
            asm volatile("vpmaddubsw %2, %1, %0"
                         : "=x"(products[i])
                         : "x"(lefts[i][plane]), "x"(right));
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++)
            asm volatile("vpaddw %1, %0, %0" : "+x"(parts[i]) : "x"(products[i]));
        return;
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) {
        parts[i] = add_bytes<LARGE>(parts[i], lefts[i][plane], right);
        keep_in_register(parts[i]);
    }
}

// The same for the first of them: each part is begun from `start`, or without STARTS from zero.
template <bool LARGE, bool STARTS, int COUNT, int PLANES>
[[gnu::always_inline]] inline void begin_bytes(Ints* parts, const Ints (&lefts)[COUNT][PLANES],
                                               Ints right, const int32_t* start) {
#if LANES_256 && !defined(__AVXVNNI__)
    if constexpr (!LARGE) {
        [[maybe_unused]] const Ints from = STARTS ? splat(*start) : Ints{};
#pragma GCC unroll 8
        for (int i = 0; i < COUNT; i++)
            asm volatile("vpmaddubsw %2, %1, %0" : "=x"(parts[i]) : "x"(lefts[i][0]), "x"(right));
        if constexpr (STARTS)
#pragma GCC unroll 8
            for (int i = 0; i < COUNT; i++)
                asm volatile("vpaddw %1, %0, %0" : "+x"(parts[i]) : "x"(from));
        return;
    }
#endif
#pragma GCC unroll 8
    for (int i = 0; i < COUNT; i++) parts[i] = STARTS ? splat(*start) : Ints{};
    add_bytes<LARGE>(parts, lefts, 0, right);
}

// What a sum starts from that is to have `factor` times the sum of such `right` bytes, small ones,
// added to it.
inline int32_t start_of(const int8_t* bytes, int64_t count, int32_t factor) {
    int32_t even = 0, odd = 0;
    for (int64_t i = 0; i < count; i += 4)
        even += bytes[i] + bytes[i + 1], odd += bytes[i + 2] + bytes[i + 3];
    even *= factor, odd *= factor;
    return ADDS_IN_16_BITS ? int32_t(uint32_t(odd) << 16 | uint16_t(even)) : even + odd;
}

// The bytes of `table` that the bytes of `indices`, below 16, choose; the table is repeated in each
// 16 bytes.
inline Ints look_up(Ints table, Ints indices) {
#if LANES_512
    return (Ints)_mm512_shuffle_epi8((__m512i)table, (__m512i)indices);
#elif LANES_256
    return (Ints)_mm256_shuffle_epi8((__m256i)table, (__m256i)indices);
#else
    uint8_t entries[4 * LANES], bytes[4 * LANES];
    std::memcpy(entries, &table, sizeof(entries)), std::memcpy(bytes, &indices, sizeof(bytes));
    for (uint8_t& byte : bytes) byte = entries[byte];
    std::memcpy(&indices, bytes, sizeof(bytes));
    return indices;
#endif
}

// 16 bytes in each 16 bytes of the vector.
inline Ints repeat_bytes(const uint8_t* bytes) {
    int32_t words[4], lanes[LANES];
    std::memcpy(words, bytes, sizeof(words));
    for (int lane = 0; lane < LANES; lane++) lanes[lane] = words[lane % 4];
    return load(lanes);
}

// Rounded to the nearest, ties to even. Adding 0x7FFF and the last bit that stays does both.
inline uint16_t to_bf16(float value) {
    uint32_t word;
    std::memcpy(&word, &value, 4);
    if ((word & 0x7FFFFFFF) > 0x7F800000) return uint16_t(word >> 16 | 0x40);  // NaN stays NaN
    return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

inline float from_bf16(uint16_t half) {
    const uint32_t word = uint32_t(half) << 16;
    float value;
    std::memcpy(&value, &word, 4);
    return value;
}

// LANES bfloat16 as the lower or the upper half of a 32-bit word each.
inline Ints low_half(const uint16_t* from) {
#if LANES_512
    return (Ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
#else
    Ints words;
    for (int lane = 0; lane < LANES; lane++) words[lane] = ((const StoredHalf*)from)[lane];
    return words;
#endif
}
inline Ints high_half(const uint16_t* from) { return low_half(from) << 16; }

// LANES float16, finite.
inline Floats load_float16(const uint16_t* from) {
#if LANES_512
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif LANES_256
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
    // The exponent's bias is 112 less than that of float32; the factor makes up for it, and makes
    // subnormals normal.
    const Ints halves = low_half(from);
    const Floats size = bits((halves & 0x7FFF) << 13) * 0x1p112f;
    return bits(bits(size) | (halves & 0x8000) << 16);
#endif
}

// LANES integers of 8 bits.
inline Ints load_whole_int8(const int8_t* from) {
#if LANES_512
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
#elif LANES_256
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#else
    Ints values;
    for (int lane = 0; lane < LANES; lane++) values[lane] = from[lane];
    return values;
#endif
}
inline Floats load_int8(const int8_t* from) { return to_float(load_whole_int8(from)); }

// The same as factors for `scaled_bytes`, which is `end_bytes` times one of them.
template <bool LARGE>
inline Ints load_factors(const int8_t* from) {
#if LANES_256 && !defined(__AVXVNNI__)
    if constexpr (!LARGE) {  // each for both sums of its lane
        const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
        return (Ints)_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(bytes, bytes));
    }
#endif
    return load_whole_int8(from);
}
template <bool LARGE>
inline Ints scaled_bytes(Ints part, Ints factors) {
#if LANES_256 && !defined(__AVXVNNI__)
    if constexpr (!LARGE) return (Ints)_mm256_madd_epi16((__m256i)part, (__m256i)factors);
#endif
    return part * factors;
}

// What `to_bf16` makes of each lane, in its lower half.
inline Ints upper_halves(Floats values) {
    const Ints words = bits(values);
    const Ints rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16;
    return values == values ? rounded : (words >> 16) | 0x40;
}

// Each lane as the bfloat16 nearest to it, still a float.
inline Floats round_bf16(Floats values) { return bits(upper_halves(values) << 16); }

// Two vectors of floats, rounded to nearest even, as 2 * LANES bfloat16 in order.
inline void store_bf16(uint16_t* to, Floats low, Floats high) {
#if LANES_512
    const __m512bh packed = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    std::memcpy(to, &packed, 64);
#else
    const Ints first = upper_halves(low), second = upper_halves(high);
    StoredHalf* halves = (StoredHalf*)to;
    for (int lane = 0; lane < LANES; lane++)
        halves[lane] = uint16_t(first[lane]), halves[LANES + lane] = uint16_t(second[lane]);
#endif
}

// Adding 1.5 * 2^23 rounds a float below 2^22 to an integer, which is then in its lowest bits.
constexpr float ROUNDING = 12582912.0f;

// e^x = series * 2^n, for x from -87.3 to 88.7, relative error about 1e-7.
// x = n ln 2 + rest (Cody and Waite: ln 2 in two parts, so that the rest is exact to the last bit);
// e^rest by a polynomial of degree 6.
inline Floats exp_series(Floats x, Ints& n) {
    const Floats shifted = fma(x, splat(1.44269504f), splat(ROUNDING));
    const Floats powers = shifted - ROUNDING;
    Floats rest = fma(powers, splat(-0.693359375f), x);
    rest = fma(powers, splat(2.12194440e-4f), rest);
    Floats series = splat(1.9875691500e-4f);
    series = fma(series, rest, splat(1.3981999507e-3f));
    series = fma(series, rest, splat(8.3334519073e-3f));
    series = fma(series, rest, splat(4.1665795894e-2f));
    series = fma(series, rest, splat(1.6666665459e-1f));
    series = fma(series, rest, splat(5.0000001201e-1f));
    n = bits(shifted) - bits(splat(ROUNDING));
    return fma(series * rest, rest, rest) + 1.0f;
}

// e^x; 0 below -87.3, +inf above 88.7, NaN of NaN.
inline Floats exp(Floats x) {
    Ints n;
    const Floats series = exp_series(min(max(x, splat(-87.3f)), splat(88.7f)), n);
    // 2^n in two factors, so that n = 128 does not overflow on the way.
    const Ints half = n >> 1;
    Floats result = series * bits((half + 127) << 23) * bits((n - half + 127) << 23);
    result = select(x < splat(-87.3f), splat(0.0f), result);
    result = select(x > splat(88.7f), splat(INFINITY), result);
    return select(x == x, result, x);
}

// The same for x up to 0, or NaN, in fewer steps.
inline Floats exp_down(Floats x) {
    Ints n;
    const Floats series = exp_series(max(splat(-87.3f), x), n);
    return select(x < splat(-87.3f), splat(0.0f), series * bits((n + 127) << 23));
}

}  // namespace moedial
