// `Program`: a decoder bound to its packed weights, which are checked once when it is made. A step
// is then one call from Python. `define_program` registers it with torch.
#pragma once
#include <torch/custom_class.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <variant>

#include "bind.h"
#include "reports.h"
#include "step_rules.h"

namespace moedial {

// A step as model/batch.py describes it: `Batch`, its `BudgetRows` (counts and k_max), and `Pages`.
// `seeds` are the noise seeds.
struct ProgramStep {
    const Tensor &ids, &positions, &seeds;    // [T]
    const Tensor& counts;                     // [mixtures, T]
    int64_t k_max;                            // no count is higher
    const Tensor &rules, &rule_of, &allowed;  // [R, 6], [T] and [R, N] (`StepRules`), or empty
    const Tensor& rows;                       // [B]: the rows whose logits are wanted
    const std::vector<Tensor>& caches;        // one per layer: pages, or states
    const Tensor &spans, &tables, &slots;     // [B, 3], [B, P], and [B] where there are states
    const Tensor& snapshots;                  // [N, 3] (`Snapshot`), or empty
    int64_t block_size;
    bool routes;  // whether the experts that each token ran are wanted
};

// Logits of the wanted rows [B, V], then `load`, `used` and `routes` of `StepReports`.
using StepResult = std::tuple<Tensor, Tensor, OptionalTensor, std::vector<Tensor>>;

class Program : public torch::CustomClassHolder {
  public:
    // `scale` multiplies the embeddings of tokens.
    Program(int64_t width, const Tensor& embeddings, double scale,
            const OptionalTensor& position_embeddings)
        : width(width),
          embeddings_(table_of(embeddings, width, "embeddings")),
          scale_(float(scale)) {
        position_embeddings_ = table_of(position_embeddings, width, "position embeddings");
        tensors_.push_back(embeddings);
        if (position_embeddings) tensors_.push_back(*position_embeddings);
    }

    // Appends a block to the decoder.
    template <class Params>
    void add(const Params& params) {
        blocks_.emplace_back(bind(width, params));
        keep(params);
    }

    void set_head(const LinearParams& params) {
        head_ = bind(width, params);
        keep(params);
    }

    StepResult run(const ProgramStep& step) const {
        TORCH_CHECK(head_.outputs > 0, "the program has no head");
        LayerRows all = check_rows(step);
        const StepRules rules(step.rules, step.rule_of, step.allowed, all.tokens);
        check_allowed(rules, all_experts());
        rules.apply_to(all);
        std::vector<Memory> memory;
        const Pages pages = pages_for(step, memory);
        const std::vector<LayerRows> budgets = budgets_for(step.counts, all);
        const int64_t wanted = step.rows.numel();
        Tensor hidden = at::empty({all.tokens, width}, at::kFloat);
        Tensor logits = at::empty({wanted, head_.outputs}, at::kFloat);
        const StepReports reports(mixtures(), all, budgets, step.routes);

        Op op;
        float* x = hidden.data_ptr<float>();
        embed(step.ids.data_ptr<int64_t>(), all.positions, all.tokens, width, embeddings_, scale_,
              position_embeddings_, x);
        run_blocks(x, memory, pages, budgets, reports.layers);
        const float* last = gather_rows(x, step.rows.data_ptr<int64_t>(), wanted, all.tokens);
        if (wanted)
            linear(last, wanted, width, head_.norm, head_.layer, false, head_.outputs,
                   logits.data_ptr<float>());
        return {logits, reports.load, reports.used, reports.routes};
    }

    const int64_t width;

  private:
    using AnyBlock =
        std::variant<AttentionBlock, LatentBlock, DeltaBlock, TopK, Infinity, FeedForward>;
    using Memory = std::variant<Cache, States>;  // a layer's cache or states

    template <class Params>
    void keep(const Params& params) {
        for (Tensor& tensor : tensors_of(params)) tensors_.push_back(std::move(tensor));
    }

    static void check_range(const int64_t* values, int64_t count, int64_t limit, const char* name) {
        for (int64_t i = 0; i < count; i++)
            TORCH_CHECK(0 <= values[i] && values[i] < limit, name, " ", values[i],
                        " is not between 0 and ", limit - 1);
    }

    // How many experts a mixture has (for an ∞-MoE, groups of units); 0 for any other block.
    static int64_t experts_of(const AnyBlock& any) {
        if (const auto* block = std::get_if<TopK>(&any)) return block->router.experts;
        if (const auto* block = std::get_if<Infinity>(&any)) return block->groups;
        return 0;
    }

