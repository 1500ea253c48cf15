// The kernels as torch operators. Everything that a kernel takes for granted is checked here, once.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <mutex>
#include <variant>

#include "kernels.h"
#include "pool.h"
#include "scratch.h"
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace moedial {

Scratch& scratch() {
    static Scratch* one = new Scratch;
    return *one;
}

namespace {

using at::Tensor;
using Maybe = const std::optional<Tensor>&;

// One op at a time: pool and scratch memory are shared.
struct Op {
    static std::mutex& mutex() {
        static std::mutex* one = new std::mutex;
        return *one;
    }
    std::lock_guard<std::mutex> guard{mutex()};
    ~Op() { scratch().reset(); }
};

template <class T>
T* data(const Tensor& t, const char* name) {
    TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
    TORCH_CHECK(t.scalar_type() == c10::CppTypeToScalarType<std::remove_const_t<T>>::value, name,
                " has the wrong dtype, ", t.scalar_type());
    return (T*)t.data_ptr();
}

float* floats(const Tensor& t, const char* name, int64_t dimensions = 2) {
    TORCH_CHECK(t.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ",
                t.dim());
    return data<float>(t, name);
}

const float* vector(Maybe t, int64_t n, const char* name) {
    if (!t) return nullptr;
    TORCH_CHECK(t->numel() == n, name, " must have ", n, " values, got ", t->numel());
    return data<const float>(*t, name);
}

Norm norm_of(Maybe weight, Maybe bias, double eps, int64_t width) {
    return {vector(weight, width, "norm weight"), vector(bias, width, "norm bias"), float(eps)};
}

int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// A packed matrix [n, k] (times `count`): words by dtype, and for int8 scales and offsets, int32
// [2, count * n].
Matrix matrix(const Tensor& words, Maybe side, int64_t n, int64_t k, int64_t count = 1) {
    TORCH_CHECK(n > 0 && k > 0, "a matrix must have outputs and inputs, got [", n, ", ", k, "]");
    Matrix m;
    m.n = up_to(n, 16), m.k = up_to(k, 4);
    switch (words.scalar_type()) {
        case at::kFloat: m.kind = FLOAT; break;
        case at::kBFloat16: m.kind = BFLOAT; break;
        case at::kByte: m.kind = BYTES; break;
        case at::kChar: m.kind = QUANTUM; break;
        default: TORCH_CHECK(false, "packed weights cannot be ", words.scalar_type());
    }
    TORCH_CHECK(words.is_contiguous() && words.numel() == count * m.n * m.k, "packed weights of ",
                count, " x [", n, ", ", k, "] must have ", count * m.n * m.k, " elements, got ",
                words.numel());
    m.data = (const char*)words.data_ptr();
    if (m.kind == BYTES || m.kind == QUANTUM) {
        TORCH_CHECK(side && side->numel() == 2 * count * m.n, "int8 weights need 2 x ", count * m.n,
                    " scales and offsets");
        m.offset = data<const int32_t>(*side, "scales") + count * m.n;
        m.scale = (const float*)side->data_ptr();
    }
    return m;
}

Experts experts_of(const Tensor& up, Maybe up_side, const Tensor& down, Maybe down_side,
                   int64_t count, int64_t units, int64_t width, bool gated, int64_t activation) {
    TORCH_CHECK(count > 0 && units > 0 && width > 0, "experts need at least one unit and input");
    TORCH_CHECK(0 <= activation && activation <= RELU, "activation ", activation, " is not known");
    Experts e;
    e.units = up_to(units, 16), e.gated = gated, e.activation = Activation(activation);
    e.up = matrix(up, up_side, gated ? 2 * e.units : e.units, width, count);
    e.down = matrix(down, down_side, width, e.units, count);
    return e;
}

// Ascending row numbers are needed for nothing but memory safety; the counts bound what is read and
// written.
Tokens tokens_of(const Tensor& counts, int64_t k_max) {
    Tokens t;
    t.counts = data<const int64_t>(counts, "counts");
    t.count = counts.numel(), t.k_max = k_max;
    for (int64_t i = 0; i < t.count; i++)
        TORCH_CHECK(1 <= t.counts[i] && t.counts[i] <= k_max, "count ", t.counts[i],
                    " is not between 1 and ", k_max);
    return t;
}

int64_t sum_of(const Tokens& t) {
    int64_t total = 0;
    for (int64_t i = 0; i < t.count; i++) total += t.counts[i];
    return total;
}

Cache cache_of(const Tensor& cache, int64_t kv_heads, int64_t head, int64_t block_size,
               int64_t& blocks) {
    TORCH_CHECK(cache.is_contiguous() && cache.dim() == 4 && cache.size(0) == 2 &&
                    cache.size(2) == kv_heads && cache.size(3) == head,
                "the cache must be [2, slots, ", kv_heads, ", ", head, "], got ", cache.sizes());
    TORCH_CHECK(head % 16 == 0 && block_size % 16 == 0 && block_size > 0,
                "head width and block size must be multiples of 16");
    TORCH_CHECK(cache.scalar_type() == at::kFloat || cache.scalar_type() == at::kBFloat16,
                "the cache is ", cache.scalar_type());
    Cache c;
    c.kind = cache.scalar_type() == at::kFloat ? FLOAT : BFLOAT;
    c.keys = (int32_t*)cache.data_ptr();
    c.values = (int32_t*)((char*)cache.data_ptr() + cache.nbytes() / 2);
    c.kv_heads = kv_heads, c.head_width = head;
    blocks = cache.size(1) / block_size;
    return c;
}

Pages pages_of(const Tensor& spans, const Tensor& tables, int64_t rows, int64_t block_size,
               int64_t blocks) {
    TORCH_CHECK(spans.dim() == 2 && spans.size(1) == 3 && tables.dim() == 2 &&
                    tables.size(0) == spans.size(0),
                "spans must be [B, 3] and tables [B, P]");
    Pages p;
    p.spans = (const Span*)data<const int64_t>(spans, "spans");
    p.tables = data<const int64_t>(tables, "tables");
    p.count = spans.size(0), p.rows = rows, p.width = tables.size(1), p.block_size = block_size;
    int64_t next = 0;
    for (int64_t s = 0; s < p.count; s++) {
        const Span& span = p.spans[s];
        TORCH_CHECK(span.first == next && span.rows > 0 && span.context >= span.rows, "span ", s,
                    " does not follow");
        next += span.rows;
        const int64_t used = (span.context + block_size - 1) / block_size;
        TORCH_CHECK(used <= p.width, "span ", s, " needs ", used, " blocks, the table has ",
                    p.width);
        for (int64_t i = 0; i < used; i++) {
            const int64_t block = p.tables[s * p.width + i];
            TORCH_CHECK(0 <= block && block < blocks, "block ", block, " is not in the cache");
        }
    }
    TORCH_CHECK(next == rows, "spans cover ", next, " rows of ", rows);
    return p;
}

Attention attention_of(int64_t heads, int64_t kv_heads, double scale, int64_t window,
                       double softcap, Maybe sinks) {
    TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0 && heads / kv_heads <= 32, heads,
                " heads cannot share ", kv_heads, " key-value heads (at most 32 each)");
    Attention a;
    a.heads = heads, a.scale = float(scale), a.window = window, a.softcap = float(softcap);
    a.sinks = vector(sinks, heads, "sinks");
    return a;
}

Tensor like(const Tensor& x, std::vector<int64_t> shape) { return at::empty(shape, x.options()); }

}  // namespace

