// Attention of a step over a paged cache: its query tiles (`attender.h`), handed out to the
// threads, their parts merged in order.
#pragma once
#include <vector>

#include "attender.h"

namespace moedial {

// Merges the next part of the keys into `into`, for the same queries. Parts are merged in the order
// of the sequence, so that the result has the same bits however they were computed.
inline void merge(RunningSoftmax& into, const RunningSoftmax& next, int64_t queries,
                  int64_t width) {
    for (int64_t query = 0; query < queries; query++) {
        if (next.total[query] == 0) continue;
        const float before = into.highest[query], other = next.highest[query];
        const float highest = other <= before ? before : other;
        const float old = exp(splat(before - highest))[0], fresh = exp(splat(other - highest))[0];
        into.total[query] = into.total[query] * old + next.total[query] * fresh;
        into.highest[query] = highest;
        float *sums = into.out + query * width, *part = next.out + query * width;
        for (int64_t i = 0; i < width; i += LANES)
            store(sums + i, fma(load(part + i), splat(fresh), load(sums + i) * old));
    }
}

// Divides the sums of a tile by the sums of weights and writes them to out [rows, heads *
// value_width]. A sink is one more score without a value.
inline void write_outputs(const Attender& in, const QueryTile& tile, RunningSoftmax& run,
                          float* out) {
    const int64_t width = in.cache.value_width, heads = in.attention.heads;
    for (int64_t query = 0; query < tile.count(); query++) {
        const int64_t head = in.head(tile, query);
        float scale = 1, total = run.total[query];
        if (in.attention.sinks) {
            const float sink = in.attention.sinks[head], seen = run.highest[query];
            const float highest = sink <= seen ? seen : sink;
            scale = exp(splat(seen - highest))[0];
            total = total * scale + exp(splat(sink - highest))[0];
        }
        float* sums = run.out + query * width;
        float* row = out + (in.token(tile, query) * heads + head) * width;
        float* to = in.cache.values ? row : sums;
        for (int64_t i = 0; i < width; i += LANES) store(to + i, load(sums + i) * scale / total);
        if (to == row) continue;
        for (int64_t i = 0; i < width; i++) row[i] = sums[value_column(in.cache, i)];
    }
}

// How many rows of a span one tile covers, and how many of the heads that share a kv head.
struct TileShape {
    int64_t shared, heads, rows;

    // A tile has room for QUERIES. Where many heads share a kv head and rows are few, each tile has
    // fewer heads, so that every thread gets one.
    TileShape(const Pages& pages, int64_t kv_heads, int64_t all_heads, int64_t threads)
        : shared(all_heads / kv_heads) {
        int64_t cuts = ceil_div(shared, QUERIES);
        while (shared > 8 * cuts && pages.rows * kv_heads * cuts < threads) cuts *= 2;
        heads = ceil_div(shared, cuts), rows = QUERIES / heads;
    }
    int64_t tiles_per_kv_head() const { return ceil_div(shared, heads); }
};

// Lists all query tiles of a step; returns their number. Late rows come first: they have the most
// keys, and short tasks should come last.
inline int64_t list_tiles(const Pages& pages, int64_t kv_heads, const TileShape& shape,
                          QueryTile* tiles) {
    int64_t count = 0;
    for (int64_t span = 0; span < pages.count; span++) {
        const int64_t rows = pages.spans[span].rows;
        for (int64_t row = ceil_div(rows, shape.rows) * shape.rows - shape.rows; row >= 0;
             row -= shape.rows)
            for (int64_t kv_head = 0; kv_head < kv_heads; kv_head++)
                for (int64_t head = 0; head < shape.shared; head += shape.heads)
                    tiles[count++] = {span,    row,  std::min(shape.rows, rows - row),
                                      kv_head, head, std::min(shape.heads, shape.shared - head)};
    }
    return count;
}

// Encodes the queries of every row and head in the number format of the cache.
inline Inputs encode_queries(const float* queries, int64_t stride, const Cache& cache, int64_t rows,
                             int64_t heads) {
    const int64_t width = cache.head_width;
    const Inputs in = inputs(cache.kind, rows * heads, width);
    parallel_rows(
        rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; row++)
                for (int64_t head = 0; head < heads; head++)
                    encode(queries + row * stride + head * width, width, in, row * heads + head,
                           width);
        },
        4 * rows * heads * width);
    return in;
}

