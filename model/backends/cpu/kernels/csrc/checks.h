// Turns torch's tensors into the plain values of `values.h` and `mixtures.h`. Everything that a
// kernel relies on is checked here or in `bind.h`; an error names the argument and what was
// expected.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <pthread.h>

#include <algorithm>
#include <mutex>
#include <optional>
#include <vector>

#include "kernels.h"
#include "scratch.h"

namespace moedial {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// A lock that an op holds while its kernel runs: thread pool and scratch memory are shared, so ops
// run one at a time. A fork waits for the running op, because a child process has none of its
// threads.
struct Op {
    static std::mutex& mutex() {
        static std::mutex* one = [] {
            pthread_atfork([] { mutex().lock(); }, [] { mutex().unlock(); },
                           [] { mutex().unlock(); });
            return new std::mutex;  // outlives all threads
        }();
        return *one;
    }
    std::lock_guard<std::mutex> guard{mutex()};
    ~Op() { scratch().reset(); }
};

// The values of a contiguous tensor whose dtype is T.
template <class T>
T* data(const Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
    TORCH_CHECK(tensor.scalar_type() == c10::CppTypeToScalarType<std::remove_const_t<T>>::value,
                name, " has the wrong dtype, ", tensor.scalar_type());
    return (T*)tensor.data_ptr();
}

// The values of a float32 tensor with `dimensions` dimensions.
inline float* floats(const Tensor& tensor, const char* name, int64_t dimensions = 2) {
    TORCH_CHECK(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ",
                tensor.dim());
    return data<float>(tensor, name);
}

// A float vector that may be missing.
inline const float* vector(const OptionalTensor& tensor, int64_t size, const char* name) {
    if (!tensor) return nullptr;
    TORCH_CHECK(tensor->numel() == size, name, " must have ", size, " values, got ",
                tensor->numel());
    return data<const float>(*tensor, name);
}

inline int64_t up_to(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// The kind of packed weights, by their dtype. uint8 stands for INT8_WEIGHTS.
inline Kind kind_of(const Tensor& packed) {
    switch (packed.scalar_type()) {
        case at::kFloat: return FLOAT;
        case at::kBFloat16: return BFLOAT16;
        case at::kByte: return INT8_WEIGHTS;
        case at::kChar: return INT8;
        default: TORCH_CHECK(false, "packed weights cannot be ", packed.scalar_type());
    }
}

// One of `count` matrices of this shape as they are stored: inputs are padded to a multiple of
// `group`. No product of sizes overflows afterwards: not elements, nor their bytes.
inline Matrix matrix_of(int64_t outputs, int64_t inputs, int64_t group, int64_t count) {
    TORCH_CHECK(outputs > 0 && inputs > 0, "a matrix must have outputs and inputs, got [", outputs,
                ", ", inputs, "]");
    int64_t all_outputs, elements;
    TORCH_CHECK(!__builtin_mul_overflow(count, up_to(outputs, 16), &all_outputs) &&
                    !__builtin_mul_overflow(all_outputs, up_to(inputs, group), &elements) &&
                    elements < int64_t{1} << 56,
                "a matrix of ", count, " x [", outputs, ", ", inputs, "] is too large");
    Matrix made;
    made.outputs = up_to(outputs, 16), made.inputs = up_to(inputs, group);
    return made;
}

// `count` packed matrices [outputs, inputs] behind each other: words by dtype, and for int8 the
// scales' float32 bits and the offsets, int32 [2, count * outputs].
inline Matrix matrix(const Tensor& packed, const OptionalTensor& scales, int64_t outputs,
                     int64_t inputs, int64_t count = 1) {
    Matrix made = matrix_of(outputs, inputs, 4, count);
    made.kind = kind_of(packed);
    const int64_t all_outputs = count * made.outputs;
    TORCH_CHECK(packed.is_contiguous() && packed.numel() == all_outputs * made.inputs,
                "packed weights of ", count, " x [", outputs, ", ", inputs, "] must have ",
                all_outputs * made.inputs, " elements, got ", packed.numel());
    made.data = (const char*)packed.data_ptr();
    if (made.kind == INT8_WEIGHTS || made.kind == INT8) {
        TORCH_CHECK(scales && scales->numel() == 2 * all_outputs, "int8 weights need 2 x ",
                    all_outputs, " scales and offsets");
        made.offsets = data<const int32_t>(*scales, "scales") + all_outputs;
        made.scales = (const float*)scales->data_ptr();
    }
    return made;
}

inline void check_group(int64_t group) {
    TORCH_CHECK(group == 16 || group == 32 || group == 64 || group == 128,
                "a group must have 16, 32, 64 or 128 inputs, got ", group);
}

// How codes are read: by the table of what they stand for, int8 [16] or of 6 bits [64], or without
// one as bytes.
inline GroupCodes group_codes(int64_t group, const OptionalTensor& table, int64_t header) {
    check_group(group);
    TORCH_CHECK(1 <= header && header <= 4,
                "scale and minimum of a group must have 1 to 4 bytes, got ", header);
    GroupCodes codes{.inputs = group, .header = header};
    if (!table) {
        codes.bits = 8, codes.shift = 128, codes.largest = 255;
        return codes;
    }
    const int64_t size = table->numel();
    TORCH_CHECK(size == 16 || size == 64, "a table must have 16 or 64 values, got ", size);
    const int8_t* values = data<const int8_t>(*table, "table");
    if (size == 64) {
        for (int code = 0; code < 64; code++)
            TORCH_CHECK(values[code] == code - 32, "code ", code, " of 6 bits must stand for ",
                        code - 32, ", got ", int(values[code]));
        codes.bits = 6, codes.shift = 32, codes.largest = 63;
        return codes;
    }
    codes.shift = -*std::min_element(values, values + 16);
    codes.largest = *std::max_element(values, values + 16) + codes.shift;
    for (int code = 0; code < 16; code++) {
        codes.entries[code] = uint8_t(values[code] + codes.shift);
        codes.table |= codes.entries[code] != code;
    }
    return codes;
}

// `count` grouped matrices behind each other, and the factors of all outputs.
inline Matrix grouped_matrix(const Tensor& packed, const OptionalTensor& factors,
                             const GroupCodes& codes, int64_t outputs, int64_t inputs,
                             int64_t count) {
    Matrix made = matrix_of(outputs, inputs, codes.inputs, count);
    made.kind = GROUPED, made.codes = codes;
    TORCH_CHECK(factors, "a grouped matrix needs the factors of its outputs");
    made.scales = vector(factors, count * made.outputs, "factors");
    made.data = (const char*)data<const uint8_t>(packed, "a grouped matrix");
    TORCH_CHECK(packed.numel() == count * made.bytes(), "grouped weights of ", count, " x [",
                outputs, ", ", inputs, "] must have ", count * made.bytes(), " bytes, got ",
                packed.numel());
    TORCH_CHECK(codes.bits == 4 || !codes.byte_scale(),
                "scales of 8 bits need codes of 4 bits, got ", codes.bits);
    return made;
}

// The counts of one mixture layer's tokens, without their seeds and positions. They bound what a
// kernel reads and writes, so each one is checked.
inline LayerRows budget_of(const Tensor& counts, int64_t k_max) {
    LayerRows budget;
    budget.counts = data<const int64_t>(counts, "counts");
    budget.tokens = counts.numel(), budget.k_max = k_max;
    for (int64_t token = 0; token < budget.tokens; token++)
        TORCH_CHECK(1 <= budget.counts[token] && budget.counts[token] <= k_max, "count ",
                    budget.counts[token], " is not between 1 and ", k_max);
    return budget;
}

// Checks that no token has more draws than the table of fixed draws has rows.
inline void check_fixed_draws(const LayerRows& budget, const Draws& draws) {
    if (!draws.points) return;
    for (int64_t token = 0; token < budget.tokens; token++)
        TORCH_CHECK(budget.counts[token] <= draws.point_rows, "count ", budget.counts[token],
                    " is higher than the ", draws.point_rows, " fixed draws");
}

// One layer's cache. `values`: how many elements of a key are its value; 0: values are stored
// beside the keys. `blocks` gets the number of blocks.
inline Cache cache_of(const Tensor& cache, int64_t kv_heads, int64_t head_width, int64_t values,
                      int64_t block_size, int64_t& blocks) {
    TORCH_CHECK(0 <= values && values <= head_width && values % 32 == 0, "values cannot be ",
                values, " elements of keys of ", head_width);
    const int64_t parts = values ? 1 : 2;
    const bool quantised = cache.scalar_type() == at::kChar;  // each with 4 bytes of scale
    const int64_t stored = quantised ? head_width + 4 : head_width;
    TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.size(0) == parts &&
                    cache.size(2) == kv_heads && cache.size(3) == stored,
                "the cache must be [", parts, ", slots, ", kv_heads, ", ", stored, "], got ",
                cache.sizes());
    TORCH_CHECK(!quantised || !values, "keys whose elements are values have no int8 form");
    TORCH_CHECK(head_width % 16 == 0 && block_size % 16 == 0 && block_size > 0,
                "head width and block size must be multiples of 16");
    TORCH_CHECK(
        quantised || cache.scalar_type() == at::kFloat || cache.scalar_type() == at::kBFloat16,
        "the cache is ", cache.scalar_type());
    Cache made;
    made.kind = cache.scalar_type() == at::kBFloat16 ? BFLOAT16 : FLOAT;
    made.quantised = quantised;
    made.keys = (int32_t*)cache.data_ptr();
    if (!values) made.values = (int32_t*)((char*)cache.data_ptr() + cache.nbytes() / 2);
    made.kv_heads = kv_heads, made.head_width = head_width;
    made.value_width = values ? values : head_width;
    blocks = cache.size(1) / block_size;
    return made;
}

// Snapshots [N, 3] of spans: each in a slot that neither a span nor another snapshot has.
inline void bind_snapshots(States& states, const Tensor& snapshots, int64_t slots,
                           const Tensor& spans) {
    states.snapshots = (const Snapshot*)data<const int64_t>(snapshots, "snapshots");
    if (!snapshots.numel()) return;
    TORCH_CHECK(snapshots.dim() == 2 && snapshots.size(1) == 3, "snapshots must be [N, 3], got ",
                snapshots.sizes());
    TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 3, "spans must be [B, 3], got ",
                spans.sizes());
    states.snapshot_count = snapshots.size(0);
    const Span* span_at = (const Span*)data<const int64_t>(spans, "spans");
    const int64_t count = spans.size(0);
    for (int64_t i = 0; i < states.snapshot_count; i++) {
        const Snapshot &taken = states.snapshots[i],
                       &before = states.snapshots[std::max<int64_t>(i - 1, 0)];
        TORCH_CHECK(0 <= taken.span && taken.span < count, "a snapshot is of sequence ", taken.span,
                    " of ", count);
        TORCH_CHECK(1 <= taken.rows && taken.rows <= span_at[taken.span].rows,
                    "a snapshot is behind ", taken.rows, " of ", span_at[taken.span].rows, " rows");
        TORCH_CHECK(!i || before.span < taken.span ||
                        (before.span == taken.span && before.rows < taken.rows),
                    "snapshots must be in the order of their rows");
    }
    for (int64_t i = 0; i < states.snapshot_count; i++) {
        const Snapshot& taken = states.snapshots[i];
        bool free = 0 <= taken.slot && taken.slot < slots;
        for (int64_t j = 0; j < count; j++) free &= states.slots[j] != taken.slot;
        for (int64_t j = 0; j < i; j++) free &= states.snapshots[j].slot != taken.slot;
        TORCH_CHECK(free, "slot ", taken.slot, " of a snapshot is taken, or not one of ", slots);
    }
}

