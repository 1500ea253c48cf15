// A small thread pool: tasks are handed out one by one from an atomic counter, so a slow or busy
// core costs one task. Waiting threads look for work for some microseconds and then sleep: no
// thread spins for long on a core that another process could use.
#pragma once
#include <cstdint>
#include <memory>
#include <type_traits>

namespace moedial {

using Task = void (*)(void* context, int64_t index);

void set_threads(int64_t count);  // the caller included
int64_t threads();
void run_tasks(int64_t count, Task task, void* context);

// Multiply-adds that take less time than waiting for a thread that lost its core.
constexpr int64_t SMALL = 1 << 16;

// Calls run(i) for every i below count, each once, on any thread; returns when all are done.
// `work`: about how many multiply-adds that is; little work stays on the calling thread.
template <class Run>
void parallel(int64_t count, Run&& run, int64_t work = SMALL) {
    using Plain = std::remove_reference_t<Run>;
    if (count == 1 || work < SMALL) {
        for (int64_t i = 0; i < count; i++) run(i);
        return;
    }
    run_tasks(
        count, [](void* context, int64_t i) { (*static_cast<Plain*>(context))(i); },
        (void*)std::addressof(run));
}

}  // namespace moedial
