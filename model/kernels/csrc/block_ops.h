// The ops of whole blocks of a decoder layer; included by ops.cpp, whose checks they share. All change x in place.

void attention_block_op(Tensor x, Tensor cache, const Tensor& spans, const Tensor& tables, int64_t block_size,
                        Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& qkv, Maybe qkv_side, Maybe qkv_bias,
                        Maybe q_norm, Maybe k_norm, bool norm_per_head, double clip, Maybe rotary, const Tensor& out,
                        Maybe out_side, Maybe out_bias, int64_t heads, double scale, int64_t window, double softcap, Maybe sinks) {
    float* in = floats(x, "x");
    TORCH_CHECK(cache.dim() == 4, "the cache must have 4 dimensions, got ", cache.dim());
    const int64_t rows = x.size(0), width = x.size(1), kv_heads = cache.size(2), head = cache.size(3);
    int64_t blocks;
    const Cache c = cache_of(cache, kv_heads, head, block_size, blocks);
    const Pages p = pages_of(spans, tables, rows, block_size, blocks);
    const int64_t queries = heads * head, keys = kv_heads * head;
    AttentionBlock b;
    b.norm = norm_of(norm_weight, norm_bias, eps, width);
    b.query_norm = norm_of(q_norm, {}, eps, norm_per_head ? head : queries);
    b.key_norm = norm_of(k_norm, {}, eps, norm_per_head ? head : keys);
    b.norm_per_head = norm_per_head, b.clip = float(clip);
    b.qkv = {matrix(qkv, qkv_side, queries + 2 * keys, width), vector(qkv_bias, queries + 2 * keys, "qkv bias")};
    b.out = {matrix(out, out_side, width, queries), vector(out_bias, width, "out bias")};
    b.attention = attention_of(heads, kv_heads, scale, window, softcap, sinks);
    if (rotary) {
        b.rotary = floats(*rotary, "rotary", 3);
        for (int64_t s = 0; s < p.count; s++)
            TORCH_CHECK(p.spans[s].context <= rotary->size(0), "position ", p.spans[s].context, " is beyond the rotary table");
        TORCH_CHECK(rotary->size(1) == 2 && rotary->size(2) == head / 2, "the rotary table must be [positions, 2, C / 2]");
    }
    Op op;
    if (rows) attention_block(in, width, b, c, p);
}

Tensor topk_block_op(Tensor x, const Tensor& counts, int64_t k_max, Maybe norm_weight, Maybe norm_bias, double eps,
                     const Tensor& router, Maybe router_side, const Tensor& up, Maybe up_side, const Tensor& down,
                     Maybe down_side, int64_t experts, int64_t units, int64_t activation, bool normalise) {
    float* in = floats(x, "x");
    const int64_t width = x.size(1);
    TopK layer;
    layer.norm = norm_of(norm_weight, norm_bias, eps, width);
    layer.router = matrix(router, router_side, experts, width);
    layer.experts = experts_of(up, up_side, down, down_side, experts, units, width, true, activation);
    layer.count = experts, layer.normalise = normalise;
    const Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(t.count == x.size(0) && k_max <= experts, "counts do not fit");
    Tensor load = at::empty({experts}, at::kLong);
    Op op;
    if (t.count) topk_block(in, width, layer, t, load.data_ptr<int64_t>());
    else load.zero_();
    return load;
}

Tensor infinity_block_op(Tensor x, const Tensor& counts, const Tensor& seeds, const Tensor& positions, int64_t k_max,
                         Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& router, Maybe router_side,
                         const Tensor& scores, int64_t space, const Tensor& up, Maybe up_side, const Tensor& down, Maybe down_side,
                         int64_t units, int64_t block_units, int64_t scored, int64_t kept, int64_t activation,
                         const Tensor& quantiles, int64_t layer, bool exponential, double sigma_min, bool antithetic,
                         Maybe up_rows, Maybe down_rows, int64_t few) {
    float* in = floats(x, "x");
    const int64_t width = x.size(1);
    TORCH_CHECK(scored > 0 && units > 0 && units % scored == 0 && block_units > 0 && block_units % 16 == 0 && block_units % (units / scored) == 0,
                "scores of ", units, " / ", scored, " units do not fit blocks of ", block_units);
    TORCH_CHECK(1 <= kept && kept <= scored && quantiles.numel() == 65536, "infinity: shapes do not fit");
    Infinity b;
    b.norm = norm_of(norm_weight, norm_bias, eps, width);
    TORCH_CHECK(space > 0, "the space must have at least one dimension");
    b.router = matrix(router, router_side, 2 * space, width);
    b.scores = matrix(scores, {}, scored, space);
    b.blocks = experts_of(up, up_side, down, down_side, (units + block_units - 1) / block_units, block_units, width, false, activation);
    b.draws = {data<const float>(quantiles, "quantiles"), layer, space, exponential, antithetic, float(sigma_min)};
    b.scored = scored, b.share = units / scored, b.kept = kept;
    if (up_rows && down_rows) {
        TORCH_CHECK(b.blocks.up.kind <= BFLOAT && b.blocks.up.kind == b.blocks.down.kind, "int8 units have no rows of their own");
        TORCH_CHECK(width % 16 == 0, "unit rows need a width that is a multiple of 16, got ", width);
        for (const Tensor& rows : {*up_rows, *down_rows})
            TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == up.scalar_type(), "unit rows must be like the panels");
        TORCH_CHECK(up_rows->numel() == units * b.blocks.up.k && down_rows->numel() == units * width, "unit rows: shapes do not fit");
        b.rows = {(const int32_t*)up_rows->data_ptr(), (const char*)down_rows->data_ptr(), few};
    }
    Tokens t = tokens_of(counts, k_max);
    TORCH_CHECK(t.count == x.size(0) && seeds.numel() == t.count && positions.numel() == t.count, "counts do not fit");
    t.seeds = data<const int64_t>(seeds, "seeds"), t.positions = data<const int64_t>(positions, "positions");
    Tensor load = at::empty({scored}, at::kLong);
    Op op;
    if (t.count) infinity_block(in, width, b, t, load.data_ptr<int64_t>());
    else load.zero_();
    return load;
}

void ffn_block_op(Tensor x, Maybe norm_weight, Maybe norm_bias, double eps, const Tensor& up, Maybe up_side,
                  Maybe up_bias, const Tensor& down, Maybe down_side, Maybe down_bias, int64_t units, bool gated,
                  int64_t activation) {
    float* in = floats(x, "x");
    const int64_t rows = x.size(0), width = x.size(1);
    const Experts e = experts_of(up, up_side, down, down_side, 1, units, width, gated, activation);
    const Norm before = norm_of(norm_weight, norm_bias, eps, width);
    const float* first = vector(up_bias, e.up.n, "up bias");
    const float* second = vector(down_bias, width, "down bias");
    Op op;
    if (rows) ffn_block(in, rows, width, before, e, first, second);
}