Tensor linear_op(const Tensor& x, Maybe norm_weight, Maybe norm_bias, double eps,
                 const Tensor& words, Maybe side, int64_t n, Maybe bias) {
    const float* in = floats(x, "x");
    const int64_t rows = x.size(0), width = x.size(1);
    const Linear layer{matrix(words, side, n, width), vector(bias, n, "bias")};
    const Norm before = norm_of(norm_weight, norm_bias, eps, width);
    Tensor y = like(x, {rows, n});
    Op op;
    if (rows) linear(in, rows, width, before, layer, false, n, y.data_ptr<float>());
    return y;
}

Tensor experts_op(const Tensor& x, const Tensor& token, const Tensor& weight, const Tensor& ends,
                  const Tensor& up, Maybe up_side, const Tensor& down, Maybe down_side,
                  int64_t units, bool gated, int64_t activation) {
    const float* in = floats(x, "x");
    const int64_t rows = x.size(0), width = x.size(1), count = ends.numel(), pairs = token.numel();
    const Experts e =
        experts_of(up, up_side, down, down_side, count, units, width, gated, activation);
    const Calls calls{data<const int32_t>(token, "token"), vector(weight, pairs, "weight"),
                      data<const int64_t>(ends, "ends"), count};
    int64_t start = 0;
    for (int64_t i = 0; i < count; start = calls.ends[i++])
        TORCH_CHECK(calls.ends[i] >= start, "ends must not fall");
    TORCH_CHECK(start == pairs, "ends cover ", start, " pairs of ", pairs);
    for (int64_t i = 0; i < pairs; i++)
        TORCH_CHECK(0 <= calls.token[i] && calls.token[i] < rows, "token ", calls.token[i]);
    Tensor y = like(x, {rows, width});
    Op op;
    if (pairs)
        experts(in, rows, width, calls, e, y.data_ptr<float>());
    else
        y.zero_();
    return y;
}

