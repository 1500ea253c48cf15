"""Scores budgets on text: loss, agreement and divergence of their next-token distributions from the trained count's.

The model runs as it serves: through the engine's runner, with its kernels and paged cache. Memory is bounded: logits
exist for one part of a window at a time, and the trained count's distributions for as many windows as fit
`REFERENCE_BYTES`. Not here: which budgets and which text.
"""

import math
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass

import torch
from msgspec import json
from torch import Tensor

from calibration.partial import Partial
from calibration.progress import Progress
from engine.expert_stats import ExpertStats
from engine.plan import Chunk
from engine.runner import ModelRunner
from engine.sequence import Sequence
from engine.types import Request, Sampling
from model.budget import ExpertBudget

LOGIT_BYTES = 32 << 20  # of one step's logits, in float32
REFERENCE_BYTES = 512 << 20  # of the trained count's distributions that are kept
SEED = 0  # of the noise that a family draws: the same for all budgets


@dataclass(frozen=True, slots=True)
class Windows:
    """Pieces of text as token ids; the first token of each is not scored. `name` tells parts of the text apart."""

    name: str
    windows: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """How many tokens are scored."""
        return sum(len(window) - 1 for window in self.windows)


@dataclass(slots=True)
class Score:
    """Sums over scored tokens; `windows` counts those done."""

    windows: int = 0
    tokens: int = 0
    loss_sum: float = 0.0  # nats
    agreed: int = 0
    kl_sum: float = 0.0  # nats
    pairs: int = 0  # (token, expert) pairs, or draws, over all MoE layers

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.loss_sum / self.tokens

    @property
    def perplexity(self) -> float:
        """e to the loss."""
        return math.exp(self.loss)

    @property
    def agreement(self) -> float:
        """Share of tokens with the trained count's most probable next token."""
        return self.agreed / self.tokens

    @property
    def kl(self) -> float:
        """Mean KL divergence from the trained count's distribution, nats per token."""
        return self.kl_sum / self.tokens

    @property
    def pairs_per_token(self) -> float:
        """The mean."""
        return self.pairs / self.tokens

    def plus(self, other: "Score") -> "Score":
        """The sums over both."""
        own, others = asdict(self), asdict(other)
        return Score(**{name: value + others[name] for name, value in own.items()})


@dataclass(frozen=True, slots=True)
class Reference:
    """The trained count's next-token distributions in one window."""

    probs_SV: Tensor
    best_S: Tensor
    log_mean_S: Tensor  # Σ p log p


class Scorer:
    """Scores windows on one runner, whose cache it has to itself."""

    def __init__(self, runner: ModelRunner, trained: ExpertBudget, partial: Partial, progress: Progress) -> None:
        self._runner, self._trained, self._partial, self._progress = runner, trained, partial, progress
        self._references: dict[tuple[int, ...], Reference] = {}  # as many as fit REFERENCE_BYTES
        self._last: dict[tuple[int, ...], Reference] = {}
        self._step = max(1, LOGIT_BYTES // (4 * runner.model.config.vocabulary))  # tokens of one step

    @torch.inference_mode()
    def score(self, budgets: Seq[ExpertBudget], windows: Windows, salt: str = "") -> list[Score]:
        """See `Run.score`."""
        keys = [_key(budget, windows, salt) for budget in budgets]
        scores = [Score(**(self._partial.get(key) or {})) for key in keys]
        with self._progress.stage(f"scoring {windows.name}", len(windows.windows) * len(budgets)) as stage:
            for number, window in enumerate(windows.windows):
                for i, budget in enumerate(budgets):
                    computed = scores[i].windows <= number
                    if computed:
                        scores[i] = scores[i].plus(self._score(window, budget))
                        self._partial.put(keys[i], asdict(scores[i]))
                    stage.advance(computed)
        return scores

    def _score(self, window: tuple[int, ...], budget: ExpertBudget) -> Score:
        """Of one window."""
        reference = self._reference(window)
        score = Score(windows=1, tokens=len(window) - 1)
        next_S = torch.tensor(window[1:])
        for part, logits_SV, pairs in self._logits(window, budget):
            lse_S = logits_SV.logsumexp(-1)
            chosen_S = logits_SV.gather(-1, next_S[part, None])[:, 0]
            cross_S = (reference.probs_SV[part] * logits_SV).sum(-1) - lse_S  # Σ p log q
            score.loss_sum += float((lse_S - chosen_S).double().sum())
            score.kl_sum += float((reference.log_mean_S[part] - cross_S).double().sum())
            score.agreed += int((logits_SV.argmax(-1) == reference.best_S[part]).sum())
            score.pairs += pairs
        return score

    def _reference(self, window: tuple[int, ...]) -> Reference:
        if found := self._references.get(window) or self._last.get(window):
            return found
        probs, best, log_mean = [], [], []
        for _, logits_SV, _ in self._logits(window, self._trained):
            probs_SV = logits_SV.softmax(-1)
            probs.append(probs_SV)
            best.append(logits_SV.argmax(-1))
            log_mean.append((probs_SV * logits_SV).sum(-1) - logits_SV.logsumexp(-1))
        made = Reference(torch.cat(probs), torch.cat(best), torch.cat(log_mean))
        self._keep(window, made)
        return made

    def _keep(self, window: tuple[int, ...], reference: Reference) -> None:
        """Keep it for the next budget, and for good if it fits."""
        self._last = {window: reference}
        kept = sum(each.probs_SV.nbytes for each in self._references.values())
        if kept + reference.probs_SV.nbytes <= REFERENCE_BYTES:
            self._references[window] = reference

    @torch.inference_mode()
    def read(self, window: tuple[int, ...], budget: ExpertBudget) -> None:
        """Compute a window's logits and drop them: what scoring costs."""
        for _, logits_SV, _ in self._logits(window, budget):
            logits_SV.logsumexp(-1)

    def _logits(self, window: tuple[int, ...], budget: ExpertBudget) -> Iterator[tuple[slice, Tensor, int]]:
        """Of each part of a window: its place among the scored tokens, float32 logits, and the pairs that it took."""
        sequence = sequence_of(window, budget, self._runner)
        for start in range(0, len(window) - 1, self._step):
            length = min(self._step, len(window) - 1 - start)
            stats = ExpertStats()
            logits_SV = self._runner.forward((Chunk(sequence, start, length),), stats)
            yield slice(start, start + length), logits_SV.float(), stats.pairs


def sequence_of(
    tokens: tuple[int, ...], budget: ExpertBudget, runner: ModelRunner, row: int = 0, first_block: int = 0
) -> Sequence:
    """A sequence whose tokens are all scored, in the runner's cache from a block on; `row` tells sequences apart."""
    sampling = Sampling(max_tokens=0, seed=SEED, prompt_logprobs=0)
    sequence = Sequence(Request(f"scored-{row}", tokens, budget, sampling), 0.0)
    blocks = -(-len(tokens) // runner.cache.block_size)
    sequence.blocks = list(range(first_block, first_block + blocks))
    sequence.slot = row
    return sequence


def _key(budget: ExpertBudget, windows: Windows, salt: str) -> str:
    return f"score {windows.name} {salt} {json.encode(budget).decode()}"
