"""One tiny OLMoE with a tokenizer and a chat template, as a folder and as a GGUF file of the same weights."""

import json
from pathlib import Path

import torch

from tests.weights.checkpoints import random_decoder
from tests.weights.gguf.architectures import Encode, converted, metadata_of, raw_of
from tests.weights.gguf.quantisers import floats
from tests.weights.gguf.vocabularies import END, byte_level, trained
from tests.weights.gguf.writer import write_gguf
from weights.save import save_model

PRE, SIZE = "olmo", 440
TEMPLATE = (
    "{% for message in messages %}<|user|>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}{% endif %}"
)


def write_twins(parent: Path, encode: Encode = floats) -> tuple[Path, Path]:
    """The folder and the file, whose tensors `encode` quantises."""
    folder, file = parent / "twin", parent / "twin-F32.gguf"
    raw = raw_of("olmoe") | {"vocab_size": SIZE, "eos_token_id": 0}
    model = random_decoder(raw)
    save_model(model, raw, folder, torch.float32)
    (folder / "tokenizer.json").write_text(trained(PRE))
    config = {"bos_token": END, "eos_token": END, "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0], "temperature": 0.5, "top_k": 7}))
    own = {"general.sampling.temp": 0.5, "general.sampling.top_k": 7, "tokenizer.ggml.add_bos_token": True}
    metadata = metadata_of("olmoe") | byte_level(PRE) | own | {"tokenizer.chat_template": TEMPLATE}
    return folder, write_gguf(file, metadata, converted("olmoe", model, encode))