std::tuple<Tensor, Tensor, Tensor> route_op(const Tensor& logits, const Tensor& counts,
                                            int64_t k_max, bool normalise) {
    const float* in = floats(logits, "logits");
    const int64_t count = logits.size(1);
    const Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(t.count == logits.size(0) && k_max <= count, "counts do not fit the logits");
    const int64_t pairs = sum_of(t);
    Tensor token = at::empty({pairs}, at::kInt), weight = like(logits, {pairs}),
           ends = at::empty({count}, at::kLong);
    Op op;
    route(in, count, t, count, normalise, token.data_ptr<int32_t>(), weight.data_ptr<float>(),
          ends.data_ptr<int64_t>());
    return {token, weight, ends};
}

void write_cache_op(const Tensor& k, const Tensor& v, Tensor cache, const Tensor& spans,
                    const Tensor& tables, int64_t block_size) {
    const float *keys = floats(k, "k", 3), *values = floats(v, "v", 3);
    int64_t blocks;
    const Cache c = cache_of(cache, k.size(1), k.size(2), block_size, blocks);
    const Pages p = pages_of(spans, tables, k.size(0), block_size, blocks);
    TORCH_CHECK(k.sizes() == v.sizes(), "k and v must have one shape");
    Op op;
    write_cache(keys, values, c.kv_heads * c.head_width, c, p);
}

Tensor attend_op(const Tensor& q, const Tensor& cache, const Tensor& spans, const Tensor& tables,
                 int64_t block_size, double scale, int64_t window, double softcap, Maybe sinks) {
    const float* in = floats(q, "q", 3);
    TORCH_CHECK(cache.dim() == 4, "the cache must have 4 dimensions, got ", cache.dim());
    int64_t blocks;
    const Cache c = cache_of(cache, cache.size(2), q.size(2), block_size, blocks);
    const Pages p = pages_of(spans, tables, q.size(0), block_size, blocks);
    const Attention a = attention_of(q.size(1), c.kv_heads, scale, window, softcap, sinks);
    Tensor out = like(q, q.sizes().vec());
    Op op;
    attend(in, q.size(1) * q.size(2), c, p, a, out.data_ptr<float>());
    return out;
}

Tensor draw_op(const Tensor& gaussian, const Tensor& counts, const Tensor& seeds,
               const Tensor& positions, int64_t k_max, const Tensor& quantiles, int64_t layer,
               bool exponential, double sigma_min, bool antithetic) {
    const float* in = floats(gaussian, "gaussian");
    Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(gaussian.size(0) == t.count && seeds.numel() == t.count &&
                    positions.numel() == t.count && quantiles.numel() == 65536 &&
                    gaussian.size(1) % 2 == 0,
                "draws: shapes do not fit");
    t.seeds = data<const int64_t>(seeds, "seeds"),
    t.positions = data<const int64_t>(positions, "positions");
    const Draws d{data<const float>(quantiles, "quantiles"),
                  layer,
                  gaussian.size(1) / 2,
                  exponential,
                  antithetic,
                  float(sigma_min)};
    Tensor z = like(gaussian, {sum_of(t), d.space});
    Op op;
    draw(in, gaussian.size(1), t, d, z.data_ptr<float>());
    return z;
}

