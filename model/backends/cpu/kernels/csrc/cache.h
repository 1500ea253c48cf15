// The paged cache: the slot of a position, and writing new keys and values. The layout of a tile is
// described at `Cache` (values.h).
#pragma once
#include <vector>

#include "linear.h"

namespace moedial {

constexpr int64_t TILE = 16;  // slots of one cache tile

// The cache slot of a position of a span, by the span's block table.
inline int64_t slot_of(const Pages& pages, int64_t span, int64_t position) {
    const int64_t block = pages.tables[span * pages.table_width + position / pages.block_size];
    return block * pages.block_size + position % pages.block_size;
}

// Where the tile of a slot and key-value head begins, in words.
inline int64_t tile_offset(const Cache& cache, int64_t slot, int64_t kv_head) {
    return (slot / TILE * cache.kv_heads + kv_head) * cache.stored_words();
}

// Writes one key or value in int8 with one scale. `at(c)`: where element c lies among the tile's
// bytes.
template <class At>
inline void write_bytes(int32_t* tile, int64_t in, const float* row, int64_t width, At&& at) {
    static thread_local std::vector<uint8_t> bytes;
    bytes.resize(width);
    ((float*)tile)[in] = quantise(row, width, bytes.data(), 0);
    int8_t* out = (int8_t*)(tile + TILE);
    for (int64_t c = 0; c < width; c++) out[at(c)] = int8_t(bytes[c]);
}

// Writes one key of one head to slot `in` of a tile. A word of bfloat16 holds two neighbouring
// elements of a slot.
inline void write_key(const Cache& cache, int64_t tile, int64_t in, const float* key) {
    const int64_t head = cache.head_width;
    if (cache.quantised)
        return write_bytes(cache.keys + tile, in, key, head,
                           [&](int64_t c) { return c * TILE + in; });
    if (cache.kind == FLOAT) {
        for (int64_t c = 0; c < head; c++) ((float*)cache.keys)[tile + c * TILE + in] = key[c];
        return;
    }
    uint16_t* keys = (uint16_t*)(cache.keys + tile);
    for (int64_t c = 0; c < head; c++) keys[(c / 2 * TILE + in) * 2 + c % 2] = to_bf16(key[c]);
}

// Writes one value, which is as wide as a key. A word of bfloat16 holds one element of two
// neighbouring slots.
inline void write_value(const Cache& cache, int64_t tile, int64_t in, const float* value) {
    const int64_t head = cache.head_width;
    if (cache.quantised)
        return write_bytes(cache.values + tile, in, value, head,
                           [&](int64_t c) { return in * head + c; });
    if (cache.kind == FLOAT) {
        std::memcpy(cache.values + tile + in * head, value, head * 4);
        return;
    }
    uint16_t* values = (uint16_t*)(cache.values + tile);
    for (int64_t c = 0; c < head; c++) values[(in / 2 * head + c) * 2 + in % 2] = to_bf16(value[c]);
}

// Writes the new keys of all spans, and their values where the cache stores them. A task is one
// span and kv head, so that a tile is written by one thread.
void write_cache(const float* keys, const float* values, int64_t stride, const Cache& cache,
                 const Pages& pages) {
    const int64_t head = cache.head_width;
    const auto write = [&](int64_t task) {
        const int64_t index = task / cache.kv_heads, kv_head = task % cache.kv_heads;
        const Span& span = pages.spans[index];
        for (int64_t i = 0; i < span.rows; i++) {
            const int64_t slot = slot_of(pages, index, span.context - span.rows + i);
            const int64_t tile = tile_offset(cache, slot, kv_head), in = slot % TILE;
            const int64_t at = (span.first + i) * stride + kv_head * head;
            // A tile's first use clears it: a NaN of an earlier sequence would survive a weight of
            // zero (0 · NaN is NaN).
            int32_t* read_as_values = cache.values ? cache.values : cache.keys;
            if (in == 0) std::memset(read_as_values + tile, 0, cache.stored_words() * 4);
            write_key(cache, tile, in, keys + at);
            if (cache.values) write_value(cache, tile, in, values + at);
        }
    };
    parallel(pages.count * cache.kv_heads, write, 8 * pages.rows * cache.kv_heads * head);
}

}  // namespace moedial