// One layer's states [slots, size], the slot of each span's sequence, and the snapshots [N, 3] to
// take.
inline States states_of(const Tensor& states, const Tensor& slots, const Tensor& snapshots,
                        const DeltaBlock& block, const Tensor& spans) {
    const int64_t count = spans.size(0);
    States made{floats(states, "states"), block.state_size(), data<const int64_t>(slots, "slots")};
    TORCH_CHECK(states.size(1) == made.size, "states must be [slots, ", made.size, "], got ",
                states.sizes());
    TORCH_CHECK(slots.numel() == count, "there are ", slots.numel(), " slots for ", count,
                " sequences");
    for (int64_t i = 0; i < count; i++)
        TORCH_CHECK(0 <= made.slots[i] && made.slots[i] < states.size(0), "slot ", made.slots[i],
                    " is not one of ", states.size(0));
    bind_snapshots(made, snapshots, states.size(0), spans);
    return made;
}

// A step's spans [B, 3], without the blocks of their pages. They follow each other and cover
// `rows`.
inline Pages spans_of(const Tensor& spans, int64_t rows) {
    TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 3, "spans must be [B, 3], got ",
                spans.sizes());
    Pages pages;
    pages.spans = (const Span*)data<const int64_t>(spans, "spans");
    pages.count = spans.size(0), pages.rows = rows;
    int64_t next = 0;  // the first row that no span has had
    for (int64_t index = 0; index < pages.count; index++) {
        const Span& span = pages.spans[index];
        TORCH_CHECK(span.first == next && span.rows > 0 && span.context >= span.rows, "span ",
                    index, " does not follow");
        next += span.rows;
    }
    TORCH_CHECK(next == rows, "spans cover ", next, " rows of ", rows);
    return pages;
}