Tensor masks_op(const Tensor& scores, const Tensor& counts, int64_t k_max, int64_t kept) {
    const float* in = floats(scores, "scores");
    const Tokens t = tokens_of(counts, k_max);
    const int64_t scored = scores.size(1);
    TORCH_CHECK(scores.size(0) == sum_of(t) && 1 <= kept && kept <= scored,
                "masks: shapes do not fit");
    Tensor mask = like(scores, {t.count, scored});
    Op op;
    masks(in, scored, t, scored, kept, mask.data_ptr<float>());
    return mask;
}

// The highest logit's index in each row, of equals the lowest; -1 where a row has one that is not
// finite.
Tensor best_op(const Tensor& logits) {
    const float* in = floats(logits, "logits");
    const int64_t rows = logits.size(0), width = logits.size(1);
    TORCH_CHECK(width > 0, "there must be logits to choose from");
    Tensor y = at::empty({rows}, at::kLong);
    Op op;
    best(in, rows, width, y.data_ptr<int64_t>());
    return y;
}

// Logits with what masks forbid at -inf: mask_of names each row's mask in `allowed` [masks, words
// of 32 bits], -1 for none.
Tensor constrain_op(const Tensor& logits, const Tensor& raw, const Tensor& allowed,
                    const Tensor& mask_of) {
    const float *in = floats(logits, "logits"), *before = floats(raw, "raw");
    const int32_t* bits = data<const int32_t>(allowed, "allowed");
    const int64_t* of = data<const int64_t>(mask_of, "mask_of");
    const int64_t rows = logits.size(0), width = logits.size(1);
    TORCH_CHECK(raw.sizes() == logits.sizes() && mask_of.numel() == rows && allowed.dim() == 2 &&
                    allowed.size(1) == (width + 31) / 32,
                "constrain: shapes do not fit");
    for (int64_t r = 0; r < rows; r++)
        TORCH_CHECK(-1 <= of[r] && of[r] < allowed.size(0), "row ", r, " has mask ", of[r], " of ",
                    allowed.size(0));
    Tensor y = like(logits, {rows, width});
    Op op;
    constrain(in, before, bits, of, rows, width, y.data_ptr<float>());
    return y;
}

// Over all mixtures' tokens per expert: experts that have any, and the sum of the busiest's share
// over the mean.
std::tuple<int64_t, double> spread_op(const std::vector<Tensor>& loads) {
    int64_t distinct = 0;
    double uneven = 0;
    for (const Tensor& t : loads) {
        const int64_t* load = data<const int64_t>(t, "load");
        int64_t most = 0, total = 0;
        for (int64_t e = 0; e < t.numel(); e++)
            distinct += load[e] > 0, total += load[e], most = std::max(most, load[e]);
        if (total) uneven += double(most) * double(t.numel()) / double(total);
    }
    return {distinct, uneven};
}

