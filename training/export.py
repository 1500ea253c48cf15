"""Exports a finished run as a checkpoint to ship: bfloat16 weights, tokenizer, chat template, measured card.

Run `python -m training.export --help`; `docs/training.md` has the whole command.
The losses on the card are those of the exported weights, not of the training state.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from model.decoder import Decoder, parameter_count
from training.card import write_card
from training.corpus import ASSISTANT, END, USER, documents, encode
from training.evaluate import COUNTS, WholeModel, agreement, held_out_loss
from training.recipe import RECIPES
from weights.config import decoder_config
from weights.load import load_model
from weights.save import save_model

# Calls are written as Hermes models write them. The models are not trained to call: where a call is forced, it is the
# server's grammar that makes it well-formed.
_TOOLS = (
    "{% if tools %}" + USER + "Call a function by writing <tool_call>\n"
    '{"name": ..., "arguments": {...}}\n</tool_call>. Functions:'
    "{% for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}{% endif %}"
)
_ANSWER = (
    "{% if message.role == 'assistant' %}" + ASSISTANT + "{{ message.content }}"
    '{% for call in message.tool_calls or [] %}<tool_call>\n{"name": {{ call.function.name | tojson }}, '
    '"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
)
_RESULT = "{% elif message.role == 'tool' %}" + USER + "<tool_response>\n{{ message.content }}\n</tool_response>"
_OTHER = "{% else %}" + USER + "{{ message.content }}{% endif %}"
_MESSAGES = "{% for message in messages %}" + _ANSWER + _RESULT + _OTHER + "{% endfor %}"
TEMPLATE = "{{ bos_token }}" + _TOOLS + _MESSAGES + "{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"


def export_weights(run: Path, folder: Path) -> None:
    """The run's weights as a checkpoint with its config."""
    raw = json.loads((run / "config.json").read_text())
    model = Decoder(decoder_config(raw))
    state = load_file(run / "state.safetensors")
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    model.load_state_dict(weights)
    save_model(model, raw, folder, torch.bfloat16)


def export_tokenizer(tokens: Path, folder: Path) -> None:
    """Write tokenizer.json and the other files that Hugging Face's loaders need."""
    shutil.copy(tokens / "tokenizer.json", folder / "tokenizer.json")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}, indent=2) + "\n")
    generation = {"bos_token_id": 0, "eos_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def windows(tokenizer: Tokenizer, text: Path, length: int, limit: int) -> tuple[Tensor, float]:
    """Held-out windows [B, S + 1] (all, or the first `limit`), and the bytes of text per token."""
    stories = list(documents(text))
    ids = encode(tokenizer, stories)
    rows = (len(ids) - 1) // length
    starts = np.arange(min(rows, limit or rows)) * length
    stacked = np.stack([ids[start : start + length + 1] for start in starts])
    size = sum(len(story.encode()) for story in stories)
    return torch.from_numpy(stacked.astype(np.int64)), size / len(ids)


def measure(model: Decoder, window_BS: Tensor, bytes_per_token: float) -> list[dict[str, Any]]:
    """One row for each of `COUNTS` and the trained count, as `measure_counts`."""
    return measure_counts(model, window_BS, bytes_per_token, sorted({*COUNTS, model.config.experts.trained}))


def measure_counts(
    model: WholeModel, window_BS: Tensor, bytes_per_token: float, counts: Sequence[int]
) -> list[dict[str, Any]]:
    """One row per expert count: loss, perplexity, bits per byte, agreement with the trained count's best token."""
    trained = model.config.experts.trained
    losses = {k: held_out_loss(model, window_BS, k) for k in counts}
    rows: list[dict[str, Any]] = []
    for k, loss in losses.items():
        agreed = agreement(model, window_BS[:64], k, trained)
        rows.append({"num_experts": k} | _figures(loss, losses[trained], bytes_per_token, agreed))
    return rows


def _figures(loss: float, best: float, bytes_per_token: float, agreed: float) -> dict[str, Any]:
    figures = {
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / bytes_per_token,
        "agreement": agreed,
        "relative_quality": math.exp(best - loss),
    }
    return {name: round(value, 4) for name, value in figures.items()}


def main(
    recipe: Annotated[str, typer.Option()],
    run: Annotated[Path, typer.Option(help="the finished run's folder")],
    tokens: Annotated[Path, typer.Option(help="folder with tokenizer.json")],
    heldout: Annotated[Path, typer.Option(help="held-out text")],
    to: Annotated[Path, typer.Option(help="the checkpoint's folder")],
    limit: Annotated[int, typer.Option(help="held-out windows to use; 0: all")] = 0,
) -> None:
    """Export, measure, write the card."""
    export_weights(run, to)
    export_tokenizer(tokens, to)
    model, raw = load_model(to, "float32")
    window_BS, bytes_per_token = windows(Tokenizer.from_file(str(to / "tokenizer.json")), heldout, 512, limit)
    quality = measure(model, window_BS, bytes_per_token)
    log = json.loads((run / "log.json").read_text())
    chosen = RECIPES[recipe].override(log[-1]["step"])
    facts = {
        "name": to.name,
        "family": raw["model_type"],
        "parameters": parameter_count(model),
        "seed": chosen.seed,
        "steps": chosen.steps,
        "training_tokens": chosen.tokens,
        "held_out_tokens": window_BS[:, 1:].numel(),
        "bytes_per_token": round(bytes_per_token, 3),
        "quality": quality,
    }
    (to / "card.json").write_text(json.dumps(facts, indent=2) + "\n")
    write_card(to, facts, raw, chosen)
    for row in quality:
        print(row)


if __name__ == "__main__":
    typer.run(main)