    std::vector<MixtureSize> mixtures() const {
        std::vector<MixtureSize> sizes;
        for (const auto& any : blocks_)
            if (const int64_t experts = experts_of(any))
                sizes.push_back({experts, std::holds_alternative<Infinity>(any)});
        return sizes;
    }

    int64_t all_experts() const {
        int64_t experts = 0;
        for (const auto& any : blocks_) experts += experts_of(any);
        return experts;
    }

    // Checks ids, positions, seeds and wanted rows. Returns the step's tokens without their counts.
    LayerRows check_rows(const ProgramStep& step) const {
        const int64_t count = step.ids.numel();
        TORCH_CHECK(step.positions.numel() == count && step.seeds.numel() == count && count > 0,
                    "a step needs ids, positions and seeds of each token");
        TORCH_CHECK(step.counts.dim() == 2 && step.counts.size(1) == count, "counts must be [L, ",
                    count, "], got ", step.counts.sizes());
        LayerRows all;
        all.seeds = data<const int64_t>(step.seeds, "seeds");
        all.positions = data<const int64_t>(step.positions, "positions");
        all.tokens = count, all.k_max = step.k_max;
        check_range(data<const int64_t>(step.ids, "ids"), count, embeddings_.count, "token");
        if (position_embeddings_.data)
            check_range(all.positions, count, position_embeddings_.count, "position");
        check_range(data<const int64_t>(step.rows, "rows"), step.rows.numel(), count, "row");
        return all;
    }

    // The tokens of the step with their counts in each mixture layer.
    std::vector<LayerRows> budgets_for(const Tensor& counts, const LayerRows& all) const {
        std::vector<LayerRows> budgets;
        int64_t experts = 0;  // of the layers before
        for (const auto& any : blocks_) {
            if (!experts_of(any)) continue;
            const int64_t layer = int64_t(budgets.size());
            TORCH_CHECK(layer < counts.size(0), "counts are for ", counts.size(0),
                        " mixtures, the decoder has more");
            LayerRows budget = all;
            if (all.allowed) budget.allowed = all.allowed + experts;
            experts += experts_of(any);
            budget.counts = data<const int64_t>(counts, "counts") + layer * all.tokens;
            for (int64_t i = 0; i < budget.tokens; i++)
                TORCH_CHECK(1 <= budget.counts[i] && budget.counts[i] <= budget.k_max, "count ",
                            budget.counts[i], " is not between 1 and ", budget.k_max);
            if (const auto* block = std::get_if<TopK>(&any)) {
                TORCH_CHECK(budget.k_max <= block->router.max_count(), "counts up to ",
                            budget.k_max, " do not fit ", block->router.max_count(), " experts");
                check_rules(budget, *block);
            } else if (const auto* block = std::get_if<Infinity>(&any)) {
                check_fixed_draws(budget, block->draws);
                check_rules(budget, *block);
            }
            budgets.push_back(budget);
        }
        return budgets;
    }

    // Binds each layer's cache or states, and the pages. Every block of a page must lie in the
    // caches of all attention layers.
    Pages pages_for(const ProgramStep& step, std::vector<Memory>& memory) const {
        int64_t least = std::numeric_limits<int64_t>::max();
        const auto next = [&]() -> const Tensor& {
            TORCH_CHECK(memory.size() < step.caches.size(), "there are ", step.caches.size(),
                        " caches, the decoder has more layers");
            return step.caches[memory.size()];
        };
        for (const auto& any : blocks_) {
            if (const auto* block = std::get_if<AttentionBlock>(&any)) {
                int64_t blocks;
                memory.push_back(cache_of(next(), block->kv_heads, block->head_width, 0,
                                          step.block_size, blocks));
                least = std::min(least, blocks);
            } else if (const auto* block = std::get_if<LatentBlock>(&any)) {
                int64_t blocks;
                memory.push_back(
                    cache_of(next(), 1, block->key_width(), block->rank, step.block_size, blocks));
                least = std::min(least, blocks);
            } else if (const auto* block = std::get_if<DeltaBlock>(&any)) {
                memory.push_back(states_of(next(), step.slots, step.snapshots, *block, step.spans));
            }
        }
        const Pages pages =
            pages_of(step.spans, step.tables, step.ids.numel(), step.block_size, least);
        for (const auto& any : blocks_)
            if (const auto* block = std::get_if<AttentionBlock>(&any))
                check_positions(*block, pages);
            else if (const auto* latent = std::get_if<LatentBlock>(&any))
                check_positions(*latent, pages);
        return pages;
    }