// An estimate of the multiply-adds of the attention of all rows.
inline int64_t multiply_adds(const Cache& cache, const Pages& pages, const Attention& attention) {
    int64_t pairs = 0;  // of a row and a key
    for (int64_t i = 0; i < pages.count; i++) {
        const Span& span = pages.spans[i];
        const int64_t first = span.context - span.rows;
        pairs += span.rows * (span.context - attention.oldest(first));
    }
    return pairs * attention.heads * (cache.head_width + cache.value_width);
}

// out [rows, heads * value_width]: causal attention of every new token over its sequence. queries:
// [rows, stride >= heads * head_width].
void attend(const float* queries, int64_t stride, const Cache& cache, const Pages& pages,
            const Attention& attention, float* out) {
    const int64_t width = cache.value_width, heads = attention.heads;
    const int64_t work = multiply_adds(cache, pages, attention), team = moedial::team(work);
    const TileShape shape(pages, cache.kv_heads, heads, team);
    const Inputs in = encode_queries(queries, stride, cache, pages.rows, heads);
    const Attender attender{in, cache, pages, attention};
    QueryTile* tiles = scratch().take<QueryTile>((pages.rows / shape.rows + pages.count) *
                                                 cache.kv_heads * shape.tiles_per_kv_head());
    const int64_t count = list_tiles(pages, cache.kv_heads, shape, tiles);
    int64_t longest = 0, most = 1;  // of one tile: keys from its first part on, and queries
    for (int64_t i = 0; i < count; i++) {
        longest = std::max(longest, attender.end(tiles[i]) - attender.start(tiles[i]) * PART);
        most = std::max(most, tiles[i].count());
    }
    const int64_t parts = ceil_div(longest, PART), room = most * width;

    // Few tiles with long contexts: their parts are computed side by side. Otherwise each task
    // computes the parts of its own tile in turn. The parts and their order are the same.
    const bool split = parts > 1 && count < 4 * team;
    const int64_t kept = split ? count * parts : 0;
    RunningSoftmax* runs = scratch().take<RunningSoftmax>(kept);
    float* outs = scratch().take<float>(kept * room);
    parallel(
        kept,
        [&](int64_t i) {
            runs[i].out = outs + i * room;
            const int64_t part = attender.start(tiles[i / parts]) + i % parts;
            const int64_t until = std::min((part + 1) * PART, attender.end(tiles[i / parts]));
            attender.part(tiles[i / parts], part * PART, until, {until, nullptr}, runs[i]);
        },
        work);
    const auto run = [&](const QueryTile& tile, const QueryTile* then, const RunningSoftmax* done) {
        static thread_local std::vector<float> local;
        local.resize(2 * room);
        const int64_t start = attender.start(tile);
        const ReadAhead ahead{attender.end(tile), then};
        RunningSoftmax sums, next;
        sums.out = local.data(), next.out = sums.out + room;
        // The sequence's first part is computed into `sums`; later ones are merged into it. Without
        // a first part the sums start empty.
        const bool direct = !split && start == 0;
        attender.part(tile, 0, direct ? PART : 0, ahead, sums);
        for (int64_t part = direct ? 1 : start; part * PART < attender.end(tile); part++) {
            if (!split) attender.part(tile, part * PART, (part + 1) * PART, ahead, next);
            merge(sums, split ? done[part - start] : next, tile.count(), width);
        }
        write_outputs(attender, tile, sums, out);
    };

    // A task is several neighbouring tiles, so that each can prefetch the keys of the next one.
    const int64_t in_a_row = count >= 16 * team ? 4 : 1;
    parallel_rows(
        count, in_a_row,
        [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++)
                run(tiles[i], i + 1 < last ? tiles + i + 1 : nullptr,
                    split ? runs + i * parts : nullptr);
        },
        work);
}

}  // namespace moedial
