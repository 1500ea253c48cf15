// The parameters of the ops by name, a struct for each. `each` lists a struct's members once; the
// op's schema, the reading of its arguments and the tensors that a bound block keeps alive follow
// from that list. model/backends/cpu/kernels/params.py has dataclasses with the same names, and
// sorts their values by the schema: neither side counts arguments. The parameters of mixtures are
// in `mixture_params.h`.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace moedial {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// An argument's name in the schema: a member of a packed matrix or of a norm has a suffix, one of a
// second layer a prefix.
struct Name {
    const char* stem;
    const char* suffix = "";
    const char* prefix = "";
};

// One or several packed matrices, as model/backends/cpu/kernels/pack.py makes them.
struct PackedParams {
    Tensor packed;
    OptionalTensor scales;  // of int8 matrices; of grouped ones the factors
    int64_t group = 0;      // inputs that share a scale; 0: not grouped
    OptionalTensor table;   // the values of 4-bit codes; none: codes are bytes
    int64_t header = 0;     // bytes of a group's scale and minimum (`GroupCodes`)

    void each(auto&& visit, const char* name) {
        visit({name}, packed);
        visit({name, "_scales"}, scales);
        visit({name, "_group"}, group);
        visit({name, "_table"}, table);
        visit({name, "_header"}, header);
    }
};

struct NormParams {
    OptionalTensor weight, bias;  // no weight: no norm; with a bias LayerNorm, else RMSNorm
    double eps = 0;

    void each(auto&& visit, const char* name = "norm") {
        visit({name, "_weight"}, weight);
        visit({name, "_bias"}, bias);
        visit({name, "_eps"}, eps);
    }
};

// scale * (W norm(x) + bias).
struct LinearParams {
    NormParams norm;
    PackedParams weight;
    int64_t outputs = 0;
    OptionalTensor bias;
    double scale = 1;

    void each(auto&& visit) {
        norm.each(visit);
        weight.each(visit, "weight");
        visit({"outputs"}, outputs);
        visit({"bias"}, bias);
        visit({"scale"}, scale);
    }
};

// Feed-forward experts of `units` units. Gated experts store 32 gates, then their 32 ups, and so
// on. Biases are padded like the outputs.
struct ExpertsParams {
    PackedParams up, down;
    int64_t units = 0, activation = 0;
    bool gated = false;
    OptionalTensor up_bias, down_bias;

    void each(auto&& visit) {
        up.each(visit, "up");
        down.each(visit, "down");
        visit({"units"}, units);
        visit({"gated"}, gated);
        visit({"activation"}, activation);
        visit({"up_bias"}, up_bias);
        visit({"down_bias"}, down_bias);
    }
};

// x += residual_scale * feed-forward(norm(x)).
struct FeedForwardParams {
    NormParams norm;
    ExpertsParams expert;
    double residual_scale = 1;

    void each(auto&& visit) {
        norm.each(visit);
        expert.each(visit);
        visit({"residual_scale"}, residual_scale);
    }
};

// Which keys a query sees, and how scores become weights.
struct MaskParams {
    double scale = 1;
    int64_t window = 0, chunk = 0;  // 0: everything before
    double softcap = 0;             // 0: none
    OptionalTensor sinks;           // [heads]

    void each(auto&& visit) {
        visit({"scale"}, scale);
        visit({"window"}, window);
        visit({"chunk"}, chunk);
        visit({"softcap"}, softcap);
        visit({"sinks"}, sinks);
    }
};

// x += residual_scale * attention(norm(x)).
struct AttentionParams {
    NormParams norm;
    PackedParams qkv, out;
    OptionalTensor qkv_bias, out_bias;
    OptionalTensor q_norm, k_norm;  // over all heads at once, or over each
    bool norm_per_head = false, norm_after_rotary = false;
    double clip = 0;             // 0: none
    OptionalTensor rotary;       // [positions, 2, half the rotated elements of a head]
    OptionalTensor query_scale;  // [positions]
    bool gated = false;          // `qkv` gives queries, keys, values and gates
    int64_t heads = 0, kv_heads = 0, head_width = 0;
    double residual_scale = 1;
    MaskParams mask;

    void each(auto&& visit) {
        norm.each(visit);
        qkv.each(visit, "qkv");
        visit({"qkv_bias"}, qkv_bias);
        visit({"q_norm"}, q_norm);
        visit({"k_norm"}, k_norm);
        visit({"norm_per_head"}, norm_per_head);
        visit({"norm_after_rotary"}, norm_after_rotary);
        visit({"clip"}, clip);
        visit({"rotary"}, rotary);
        visit({"query_scale"}, query_scale);
        visit({"gated"}, gated);
        out.each(visit, "out");
        visit({"out_bias"}, out_bias);
        visit({"heads"}, heads);
        visit({"kv_heads"}, kv_heads);
        visit({"head_width"}, head_width);
        visit({"residual_scale"}, residual_scale);
        mask.each(visit);
    }
};

// x += gated delta net(norm(x)). The parts are described at `DeltaBlock` (values.h).
struct DeltaParams {
    NormParams norm;
    PackedParams project, rates, out;
    Tensor rates_bias;   // zeros, then what is added to the decay's logits
    Tensor convolution;  // [kernel, channels]
    Tensor decay;        // [padded heads]
    Tensor head_norm;    // of each head's output
    int64_t key_heads = 0, value_heads = 0, key_width = 0, value_width = 0;

