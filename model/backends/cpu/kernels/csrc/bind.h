// `bind` turns parameters (`params.h`) into the plain values that kernels read (`values.h`,
// `mixtures.h`); each struct of parameters has an overload. Everything that is known of a block
// before a step is checked here.
#pragma once
#include "checks.h"
#include "mixture_params.h"

namespace moedial {

inline Matrix matrix(const PackedParams& params, int64_t outputs, int64_t inputs,
                     int64_t count = 1) {
    if (!params.group) return matrix(params.packed, params.scales, outputs, inputs, count);
    const GroupCodes codes = group_codes(params.group, params.table, params.header);
    return grouped_matrix(params.packed, params.scales, codes, outputs, inputs, count);
}

// A norm over `width` values. Without a weight it does nothing.
inline Norm bind(int64_t width, const NormParams& params) {
    return {vector(params.weight, width, "norm weight"), vector(params.bias, width, "norm bias"),
            float(params.eps)};
}

// W norm(x) + bias. `outputs`: the outputs of W without its padding.
struct NormedLinear {
    Norm norm;
    Linear layer;
    int64_t outputs = 0;
};

inline NormedLinear bind(int64_t width, const LinearParams& params) {
    const Matrix weight = matrix(params.weight, params.outputs, width);
    return {bind(width, params.norm),
            {weight, vector(params.bias, params.outputs, "bias"), float(params.scale)},
            params.outputs};
}

// `count` experts of `units` units each, stored with units padded to a multiple of 16: padded units
// have zeros in both matrices and add nothing.
inline Experts experts_of(const PackedParams& up, const PackedParams& down, int64_t count,
                          int64_t units, int64_t width, bool gated, int64_t activation) {
    TORCH_CHECK(count > 0 && units > 0 && width > 0, "experts need at least one unit and input");
    TORCH_CHECK(0 <= activation && activation <= (gated ? SWIGLU_CLAMPED : RELU), "activation ",
                activation, " is not known");
    Experts experts;
    experts.units = up_to(units, 16), experts.gated = gated;
    experts.activation = Activation(activation);
    experts.up = matrix(up, gated ? 2 * experts.units : experts.units, width, count);
    experts.down = matrix(down, width, experts.units, count);
    return experts;
}

// Biases are as long as the padded outputs, because they are added to whole vectors.
inline Experts bind(int64_t width, const ExpertsParams& params, int64_t count) {
    Experts experts = experts_of(params.up, params.down, count, params.units, width, params.gated,
                                 params.activation);
    experts.up_bias = vector(params.up_bias, count * experts.up.outputs, "up bias");
    experts.down_bias = vector(params.down_bias, count * experts.down.outputs, "down bias");
    return experts;
}

inline FeedForward bind(int64_t width, const FeedForwardParams& params) {
    return {bind(width, params.norm), bind(width, params.expert, 1), float(params.residual_scale)};
}

inline Attention bind(const MaskParams& params, int64_t heads, int64_t kv_heads) {
    TORCH_CHECK(kv_heads > 0 && heads > 0 && heads % kv_heads == 0, heads, " heads cannot share ",
                kv_heads, " key-value heads");
    Attention attention;
    attention.heads = heads, attention.scale = float(params.scale);
    TORCH_CHECK(params.window >= 0 && params.chunk >= 0, "window and chunk cannot be ",
                params.window, " and ", params.chunk);
    attention.window = params.window, attention.chunk = params.chunk;
    attention.softcap = float(params.softcap);
    attention.sinks = vector(params.sinks, heads, "sinks");
    return attention;
}

// A table of rotary positions of at most `width` elements, or none.
inline Rotary rotary_of(const OptionalTensor& table, int64_t width) {
    if (!table) return {};
    const float* values = floats(*table, "rotary", 3);
    TORCH_CHECK(table->size(1) == 2 && 2 * table->size(2) <= width,
                "the rotary table must be [positions, 2, at most ", width / 2, "], got ",
                table->sizes());
    return {values, table->size(0), table->size(2)};
}

// Queries, keys, values and gates come from one matrix, [heads + 2 kv_heads][head_width] outputs
// and, with gates, [heads][head_width] more.
inline AttentionBlock bind(int64_t width, const AttentionParams& params) {
    const int64_t head = params.head_width;
    const int64_t queries = params.heads * head, keys = params.kv_heads * head;
    const int64_t qkv = queries + 2 * keys + (params.gated ? queries : 0);
    AttentionBlock block;
    block.kv_heads = params.kv_heads, block.head_width = head;
    block.norm = bind(width, params.norm);
    // Queries and keys are normed over all heads at once, or each head on its own.
    const auto head_norm = [&](const OptionalTensor& weight, int64_t all) {
        return bind(params.norm_per_head ? head : all, NormParams{weight, {}, params.norm.eps});
    };
    block.query_norm = head_norm(params.q_norm, queries);
    block.key_norm = head_norm(params.k_norm, keys);
    block.norm_per_head = params.norm_per_head;
    block.norm_after_rotary = params.norm_after_rotary;
    block.clip = float(params.clip), block.gated = params.gated;
    block.qkv = {matrix(params.qkv, qkv, width), vector(params.qkv_bias, qkv, "qkv bias")};
    block.out = {matrix(params.out, width, queries), vector(params.out_bias, width, "out bias"),
                 float(params.residual_scale)};
    block.attention = bind(params.mask, params.heads, params.kv_heads);
    block.rotary = rotary_of(params.rotary, head);
    if (params.query_scale) {
        block.query_scale = floats(*params.query_scale, "query scale", 1);
        block.query_positions = params.query_scale->size(0);
    }
    return block;
}

// Requires that a head's columns and the convolution's channels are whole vectors.
inline DeltaBlock bind(int64_t width, const DeltaParams& params) {
    TORCH_CHECK(params.key_heads > 0 && params.value_heads > 0 &&
                    params.value_heads % params.key_heads == 0,
                params.value_heads, " value heads cannot share ", params.key_heads, " key heads");
    TORCH_CHECK(params.key_width > 0 && params.key_width % 16 == 0 && params.value_width > 0 &&
                    params.value_width % 16 == 0,
                "keys and values of a delta net must be multiples of 16 wide, got ",
                params.key_width, " and ", params.value_width);
    DeltaBlock block;
    block.key_heads = params.key_heads, block.heads = params.value_heads;
    block.key_width = params.key_width, block.value_width = params.value_width;
    const int64_t channels = block.channels(), rates = block.rate_width();
    TORCH_CHECK(params.convolution.dim() == 2 && params.convolution.size(0) > 0 &&
                    params.convolution.size(0) <= MAX_TAPS &&
                    params.convolution.size(1) == channels,
                "the convolution must be [1 to ", MAX_TAPS, ", ", channels, "], got ",
                params.convolution.sizes());
    block.kernel = params.convolution.size(0);
    block.convolution = floats(params.convolution, "convolution");
    block.norm = bind(width, params.norm);
    block.head_norm = bind(params.value_width, NormParams{params.head_norm, {}, params.norm.eps});
    block.project = matrix(params.project, channels + block.values(), width);
    block.rates = {matrix(params.rates, rates, width),
                   vector(params.rates_bias, rates, "rates bias")};
    block.decay = vector(params.decay, block.padded_heads(), "decay");
    block.out = matrix(params.out, width, block.values());
    return block;
}

// Requires that latents and values of a head are whole vectors, of bfloat16 pairs too. The bias of
// `down` is as long as the padded outputs, because it is added to whole vectors.
inline LatentBlock bind(int64_t width, const LatentParams& params) {
    const int64_t heads = params.heads, rank = params.rank, values = params.value_width;
    TORCH_CHECK(heads > 0 && params.query_rank >= 0 && params.plain_width > 0 && rank > 0 &&
                    rank % 32 == 0 && values > 0 && values % 16 == 0,
                "latents of ", rank, " must be multiples of 32 wide, values of ", values,
                " multiples of 16");
    LatentBlock block;
    block.rotary = rotary_of(params.rotary, params.rotary.size(-1) * 2);
    block.query_rank = params.query_rank, block.rank = rank;
    block.plain_width = params.plain_width;
    const int64_t rotated = 2 * block.rotary.half, low = params.query_rank + rank + rotated;
    block.norm = bind(width, params.norm);
    block.query_norm = bind(params.query_rank, params.query_norm);
    block.latent_norm = bind(rank, params.latent_norm);
    const Matrix down = matrix(params.down, low, width);
    block.down = {down, vector(params.down_bias, down.outputs, "down bias")};
    block.query = {matrix(params.query, heads * (params.plain_width + rotated),
                          params.query_rank ? params.query_rank : width)};
    block.to_keys = matrix(params.to_keys, rank, params.plain_width, heads);
    block.to_values = matrix(params.to_values, values, rank, heads);
    block.out = {matrix(params.out, width, heads * values),
                 vector(params.out_bias, width, "out bias"), float(params.residual_scale)};
    block.attention = bind(params.mask, heads, 1);
    return block;
}

// Checks that a table by position has a row for every position of the step.
inline void check_positions(const float* table, int64_t positions, const Pages& pages,
                            const char* name) {
    if (!table) return;
    for (int64_t span = 0; span < pages.count; span++)
        TORCH_CHECK(pages.spans[span].context <= positions, "position ", pages.spans[span].context,
                    " is beyond the ", name);
}

inline void check_positions(const AttentionBlock& block, const Pages& pages) {
    check_positions(block.rotary.table, block.rotary.positions, pages, "rotary table");
    check_positions(block.query_scale, block.query_positions, pages, "query scales");
}

inline void check_positions(const LatentBlock& block, const Pages& pages) {
    check_positions(block.rotary.table, block.rotary.positions, pages, "rotary table");
}

// Repair tables: both, or none.
inline Repair bind(int64_t width, const RepairParams& params) {
    if (!params.scale || !params.shift) return {};
    TORCH_CHECK(params.scale->dim() == 2 && params.scale->size(1) == width &&
                    params.shift->sizes() == params.scale->sizes(),
                "repair must be two tables [counts, ", width, "], got ", params.scale->sizes(),
                " and ", params.shift->sizes());
    return {floats(*params.scale, "repair scale"), floats(*params.shift, "repair shift"),
            params.scale->size(0)};
}

// A router without its matrix: the op `route` is given logits.
inline Router bind(const RoutingParams& params, int64_t experts) {
    const int64_t groups = params.groups, kept = params.kept_groups;
    TORCH_CHECK(experts > 0, "a router needs at least one expert, got ", experts);
    TORCH_CHECK(0 <= params.score && params.score <= SPARSE_MIXER, "score ", params.score,
                " is not known");
    TORCH_CHECK(1 <= kept && kept <= groups && experts % groups == 0, experts,
                " experts cannot be cut into ", groups, " groups, of which ", kept, " are kept");
    TORCH_CHECK(params.score != SPARSE_MIXER || (!params.selection_bias && groups == 1),
                "a sparse mixer has neither groups nor a selection bias");
    Router router;
    router.experts = experts, router.trained = params.trained;
    router.score = Score(params.score), router.normalise = params.normalise;
    router.scale = float(params.weight_scale);
    router.selection_bias = vector(params.selection_bias, experts, "selection bias");
    router.groups = groups, router.kept_groups = kept, router.top2 = params.top2;
    router.jitter = float(params.jitter);
    router.eps = float(params.normalise_eps), router.clamp_sum = params.clamp_sum;
    TORCH_CHECK(0 <= params.trained && params.trained <= router.max_count(), "the trained count ",
                params.trained, " is not one of ", router.max_count(), " experts");
    return router;
}

inline TopK bind(int64_t width, const TopKParams& params) {
    const int64_t experts = params.router.experts;
    TopK block;
    block.norm = bind(width, params.norm);
    const int64_t pieces = params.shared_pieces, gate = params.router.shared_gate;
    TORCH_CHECK(0 <= pieces && pieces <= 1 << 20, "a shared part of ", pieces, " pieces");
    const Matrix router = matrix(params.router.router, experts + gate, width);
    block.router = bind(params.router.routing, experts);
    block.router.logits = {router, vector(params.router.logit_bias, router.outputs, "logit bias")};
    block.experts = bind(width, params.experts, experts + pieces);
    if (params.shared.units) block.shared.layer = bind(width, params.shared, 1);
    block.shared.pieces = pieces, block.shared.gated = gate;
    block.experts.weigh_input = params.router.weigh_input;
    block.repair = bind(width, params.repair);
    block.residual_scale = float(params.residual_scale);
    return block;
}

// `latent_dim`: dimensions of the Gaussians.
inline Draws bind(const DrawsParams& params, int64_t latent_dim) {
    Draws draws;
    draws.quantiles = data<const float>(params.quantiles, "quantiles");
    if (params.points) {
        TORCH_CHECK(params.points->dim() == 2 && params.points->size(1) == latent_dim,
                    "points must be [largest count, ", latent_dim, "], got ",
                    params.points->sizes());
        draws.points = floats(*params.points, "points");
        draws.point_rows = params.points->size(0);
    }
    draws.layer = params.layer, draws.latent_dim = latent_dim;
    draws.exponential = params.exponential, draws.antithetic = params.antithetic;
    draws.sigma_min = float(params.sigma_min);
    return draws;
}

// The wide layer's matrices by units, if both are given, in the kind of the panels. Not for int8.
inline UnitRows unit_rows(int64_t width, const InfinityParams& params, const Experts& tiles) {
    if (!params.up_rows || !params.down_rows) return {};
    const Tensor &up = *params.up_rows, &down = *params.down_rows;
    TORCH_CHECK(tiles.up.kind <= BFLOAT16 && tiles.up.kind == tiles.down.kind,
                "int8 units have no rows of their own");
    TORCH_CHECK(width % 16 == 0, "unit rows need a width that is a multiple of 16, got ", width);
    for (const Tensor& rows : {up, down})
        TORCH_CHECK(rows.is_contiguous() && rows.scalar_type() == params.up.packed.scalar_type(),
                    "unit rows must be like the panels");
    TORCH_CHECK(
        up.numel() == params.units * tiles.up.inputs && down.numel() == params.units * width,
        "unit rows: shapes do not fit");
    return {(const int32_t*)up.data_ptr(), (const char*)down.data_ptr(), params.crossover_rows};
}

// A group has units / groups units, and a tile holds whole groups; the last tile may have padding.
inline Infinity bind(int64_t width, const InfinityParams& params) {
    const int64_t units = params.units, groups = params.groups, tile_units = params.tile_units;
    TORCH_CHECK(groups > 0 && units > 0 && units % groups == 0 && tile_units > 0 &&
                    tile_units % 16 == 0 && tile_units % (units / groups) == 0,
                groups, " groups of ", units, " units do not fit tiles of ", tile_units);
    TORCH_CHECK(
        1 <= params.kept && params.kept <= groups && params.draws.quantiles.numel() == 65536,
        "infinity: shapes do not fit");
    TORCH_CHECK(params.latent_dim > 0, "latent_dim must be at least 1, got ", params.latent_dim);
    Infinity block;
    block.norm = bind(width, params.norm);
    block.router = matrix(params.router, 2 * params.latent_dim, width);
    block.scores = matrix(params.scores, {}, groups, params.latent_dim);
    const int64_t tiles = (units + tile_units - 1) / tile_units;
    block.tiles =
        experts_of(params.up, params.down, tiles, tile_units, width, false, params.activation);
    block.draws = bind(params.draws, params.latent_dim);
    block.groups = groups, block.group_units = units / groups;
    block.rule = {params.kept, params.replacement, params.keep_norm};
    block.rows = unit_rows(width, params, block.tiles);
    block.repair = bind(width, params.repair);
    block.residual_scale = float(params.residual_scale);
    return block;
}

}  // namespace moedial