    // Runs all blocks, in order.
    void run_blocks(float* x, const std::vector<Memory>& memory, const Pages& pages,
                    const std::vector<LayerRows>& budgets,
                    const std::vector<LayerReport>& reports) const {
        auto kept = memory.begin();
        int64_t mixtures = 0;
        for (const auto& any : blocks_) {
            if (const auto* block = std::get_if<AttentionBlock>(&any)) {
                attention_block(x, width, *block, std::get<Cache>(*kept++), pages);
            } else if (const auto* block = std::get_if<LatentBlock>(&any)) {
                latent_block(x, width, *block, std::get<Cache>(*kept++), pages);
            } else if (const auto* block = std::get_if<DeltaBlock>(&any)) {
                delta_block(x, width, *block, std::get<States>(*kept++), pages);
            } else if (const auto* block = std::get_if<FeedForward>(&any)) {
                ffn_block(x, pages.rows, width, *block);
            } else if (const auto* block = std::get_if<TopK>(&any)) {
                topk_block(x, width, *block, budgets[mixtures], reports[mixtures]);
                mixtures++;
            } else {
                const Infinity& infinity = std::get<Infinity>(any);
                infinity_block(x, width, infinity, budgets[mixtures], reports[mixtures]);
                mixtures++;
            }
            scratch().reset();
        }
    }

    // Copies the wanted rows behind each other, unless they are all rows in order.
    const float* gather_rows(const float* x, const int64_t* rows, int64_t wanted,
                             int64_t count) const {
        bool all = wanted == count;
        for (int64_t i = 0; all && i < wanted; i++) all = rows[i] == i;
        if (all) return x;
        float* y = scratch().take<float>(std::max<int64_t>(wanted, 1) * width);
        for (int64_t i = 0; i < wanted; i++) std::copy_n(x + rows[i] * width, width, y + i * width);
        return y;
    }

    Table embeddings_, position_embeddings_;
    float scale_;  // of the embeddings
    std::vector<AnyBlock> blocks_;
    NormedLinear head_;
    std::vector<Tensor> tensors_;  // kept alive: the blocks point into their memory
};

using ProgramPtr = c10::intrusive_ptr<Program>;

template <class Params>
void add_op(const Params& params, const ProgramPtr& program) {
    program->add(params);
}

inline void set_head_op(const LinearParams& params, const ProgramPtr& program) {
    program->set_head(params);
}

template <class Params, auto kernel>
void define_add(torch::Library& library, const char* name) {
    const std::string program = "(__torch__.torch.classes.moedial.Program program";
    library.def(schema<Params>(name + program, "()"), by_name<kernel>());
}

// Registers the class, and an op for each kind of block that can be added. The class comes first,
// because the ops' schemas name it.
inline void define_program(torch::Library& library) {
    const auto run = [](const ProgramPtr& program, Tensor ids, Tensor positions, Tensor seeds,
                        Tensor counts, int64_t k_max, Tensor rules, Tensor rule_of, Tensor allowed,
                        Tensor rows, std::vector<Tensor> caches, Tensor spans, Tensor tables,
                        Tensor slots, Tensor snapshots, int64_t block_size, bool routes) {
        return program->run({ids, positions, seeds, counts, k_max, rules, rule_of, allowed, rows,
                             caches, spans, tables, slots, snapshots, block_size, routes});
    };
    library.class_<Program>("Program")
        .def(torch::init<int64_t, Tensor, double, OptionalTensor>())
        .def("run", run);
    define_add<AttentionParams, &add_op<AttentionParams>>(library, "add_attention");
    define_add<DeltaParams, &add_op<DeltaParams>>(library, "add_delta");
    define_add<LatentParams, &add_op<LatentParams>>(library, "add_latent");
    define_add<FeedForwardParams, &add_op<FeedForwardParams>>(library, "add_ffn");
    define_add<TopKParams, &add_op<TopKParams>>(library, "add_topk");
    define_add<InfinityParams, &add_op<InfinityParams>>(library, "add_infinity");
    define_add<LinearParams, &set_head_op>(library, "set_head");
}

}  // namespace moedial
