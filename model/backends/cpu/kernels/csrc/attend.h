// Attention over a paged cache. Scores are taken 128 keys at a time from the sequence's first
// position on, in parts of fixed length whose results are merged in order: a query's arithmetic
// depends on its own position alone, not on the chunk that it came in or on who else is decoding.
#pragma once
#include <vector>

#include "linear.h"

namespace moedial {

constexpr int64_t TILE = 16;     // slots of one cache tile
constexpr int64_t KEYS = 128;    // keys of one round
constexpr int64_t PART = 1024;   // keys of one part
constexpr int64_t QUERIES = 32;  // (row, head) pairs that share the keys of one round

// Write `rows` new keys and values; each kv head is one task, so that nobody else touches its
// tiles.
void write_cache(const float* k, const float* v, int64_t stride, const Cache& cache,
                 const Pages& pages) {
    const int64_t head = cache.head_width, words = cache.tile_words();
    const auto write_head = [&](int64_t g) {
        for (int64_t s = 0; s < pages.count; s++) {
            const Span& span = pages.spans[s];
            for (int64_t i = 0; i < span.rows; i++) {
                const int64_t position = span.context - span.rows + i, row = span.first + i;
                const int64_t block = pages.tables[s * pages.width + position / pages.block_size];
                const int64_t slot = block * pages.block_size + position % pages.block_size,
                              in = slot % TILE;
                const int64_t at = (slot / TILE * cache.kv_heads + g) * words;
                const float *key = k + row * stride + g * head,
                            *value = v + row * stride + g * head;
                // A fresh tile is cleared: what a stranger left must not meet a zero weight (0 ·
                // NaN is NaN).
                if (in == 0) std::memset(cache.values + at, 0, words * 4);
                if (cache.kind == FLOAT) {
                    for (int64_t c = 0; c < head; c++)
                        ((float*)cache.keys)[at + c * TILE + in] = key[c];
                    std::memcpy(cache.values + at + in * head, value, head * 4);
                    continue;
                }
                uint16_t *keys = (uint16_t*)(cache.keys + at),
                         *values = (uint16_t*)(cache.values + at);
                for (int64_t c = 0; c < head; c++) {
                    keys[(c / 2 * TILE + in) * 2 + c % 2] = to_bf16(key[c]);
                    values[(in / 2 * head + c) * 2 + in % 2] = to_bf16(value[c]);
                }
            }
        }
    };
    if (pages.rows * cache.kv_heads < 64) {
        for (int64_t g = 0; g < cache.kv_heads; g++) write_head(g);
    } else {
        parallel(cache.kv_heads, write_head);
    }
}

// Queries of one sequence that share a kv head: rows [first, first + rows) of the span times the
// heads of the group.
struct Task {
    int64_t span, first, rows, group;
};

// The running softmax of the queries of one task over one part: maximum, sum and unnormalised
// output of each.
struct Running {
    float most[QUERIES], total[QUERIES];
    float* out;  // [queries, head_width]
};

// The cache tiles of one round, as the words of a product.
struct Tiles {
    const int32_t* tile[KEYS / TILE];
};

struct KeyWords {  // outputs are keys from `first` on
    const Tiles& tiles;
    int64_t first;
    const int32_t* at(int64_t g, int v) const {
        const int64_t key = first + v * LANES;
        return tiles.tile[key / TILE] + g * TILE + key % TILE;
    }
    void soon(int64_t, int) const {}
};

struct ValueWords {  // inputs are keys, 1 << shift groups to a tile
    const Tiles& tiles;
    int64_t column, step;
    int shift;
    const int32_t* at(int64_t g, int v) const {
        return tiles.tile[g >> shift] + (g & ((1 << shift) - 1)) * step + column + v * LANES;
    }
    void soon(int64_t, int) const {}
};

struct Attender {
    const Inputs& q;  // row = token * heads + head, [C]
    const Cache& cache;
    const Pages& pages;
    const Attention& a;

