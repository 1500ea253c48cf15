"""A family is one file, found by its name: this one. Run it with `python examples/adding_a_family.py`.

It is the whole of a family with `"model_type": "adding_a_family"`: what its config.json means (`decoder_config`) and
what its tensors are called (`NAMES`). In the repository it would lie in `model/families/`, and a test would compare it
with `transformers` (docs/adding-a-family.md). Here it adds its own folder to the places that are searched, writes a
random checkpoint, and runs it at every count.
"""

import json
import tempfile
from pathlib import Path

import torch

import model.families
from engine.build import build_engine
from engine.types import EngineSettings, Request, Sampling
from model.config_reader import ConfigReader, activation, attention, decoder, head_width, rope
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Router, TopK
from weights.config import read_config
from weights.save import save_model

# Words of the shared layout (weights/names.py), and this family's words for them.
NAMES = {"mlp": "moe", "gate": "router", "gate_proj": "wide_in", "up_proj": "wide_up", "down_proj": "wide_out"}

CONFIG = {
    "model_type": "adding_a_family",
    "vocab_size": 64,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "num_specialists": 6,
    "specialists_per_token": 2,
}


def decoder_config(hf_config: ConfigReader) -> DecoderConfig:
    """Every key is read by name: a key that is set and not read is refused on loading."""
    mixture = TopK(
        experts=hf_config["num_specialists"],
        width=hf_config["intermediate_size"],
        trained=hf_config["specialists_per_token"],
        router=Router(normalise=True),
        activation=activation(hf_config),
    )
    return decoder(
        hf_config, attention(hf_config, rope(hf_config, head_width(hf_config), theta=1e4)), mixture, norm_eps=1e-5
    )


def write_random(folder: Path) -> None:
    """A checkpoint of random weights, in this family's layout."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    config, raw = read_config(folder)
    torch.manual_seed(0)
    random = Decoder(config)
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_model(random, raw, folder, torch.float32)


def main() -> None:
    model.families.__path__.append(str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as name:
        write_random(Path(name))
        engine, info = build_engine(EngineSettings(model=name, kv_cache_bytes=1 << 22, step_ms=0))
        experts = info.experts
        print(f"{info.family} on {info.kernels}: {experts.minimum} to {experts.maximum} experts")
        for count in range(experts.minimum, experts.maximum + 1):
            engine.add(Request(f"K = {count}", (1, 2, 3), experts.budget(count), Sampling(8, seed=0, temperature=0.0)))
        tokens: dict[str, list[int]] = {}
        while engine.has_work:
            for event in engine.step().events:
                if event.token is not None:
                    tokens.setdefault(event.request_id, []).append(event.token)
        for request, made in tokens.items():
            print(request, made)


if __name__ == "__main__":
    main()