// A step's spans with their block tables [B, P].
inline Pages pages_of(const Tensor& spans, const Tensor& tables, int64_t rows, int64_t block_size,
                      int64_t blocks) {
    Pages pages = spans_of(spans, rows);
    TORCH_CHECK(tables.dim() == 2 && tables.size(0) == pages.count, "tables must be [", pages.count,
                ", P], got ", tables.sizes());
    pages.tables = data<const int64_t>(tables, "tables");
    pages.table_width = tables.size(1), pages.block_size = block_size;
    for (int64_t index = 0; index < pages.count; index++) {
        const Span& span = pages.spans[index];
        const int64_t used = (span.context + block_size - 1) / block_size;
        TORCH_CHECK(used <= pages.table_width, "span ", index, " needs ", used,
                    " blocks, the table has ", pages.table_width);
        for (int64_t i = 0; i < used; i++) {
            const int64_t block = pages.tables[index * pages.table_width + i];
            TORCH_CHECK(0 <= block && block < blocks, "block ", block, " is not in the cache");
        }
    }
    return pages;
}

// Embeddings [count, width], not packed; an empty table if there are none.
inline Table table_of(const OptionalTensor& rows, int64_t width, const char* name) {
    if (!rows) return {};
    TORCH_CHECK(rows->dim() == 2 && rows->size(1) == width && rows->is_contiguous(), name,
                " must be [count, ", width, "]");
    TORCH_CHECK(rows->scalar_type() == at::kFloat || rows->scalar_type() == at::kBFloat16, name,
                " cannot be ", rows->scalar_type());
    const Kind kind = rows->scalar_type() == at::kFloat ? FLOAT : BFLOAT16;
    return {kind, (const char*)rows->data_ptr(), rows->size(0)};
}

// An uninitialised tensor of another shape.
inline Tensor like(const Tensor& tensor, std::vector<int64_t> shape) {
    return at::empty(shape, tensor.options());
}

}  // namespace moedial
