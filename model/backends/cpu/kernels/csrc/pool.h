// A thread pool in groups, one for each memory node of the machine. Tasks are claimed one by one
// from a counter of the node that they belong to, so a slow or busy core delays one task only.
// Waiting threads spin for a while and then sleep. Nothing here depends on matrices or tensors.
#pragma once
#include <algorithm>
#include <cstdint>
#include <memory>
#include <type_traits>

namespace moedial {

constexpr int64_t MAX_NODES = 32, MAX_THREADS = 1024;
constexpr int64_t MAX_TASKS = int64_t{1} << 31;  // of one node in one job

// How many tasks each node has.
struct Shares {
    int64_t counts[MAX_NODES] = {};
};

// Runs a task. Tasks are numbered within their node. An exception in a task ends the process: other
// threads would otherwise go on with tasks whose data has been freed.
using Task = void (*)(void* context, int64_t node, int64_t index) noexcept;

// When a thread takes tasks of another node than its own.
enum Stealing {
    ALWAYS,  // when its own node has none left
    LATE,    // only the calling thread, when it has waited long for a node whose threads are busy
    NEVER,
};

struct Nodes {
    int64_t count = 1;               // groups of threads
    int64_t cores[MAX_NODES] = {1};  // of each: threads are dealt out in proportion
    // [cpus]: each processor's node, -1 if the process may not use it. Null: threads are not bound
    // to processors.
    const int64_t* node_of_cpu = nullptr;
    int64_t cpus = 0;
};

void set_threads(int64_t count);  // the caller included; at most MAX_THREADS
int64_t threads();
void set_nodes(const Nodes&);
int64_t nodes();  // those that have threads
// How long a waiting thread spins before it sleeps.
void set_spin_time(int64_t microseconds);

// Runs each node's tasks on at most `team` threads. `stealing` says when a thread takes tasks of
// another node.
void run_tasks(const Shares&, int64_t team, Stealing, Task task, void* context);

// The multiply-adds that make it worth while to wake one more thread: about as many as one thread
// does while another one wakes. For an op that is limited by memory, reading 64 KB of bfloat16
// weights counts as much.
constexpr int64_t WORK_PER_THREAD = 1 << 15;
constexpr int64_t ALL_THREADS = INT64_MAX;  // a `work` that is given to every thread

// How many threads an op of `work` multiply-adds is given.
inline int64_t team(int64_t work) {
    return std::clamp<int64_t>(work / WORK_PER_THREAD, 1, threads());
}

// Where part `node` begins if `count` items are divided into `all` contiguous parts.
inline int64_t part_begin(int64_t count, int64_t node, int64_t all) {
    return node * (count / all) + std::min(node, count % all);
}

// Calls run(node, i) for every i below each node's count; returns when all are done.
template <class Run>
void parallel_on_nodes(const Shares& shares, Stealing stealing, Run&& run, int64_t work) {
    using Plain = std::remove_reference_t<Run>;
    run_tasks(
        shares, team(work), stealing,
        [](void* context, int64_t node, int64_t i) noexcept {
            (*static_cast<Plain*>(context))(node, i);
        },
        (void*)std::addressof(run));
}

// Calls run(i) for every i below count, each once, on any thread; returns when all are done.
// `work`: about how many multiply-adds that is; little work stays on the calling thread.
template <class Run>
void parallel(int64_t count, Run&& run, int64_t work = ALL_THREADS) {
    if (count == 1 || team(work) == 1) {
        for (int64_t i = 0; i < count; i++) run(i);
        return;
    }
    const int64_t all = nodes();
    for (int64_t done = 0, now; done < count; done += now) {
        now = std::min(count - done, MAX_TASKS);
        Shares shares;
        for (int64_t node = 0; node < all; node++)
            shares.counts[node] = part_begin(now, node + 1, all) - part_begin(now, node, all);
        parallel_on_nodes(
            shares, ALWAYS,
            [&](int64_t node, int64_t i) { run(done + part_begin(now, node, all) + i); }, work);
    }
}

}  // namespace moedial
