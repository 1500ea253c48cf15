// Allocates memory for weights: in huge pages where the system gives them, which saves TLB misses.
// On a machine with several memory nodes each node gets the part of the weights that its threads
// read.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>

#include "checks.h"
#include "pool.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace moedial {

constexpr int64_t HUGE_PAGE = 2 << 20, PAGE = 4096;

// Touches every page of `matrices` matrices, each of `outputs` outputs, from a thread of the node
// that will multiply it: the system puts a page on the node that touches it first. A page belongs
// to the part in which it begins.
inline void touch_on_nodes(char* start, int64_t bytes, int64_t matrices, int64_t outputs) {
    const int64_t size = bytes / matrices, all = nodes(), panels = up_to(outputs, 64) / 64;
    const int64_t panel_bytes = size / outputs * 64;
    Shares shares;
    std::fill_n(shares.counts, all, matrices);
    Op op;
    parallel_on_nodes(
        shares, NEVER,
        [&](int64_t node, int64_t matrix) {
            const auto begin = [&](int64_t at) {
                return matrix * size + std::min(size, part_begin(panels, at, all) * panel_bytes);
            };
            for (int64_t at = up_to(begin(node), PAGE); at < begin(node + 1); at += PAGE)
                __atomic_fetch_or(start + at, char{0}, __ATOMIC_RELAXED);
        },
        ALL_THREADS);
}

// Returns `bytes` zero bytes, aligned to a huge page. The mapping is one huge page longer, because
// the system may begin it at any small page. If the memory is for `matrices` packed matrices of
// `outputs` outputs each, every node gets its part of them; small parts get small pages.
inline Tensor allocate_op(int64_t bytes, int64_t matrices, int64_t outputs) {
    TORCH_CHECK(bytes >= 0 && matrices >= 0 && (!matrices || outputs > 0), "cannot allocate ",
                bytes, " bytes for ", matrices, " matrices of ", outputs, " outputs");
    const int64_t size = up_to(std::max<int64_t>(bytes, 1), HUGE_PAGE);
    char* raw = (char*)mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(raw != MAP_FAILED, "out of memory: ", bytes, " bytes");
    char* start = (char*)up_to((int64_t)raw, HUGE_PAGE);
    const bool placed = matrices && nodes() > 1;
#ifdef MADV_HUGEPAGE
    // A part may begin or end on another node by less than a page: of a huge one, 1/8 of the part.
    const bool small = placed && bytes / matrices / nodes() < 8 * HUGE_PAGE;
    madvise(start, size, small ? MADV_NOHUGEPAGE : MADV_HUGEPAGE);
#endif
    if (placed) touch_on_nodes(start, bytes, matrices, outputs);
    const auto free = [=](void*) {
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(start, size);
#endif
        munmap(raw, size + HUGE_PAGE);
    };
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(start + bytes, size - bytes);  // so that an overrun is seen
#endif
    return at::from_blob(start, {bytes}, free, at::TensorOptions(at::kByte));
}

}  // namespace moedial
