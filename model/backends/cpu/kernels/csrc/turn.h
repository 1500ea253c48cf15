// Tiles of the cache made ready for a product where they are not kept so. Where values are a part
// of the keys, tiles of keys are turned into tiles of values: one copy is kept and read, and
// turning it costs little beside the products with it.
#pragma once
#include <vector>

#include "cache.h"

namespace moedial {

constexpr int64_t KEYS = 128;  // keys of one round of attention

// Stored tiles in the order in which they are read.
using Tiles = const int32_t* const*;

// Where element i of a value of `width` lies in a turned tile's rows. A word of bfloat16 keys holds
// two elements: the even ones come first.
inline int64_t turned_column(const Cache& cache, int64_t i) {
    return cache.kind == FLOAT ? i : i / 2 + i % 2 * (cache.value_width / 2);
}

// The first value_width elements of a tile of keys as values: [16 / group][value_width] words.
inline void turn_tile(const Cache& cache, const int32_t* keys, int32_t* values) {
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

// The scales of the round's keys, 0 where it has none.
inline void read_scales(Tiles stored, int64_t used, float* scales) {
    std::memset(scales, 0, KEYS * 4);
    for (int64_t i = 0; i < used; i++) std::memcpy(scales + i * TILE, stored[i], TILE * 4);
}

// The `used` tiles of a round as values, in memory of this thread.
inline void turn_tiles(const Cache& cache, Tiles keys, int64_t used, const int32_t** values) {
    static thread_local std::vector<int32_t> room;
    const int64_t words = cache.value_tile_words();
    room.resize(KEYS / TILE * words);
    for (int64_t i = 0; i < used; i++) {
        turn_tile(cache, keys[i], room.data() + i * words);
        values[i] = room.data() + i * words;
    }
}

}  // namespace moedial
