// Whole blocks of a decoder layer: bound to their weights, checked once, and run as ops; included
// by ops.cpp, whose checks they share. All change x in place. `program.h` runs a decoder of them.

struct DenseBlock {
    Norm norm;
    Experts ffn;
    const float *up_bias, *down_bias;
};

AttentionBlock bind_attention(int64_t width, int64_t kv_heads, int64_t head, Maybe norm_weight,
                              Maybe norm_bias, double eps, const Tensor& qkv, Maybe qkv_side,
                              Maybe qkv_bias, Maybe q_norm, Maybe k_norm, bool norm_per_head,
                              double clip, Maybe rotary, const Tensor& out, Maybe out_side,
                              Maybe out_bias, int64_t heads, double scale, int64_t window,
                              double softcap, Maybe sinks) {
    const int64_t queries = heads * head, keys = kv_heads * head;
    AttentionBlock b;
    b.kv_heads = kv_heads, b.head_width = head;
    b.norm = norm_of(norm_weight, norm_bias, eps, width);
    b.query_norm = norm_of(q_norm, {}, eps, norm_per_head ? head : queries);
    b.key_norm = norm_of(k_norm, {}, eps, norm_per_head ? head : keys);
    b.norm_per_head = norm_per_head, b.clip = float(clip);
    b.qkv = {matrix(qkv, qkv_side, queries + 2 * keys, width),
             vector(qkv_bias, queries + 2 * keys, "qkv bias")};
    b.out = {matrix(out, out_side, width, queries), vector(out_bias, width, "out bias")};
    b.attention = attention_of(heads, kv_heads, scale, window, softcap, sinks);
    if (rotary) {
        b.rotary = floats(*rotary, "rotary", 3), b.positions = rotary->size(0);
        TORCH_CHECK(rotary->size(1) == 2 && rotary->size(2) == head / 2,
                    "the rotary table must be [positions, 2, C / 2]");
    }
    return b;
}

TopK bind_topk(int64_t width, Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& router,
               Maybe router_side, const Tensor& up, Maybe up_side, const Tensor& down,
               Maybe down_side, int64_t experts, int64_t units, int64_t activation,
               bool normalise) {
    TopK b;
    b.norm = norm_of(norm_weight, norm_bias, eps, width);
    b.router = matrix(router, router_side, experts, width);
    b.experts = experts_of(up, up_side, down, down_side, experts, units, width, true, activation);
    b.count = experts, b.normalise = normalise;
    return b;
}

Infinity bind_infinity(int64_t width, Maybe norm_weight, Maybe norm_bias, double eps,
                       const Tensor& router, Maybe router_side, const Tensor& scores, int64_t space,
                       const Tensor& up, Maybe up_side, const Tensor& down, Maybe down_side,
                       int64_t units, int64_t block_units, int64_t scored, int64_t kept,
                       int64_t activation, const Tensor& quantiles, int64_t layer, bool exponential,
                       double sigma_min, bool antithetic, Maybe up_rows, Maybe down_rows,
                       int64_t few) {
    TORCH_CHECK(scored > 0 && units > 0 && units % scored == 0 && block_units > 0 &&
                    block_units % 16 == 0 && block_units % (units / scored) == 0,
                "scores of ", units, " / ", scored, " units do not fit blocks of ", block_units);
    TORCH_CHECK(1 <= kept && kept <= scored && quantiles.numel() == 65536,
                "infinity: shapes do not fit");
    Infinity b;
    b.norm = norm_of(norm_weight, norm_bias, eps, width);
    TORCH_CHECK(space > 0, "the space must have at least one dimension");
    b.router = matrix(router, router_side, 2 * space, width);
    b.scores = matrix(scores, {}, scored, space);
    b.blocks = experts_of(up, up_side, down, down_side, (units + block_units - 1) / block_units,
                          block_units, width, false, activation);
    b.draws = {data<const float>(quantiles, "quantiles"),
               layer,
               space,
               exponential,
               antithetic,
               float(sigma_min)};
    b.scored = scored, b.share = units / scored, b.kept = kept;
    if (up_rows && down_rows) {
        TORCH_CHECK(b.blocks.up.kind <= BFLOAT && b.blocks.up.kind == b.blocks.down.kind,
                    "int8 units have no rows of their own");
        TORCH_CHECK(width % 16 == 0, "unit rows need a width that is a multiple of 16, got ",
                    width);
        for (const Tensor& rows : {*up_rows, *down_rows})
            TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == up.scalar_type(),
                        "unit rows must be like the panels");
        TORCH_CHECK(
            up_rows->numel() == units * b.blocks.up.k && down_rows->numel() == units * width,
            "unit rows: shapes do not fit");
        b.rows = {(const int32_t*)up_rows->data_ptr(), (const char*)down_rows->data_ptr(), few};
    }
    return b;
}

