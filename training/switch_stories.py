"""A small Switch Transformer that continues stories: the encoder reads the beginning, the decoder writes on.

Run `python -m training.switch_stories --text FILE --heldout FILE --out FOLDER`; minutes on two cores. One expert per
token, as in the paper, with its balance loss; the held-out loss at other counts is printed, and says what they cost.
"""

import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F

from model.attention.attention import SelfAttention
from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder, parameter_count
from model.encoder_decoder import CrossLayer, decoder_of
from training.corpus import END, documents, train_tokenizer
from training.step import Balance, initialise, make_batch
from weights.load import decoder_config
from weights.save import save_model

CONFIG: dict[str, Any] = {
    "model_type": "switch_transformers",
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "d_model": 128,
    "d_kv": 32,
    "d_ff": 384,
    "num_heads": 4,
    "num_layers": 2,
    "num_sparse_encoder_layers": 1,
    "num_decoder_layers": 4,
    "num_sparse_decoder_layers": 2,
    "num_experts": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "dtype": "float32",
}
VOCABULARY, LENGTH, ROWS, BALANCE = 2048, 96, 16, 0.01
PROMPTS = (8, 48)  # tokens of a beginning, the end token not counted
PEAK, WARM = 3e-3, 100  # learning rate, and steps to it


class Stories:
    """Windows of `LENGTH` tokens from stories that are long enough, every other one up to the story's end."""

    def __init__(self, tokenizer: Tokenizer, texts: Sequence[str], seed: int) -> None:
        encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
        self.stories = [one.ids for one in encoded if len(one.ids) >= LENGTH]
        self.generator = torch.Generator().manual_seed(seed)

    def rows(self, count: int) -> tuple[Tensor, Tensor]:
        """[B, LENGTH] tokens, each a beginning, its end token and what follows; and the targets of what follows, -100
        where there is none."""
        prompt = PROMPTS[0] + self._below(PROMPTS[1] - PROMPTS[0] + 1)  # of all alike, which is faster
        ids, targets = zip(*(self._row(prompt) for _ in range(count)), strict=True)
        return torch.tensor(ids), torch.tensor(targets)

    def _row(self, prompt: int) -> tuple[list[int], list[int]]:
        story = self.stories[self._below(len(self.stories))]
        last = len(story) - LENGTH + 1
        start = last if self._below(2) else self._below(last + 1)
        text = [*story, 0][start : start + LENGTH]
        # The decoder's first token shares the row of the prompt's end: what it predicts is the text after the prompt.
        return [*text[:prompt], 0, *text[prompt:-1]], [*[-100] * prompt, *text[prompt:]]

    def _below(self, end: int) -> int:
        return int(torch.randint(end, (1,), generator=self.generator))


def loss_of(model: Decoder, ids_BS: Tensor, target_BS: Tensor, count: int, balance: float) -> Tensor:
    """Mean cross-entropy in nats of the texts after the prompts, plus the weighted balance loss."""
    observer = Balance()
    counts = [count] * len(model.config.mixtures)
    logits_TV = model(make_batch(ids_BS, counts, 0), WholeAttend(ids_BS.shape[1], ids_BS.device), observer)
    return F.cross_entropy(logits_TV.float(), target_BS.flatten()) + balance * observer.mean()


@torch.no_grad()
def begin(model: Decoder, seed: int) -> None:
    """T5's initial weights: queries so small that scores need no scale, embeddings of size one, biases of zero."""
    initialise(model, seed)
    nn.init.normal_(model.embed.weight)
    for name, parameter in model.named_parameters():
        if name.startswith(("encoder_bias", "decoder_bias")):
            parameter.zero_()
    for layer in model.layers:
        if isinstance(layer.attention, SelfAttention):
            queries = layer.attention.sizes[0]
            layer.attention.qkv.weight[:queries] *= layer.attention.shape.head_width**-0.5
        if isinstance(layer, CrossLayer):
            layer.cross.query.weight.mul_(layer.cross.shape.head_width**-0.5)


def train(model: Decoder, stories: Stories, steps: int, minutes: float) -> Iterator[float]:
    """Train for so many steps, or until the time is over; the loss of each."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    deadline = time.monotonic() + minutes * 60
    for step in range(steps):
        if time.monotonic() > deadline:
            return
        done = step / steps
        optimiser.param_groups[0]["lr"] = PEAK * min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * done)))
        loss = loss_of(model, *stories.rows(ROWS), count=1, balance=BALANCE)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield float(loss.detach())


def export(model: Decoder, raw: dict[str, Any], tokenizer: Tokenizer, folder: Path) -> None:
    """A checkpoint that is served as it is: a prompt gets an end token behind it."""
    save_model(model, raw, folder, torch.bfloat16)
    tokenizer.save(str(folder / "tokenizer.json"))
    frame = {"add_bos_token": False, "add_eos_token": True}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | frame, indent=2) + "\n")


def main(
    text: Annotated[Path, typer.Option(help="training text, documents separated by <|endoftext|>")],
    heldout: Annotated[Path, typer.Option(help="held-out text")],
    out: Annotated[Path, typer.Option(help="the checkpoint's folder")],
    steps: int = 3000,
    minutes: Annotated[float, typer.Option(help="stop after so many minutes")] = 1e9,
    seed: int = 1,
) -> None:
    """Train and export."""
    texts = list(documents(text))
    tokenizer = train_tokenizer(texts, VOCABULARY)
    raw = CONFIG | {"vocab_size": tokenizer.get_vocab_size()}
    model = decoder_of(decoder_config(raw))
    begin(model, seed)
    print(f"{parameter_count(model) / 1e6:.2f} M parameters")
    losses = train(model, Stories(tokenizer, texts, seed), steps, minutes)
    for number, loss in enumerate(losses, 1):
        if number % 50 == 0:
            print(f"step {number}: {loss:.3f}", flush=True)
    export(model, raw, tokenizer, out)
    rows = Stories(tokenizer, list(itertools.islice(documents(heldout), 400)), seed=0).rows(64)
    with torch.inference_mode():
        for count in (1, 2, 4, 8):
            print(f"held-out loss at {count} experts: {float(loss_of(model, *rows, count=count, balance=0.0)):.3f}")


if __name__ == "__main__":
    typer.run(main)
