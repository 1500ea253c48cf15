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
        for (void* piece : pieces) std::free(piece);
        pieces.clear();
#else
        // Several pieces become one that is large enough for all: the next op finds its room in it.
        if (pieces.size() > 1) {
            for (void* piece : pieces) std::free(piece);
            pieces.assign(1, allocate(total));
            size = total;
        }
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
        for (size_t i = mark.pieces; i < pieces.size(); i++) std::free(pieces[i]);
        pieces.resize(mark.pieces);
#else
        used = pieces.size() == mark.pieces ? mark.used : 0;  // nothing older is in a newer piece
#endif
    }

  private:
    void* allocate(int64_t bytes) {
        if (void* memory = std::aligned_alloc(64, bytes)) return memory;
        throw std::bad_alloc();
    }

    void* take_bytes(int64_t bytes) {
#ifdef __SANITIZE_ADDRESS__  // every piece in an allocation of its own, so that an overrun is seen
        pieces.push_back(allocate(bytes));
        return pieces.back();
#else
        if (used + bytes > size) {
            size = bytes > (1 << 20) ? bytes : (1 << 20);
            pieces.push_back(allocate(size));
            total += size, used = 0;
        }
        void* memory = static_cast<char*>(pieces.back()) + used;
        used += bytes;
        return memory;
#endif
    }

    std::vector<void*> pieces;
    int64_t size = 0, used = 0, total = 0;  // of the last piece, and of all together
};

Scratch& scratch();

}  // namespace moedial
