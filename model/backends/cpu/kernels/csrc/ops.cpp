// The kernels as torch operators: the ops of single kernels here, whole blocks in `block_ops.h`, a
// whole decoder in `program.h`. The one file that is compiled with torch.
#include <torch/library.h>

#include "bind.h"
#include "block_ops.h"
#include "checks.h"
#include "kernels.h"
#include "memory.h"
#include "mixture_params.h"
#include "pool.h"
#include "program.h"
#include "sampling_ops.h"
#include "scratch.h"
#include "step_rules.h"

namespace moedial {

Scratch& scratch() {
    static Scratch* one = new Scratch;  // outlives all threads
    return *one;
}

namespace {

// scale * (W norm(x) + bias), [rows, outputs].
Tensor linear_op(const LinearParams& params, const Tensor& x) {
    const float* in = floats(x, "x");
    const int64_t rows = x.size(0), width = x.size(1);
    const NormedLinear bound = bind(width, params);
    Tensor y = like(x, {rows, bound.outputs});
    Op op;
    if (rows)
        linear(in, rows, width, bound.norm, bound.layer, false, bound.outputs, y.data_ptr<float>());
    return y;
}

// Σ over each row's pairs of weight · expert(x). token, weight [pairs], sorted by expert; ends
// [experts].
Tensor experts_op(const ExpertsParams& params, const Tensor& x, const Tensor& token,
                  const Tensor& weight, const Tensor& ends) {
    const float* in = floats(x, "x");
    const int64_t rows = x.size(0), width = x.size(1), count = ends.numel();
    const Experts layer = bind(width, params, count);
    const RoutedPairs pairs{data<const int32_t>(token, "token"),
                            vector(weight, token.numel(), "weight"),
                            data<const int64_t>(ends, "ends"), count};
    int64_t start = 0;
    for (int64_t i = 0; i < count; start = pairs.ends[i++])
        TORCH_CHECK(pairs.ends[i] >= start, "ends must not fall");
    TORCH_CHECK(start == token.numel(), "ends cover ", start, " pairs of ", token.numel());
    for (int64_t i = 0; i < start; i++)
        TORCH_CHECK(0 <= pairs.token[i] && pairs.token[i] < rows, "token ", pairs.token[i]);
    Tensor y = like(x, {rows, width});
    Op op;
    if (start)
        experts(in, rows, width, pairs, layer, y.data_ptr<float>());
    else
        y.zero_();
    return y;
}

// Routes logits [tokens, experts]. Returns the token and the weight of each pair, the ends of the
// experts among the sorted pairs, and how many pairs each token has.
std::tuple<Tensor, Tensor, Tensor, Tensor> route_op(const RoutingParams& params,
                                                    const Tensor& logits, const Tensor& counts,
                                                    int64_t k_max, const Tensor& rules,
                                                    const Tensor& rule_of, const Tensor& allowed) {
    const float* in = floats(logits, "logits");
    const int64_t count = logits.size(1);
    const Router router = bind(params, count);
    LayerRows budget = budget_of(counts, k_max);
    TORCH_CHECK(budget.tokens == logits.size(0) && k_max <= router.max_count(),
                "counts do not fit the logits");
    const StepRules step_rules(rules, rule_of, allowed, budget.tokens);
    step_rules.apply_to(budget);
    check_allowed(step_rules, count);
    check_rules(budget, router);
    const int64_t most = budget.max_pairs(count);
    Tensor token = at::empty({most}, at::kInt), weight = like(logits, {most});
    Tensor ends = at::empty({count}, at::kLong), used = at::empty({budget.tokens}, at::kLong);
    const PairsOut out{token.data_ptr<int32_t>(), weight.data_ptr<float>(),
                       ends.data_ptr<int64_t>()};
    Op op;
    route(in, count, budget, router, out, {.used = used.data_ptr<int64_t>()});
    const int64_t pairs = count ? out.ends[count - 1] : 0;
    return {token.narrow(0, 0, pairs), weight.narrow(0, 0, pairs), ends, used};
}

// Without `values` the first elements of a key are its value; 32 stands for any number of them.
void write_cache_op(const Tensor& keys, const OptionalTensor& values, Tensor cache,
                    const Tensor& spans, const Tensor& tables, int64_t block_size) {
    const float* new_keys = floats(keys, "k", 3);
    const float* new_values = values ? floats(*values, "v", 3) : nullptr;
    int64_t blocks;
    const Cache layer =
        cache_of(cache, keys.size(1), keys.size(2), values ? 0 : 32, block_size, blocks);
    const Pages pages = pages_of(spans, tables, keys.size(0), block_size, blocks);
    TORCH_CHECK(!values || keys.sizes() == values->sizes(), "k and v must have one shape");
    Op op;
    write_cache(new_keys, new_values, layer.kv_heads * layer.head_width, layer, pages);
}

// `values`: how many elements of a key are its value; 0: the cache has values of their own.
Tensor attend_op(const MaskParams& params, const Tensor& queries, const Tensor& cache,
                 const Tensor& spans, const Tensor& tables, int64_t block_size, int64_t values) {
    const float* in = floats(queries, "q", 3);
    TORCH_CHECK(cache.dim() == 4, "the cache must have 4 dimensions, got ", cache.dim());
    const int64_t heads = queries.size(1), head_width = queries.size(2);
    int64_t blocks;
    const Cache layer = cache_of(cache, cache.size(2), head_width, values, block_size, blocks);
    const Pages pages = pages_of(spans, tables, queries.size(0), block_size, blocks);
    const Attention attention = bind(params, heads, layer.kv_heads);
    Tensor out = like(queries, {queries.size(0), heads, layer.value_width});
    Op op;
    attend(in, heads * head_width, layer, pages, attention, out.data_ptr<float>());
    return out;
}

// The points [ΣK, latent_dim] of each token's draws; gaussian [tokens, 2 latent_dim].
Tensor draw_op(const DrawsParams& params, const Tensor& gaussian, const Tensor& counts,
               const Tensor& seeds, const Tensor& positions, int64_t k_max) {
    const float* in = floats(gaussian, "gaussian");
    LayerRows budget = budget_of(counts, k_max);
    TORCH_CHECK(gaussian.size(0) == budget.tokens && seeds.numel() == budget.tokens &&
                    positions.numel() == budget.tokens && params.quantiles.numel() == 65536 &&
                    gaussian.size(1) % 2 == 0,
                "draws: shapes do not fit");
    budget.seeds = data<const int64_t>(seeds, "seeds");
    budget.positions = data<const int64_t>(positions, "positions");
    const Draws draws = bind(params, gaussian.size(1) / 2);
    check_fixed_draws(budget, draws);
    Tensor points = like(gaussian, {budget.pairs(), draws.latent_dim});
    Op op;
    draw(in, gaussian.size(1), budget, draws, points.data_ptr<float>());
    return points;
}

// The mean mask [tokens, groups] of the scores [ΣK, groups] of each token's draws.
Tensor masks_op(const Tensor& scores, const Tensor& counts, int64_t k_max, int64_t kept,
                bool replacement, bool keep_norm) {
    const float* in = floats(scores, "scores");
    const LayerRows budget = budget_of(counts, k_max);
    const int64_t groups = scores.size(1);
    TORCH_CHECK(scores.size(0) == budget.pairs() && 1 <= kept && kept <= groups,
                "masks: shapes do not fit");
    Tensor mask = like(scores, {budget.tokens, groups});
    Op op;
    masks(in, groups, budget, groups, {kept, replacement, keep_norm}, mask.data_ptr<float>());
    return mask;
}

// How evenly experts are used. `loads`: for each pass the tokens per expert, mixture after mixture.
// Returns how many experts had tokens, and the sum over passes and mixtures of (tokens of the
// busiest expert) / (mean tokens of an expert).
std::tuple<int64_t, double> spread_op(const std::vector<Tensor>& loads,
                                      const std::vector<int64_t>& experts) {
    int64_t all = 0, distinct = 0;
    for (const int64_t count : experts) {
        TORCH_CHECK(count >= 0, "a mixture has ", count, " experts");
        all += count;
    }
    double uneven = 0;
    for (const Tensor& pass : loads) {
        const int64_t* load = data<const int64_t>(pass, "load");
        TORCH_CHECK(pass.numel() == all, "a pass has loads of ", pass.numel(), " experts, not of ",
                    all);
        for (const int64_t count : experts) {
            int64_t busiest = 0, total = 0;
            for (int64_t expert = 0; expert < count; expert++) {
                distinct += load[expert] > 0, total += load[expert];
                busiest = std::max(busiest, load[expert]);
            }
            if (total) uneven += double(busiest) * double(count) / double(total);
            load += count;
        }
    }
    return {distinct, uneven};
}

// Quantises weights [rows, inputs] (float32 or bfloat16) to codes uint8 [rows, inputs / 2], scales
// int8 [rows, groups] and factors [rows]. A row with a weight that is not finite has the factor
// NaN.
std::tuple<Tensor, Tensor, Tensor> quantise_op(const Tensor& weight, const Tensor& table,
                                               int64_t group) {
    TORCH_CHECK(weight.dim() == 2, "weight must have 2 dimensions, got ", weight.dim());
    const int64_t rows = weight.size(0), width = weight.size(1);
    check_group(group);
    TORCH_CHECK(width % group == 0, width, " inputs are not a multiple of the group, ", group);
    TORCH_CHECK(table.numel() == 16, "a table must have 16 values, got ", table.numel());
    CodeTable codes_of;
    std::memcpy(codes_of.values, data<const int8_t>(table, "table"), 16);
    TORCH_CHECK(std::is_sorted(codes_of.values, codes_of.values + 16), "the table must rise");
    const Table rows_of = table_of(weight, width, "weight");
    Tensor codes = at::empty({rows, width / 2}, at::kByte);
    Tensor scales = at::empty({rows, width / group}, at::kChar);
    Tensor factors = at::empty({rows}, at::kFloat);
    Op op;
    quantise(rows_of, width, codes_of, group, codes.data_ptr<uint8_t>(), scales.data_ptr<int8_t>(),
             factors.data_ptr<float>());
    return {codes, scales, factors};
}

void set_threads_op(int64_t count) {
    TORCH_CHECK(1 <= count && count <= MAX_THREADS, "threads must be between 1 and ", MAX_THREADS,
                ", got ", count);
    Op op;
    set_threads(count);
}

// Divides the threads into groups, one for each memory node. cores: the cores of each node.
// node_of_cpu: -1 for a processor that may not be used; empty: threads are not bound to processors.
void set_nodes_op(at::IntArrayRef cores, at::IntArrayRef node_of_cpu) {
    const int64_t count = int64_t(cores.size());
    TORCH_CHECK(1 <= count && count <= MAX_NODES, "nodes must be between 1 and ", MAX_NODES,
                ", got ", count);
    Nodes nodes{
        .count = count, .node_of_cpu = node_of_cpu.data(), .cpus = int64_t(node_of_cpu.size())};
    for (int64_t node = 0; node < count; node++) {
        TORCH_CHECK(1 <= cores[node] && cores[node] <= 65536, "node ", node, " has ", cores[node],
                    " cores");
        nodes.cores[node] = cores[node];
    }
    for (const int64_t node : node_of_cpu)
        TORCH_CHECK(-1 <= node && node < count, "a processor is on node ", node, " of ", count);
    Op op;
    set_nodes(nodes);
}

void set_spin_time_op(int64_t microseconds) {
    TORCH_CHECK(0 <= microseconds && microseconds <= 100'000,
                "spin time must be between 0 and 100000 microseconds, got ", microseconds);
    Op op;
    set_spin_time(microseconds);
}

}  // namespace

TORCH_LIBRARY(moedial, library) {
    library.def(schema<LinearParams>("linear(Tensor x", "Tensor"));
    library.def(schema<ExpertsParams>("experts(Tensor x, Tensor token, Tensor weight, Tensor ends",
                                      "Tensor"));
    library.def(schema<RoutingParams>(
        "route(Tensor logits, Tensor counts, int k_max, Tensor rules, Tensor rule_of, "
        "Tensor allowed",
        "(Tensor, Tensor, Tensor, Tensor)"));
    library.def(
        "write_cache(Tensor k, Tensor? v, Tensor(a!) cache, Tensor spans, Tensor tables, "
        "int block_size) -> ()");
    library.def(schema<MaskParams>(
        "attend(Tensor q, Tensor cache, Tensor spans, Tensor tables, int block_size, int values",
        "Tensor"));
    library.def(schema<DrawsParams>(
        "draw(Tensor gaussian, Tensor counts, Tensor seeds, Tensor positions, int k_max",
        "Tensor"));
    library.def(
        "masks(Tensor scores, Tensor counts, int k_max, int kept, bool replacement, "
        "bool keep_norm) -> Tensor");
    library.def("quantise(Tensor weight, Tensor table, int group) -> (Tensor, Tensor, Tensor)");
    define_sampling_ops(library);
    define_block_ops(library);
    define_program(library);
    // These have no kernel for each device: they take no tensor, or only a step's reports.
    library.def("spread(Tensor[] loads, int[] experts) -> (int, float)", &spread_op);
    library.def("allocate(int bytes, int matrices=0, int outputs=0) -> Tensor", &allocate_op);
    library.def("set_threads(int count) -> ()", &set_threads_op);
    library.def("set_nodes(int[] cores, int[] node_of_cpu) -> ()", &set_nodes_op);
    library.def("set_spin_time(int microseconds) -> ()", &set_spin_time_op);
    library.def("instruction_set() -> str", [] { return std::string(instruction_set()); });
}

TORCH_LIBRARY_IMPL(moedial, CPU, library) {
    library.impl("linear", by_name<&linear_op>());
    library.impl("experts", by_name<&experts_op>());
    library.impl("route", by_name<&route_op>());
    library.impl("write_cache", &write_cache_op);
    library.impl("attend", by_name<&attend_op>());
    library.impl("draw", by_name<&draw_op>());
    library.impl("masks", &masks_op);
    library.impl("quantise", &quantise_op);
    implement_sampling_ops(library);
    implement_block_ops(library);
}

}  // namespace moedial
