// A decoder bound to its packed weights: everything about them is checked once, and a step is one
// call. Included by ops.cpp, whose checks it shares.

Table table_of(Maybe words, int64_t width, const char* name) {
    if (!words) return {};
    TORCH_CHECK(words->dim() == 2 && words->size(1) == width && words->is_contiguous(), name,
                " must be [count, ", width, "]");
    TORCH_CHECK(words->scalar_type() == at::kFloat || words->scalar_type() == at::kBFloat16, name,
                " cannot be ", words->scalar_type());
    return {words->scalar_type() == at::kFloat ? FLOAT : BFLOAT, (const char*)words->data_ptr(),
            words->size(0)};
}

class Program : public torch::CustomClassHolder {
  public:
    Program(int64_t width, const Tensor& words, Maybe places)
        : width(width), words_(table_of(words, width, "embeddings")) {
        places_ = table_of(places, width, "position embeddings");
        keep(words), keep(places);
    }

    template <class Block, class... A>
    void add(Block (*bind)(int64_t, A...), const std::decay_t<A>&... args) {
        blocks_.emplace_back(bind(width, args...));
        (keep(args), ...);
    }

    void head(Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& words, Maybe side,
              int64_t n, Maybe bias) {
        norm_ = norm_of(norm_weight, norm_bias, eps, width), outputs_ = n;
        head_ = {matrix(words, side, n, width), vector(bias, n, "bias")};
        keep(norm_weight), keep(norm_bias), keep(words), keep(side), keep(bias);
    }

    // Logits of `rows`, [B, V], and tokens per expert, mixture after mixture, of a step as
    // `model/batch.py` describes it.
    std::tuple<Tensor, Tensor> run(const Tensor& ids, const Tensor& positions, const Tensor& seeds,
                                   const Tensor& counts, int64_t k_max, const Tensor& rows,
                                   const std::vector<Tensor>& caches, const Tensor& spans,
                                   const Tensor& tables, int64_t block_size) const {
        const int64_t count = ids.numel();
        TORCH_CHECK(positions.numel() == count && seeds.numel() == count && count > 0,
                    "a step needs ids, positions and seeds of each token");
        TORCH_CHECK(counts.dim() == 2 && counts.size(1) == count, "counts must be [L, ", count,
                    "], got ", counts.sizes());
        const Tokens all{nullptr, data<const int64_t>(seeds, "seeds"),
                         data<const int64_t>(positions, "positions"), count, k_max};
        const int64_t* id = data<const int64_t>(ids, "ids");
        within(id, count, words_.count, "token");
        if (places_.data) within(all.positions, count, places_.count, "position");
        const int64_t wanted = rows.numel();
        within(data<const int64_t>(rows, "rows"), wanted, count, "row");
        std::vector<Cache> kept;
        const Pages pages = pages_for(caches, spans, tables, count, block_size, kept);
        const std::vector<Tokens> tokens = tokens_for(counts, all);
        int64_t experts = 0, attentions = 0, mixtures = 0;
        for (const auto& any : blocks_) experts += experts_of(any);
        Tensor hidden = at::empty({count, width}, at::kFloat),
               logits = at::empty({wanted, outputs_}, at::kFloat);
        Tensor load = at::zeros({experts}, at::kLong);

        Op op;
        float* x = hidden.data_ptr<float>();
        embed(id, all.positions, count, width, words_, places_, x);
        int64_t* to = load.data_ptr<int64_t>();
        for (const auto& any : blocks_) {
            if (const auto* b = std::get_if<AttentionBlock>(&any)) {
                attention_block(x, width, *b, kept[attentions++], pages);
            } else if (const auto* b = std::get_if<DenseBlock>(&any)) {
                ffn_block(x, count, width, b->norm, b->ffn, b->up_bias, b->down_bias);
            } else {
                const Tokens& t = tokens[mixtures++];
                if (const auto* b = std::get_if<TopK>(&any))
                    topk_block(x, width, *b, t, to);
                else
                    infinity_block(x, width, std::get<Infinity>(any), t, to);
                to += experts_of(any);
            }
            scratch().reset();
        }
        const float* last = gathered(x, rows.data_ptr<int64_t>(), wanted, count);
        if (wanted)
            linear(last, wanted, width, norm_, head_, false, outputs_, logits.data_ptr<float>());
        return {logits, load};
    }

    const int64_t width;

  private:
    void keep(const Tensor& t) { kept_.push_back(t); }
    void keep(Maybe t) {
        if (t) kept_.push_back(*t);
    }
    template <class T>
    void keep(T) {}

    static void within(const int64_t* values, int64_t count, int64_t limit, const char* name) {
        for (int64_t i = 0; i < count; i++)
            TORCH_CHECK(0 <= values[i] && values[i] < limit, name, " ", values[i],
                        " is not between 0 and ", limit - 1);
    }

