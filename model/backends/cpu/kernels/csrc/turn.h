// Makes tiles of values from tiles of keys, for caches whose values are a part of the keys (latent
// attention): the cache then has one copy, and transposing it costs little beside the products.
// Also reads the scales of a quantised cache.
#pragma once
#include <vector>

#include "cache.h"

namespace moedial {

constexpr int64_t KEYS = 128;  // keys of one round of attention

// Stored tiles in the order in which they are read.
using Tiles = const int32_t* const*;

// The column of element i of a value in a tile made by `value_tile_from_keys`. A word of bfloat16
// keys holds two elements: all even elements come first, then all odd ones.
inline int64_t value_column(const Cache& cache, int64_t i) {
    return cache.kind == FLOAT ? i : i / 2 + i % 2 * (cache.value_width / 2);
}

// Transposes the first value_width elements of a tile of keys into a tile of values,
// [16 / group][value_width] words.
inline void value_tile_from_keys(const Cache& cache, const int32_t* keys, int32_t* values) {
    const int64_t width = cache.value_width, words = width / cache.group();
    for (int64_t from = 0; from < TILE; from += LANES)
        for (int64_t word = 0; word < words; word += LANES) {
            Ints block[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) block[i] = load(keys + (word + i) * TILE + from);
            transpose(block);  // block[i]: LANES words of key from + i
            if (cache.kind == FLOAT) {
                for (int i = 0; i < LANES; i++) store(values + (from + i) * width + word, block[i]);
                continue;
            }
            const Ints low = splat(0xFFFF);
            for (int i = 0; i < LANES; i += 2) {
                int32_t* pair = values + (from + i) / 2 * width + word;
                store(pair, (block[i] & low) | (block[i + 1] << 16));
                store(pair + words, ((block[i] >> 16) & low) | (block[i + 1] & ~low));
            }
        }
}

// Copies the scales of a round's keys or values; 0 for keys beyond the `used` tiles.
inline void read_scales(Tiles stored, int64_t used, float* scales) {
    std::memset(scales, 0, KEYS * 4);
    for (int64_t i = 0; i < used; i++) std::memcpy(scales + i * TILE, stored[i], TILE * 4);
}

// Makes the `used` tiles of values of a round, in memory of this thread.
inline void values_from_keys(const Cache& cache, Tiles keys, int64_t used, const int32_t** values) {
    static thread_local std::vector<int32_t> room;
    const int64_t words = cache.value_tile_words();
    room.resize(KEYS / TILE * words);
    for (int64_t i = 0; i < used; i++) {
        value_tile_from_keys(cache, keys[i], room.data() + i * words);
        values[i] = room.data() + i * words;
    }
}

}  // namespace moedial
