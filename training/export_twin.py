"""From a run of `training.on_gpu` to a checkpoint that ships: bfloat16 weights, tokenizer, chat template, card.

Run `python -m training.export_twin infinity --run runs --tokenizer tokenizer.json --heldout heldout.txt --to FOLDER`.
The losses on the card are those of the exported weights under the serving code.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer

from model.backends.choose import prepare
from model.decoder import Decoder, parameter_count
from model.options import Options
from training.card import write_twin_card
from training.evaluate import ServedModel
from training.export import export_tokenizer, measure_counts, windows
from training.gpu.network import Shape
from training.gpu.recipes import TWINS
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model

COUNTS = (1, 2, 3, 4, 5, 6, 7, 8)  # served
BLOCK = 16  # tokens
TRAINED = 4  # the default


def checkpoint_config(shape: Shape) -> dict[str, Any]:
    """config.json for a network of this shape."""
    config: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": shape.context,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",  # to run in; stored in bfloat16
        "num_experts_per_tok": TRAINED,
    }
    return config | (_topk(shape) if shape.kind == "topk" else _infinity(shape))


def _infinity(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "infinity_moe",
        "norm": "rms",
        "norm_eps": 1e-5,
        "positions": "rotary",
        "qk_norm": "full",
        "intermediate_size": shape.units,
        "gate_dim": shape.space,
        "kept_share": shape.kept / shape.blocks,
        "mask_block": shape.block,
        "activation": "gelu",
        "sigma_link": "exp",
        "sigma_min": 0.0,
        "draws": shape.draws,
        "replacement": shape.replacement,
        "aggregate": shape.aggregate,
        "max_experts_per_tok": COUNTS[-1],
    }


def _topk(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": shape.block,
        "num_experts": shape.blocks,
        "norm_topk_prob": shape.normalise,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
    }


def export(name: str, run: Path, tokenizer: Path, to: Path) -> None:
    """Write the run's weights, its config and the tokenizer."""
    raw = checkpoint_config(TWINS[name][0])
    model = Decoder(decoder_config(raw))
    state = load_file(run / f"{name}.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()})
    save_model(model, raw, to, torch.bfloat16)
    export_tokenizer(tokenizer.parent, to)


def measure(to: Path, heldout: Path, limit: int) -> dict[str, Any]:
    """Held-out quality per count, by the serving code, in windows of the model's context."""
    model, raw = load_model(to, "float32")
    tokenizer = Tokenizer.from_file(str(to / "tokenizer.json"))
    window_BS, bytes_per_token = windows(tokenizer, heldout, raw["max_position_embeddings"], limit)
    facts: dict[str, Any] = {"name": to.name, "family": raw["model_type"]}
    facts["parameters"] = parameter_count(model)
    facts |= {"held_out_tokens": window_BS[:, 1:].numel(), "bytes_per_token": round(bytes_per_token, 3)}
    options = Options(block_size=BLOCK, length=raw["max_position_embeddings"])
    served = ServedModel(prepare(model, options)[0], BLOCK)
    facts["quality"] = measure_counts(served, window_BS, bytes_per_token, COUNTS)
    return facts


def main(
    name: Annotated[str, typer.Argument(help="a recipe of training.gpu.recipes")],
    run: Annotated[Path, typer.Option(help="folder with the run's NAME.safetensors and NAME.json")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json")],
    heldout: Annotated[Path, typer.Option(help="held-out text")],
    to: Annotated[Path, typer.Option(help="the checkpoint's folder")],
    limit: Annotated[int, typer.Option(help="held-out windows to use; 0: all")] = 200,
) -> None:
    """Export, measure, write the card."""
    export(name, run, tokenizer, to)
    told = json.loads((run / f"{name}.json").read_text())
    facts = measure(to, heldout, limit)
    facts |= {"seed": told["plan"]["seed"], "steps": told["steps"], "training_tokens": told["tokens"]}
    facts |= {"device": told["device"], "training_seconds": told["seconds"]}
    (to / "card.json").write_text(json.dumps(facts, indent=2) + "\n")
    write_twin_card(to, facts, told["plan"], TRAINED)
    for row in facts["quality"]:
        print(row)


if __name__ == "__main__":
    typer.run(main)
