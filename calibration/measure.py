"""Turns scores, times and shapes into the options of a calibration. It runs nothing itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from calibration.scoring import Score
from calibration.work import DecoderWork, Weights
from model.budget import ExpertBudget
from weights.calibration import Option, Quality, Speed
from weights.calibration_hull import area

SECONDS_PER_HOUR = 3600


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured of one budget."""

    name: str
    budget: ExpertBudget
    score: Score
    tasks: dict[str, float]
    speed: Speed


def option(measured: Measured, trained: Measured, work: DecoderWork, weights: Weights) -> Option:
    """One option, next to the trained count."""
    counts, rule = measured.budget.per_layer, measured.budget.rule
    ran = measured.score.pairs_per_token / sum(counts)  # below 1 where a rule skips experts
    mean_counts = tuple(count * ran for count in counts)
    return Option(
        name=measured.name,
        counts=counts,
        quality=quality(measured, trained),
        speed=measured.speed,
        pairs_per_token=measured.score.pairs_per_token,
        bytes_per_token=work.bytes_per_token(mean_counts, weights),
        flops_per_token=work.flops_per_token(mean_counts),
        relative_cost=measured.speed.itl_ms["1"] / trained.speed.itl_ms["1"],
        normaliser=rule.normaliser,
        threshold=rule.threshold,
        top_p=rule.top_p,
        repair=rule.repair,
    )


def quality(measured: Measured, trained: Measured) -> Quality:
    """Figures of the text, and of the tasks."""
    score = measured.score
    return Quality(
        loss=score.loss,
        perplexity=score.perplexity,
        agreement=score.agreement,
        kl=score.kl,
        relative=trained.score.perplexity / score.perplexity,
        tasks=measured.tasks,
    )


def aiq(options: tuple[Option, ...]) -> float:
    """See `weights.calibration_hull.area`: of relative quality over relative cost."""
    return area((option.relative_cost, option.quality.relative) for option in options)


def cost_per_million(options: tuple[Option, ...], price_per_hour: float) -> dict[str, float]:
    """Of generated tokens, at the largest batch that was timed; empty without a price."""
    if not price_per_hour:
        return {}
    return {option.name: _cost(option.speed, price_per_hour) for option in options if option.speed}


def _cost(speed: Speed, price_per_hour: float) -> float:
    fastest: Mapping[str, float] = speed.tokens_per_second
    return price_per_hour / SECONDS_PER_HOUR / max(fastest.values()) * 1e6