    static bool mixes(const auto& any) {
        return std::holds_alternative<TopK>(any) || std::holds_alternative<Infinity>(any);
    }

    // Experts of a mixture; 0 for any other block.
    static int64_t experts_of(const auto& any) {
        if (const auto* b = std::get_if<TopK>(&any)) return b->count;
        if (const auto* b = std::get_if<Infinity>(&any)) return b->scored;
        return 0;
    }

    // The counts of each mixture's tokens.
    std::vector<Tokens> tokens_for(const Tensor& counts, const Tokens& all) const {
        std::vector<Tokens> tokens;
        for (const auto& any : blocks_) {
            if (!mixes(any)) continue;
            const int64_t layer = int64_t(tokens.size());
            TORCH_CHECK(layer < counts.size(0), "counts are for ", counts.size(0),
                        " mixtures, the decoder has more");
            Tokens t = all;
            t.counts = data<const int64_t>(counts, "counts") + layer * all.count;
            for (int64_t i = 0; i < t.count; i++)
                TORCH_CHECK(1 <= t.counts[i] && t.counts[i] <= t.k_max, "count ", t.counts[i],
                            " is not between 1 and ", t.k_max);
            const TopK* b = std::get_if<TopK>(&any);
            TORCH_CHECK(!b || t.k_max <= b->count, "counts up to ", t.k_max, " do not fit ",
                        b ? b->count : 0, " experts");
            tokens.push_back(t);
        }
        return tokens;
    }

    // The caches of the attention layers, and the pages, which must lie in every one of them.
    Pages pages_for(const std::vector<Tensor>& caches, const Tensor& spans, const Tensor& tables,
                    int64_t rows, int64_t block_size, std::vector<Cache>& kept) const {
        int64_t least = std::numeric_limits<int64_t>::max();
        for (const auto& any : blocks_) {
            const auto* b = std::get_if<AttentionBlock>(&any);
            if (!b) continue;
            TORCH_CHECK(kept.size() < caches.size(), "there are ", caches.size(),
                        " caches, the decoder has more layers");
            int64_t blocks;
            kept.push_back(
                cache_of(caches[kept.size()], b->kv_heads, b->head_width, block_size, blocks));
            least = std::min(least, blocks);
        }
        const Pages pages = pages_of(spans, tables, rows, block_size, least);
        for (const auto& any : blocks_)
            if (const auto* b = std::get_if<AttentionBlock>(&any)) check_positions(*b, pages);
        return pages;
    }

    // The wanted rows, side by side.
    const float* gathered(const float* x, const int64_t* rows, int64_t wanted,
                          int64_t count) const {
        bool all = wanted == count;
        for (int64_t i = 0; all && i < wanted; i++) all = rows[i] == i;
        if (all) return x;
        float* y = scratch().take<float>(std::max<int64_t>(wanted, 1) * width);
        for (int64_t i = 0; i < wanted; i++) std::copy_n(x + rows[i] * width, width, y + i * width);
        return y;
    }

    Table words_, places_;
    std::vector<std::variant<AttentionBlock, TopK, Infinity, DenseBlock>> blocks_;
    Norm norm_;
    Linear head_;
    int64_t outputs_ = 0;
    std::vector<Tensor> kept_;  // whose memory the blocks point into
};

// A method that adds a block takes what its `bind` takes after the width.
template <class Block, class... A>
auto adds(Block (*bind)(int64_t, A...)) {
    return [bind](const c10::intrusive_ptr<Program>& p, std::decay_t<A>... args) {
        p->add(bind, args...);
    };
}

void define_program(torch::Library& m) {
    m.class_<Program>("Program")
        .def(torch::init<int64_t, Tensor, std::optional<Tensor>>())
        .def("attention", adds(&bind_attention))
        .def("topk", adds(&bind_topk))
        .def("infinity", adds(&bind_infinity))
        .def("ffn", adds(&bind_ffn))
        .def("head",
             [](const c10::intrusive_ptr<Program>& p, std::optional<Tensor> norm_weight,
                std::optional<Tensor> norm_bias, double eps, Tensor words,
                std::optional<Tensor> side, int64_t n, std::optional<Tensor> bias) {
                 p->head(norm_weight, norm_bias, eps, words, side, n, bias);
             })
        .def("run",
             [](const c10::intrusive_ptr<Program>& p, Tensor ids, Tensor positions, Tensor seeds,
                Tensor counts, int64_t k_max, Tensor rows, std::vector<Tensor> caches, Tensor spans,
                Tensor tables, int64_t block_size) {
                 return p->run(ids, positions, seeds, counts, k_max, rows, caches, spans, tables,
                               block_size);
             });
}
