// Attention of one tile of queries over a paged cache. Scores are taken 128 keys at a time from the
// sequence's first position on, in parts of fixed length whose results are merged in order. So the
// arithmetic of a query depends on its position only, not on its chunk or on other sequences.
//
//   query tile   up to QUERIES (row, head) pairs of a sequence that share a key-value head: a task;
//                where more heads share it, each tile has some of them
//   round        128 keys for all queries of a tile: scores, softmax, weighted values
//   part         1024 keys: a running softmax of its own, merged with the parts before it
#pragma once
#include "round.h"

namespace moedial {

constexpr int64_t PART = 1024;                     // keys of one part
constexpr int64_t QUERIES = LANES < 16 ? 48 : 32;  // that share the keys of one round

// Queries of one sequence that share a kv head: rows [first, first + rows) of the span, times
// `heads` heads that read this kv head, from its `first_head` on.
struct QueryTile {
    int64_t span, first, rows, kv_head, first_head, heads;

    int64_t count() const { return rows * heads; }
};

// The running softmax of the queries of one tile over one part: maximum, sum and unnormalised
// output of each.
struct RunningSoftmax {
    float highest[QUERIES], total[QUERIES];
    float* out;  // [queries, value_width]
};

// What a thread reads after the current round, to be prefetched: the same tile's keys before
// `until`, then the first keys of tile `then` (null: none).
struct ReadAhead {
    int64_t until;
    const QueryTile* then;
};

// One step's attention in one layer.
struct Attender {
    const Inputs& queries;  // row = token * heads + head, [head_width]
    const Cache& cache;
    const Pages& pages;
    const Attention& attention;

    // The position, the row in the step, and the head of one query of a tile.
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

    // The first round's first key.
    int64_t first_key(const QueryTile& tile) const {
        return attention.oldest(position(tile, 0)) / KEYS * KEYS;
    }

    // The cache tiles of a round in the order in which they are read: keys, values, and the tiles
    // that are read next.
    using TileList = const int32_t * [2 * KEYS / TILE + AHEAD_TILES];
    static_assert(KEYS / TILE <= AHEAD_TILES && QUERIES <= ROW_BLOCK && KEYS <= WIDE_WORDS);

    // Lists `used` tiles of keys, as many of values, and the next keys: of this query tile, or else
    // of the one after it. A cache without values of its own has the next keys in their place too.
    void list(const QueryTile& tile, int64_t from, int64_t used, const ReadAhead& ahead,
              TileList& tiles) const {
        for (int64_t i = 0; i < used; i++) {
            const int64_t at = tile_at(tile, from + i * TILE);
            tiles[i] = cache.keys + at;
            if (cache.values) tiles[used + i] = cache.values + at;
        }
        const bool more = from + KEYS < ahead.until, other = !more && ahead.then;
        const QueryTile& next = other ? *ahead.then : tile;
        const int64_t first = more ? from + KEYS : other ? first_key(next) : from;
        const int64_t last = more ? ahead.until : other ? end(next) : from + 1;
        for (int64_t i = 0; i < AHEAD_TILES; i++) {
            const int64_t at = tile_at(next, std::min(first + i * TILE, last - 1));
            tiles[2 * used + i] = cache.keys + at;
            if (!cache.values && i < used) tiles[used + i] = cache.keys + at;
        }
    }

