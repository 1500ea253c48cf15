// What products with grouped matrices read: rows of signed bytes, and the codes of a panel as they
// are stored or unpacked for many rows. A panel is one stream
// (model/backends/cpu/kernels/groups.py): per group the scales of its outputs, float16 or
// bytes, their float16 minima, then words.
#pragma once
#include <algorithm>

#include "kernels.h"
#include "vec.h"

namespace moedial {

constexpr int64_t BLOCK_INPUTS = 256;  // a whole number of groups of any size
constexpr int64_t AHEAD_BYTES = 6144;  // to prefetch ahead in a panel that is read as it lies

// The largest magnitude of what codes stand for.
inline int32_t magnitude(const GroupCodes& codes) {
    return std::max(codes.shift, codes.largest - codes.shift);
}

// Whether sums of 16 products could overflow 16 bits.
inline bool large_codes(const GroupCodes& codes) { return magnitude(codes) > 32; }

// Inputs of a run where scales are integers: its sums of 8 products, each up to 32 * 127, are
// read as signed numbers of 16 bits.
constexpr int64_t WHOLE_RUN = 16;

// How many inputs make a run, whose sum is begun on its own: a whole group, or where products are
// added in 16 bits so many that sums of half of them, each with an input up to 127, cannot
// overflow; WHOLE_RUN where scales are integers as well.
inline int64_t run_inputs(const GroupCodes& codes) {
    int64_t run = codes.inputs;
    if (ADDS_IN_16_BITS && !large_codes(codes) && codes.byte_scale()) return WHOLE_RUN;
    if (ADDS_IN_16_BITS && !large_codes(codes))
        while (run * magnitude(codes) > 512) run /= 2;
    return run;
}

// What is left in the entries that are multiplied of what makes them unsigned, and must be taken
// off their products.
inline int32_t entry_shift(const GroupCodes& codes) {
    return ADDS_IN_16_BITS && large_codes(codes) ? 0 : codes.shift;
}

// Where the parts of an encoded row begin, in words: first codes, four in a word; then what the sum
// of each run starts from (`start_of`); each group's sum of codes and each block's scale, floats.
struct RowLayout {
    int64_t runs, starts, sums, scales, words;  // runs: of a group

    RowLayout(int64_t inputs, const GroupCodes& codes)
        : runs(codes.inputs / run_inputs(codes)),
          starts(inputs / 4),
          sums(starts + inputs / codes.inputs * runs),
          scales(sums + inputs / codes.inputs),
          words(scales + (inputs + BLOCK_INPUTS - 1) / BLOCK_INPUTS) {}
};

// How products are added up.
struct Sums {
    bool large = false;  // whether codes are (`large_codes`), where products are added in 16 bits
    bool whole = false;  // whether scales are integers of 8 bits, else float16
    bool starts = true;  // whether a run starts from what an encoded row has for it, else from zero
};

// How codes are read from WORDS words, as PLANES planes of 4 neighbouring inputs.

// Codes of 4 bits: a word has two planes, in the low and the high halves of its bytes. TABLE:
// whether they are looked up.
template <bool TABLE, Sums HOW>
struct Nibbles {
    static constexpr Sums SUMS = HOW;
    static constexpr int WORDS = 1, PLANES = 2;
    static void decode(const Ints (&words)[WORDS], Ints table, Ints (&planes)[PLANES]) {
        planes[0] = words[0] & 0x0F0F0F0F, planes[1] = (words[0] >> 4) & 0x0F0F0F0F;
        if constexpr (TABLE)
            planes[0] = look_up(table, planes[0]), planes[1] = look_up(table, planes[1]);
    }
};

// Codes of 6 bits: each of three words has a plane in the low 6 bits of its bytes, and in the high
// two bits a third of the fourth plane.
struct SixBits {
    static constexpr Sums SUMS{};
    static constexpr int WORDS = 3, PLANES = 4;
    static void decode(const Ints (&words)[WORDS], Ints, Ints (&planes)[PLANES]) {
        for (int word = 0; word < WORDS; word++) planes[word] = words[word] & 0x3F3F3F3F;
        planes[3] = ((words[0] >> 6) & 0x03030303) | ((words[1] >> 4) & 0x0C0C0C0C) |
                    ((words[2] >> 2) & 0x30303030);
    }
};

// Codes of 8 bits: a word is one plane.
struct WholeBytes {
    static constexpr Sums SUMS{.large = true, .starts = !ADDS_IN_16_BITS};
    static constexpr int WORDS = 1, PLANES = 1;
    static void decode(const Ints (&words)[WORDS], Ints, Ints (&planes)[PLANES]) {
        planes[0] = ADDS_IN_16_BITS ? words[0] ^ int32_t(0x80808080) : words[0];
    }
};

// What is multiplied in place of each code of 4 bits.
inline Ints table_of(const GroupCodes& codes) {
    uint8_t entries[16];
    for (int code = 0; code < 16; code++)
        entries[code] = uint8_t(codes.entries[code] - (codes.shift - entry_shift(codes)));
    return repeat_bytes(entries);
}

// Groups of a panel as they are stored, from output `column` of the panel's `width` on.
template <class How>
struct Stored {
    using Codes = How;
    const char* data;
    int64_t width, column;
    const GroupCodes& codes;
    const Ints table = table_of(codes);

