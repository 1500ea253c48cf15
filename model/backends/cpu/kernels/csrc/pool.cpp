// The thread pool of `pool.h`. One job at a time: the ops hold a lock.
#include "pool.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace moedial {
namespace {

constexpr int64_t SPIN_TIME_US = 50;                        // about the time between two layers
constexpr auto LONG_WAIT = std::chrono::microseconds(100);  // longer than most tasks
constexpr uint64_t NEXT_MASK = UINT32_MAX;
constexpr int32_t NO_RANK = INT32_MAX;  // of a thread that takes no tasks

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

// What the threads of a node share. What they write and what they only read while they wait are in
// cache lines of their own: no thread that waits must slow down those that work.
struct Node {
    alignas(64) std::atomic<uint64_t> state{0};  // tasks << 32 | next task, which may run over
    alignas(64) std::atomic<int64_t> done{0};    // of its tasks, on any thread
    alignas(64) std::atomic<uint32_t> job{0};    // the number of the job
    std::atomic<int32_t> members{0};             // threads of the node that take part
    std::atomic<bool> open{true};                // they may take tasks of other nodes
    Task task = nullptr;
    void* context = nullptr;

    // Takes tasks of the current job until there are none. `task` is read after a claim: a claim
    // that succeeds is of the current job, even if the thread is late from an earlier one. `done`
    // is raised once, at the end: the job cannot end before.
    void take(int64_t number) {
        int64_t taken = 0;
        while (true) {
            uint64_t seen = state.load(std::memory_order_relaxed);
            if ((seen & NEXT_MASK) >= seen >> 32) break;
            seen = state.fetch_add(1, std::memory_order_acq_rel);
            if ((seen & NEXT_MASK) >= seen >> 32) break;
            task(context, number, static_cast<int64_t>(seen & NEXT_MASK));
            taken++;
        }
        if (taken) done.fetch_add(taken, std::memory_order_release);
    }
};

struct alignas(64) Worker {
    std::atomic<uint32_t> asleep{0};
    std::atomic<int32_t> node{0}, rank{NO_RANK};  // the caller is rank 0 of node 0
    pthread_t thread{};
};

struct Pool {
    Node nodes[MAX_NODES];
    Worker workers[MAX_THREADS];
    std::atomic<int64_t> used{1};  // nodes that have threads
    std::atomic<int64_t> spin_time{SPIN_TIME_US};
    int64_t wanted = 1, started = 1;  // threads, the caller included
    int64_t given = 1;                // nodes
    int64_t cores[MAX_NODES] = {1};
    int64_t counts[MAX_NODES] = {1};  // threads of each node
    std::vector<int64_t> node_of_cpu;
    int64_t first_worker[MAX_NODES] = {};
    cpu_set_t allowed{};  // processors of the process when the pool was made
    bool bound = false;   // threads to the processors of their nodes
    uint32_t job = 0;

    Pool() { sched_getaffinity(0, sizeof allowed, &allowed); }

    // Takes tasks of node `home`, then, if that is allowed, of the others.
    void drain(int64_t home, bool others) {
        nodes[home].take(home);
        const int64_t all = others ? used.load(std::memory_order_relaxed) : 1;
        for (int64_t i = 1; i < all; i++) {
            const int64_t node = (home + i) % all;
            nodes[node].take(node);
        }
    }

    void wake(int64_t number) {
        if (number >= MAX_THREADS) return;  // a thread that is late may count by an earlier job
        Worker& worker = workers[number];
        if (worker.asleep.load() && worker.asleep.exchange(0)) worker.asleep.notify_one();
    }

    // Threads wake each other as a tree: thread `rank` of a node wakes 2 rank + 1 and 2 rank + 2.
    void wake_below(int64_t number, int32_t rank, int32_t members) {
        for (int32_t below = 2 * rank + 1; below <= 2 * rank + 2 && below < members; below++)
            wake(number - rank + below);
    }

    // The loop of thread `number`: waits for a job, wakes its part of the tree, takes tasks.
    void work(int64_t number) {
        Worker& self = workers[number];
        uint32_t seen = 0;
        while (true) {
            seen = await(self, seen);
            const int32_t home = self.node.load(std::memory_order_relaxed);
            const int32_t rank = self.rank.load(std::memory_order_relaxed);
            Node& node = nodes[home];
            const int32_t members = node.members.load(std::memory_order_relaxed);
            if (rank >= members) continue;
            wake_below(number, rank, members);
            drain(home, node.open.load(std::memory_order_relaxed));
        }
    }

    // Waits for another job than `seen`; returns its number. A sleeping thread is woken by its
    // parent in the tree, which reads `asleep` after it has seen the job. All of these accesses are
    // sequentially consistent: either this thread sees the job, or the parent sees it asleep.
    uint32_t await(Worker& self, uint32_t seen) {
        const auto job_now = [&] { return nodes[self.node.load()].job.load(); };
        const bool wanted = self.rank.load() != NO_RANK;
        const auto until = std::chrono::steady_clock::now() +
                           std::chrono::microseconds(wanted ? spin_time.load() : 0);
        do {
            for (int i = 0; i < 64; i++) {
                if (const uint32_t now = job_now(); now != seen) return now;
                pause();
            }
        } while (std::chrono::steady_clock::now() < until);
        while (true) {
            self.asleep.store(1);
            if (const uint32_t now = job_now(); now != seen) {
                self.asleep.store(0);
                return now;
            }
            self.asleep.wait(1);
        }
    }

