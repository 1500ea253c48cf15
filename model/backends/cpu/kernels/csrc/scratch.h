// Working memory of one op: a bump allocator, reset after each op, whose memory is kept for the
// next op. One op runs at a time (`checks.h`), so this needs no lock.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <new>
#include <vector>

namespace moedial {

// Memory is not cleared: an op that needs zeros must write them.
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
        // Joins the pieces, so that the next op needs only one.
        if (pieces.size() > 1) join(0);
        used = 0;
#endif
    }

    // `release(mark)` gives back everything that was taken after `mark()`.
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

    // Frees all pieces from `first` on and returns how many bytes they had. The next `take` adds a
    // new piece.
    int64_t drop(size_t first) {
        int64_t bytes = 0;
        for (size_t i = first; i < pieces.size(); i++)
            std::free(pieces[i].memory), bytes += pieces[i].bytes;
        pieces.resize(first);
        size = used = 0;
        return bytes;
    }

    // Replaces all pieces from `first` on by one piece of their total size.
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