    int64_t heads_per_group() const { return a.heads / cache.kv_heads; }
    int64_t position(const Task& t, int64_t query) const {
        const Span& span = pages.spans[t.span];
        return span.context - span.rows + t.first + query / heads_per_group();
    }
    int64_t tile_at(const Task& t, int64_t key) const {
        const int64_t block = pages.tables[t.span * pages.width + key / pages.block_size];
        return ((block * pages.block_size + key % pages.block_size) / TILE * cache.kv_heads +
                t.group) *
               cache.tile_words();
    }

    // A tile is short and its neighbour far away: the processor would not see it coming.
    void fetch(const int32_t* tile) const {
        for (int64_t i = 0; i < cache.tile_words(); i += 16) __builtin_prefetch(tile + i);
    }

    // Ask for the first keys of a task to come.
    void expect(const Task& t) const {
        const int64_t last = position(t, t.rows * heads_per_group() - 1) + 1;
        const int64_t first =
            a.window ? std::max<int64_t>(0, position(t, 0) - a.window + 1) / KEYS * KEYS : 0;
        for (int64_t key = first; key < std::min(last, first + KEYS); key += TILE)
            fetch(cache.keys + tile_at(t, key));
    }

    // One round: keys [from, from + KEYS) for all queries of the task; `last` is one past the last
    // key that any sees.
    template <class K>
    void round(const Task& t, int64_t queries, int64_t from, int64_t last,
               const int32_t* const* rows, Running& run) const {
        alignas(64) float scores[QUERIES * KEYS];
        alignas(64) int32_t probs[QUERIES * KEYS];
        const int32_t* prob_rows[QUERIES];
        int32_t *score_rows[QUERIES], *out_rows[QUERIES];
        const int64_t group = cache.group(), count = ceil_div(std::min(last - from, KEYS), TILE);
        for (int64_t r = 0; r < queries; r++) {
            score_rows[r] = (int32_t*)scores + r * KEYS;
            out_rows[r] = (int32_t*)run.out + r * cache.head_width;
            prob_rows[r] = probs + r * KEYS / group;
        }
        Tiles keys{}, values{};
        for (int64_t i = 0; i < count; i++) {
            const int64_t at = tile_at(t, from + i * TILE);
            keys.tile[i] = cache.keys + at, values.tile[i] = cache.values + at;
            fetch(values.tile[i]);
        }
        // Scores: tiles side by side as the columns of one product.
        if (count < KEYS / TILE) std::memset(scores, 0, queries * KEYS * 4);
        for (int64_t n = 0; n < count * TILE; n += VECTORS * LANES) {
            const int vectors = int(std::min<int64_t>((count * TILE - n) / LANES, VECTORS));
            tiles<K>(vectors, rows, queries, 0, cache.head_width / group, KeyWords{keys, n},
                     score_rows, n, false);
        }
        for (int64_t r = 0; r < queries; r++) {
            float* s = scores + r * KEYS;
            soften(t, r, from, s, run);
            if (group == 1)
                std::memcpy(probs + r * KEYS, s, KEYS * 4);
            else
                for (int64_t i = 0; i < KEYS; i += 2 * LANES)
                    store_bf16((uint16_t*)prob_rows[r] + i, load(s + i), load(s + i + LANES));
        }
        for (int64_t key = from + KEYS; key < std::min(last, from + 2 * KEYS); key += TILE)
            fetch(cache.keys + tile_at(t, key));
        // Weighted values: tiles one after the other as the inputs of one product.
        for (int64_t c = 0; c < cache.head_width; c += VECTORS * LANES) {
            const int vectors = int(std::min<int64_t>((cache.head_width - c) / LANES, VECTORS));
            const ValueWords words{values, c, cache.head_width, group == 1 ? 4 : 3};
            tiles<K>(vectors, prob_rows, queries, 0, count * TILE / group, words, out_rows, c,
                     true);
        }
    }

