// Quantises weights to 4-bit codes in groups: a table of 16 integers, an 8-bit integer scale per
// group and a float factor per output. The scale of a group is searched by squared error. The
// result is the same in every library.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "vec.h"

namespace moedial {

// The codes of the table's integers that are nearest to the scaled values.
inline Ints nearest_codes(Floats scaled, const CodeTable& table) {
    Ints codes{};
    for (int code = 1; code < 16; code++)
        codes -= scaled > splat(0.5f * float(table.values[code - 1] + table.values[code]));
    return codes;
}

// The table's integers that are nearest to the scaled values.
inline Floats nearest_values(Floats scaled, const CodeTable& table) {
    Floats result = splat(float(table.values[0]));
    for (int code = 1; code < 16; code++) {
        const int low = table.values[code - 1], high = table.values[code];
        const Ints above = scaled > splat(0.5f * float(low + high));
        result += bits(above & bits(splat(float(high - low))));
    }
    return result;
}

// Sixteen running sums, however many lanes a vector has: their total has the same bits in every
// library.
struct SixteenSums {
    static constexpr int PARTS = 16 / LANES;
    Floats parts[PARTS]{};

    float total() const {
        Floats joined[PARTS];
        std::copy_n(parts, PARTS, joined);
        for (int half = PARTS / 2; half; half /= 2)
            for (int part = 0; part < half; part++) joined[part] += joined[part + half];
        return sum(joined[0]);
    }
};

// The scale with the least squared error among TRIES candidates for each end of the table: those
// that map the value of largest magnitude to this end or near it, since the ends are coarse. For
// codes c the best scale is Σxc / Σc², which lowers the squared error by (Σxc)² / Σc².
inline float search_scale(const float* x, int64_t count, const CodeTable& table) {
    const auto extreme = std::max_element(
        x, x + count, [](float one, float other) { return std::fabs(one) < std::fabs(other); });
    float best_gain = 0, best = 0;
    constexpr int TRIES = 10;  // for each end
    for (int attempt = 0; attempt < 2 * TRIES && *extreme != 0; attempt++) {
        const float end = table.values[attempt < TRIES ? 0 : 15];
        const float inverse = end * (0.8f + 0.04f * float(attempt % TRIES)) / *extreme;
        SixteenSums products, squares;
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats values = load(x + i), rounded = nearest_values(values * inverse, table);
            const int64_t part = i / LANES % SixteenSums::PARTS;
            products.parts[part] += values * rounded, squares.parts[part] += rounded * rounded;
        }
        const float product = products.total(), square = squares.total();
        if (square > 0 && product * product > best_gain * square)
            best_gain = product * product / square, best = product / square;
    }
    return best;
}

// Writes the codes at one scale; returns their squared error.
inline float codes_at(const float* x, int64_t count, float scale, const CodeTable& table,
                      uint8_t* codes) {
    const float inverse = scale == 0 ? 0.0f : 1.0f / scale;
    SixteenSums errors;
    for (int64_t i = 0; i < count; i += LANES) {
        const Floats values = load(x + i), scaled = values * inverse;
        const Floats error = values - nearest_values(scaled, table) * scale;
        errors.parts[i / LANES % SixteenSums::PARTS] += error * error;
        const Ints nearest = nearest_codes(scaled, table);
        for (int lane = 0; lane < LANES; lane++) codes[i + lane] = uint8_t(nearest[lane]);
    }
    return errors.total();
}

// Quantises one output of whole groups: codes [inputs], one in each byte, scales [groups]. Returns
// the factor, NaN if a weight is not finite.
inline float quantise_row(const float* x, int64_t inputs, int64_t group, const CodeTable& table,
                          uint8_t* codes, int8_t* scales) {
    static thread_local std::vector<float> searched;
    searched.resize(inputs / group);
    float largest = 0, wrong = 0;
    for (int64_t i = 0; i < inputs; i++) wrong += x[i] - x[i];
    std::fill_n(codes, inputs, 0), std::fill_n(scales, inputs / group, 0);
    if (wrong != 0) return NAN;
    for (int64_t first = 0; first < inputs; first += group) {
        searched[first / group] = search_scale(x + first, group, table);
        largest = std::max(largest, std::fabs(searched[first / group]));
    }
    // The inverse of smaller scales would overflow.
    const float factor = largest < 1e-30f ? 0.0f : largest / 127.0f;
    uint8_t trial[128];
    for (int64_t first = 0; first < inputs; first += group) {
        const float wanted = factor == 0 ? 0.0f : searched[first / group] / factor;
        const int middle = int(std::nearbyint(wanted));
        float least = INFINITY;
        // The nearest integer scale need not have the least error: its neighbours are tried too.
        for (int scale = std::max(middle - 1, -127); scale <= std::min(middle + 1, 127); scale++) {
            const float error = codes_at(x + first, group, factor * float(scale), table, trial);
            if (error >= least) continue;
            least = error, scales[first / group] = int8_t(scale);
            std::memcpy(codes + first, trial, group);
        }
    }
    return factor;
}

// Quantises rows of weights: codes [rows, width / 2], two neighbouring inputs in a byte, the first
// one in the low half; scales [rows, width / group]; factors [rows].
void quantise(const Table& weight, int64_t width, const CodeTable& table, int64_t group,
              uint8_t* codes, int8_t* scales, float* factors) {
    parallel(weight.count, [&](int64_t row) {
        static thread_local std::vector<float> values;
        static thread_local std::vector<uint8_t> row_codes;
        values.resize(width), row_codes.resize(width);
        // Only one of the two is read.
        const float* floats = (const float*)weight.data + row * width;
        const uint16_t* halves = (const uint16_t*)weight.data + row * width;
        for (int64_t i = 0; i < width; i++)
            values[i] = weight.kind == FLOAT ? floats[i] : from_bf16(halves[i]);
        factors[row] = quantise_row(values.data(), width, group, table, row_codes.data(),
                                    scales + row * (width / group));
        for (int64_t i = 0; i < width; i += 2)
            codes[(row * width + i) / 2] = uint8_t(row_codes[i] | row_codes[i + 1] << 4);
    });
}

}  // namespace moedial