    // The node on which the calling thread runs now.
    int64_t home() const {
        if (!bound) return 0;
        const int cpu = sched_getcpu();
        if (cpu < 0 || cpu >= static_cast<int64_t>(node_of_cpu.size())) return 0;
        const int64_t node = node_of_cpu[cpu];
        return node >= 0 && node < used.load(std::memory_order_relaxed) ? node : 0;
    }

    void publish(const Shares& shares, int64_t team, bool open, Task task, void* context) {
        const int64_t all = used.load(std::memory_order_relaxed);
        const int64_t most = *std::max_element(shares.counts, shares.counts + all);
        job++;
        // All counters are ready before the first task can be claimed: a thread that is late for an
        // earlier job may claim it.
        for (int64_t i = 0; i < all; i++) {
            Node& node = nodes[i];
            node.done.store(0, std::memory_order_relaxed);
            const int64_t part = (team * counts[i] + wanted - 1) / wanted;
            node.members.store(static_cast<int32_t>(std::clamp<int64_t>(part, 1, most)),
                               std::memory_order_relaxed);
            node.open.store(open, std::memory_order_relaxed);
            node.task = task, node.context = context;
        }
        for (int64_t i = 0; i < all; i++)
            nodes[i].state.store(static_cast<uint64_t>(shares.counts[i]) << 32,
                                 std::memory_order_release);
        for (int64_t i = 0; i < all; i++) nodes[i].job.store(job);
        for (int64_t i = 1; i < all; i++) wake(first_worker[i]);
        wake_below(0, 0, nodes[0].members.load(std::memory_order_relaxed));
    }

    int64_t tasks_done() const {
        int64_t done = 0;
        for (int64_t i = 0; i < used.load(std::memory_order_relaxed); i++)
            done += nodes[i].done.load(std::memory_order_acquire);
        return done;
    }

    void run(const Shares& shares, int64_t total, int64_t team, Stealing stealing, Task task,
             void* context) {
        publish(shares, team, stealing == ALWAYS, task, context);
        // The caller counts as one of node 0, which may have no other thread.
        const int64_t here = home();
        drain(here, stealing == ALWAYS);
        if (here != 0) nodes[0].take(0);
        const bool helps = stealing == LATE && used > 1;
        const auto late = std::chrono::steady_clock::now() + LONG_WAIT;
        for (int64_t i = 1; tasks_done() != total; i++) {
            if (i % 256) {
                pause();
                continue;
            }
            // A task is on a thread that lost its core; those of a whole node may have lost theirs.
            if (helps && std::chrono::steady_clock::now() < late) continue;
            if (helps) drain(here, true);
            sched_yield();
        }
    }

    // Gives each thread its node and rank, in proportion to the nodes' cores, and starts those that
    // are missing.
    void assign() {
        const int64_t all = std::min(given, wanted);
        std::fill_n(counts, MAX_NODES, 0);
        for (int64_t i = 0; i < wanted; i++) {
            int64_t least = 0;
            for (int64_t node = 1; node < all; node++)
                if (counts[node] * cores[least] < counts[least] * cores[node]) least = node;
            counts[least]++;
        }
        used = all;
        int64_t number = 0;
        for (int64_t node = 0; node < all; node++) {
            first_worker[node] = number;
            for (int32_t rank = 0; rank < counts[node]; rank++, number++)
                workers[number].node = static_cast<int32_t>(node), workers[number].rank = rank;
        }
        for (; number < started; number++) workers[number].node = 0, workers[number].rank = NO_RANK;
        for (; started < wanted; started++) {
            std::thread thread(&Pool::work, this, started);
            workers[started].thread = thread.native_handle();
            thread.detach();
        }
        bind();
    }

    // Keeps threads on the processors of their node, where there are several. Where the system
    // refuses, they stay where they are.
    void bind() {
        const bool before = bound;
        bound = used > 1 && !node_of_cpu.empty();
        if (!bound && !before) return;
        for (int64_t number = 1; number < started; number++) {
            const Worker& worker = workers[number];
            const cpu_set_t set = bound && worker.rank != NO_RANK ? cpus_of(worker.node) : allowed;
            pthread_setaffinity_np(worker.thread, sizeof set, &set);
        }
    }

    cpu_set_t cpus_of(int64_t node) const {
        cpu_set_t set;
        CPU_ZERO(&set);
        for (size_t cpu = 0; cpu < node_of_cpu.size(); cpu++)
            if (node_of_cpu[cpu] == node) CPU_SET(cpu, &set);
        return set;
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
    the_pool().assign();
}

int64_t threads() { return the_pool().wanted; }

void set_nodes(const Nodes& given) {
    Pool& pool = the_pool();
    pool.given = given.count;
    std::copy_n(given.cores, given.count, pool.cores);
    pool.node_of_cpu.assign(given.node_of_cpu, given.node_of_cpu + given.cpus);
    pool.assign();
}

int64_t nodes() { return the_pool().used.load(std::memory_order_relaxed); }

void set_spin_time(int64_t microseconds) { the_pool().spin_time = microseconds; }

void run_tasks(const Shares& shares, int64_t team, Stealing stealing, Task task, void* context) {
    Pool& pool = the_pool();
    const int64_t all = nodes();
    int64_t total = 0;
    for (int64_t node = 0; node < all; node++) total += shares.counts[node];
    if (team > 1 && total > 1) return pool.run(shares, total, team, stealing, task, context);
    for (int64_t node = 0; node < all; node++)
        for (int64_t i = 0; i < shares.counts[node]; i++) task(context, node, i);
}

}  // namespace moedial
