// Ragged experts: exactly the routed pairs, gate, up and activation in one pass, down and the
// weighted sum in another. The second pass hands out columns of the output: no two threads write
// one element, and a token's partial results are summed by rising expert, whoever shares the batch.
#pragma once
#include "linear.h"

namespace moedial {

struct Hidden {
    Inputs in;                // [R, units], activated and weighted, as `down` multiplies them
    float* floats = nullptr;  // the same before quantisation
};

// h = activation of one slice of an expert's first product.
inline void gated(const Experts& e, const Matrix& m, const int32_t* words, int64_t first,
                  int64_t outputs, float row_scale, const float* bias, float* h) {
    const int64_t half = e.gated ? outputs / 2 : outputs;
    for (int64_t i = 0; i < half; i += LANES) {
        vf v = finish(m, words + i, first + i, row_scale);
        if (bias) v += load(bias + first + i);
        v = activate(v, e.activation);
        if (e.gated) {
            vf up = finish(m, words + half + i, first + half + i, row_scale);
            if (bias) up += load(bias + first + half + i);
            v *= up;
        }
        store(h + i, v);
    }
}

// h times the pair's weight, or unit by unit times the token's mask.
inline void weigh(const Calls& calls, int64_t pair, int64_t token, int64_t unit, int64_t count,
                  float* h) {
    if (calls.mask) {
        const float* mask = calls.mask + token * calls.stride;
        int64_t i = 0;
        if (calls.share == 1)
            for (; i + LANES <= count && unit + i + LANES <= calls.stride; i += LANES)
                store(h + i, load(h + i) * load(mask + unit + i));
        for (; i < count; i++) h[i] *= mask[std::min((unit + i) / calls.share, calls.stride - 1)];
    } else if (calls.weight) {
        for (int64_t i = 0; i < count; i += LANES) store(h + i, load(h + i) * calls.weight[pair]);
    }
}

inline void encode_part(const Hidden& to, int64_t row, int64_t first, const float* h,
                        int64_t count) {
    if (to.floats) {
        std::memcpy(to.floats + row * to.in.words * 4 + first, h, count * 4);
    } else if (to.in.kind == FLOAT) {
        std::memcpy(to.in.data + row * to.in.words + first, h, count * 4);
    } else {
        uint16_t* out = (uint16_t*)(to.in.data + row * to.in.words) + first;
        int64_t i = 0;
        for (; i + 2 * LANES <= count; i += 2 * LANES)
            store_bf16(out + i, load(h + i), load(h + i + LANES));
        for (; i < count; i++) out[i] = to_bf16(h[i]);
    }
}

struct Work {  // one expert with rows
    int64_t expert, first, rows;
};

// Experts that have rows; a large one is cut, so that no thread waits long for another.
inline int64_t list_work(const Calls& calls, int64_t most, Work* work) {
    int64_t count = 0, start = 0;
    for (int64_t e = 0; e < calls.experts; e++) {
        for (; start < calls.ends[e]; start = work[count - 1].first + work[count - 1].rows)
            work[count++] = {e, start, std::min(most, calls.ends[e] - start)};
    }
    return count;
}

inline void up_tile(const Inputs& x, const Calls& calls, const Experts& e, const Work& w,
                    int64_t panel, const float* bias, const Hidden& hidden) {
    Block& b = block();
    const Matrix m = e.up.at(w.expert);
    const Slice slice{&m, panel * PANEL, m.outputs(panel)};
    const int64_t first = e.gated ? slice.first / 2 : slice.first,
                  count = e.gated ? slice.outputs / 2 : slice.outputs;
    alignas(64) float h[PANEL];
    for (int64_t r = 0; r < w.rows; r += BLOCK) {
        const int64_t now = std::min(BLOCK, w.rows - r), pair = w.first + r;
        const auto token = [&](int64_t j) {
            return calls.token ? calls.token[pair + j] : pair + j;
        };
        for (int64_t j = 0; j < now; j++) b.rows[j] = x.row(token(j));
        product(b.rows, now, slice, b.own, 0, false);
        for (int64_t j = 0; j < now; j++) {
            const float scale = x.scale ? x.scale[token(j)] : 1.0f;
            gated(e, m, b.words + j * PANEL, slice.first, slice.outputs, scale, bias, h);
            weigh(calls, pair + j, token(j), w.expert * e.units + first, count, h);
            encode_part(hidden, pair + j, first, h, count);
        }
    }
}

// y[:, slice] += Σ over this expert's rows of down · h. Unscaled sums go straight onto y.
inline void down_tile(const Hidden& hidden, const Calls& calls, const Matrix& m, const Work& w,
                      const Slice& slice, float* y, int64_t width) {
    Block& b = block();
    const bool straight = m.kind == FLOAT || m.kind == BFLOAT;
    for (int64_t r = 0; r < w.rows; r += BLOCK) {
        const int64_t now = std::min(BLOCK, w.rows - r), pair = w.first + r;
        for (int64_t j = 0; j < now; j++) {
            b.rows[j] = hidden.in.row(pair + j);
            b.sums[j] = (int32_t*)(y + (calls.token ? calls.token[pair + j] : pair + j) * width +
                                   slice.first);
        }
        product(b.rows, now, {&m, slice.first, slice.outputs}, straight ? b.sums : b.own, 0,
                straight);
        if (straight) continue;
        for (int64_t j = 0; j < now; j++) {
            const float scale = hidden.in.scale ? hidden.in.scale[pair + j] : 1.0f;
            float* out = (float*)b.sums[j];
            for (int64_t i = 0; i < slice.outputs; i += LANES)
                store(out + i, load(out + i) + finish(m, b.own[j] + i, slice.first + i, scale));
        }
    }
}

// Ask for the next expert's part of a column early: it is short, and the processor would not see it
// coming.
inline void fetch(const Matrix& m, const Slice& s) {
    const int64_t p = s.first / PANEL,
                  bytes = std::min<int64_t>(m.outputs(p) * m.groups() * m.word_bytes(), 8192);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(m.panel(p) + i);
}

inline Hidden hidden_rows(const Experts& e, int64_t pairs) {
    Hidden h{inputs(e.down.kind, pairs, e.down.k)};
    if (e.down.kind == QUANTUM) h.floats = scratch().take<float>(pairs * e.down.k);
    return h;
}

// y [rows, width] (+)= Σ over a token's pairs of weight · expert(x). `bias`: of a single dense
// "expert".
inline void run_experts(const Inputs& x, int64_t rows, int64_t width, const Calls& calls,
                        const Experts& e, bool add, float* y, const float* up_bias = nullptr,
                        const float* down_bias = nullptr) {
    const int64_t pairs = calls.ends[calls.experts - 1], padded = e.down.n;
    const Hidden hidden = hidden_rows(e, pairs);
    Work* work = scratch().take<Work>(calls.experts + ceil_div(pairs, BLOCK));
    const int64_t pieces = list_work(calls, 8 * BLOCK, work), panels = e.up.panels(),
                  mean = ceil_div(pairs, pieces);
    const int64_t run = std::min(run_length(pieces * panels, mean), panels),
                  runs = ceil_div(panels, run);
    parallel(
        pieces * runs,
        [&](int64_t i) {
            const int64_t end = std::min(panels, (i % runs + 1) * run);
            for (int64_t p = i % runs * run; p < end; p++)
                up_tile(x, calls, e, work[i / runs], p, up_bias, hidden);
        },
        pairs * e.up.n * e.up.k);
    if (hidden.floats)
        parallel_rows(
            pairs, 32,
            [&](int64_t first, int64_t last) {
                for (int64_t r = first; r < last; r++)
                    encode(hidden.floats + r * e.down.k, e.down.k, hidden.in, r, e.down.k);
            },
            4 * pairs * e.down.k);
    float* sums = scratch().take<float>(rows * padded);
    const Slices slices(e.down, 1);  // a column is summed by one thread
    const int64_t together = run_length(slices.count(), mean);
    parallel(
        ceil_div(slices.count(), together),
        [&](int64_t i) {
            const int64_t from = i * together, end = std::min(slices.count(), from + together),
                          first = slices.at(from).first;
            const int64_t last = std::min(end * slices.width, padded);
            for (int64_t r = 0; r < rows; r++)
                std::memset(sums + r * padded + first, 0, (last - first) * 4);
            for (int64_t p = 0; p < pieces; p++) {
                if (p + 1 < pieces) fetch(e.down.at(work[p + 1].expert), slices.at(from));
                for (int64_t s = from; s < end; s++)
                    down_tile(hidden, calls, e.down.at(work[p].expert), work[p], slices.at(s), sums,
                              padded);
            }
            for (int64_t r = 0; r < rows; r++)
                for (int64_t c = first; c < std::min(last, width); c++) {
                    const float value = sums[r * padded + c] + (down_bias ? down_bias[c] : 0.0f);
                    y[r * width + c] = add ? y[r * width + c] + value : value;
                }
        },
        pairs * e.down.n * e.down.k);
}

}  // namespace moedial
