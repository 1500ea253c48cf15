"""Switch Transformers (arXiv 2101.03961): T5 whose layers have, every so often, a mixture that runs one expert."""

from model.config_reader import ConfigReader
from model.encoder_reader import t5_dense, t5_layers, t5_like
from model.shapes.decoder import DecoderConfig
from model.shapes.dropping import Dropping
from model.shapes.mixtures import Dense, Router, TopK


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json; defaults are those of transformers' SwitchTransformersConfig.

    An expert is weighed with its softmax probability, as it is: of K experts the first contributes as it does alone.
    That is how the count can be raised, and an extrapolation. `drop_tokens` is our key: no token is dropped without it.
    """
    hf_config.expect("router_type", "tokens_masked")
    hf_config.expect("num_selected_experts", 1)
    hf_config.mark_read("feed_forward_proj", "router_dtype", "encoder_sparse_step", "decoder_sparse_step")
    layer = t5_dense(hf_config, hf_config.get("dense_act_fn", "relu"))
    mixture = TopK(
        experts=hf_config.get("num_experts", 8),
        width=layer.width,
        trained=1,
        router=Router(logit_bias=hf_config.get("router_bias", False)),
        activation=layer.activation,
        gated=False,
        fixed=True,
        dropping=_dropping(hf_config),
    )
    encoder_layers, decoder_layers = t5_layers(hf_config)
    encoder_sparse = hf_config.get("num_sparse_encoder_layers", 3)
    decoder_sparse = hf_config.get("num_sparse_decoder_layers", 3)
    tied = hf_config.get("tie_word_embeddings", True) is not False
    return t5_like(
        hf_config,
        _layers(encoder_layers, encoder_sparse, layer, mixture),
        _layers(decoder_layers, decoder_sparse, layer, mixture),
        shared_bias=True,
        tied=tied,
        scaled=tied,
    )


def _layers(count: int, sparse: int, layer: Dense, mixture: TopK) -> list[Dense | TopK]:
    """The second of every so many layers is a mixture, or every layer; with `sparse` 0 the second of all, as in
    transformers."""
    step = count // sparse if sparse > 0 else count
    return [mixture if step == 1 or number % step == 1 else layer for number in range(count)]


def _dropping(hf_config: ConfigReader) -> Dropping | None:
    tokens = hf_config.get("expert_capacity", 64)
    return Dropping(tokens=tokens) if hf_config.get("drop_tokens", False) else None
