// Products of many rows where the processor has no instruction for what is stored, bfloat16 or
// bytes: a chunk of the rows' inputs is widened once, the weights in registers as they are
// multiplied, as floats or 16-bit integers; float32 takes the same way as it is. The first tile of
// rows copies the weights that it reads, so that the others read them from the first-level cache.
// The sums are those of the products in `gemm.h`, in the same order: a row's bits do not depend on
// which of the two it takes.
#pragma once
#include "grouped.h"

namespace moedial {

constexpr int64_t WIDE_WORDS = 256;  // of a chunk: widened words of one output, or of one row
// From one row to the next: a tile reads the same word of several rows at once, which must not lie
// in the same bank of the first-level cache.
constexpr int64_t WIDE_STRIDE = WIDE_WORDS + 8;

// How a stored word of SIZE bytes becomes COUNT wide words, in the order in which a sum takes them.
// A row's wide inputs lie STEP words from one stored word to the next, part `part` of a word at
// `at(part)`.
struct WideFloats {
    static constexpr int COUNT = 1, STEP = 1, SIZE = 4;
    static constexpr int64_t at(int) { return 0; }
    // LANES words of one row, from number `word` of the chunk on.
    static void inputs(const int32_t* from, int64_t word, int32_t* to) {
        store(to + word, load(from + word));
    }
    static void weights(const char* from, Ints (&wide)[COUNT]) {
        wide[0] = load((const int32_t*)from);
    }
    static void add(Ints& sums, Ints input, Ints weights) {
        sums = bits(add_product(bits(input), bits(weights), bits(sums)));
    }
};

// Pairs of bfloat16, the odd one first (`dot_pairs`). Inputs are floats in a row.
struct WidePairs {
    static constexpr int COUNT = 2, STEP = 2, SIZE = 4;
    static constexpr int64_t at(int part) { return 1 - part; }
    static void inputs(const int32_t* from, int64_t word, int32_t* to) {
        const uint16_t* halves = (const uint16_t*)(from + word);
        store(to + 2 * word, high_half(halves));
        store(to + 2 * word + LANES, high_half(halves + LANES));
    }
    static void weights(const char* from, Ints (&wide)[COUNT]) {
        const Ints words = load((const int32_t*)from);
        wide[0] = words & splat(int32_t(0xFFFF0000)), wide[1] = words << 16;
    }
    static void add(Ints& sums, Ints input, Ints weights) { WideFloats::add(sums, input, weights); }
};

// The same where the weights are pairs of int8, of 16 bits.
struct WideBytePairs : WidePairs {
    static constexpr int SIZE = 2;
    static void weights(const char* from, Ints (&wide)[COUNT]) {
        const Ints pairs = low_half((const uint16_t*)from);
        wide[0] = bits(to_float((pairs << 16) >> 24)),
        wide[1] = bits(to_float((pairs << 24) >> 24));
    }
};

// Four bytes, unsigned inputs and signed weights: even and odd ones as pairs of 16 bits.
struct WideBytes {
    static constexpr int COUNT = 2, STEP = 1, SIZE = 4;
    static constexpr int64_t at(int part) { return part * (WIDE_WORDS / COUNT); }
    static void inputs(const int32_t* from, int64_t word, int32_t* to) {
        const Ints words = load(from + word);
        store(to + word, words & 0x00FF00FF);
        store(to + at(1) + word, (words >> 8) & 0x00FF00FF);
    }
    static void weights(const char* from, Ints (&wide)[COUNT]) {
        widen_bytes(load((const int32_t*)from), wide[0], wide[1]);
    }
    static void add(Ints& sums, Ints input, Ints weights) {
        sums = pinned(dot_shorts(sums, input, weights));
    }
};

// A tile's sums as they are before it, row r's at sums[r] + column, or 0.
template <int R, int V>
[[gnu::always_inline]] inline void begin_sums(Ints (&acc)[R][V], int32_t* const* sums,
                                              int64_t column, bool add) {
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            acc[row][vector] = add ? load(sums[row] + column + vector * LANES) : splat(0);
}

template <int R, int V>
[[gnu::always_inline]] inline void end_sums(const Ints (&acc)[R][V], int32_t* const* sums,
                                            int64_t column) {
#pragma GCC unroll 8
    for (int row = 0; row < R; row++)
#pragma GCC unroll 8
        for (int vector = 0; vector < V; vector++)
            store(sums[row] + column + vector * LANES, acc[row][vector]);
}

constexpr int64_t WIDE_OUTPUTS = VECTORS * LANES;  // that are multiplied at a time

// So many neighbouring outputs of one panel: the first one's first word, and how many bytes further
// is the next word.
struct WideSlice {
    const char* data;
    int64_t step;
};

// The weights of a slice, widened as they are read. What is prefetched is for the first-level cache
// (LEVEL 3) or the second (2).
template <class Wide, int LEVEL>
struct StoredWords {
    static constexpr int LOCALITY = LEVEL;
    WideSlice slice;