    // Scores of one query become weights relative to the running maximum; what was summed before is
    // scaled to it.
    void soften(const Task& t, int64_t r, int64_t from, float* s, Running& run) const {
        const int64_t here = position(t, r), first = a.window ? here - a.window + 1 : 0;
        const vi highest = splat(int32_t(std::min(here - from, KEYS))),
                 lowest = splat(int32_t(std::max(first - from, int64_t{-1})));
        vf best = splat(-INFINITY);
        for (int64_t j = 0; j < KEYS; j += LANES) {
            vf v = load(s + j) * a.scale;
            if (a.softcap) v = tanh(v * (1.0f / a.softcap)) * a.softcap;
            const vi key = iota() + int32_t(j);
            v = select((key <= highest) & (key >= lowest), v, splat(-INFINITY));
            store(s + j, v), best = max(best, v);
        }
        const float most = largest(best), before = run.most[r],
                    now = before >= most ? before : most;
        if (now == -INFINITY) {
            std::memset(s, 0, KEYS * 4);
            return;
        }
        vf total{};
        for (int64_t j = 0; j < KEYS; j += LANES) {
            const vf p = exp(load(s + j) - now);
            store(s + j, p), total += p;
        }
        const float shrink = exp(splat(before - now))[0];
        run.total[r] = run.total[r] * shrink + sum(total);
        run.most[r] = now;
        if (shrink == 1) return;
        float* out = run.out + r * cache.head_width;
        for (int64_t c = 0; c < cache.head_width; c += LANES)
            store(out + c, load(out + c) * shrink);
    }

