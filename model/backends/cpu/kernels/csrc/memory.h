// Memory that lives as long as a model: in huge pages where the system gives them, so that few
// address look-ups are missed.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>

#include "checks.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace moedial {

// `bytes` zero bytes. The system maps small pages at any address: one huge page more leaves room to
// begin at a multiple of its size.
inline Tensor allocate_op(int64_t bytes) {
    constexpr int64_t HUGE_PAGE = 2 << 20;
    const int64_t size = up_to(std::max<int64_t>(bytes, 1), HUGE_PAGE);
    char* raw = (char*)mmap(nullptr, size + HUGE_PAGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(raw != MAP_FAILED, "out of memory: ", bytes, " bytes");
    char* start = (char*)up_to((int64_t)raw, HUGE_PAGE);
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
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
