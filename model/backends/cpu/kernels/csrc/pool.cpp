// The thread pool of `pool.h`. One job at a time: the ops hold a lock.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace moedial {
namespace {

constexpr auto PATIENCE = std::chrono::microseconds(50);
constexpr int64_t BITS = 24;  // of the next index and of the count inside `state`
constexpr uint64_t MASK = (uint64_t{1} << BITS) - 1;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

struct Pool {
    alignas(64) std::atomic<uint64_t> state{0};  // count << BITS | next index
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> epoch{0};  // rises with every job
    std::atomic<uint32_t> asleep{0};
    std::atomic<int64_t> wanted{1};  // threads, the caller included
    int64_t started = 1;
    Tile tile = nullptr;
    void* context = nullptr;

    // A claim can only succeed on the current job: its count and index are one word. `tile` is read
    // after the claim.
    void drain() {
        uint64_t seen = state.load(std::memory_order_acquire);
        while ((seen & MASK) < seen >> BITS) {
            if (!state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            tile(context, static_cast<int64_t>(seen & MASK));
            done.fetch_add(1, std::memory_order_release);
            seen = state.load(std::memory_order_acquire);
        }
    }

    void work(int64_t number) {
        uint32_t seen = 0;
        while (true) {
            await(seen);
            seen = epoch.load(std::memory_order_acquire);
            if (number < wanted.load(std::memory_order_relaxed)) drain();
        }
    }

    void await(uint32_t seen) {
        const auto until = std::chrono::steady_clock::now() + PATIENCE;
        do {
            for (int i = 0; i < 64; i++) {
                if (epoch.load(std::memory_order_acquire) != seen) return;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        asleep.fetch_add(1);
        epoch.wait(seen);
        asleep.fetch_sub(1);
    }

    void run(int64_t count, Tile f, void* with) {
        tile = f, context = with;
        done.store(0, std::memory_order_relaxed);
        state.store(static_cast<uint64_t>(count) << BITS, std::memory_order_release);
        epoch.fetch_add(1);
        if (asleep.load()) epoch.notify_all();
        drain();
        for (int64_t i = 1; done.load(std::memory_order_acquire) != count; i++) {
            if (i % 256)
                pause();
            else
                sched_yield();  // a tile is on a thread that lost its core
        }
    }

    void start() {
        for (; started < wanted.load(); started++) std::thread(&Pool::work, this, started).detach();
    }
};

// Never destroyed: its threads sleep until the process ends.
Pool* pool = nullptr;

Pool& the_pool() {
    if (!pool) {
        pool = new Pool;
        pthread_atfork(nullptr, nullptr,
                       [] { pool = new Pool; });  // a forked child has none of the threads
    }
    return *pool;
}

}  // namespace

void set_threads(int64_t count) {
    the_pool().wanted = count;
    the_pool().start();
}

int64_t threads() { return the_pool().wanted; }

void run_tiles(int64_t count, Tile tile, void* context) {
    Pool& pool = the_pool();
    // More tiles than a word can count are run in turns.
    for (int64_t first = 0; first < count;) {
        struct Shifted {
            Tile tile;
            void* context;
            int64_t first;
        } shifted{tile, context, first};
        const int64_t now = std::min(count - first, static_cast<int64_t>(MASK));
        if (pool.wanted == 1 || now == 1) {
            for (int64_t i = 0; i < now; i++) tile(context, first + i);
        } else {
            pool.run(
                now,
                [](void* s, int64_t i) {
                    auto& t = *static_cast<Shifted*>(s);
                    t.tile(t.context, t.first + i);
                },
                &shifted);
        }
        first += now;
    }
}

}  // namespace moedial