    // One round: keys [from, from + KEYS) for all queries of the tile; `last` is one past the last
    // key that any of them sees. `rows` are the encoded queries.
    template <class Stored>
    void round(const QueryTile& tile, int64_t from, int64_t last, const ReadAhead& ahead,
               const int32_t* const* rows, RunningSoftmax& run) const {
        // Scores, then probabilities, in the layout of the second product's widened inputs.
        alignas(64) float scores[QUERIES * WIDE_STRIDE];
        alignas(64) int32_t weights[QUERIES * KEYS / 2];  // probabilities as bfloat16 pairs
        const int32_t* weight_rows[QUERIES];
        int32_t *score_rows[QUERIES], *out_rows[QUERIES];
        const int64_t here = tile.count(), group = cache.group();
        const int64_t used = ceil_div(std::min(last - from, KEYS), TILE);
        for (int64_t query = 0; query < here; query++) {
            score_rows[query] = (int32_t*)scores + query * WIDE_STRIDE;
            out_rows[query] = (int32_t*)run.out + query * cache.value_width;
            weight_rows[query] = group == 1 ? score_rows[query] : weights + query * KEYS / group;
        }
        TileList tiles;
        list(tile, from, used, ahead, tiles);
        // In a short round no earlier tile prefetches the first values.
        for (int64_t i = used; cache.values && i < std::min(2 * used, AHEAD_TILES); i++)
            prefetch_part<Stored>(tiles[i], TILE * cache.value_width / group, 0, 1);
        // Scores are read in whole pairs of tiles: those of a missing tile must not be NaN.
        const int64_t count = ceil_div(used, 2) * 2 * TILE;
        for (int64_t query = 0; used % 2 && query < here; query++)
            std::memset(score_rows[query] + used * TILE, 0, TILE * 4);
        const bool wide = widens(cache.kind, here);
        if (wide)
            score_wide<Stored>(cache, tiles, used, here, rows, score_rows);
        else
            score<Stored>(cache, tiles, used, here, rows, score_rows);
        alignas(64) float key_scales[KEYS], value_scales[KEYS];  // of a quantised cache
        if (cache.quantised)
            read_scales(tiles, used, key_scales), read_scales(tiles + used, used, value_scales);
        for (int64_t query = 0; query < here; query++) {
            float* row = (float*)score_rows[query];
            if (cache.quantised) scale(row, count, key_scales);
            softmax(tile, query, from, count, row, run);
            if (cache.quantised) scale(row, count, value_scales);
            for (int64_t key = 0; wide && group == 2 && key < count; key += LANES)
                store(row + key, round_bf16(load(row + key)));
            for (int64_t key = 0; !wide && group == 2 && key < count; key += 2 * LANES)
                store_bf16((uint16_t*)weight_rows[query] + key, load(row + key),
                           load(row + key + LANES));
        }
        if (!cache.values) values_from_keys(cache, tiles, used, tiles + used);
        const Tiles values = tiles + used;
        if (wide)
            add_values_wide<Stored>(cache, values, used, here, (const int32_t*)scores, out_rows);
        else
            add_values<Stored>(cache, values, used, here, weight_rows, out_rows);
    }

    // Multiplies a round's scores or weights of one query by the scales of its keys or values.
    static void scale(float* row, int64_t count, const float* scales) {
        for (int64_t i = 0; i < count; i += LANES) store(row + i, load(row + i) * load(scales + i));
    }

    // Turns the first `count` scores of one query into weights relative to the running maximum, and
    // scales the earlier sums to it.
    void softmax(const QueryTile& tile, int64_t query, int64_t from, int64_t count, float* scores,
                 RunningSoftmax& run) const {
        const int64_t here = position(tile, query), oldest = attention.oldest(here);
        // The first and last key of the round that the query sees, as 32-bit numbers.
        const Ints newest_seen = splat(int32_t(std::min(here - from, KEYS)));
        const Ints oldest_seen = splat(int32_t(std::max(oldest - from, int64_t{-1})));
        const float softcap = attention.softcap;
        const bool plain = !softcap && here - from >= count - 1 && oldest <= from;
        Floats best = splat(-INFINITY);
        for (int64_t i = 0; plain && i < count; i += LANES)
            best = max(best, load(scores + i) * attention.scale);
        for (int64_t i = 0; !plain && i < count; i += LANES) {
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
        const float factor = plain ? attention.scale : 1.0f;
        for (int64_t i = 0; i < count; i += LANES) {
            const Floats powers = exp_down(load(scores + i) * factor - now);
            store(scores + i, powers), total += powers;
        }
        const float shrink = before == now ? 1.0f : exp(splat(before - now))[0];
        run.total[query] = run.total[query] * shrink + sum(total);
        run.highest[query] = now;
        if (shrink == 1) return;
        float* out = run.out + query * cache.value_width;
        for (int64_t i = 0; i < cache.value_width; i += LANES)
            store(out + i, load(out + i) * shrink);
    }

    // One part of the keys: those of [from, until) that the tile's queries see.
    void part(const QueryTile& tile, int64_t from, int64_t until, const ReadAhead& ahead,
              RunningSoftmax& run) const {
        const int64_t queries_here = tile.count();
        const int32_t* rows[QUERIES];
        for (int64_t query = 0; query < queries_here; query++) {
            rows[query] = queries.row(token(tile, query) * attention.heads + head(tile, query));
            run.highest[query] = -INFINITY, run.total[query] = 0;
        }
        std::memset(run.out, 0, queries_here * cache.value_width * 4);
        const int64_t last = std::min(until, end(tile));
        // Rounds begin at multiples of KEYS wherever the window or the chunk does.
        for (int64_t key = std::max(from, first_key(tile)); key < last; key += KEYS) {
            if (cache.quantised)
                round<ByteTiles>(tile, key, last, ahead, rows, run);
            else if (cache.kind == FLOAT)
                round<FloatTiles>(tile, key, last, ahead, rows, run);
            else
                round<PairTiles>(tile, key, last, ahead, rows, run);
        }
    }
};

}  // namespace moedial
