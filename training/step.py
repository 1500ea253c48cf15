"""The parts of a training step: initial weights, a batch with a random expert count per layer, and the loss.

K is drawn per layer and step, uniformly (M-MoE, 2509.26520), so that one model serves every count. It depends on the
decoder, not on files, schedules or progress bars.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.backends.torch.attend import WholeAttend
from model.batch import Batch, BudgetRows
from model.decoder import Decoder
from model.shapes.decoder import DecoderConfig
from model.shapes.mixtures import Infinity
from model.step import Observer


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> None:
    """Normal weights of std 1/sqrt(fan-in), biases 0, residual outputs scaled by depth, spread of the draws at 1."""
    torch.manual_seed(seed)
    depth = 1 / math.sqrt(2 * len(model.layers))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()  # torch's own initial value is random, and drawn before the seed is set
        if parameter.ndim < 2:
            continue
        std = 0.02 if "embed" in name else parameter.shape[-1] ** -0.5
        if name.endswith(("out.weight", "down", "down.weight")):
            std *= depth
        nn.init.normal_(parameter, std=std)
        if name.endswith("ffn.router") and isinstance(model.config.mixtures[0], Infinity):
            parameter[parameter.shape[0] // 2 :] = 0.0  # exp(0) = 1: noise as large as the spread of the means


class Balance(Observer):
    """Observer that gathers the Switch balance loss E · Σ f_i P_i of softmax routers (2101.03961, eq. 4)."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        if scores_TE is not None:
            product_E = load_E / pairs * scores_TE.mean(0)
            self.losses.append(len(load_E) * product_E.sum())

    def mean(self) -> Tensor | float:
        return torch.stack(self.losses).mean() if self.losses else 0.0


def make_batch(ids_BS: Tensor, counts: list[int], seed: int) -> Batch:
    """A batch of whole sequences; layer l uses counts[l] for every token. Each row has a seed of its own.
    A dense model has no counts."""
    rows, length = ids_BS.shape
    tokens = rows * length
    counts_L1 = torch.tensor(counts, dtype=torch.int64)[:, None]
    pairs_L = tuple(tokens * count for count in counts)
    seeds_B = torch.arange(rows) + seed * 65536
    budget = BudgetRows(counts_L1.expand(-1, tokens).contiguous(), max(counts, default=0), pairs_L)
    positions_T = torch.arange(length).repeat(rows)
    ids_T = ids_BS.flatten()
    return Batch(
        ids_T=ids_T,
        positions_T=positions_T,
        seeds_T=seeds_B.repeat_interleave(length),
        budget=budget,
        rows_B=torch.arange(tokens),
    )


def draw_counts(config: DecoderConfig, largest: int, generator: torch.Generator) -> list[int]:
    """One count per MoE layer, uniform on 1..largest."""
    return torch.randint(1, largest + 1, (len(config.mixtures),), generator=generator).tolist()


def next_token_loss(model: Decoder, window_BS: Tensor, counts: list[int], seed: int, balance: float = 0.0) -> Tensor:
    """Mean cross-entropy in nats of the next token over windows [B, S + 1], plus the weighted balance loss."""
    ids_BS, target_BS = window_BS[:, :-1], window_BS[:, 1:]
    observer = Balance()
    logits_TV = model(make_batch(ids_BS, counts, seed), WholeAttend(ids_BS.shape[1], ids_BS.device), observer)
    return F.cross_entropy(logits_TV.float(), target_BS.flatten()) + balance * observer.mean()
