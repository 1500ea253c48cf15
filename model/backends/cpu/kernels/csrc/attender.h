// Attention of one tile of queries over a paged cache. Scores are taken 128 keys at a time from the
// sequence's first position on, in parts of fixed length whose results are merged in order: a
// query's arithmetic depends on its own position and on nothing else, not on the chunk that it came
// in or on the sequences beside it.
//
//   query tile   up to 32 (row, head) pairs of one sequence that share a key-value head: one task;
//                where more heads share it, each tile has some of them
//   round        128 keys for all queries of a tile: scores, softmax, weighted values
//   part         1024 keys: a running softmax of its own, merged with the parts before it
#pragma once
#include "turn.h"

namespace moedial {

constexpr int64_t PART = 1024;   // keys of one part
constexpr int64_t QUERIES = 32;  // (row, head) pairs that share the keys of one round

// Queries of one sequence that share a kv head: rows [first, first + rows) of the span, times
// `heads` heads that read this kv head, from its `first_head` on.
struct QueryTile {
    int64_t span, first, rows, kv_head, first_head, heads;

    int64_t count() const { return rows * heads; }
};

// The running softmax of the queries of one tile over one part: maximum, sum and unnormalised
// output of each.
struct Running {
    float highest[QUERIES], total[QUERIES];
    float* out;  // [queries, value_width]
};

// Keys as the weights of a product (`PanelWords` of gemm.h): its outputs are keys from `first` on.
struct KeyWords {
    const Tiles& tiles;
    int64_t first;
    const int32_t* at(int64_t group, int vector) const {
        const int64_t key = first + vector * LANES;
        return tiles.tile[key / TILE] + group * TILE + key % TILE;
    }
    void prefetch(int64_t, int) const {}
};

// Values as the weights of a product: its inputs are keys, 1 << shift groups of them to a tile.
struct ValueWords {
    const Tiles& tiles;
    int64_t column, step;
    int shift;
    const int32_t* at(int64_t group, int vector) const {
        return tiles.tile[group >> shift] + (group & ((1 << shift) - 1)) * step + column +
               vector * LANES;
    }
    void prefetch(int64_t, int) const {}
};

// One step's attention in one layer.
struct Attender {
    const Inputs& queries;  // row = token * heads + head, [head_width]
    const Cache& cache;
    const Pages& pages;
    const Attention& attention;

    // Of one query of a tile: its position, row of the step, and head.
    int64_t position(const QueryTile& tile, int64_t query) const {
        const Span& span = pages.spans[tile.span];
        return span.context - span.rows + tile.first + query / tile.heads;
    }
    int64_t token(const QueryTile& tile, int64_t query) const {
        return pages.spans[tile.span].first + tile.first + query / tile.heads;
    }
    int64_t head(const QueryTile& tile, int64_t query) const {
        return tile.kv_head * (attention.heads / cache.kv_heads) + tile.first_head +
               query % tile.heads;
    }

    // The first part that any query of a tile sees, and one past the last key.
    int64_t start(const QueryTile& tile) const {
        return attention.oldest(position(tile, 0)) / PART;
    }
    int64_t end(const QueryTile& tile) const { return position(tile, tile.count() - 1) + 1; }

    int64_t tile_at(const QueryTile& tile, int64_t key) const {
        return tile_offset(cache, slot_of(pages, tile.span, key), tile.kv_head);
    }

    // A tile is short and its neighbour far away: the processor would not see it coming. What is
    // long it sees by itself.
    void prefetch(const int32_t* tile) const {
        for (int64_t i = 0; i < std::min<int64_t>(cache.stored_words(), 2048); i += 16)
            __builtin_prefetch(tile + i);
    }

    void prefetch_keys(const QueryTile& tile, int64_t from, int64_t until) const {
        for (int64_t key = from; key < until; key += TILE)
            prefetch(cache.keys + tile_at(tile, key));
    }

    // Ask for the first keys of a tile to come.
    void expect(const QueryTile& tile) const {
        const int64_t last = end(tile);
        const int64_t first = attention.oldest(position(tile, 0)) / KEYS * KEYS;
        prefetch_keys(tile, first, std::min(last, first + KEYS));
    }

    // Calls run(first, vectors) for all outputs of a product with one row, 8 vectors at a time as
    // far as there are so many: a vector's sums are a chain of additions, and 8 chains hide how
    // long each addition takes.
    template <class Run>
    static void each_wide(int64_t outputs, Run&& run) {
        int64_t first = 0;
        const auto by = [&]<int V>(std::integral_constant<int, V> vectors) {
            for (; first + V * LANES <= outputs; first += V * LANES) run(first, vectors);
        };
        by(std::integral_constant<int, 8>{});
        by(std::integral_constant<int, 2>{});
        by(std::integral_constant<int, 1>{});
    }

