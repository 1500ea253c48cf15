"""ST-MoE and noisy top-k decoders (arXiv 2202.08906, arXiv 1701.06538), in a layout of ours: OLMoE's tensors."""

from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.shapes.decoder import DecoderConfig
from model.shapes.dropping import Dropping
from model.shapes.mixtures import Router, TopK

THRESHOLD = 0.2  # of a second expert's weight
MIN_CAPACITY = 4


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts`, `num_experts_per_tok` and `intermediate_size` of one expert.

    The weights are the softmax over the kept logits (Shazeer et al. 2017), or with `norm_topk_prob` false the softmax
    over all. Noise (`noisy_gating`) is of training: while serving, logits are those of the gate alone. No token is
    dropped without `drop_tokens`, and no second expert without `second_expert_policy: "threshold"`.
    """
    hf_config.mark_read("noisy_gating")
    mixture = TopK(
        experts=hf_config["num_experts"],
        width=hf_config["intermediate_size"],
        trained=hf_config["num_experts_per_tok"],
        router=Router(normalise=hf_config.get("norm_topk_prob", True)),
        activation=activation(hf_config),
        dropping=_dropping(hf_config, hf_config["num_experts"]),
    )
    return decoder(hf_config, attention(hf_config, rope(hf_config, head_width(hf_config))), mixture)


def _dropping(hf_config: ConfigReader, experts: int) -> Dropping | None:
    """By `second_expert_policy`, and with `drop_tokens` by `eval_capacity_factor`."""
    hf_config.expect("second_expert_policy", "all", "threshold")  # "random" and "sampling" are drawn
    by_weight, by_capacity = hf_config.get("second_expert_policy") == "threshold", hf_config.get("drop_tokens", False)
    threshold = hf_config.get("second_expert_threshold", THRESHOLD) if by_weight else 0.0
    factor, least = hf_config.get("eval_capacity_factor", 2.0), hf_config.get("min_expert_capacity", MIN_CAPACITY)
    prioritised = hf_config.get("batch_prioritized_routing", False)
    if not by_capacity:
        return Dropping(threshold) if by_weight else None
    if not factor > 0:
        raise ValueError(f"eval_capacity_factor must be above 0, got {factor!r:.40}")
    return Dropping(threshold, share=factor / experts, prioritised=prioritised, least=least)
