// The thread pool of `pool.h`. One job at a time: the ops hold a lock.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace moedial {
namespace {

constexpr auto PATIENCE = std::chrono::microseconds(50);  // about the time between two layers
constexpr int64_t INDEX_BITS = 24;  // of the next index and of the count inside `state`
constexpr uint64_t INDEX_MASK = (uint64_t{1} << INDEX_BITS) - 1;

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

struct Pool {
    // Each in a cache line of its own: a thread that waits for one must not slow the others down.
    alignas(64) std::atomic<uint64_t> state{0};  // count << INDEX_BITS | next index
    alignas(64) std::atomic<int64_t> done{0};
    alignas(64) std::atomic<uint32_t> epoch{0};  // rises with every job
    std::atomic<uint32_t> asleep{0};
    std::atomic<int64_t> wanted{1};  // threads, the caller included
    int64_t started = 1;
    Task task = nullptr;
    void* context = nullptr;

    // Take tasks of the current job until there are none. A claim can only succeed on the current
    // job: its count and index are one word. `task` is read after the claim.
    void drain() {
        uint64_t seen = state.load(std::memory_order_acquire);
        while ((seen & INDEX_MASK) < seen >> INDEX_BITS) {
            if (!state.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) continue;
            task(context, static_cast<int64_t>(seen & INDEX_MASK));
            done.fetch_add(1, std::memory_order_release);
            seen = state.load(std::memory_order_acquire);
        }
    }

    // The life of thread `number`. One beyond those that are wanted sleeps on.
    void work(int64_t number) {
        uint32_t seen = 0;
        while (true) {
            await(seen);
            seen = epoch.load(std::memory_order_acquire);
            if (number < wanted.load(std::memory_order_relaxed)) drain();
        }
    }

    // Until there is another job than `seen`.
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

    void run(int64_t count, Task job, void* with) {
        task = job, context = with;
        done.store(0, std::memory_order_relaxed);
        state.store(static_cast<uint64_t>(count) << INDEX_BITS, std::memory_order_release);
        epoch.fetch_add(1);
        if (asleep.load()) epoch.notify_all();
        drain();
        for (int64_t i = 1; done.load(std::memory_order_acquire) != count; i++) {
            if (i % 256)
                pause();
            else
                sched_yield();  // a task is on a thread that lost its core
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
        // A forked child has none of the threads.
        pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
    }
    return *pool;
}

}  // namespace

void set_threads(int64_t count) {
    the_pool().wanted = count;
    the_pool().start();
}

int64_t threads() { return the_pool().wanted; }

void run_tasks(int64_t count, Task task, void* context) {
    Pool& pool = the_pool();
    // More tasks than a word can count are run in turns.
    for (int64_t first = 0; first < count;) {
        struct Shifted {
            Task task;
            void* context;
            int64_t first;
        } shifted{task, context, first};
        const int64_t now = std::min(count - first, static_cast<int64_t>(INDEX_MASK));
        if (pool.wanted == 1 || now == 1) {
            for (int64_t i = 0; i < now; i++) task(context, first + i);
        } else {
            const auto run_one = [](void* given, int64_t i) {
                const auto& turn = *static_cast<Shifted*>(given);
                turn.task(turn.context, turn.first + i);
            };
            pool.run(now, run_one, &shifted);
        }
        first += now;
    }
}

}  // namespace moedial