    template <int V>
    Ints factor(int part, int vector) const {
        Ints wide[Wide::COUNT];  // the compiler drops the other part
        Wide::weights(slice.data + vector * LANES * Wide::SIZE, wide);
        return wide[part];
    }
    template <int V>
    void next() {
        slice.data += slice.step;
    }
};

// The same, copied word after word, and prefetched: a slice is a column of its panel.
template <class Wide, int LEVEL>
struct CopiedWords : StoredWords<Wide, LEVEL> {
    static constexpr int64_t AHEAD_WORDS = 16;
    char* copy;

    template <int V>
    Ints factor(int part, int vector) const {
        constexpr int BYTES = LANES * Wide::SIZE;
        if (part == 0) std::memcpy(copy + vector * BYTES, this->slice.data + vector * BYTES, BYTES);
        return StoredWords<Wide, LEVEL>::template factor<V>(part, vector);
    }
    template <int V>
    void next() {
        __builtin_prefetch(this->slice.data + AHEAD_WORDS * this->slice.step);
        StoredWords<Wide, LEVEL>::template next<V>();
        copy += V * LANES * Wide::SIZE;
    }
};

// Weights of one word after the other, widened before: [words][COUNT][V].
template <class Wide>
struct WidenedWords {
    static constexpr int LOCALITY = 2;
    const int32_t* at;

