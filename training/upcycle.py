"""Upcycles the dense teacher into an ordinary top-k mixture in Mixtral's layout, trained at one fixed expert count.

Every feed-forward layer is copied, each copy cut into experts by a random partition of its units of its own (sparse
upcycling, arXiv 2212.05055, in fine grains, 2410.07524), and a new router is put before them. Then the mixture learns
to answer as the dense teacher does, on stories that the teacher wrote. The count never changes, so fewer experts at
inference cost what they cost any checkpoint that was not made for it. `docs/training.md` has the commands.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F

from model.backends.torch.attend import WholeAttend
from model.decoder import Decoder, parameter_count
from model.layers import DenseFFN
from model.moe.base import RoutedPairs
from model.moe.topk import TopKMixture
from training.corpus import END, documents, encode
from training.dense_teacher import read_teacher
from training.evaluate import held_out_loss
from training.export import measure_counts, windows
from training.plot import plot_losses
from training.recipe import Recipe
from training.step import Balance, make_batch
from training.train import Trainer, run
from weights.config import decoder_config
from weights.save import save_model

ROUTER_STD = 0.01  # small: at first the weights of the chosen experts are nearly equal
LIVE_WINDOWS = 8  # of the held-out text, for the progress log
COUNTS = (1, 2, 3, 4, 5, 6, 8)


@dataclass(frozen=True, slots=True)
class Cut:
    """How a feed-forward layer becomes experts: `copies` of it, each cut into `experts / copies`."""

    experts: int = 8
    copies: int = 2
    trained: int = 4

    @property
    def parts(self) -> int:
        """Experts that hold all units of the dense layer once."""
        return self.experts // self.copies


CUT = Cut()


def mixtral_config(dense: dict[str, Any], cut: Cut) -> dict[str, Any]:
    """The config.json of the mixture that a dense Llama-layout config becomes."""
    return dense | {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": dense["intermediate_size"] // cut.parts,
        "num_local_experts": cut.experts,
        "num_experts_per_tok": cut.trained,
    }


@torch.no_grad()
def upcycle(dense: Decoder, raw: dict[str, Any], cut: Cut, seed: int) -> Decoder:
    """The mixture before training. With equal weights, the experts of one copy or of all compute what `dense` computes.

    The weights of the chosen experts sum to 1, so that each expert's output is multiplied by the number of `parts`:
    any choice of experts then gives the dense layer's output on average over the random partitions.
    """
    generator = torch.Generator().manual_seed(seed)
    model = Decoder(decoder_config(mixtral_config(raw, cut)))
    shared = {name: value for name, value in dense.state_dict().items() if ".ffn." not in name}
    model.load_state_dict(shared, strict=False)
    for ours, theirs in zip(model.layers, dense.layers, strict=True):
        assert isinstance(ours.ffn, TopKMixture) and isinstance(theirs.ffn, DenseFFN)
        _fill(ours.ffn, theirs.ffn, cut, generator)
    return model


def _fill(mixture: TopKMixture, dense: DenseFFN, cut: Cut, generator: torch.Generator) -> None:
    """Cut one dense layer into the experts of a mixture, and draw its router."""
    gate_FD, up_FD = dense.up.weight.chunk(2)
    orders = [torch.randperm(len(gate_FD), generator=generator) for _ in range(cut.copies)]
    unit_EF = torch.cat(orders).unflatten(0, (cut.experts, -1))
    mixture.gate_up.copy_(torch.cat([gate_FD[unit_EF], up_FD[unit_EF]], dim=1))
    mixture.down.copy_(dense.down.weight.T[unit_EF].mT * cut.parts)
    router_ED = torch.randn(mixture.router.shape, generator=generator)
    mixture.router.copy_(router_ED * ROUTER_STD)


def run_split(mixture: TopKMixture, x_TD: Tensor, pairs: RoutedPairs) -> Tensor:
    """What `TopKMixture.run_ragged` computes, with stacked weights taken apart once: a gradient of an index into them
    would be as large as all of them, for every expert."""
    sizes = pairs.load_E.tolist()
    token_rs, weight_rs = pairs.token_R.split(sizes), pairs.weight_R[:, None].split(sizes)
    outs = []
    for gate_up, down, token_r, weight_r1 in zip(
        mixture.gate_up.unbind(), mixture.down.unbind(), token_rs, weight_rs, strict=True
    ):
        h_rF = mixture.activated(F.linear(x_TD[token_r], gate_up))
        outs.append(F.linear(h_rF, down) * weight_r1)
    return torch.zeros_like(x_TD).index_add(0, pairs.token_R, torch.cat(outs).to(x_TD.dtype))


class Distiller(Trainer):
    """Trains a mixture at its trained count on the dense model's probabilities of the next token."""

    def __init__(self, recipe: Recipe, tokens: np.ndarray, out: Path, dense: Decoder, mixture: Decoder) -> None:
        super().__init__(recipe, mixture.config, tokens, out)
        self.model.load_state_dict(mixture.state_dict())
        for layer in self.model.layers:
            assert isinstance(layer.ffn, TopKMixture)
            layer.ffn.execute = partial(run_split, layer.ffn)
        self.dense = dense.eval().requires_grad_(False)

    def loss(self, window_BS: Tensor, generator: torch.Generator) -> Tensor:
        """Mean divergence of the mixture from the dense model in nats per token, plus the weighted balance loss."""
        ids_BS = window_BS[:, :-1]
        attend, observer = WholeAttend(ids_BS.shape[1], ids_BS.device), Balance()
        mixtures = self.model.config.mixtures
        counts = [shape.trained for shape in mixtures]
        with torch.no_grad():
            wanted_TV = self.dense(make_batch(ids_BS, [], 0), attend).float().log_softmax(-1)
        found_TV = self.model(make_batch(ids_BS, counts, 0), attend, observer).float().log_softmax(-1)
        divergence = F.kl_div(found_TV, wanted_TV, reduction="batchmean", log_target=True)
        return divergence + self.recipe.balance * observer.mean()


