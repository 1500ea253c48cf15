// Working memory of one op: taken in pieces, given back all at once, kept between ops. One op runs
// at a time.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace moedial {

class Scratch {
  public:
    template <class T>
    T* take(int64_t count) {
        return static_cast<T*>(bytes((count * sizeof(T) + 63) / 64 * 64 + 64));
    }

    void reset() {
#ifdef __SANITIZE_ADDRESS__
        for (void* piece : pieces) std::free(piece);
        pieces.clear();
#else
        // Several chunks become one that is large enough for all.
        if (pieces.size() > 1) {
            for (void* piece : pieces) std::free(piece);
            pieces.assign(1, allocate(total));
            size = total;
        }
        used = 0;
#endif
    }

  private:
    void* allocate(int64_t n) {
        if (void* p = std::aligned_alloc(64, n)) return p;
        throw std::bad_alloc();
    }

    void* bytes(int64_t n) {
#ifdef __SANITIZE_ADDRESS__  // apart, so that an overrun is seen
        pieces.push_back(allocate(n));
        return pieces.back();
#else
        if (used + n > size) {
            size = n > (1 << 20) ? n : (1 << 20);
            pieces.push_back(allocate(size));
            total += size, used = 0;
        }
        void* p = static_cast<char*>(pieces.back()) + used;
        used += n;
        return p;
#endif
    }

    std::vector<void*> pieces;
    int64_t size = 0, used = 0, total = 0;
};

Scratch& scratch();

}  // namespace moedial
