"""New models: initial weights, and the forms of mixtures that training wants: with all experts in few large products,
and with gradients where the served form has none.

Every form here gives what the served one gives; tests compare.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.attention import SelfAttention
from model.decoder import Decoder
from model.encoder_decoder import CrossLayer, decoder_of
from model.moe.base import Choice, RoutedPairs
from model.moe.deep import DeepMixture
from model.moe.mu_moe import FactorisedMap, MultilinearMixture, entmax15
from model.moe.soft_segments import SegmentMixture
from model.moe.topk import TopKMixture
from model.step import LayerStep
from training.step import initialise
from weights.config import decoder_config

SCALE = 8.0  # of soft logits: cosines are small, and at the published 1 all weights stay alike for long
EMBEDDINGS = 0.3  # their size in a T5
STEEPEST = 1.0  # of a T5's biases: what a bucket of distance costs in the first head
TEMPERATURE = 4.0  # of DynMoE's cosines


def fresh_model(raw: Mapping[str, Any], seed: int) -> Decoder:
    """A model with initial weights, in its form for training."""
    model = decoder_of(decoder_config(raw))
    initialise(model, seed)
    with torch.no_grad():
        if model.config.encoder is not None:
            _begin_as_t5(model)
        for module in model.modules():
            if isinstance(module, FactorisedMap):
                _begin_factors(module)
        for name, parameter in model.named_parameters():
            if name.endswith("ffn.scale"):
                nn.init.constant_(parameter, SCALE)
            elif name.endswith("ffn.temperature"):
                nn.init.constant_(parameter, TEMPERATURE)
            elif name.endswith(("expert_bias", "ffn.thresholds")):
                nn.init.zeros_(parameter)
    as_trained(model)
    return model


@torch.no_grad()
def begin_from(model: Decoder, base: Decoder) -> None:
    """Take over what is no mixture: embeddings, attention and norms."""
    theirs = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if ".ffn." not in name:
            parameter.copy_(theirs[name])


def _begin_as_t5(model: Decoder) -> None:
    """T5's initial weights: queries so small that scores need no scale. Ours, for short trainings: smaller embeddings,
    which what the layers add soon outweighs; and biases by distance, steeper in each head than in the next (as in
    ALiBi, arXiv 2108.12409), since from zero they grow slowly."""
    nn.init.normal_(model.embed.weight, std=EMBEDDINGS)
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder_bias", "decoder_bias")):
            buckets, heads = parameter.shape
            one_way = buckets // 2 if name.startswith("encoder") else buckets
            bucket_X1 = torch.arange(buckets)[:, None] % one_way
            parameter.copy_(-bucket_X1 * STEEPEST * 0.25 ** torch.arange(heads))
    for layer in model.layers:
        if isinstance(layer.attention, SelfAttention):
            queries = layer.attention.sizes[0]
            layer.attention.qkv.weight[:queries] *= layer.attention.shape.head_width**-0.5
        if isinstance(layer, CrossLayer):
            layer.cross.query.weight.mul_(layer.cross.shape.head_width**-0.5)


def _begin_factors(map_: FactorisedMap) -> None:
    """µMoE's initial weights: experts around one, so that all begin alike."""
    nn.init.normal_(map_.experts, mean=1.0, std=1.0)
    nn.init.normal_(map_.inputs, std=len(map_.inputs) ** -0.5)


def as_trained(model: Decoder) -> None:
    """Give the mixtures their form for training."""
    for layer in model.layers:
        module: Any = layer.ffn
        if isinstance(module, SegmentMixture):
            module.execute = module.run_dense
            object.__setattr__(module, "segment_logits", partial(whole_segments, module))
        if isinstance(module, TopKMixture) and module.config.router.score == "top_any":
            object.__setattr__(module, "choose", partial(_straight_through, module))
        if isinstance(module, DeepMixture):
            object.__setattr__(module, "run", partial(run_level, module))
        if isinstance(module, MultilinearMixture):
            object.__setattr__(module, "weights", partial(_sparse_weights, module))


def _straight_through(module: TopKMixture, logits_TE: Tensor, step: LayerStep) -> Choice:
    """The choice with weights of 1 whose gradient is that of sigmoid(logit) - sigmoid(threshold)."""
    choice = TopKMixture.choose(module, logits_TE, step)
    soft_TE = logits_TE.sigmoid() - (module.temperature * module.thresholds).sigmoid()
    weight_TE = 1 + soft_TE - soft_TE.detach()
    return replace(choice, weight_TK=weight_TE.gather(-1, choice.expert_TK))


def run_level(module: DeepMixture, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
    """`DeepMixture.run` over all experts, with zero weights."""
    weight_TE = pairs.weight_R.new_zeros(len(x_TD), module.shape.experts)
    weight_TE = weight_TE.index_put((pairs.token_R, pairs.expert_R), pairs.weight_R)
    bias = module.expert_bias.flatten() if module.shape.bias else None
    h_TEF = F.linear(x_TD, module.experts.flatten(0, 1), bias).relu().unflatten(-1, module.experts.shape[:2])
    return torch.einsum("tef,te->tf", h_TEF, weight_TE)


def whole_segments(module: SegmentMixture, x_TD: Tensor, step: LayerStep) -> Tensor:
    """`SegmentMixture.segment_logits` of whole sequences, all equally long; no state is kept."""
    sequences, segment = step.spans, module.shape.segment
    length = sequences[0].rows
    x_BSD = x_TD.float().unflatten(0, (-1, length))
    means = [x_BSD[:, :1]] + [part.mean(1, keepdim=True) for part in x_BSD.split(segment, dim=1)]
    count = -(-length // segment)
    logits_BNE = module.logits(torch.cat(means[:count], dim=1))
    return logits_BNE.repeat_interleave(segment, dim=1)[:, :length].flatten(0, 1)


class Entmax(torch.autograd.Function):
    """`entmax15` with its gradient, which automatic differentiation cannot find at the edge of the support."""

    @staticmethod
    def forward(context: Any, logits_TE: Tensor) -> Tensor:
        weight_TE = entmax15(logits_TE)
        context.save_for_backward(weight_TE)
        return weight_TE

    @staticmethod
    def backward(context: Any, grad_TE: Tensor) -> Tensor:
        (weight_TE,) = context.saved_tensors
        root_TE = weight_TE.sqrt()
        mean_T1 = (grad_TE * root_TE).sum(-1, keepdim=True) / root_TE.sum(-1, keepdim=True)
        return root_TE * (grad_TE - mean_T1)


def _sparse_weights(module: MultilinearMixture, x_TD: Tensor) -> Tensor:
    logits_TE = module.gate(x_TD).float()
    if module.shape.gate_norm == "layer":
        logits_TE = F.layer_norm(logits_TE, logits_TE.shape[-1:])
    weight_TE: Tensor = Entmax.apply(logits_TE)
    return weight_TE
