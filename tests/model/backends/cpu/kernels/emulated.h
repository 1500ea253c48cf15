// The instructions of AVX512 and AVX-VNNI that the kernels use, lane by lane as their manual
// defines them, for processors that have AVX2 alone. The compiler includes this file before
// kernels.cpp (MOEDIAL_KERNELS_EMULATE in build.py); EMULATED_AVX512 or EMULATED_AVXVNNI says which
// set is wanted. An intrinsic that is missing here does not compile. Exceptions and the payloads of
// NaN are not emulated.
#pragma once
#include <immintrin.h>  // before the macros below, which change what it defines

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

namespace emulated {

typedef std::array<float, 16> Floats;
typedef std::array<uint32_t, 16> Words;
typedef std::array<uint64_t, 8> Pairs;
typedef std::array<uint8_t, 64> Bytes;

inline uint32_t dot_bytes(uint32_t sum, const uint8_t* unsigneds, const uint8_t* signeds) {
    for (int byte = 0; byte < 4; byte++) sum += uint32_t(unsigneds[byte] * int8_t(signeds[byte]));
    return sum;
}

#if EMULATED_AVXVNNI

// vpdpbusd: sums wrap around, nothing saturates.
inline __m256i dpbusd(__m256i sums, __m256i left, __m256i right) {
    auto words = std::bit_cast<std::array<uint32_t, 8>>(sums);
    const auto unsigneds = std::bit_cast<std::array<uint8_t, 32>>(left);
    const auto signeds = std::bit_cast<std::array<uint8_t, 32>>(right);
    for (int lane = 0; lane < 8; lane++)
        words[lane] = dot_bytes(words[lane], &unsigneds[4 * lane], &signeds[4 * lane]);
    return std::bit_cast<__m256i>(words);
}

#else

inline __m512i dpbusd(__m512i sums, __m512i left, __m512i right) {
    auto words = std::bit_cast<Words>(sums);
    const auto unsigneds = std::bit_cast<Bytes>(left), signeds = std::bit_cast<Bytes>(right);
    for (int lane = 0; lane < 16; lane++)
        words[lane] = dot_bytes(words[lane], &unsigneds[4 * lane], &signeds[4 * lane]);
    return std::bit_cast<__m512i>(words);
}

inline __m512 fmadd(__m512 left, __m512 right, __m512 sum) {
    const auto lefts = std::bit_cast<Floats>(left), rights = std::bit_cast<Floats>(right);
    auto sums = std::bit_cast<Floats>(sum);
    for (int lane = 0; lane < 16; lane++)
        sums[lane] = std::fma(lefts[lane], rights[lane], sums[lane]);
    return std::bit_cast<__m512>(sums);
}

// A subnormal number becomes a zero of its sign.
inline uint32_t flushed(uint32_t word) { return word & 0x7F800000 ? word : word & 0x80000000; }

inline float flushed_float(uint32_t word) { return std::bit_cast<float>(flushed(word)); }

// left * right + sum, rounded once; subnormal numbers count as zero and become zero.
inline float flushing_fma(uint32_t left, uint32_t right, float sum) {
    sum = std::fma(flushed_float(left), flushed_float(right), sum);
    return flushed_float(std::bit_cast<uint32_t>(sum));
}

// vdpbf16ps: the odd one of each pair is added first, and the sum is rounded after each.
inline __m512 dpbf16(__m512 sum, __m512bh left, __m512bh right) {
    auto sums = std::bit_cast<Words>(sum);
    const auto lefts = std::bit_cast<Words>(left), rights = std::bit_cast<Words>(right);
    for (int lane = 0; lane < 16; lane++) {
        const float odd = flushing_fma(lefts[lane] & 0xFFFF0000, rights[lane] & 0xFFFF0000,
                                       flushed_float(sums[lane]));
        const float both = flushing_fma(lefts[lane] << 16, rights[lane] << 16, odd);
        sums[lane] = std::bit_cast<uint32_t>(both);
    }
    return std::bit_cast<__m512>(sums);
}

// vcvtne2ps2bf16: rounds to nearest even; subnormal numbers become zero.
inline uint16_t to_bf16(uint32_t word) {
    if ((word & 0x7FFFFFFF) > 0x7F800000) return uint16_t(word >> 16 | 0x40);
    word = flushed(word);
    return uint16_t((word + 0x7FFF + (word >> 16 & 1)) >> 16);
}

// The numbers of `low` come first in memory.
inline __m512bh cvtne2ps(__m512 high, __m512 low) {
    const auto highs = std::bit_cast<Words>(high), lows = std::bit_cast<Words>(low);
    std::array<uint16_t, 32> halves;
    for (int lane = 0; lane < 16; lane++) {
        halves[lane] = to_bf16(lows[lane]);
        halves[16 + lane] = to_bf16(highs[lane]);
    }
    return std::bit_cast<__m512bh>(halves);
}

// vpshufb within each 16 bytes; an index of 128 or more gives zero.
inline __m512i shuffle_bytes(__m512i table, __m512i index) {
    const auto entries = std::bit_cast<Bytes>(table), indices = std::bit_cast<Bytes>(index);
    Bytes bytes;
    for (int byte = 0; byte < 64; byte++)
        bytes[byte] = indices[byte] & 0x80 ? 0 : entries[(byte & ~15) + (indices[byte] & 15)];
    return std::bit_cast<__m512i>(bytes);
}

// Four blocks of 16 bytes: two of `left`, then two of `right`, by two bits of `chosen` each.
inline __m512i shuffle_blocks(__m512i left, __m512i right, int chosen) {
    const auto lefts = std::bit_cast<Words>(left), rights = std::bit_cast<Words>(right);
    Words words;
    for (int lane = 0; lane < 16; lane++) {
        const int block = chosen >> (lane / 4 * 2) & 3;
        words[lane] = (lane < 8 ? lefts : rights)[4 * block + lane % 4];
    }
    return std::bit_cast<__m512i>(words);
}

// Half of the numbers in each 16 bytes, from `left` and `right` in turn: from `first` on.
template <class Numbers>
inline __m512i unpack(__m512i left, __m512i right, size_t first) {
    const auto lefts = std::bit_cast<Numbers>(left), rights = std::bit_cast<Numbers>(right);
    Numbers numbers;
    constexpr size_t count = std::tuple_size_v<Numbers>, block = count / 4;
    for (size_t lane = 0; lane < count; lane += 2) {
        const size_t from = lane / block * block + first + lane % block / 2;
        numbers[lane] = lefts[from], numbers[lane + 1] = rights[from];
    }
    return std::bit_cast<__m512i>(numbers);
}

inline __m512i widen_words(__m256i from) {
    const auto halves = std::bit_cast<std::array<uint16_t, 16>>(from);
    Words words;
    std::copy(halves.begin(), halves.end(), words.begin());
    return std::bit_cast<__m512i>(words);
}

inline __m512i widen_bytes(__m128i from) {
    const auto bytes = std::bit_cast<std::array<int8_t, 16>>(from);
    std::array<int32_t, 16> words;
    std::copy(bytes.begin(), bytes.end(), words.begin());
    return std::bit_cast<__m512i>(words);
}

inline __m512 to_floats(__m512i from) {
    const auto words = std::bit_cast<std::array<int32_t, 16>>(from);
    Floats floats;
    for (int lane = 0; lane < 16; lane++) floats[lane] = float(words[lane]);
    return std::bit_cast<__m512>(floats);
}

inline __m512 from_float16(__m256i from) {
    const auto halves = std::bit_cast<std::array<uint16_t, 16>>(from);
    Floats floats;
    for (int lane = 0; lane < 16; lane++) floats[lane] = _cvtsh_ss(halves[lane]);
    return std::bit_cast<__m512>(floats);
}

// The compiler's own tree: each half of the lanes onto the other, the upper one first.
template <class Join>
inline float reduced(__m512 from, Join join) {
    auto lanes = std::bit_cast<Floats>(from);
    for (int width = 8; width; width /= 2)
        for (int lane = 0; lane < width; lane++)
            lanes[lane] = join(lanes[lane + width], lanes[lane]);
    return lanes[0];
}

inline float sum(__m512 from) {
    return reduced(from, [](float upper, float lower) { return upper + lower; });
}

// vmaxps: the second of two where one is NaN.
inline float largest(__m512 from) {
    return reduced(from, [](float upper, float lower) { return upper > lower ? upper : lower; });
}

#endif

}  // namespace emulated

#if EMULATED_AVXVNNI
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#elif EMULATED_AVX512
#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#define _mm512_cvtepi32_ps emulated::to_floats
#define _mm512_cvtepi8_epi32 emulated::widen_bytes
#define _mm512_cvtepu16_epi32 emulated::widen_words
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps
#define _mm512_cvtph_ps emulated::from_float16
#define _mm512_dpbf16_ps emulated::dpbf16
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_fmadd_ps emulated::fmadd
#define _mm512_reduce_add_ps emulated::sum
#define _mm512_reduce_max_ps emulated::largest
#define _mm512_shuffle_epi8 emulated::shuffle_bytes
#define _mm512_shuffle_i32x4 emulated::shuffle_blocks
#define _mm512_unpackhi_epi32(left, right) emulated::unpack<emulated::Words>(left, right, 2)
#define _mm512_unpackhi_epi64(left, right) emulated::unpack<emulated::Pairs>(left, right, 1)
#define _mm512_unpacklo_epi32(left, right) emulated::unpack<emulated::Words>(left, right, 0)
#define _mm512_unpacklo_epi64(left, right) emulated::unpack<emulated::Pairs>(left, right, 0)
#endif