def upcycling_recipe(config: dict[str, Any], steps: int) -> Recipe:
    """How the mixture is trained."""
    sizes: dict[str, Any] = {"steps": steps, "rows": 8, "micro_rows": 8, "length": config["max_position_embeddings"]}
    rates: dict[str, Any] = {"muon_lr": 0.003, "adam_lr": 3e-4, "decay": 0.0, "balance": 0.01, "warmup": 10}
    return Recipe(config, evaluate_every=25, **sizes, **rates)


def export(distiller: Distiller, tokenizer: Tokenizer, to: Path) -> None:
    """Write the checkpoint as it is now, with its tokenizer."""
    save_model(distiller.model, distiller.recipe.config, to, torch.bfloat16)
    tokenizer.save(str(to / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    (to / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def facts(distiller: Distiller, window_BS: Tensor, bytes_per_token: float) -> dict[str, Any]:
    """What card.json says: sizes, and held-out quality of the teacher and of the mixture at each count."""
    recipe = distiller.recipe
    return {
        "parameters": parameter_count(distiller.model),
        "seed": recipe.seed,
        "steps": distiller.step,
        "training_tokens": distiller.step * recipe.rows * recipe.length,
        "held_out_tokens": window_BS[:, 1:].numel(),
        "bytes_per_token": round(bytes_per_token, 3),
        "teacher_loss": round(held_out_loss(distiller.dense, window_BS, 0), 4),
        "quality": measure_counts(distiller.model, window_BS, bytes_per_token, COUNTS),
    }


def main(
    teacher: Annotated[Path, typer.Option(help="the dense checkpoint with its tokens, in llama2.c's layout")],
    text: Annotated[Path, typer.Option(help="stories that the teacher wrote (training.synthesise)")],
    heldout: Annotated[Path, typer.Option(help="real stories: their tokens are kept, and they measure the result")],
    out: Annotated[Path, typer.Option(help="the checkpoint's folder; the state to resume from is in its `run`")],
    steps: int = 220,
    minutes: Annotated[float, typer.Option(help="stop, resumable, after so many minutes")] = 1e9,
    limit: Annotated[int, typer.Option(help="held-out windows to measure at the end; 0: all")] = 200,
) -> None:
    """Upcycle, train, export, measure. Resumes if OUT holds a state."""
    dense, raw, tokenizer = read_teacher(teacher, heldout.read_text(encoding="utf-8"))
    chosen = upcycling_recipe(mixtral_config(raw, CUT), steps)
    (out / "run").mkdir(parents=True, exist_ok=True)
    mixture = upcycle(dense, raw, CUT, chosen.seed)
    distiller = Distiller(chosen, encode(tokenizer, documents(text)), out / "run", dense, mixture)
    distiller.resume()
    live_BS, _ = windows(tokenizer, heldout, chosen.length, LIVE_WINDOWS)
    log = run(distiller, live_BS, minutes)
    plot_losses(log, out / "run" / "loss.png", title="upcycled")
    export(distiller, tokenizer, out)
    window_BS, bytes_per_token = windows(tokenizer, heldout, chosen.length, limit)
    card = facts(distiller, window_BS, bytes_per_token)
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    print(json.dumps(card, indent=2))


if __name__ == "__main__":
    typer.run(main)
