// Whole blocks of a decoder layer as ops that change x in place. An op checks and binds its
// parameters at every call; `program.h` binds a decoder's blocks once and runs them at every step.
#pragma once
#include "bind.h"
#include "step_rules.h"

namespace moedial {

inline void attention_block_op(const AttentionParams& params, Tensor x, Tensor cache,
                               const Tensor& spans, const Tensor& tables, int64_t block_size) {
    float* rows = floats(x, "x");
    TORCH_CHECK(cache.dim() == 4, "the cache must have 4 dimensions, got ", cache.dim());
    int64_t blocks;
    const Cache layer_cache =
        cache_of(cache, params.kv_heads, params.head_width, 0, block_size, blocks);
    const Pages pages = pages_of(spans, tables, x.size(0), block_size, blocks);
    const AttentionBlock block = bind(x.size(1), params);
    check_positions(block, pages);
    Op op;
    // A step without rows has nothing to do, and no task to hand out.
    if (x.size(0)) attention_block(rows, x.size(1), block, layer_cache, pages);
}

inline void delta_block_op(const DeltaParams& params, Tensor x, Tensor states, const Tensor& spans,
                           const Tensor& slots, const Tensor& snapshots) {
    float* rows = floats(x, "x");
    const DeltaBlock block = bind(x.size(1), params);
    const Pages pages = spans_of(spans, x.size(0));
    const States layer_states = states_of(states, slots, snapshots, block, spans);
    Op op;
    if (x.size(0)) delta_block(rows, x.size(1), block, layer_states, pages);
}

inline void latent_block_op(const LatentParams& params, Tensor x, Tensor cache, const Tensor& spans,
                            const Tensor& tables, int64_t block_size) {
    float* rows = floats(x, "x");
    const LatentBlock block = bind(x.size(1), params);
    int64_t blocks;
    const Cache layer_cache = cache_of(cache, 1, block.key_width(), block.rank, block_size, blocks);
    const Pages pages = pages_of(spans, tables, x.size(0), block_size, blocks);
    check_positions(block, pages);
    Op op;
    if (x.size(0)) latent_block(rows, x.size(1), block, layer_cache, pages);
}

inline void ffn_block_op(const FeedForwardParams& params, Tensor x) {
    float* rows = floats(x, "x");
    const FeedForward block = bind(x.size(1), params);
    Op op;
    if (x.size(0)) ffn_block(rows, x.size(0), x.size(1), block);
}

// Returns how many tokens each expert had.
inline Tensor topk_block_op(const TopKParams& params, Tensor x, const Tensor& counts, int64_t k_max,
                            const Tensor& rules, const Tensor& rule_of, const Tensor& allowed) {
    float* rows = floats(x, "x");
    const TopK block = bind(x.size(1), params);
    LayerRows budget = budget_of(counts, k_max);
    TORCH_CHECK(budget.tokens == x.size(0) && k_max <= block.router.max_count(),
                "counts do not fit");
    const StepRules step_rules(rules, rule_of, allowed, budget.tokens);
    step_rules.apply_to(budget);
    check_allowed(step_rules, block.router.experts);
    check_rules(budget, block);
    Tensor load = at::zeros({block.router.experts}, at::kLong);
    Op op;
    if (budget.tokens) topk_block(rows, x.size(1), block, budget, {load.data_ptr<int64_t>()});
    return load;
}

// Returns how many tokens each group had.
inline Tensor infinity_block_op(const InfinityParams& params, Tensor x, const Tensor& counts,
                                const Tensor& seeds, const Tensor& positions, int64_t k_max,
                                const Tensor& rules, const Tensor& rule_of, const Tensor& allowed) {
    float* rows = floats(x, "x");
    const Infinity block = bind(x.size(1), params);
    LayerRows budget = budget_of(counts, k_max);
    TORCH_CHECK(budget.tokens == x.size(0) && seeds.numel() == budget.tokens &&
                    positions.numel() == budget.tokens,
                "counts do not fit");
    budget.seeds = data<const int64_t>(seeds, "seeds");
    budget.positions = data<const int64_t>(positions, "positions");
    const StepRules step_rules(rules, rule_of, allowed, budget.tokens);
    step_rules.apply_to(budget);
    check_rules(budget, block);
    check_fixed_draws(budget, block.draws);
    Tensor load = at::zeros({block.groups}, at::kLong);
    Op op;
    if (budget.tokens) infinity_block(rows, x.size(1), block, budget, {load.data_ptr<int64_t>()});
    return load;
}

inline void define_block_ops(torch::Library& library) {
    library.def(schema<AttentionParams>(
        "attention_block(Tensor(a!) x, Tensor(b!) cache, Tensor spans, Tensor tables, "
        "int block_size",
        "()"));
    library.def(schema<DeltaParams>(
        "delta_block(Tensor(a!) x, Tensor(b!) states, Tensor spans, Tensor slots, Tensor snapshots",
        "()"));
    library.def(schema<LatentParams>(
        "latent_block(Tensor(a!) x, Tensor(b!) cache, Tensor spans, Tensor tables, int block_size",
        "()"));
    library.def(schema<FeedForwardParams>("ffn_block(Tensor(a!) x", "()"));
    library.def(schema<TopKParams>(
        "topk_block(Tensor(a!) x, Tensor counts, int k_max, Tensor rules, Tensor rule_of, "
        "Tensor allowed",
        "Tensor"));
    library.def(schema<InfinityParams>(
        "infinity_block(Tensor(a!) x, Tensor counts, Tensor seeds, Tensor positions, int k_max, "
        "Tensor rules, Tensor rule_of, Tensor allowed",
        "Tensor"));
}

inline void implement_block_ops(torch::Library& library) {
    library.impl("attention_block", by_name<&attention_block_op>());
    library.impl("delta_block", by_name<&delta_block_op>());
    library.impl("latent_block", by_name<&latent_block_op>());
    library.impl("ffn_block", by_name<&ffn_block_op>());
    library.impl("topk_block", by_name<&topk_block_op>());
    library.impl("infinity_block", by_name<&infinity_block_op>());
}

}  // namespace moedial
