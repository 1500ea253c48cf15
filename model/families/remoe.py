"""ReMoE (arXiv 2412.14711), in a layout of ours: ReLU in place of softmax, and experts with a weight above zero run."""

from model.config_reader import ConfigReader
from model.families.dynmoe import gated
from model.shapes.decoder import DecoderConfig


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Read config.json: Llama's keys, with `num_experts` and `intermediate_size` of one expert; tensors as in OLMoE."""
    return gated(hf_config, "relu")
