"""Measures which experts a task's text uses, and makes an expert set of them: of each layer those of most gate mass.

An expert's gate mass is the sum of its router scores over the tokens that run it at the trained count; counting tokens
instead keeps worse experts (arXiv 2206.00277). Not here: how a set is stored, and the checkpoint that it makes.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from calibration.opening import WINDOW, work_folder
from calibration.texts import read_texts, split
from calibration.windows import window_batch
from model.backends.torch.attend import WholeAttend
from model.budget import ExpertBudget
from model.decoder import Decoder
from model.errors import CheckpointError, InvalidRequest
from model.step import Observer
from weights import expert_sets as files
from weights.calibration import checkpoint_hash
from weights.config import read_config
from weights.expert_sets import ExpertSet, Loss
from weights.extract import check_count, check_model, restricted
from weights.folder import resolve_model
from weights.load import load_model
from weights.small_files import TOKENIZER, small_files
from weights.tokenizer import Tokenizer

LOGIT_BYTES = 128 << 20  # of one pass, in float32: bounds its windows
_KEEP = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)%|([0-9]{1,6})")


class GateMass(Observer):
    """Sums of router scores over the tokens that run each expert, [L, E] float64."""

    def __init__(self, layers: int, experts: int) -> None:
        self.mass_LE = torch.zeros(layers, experts, dtype=torch.float64)
        self._scores_TE = torch.empty(0)

    def routed(self, layer: int, pairs: int, load_E: Tensor, scores_TE: Tensor | None) -> None:
        """Keep the scores for `routes`, which follows."""
        assert scores_TE is not None
        self._scores_TE = scores_TE

    def routes(self, layer: int, expert_TK: Tensor) -> None:
        """Add up what the experts that run weigh."""
        expert_TK = expert_TK.long()
        score_TK = self._scores_TE.double().gather(-1, expert_TK.clamp(min=0)).where(expert_TK >= 0, 0)
        self.mass_LE[layer].index_add_(0, expert_TK.clamp(min=0).flatten(), score_TK.flatten())


def kept_count(keep: str, experts: int) -> int:
    """How many experts `25%` or `8` of so many are: a share is rounded to the nearest number, at least 1.

    Raises:
        InvalidRequest: it is neither.
    """
    if not (match := _KEEP.fullmatch(keep)):
        raise InvalidRequest(f"--keep must be a share as 25% or a number of experts as 8, got {keep!r:.80}")
    share, count = match.groups()
    return int(count) if count else max(1, round(experts * float(share) / 100))


def make_set(
    model_name: str,
    text: Sequence[Path],
    keep: str,
    name: str,
    tokens: int,
    other: Sequence[Path],
    output: Path | None,
    tokenizer_folder: Path | None = None,
) -> tuple[ExpertSet, Path]:
    """Measure and write a set; returns it and its file. About `tokens` tokens of each kind of text are read.

    Raises:
        CheckpointError, InvalidRequest: the model, a text, the count or the name cannot be used.
    """
    path = resolve_model(model_name)
    config, _ = read_config(path)
    check_model(config)
    experts = config.mixtures[0].num_experts
    kept = kept_count(keep, experts)
    check_count(config, kept)
    files.check_name(name)
    if not small_files(path, tokenizer_folder).has(TOKENIZER):
        raise CheckpointError("--text needs a tokenizer.json beside the weights")
    tokenizer, length = Tokenizer.load(path, tokenizer=tokenizer_folder), min(WINDOW, config.context - 1)
    decide, report = split(read_texts(text, tokenizer, length, tokens))
    others = [window for found in read_texts(other, tokenizer, length, tokens) for window in found] if other else []
    work = work_folder(path, output)
    model, raw = load_model(path, "auto")
    mass_LE = gate_mass(model, decide.windows)
    chosen_LK = mass_LE.sort(dim=-1, descending=True, stable=True).indices[:, :kept].sort(-1).values
    small, _ = restricted(model, raw, chosen_LK.tolist())
    found = ExpertSet(
        format=files.FORMAT,
        name=name,
        checkpoint=checkpoint_hash(path),
        text=", ".join(file.name for file in text),
        tokens=decide.tokens,
        num_experts=experts,
        experts=tuple(map(tuple, chosen_LK.tolist())),
        mass=tuple((mass_LE.gather(-1, chosen_LK).sum(-1) / mass_LE.sum(-1)).tolist()),
        task=Loss(loss(model, report.windows), loss(small, report.windows)),
        other=Loss(loss(model, others), loss(small, others)) if others else None,
    )
    return found, files.write(found, work)


@torch.inference_mode()
def gate_mass(model: Decoder, windows: Sequence[Sequence[int]]) -> Tensor:
    """What each expert weighs on these windows at the trained count, [L, E] float64."""
    observer = GateMass(len(model.config.mixtures), model.config.mixtures[0].num_experts)
    for part_BS in _parts(model, windows):
        batch = window_batch(part_BS, [_trained(model)] * len(part_BS))
        model.hidden(replace(batch, routes=True), WholeAttend(part_BS.shape[1]), observer)
    return observer.mass_LE


@torch.inference_mode()
def loss(model: Decoder, windows: Sequence[Sequence[int]]) -> float:
    """Nats per token of these windows at the trained count; the first token of each is not scored."""
    total = scored = 0.0
    for part_BS in _parts(model, windows):
        batch = window_batch(part_BS[:, :-1], [_trained(model)] * len(part_BS))
        logits_TV = model(batch, WholeAttend(part_BS.shape[1] - 1)).float()
        total += float(F.cross_entropy(logits_TV, part_BS[:, 1:].flatten(), reduction="sum"))
        scored += part_BS[:, 1:].numel()
    return total / scored


def _trained(model: Decoder) -> ExpertBudget:
    return ExpertBudget((model.config.experts.trained,) * len(model.config.mixtures))


def _parts(model: Decoder, windows: Sequence[Sequence[int]]) -> Sequence[Tensor]:
    """Windows of one length, as many at a time as may be."""
    window_BS = torch.tensor(windows)
    return window_BS.split(max(1, LOGIT_BYTES // (4 * model.config.vocabulary * window_BS.shape[1])))
