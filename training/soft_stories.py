"""Small models with soft mixtures that write stories: Soft MoE over segments or in a T5's encoder, and Deep MoE.

Run `python -m training.soft_stories soft --text FILE --heldout FILE --out FOLDER` (or `t5`, `deep`); minutes on two
cores. All experts run in training, as in the papers; held-out figures at smaller counts, with both restrictions, are
printed. The T5 continues beginnings as the small Switch does (`training/switch_stories.py`).
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder, parameter_count
from model.encoder_decoder import decoder_of
from model.moe.deep import DeepMixture
from training import switch_stories
from training.corpus import END, documents, encode, train_tokenizer
from training.step import initialise, make_batch
from weights.load import decoder_config
from weights.save import save_model

SHAPE: dict[str, Any] = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "num_experts": 16,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "soft": SHAPE | {"model_type": "soft_moe", "intermediate_size": 96, "segment_length": 16},
    "deep": SHAPE | {"model_type": "deep_moe", "intermediate_size": 96, "gate_intermediate_size": 64},
}
_SWITCH = {name: value for name, value in switch_stories.CONFIG.items() if name != "architectures"}
CONFIGS["t5"] = {name: value for name, value in _SWITCH.items() if "sparse" not in name} | {
    "model_type": "soft_t5",
    "d_ff": 256,
    "num_layers": 4,
    "num_experts": 16,
}
Kind = Literal["soft", "deep", "t5"]
Draw = Callable[[int], tuple[Tensor, Tensor]]  # so many rows of tokens [B, S], and their targets; -100: none
VOCABULARY, LENGTH, ROWS = 2048, 96, 16
PEAK, WARM = 3e-3, 50  # learning rate, and steps to it
SCALE = 8.0  # of soft logits at first: cosines are small, and at the published 1 all weights stay alike for long
MARGIN = 200.0  # tokens that an expert may have above the mean, in the first phase of a deep mixture
FIRST_PHASE = 0.5  # its share of all steps


class Constraint:
    """Eigen et al.'s balancing: an expert whose running sum of weights is above the mean by a margin has no weight, and
    the others share it. They do so sample by sample; here it holds for the tokens of a step together."""

    def __init__(self, experts: int) -> None:
        self.total_E = torch.zeros(experts)

    def __call__(self, logits_TE: Tensor) -> Tensor:
        kept_TE = logits_TE.masked_fill(self.total_E > self.total_E.mean() + MARGIN, -torch.inf)
        self.total_E = self.total_E + kept_TE.detach().softmax(-1).sum(0)
        return kept_TE


def constrain(model: Decoder, on: bool) -> None:
    """Begin or end the first phase; mixtures that are not deep have none."""
    for layer in model.layers:
        if isinstance(layer.ffn, DeepMixture):
            layer.ffn.constraint = Constraint(layer.ffn.shape.experts) if on else None


def begin(raw: dict[str, Any], seed: int) -> Decoder:
    """A new model."""
    model = decoder_of(decoder_config(raw))
    (initialise if model.config.encoder is None else switch_stories.begin)(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("ffn.scale"):
            nn.init.constant_(parameter, SCALE)
        elif name.endswith("expert_bias"):
            nn.init.zeros_(parameter)
    return model


def drawn(model: Decoder, tokenizer: Tokenizer, texts: list[str], seed: int) -> Draw:
    """What the model is trained on: windows of all texts, or for an encoder beginnings and what follows."""
    if model.config.encoder is not None:
        return switch_stories.Stories(tokenizer, texts, seed).rows
    tokens, generator = encode(tokenizer, texts), torch.Generator().manual_seed(seed)

    def windows(rows: int) -> tuple[Tensor, Tensor]:
        first_B = torch.randint(len(tokens) - LENGTH, (rows,), generator=generator).tolist()
        window_BS = torch.tensor(np.stack([tokens[first : first + LENGTH + 1] for first in first_B]).astype(np.int64))
        return window_BS[:, :-1], window_BS[:, 1:]

    return windows


def train(model: Decoder, draw: Draw, steps: int, minutes: float) -> Iterator[float]:
    """Train for so many steps, or until the time is over; the loss of each."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    start, most = time.monotonic(), model.config.experts.maximum
    constrain(model, on=True)
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - start) / (minutes * 60))
        if done >= FIRST_PHASE:
            constrain(model, on=False)
        if done >= 1:
            break
        optimiser.param_groups[0]["lr"] = PEAK * min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * done)))
        loss = switch_stories.loss_of(model, *draw(ROWS), count=most, balance=0.0)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield float(loss.detach())
    constrain(model, on=False)


@torch.inference_mode()
def quality(model: Decoder, ids_BS: Tensor, target_BS: Tensor, count: int) -> tuple[float, float]:
    """Held-out loss in nats per token, and the share of tokens that are the best guess."""
    batch = make_batch(ids_BS, [count] * len(model.config.mixtures), 0)
    log_TV = model(batch, WholeAttend(ids_BS.shape[1])).float().log_softmax(-1)
    target_T = target_BS.flatten()
    log_TV, target_T = log_TV[target_T >= 0], target_T[target_T >= 0]
    loss = -log_TV.gather(1, target_T[:, None]).mean()
    return float(loss), float((log_TV.argmax(-1) == target_T).float().mean())


def export(model: Decoder, raw: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """A checkpoint that is served as it is."""
    if model.config.encoder is not None:
        switch_stories.export(model, raw, tokenizer, folder)
        return
    save_model(model, raw, folder, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(
    kind: Annotated[Kind, typer.Argument(help="what mixtures it has")],
    text: Annotated[Path, typer.Option(help="training text, documents separated by <|endoftext|>")],
    heldout: Annotated[Path, typer.Option(help="held-out text")],
    out: Annotated[Path, typer.Option(help="the checkpoint's folder")],
    steps: int = 3000,
    minutes: Annotated[float, typer.Option(help="stop after so many minutes")] = 10,
    seed: int = 1,
) -> None:
    """Train, export and measure."""
    texts = list(documents(text))
    tokenizer = train_tokenizer(texts, VOCABULARY)
    raw = CONFIGS[kind] | {"vocab_size": tokenizer.get_vocab_size()}
    model = begin(raw, seed)
    print(f"{parameter_count(model) / 1e6:.2f} M parameters")
    losses = train(model, drawn(model, tokenizer, texts, seed), steps, minutes)
    for number, loss in enumerate(losses, 1):
        if number % 50 == 0:
            print(f"step {number}: {loss:.3f}", flush=True)
    export(model, raw, tokenizer, out)
    rows = drawn(model, tokenizer, list(itertools.islice(documents(heldout), 400)), seed=0)(64)
    for restriction in ("renormalise", "drop"):
        other = decoder_of(decoder_config(raw | {"restriction": restriction}))
        other.load_state_dict(model.state_dict())
        for count in (1, 2, 4, 8, 16):
            figures = "loss {:.3f}, best guesses {:.1%}".format(*quality(other, *rows, count))
            print(f"{restriction}, {count} experts: {figures}")


if __name__ == "__main__":
    typer.run(main)
