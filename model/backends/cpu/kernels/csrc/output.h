// Adds a layer's weighted sums to the rows of the residual: adds a mixture's shared part first, and
// repairs the sums of rows whose rule asks for it. No products here.
#pragma once
#include "kernels.h"

namespace moedial {

// The rows of a step whose result is repaired, and the tables for it.
class RepairedRows {
  public:
    RepairedRows() = default;  // no row
    RepairedRows(const LayerRows& rows, const Repair& repair) {
        if (rows.any_rule([](const RoutingRule& rule) { return rule.repair; }))
            budget = &rows, tables = &repair;
    }

    bool any() const { return budget; }

    // y = y * scale + shift in columns [first, last) of a row, if its rule has `repair`.
    void apply(int64_t row, int64_t width, int64_t first, int64_t last, float* y) const {
        if (!budget || !budget->rule(row).repair) return;
        const float* scale = tables->scale + budget->counts[row] * width;
        const float* shift = tables->shift + budget->counts[row] * width;
        for (int64_t column = first; column < last; column++)
            y[column] = y[column] * scale[column] + shift[column];
    }

  private:
    const LayerRows* budget = nullptr;
    const Repair* tables = nullptr;
};

// The result of a step: y [rows, width] = (with `add`, +=) scale * repaired(sums + shared).
struct Output {
    float* y;
    int64_t rows, width;
    bool add = true;
    float scale = 1;
    const float* shared = nullptr;  // [rows, width]: the result of a shared part, or null
    RepairedRows repaired = {};

    // Stores columns [first, last) of a row; overwrites `sums`.
    void store(int64_t row, int64_t first, int64_t last, float* sums) const {
        if (shared)
            for (int64_t column = first; column < last; column++)
                sums[column] += shared[row * width + column];
        repaired.apply(row, width, first, last, sums);
        float* to = y + row * width;
        for (int64_t column = first; column < last; column++) {
            const float value = scale * sums[column];
            to[column] = add ? to[column] + value : value;
        }
    }
};

}  // namespace moedial
