// Working memory alone: what is given back is found again.
#include <cstdio>
#include <cstdlib>

#include "scratch.h"

using namespace moedial;

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

int main() {
    constexpr int64_t SIZES[] = {3 << 20, 1 << 19, 5 << 20, 1 << 10};
    Scratch scratch;
    for (int op = 0; op < 3; op++) {
        char* kept = scratch.take<char>(1 << 10);
        kept[0] = 7;
        const Scratch::Mark mark = scratch.mark();
        char *seen = nullptr, *last = nullptr;
        for (int round = 0; round < 5; round++) {
            char* first = scratch.take<char>(SIZES[0]);
            char* end = first;
            for (int i = 1; i < 4; i++) {
                char* now = scratch.take<char>(SIZES[i]);
                require(round == 0 || now >= end + SIZES[i - 1], "pieces do not overlap");
                now[SIZES[i] - 1] = 1, end = now;
            }
            // The first round finds out how much it is.
            require(round < 2 || (first == seen && end == last),
                    "a round finds the room of the last");
            seen = first, last = end;
            scratch.release(mark);
        }
        require(kept[0] == 7, "what is older than the mark stays");
        scratch.reset();
    }
    std::puts("passed");
}