    // Scores: keys side by side as the outputs of one product. `used` tiles have keys that are
    // seen.
    template <class Dot>
    void score(const int32_t* const* rows, int64_t queries_here, const Tiles& keys, int64_t used,
               int32_t* const* score_rows) const {
        const int64_t groups = cache.head_width / cache.group();
        if (queries_here == 1)
            return each_wide(used * TILE, [&](int64_t key, auto vectors) {
                tile<Dot, 1, decltype(vectors)::value>(rows, 0, groups, KeyWords{keys, key},
                                                       score_rows, key, false);
            });
        for (int64_t key = 0; key < used * TILE; key += VECTORS * LANES) {
            const int vectors = int(std::min<int64_t>((used * TILE - key) / LANES, VECTORS));
            tiles<Dot>(vectors, rows, queries_here, 0, groups, KeyWords{keys, key}, score_rows, key,
                       false);
        }
    }

    // Weighted values: keys one after the other as the inputs of one product.
    template <class Dot>
    void add_values(const int32_t* const* weight_rows, int64_t queries_here, const Tiles& values,
                    int64_t used, int32_t* const* out_rows) const {
        const int64_t group = cache.group(), width = cache.value_width;
        if (queries_here == 1)
            return each_wide(width, [&](int64_t column, auto vectors) {
                const ValueWords words{values, column, width, group == 1 ? 4 : 3};
                tile<Dot, 1, decltype(vectors)::value>(weight_rows, 0, used * TILE / group, words,
                                                       out_rows, column, true);
            });
        for (int64_t column = 0; column < width; column += VECTORS * LANES) {
            const int vectors = int(std::min<int64_t>((width - column) / LANES, VECTORS));
            const ValueWords words{values, column, width, group == 1 ? 4 : 3};
            tiles<Dot>(vectors, weight_rows, queries_here, 0, used * TILE / group, words, out_rows,
                       column, true);
        }
    }

    // Both products where queries are many: what is stored is widened once for all of them.
    template <class Wide>
    void score_wide(const int32_t* const* rows, int64_t queries_here, const Tiles& keys,
                    int64_t used, int32_t* const* score_rows) const {
        constexpr int64_t CHUNK_WORDS = WIDE_WORDS / Wide::COUNT;
        const int64_t groups = cache.head_width / cache.group();
        for (int64_t from = 0; from < groups; from += CHUNK_WORDS) {
            const int64_t now = std::min(groups - from, CHUNK_WORDS);
            widen_rows<Wide>(rows, queries_here, from, now, wide_room().inputs);
            for (int64_t i = 0; i < used; i++) {
                const char* tile = (const char*)(keys.tile[i] + from * TILE);
                widen_weights<Wide, VECTORS>({tile, TILE, TILE * 4, 4}, now, wide_room().weights);
                wide_tiles<Wide>(queries_here, TILE, now, score_rows, i * TILE, from > 0, tile, 0);
            }
        }
    }

    template <class Wide>
    void add_values_wide(const int32_t* const* weight_rows, int64_t queries_here,
                         const Tiles& values, int64_t used, int32_t* const* out_rows) const {
        const int64_t words = TILE / cache.group(), width = cache.value_width;
        widen_rows<Wide>(weight_rows, queries_here, 0, used * words, wide_room().inputs);
        for (int64_t column = 0; column < width; column += PANEL) {
            const int64_t outputs = std::min(width - column, PANEL);
            int32_t* weights = wide_room().weights;
            for (int64_t i = 0; i < used; i++) {
                const char* tile = (const char*)(values.tile[i] + column);
                widen_weights<Wide, VECTORS>({tile, outputs, width * 4, 4}, words,
                                             weights + i * words * Wide::COUNT * VECTORS * LANES);
            }
            wide_tiles<Wide>(queries_here, outputs, used * words, out_rows, column, true,
                             (const char*)weights, 0);
        }
    }

