// The paged cache: where a position of a sequence lies, and how new keys and values get there.
// `Cache` (values.h) draws the layout of a tile.
#pragma once
#include "linear.h"

namespace moedial {

constexpr int64_t TILE = 16;  // slots of one cache tile

// Which slot of the cache holds a position of a span: its block is in the table.
inline int64_t slot_of(const Pages& pages, int64_t span, int64_t position) {
    const int64_t block = pages.tables[span * pages.table_width + position / pages.block_size];
    return block * pages.block_size + position % pages.block_size;
}

// Where the tile of a slot and key-value head begins, in words.
inline int64_t tile_offset(const Cache& cache, int64_t slot, int64_t kv_head) {
    return (slot / TILE * cache.kv_heads + kv_head) * cache.tile_words();
}

// One key and value of one head into slot `in` of a tile. A word of bfloat16 keys holds two
// neighbouring channels of a slot; a word of values holds one channel of two neighbouring slots.
inline void write_slot(const Cache& cache, int64_t tile, int64_t in, const float* key,
                       const float* value) {
    const int64_t head = cache.head_width;
    if (cache.kind == FLOAT) {
        for (int64_t c = 0; c < head; c++) ((float*)cache.keys)[tile + c * TILE + in] = key[c];
        std::memcpy(cache.values + tile + in * head, value, head * 4);
        return;
    }
    uint16_t *keys = (uint16_t*)(cache.keys + tile), *values = (uint16_t*)(cache.values + tile);
    for (int64_t c = 0; c < head; c++) {
        keys[(c / 2 * TILE + in) * 2 + c % 2] = to_bf16(key[c]);
        values[(in / 2 * head + c) * 2 + in % 2] = to_bf16(value[c]);
    }
}

// New keys and values of all spans. Each kv head is one task, so that one thread writes a tile.
void write_cache(const float* keys, const float* values, int64_t stride, const Cache& cache,
                 const Pages& pages) {
    const int64_t head = cache.head_width;
    const auto write_head = [&](int64_t kv_head) {
        for (int64_t index = 0; index < pages.count; index++) {
            const Span& span = pages.spans[index];
            for (int64_t i = 0; i < span.rows; i++) {
                const int64_t slot = slot_of(pages, index, span.context - span.rows + i);
                const int64_t tile = tile_offset(cache, slot, kv_head), in = slot % TILE;
                const int64_t at = (span.first + i) * stride + kv_head * head;
                // A fresh tile is cleared: what another sequence left there must not meet a zero
                // weight (0 · NaN is NaN).
                if (in == 0) std::memset(cache.values + tile, 0, cache.tile_words() * 4);
                write_slot(cache, tile, in, keys + at, values + at);
            }
        }
    };
    if (pages.rows * cache.kv_heads < 64) {
        for (int64_t kv_head = 0; kv_head < cache.kv_heads; kv_head++) write_head(kv_head);
    } else {
        parallel(cache.kv_heads, write_head);
    }
}

}  // namespace moedial