    template <int V>
    Ints factor(int part, int vector) const {
        return load(at + (part * V + vector) * LANES);
    }
    template <int V>
    void next() {
        at += Wide::COUNT * V * LANES;
    }
};

// The memory that is read later, `step` bytes for each word.
struct Ahead {
    const char* from;
    int64_t step;
};

// sums[row][vector] (+)= the inputs of R rows times the weights of V vectors of outputs, of `words`
// stored words. Inputs are [R] rows of WIDE_STRIDE words. Meanwhile `ahead` is prefetched.
template <class Wide, int R, int V, class Words>
[[gnu::noinline]] void wide_tile(const int32_t* inputs, int64_t words, Words weights,
                                 int32_t* const* sums, int64_t column, bool add, Ahead ahead) {
    Ints acc[R][V];
    begin_sums(acc, sums, column, add);
    for (int64_t word = 0; word < words; word++, inputs += Wide::STEP, ahead.from += ahead.step) {
        __builtin_prefetch(ahead.from, 0, Words::LOCALITY);
#pragma GCC unroll 2
        for (int part = 0; part < Wide::COUNT; part++) {
            Ints factors[V];
#pragma GCC unroll 8
            for (int vector = 0; vector < V; vector++)
                factors[vector] = pinned(weights.template factor<V>(part, vector));
#pragma GCC unroll 8
            for (int row = 0; row < R; row++) {
                const Ints input = splat(inputs[row * WIDE_STRIDE + Wide::at(part)]);
#pragma GCC unroll 8
                for (int vector = 0; vector < V; vector++)
                    Wide::add(acc[row][vector], input, factors[vector]);
            }
        }
        weights.template next<V>();
    }
    end_sums(acc, sums, column);
}

// A chunk of the rows' inputs. Whole vectors are read: what lies behind a row's last word is not
// multiplied.
template <class Wide>
inline void widen_rows(const int32_t* const* rows, int64_t count, int64_t from, int64_t words,
                       int32_t* to) {
    for (int64_t row = 0; row < count; row++, to += WIDE_STRIDE)
        for (int64_t word = 0; word < words; word += LANES)
            Wide::inputs(rows[row] + from, word, to);
}

// A chunk of a slice as [words][COUNT][WIDE_OUTPUTS].
template <class Wide>
inline void widen_weights(const WideSlice& slice, int64_t words, int32_t* to) {
    const char* from = slice.data;
    Ints wide[Wide::COUNT];
    for (int64_t word = 0; word < words;
         word++, from += slice.step, to += Wide::COUNT * WIDE_OUTPUTS)
#pragma GCC unroll 8
        for (int vector = 0; vector < VECTORS; vector++) {
            Wide::weights(from + vector * LANES * Wide::SIZE, wide);
#pragma GCC unroll 2
            for (int part = 0; part < Wide::COUNT; part++)
                store(to + (part * VECTORS + vector) * LANES, wide[part]);
        }
}

// Room of one thread: inputs and weights of a chunk, the weights widened or as they are stored.
// They stay in the first-level cache.
struct WideRoom {
    alignas(64) int32_t inputs[ROW_BLOCK * WIDE_STRIDE], weights[WIDE_OUTPUTS * WIDE_WORDS];
};

inline WideRoom& wide_room() {
    static thread_local WideRoom mine;
    return mine;
}

// Unfinished sums of `count` rows of wide inputs and the weights of `words` words, as the first
// tile of rows reads them and as the others do. Meanwhile `bytes` of memory are prefetched from
// `ahead` on.
template <class Wide, class First, class Others>
inline void wide_tiles(const int32_t* inputs, int64_t count, int64_t words, const First& read_first,
                       const Others& others, int32_t* const* sums, int64_t column, bool add,
                       const char* ahead, int64_t bytes) {
    // Tiles of nearly equal heights: one row alone would take as long as three.
    const int64_t tiles = (count + ROWS - 1) / ROWS, steps = tiles * words;
    const int64_t ahead_step = (bytes + steps - 1) / steps;
    for (int64_t tile = 0, first = 0; tile < tiles; tile++, ahead += ahead_step * words) {
        const int64_t end = (tile + 1) * count / tiles;
        for (int64_t row = end; row < std::min(end + ROWS, count); row++)
            __builtin_prefetch(sums[row] + column);
        const auto run = [&](const auto& weights) {
            with_constant<ROWS>(end - first, [&]<int height>() {
                wide_tile<Wide, height, VECTORS>(inputs + first * WIDE_STRIDE, words, weights,
                                                 sums + first, column, add,
                                                 Ahead{ahead, ahead_step});
            });
        };
        if (tile == 0)
            run(read_first);
        else
            run(others);
        first = end;
    }
}

// Unfinished sums of `outputs` outputs from `first` on, as `product` of gemm.h makes them: the
// rows' inputs are widened once for all panels.
template <class Wide>
inline void wide_product(const int32_t* const* rows, int64_t count, const Matrix& matrix,
                         int64_t first, int64_t outputs, int32_t* const* sums, int64_t column,
                         bool add) {
    constexpr int64_t CHUNK_WORDS = WIDE_WORDS / Wide::COUNT, STEP = WIDE_OUTPUTS * Wide::SIZE;
    WideRoom& room = wide_room();
    char* copy = (char*)room.weights;
    const StoredWords<Wide, 2> copied{{copy, STEP}};
    const int64_t last = first + outputs;
    for (int64_t from = 0; from < matrix.groups(); from += CHUNK_WORDS, add = true) {
        const int64_t now = std::min(matrix.groups() - from, CHUNK_WORDS);
        widen_rows<Wide>(rows, count, from, now, room.inputs);
        for (int64_t at = first; at < last; at += WIDE_OUTPUTS) {
            const int64_t panel = at / PANEL, step = matrix.panel_outputs(panel) * Wide::SIZE;
            const int64_t end = std::min(last, (panel + 1) * PANEL);
            const char* data = matrix.panel(panel) + from * step;
            // What is next: the same chunk of the next panel, or the next chunk of the first one.
            const char* ahead = end < last ? matrix.panel(panel + 1) + from * step
                                           : matrix.panel(first / PANEL) + (from + now) * step;
            const int64_t inside = (at - panel * PANEL) * Wide::SIZE;
            const CopiedWords<Wide, 2> stored{{{data + inside, step}}, copy};
            wide_tiles<Wide>(room.inputs, count, now, stored, copied, sums, column + at - first,
                             add, ahead + now * inside, now * STEP);
        }
    }
}

}  // namespace moedial
