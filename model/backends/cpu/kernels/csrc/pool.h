// A small thread pool: tiles are handed out one by one from an atomic counter, so a slow or busy
// core costs one tile. Waiting threads look for work for some microseconds and then sleep: nobody
// spins beside a busy neighbour.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace moedial {

using Tile = void (*)(void* context, int64_t index);

void set_threads(int64_t count);  // the caller included
int64_t threads();
void run_tiles(int64_t count, Tile tile, void* context);

constexpr int64_t SMALL =
    1 << 16;  // multiply-adds that take less time than waiting for a thread that lost its core

// Calls f(i) for every i below count, each once, on any thread; returns when all are done. `work`:
// about how many multiply-adds that is; little work stays on the calling thread.
template <class F>
void parallel(int64_t count, F&& f, int64_t work = SMALL) {
    using G = std::remove_reference_t<F>;
    if (count == 1 || work < SMALL) {
        for (int64_t i = 0; i < count; i++) f(i);
        return;
    }
    run_tiles(
        count, [](void* g, int64_t i) { (*static_cast<G*>(g))(i); }, (void*)std::addressof(f));
}

}  // namespace moedial