    // One round: keys [from, from + KEYS) for all queries of the tile; `last` is one past the last
    // key that any of them sees. `rows` are the encoded queries.
    template <class Dot, class Wide>
    void round(const QueryTile& tile, int64_t from, int64_t last, const int32_t* const* rows,
               Running& run) const {
        alignas(64) float scores[QUERIES * KEYS];
        alignas(64) int32_t weights[QUERIES * KEYS];  // the probabilities, in the cache's kind
        const int32_t* weight_rows[QUERIES];
        int32_t *score_rows[QUERIES], *out_rows[QUERIES];
        const int64_t here = tile.count(), group = cache.group();
        const int64_t used = ceil_div(std::min(last - from, KEYS), TILE);
        for (int64_t query = 0; query < here; query++) {
            score_rows[query] = (int32_t*)scores + query * KEYS;
            out_rows[query] = (int32_t*)run.out + query * cache.value_width;
            weight_rows[query] = weights + query * KEYS / group;
        }
        Tiles keys{}, values{};
        for (int64_t i = 0; i < used; i++) {
            const int64_t at = tile_at(tile, from + i * TILE);
            keys.tile[i] = cache.keys + at;
            if (cache.values) prefetch(values.tile[i] = cache.values + at);
        }
        alignas(64) float key_scales[KEYS], value_scales[KEYS];  // of a quantised cache
        if (cache.quantised) {
            static thread_local std::vector<int32_t> key_room, value_room;
            read_scales(keys, used, key_scales), read_scales(values, used, value_scales);
            widen_tiles(keys, used, cache.tile_words(), key_room);
            widen_tiles(values, used, cache.tile_words(), value_room);
        }
        // Scores are read in whole pairs of tiles: what is not scored must still be a number.
        const int64_t count = ceil_div(used, 2) * 2 * TILE;
        for (int64_t query = 0; used % 2 && query < here; query++)
            std::memset(scores + query * KEYS + used * TILE, 0, TILE * 4);
        const bool wide = widens(cache.kind, here);
        if (wide)
            score_wide<Wide>(rows, here, keys, used, score_rows);
        else
            score<Dot>(rows, here, keys, used, score_rows);
        for (int64_t query = 0; query < here; query++) {
            float* row = scores + query * KEYS;
            if (cache.quantised) scale(row, count, key_scales);
            soften(tile, query, from, count, row, run);
            if (cache.quantised) scale(row, count, value_scales);
            if (group == 1)
                std::memcpy(weights + query * KEYS, row, count * 4);
            else
                for (int64_t key = 0; key < count; key += 2 * LANES)
                    store_bf16((uint16_t*)weight_rows[query] + key, load(row + key),
                               load(row + key + LANES));
        }
        prefetch_keys(tile, from + KEYS, std::min(last, from + 2 * KEYS));
        if (!cache.values) turn_tiles(cache, keys, used, values);
        if (wide)
            add_values_wide<Wide>(weight_rows, here, values, used, out_rows);
        else
            add_values<Dot>(weight_rows, here, values, used, out_rows);
    }

    // A round's scores or weights of one query, times those of its keys.
    static void scale(float* row, int64_t count, const float* scales) {
        for (int64_t i = 0; i < count; i += LANES) store(row + i, load(row + i) * load(scales + i));
    }

    // The first `count` scores of one query become weights relative to the running maximum; what
    // was summed before is scaled to it.
    void soften(const QueryTile& tile, int64_t query, int64_t from, int64_t count, float* scores,
                Running& run) const {
        const int64_t here = position(tile, query), oldest = attention.oldest(here);
        // Which of the round's keys the query sees, as numbers that fit a lane.
        const Ints newest_seen = splat(int32_t(std::min(here - from, KEYS)));
        const Ints oldest_seen = splat(int32_t(std::max(oldest - from, int64_t{-1})));
        const float softcap = attention.softcap;
        Floats best = splat(-INFINITY);
        for (int64_t i = 0; i < count; i += LANES) {
            Floats values = load(scores + i) * attention.scale;
            if (softcap) values = tanh(values * (1.0f / softcap)) * softcap;
            const Ints key = iota() + int32_t(i);
            const Ints seen = (key <= newest_seen) & (key >= oldest_seen);
            values = select(seen, values, splat(-INFINITY));
            store(scores + i, values), best = max(best, values);
        }
        const float highest = largest(best), before = run.highest[query];
        const float now = before >= highest ? before : highest;
        if (now == -INFINITY) {  // nothing seen so far: -inf - -inf would be NaN
            std::memset(scores, 0, count * 4);
            return;
        }
        Floats total{};
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats powers = exp(load(scores + i) - now);
            store(scores + i, powers), total += powers;
        }
        const float shrink = exp(splat(before - now))[0];
        run.total[query] = run.total[query] * shrink + sum(total);
        run.highest[query] = now;
        if (shrink == 1) return;
        float* out = run.out + query * cache.value_width;
        for (int64_t i = 0; i < cache.value_width; i += LANES)
            store(out + i, load(out + i) * shrink);
    }

    // One part of the keys: [from, until), cut to what the tile's queries see.
    void part(const QueryTile& tile, int64_t from, int64_t until, Running& run) const {
        const int64_t queries_here = tile.count();
        const int32_t* rows[QUERIES];
        for (int64_t query = 0; query < queries_here; query++) {
            rows[query] = queries.row(token(tile, query) * attention.heads + head(tile, query));
            run.highest[query] = -INFINITY, run.total[query] = 0;
        }
        std::memset(run.out, 0, queries_here * cache.value_width * 4);
        const int64_t last = std::min(until, end(tile));
        const int64_t oldest = attention.oldest(position(tile, 0));
        // Rounds begin at multiples of KEYS wherever the window or the chunk does.
        for (int64_t key = std::max(from, oldest / KEYS * KEYS); key < last; key += KEYS) {
            if (cache.kind == FLOAT)
                round<FloatDot, WideFloats>(tile, key, last, rows, run);
            else
                round<Bfloat16Dot, WidePairs>(tile, key, last, rows, run);
        }
    }
};

}  // namespace moedial
