// Encodes input rows for products with packed matrices: as float32, bfloat16 pairs, bytes with one
// scale per row, or for grouped matrices signed bytes with one scale per 256 inputs.
#pragma once
#include "gemm.h"
#include "scratch.h"

namespace moedial {

// Encoded rows. `words` are 32 bits each and hold one group of inputs (`Matrix::group_inputs`);
// rows for GROUPED matrices are laid out by `RowLayout`.
struct Inputs {
    Kind kind;
    int64_t inputs = 0;       // as stored, with their padding
    int64_t words = 0;        // per row
    GroupCodes codes;         // of the matrix, GROUPED only
    int32_t* data = nullptr;  // [rows, words]
    float* scales = nullptr;  // [rows], INT8 only

    const int32_t* row(int64_t index) const { return data + index * words; }
};

// INT8_WEIGHTS are multiplied by bfloat16 inputs.
inline Kind input_kind(Kind kind) { return kind == INT8_WEIGHTS ? BFLOAT16 : kind; }

// Whether rows encoded for one matrix can be multiplied by another.
inline bool inputs_match(const Matrix& one, const Matrix& other) {
    return input_kind(one.kind) == input_kind(other.kind) && one.inputs == other.inputs &&
           one.codes.inputs == other.codes.inputs &&
           (one.kind != GROUPED || (run_inputs(one.codes) == run_inputs(other.codes) &&
                                    entry_shift(one.codes) == entry_shift(other.codes)));
}

// Allocates encoded rows. `stored`: inputs with their padding; `codes`: of GROUPED matrices.
inline Inputs inputs(Kind kind, int64_t rows, int64_t stored, const GroupCodes& codes = {}) {
    Inputs encoded{input_kind(kind), stored};
    encoded.words = kind == GROUPED ? RowLayout(stored, codes).words
                                    : stored / (kind == FLOAT  ? 1
                                                : kind == INT8 ? 4
                                                               : 2);
    encoded.codes = codes;
    encoded.data = scratch().take<int32_t>(rows * encoded.words);
    if (kind == INT8) encoded.scales = scratch().take<float>(rows);
    return encoded;
}

// Allocates encoded rows for products with `matrix`.
inline Inputs inputs(const Matrix& matrix, int64_t rows) {
    return inputs(matrix.kind, rows, matrix.inputs, matrix.codes);
}

// Writes bytes zero + round(127 x / max |x|). Returns the scale, by which (byte - zero) is
// multiplied to get x back; NaN if a value is not finite. The bytes are the same in every library.
inline float quantise(const float* x, int64_t width, uint8_t* bytes, int32_t zero) {
    Floats highest{}, bad{};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
        const Floats values = load(x + i);
        highest = max(highest, max(values, -values)), bad += values - values;
    }
    float largest_value = largest(highest), wrong = sum(bad);
    for (; i < width; i++)
        largest_value = std::fmax(largest_value, std::fabs(x[i])), wrong += x[i] - x[i];
    if (wrong != 0 || largest_value == 0) {
        std::memset(bytes, zero, width);
        return wrong != 0 ? NAN : 0;
    }
    const Floats inverse = splat(127.0f / largest_value), shift = splat(ROUNDING);
    for (i = 0; i + LANES <= width; i += LANES) {
        const Ints steps = bits(load(x + i) * inverse + shift) - bits(shift) + zero;
        for (int lane = 0; lane < LANES; lane++) bytes[i + lane] = uint8_t(steps[lane]);
    }
    for (; i < width; i++) bytes[i] = uint8_t(int32_t(std::nearbyint(x[i] * inverse[0])) + zero);
    return largest_value / 127.0f;
}

// Encodes one row for grouped matrices: blocks of signed bytes, the blocks' scales, each group's
// sum of bytes, and the value at which each run's sum starts (the sum of its bytes times what was
// added to the codes).
inline void encode_grouped(const float* x, int64_t width, int64_t stored, const GroupCodes& codes,
                           int32_t* out) {
    const RowLayout layout(stored, codes);
    int8_t* bytes = (int8_t*)out;
    float* scales = (float*)out + layout.scales;
    for (int64_t first = 0; first < stored; first += BLOCK_INPUTS) {
        const int64_t count = std::clamp<int64_t>(width - first, 0, BLOCK_INPUTS);
        scales[first / BLOCK_INPUTS] = quantise(x + first, count, (uint8_t*)bytes + first, 0);
    }
    std::memset(bytes + width, 0, stored - width);
    int32_t* start = out + layout.starts;
    const int64_t run = run_inputs(codes);
    for (int64_t first = 0; first < stored; first += run)
        *start++ = start_of(bytes + first, run, -entry_shift(codes));
    float* sum = (float*)out + layout.sums;
    for (int64_t first = 0; first < stored; first += codes.inputs) {
        int32_t total = 0;
        for (int64_t i = first; i < first + codes.inputs; i++) total += bytes[i];
        *sum++ = float(total);
    }
}

// Encodes one row of `width` values, padded with zeros to `stored`.
inline void encode(const float* x, int64_t width, const Inputs& to, int64_t row, int64_t stored) {
    int32_t* out = to.data + row * to.words;
    if (to.kind == FLOAT) {
        std::memcpy(out, x, width * 4);
        std::memset(out + width, 0, (stored - width) * 4);
    } else if (to.kind == INT8) {
        // Unsigned: the dot product of bytes needs unsigned inputs.
        to.scales[row] = quantise(x, width, (uint8_t*)out, 128);
        std::memset((uint8_t*)out + width, 128, stored - width);
    } else if (to.kind == GROUPED) {
        encode_grouped(x, width, stored, to.codes, out);
    } else {
        uint16_t* halves = (uint16_t*)out;
        int64_t i = 0;
        for (; i + 2 * LANES <= width; i += 2 * LANES)
            store_bf16(halves + i, load(x + i), load(x + i + LANES));
        for (; i < width; i++) halves[i] = to_bf16(x[i]);
        std::memset(halves + width, 0, (stored - width) * 2);
    }
}

}  // namespace moedial