// Memory that lives as long as a model: in huge pages where the system gives them, so that few
// look-ups are missed.
Tensor allocate_op(int64_t bytes) {
    constexpr int64_t HUGE = 2 << 20;
    const int64_t size = up_to(std::max<int64_t>(bytes, 1), HUGE);
    char* raw = (char*)mmap(nullptr, size + HUGE, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(raw != MAP_FAILED, "out of memory: ", bytes, " bytes");
    char* start = (char*)up_to((int64_t)raw, HUGE);
#ifdef MADV_HUGEPAGE
    madvise(start, size, MADV_HUGEPAGE);
#endif
    const auto free = [=](void*) {
#ifdef __SANITIZE_ADDRESS__
        ASAN_UNPOISON_MEMORY_REGION(start, size);
#endif
        munmap(raw, size + HUGE);
    };
#ifdef __SANITIZE_ADDRESS__
    ASAN_POISON_MEMORY_REGION(start + bytes, size - bytes);  // so that an overrun is seen
#endif
    return at::from_blob(start, {bytes}, free, at::TensorOptions(at::kByte));
}

#include "block_ops.h"
#include "program.h"

TORCH_LIBRARY(moedial, m) {
    m.def(
        "linear(Tensor x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor words, Tensor? "
        "side, int n, Tensor? bias) -> Tensor");
    m.def(
        "experts(Tensor x, Tensor token, Tensor weight, Tensor ends, Tensor up, Tensor? up_side, "
        "Tensor down, Tensor? down_side, int units, bool gated, int activation) -> Tensor");
    m.def(
        "route(Tensor logits, Tensor counts, int k_max, bool normalise) -> (Tensor, Tensor, "
        "Tensor)");
    m.def(
        "write_cache(Tensor k, Tensor v, Tensor(a!) cache, Tensor spans, Tensor tables, int "
        "block_size) -> ()");
    m.def(
        "attend(Tensor q, Tensor cache, Tensor spans, Tensor tables, int block_size, float scale, "
        "int window, float softcap, Tensor? sinks) -> Tensor");
    m.def(
        "draw(Tensor gaussian, Tensor counts, Tensor seeds, Tensor positions, int k_max, Tensor "
        "quantiles, int layer, bool exponential, float sigma_min, bool antithetic) -> Tensor");
    m.def("masks(Tensor scores, Tensor counts, int k_max, int kept) -> Tensor");
    m.def(
        "attention_block(Tensor(a!) x, Tensor(b!) cache, Tensor spans, Tensor tables, int "
        "block_size, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor qkv, Tensor? "
        "qkv_side, Tensor? qkv_bias, Tensor? q_norm, Tensor? k_norm, bool norm_per_head, float "
        "clip, Tensor? rotary, Tensor out, Tensor? out_side, Tensor? out_bias, int heads, float "
        "scale, int window, float softcap, Tensor? sinks) -> ()");
    m.def(
        "topk_block(Tensor(a!) x, Tensor counts, int k_max, Tensor? norm_weight, Tensor? "
        "norm_bias, float eps, Tensor router, Tensor? router_side, Tensor up, Tensor? up_side, "
        "Tensor down, Tensor? down_side, int experts, int units, int activation, bool normalise) "
        "-> Tensor");
    m.def(
        "infinity_block(Tensor(a!) x, Tensor counts, Tensor seeds, Tensor positions, int k_max, "
        "Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor router, Tensor? router_side, "
        "Tensor scores, int space, Tensor up, Tensor? up_side, Tensor down, Tensor? down_side, int "
        "units, int block_units, int scored, int kept, int activation, Tensor quantiles, int "
        "layer, bool exponential, float sigma_min, bool antithetic, Tensor? up_rows, Tensor? "
        "down_rows, int few) -> Tensor");
    m.def(
        "ffn_block(Tensor(a!) x, Tensor? norm_weight, Tensor? norm_bias, float eps, Tensor up, "
        "Tensor? up_side, Tensor? up_bias, Tensor down, Tensor? down_side, Tensor? down_bias, int "
        "units, bool gated, int activation) -> ()");
    m.def("spread(Tensor[] loads) -> (int, float)", &spread_op);
    m.def("allocate(int bytes) -> Tensor", &allocate_op);
    m.def("set_threads(int count) -> ()", [](int64_t count) {
        TORCH_CHECK(1 <= count && count <= 1024, "threads must be between 1 and 1024, got ", count);
        Op op;
        set_threads(count);
    });
    m.def("best(Tensor logits) -> Tensor");
    m.def("constrain(Tensor logits, Tensor raw, Tensor allowed, Tensor mask_of) -> Tensor");
    define_program(m);
    m.def("instruction_set() -> str", [] { return std::string(instruction_set()); });
}

TORCH_LIBRARY_IMPL(moedial, CPU, m) {
    m.impl("linear", &linear_op);
    m.impl("best", &best_op);
    m.impl("constrain", &constrain_op);
    m.impl("experts", &experts_op);
    m.impl("route", &route_op);
    m.impl("write_cache", &write_cache_op);
    m.impl("attend", &attend_op);
    m.impl("draw", &draw_op);
    m.impl("masks", &masks_op);
    m.impl("attention_block", attention_op(&bind_attention));
    m.impl("topk_block", topk_op(&bind_topk));
    m.impl("infinity_block", infinity_op(&bind_infinity));
    m.impl("ffn_block", ffn_op(&bind_ffn));
}

}  // namespace moedial
