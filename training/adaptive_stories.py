"""Tiny models whose tokens run as many experts as they need, trained on stories: DynMoE, ReMoE and MoE++.

Run `python -m training.adaptive_stories --kind remoe --text FILE --out FOLDER`; minutes on one core. The last tenth of
the stories is held out: its loss, and how many experts ran, are printed at several counts and offsets of a request, and
kept in `quality.json` beside the checkpoint.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends.torch.attend import WholeAttend
from model.budget import FAMILY_RULE, RoutingRule
from model.decoder import Decoder, parameter_count
from model.moe.base import Choice
from model.moe.topk import TopKMixture
from model.shapes.mixtures import TopK
from model.shapes.moe_plus_plus import MoEPlusPlus
from model.step import LayerStep, Observer
from training.corpus import documents, encode, train_tokenizer
from training.step import initialise, make_batch
from weights.load import decoder_config
from weights.save import save_model

Kind = Literal["dynmoe", "remoe", "moe_plus_plus"]
CONFIG: dict[str, Any] = {
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "intermediate_size": 96,
    "num_experts": 8,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}
VOCABULARY, LENGTH, ROWS = 1024, 96, 8
PEAK, WARM = 4e-3, 50  # learning rate, and steps to it
WANTED = 2  # experts per token that ReMoE is steered to, and that MoE++ takes of its pool
STEER, FIRST = 1.2, 1e-4  # ReMoE's coefficient: what a step changes it by, and where it begins
BALANCE, SHARE = 0.01, 0.75  # of MoE++: the coefficient, and the weight of experts that compute nothing (τ)
DIVERSE, TEMPERATURE = 1e-3, 4.0  # of DynMoE: the coefficient, and the first temperature


class Routing(Observer):
    """Keeps what the routers of a step say."""

    def __init__(self) -> None:
        self.scores: list[Tensor] = []
        self.loads: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        assert scores_TE is not None
        self.scores.append(scores_TE)
        self.loads.append(load_E)

    @property
    def mean(self) -> float:
        """Experts that a token ran in a layer."""
        tokens = sum(len(scores_TE) for scores_TE in self.scores)
        return float(torch.stack(self.loads).sum()) / tokens


class Regulariser:
    """What is added to the loss: each kind's own term, as its paper has it."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.coefficient = model, FIRST

    def __call__(self, routing: Routing) -> Tensor:
        shape = self.model.config.mixtures[0]
        if isinstance(shape, MoEPlusPlus):
            return BALANCE * torch.stack([_weighted_balance(scores_TE, shape) for scores_TE in routing.scores]).mean()
        assert isinstance(shape, TopK)
        if shape.router.score == "relu":
            self.coefficient *= STEER if routing.mean > WANTED else 1 / STEER
            parts = zip(routing.scores, routing.loads, strict=True)
            return self.coefficient * torch.stack([_balanced_l1(*part) for part in parts]).mean()
        routers = [F.normalize(module.router, dim=-1) for module in mixtures(self.model)]
        eye = torch.eye(shape.experts)
        return DIVERSE * torch.stack([(w @ w.T - eye).square().sum().sqrt() for w in routers]).mean()


def _balanced_l1(scores_TE: Tensor, load_E: Tensor) -> Tensor:
    """Σ f_e · mean score of e, with f_e = 1 where an expert has its part of the wanted load (2412.14711, eq. 9)."""
    share_E = load_E * len(load_E) / (WANTED * len(scores_TE))
    return (share_E * scores_TE.mean(0)).sum() / len(load_E)


def _weighted_balance(scores_TE: Tensor, shape: MoEPlusPlus) -> Tensor:
    """Σ η_e f_e P_e over the pool, η = 1 for feed-forward experts and τ for the others (2410.07348, eq. 7)."""
    pool = shape.num_experts
    taken_E = F.one_hot(scores_TE.topk(WANTED).indices, pool).sum(1).float().mean(0)
    weight_E = torch.where(torch.arange(pool) < shape.experts, 1.0, SHARE)
    return (weight_E * taken_E * scores_TE.mean(0)).sum()


def mixtures(model: Decoder) -> Iterator[TopKMixture]:
    for layer in model.layers:
        if isinstance(layer.ffn, TopKMixture):
            yield layer.ffn


def made(raw: dict[str, Any], seed: int) -> Decoder:
    """A decoder with initial weights, that computes all experts in few large products."""
    model = Decoder(decoder_config(raw))
    initialise(model, seed)
    for module in mixtures(model):
        module.execute = module.run_dense
        if module.config.router.score == "top_any":
            nn.init.constant_(module.temperature, TEMPERATURE)
            nn.init.zeros_(module.thresholds)
            object.__setattr__(module, "choose", partial(_straight_through, module))
    return model


