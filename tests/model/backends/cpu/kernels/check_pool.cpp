// The thread pool alone, in random jobs: each task once, on the threads that may take it, and all
// that it wrote visible to the caller. Run it under the thread sanitizer: `make test-pool`.
//
//     check_pool JOBS SEED
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "pool.h"

using namespace moedial;

std::mt19937 rng;
bool bound = false;  // threads to processors: the caller then is where it happens to be
int64_t kept_apart = 0, mixed = 0;  // jobs whose nodes should share no threads, and those that did

int64_t random_to(int64_t most) { return std::uniform_int_distribution<int64_t>(0, most)(rng); }

void require(bool fact, const char* what) {
    if (fact) return;
    std::fprintf(stderr, "failed: %s\n", what);
    std::exit(1);
}

// A job of tasks that write plain memory, in which the sanitizer sees what is not ordered.
void random_job() {
    struct Done {
        int64_t times = 0;
        std::thread::id by;
    };
    const int64_t all = nodes();
    std::vector<std::vector<Done>> done(all);
    Shares shares;
    for (int64_t node = 0; node < all; node++) {
        shares.counts[node] = random_to(3) ? random_to(20) : 0;
        done[node].resize(shares.counts[node]);
    }
    const Stealing stealing = Stealing(random_to(2));
    const int64_t spins = random_to(200),
                  work = random_to(1) ? ALL_THREADS : WORK_PER_THREAD * random_to(8);
    int64_t total = 0;
    for (int64_t node = 0; node < all; node++) total += shares.counts[node];
    parallel_on_nodes(
        shares, stealing,
        [&](int64_t node, int64_t i) {
            for (volatile int64_t spin = 0; spin < spins;) spin = spin + 1;
            done[node][i].times++, done[node][i].by = std::this_thread::get_id();
        },
        work);
    std::vector<std::set<std::thread::id>> by(all);
    for (int64_t node = 0; node < all; node++)
        for (const Done& one : done[node]) {
            require(one.times == 1, "a task ran once");
            by[node].insert(one.by);
        }
    if (stealing != NEVER || bound || team(work) == 1 || total < 2) return;
    std::set<std::thread::id> together;
    size_t apart = 0;
    for (const auto& ids : by) together.insert(ids.begin(), ids.end()), apart += ids.size();
    (together.size() == apart ? kept_apart : mixed)++;
}

void plain_job() {
    const int64_t count = random_to(300);
    std::vector<int64_t> times(count);
    parallel(count, [&](int64_t i) { times[i]++; });
    for (const int64_t once : times) require(once == 1, "an index ran once");
}

void rearrange() {
    Nodes given{.count = 1 + random_to(4)};
    for (int64_t node = 0; node < given.count; node++) given.cores[node] = 1 + random_to(3);
    // Bound to processors, which may all be on one node, or not.
    bound = random_to(1);
    std::vector<int64_t> node_of_cpu(bound ? sysconf(_SC_NPROCESSORS_ONLN) : 0);
    for (int64_t& node : node_of_cpu) node = random_to(given.count) - 1;
    given.node_of_cpu = node_of_cpu.data(), given.cpus = int64_t(node_of_cpu.size());
    set_nodes(given);
    set_threads(1 + random_to(7));
    set_spin_time(random_to(2) * 30);
    require(nodes() == std::min(given.count, threads()), "each node has a thread");
}

// A forked child has no threads but may start its own.
void fork_once() {
    const pid_t child = fork();
    if (child == 0) {
        require(threads() == 1, "a child begins alone");
        plain_job();
        std::_Exit(0);
    }
    int status = 1;
    waitpid(child, &status, 0);
    require(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a child computes");
}

// A task whose exception would leave the job ends the process instead, on the calling thread too.
void throw_once() {
    const pid_t child = fork();
    if (child == 0) {
        std::set_terminate(std::abort);  // without a word
        set_threads(2);
        const std::thread::id caller = std::this_thread::get_id();
        try {
            parallel(64, [&](int64_t) {
                if (std::this_thread::get_id() == caller) throw 1;
                std::this_thread::sleep_for(std::chrono::seconds(5));
            });
        } catch (int) {
        }
        std::_Exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    require(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "an exception ends the process");
}

// A job for all threads gets all of them, also where one node has more than another: each task ends
// when all have begun.
void meet() {
    for (const int64_t cores : {1, 3, 7}) {
        Nodes given{.count = 2};
        given.cores[0] = cores, given.cores[1] = 1;
        set_nodes(given);
        set_threads(cores + 1);
        Shares shares;
        shares.counts[0] = cores, shares.counts[1] = 1;
        std::atomic<int64_t> begun{0};
        const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
        parallel_on_nodes(
            shares, NEVER,
            [&](int64_t, int64_t) {
                begun++;
                while (begun <= cores) {
                    require(std::chrono::steady_clock::now() < until, "no thread is idle");
                    std::this_thread::yield();
                }
            },
            ALL_THREADS);
    }
}

int main(int, char** given) {
    rng.seed(uint32_t(std::atoi(given[2])));
    throw_once();  // first: the sanitizer lets no child of several threads start more
    meet();
    for (int64_t job = 0; job < std::atoi(given[1]); job++) {
        if (job % 20 == 0) rearrange();
        if (job % 7 == 0) std::this_thread::sleep_for(std::chrono::microseconds(random_to(100)));
        random_to(3) ? random_job() : plain_job();
    }
    // A thread that is late may still go by an earlier job or arrangement: that costs time alone.
    require(mixed <= kept_apart / 20, "nodes share no threads");
    fork_once();
    std::puts("passed");
}
