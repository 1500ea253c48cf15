// The two products of a round of attention with the tiles that the cache keeps: scores of keys, and
// weighted values. Each prefetches the tiles that are read next: tiles are short and far apart, so
// the hardware prefetcher misses them.
#pragma once
#include "turn.h"

namespace moedial {

// While a tile is read, the one so many tiles further is prefetched.
constexpr int64_t AHEAD_TILES = 8;

// LANES bytes among those of a tile, as floats.
struct Bytes {
    const int8_t* from;
};
inline Ints load(Bytes bytes) { return bits(load_int8(bytes.from)); }

// Signed bytes as floats.
struct WideSigned : WideFloats {
    static constexpr int SIZE = 1;
    static void weights(const char* from, Ints (&wide)[COUNT]) {
        wide[0] = load(Bytes{(const int8_t*)from});
    }
};

// How tiles are stored and multiplied: SIZE bytes of a word, the first word of a tile.
struct FloatTiles {
    using Dot = FloatDot;
    using Wide = WideFloats;
    static constexpr int64_t SIZE = 4;
    static const int32_t* word(const int32_t* tile, int64_t index) { return tile + index; }
    static const char* address(const int32_t* tile, int64_t index) {
        return (const char*)(tile + index);
    }
};
struct PairTiles : FloatTiles {
    using Dot = Bfloat16Dot;
    using Wide = WidePairs;
};
struct ByteTiles : FloatTiles {  // behind the scales of the tile's slots
    using Wide = WideSigned;
    static constexpr int64_t SIZE = 1;
    static Bytes word(const int32_t* tile, int64_t index) {
        return {(const int8_t*)(tile + TILE) + index};
    }
    static const char* address(const int32_t* tile, int64_t index) {
        return (const char*)word(tile, index).from;
    }
};

// Prefetches the line of the cache in which a word of a tile lies.
template <class Stored>
inline void prefetch_word(const int32_t* tile, int64_t index) {
    __builtin_prefetch(Stored::address(tile, index));
}

// Keys as the weights of a product (`PanelWords` of gemm.h): its outputs are keys from `first` on.
template <class Stored>
struct KeyWords {
    Tiles tiles;
    int64_t first;
    auto at(int64_t group, int vector) const {
        const int64_t key = first + vector * LANES;
        return Stored::word(tiles[key / TILE], group * TILE + key % TILE);
    }
    void prefetch(int64_t group, int vector) const {
        if (vector * LANES % TILE || group * TILE * Stored::SIZE % 64) return;
        prefetch_word<Stored>(tiles[(first + vector * LANES) / TILE + AHEAD_TILES], group * TILE);
    }
};

// Values as the weights of a product: its inputs are keys, 1 << shift groups of them to a tile.
template <class Stored>
struct ValueWords {
    Tiles tiles;
    int64_t column, step;
    int shift;
    int64_t index(int64_t group, int vector) const {
        return (group & ((1 << shift) - 1)) * step + column + vector * LANES;
    }
    auto at(int64_t group, int vector) const {
        return Stored::word(tiles[group >> shift], index(group, vector));
    }
    void prefetch(int64_t group, int vector) const {
        if (vector * LANES * Stored::SIZE % 64) return;
        prefetch_word<Stored>(tiles[(group >> shift) + AHEAD_TILES], index(group, vector));
    }
};

// The outputs [first, last) of a product of R rows: sums[row] (+)= Σ over the groups of
// rows[row][group] · words, where `words(first)` are those of the outputs from `first` on. A
// vector's sums are a chain of additions: tiles of few rows are wide, so that other chains hide how
// long each addition takes.
template <class Dot, int R, class Words>
inline void multiply_tiles(const int32_t* const* rows, int64_t groups, int64_t first, int64_t last,
                           const Words& words, int32_t* const* sums, bool add) {
    const auto by = [&]<int V>(std::integral_constant<int, V>) {
        for (; first + V * LANES <= last; first += V * LANES)
            tile<Dot, R, V>(rows, 0, groups, words(first), sums, first, add);
    };
    if constexpr (R == 1) by(std::integral_constant<int, 8>{});
    if constexpr (R == 2 || R == 3) by(std::integral_constant<int, 4>{});
    by(std::integral_constant<int, VECTORS>{});
    if constexpr (VECTORS > 2) by(std::integral_constant<int, 2>{});
    by(std::integral_constant<int, 1>{});
}

// All outputs of a product of any number of rows: more than ROWS pass over some outputs before the
// next, whose words stay in the first-level cache.
template <class Dot, class Words>
inline void multiply_rows(int64_t count, const int32_t* const* rows, int64_t groups,
                          int64_t outputs, const Words& words, int32_t* const* sums, bool add) {
    const int64_t step = count > ROWS ? VECTORS * LANES : outputs;
    for (int64_t first = 0; first < outputs; first += step)
        for (int64_t row = 0; row < count; row += ROWS)
            with_constant<ROWS>(std::min<int64_t>(count - row, ROWS), [&]<int height>() {
                multiply_tiles<Dot, height>(rows + row, groups, first,
                                            std::min(first + step, outputs), words, sums + row,
                                            add);
            });
}

// Scores: keys side by side as the outputs of one product.
template <class Stored>
inline void score(const Cache& cache, Tiles keys, int64_t used, int64_t queries,
                  const int32_t* const* rows, int32_t* const* scores) {
    const auto words = [&](int64_t first) { return KeyWords<Stored>{keys, first}; };
    multiply_rows<typename Stored::Dot>(queries, rows, cache.head_width / cache.group(),
                                        used * TILE, words, scores, false);
}

// Weighted values: keys one after the other as the inputs of one product.
template <class Stored>
inline void add_values(const Cache& cache, Tiles values, int64_t used, int64_t queries,
                       const int32_t* const* weights, int32_t* const* outs) {
    const int64_t width = cache.value_width, group = cache.group();
    const auto words = [&](int64_t first) {
        return ValueWords<Stored>{values, first, width, group == 1 ? 4 : 3};
    };
    multiply_rows<typename Stored::Dot>(queries, weights, used * TILE / group, width, words, outs,
                                        true);
}

// Prefetches a share of a tile's lines: part `index` of `count`.
template <class Stored>
inline void prefetch_part(const int32_t* tile, int64_t words, int64_t index, int64_t count) {
    const int64_t line = 64 / Stored::SIZE;
    for (int64_t word = words * index / count / line * line; word < words * (index + 1) / count;
         word += line)
        prefetch_word<Stored>(tile, word);
}

// Both products where queries are many: what is stored is widened once for all of them.
template <class Stored>
inline void score_wide(const Cache& cache, Tiles keys, int64_t used, int64_t queries,
                       const int32_t* const* rows, int32_t* const* scores) {
    using Wide = typename Stored::Wide;
    constexpr int64_t CHUNK_WORDS = WIDE_WORDS / Wide::COUNT, SIZE = Stored::SIZE;
    const int64_t groups = cache.head_width / cache.group();
    int32_t* wide = wide_room().weights;
    const WidenedWords<Wide> widened{wide};
    for (int64_t from = 0; from < groups; from += CHUNK_WORDS) {
        const int64_t now = std::min(groups - from, CHUNK_WORDS);
        widen_rows<Wide>(rows, queries, from, now, wide_room().inputs);
        for (int64_t key = 0; key < used * TILE; key += WIDE_OUTPUTS) {
            const int64_t word = from * TILE + key % TILE;
            const char* ahead = Stored::address(keys[key / TILE + AHEAD_TILES], word);
            widen_weights<Wide>({Stored::address(keys[key / TILE], word), TILE * SIZE}, now, wide);
            wide_tiles<Wide>(wide_room().inputs, queries, now, widened, widened, scores, key,
                             from > 0, ahead, now * TILE * SIZE);
        }
    }
}

// `weights`: [queries, WIDE_STRIDE], as wide inputs.
template <class Stored>
inline void add_values_wide(const Cache& cache, Tiles values, int64_t used, int64_t queries,
                            const int32_t* weights, int32_t* const* outs) {
    using Wide = typename Stored::Wide;
    constexpr int64_t SIZE = Stored::SIZE;
    const int64_t words = TILE / cache.group(), width = cache.value_width;
    for (int64_t column = 0; column < width; column += WIDE_OUTPUTS) {
        int32_t* wide = wide_room().weights;
        for (int64_t i = 0; i < used; i++) {
            prefetch_part<Stored>(values[i + AHEAD_TILES], words * width, column / WIDE_OUTPUTS,
                                  width / WIDE_OUTPUTS);
            widen_weights<Wide>({Stored::address(values[i], column), width * SIZE}, words,
                                wide + i * TILE * WIDE_OUTPUTS);
        }
        const WidenedWords<Wide> widened{wide};
        wide_tiles<Wide>(weights, queries, used * words, widened, widened, outs, column, true,
                         (const char*)wide, 0);
    }
}

}  // namespace moedial