def _straight_through(module: TopKMixture, logits_TE: Tensor, step: LayerStep) -> Choice:
    """The choice with weights of 1 whose gradient is that of sigmoid(logit) - sigmoid(threshold)."""
    choice = TopKMixture.choose(module, logits_TE, step)
    soft_TE = logits_TE.sigmoid() - (module.temperature * module.thresholds).sigmoid()
    weight_TE = 1 + soft_TE - soft_TE.detach()
    return replace(choice, weight_TK=weight_TE.gather(-1, choice.expert_TK))


def loss_of(model: Decoder, window_BS: Tensor, routing: Routing, count: int, rule: RoutingRule = FAMILY_RULE) -> Tensor:
    """Mean cross-entropy in nats of the next token over windows [B, S + 1]."""
    ids_BS, target_BS = window_BS[:, :-1], window_BS[:, 1:]
    batch = make_batch(ids_BS, [count] * len(model.config.mixtures), 0)
    if rule != FAMILY_RULE:
        rule_T = torch.zeros(ids_BS.numel(), dtype=torch.int64)
        batch = replace(batch, budget=replace(batch.budget, rules=(rule,), rule_T=rule_T))
    logits_TV = model(batch, WholeAttend(ids_BS.shape[1], ids_BS.device), routing)
    return F.cross_entropy(logits_TV.float(), target_BS.flatten())


def train(model: Decoder, tokens_N: Tensor, minutes: float, steps: int, seed: int) -> Iterator[tuple[float, float]]:
    """Train for so many steps, or until the time is over: the rate falls with whichever is further. Yields each step's
    loss and mean count."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    generator, begun = torch.Generator().manual_seed(seed), time.monotonic()
    regulariser, count = Regulariser(model), model.config.experts.trained
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - begun) / (60 * minutes))
        if done >= 1:
            return
        optimiser.param_groups[0]["lr"] = PEAK * min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * done)))
        start_B = torch.randint(len(tokens_N) - LENGTH, (ROWS,), generator=generator).tolist()
        window_BS = torch.stack([tokens_N[start : start + LENGTH + 1] for start in start_B])
        routing = Routing()
        loss = loss_of(model, window_BS, routing, count)
        (loss + regulariser(routing)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        yield float(loss.detach()), routing.mean


@torch.inference_mode()
def quality(model: Decoder, window_BS: Tensor) -> list[dict[str, float]]:
    """Held-out loss and the mean number of experts that ran, at several counts and offsets."""
    experts, rows = model.config.experts, []
    offsets = (-0.5, -0.25, 0.25, 0.5) if "gate_offset" in experts.own_fields else (-2.0, -1.0, 1.0, 2.0)
    asked: list[dict[str, float]] = [{"count": count} for count in sorted({1, 2, 4, experts.maximum})]
    asked += [{experts.own_fields[0]: offset} for offset in offsets]
    for one in asked:
        count = int(one.get("count", experts.trained))
        rule = RoutingRule(gate_offset=one.get("gate_offset", 0.0), free_bias=one.get("free_bias", 0.0))
        routing = Routing()
        loss = float(loss_of(model, window_BS, routing, count, rule))
        rows.append(one | {"loss": round(loss, 4), "mean_experts": round(routing.mean, 3)})
    return rows


def main(
    kind: Annotated[Kind, typer.Option(help="which mixture")],
    text: Annotated[Path, typer.Option(help="text, documents separated by <|endoftext|>")],
    out: Annotated[Path, typer.Option(help="the checkpoint's folder")],
    minutes: Annotated[float, typer.Option(help="stop after so many minutes")] = 3.0,
    steps: int = 2000,
    seed: int = 1,
) -> None:
    """Train, measure and export."""
    texts = list(documents(text))
    kept = len(texts) * 9 // 10
    tokenizer = train_tokenizer(texts[:kept], VOCABULARY)
    own = {"num_experts_per_tok": WANTED} if kind == "moe_plus_plus" else {}
    raw = CONFIG | {"model_type": kind, "vocab_size": tokenizer.get_vocab_size()} | own
    model = made(raw, seed)
    parts = texts[:kept], texts[kept:]
    tokens_N, held_N = (torch.from_numpy(encode(tokenizer, part).astype(np.int64)) for part in parts)
    print(f"{parameter_count(model) / 1e6:.2f} M parameters, {len(tokens_N)} tokens", flush=True)
    for number, (loss, mean) in enumerate(train(model, tokens_N, minutes, steps, seed), 1):
        if number % 50 == 0:
            print(f"step {number}: {loss:.3f} at {mean:.2f} experts", flush=True)
    save_model(model, raw, out, torch.bfloat16)
    tokenizer.save(str(out / "tokenizer.json"))
    windows = min(64, len(held_N) // (LENGTH + 1))
    rows = quality(model.to(torch.bfloat16).float(), held_N[: windows * (LENGTH + 1)].view(windows, LENGTH + 1))
    (out / "quality.json").write_text(json.dumps(rows, indent=2) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    typer.run(main)
