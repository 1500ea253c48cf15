// Empty tasks on the kernels' thread pool: what a job and a claim cost by threads and nodes. It is
// compiled and run by `benchmarks/threads.py`.
//
//     pool THREADS NODES TASKS JOBS      prints nanoseconds of a job: median, and processor time
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <vector>

#include "pool.h"

int main(int, char** given) {
    const int64_t threads = std::atoi(given[1]), nodes = std::atoi(given[2]);
    const int64_t tasks = std::atoi(given[3]), jobs = std::atoi(given[4]);
    moedial::Nodes groups{.count = nodes};
    std::fill_n(groups.cores, nodes, 1);
    moedial::set_nodes(groups);
    moedial::set_threads(threads);
    std::vector<double> times;
    const std::clock_t used = std::clock();
    for (int64_t job = 0; job < jobs; job++) {
        const auto begun = std::chrono::steady_clock::now();
        moedial::parallel(tasks, [](int64_t) {});
        times.push_back(
            std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now() - begun)
                .count());
    }
    std::sort(times.begin(), times.end());
    const double processor = 1e9 * double(std::clock() - used) / CLOCKS_PER_SEC;
    std::printf("%.0f %.0f\n", times[jobs / 2], processor / double(jobs));
}