    int64_t bytes() const { return width * codes.bytes(); }  // of a group
    const char* group(int64_t index) const { return data + index * bytes(); }
    const int32_t* words(const char* group) const {
        return (const int32_t*)(group + width * codes.header) + column;
    }
    int64_t step() const { return Codes::WORDS * width; }  // from words to the next
    auto scale(const char* group, int vector) const {
        const int64_t at = column + vector * LANES;
        if constexpr (Codes::SUMS.whole)
            return load_factors<Codes::SUMS.large>((const int8_t*)group + at);
        else
            return load_float16((const uint16_t*)group + at);
    }
    Floats minimum(const char* group, int vector) const {
        const char* minima = group + width * codes.scale_bytes();
        return load_float16((const uint16_t*)minima + column + vector * LANES);
    }
    void planes(const int32_t* at, int vector, Ints (&planes)[Codes::PLANES]) const {
        Ints words[Codes::WORDS];
        at += vector * LANES;
#pragma GCC unroll 3
        for (int word = 0; word < Codes::WORDS; word++, at += width) words[word] = load(at);
        Codes::decode(words, table, planes);
    }
    // Where a tile of some outputs that begins with group `first` is to prefetch. Tiles of a part
    // of the panel read a block several times, a column of it each: together they prefetch the next
    // block in the order in which it lies, each its share.
    const char* ahead(int64_t first, int64_t outputs) const {
        const int64_t block = BLOCK_INPUTS / codes.inputs * bytes();
        return group(first) + (outputs == PANEL ? AHEAD_BYTES : block + column * block / width);
    }
    // Prefetches at most `most` bytes, a constant, and moves on by `bytes`.
    static void prefetch(const char*& ahead, int64_t most, int64_t bytes) {
#pragma GCC unroll 12
        for (int64_t line = 0; line < most; line += 64) __builtin_prefetch(ahead + line);
        ahead += bytes;
    }
    static void prefetch_header(const char*& ahead, int64_t most, int64_t bytes) {
        prefetch(ahead, most, bytes);
    }
};

// Groups of one block for V vectors of outputs, ready to be multiplied: per group scales, minima,
// then a byte for each code.
template <Sums HOW, int V>
class Unpacked {
    static constexpr int64_t WIDTH = V * LANES, HEADER = 2 * WIDTH;
    int64_t first, lines;      // `lines` of 64 bytes are prefetched for each group of a tile
    mutable const char* next;  // of them
    alignas(64) int32_t data[BLOCK_INPUTS / 4 * WIDTH + BLOCK_INPUTS / 16 * HEADER];

  public:
    struct Codes {
        static constexpr Sums SUMS = HOW;
        static constexpr int PLANES = 1, WORDS = 1;
    };
    const GroupCodes& codes;

    // So many `tiles` will be multiplied: together they prefetch these columns of the next block,
    // evenly over their arithmetic.
    template <class How>
    Unpacked(const Stored<How>& from, int64_t first, int64_t last, int64_t tiles)
        : first(first),
          lines((WIDTH * from.codes.bytes() / 64 + tiles - 1) / tiles),
          next(from.ahead(first, WIDTH)),
          codes(from.codes) {
        int32_t* to = data;
        for (int64_t index = first; index < last; index++) {
            const char* group = from.group(index);
            for (int vector = 0; vector < V; vector++, to += LANES)
                if constexpr (HOW.whole)
                    store(to, from.scale(group, vector));
                else
                    store((float*)to, from.scale(group, vector));
            if (codes.minimum())
                for (int vector = 0; vector < V; vector++)
                    store((float*)to + vector * LANES, from.minimum(group, vector));
            to += WIDTH;
            const int32_t* at = from.words(group);
            for (int64_t word = 0; word < codes.inputs / (4 * How::PLANES); word++) {
#pragma GCC unroll 4
                for (int vector = 0; vector < V; vector++) {
                    Ints planes[How::PLANES];
                    from.planes(at, vector, planes);
#pragma GCC unroll 4
                    for (int plane = 0; plane < How::PLANES; plane++)
                        store(to + plane * WIDTH + vector * LANES, planes[plane]);
                }
                at += from.step(), to += How::PLANES * WIDTH;
            }
        }
    }

    int64_t bytes() const { return 4 * HEADER + codes.inputs * WIDTH; }  // of a group
    const char* group(int64_t index) const { return (const char*)data + (index - first) * bytes(); }
    const int32_t* words(const char* group) const { return (const int32_t*)group + HEADER; }
    static constexpr int64_t step() { return WIDTH; }
    auto scale(const char* group, int vector) const {
        if constexpr (HOW.whole)
            return load((const int32_t*)group + vector * LANES);
        else
            return load((const float*)group + vector * LANES);
    }
    Floats minimum(const char* group, int vector) const {
        return load((const float*)group + WIDTH + vector * LANES);
    }
    void planes(const int32_t* at, int vector, Ints (&planes)[1]) const {
        planes[0] = load(at + vector * LANES);
    }
    const char* ahead(int64_t, int64_t) const { return nullptr; }
    static void prefetch(const char*&, int64_t, int64_t) {}
    void prefetch_header(const char*&, int64_t, int64_t) const {
        const char* line = next;
        next += 64 * lines;
        for (; line < next; line += 64) __builtin_prefetch(line);
    }
};

}  // namespace moedial