    // One part of the keys: [from, until), cut to what the task's queries see.
    void part(const Task& t, int64_t from, int64_t until, Running& run) const {
        const int64_t per = heads_per_group(), queries = t.rows * per;
        const int32_t* rows[QUERIES];
        for (int64_t r = 0; r < queries; r++) {
            const int64_t token = pages.spans[t.span].first + t.first + r / per;
            rows[r] = q.row(token * a.heads + t.group * per + r % per);
            run.most[r] = -INFINITY, run.total[r] = 0;
        }
        std::memset(run.out, 0, queries * cache.head_width * 4);
        const int64_t last = std::min(until, position(t, queries - 1) + 1);
        const int64_t oldest = a.window ? position(t, 0) - a.window + 1 : 0;
        for (int64_t key = std::max(from, oldest / KEYS * KEYS); key < last; key += KEYS) {
            if (cache.kind == FLOAT)
                round<Float>(t, queries, key, last, rows, run);
            else
                round<Bfloat>(t, queries, key, last, rows, run);
        }
    }
};

// `into` takes in the next part of the same queries. Always one part after the other: the order is
// the sequence's own.
inline void absorb(Running& into, const Running& next, int64_t queries, int64_t width) {
    for (int64_t r = 0; r < queries; r++) {
        if (next.total[r] == 0) continue;
        const float most = next.most[r] <= into.most[r] ? into.most[r] : next.most[r];
        const float old = exp(splat(into.most[r] - most))[0],
                    fresh = exp(splat(next.most[r] - most))[0];
        into.total[r] = into.total[r] * old + next.total[r] * fresh;
        into.most[r] = most;
        float *y = into.out + r * width, *x = next.out + r * width;
        for (int64_t c = 0; c < width; c += LANES)
            store(y + c, fma(load(x + c), splat(fresh), load(y + c) * old));
    }
}

// The task's rows of out [rows, heads * C]; a sink is one more score without a value.
inline void divide(const Attender& in, const Task& t, Running& run, float* out) {
    const int64_t per = in.heads_per_group(), width = in.cache.head_width;
    for (int64_t r = 0; r < t.rows * per; r++) {
        const int64_t token = in.pages.spans[t.span].first + t.first + r / per,
                      head = t.group * per + r % per;
        float share = 1, total = run.total[r];
        if (in.a.sinks) {
            const float sink = in.a.sinks[head], most = sink <= run.most[r] ? run.most[r] : sink;
            share = exp(splat(run.most[r] - most))[0];
            total = total * share + exp(splat(sink - most))[0];
        }
        float *x = run.out + r * width, *y = out + (token * in.a.heads + head) * width;
        for (int64_t c = 0; c < width; c += LANES) store(y + c, load(x + c) * share / total);
    }
}

inline int64_t list_tasks(const Pages& pages, int64_t kv_heads, int64_t most, Task* tasks) {
    int64_t count = 0;
    for (int64_t s = 0; s < pages.count; s++)
        for (int64_t r = ceil_div(pages.spans[s].rows, most) * most - most; r >= 0;
             r -= most)  // late rows see most
            for (int64_t g = 0; g < kv_heads; g++)
                tasks[count++] = {s, r, std::min(most, pages.spans[s].rows - r), g};
    return count;
}

// out [rows, heads * C]: attention of every new token over its sequence up to itself. q: [rows,
// stride >= heads * C].
void attend(const float* q, int64_t stride, const Cache& cache, const Pages& pages,
            const Attention& a, float* out) {
    const int64_t head = cache.head_width, most = QUERIES / (a.heads / cache.kv_heads);
    const Inputs in = inputs(cache.kind, pages.rows * a.heads, head);
    parallel_rows(
        pages.rows, 16,
        [&](int64_t first, int64_t last) {
            for (int64_t t = first; t < last; t++)
                for (int64_t h = 0; h < a.heads; h++)
                    encode(q + t * stride + h * head, head, in, t * a.heads + h, head);
        },
        4 * pages.rows * a.heads * head);
    Task* tasks = scratch().take<Task>((pages.rows / most + pages.count) * cache.kv_heads);
    const int64_t count = list_tasks(pages, cache.kv_heads, most, tasks);
    int64_t longest = 0;
    for (int64_t s = 0; s < pages.count; s++) longest = std::max(longest, pages.spans[s].context);
    const int64_t parts = ceil_div(longest, PART), room = QUERIES * head;
    const Attender attender{in, cache, pages, a};
    // Few tasks with long contexts: their parts are computed side by side. Otherwise each task
    // computes its own in turn.
    const bool split = parts > 1 && count < 4 * threads();
    const int64_t kept = split ? count * parts : 0;
    Running* runs = scratch().take<Running>(kept);
    float* outs = scratch().take<float>(kept * room);
    parallel(kept, [&](int64_t i) {
        runs[i].out = outs + i * room;
        attender.part(tasks[i / parts], i % parts * PART, (i % parts + 1) * PART, runs[i]);
    });
    const auto run = [&](int64_t i) {
        static thread_local std::vector<float> local;
        local.resize(2 * room);
        const int64_t queries = tasks[i].rows * attender.heads_per_group();
        const int64_t until = attender.position(tasks[i], queries - 1) + 1;
        Running sums, next;
        sums.out = local.data(), next.out = sums.out + room;
        attender.part(tasks[i], 0, split ? 0 : PART, sums);
        for (int64_t n = split ? 0 : 1; n * PART < until; n++) {
            if (!split) attender.part(tasks[i], n * PART, (n + 1) * PART, next);
            absorb(sums, split ? runs[i * parts + n] : next, queries, head);
        }
        divide(attender, tasks[i], sums, out);
    };
    // Several tasks in a row to one thread, which then knows what it will read next.
    const int64_t row = count >= 16 * threads() ? 4 : 1;
    parallel_rows(
        count, row,
        [&](int64_t first, int64_t last) {
            for (int64_t i = first; i < last; i++) {
                if (i + 1 < last) attender.expect(tasks[i + 1]);
                run(i);
            }
        },
        2 * pages.rows * a.heads * head * longest);
}

}  // namespace moedial
