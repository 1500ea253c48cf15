// Working memory of one op: taken in pieces, given back all at once, kept between ops.
// One op runs at a time (`checks.h`), so this needs no lock.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace moedial {

// A bump allocator. Memory is as it was left: what needs zeros must write them.
class Scratch {
  public:
    // Aligned to a cache line, with a line to spare: vectors may read past the last value.
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(take_bytes((count * sizeof(T) + 63) / 64 * 64 + 64));
    }

    void reset() {
#ifdef __SANITIZE_ADDRESS__
        drop(0);
#else
        // The next op finds its room in one piece.
        if (pieces.size() > 1) join(0);
        used = 0;
#endif
    }

    // What is taken after a mark can be given back before the op ends.
    struct Mark {
        size_t pieces;
        int64_t used;
    };

    Mark mark() const { return {pieces.size(), used}; }

    void release(Mark mark) {
#ifdef __SANITIZE_ADDRESS__
        drop(mark.pieces);
#else
        if (pieces.size() > mark.pieces + 1) join(mark.pieces);
        used = pieces.size() == mark.pieces ? mark.used : 0;  // nothing older is in a newer piece
#endif
    }

  private:
    struct Piece {
        void* memory;
        int64_t bytes;
    };

    void add(int64_t bytes) {
        void* memory = std::aligned_alloc(64, bytes);
        if (!memory) throw std::bad_alloc();
        pieces.push_back({memory, bytes});
        size = bytes, used = 0;
    }

    // Gives back all pieces from `first` on; returns their bytes. What is taken next gets a new
    // one.
    int64_t drop(size_t first) {
        int64_t bytes = 0;
        for (size_t i = first; i < pieces.size(); i++)
            std::free(pieces[i].memory), bytes += pieces[i].bytes;
        pieces.resize(first);
        size = used = 0;
        return bytes;
    }

    // Makes all pieces from `first` on one that is as large as they are together.
    void join(size_t first) { add(drop(first)); }

    void* take_bytes(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__  // every piece in an allocation of its own, so that an overrun is seen
        add(bytes);
        return pieces.back().memory;
#else
        if (used + bytes > size) add(bytes > (1 << 20) ? bytes : (1 << 20));
        void* memory = static_cast<char*>(pieces.back().memory) + used;
        used += bytes;
        return memory;
#endif
    }

    std::vector<Piece> pieces;
    int64_t size = 0, used = 0;  // of the last piece
};

Scratch& scratch();

}  // namespace moedial