DenseBlock bind_ffn(int64_t width, Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& up,
                    Maybe up_side, Maybe up_bias, const Tensor& down, Maybe down_side,
                    Maybe down_bias, int64_t units, bool gated, int64_t activation) {
    const Experts e = experts_of(up, up_side, down, down_side, 1, units, width, gated, activation);
    return {norm_of(norm_weight, norm_bias, eps, width), e, vector(up_bias, e.up.n, "up bias"),
            vector(down_bias, width, "down bias")};
}

void check_positions(const AttentionBlock& b, const Pages& p) {
    if (b.rotary)
        for (int64_t s = 0; s < p.count; s++)
            TORCH_CHECK(p.spans[s].context <= b.positions, "position ", p.spans[s].context,
                        " is beyond the rotary table");
}

template <class... A>
void attention_block_op(Tensor x, Tensor cache, const Tensor& spans, const Tensor& tables,
                        int64_t block_size, A... args) {
    float* in = floats(x, "x");
    TORCH_CHECK(cache.dim() == 4, "the cache must have 4 dimensions, got ", cache.dim());
    const int64_t kv_heads = cache.size(2), head = cache.size(3);
    int64_t blocks;
    const Cache c = cache_of(cache, kv_heads, head, block_size, blocks);
    const Pages p = pages_of(spans, tables, x.size(0), block_size, blocks);
    const AttentionBlock b = bind_attention(x.size(1), kv_heads, head, args...);
    check_positions(b, p);
    Op op;
    if (x.size(0)) attention_block(in, x.size(1), b, c, p);
}

template <class... A>
Tensor topk_block_op(Tensor x, const Tensor& counts, int64_t k_max, A... args) {
    float* in = floats(x, "x");
    const TopK b = bind_topk(x.size(1), args...);
    const Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(t.count == x.size(0) && k_max <= b.count, "counts do not fit");
    Tensor load = at::zeros({b.count}, at::kLong);
    Op op;
    if (t.count) topk_block(in, x.size(1), b, t, load.data_ptr<int64_t>());
    return load;
}

template <class... A>
Tensor infinity_block_op(Tensor x, const Tensor& counts, const Tensor& seeds,
                         const Tensor& positions, int64_t k_max, A... args) {
    float* in = floats(x, "x");
    const Infinity b = bind_infinity(x.size(1), args...);
    Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(t.count == x.size(0) && seeds.numel() == t.count && positions.numel() == t.count,
                "counts do not fit");
    t.seeds = data<const int64_t>(seeds, "seeds"),
    t.positions = data<const int64_t>(positions, "positions");
    Tensor load = at::zeros({b.scored}, at::kLong);
    Op op;
    if (t.count) infinity_block(in, x.size(1), b, t, load.data_ptr<int64_t>());
    return load;
}

template <class... A>
void ffn_block_op(Tensor x, A... args) {
    float* in = floats(x, "x");
    const DenseBlock b = bind_ffn(x.size(1), args...);
    Op op;
    if (x.size(0)) ffn_block(in, x.size(0), x.size(1), b.norm, b.ffn, b.up_bias, b.down_bias);
}

// The op of a block takes what `bind` takes after the shape, by value.
template <class... A>
constexpr auto attention_op(AttentionBlock (*)(int64_t, int64_t, int64_t, A...)) {
    return &attention_block_op<std::decay_t<A>...>;
}
template <class... A>
constexpr auto topk_op(TopK (*)(int64_t, A...)) {
    return &topk_block_op<std::decay_t<A>...>;
}
template <class... A>
constexpr auto infinity_op(Infinity (*)(int64_t, A...)) {
    return &infinity_block_op<std::decay_t<A>...>;
}
template <class... A>
constexpr auto ffn_op(DenseBlock (*)(int64_t, A...)) {
    return &ffn_block_op<std::decay_t<A>...>;
}