    void each(auto&& visit) {
        norm.each(visit);
        project.each(visit, "project");
        rates.each(visit, "rates");
        visit({"rates_bias"}, rates_bias);
        visit({"convolution"}, convolution);
        visit({"decay"}, decay);
        visit({"head_norm"}, head_norm);
        out.each(visit, "out");
        visit({"key_heads"}, key_heads);
        visit({"value_heads"}, value_heads);
        visit({"key_width"}, key_width);
        visit({"value_width"}, value_width);
    }
};

// x += residual_scale * latent attention(norm(x)). The parts are described at `LatentBlock`
// (values.h). `down_bias` is padded like the outputs.
struct LatentParams {
    NormParams norm, query_norm, latent_norm;
    PackedParams down, query, to_keys, to_values, out;
    OptionalTensor down_bias, out_bias;
    Tensor rotary;  // [positions, 2, half the rotated elements]
    int64_t heads = 0, query_rank = 0, rank = 0, plain_width = 0, value_width = 0;
    double residual_scale = 1;
    MaskParams mask;

    void each(auto&& visit) {
        norm.each(visit);
        query_norm.each(visit, "query_norm");
        latent_norm.each(visit, "latent_norm");
        down.each(visit, "down");
        visit({"down_bias"}, down_bias);
        query.each(visit, "query");
        to_keys.each(visit, "to_keys");
        to_values.each(visit, "to_values");
        out.each(visit, "out");
        visit({"out_bias"}, out_bias);
        visit({"rotary"}, rotary);
        visit({"heads"}, heads);
        visit({"query_rank"}, query_rank);
        visit({"rank"}, rank);
        visit({"plain_width"}, plain_width);
        visit({"value_width"}, value_width);
        visit({"residual_scale"}, residual_scale);
        mask.each(visit);
    }
};

inline const char* schema_type(const Tensor&) { return "Tensor"; }
inline const char* schema_type(const OptionalTensor&) { return "Tensor?"; }
inline const char* schema_type(int64_t) { return "int"; }
inline const char* schema_type(double) { return "float"; }
inline const char* schema_type(bool) { return "bool"; }

// An op's schema. `before`: its name and the arguments that change with every step, as in
// "linear(Tensor x". The parameters follow by name, then the result.
template <class Params>
c10::FunctionSchema schema(const std::string& before, const std::string& result) {
    std::string text = before;
    Params{}.each([&](Name name, const auto& member) {
        text +=
            std::string(", ") + schema_type(member) + " " + name.prefix + name.stem + name.suffix;
    });
    return torch::schema((text + ") -> " + result).c_str());
}

// The tensors of some parameters. Code that keeps pointers into their memory must keep these.
template <class Params>
std::vector<Tensor> tensors_of(Params params) {
    std::vector<Tensor> found;
    const auto add = [&](const auto& member) {
        using Member = std::decay_t<decltype(member)>;
        if constexpr (std::is_same_v<Member, Tensor>) found.push_back(member);
        if constexpr (std::is_same_v<Member, OptionalTensor>)
            if (member) found.push_back(*member);
    };
    params.each([&](Name, const auto& member) { add(member); });
    return found;
}

// Reads an argument from torch's stack, which is dropped afterwards: tensors are moved.
inline void take(c10::IValue& value, Tensor& member) { member = std::move(value).toTensor(); }
inline void take(c10::IValue& value, OptionalTensor& member) {
    if (!value.isNone()) member = std::move(value).toTensor();
}
inline void take(c10::IValue& value, int64_t& member) { member = value.toInt(); }
inline void take(c10::IValue& value, double& member) { member = value.toDouble(); }
inline void take(c10::IValue& value, bool& member) { member = value.toBool(); }

// Pushes a result onto the stack; a tuple part by part.
template <class Result>
void push(torch::jit::Stack& stack, Result result) {
    torch::jit::push(stack, std::move(result));
}
template <class... Parts>
void push(torch::jit::Stack& stack, std::tuple<Parts...> parts) {
    std::apply([&](auto&... part) { torch::jit::push(stack, std::move(part)...); }, parts);
}

// Calls kernel(params, step arguments...) with what torch has put on its stack: the arguments that
// change with every step, then the parameters in the order of `each`. The number of arguments is
// the schema's, which was made from the same list.
template <auto kernel, class Result, class Params, class... Step>
void call_boxed(Result (*)(const Params&, Step...), size_t count, torch::jit::Stack& stack) {
    c10::IValue* first = stack.data() + stack.size() - count;
    c10::IValue* next = first + sizeof...(Step);
    Params params;
    params.each([&](Name, auto& member) { take(*next++, member); });
    const auto call = [&]<size_t... Index>(std::index_sequence<Index...>) {
        return kernel(params, first[Index].template to<std::decay_t<Step>>()...);
    };
    // The result replaces the arguments on the stack.
    if constexpr (std::is_void_v<Result>) {
        call(std::index_sequence_for<Step...>{});
        torch::jit::drop(stack, count);
    } else {
        Result result = call(std::index_sequence_for<Step...>{});
        torch::jit::drop(stack, count);
        push(stack, std::move(result));
    }
}

template <auto kernel>
void boxed(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
    call_boxed<kernel>(kernel, op.schema().arguments().size(), *stack);
}

// Wraps a kernel of the form kernel(const Params&, step arguments...) for torch's registry.
template <auto kernel>
torch::CppFunction by_name() {
    return torch::CppFunction::makeFromBoxedFunction<&boxed<kernel>>();
}

}  // namespace moedial
