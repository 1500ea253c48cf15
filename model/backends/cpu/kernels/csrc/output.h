// Where a layer's weighted sums go: onto the rows, those of a mixture together with its shared
// part, and repaired on the way where their rule says so. No products here.
#pragma once
#include "kernels.h"

namespace moedial {

// Which rows of a step have their result repaired, and by what.
class RepairedRows {
  public:
    RepairedRows() = default;  // no row
    RepairedRows(const LayerRows& rows, const Repair& repair) {
        if (rows.any_rule([](const RoutingRule& rule) { return rule.repair; }))
            budget = &rows, tables = &repair;
    }

    bool any() const { return budget; }

    // y = y * scale + shift in some columns of a row, if it is one of them.
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

// Where the weighted sums of a step go: y [rows, width] = or, with `add`, += scale * repaired(sums
// + rest).
struct Output {
    float* y;
    int64_t rows, width;
    bool add = true;
    float scale = 1;
    const float* rest = nullptr;  // [rows, width]: what another part of the layer has made
    RepairedRows repaired = {};

    // Some columns of a row, whose sums are overwritten.
    void take(int64_t row, int64_t first, int64_t last, float* sums) const {
        if (rest)
            for (int64_t column = first; column < last; column++)
                sums[column] += rest[row * width + column];
        repaired.apply(row, width, first, last, sums);
        float* to = y + row * width;
        for (int64_t column = first; column < last; column++) {
            const float value = scale * sums[column];
            to[column] = add ? to[column] + value : value;
        }
    }
};

}  // namespace moedial
